//! A little internet: a namespace that plays the host, one that plays everything around it, and servers in both.

use super::capture::Capture;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// A server on the internet.
pub(crate) const PUBLIC: &str = "93.184.216.34";
/// The host's address; it looks public, so only the host's own list of addresses gives it away.
pub(crate) const HOST: &str = "91.198.7.2";
/// The host's address in a private network.
pub(crate) const HOST_LAN: &str = "192.168.77.2";
/// A machine on the host's link, with an address that looks public.
pub(crate) const NEIGHBOUR: &str = "91.198.7.1";
/// A machine of the LAN, also the host's resolver.
pub(crate) const LAN: &str = "192.168.77.1";
/// Where clouds tell machines their secrets.
pub(crate) const METADATA: &str = "169.254.169.254";

/// A second server on the internet.
pub(crate) const OTHER: &str = "93.184.216.35";
/// The same places with IPv6.
pub(crate) const PUBLIC6: &str = "2606:2800:220:1::34";
pub(crate) const HOST6: &str = "2a01:4f8:0:7::2";
pub(crate) const HOST_LAN6: &str = "fd77::2";
pub(crate) const NEIGHBOUR6: &str = "2a01:4f8:0:7::1";
pub(crate) const LAN6: &str = "fd77::1";
pub(crate) const METADATA6: &str = "fd00:ec2::254";
/// A private IPv4 address, as a translator and as 6to4 have it.
pub(crate) const TRANSLATED6: &str = "64:ff9b::a00:1";
pub(crate) const SIX_TO_FOUR6: &str = "2002:a00:1::1";
/// The hardware address of the host's only way out.
pub(crate) const HOST_LINK: [u8; 6] = [0x52, 0x54, 0, 0xab, 0xcd, 1];

type Job = Box<dyn FnOnce() + Send>;

/// A thread in a network namespace, and with a mount namespace, of its own.
struct Space(Sender<Job>);

impl Space {
    fn create() -> Self {
        let (jobs, queue) = channel::<Job>();
        std::thread::spawn(move || queue.into_iter().for_each(|job| job()));
        let space = Self(jobs);
        space.run(|| {
            use rustix::thread::UnshareFlags;
            banger_sys::namespace::unshare(UnshareFlags::NEWNET | UnshareFlags::NEWNS).unwrap();
            let private = rustix::mount::MountPropagationFlags::PRIVATE;
            rustix::mount::mount_change("/", private | rustix::mount::MountPropagationFlags::REC).unwrap();
            ip("link set lo up");
        });
        space
    }

    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, done) = channel();
        self.0.send(Box::new(move || tell.send(job()).unwrap())).unwrap();
        done.recv().unwrap()
    }

    fn ip(&self, words: &'static str) {
        self.run(move || ip(words));
    }

    /// The thread's id, by which `ip` finds its namespace.
    fn id(&self) -> i32 {
        self.run(|| rustix::thread::gettid().as_raw_nonzero().get())
    }
}

fn ip(words: &str) {
    let done = std::process::Command::new("ip").args(words.split(' ')).status().unwrap();
    assert!(done.success(), "ip {words}");
}

type Heard = Arc<(Mutex<Vec<String>>, Condvar)>;

/// All of it.
pub(crate) struct World {
    host: Space,
    _around: Space,
    heard: Heard,
    capture: Mutex<Option<Capture>>,
    _resolv_conf: tempfile::NamedTempFile,
}

