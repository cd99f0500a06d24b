//! What leaves the world's host, as `tcpdump` sees it: every interface, and on its loopback what is for the host itself.

use super::world::{HOST, HOST_LAN, HOST_LAN6, HOST_LINK, HOST6, World};
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Of a capture's file: before the first packet, and before each.
const FILE_HEADER_LEN: usize = 24;
const RECORD_HEADER_LEN: usize = 16;
/// Of `LINUX_SLL2`, what a packet on any interface begins with
/// (<https://www.tcpdump.org/linktypes/LINKTYPE_LINUX_SLL2.html>).
const LINK_HEADER_LEN: usize = 20;
/// In that header: a loopback interface, and a packet that is sent.
const LOOPBACK: [u8; 2] = [3, 4];
const OUTGOING: u8 = 4;
/// Where the daemon's name server is.
const DAEMON_PORT: u16 = 42069;
/// Nobody listens there; what is sent there marks the end.
const END: &str = "127.0.0.1:9";
const PATIENCE: Duration = Duration::from_secs(20);

/// One packet that left.
#[derive(Debug)]
struct Packet {
    /// The hardware address it left from, of six bytes; none on the loopback.
    link: [u8; 6],
    source: IpAddr,
    to: IpAddr,
    /// As the header of IPv4 or IPv6 has it.
    protocol: u8,
    /// Of TCP and UDP: the sender's, and the receiver's.
    ports: Option<(u16, u16)>,
    bytes: Vec<u8>,
}

impl Packet {
    /// Whether its data has this text.
    fn says(&self, text: &str) -> bool {
        self.bytes.windows(text.len()).any(|bytes| bytes == text.as_bytes())
    }

    /// The receiver's port.
    fn port(&self) -> Option<u16> {
        self.ports.map(|(_, port)| port)
    }

    /// The daemon tries whether the address of its name server is taken, whatever vms do.
    fn is_of_the_daemon(&self) -> bool {
        let is_there = |address: IpAddr, port| {
            matches!(address, IpAddr::V4(address) if address.octets()[..2] == [127, 77])
                && port == DAEMON_PORT
        };
        self.ports.is_some_and(|(from, to)| is_there(self.source, from) || is_there(self.to, to))
    }

    /// Of a link: who is there, and who listens to which group. A host says this by itself.
    fn is_of_a_link(&self) -> bool {
        match (self.protocol, self.to) {
            // Hop-by-hop options, as reports of groups have them.
            (0, IpAddr::V6(to)) => to.is_multicast(),
            (58, IpAddr::V6(_)) => matches!(self.bytes[40], 133..=136 | 143),
            (2, _) => true,
            _ => false,
        }
    }
}

/// A `tcpdump` that runs.
pub(crate) struct Capture {
    tcpdump: Child,
    chunks: Receiver<Vec<u8>>,
}