impl World {
    /// Builds it. It goes with its threads and the processes started in it.
    pub(crate) fn create() -> Self {
        let (host, around) = (Space::create(), Space::create());
        let id = around.id();
        host.run(move || ip(&format!("link add up0 type veth peer name w0 netns {id}")));
        for words in [
            "link set up0 address 52:54:00:ab:cd:01",
            "addr add 91.198.7.2/24 dev up0",
            "addr add 192.168.77.2/24 dev up0",
            "addr add 2a01:4f8:0:7::2/64 dev up0 nodad",
            "addr add fd77::2/64 dev up0 nodad",
            "link set up0 up",
        ] {
            host.ip(words);
        }
        for words in [
            "addr add 91.198.7.1/24 dev w0",
            "addr add 192.168.77.1/24 dev w0",
            "addr add 2a01:4f8:0:7::1/64 dev w0 nodad",
            "addr add fd77::1/64 dev w0 nodad",
            "link set w0 up",
            "addr add 93.184.216.34/32 dev lo",
            "addr add 93.184.216.35/32 dev lo",
            "addr add 169.254.169.254/32 dev lo",
            "addr add 2606:2800:220:1::34/128 dev lo nodad",
            "addr add fd00:ec2::254/128 dev lo nodad",
            "addr add 64:ff9b::a00:1/128 dev lo nodad",
            "addr add 2002:a00:1::1/128 dev lo nodad",
        ] {
            around.ip(words);
        }
        host.ip("route add default via 91.198.7.1");
        host.ip("-6 route add default via 2a01:4f8:0:7::1");
        host.run(watch_boundary);
        let capture = Mutex::new(Some(host.run(Capture::start)));
        let heard = Heard::default();
        let serve = |space: &Space, address: &'static str, word: &'static str| {
            let heard = heard.clone();
            space.run(move || serve(address, word, &heard));
        };
        serve(&host, "127.0.0.1", "loopback");
        serve(&host, HOST, "host");
        serve(&host, HOST_LAN, "host-lan");
        serve(&around, PUBLIC, "public");
        serve(&around, NEIGHBOUR, "neighbour");
        serve(&around, LAN, "lan");
        serve(&around, METADATA, "metadata");
        serve(&around, OTHER, "other");
        serve(&host, "::1", "loopback6");
        serve(&host, HOST6, "host6");
        serve(&host, HOST_LAN6, "host-lan6");
        for (address, word) in [
            (PUBLIC6, "public6"),
            (NEIGHBOUR6, "neighbour6"),
            (LAN6, "lan6"),
            (METADATA6, "metadata6"),
            (TRANSLATED6, "translated6"),
            (SIX_TO_FOUR6, "6to4"),
        ] {
            serve(&around, address, word);
        }
        around.run(serve_names);
        let mut resolv_conf = tempfile::NamedTempFile::new().unwrap();
        writeln!(resolv_conf, "nameserver {LAN}").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        std::fs::set_permissions(resolv_conf.path(), mode).unwrap();
        let path = resolv_conf.path().to_path_buf();
        host.run(move || rustix::mount::mount_bind(&path, "/etc/resolv.conf").unwrap());
        Self { host, _around: around, heard, capture, _resolv_conf: resolv_conf }
    }

    /// Runs a job as a process of the host would.
    pub(crate) fn on_host<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        self.host.run(job)
    }

    /// Takes the host's way to everywhere.
    pub(crate) fn cut(&self) {
        self.host.ip("route del default");
        self.host.ip("-6 route del default");
    }

    /// Takes the host's IPv6 away.
    pub(crate) fn cut_ipv6(&self) {
        self.host.ip("-6 route del default");
    }

    /// Where anything was sent to by processes of the host, loopback included: `address . protocol . port`.
    pub(crate) fn sent(&self) -> String {
        self.host.run(|| {
            let output =
                std::process::Command::new("nft").args(["list", "table", "inet", "seen"]).output().unwrap();
            assert!(output.status.success());
            String::from_utf8(output.stdout).unwrap()
        })
    }

    /// The capture of what leaves the host, once.
    pub(crate) fn take_capture(&self) -> Capture {
        self.capture.lock().unwrap().take().unwrap()
    }

    /// Puts a file in the place of another, for what runs on the host.
    pub(crate) fn cover(&self, path: &'static str, with: &'static str) {
        self.host.run(move || rustix::mount::mount_bind(with, path).unwrap());
    }

    /// Makes the public addresses the host's own.
    pub(crate) fn take_public_addresses(&self) {
        self.host.ip("addr add 93.184.216.34/32 dev lo");
        self.host.ip("addr add 2606:2800:220:1::34/128 dev lo nodad");
        for (address, word) in [(PUBLIC, "public"), (PUBLIC6, "public6")] {
            let heard = self.heard.clone();
            self.host.run(move || serve(address, word, &heard));
        }
    }

    /// What the web servers were asked, in order: `word tcp path` or `word udp`.
    pub(crate) fn heard(&self) -> Vec<String> {
        self.heard.0.lock().unwrap().clone()
    }

    /// Waits until a server has been asked this.
    pub(crate) fn wait_heard(&self, line: &str) {
        let heard = self.heard.0.lock().unwrap();
        let absent = |heard: &mut Vec<String>| !heard.iter().any(|known| known == line);
        let (_heard, late) =
            self.heard.1.wait_timeout_while(heard, Duration::from_secs(120), absent).unwrap();
        assert!(!late.timed_out(), "nobody asked {line}");
    }
}

/// Writes down what leaves the host's processes, before anything can lose it.
fn watch_boundary() {
    let script = "table inet seen {
        set sent4 { type ipv4_addr . inet_proto . inet_service; flags dynamic; size 65535; }
        set sent6 { type ipv6_addr . inet_proto . inet_service; flags dynamic; size 65535; }
        chain output {
            type filter hook output priority raw; policy accept;
            meta nfproto ipv4 meta l4proto { tcp, udp } update @sent4 { ip daddr . meta l4proto . th dport }
            meta nfproto ipv6 meta l4proto { tcp, udp } update @sent6 { ip6 daddr . meta l4proto . th dport }
        }
    }";
    let done = std::process::Command::new("nft").arg(script).status().unwrap();
    assert!(done.success(), "nft");
}

fn tell(heard: &Heard, line: String) {
    heard.0.lock().unwrap().push(line);
    heard.1.notify_all();
}

/// Answers with a word on port 80, by TCP and UDP, and writes down that somebody asked.
fn serve(address: &'static str, word: &'static str, heard: &Heard) {
    let address = (address.parse::<IpAddr>().unwrap(), 80);
    let (listener, socket) = (TcpListener::bind(address).unwrap(), UdpSocket::bind(address).unwrap());
    let known = heard.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, known) = (stream.unwrap(), known.clone());
            std::thread::spawn(move || {
                stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
                let mut request = [0; 1000];
                let len = stream.read(&mut request).unwrap_or(0);
                let path =
                    String::from_utf8_lossy(&request[..len]).split(' ').nth(1).unwrap_or("").to_owned();
                tell(&known, format!("{word} tcp {path}"));
                let body = format!("{word}\n");
                let _ = write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            });
        }
    });
    let known = heard.clone();
    std::thread::spawn(move || {
        let mut packet = [0; 1000];
        loop {
            let (len, peer) = socket.recv_from(&mut packet).unwrap();
            // What begins like a path is told, to know one from the other.
            let path = Some(&packet[..len]).filter(|packet| packet.starts_with(b"/"));
            let path = path.map(|path| format!(" {}", String::from_utf8_lossy(path))).unwrap_or_default();
            tell(&known, format!("{word} udp{path}"));
            let _ = socket.send_to(format!("{word}\n").as_bytes(), peer);
        }
    });
}

/// The host's resolver: some names, by UDP and TCP.
fn serve_names() {
    let address = (LAN.parse::<IpAddr>().unwrap(), 53);
    let (listener, socket) = (TcpListener::bind(address).unwrap(), UdpSocket::bind(address).unwrap());
    std::thread::spawn(move || {
        let mut packet = [0; 1000];
        loop {
            let (len, peer) = socket.recv_from(&mut packet).unwrap();
            let _ = socket.send_to(&answer(&packet[..len]), peer);
        }
    });
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut len = [0; 2];
            if stream.read_exact(&mut len).is_err() {
                continue;
            }
            let mut query = vec![0; usize::from(u16::from_be_bytes(len))];
            stream.read_exact(&mut query).unwrap();
            let answer = answer(&query);
            stream.write_all(&(answer.len() as u16).to_be_bytes()).unwrap();
            stream.write_all(&answer).unwrap();
        }
    });
}

fn answer(query: &[u8]) -> Vec<u8> {
    let end = 12 + query[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
    let mut answer = query[..end].to_vec();
    answer[2] |= 0x80;
    answer[3] = 0x80;
    answer[6..12].fill(0);
    let (is_ipv4, is_ipv6) = (query[end - 3] == 1, query[end - 3] == 28);
    let (ipv4, ipv6) = match &query[12..] {
        name if name.starts_with(b"\x06public\x04test\0") => (PUBLIC, Some(PUBLIC6)),
        name if name.starts_with(b"\x05other\x04test\0") => (OTHER, None),
        name if name.starts_with(b"\x09rebinding\x04test\0") => (LAN, Some(LAN6)),
        _ => {
            answer[3] |= 3;
            return answer;
        }
    };
    let address: Option<IpAddr> = match (is_ipv4, is_ipv6) {
        (true, _) => Some(ipv4.parse().unwrap()),
        (_, true) => ipv6.map(|ipv6| ipv6.parse().unwrap()),
        _ => None,
    };
    if let Some(address) = address {
        answer[7] = 1;
        answer.extend_from_slice(&[0xc0, 12, 0, query[end - 3], 0, 1, 0, 0, 0, 0, 0]);
        match address {
            IpAddr::V4(address) => {
                answer.push(4);
                answer.extend_from_slice(&address.octets());
            }
            IpAddr::V6(address) => {
                answer.push(16);
                answer.extend_from_slice(&address.octets());
            }
        }
    }
    answer
}