impl Capture {
    /// Begins in the calling thread's network namespace; it is under way when this returns.
    pub(crate) fn start() -> Self {
        let mut tcpdump = Command::new("tcpdump")
            // As root until the end: there may be no user of its own. `-U`: each packet as it comes.
            .args(["-i", "any", "-y", "LINUX_SLL2", "-nn", "-Z", "root", "-U", "-w", "-"])
            .args(["--immediate-mode", "-B", "16384"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (tell, chunks) = channel();
        let mut stdout = tcpdump.stdout.take().unwrap();
        std::thread::spawn(move || {
            let mut chunk = vec![0; 1 << 16];
            while let Ok(len @ 1..) = stdout.read(&mut chunk) {
                let _ = tell.send(chunk[..len].to_vec());
            }
        });
        // The file's header comes before the first packet is waited for, the words to the user after it.
        let mut words = String::new();
        let mut byte = [0];
        let stderr = tcpdump.stderr.as_mut().unwrap();
        while !words.contains("listening on") {
            assert_eq!(stderr.read(&mut byte).unwrap(), 1, "tcpdump ended: {words}");
            words.push(char::from(byte[0]));
        }
        Self { tcpdump, chunks }
    }

    /// Ends it, in the network namespace it began in; returns what has left until now, in order.
    fn end(mut self) -> Vec<Packet> {
        // What was sent before this was seen before this.
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mark = format!("the end of the capture, from {}", socket.local_addr().unwrap());
        socket.send_to(mark.as_bytes(), END).unwrap();
        let (mut file, until) = (Vec::new(), Instant::now() + PATIENCE);
        let packets = loop {
            let rest = until.saturating_duration_since(Instant::now());
            file.extend(self.chunks.recv_timeout(rest).expect("tcpdump has not seen the end"));
            let mut packets = packets(&file);
            if let Some(end) = packets.iter().position(|packet| packet.says(&mark)) {
                packets.truncate(end);
                break packets;
            }
        };
        let pid = rustix::process::Pid::from_child(&self.tcpdump);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        let mut words = String::new();
        self.tcpdump.stderr.take().unwrap().read_to_string(&mut words).unwrap();
        assert!(words.contains("\n0 packets dropped by kernel"), "not all was seen: {words}");
        packets
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.tcpdump.kill();
        let _ = self.tcpdump.wait();
    }
}

/// The IP packets of a capture's file, as far as it has come, without what the host says by itself.
fn packets(file: &[u8]) -> Vec<Packet> {
    let Some(mut rest) = file.get(FILE_HEADER_LEN..) else { return Vec::new() };
    assert_eq!(file[..4], 0xa1b2_c3d4_u32.to_ne_bytes(), "a capture's file");
    let mut packets = Vec::new();
    while let Some(header) = rest.get(..RECORD_HEADER_LEN) {
        let len = u32::from_ne_bytes(header[8..12].try_into().unwrap()) as usize;
        let Some(record) = rest.get(RECORD_HEADER_LEN..RECORD_HEADER_LEN + len) else { break };
        packets.extend(packet(record).filter(|packet| !packet.is_of_a_link() && !packet.is_of_the_daemon()));
        rest = &rest[RECORD_HEADER_LEN + len..];
    }
    packets
}

fn packet(record: &[u8]) -> Option<Packet> {
    let (link, bytes) = record.split_at(LINK_HEADER_LEN);
    // What is sent on a loopback interface is told of once, as received.
    if link[8..10] != LOOPBACK && link[10] != OUTGOING {
        return None;
    }
    let array = |at: usize| <[u8; 4]>::try_from(&bytes[at..at + 4]).unwrap();
    let array6 = |at: usize| <[u8; 16]>::try_from(&bytes[at..at + 16]).unwrap();
    let (source, to, protocol, at): (IpAddr, IpAddr, _, _) = match &link[..2] {
        [0x08, 0x00] => {
            let at = usize::from(bytes[0] & 15) * 4;
            (Ipv4Addr::from(array(12)).into(), Ipv4Addr::from(array(16)).into(), bytes[9], at)
        }
        [0x86, 0xdd] => (Ipv6Addr::from(array6(8)).into(), Ipv6Addr::from(array6(24)).into(), bytes[6], 40),
        // A request for a hardware address.
        [0x08, 0x06] => return None,
        other => panic!("a packet of kind {other:02x?} left: {bytes:02x?}"),
    };
    let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let ports = [6, 17].contains(&protocol).then(|| (port(at), port(at + 2)));
    let link = link[12..18].try_into().unwrap();
    Some(Packet { link, source, to, protocol, ports, bytes: bytes.to_vec() })
}

/// What left a world's host until now.
pub(crate) struct Captured(Vec<Packet>);

impl Captured {
    /// Ends the world's capture. Whatever left has the host's addresses, or this fails.
    pub(crate) fn of(world: &World) -> Self {
        let capture = world.take_capture();
        let packets = world.on_host(move || capture.end());
        let own: Vec<IpAddr> =
            [HOST, HOST_LAN, HOST6, HOST_LAN6].map(|address| address.parse().unwrap()).to_vec();
        for packet in &packets {
            assert!([[0; 6], HOST_LINK].contains(&packet.link), "another hardware address: {packet:?}");
            let is_own = own.contains(&packet.source) || packet.source.is_loopback();
            assert!(is_own, "another address: {packet:?}");
        }
        Self(packets)
    }

    /// Whether anything left for there.
    pub(crate) fn has(&self, to: &str, port: u16) -> bool {
        let to = to.parse::<IpAddr>().unwrap();
        self.0.iter().any(|packet| packet.to == to && packet.port() == Some(port))
    }

    /// Whether anything left that has this text.
    pub(crate) fn says(&self, text: &str) -> bool {
        self.0.iter().any(|packet| packet.says(text))
    }

    /// Fails if anything left but what is for one of these, at its port, and errors of ICMP to the same.
    pub(crate) fn assert_only(&self, allowed: &[(&str, u16)]) {
        let allowed: Vec<(IpAddr, u16)> =
            allowed.iter().map(|(to, port)| (to.parse().unwrap(), *port)).collect();
        for packet in &self.0 {
            let is_allowed = |(to, port): &(IpAddr, u16)| {
                *to == packet.to && packet.port().map_or([1, 58].contains(&packet.protocol), |is| is == *port)
            };
            assert!(allowed.iter().any(is_allowed), "left the host: {packet:?}");
        }
    }
}
