//! What listens in the guest, as its kernel says.
//!
//! No kernel tells when a socket begins to listen, so this looks four times a second, and only as long as the session is
//! open. A look reads four small files: `/proc/net/tcp` has its listeners first and is read no further, so that
//! thousands of connections cost nothing. Processes are looked for only when something has changed. The files of
//! `/proc/net` and not sock_diag, whose modules a small image can't load.

use crate::beside;
use banger_wire::frame::{Frame, Kind};
use banger_wire::ports::{LISTENERS_MAX, Listener, Listeners, PROCESS_LEN_MAX, Protocol};
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;
use tokio::sync::mpsc;

/// Time between two looks. A person who starts a server does not see it; a guest that does nothing else is woken four
/// times a second.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How the kernel calls the states of a TCP socket that listens and of a UDP socket without a peer.
const LISTENING: &str = "0A";
const UNCONNECTED: &str = "07";

/// A socket as the kernel lists it. The inode is what its owner's descriptor names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Socket {
    protocol: Protocol,
    port: u16,
    address: IpAddr,
    inode: u64,
}

/// Tells what listens, now and after every change, until the host closes the session.
pub(crate) async fn watch(session: u32, mut inbox: mpsc::UnboundedReceiver<Frame>, out: mpsc::Sender<Frame>) {
    let mut told = None;
    loop {
        let now = sockets();
        if told.as_ref() != Some(&now) {
            let sockets = now.clone();
            // A guest with many processes has many descriptors to look through.
            let described = match beside::start(move || describe(&sockets)) {
                Ok(work) => work.await.unwrap_or_default(),
                Err(_) => describe(&now),
            };
            let Ok(frame) = Frame::message(session, &described) else { return };
            if out.send(frame).await.is_err() {
                return;
            }
            told = Some(now);
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            frame = inbox.recv() => if frame.is_none_or(|frame| frame.kind == Kind::Close) { return },
        }
    }
}

fn sockets() -> Vec<Socket> {
    let mut sockets = Vec::new();
    for (name, protocol) in
        [("tcp", Protocol::Tcp), ("tcp6", Protocol::Tcp), ("udp", Protocol::Udp), ("udp6", Protocol::Udp)]
    {
        // A kernel without IPv6 has no such file.
        if let Ok(file) = File::open(format!("/proc/net/{name}")) {
            read(BufReader::new(file), protocol, &mut sockets);
        }
    }
    sockets.sort();
    // Several processes may share a port.
    sockets.dedup_by(|one, other| {
        (one.protocol, one.port, one.address) == (other.protocol, other.port, other.address)
    });
    sockets.truncate(LISTENERS_MAX);
    sockets
}

/// Reads one of the kernel's tables as far as it is about listeners.
fn read(table: impl BufRead, protocol: Protocol, sockets: &mut Vec<Socket>) {
    for line in table.lines().skip(1).map_while(Result::ok) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (Some(local), Some(state), Some(inode)) = (words.get(1), words.get(3), words.get(9)) else {
            continue;
        };
        match protocol {
            Protocol::Tcp if *state != LISTENING => return,
            Protocol::Udp if *state != UNCONNECTED => continue,
            _ => {}
        }
        let found = parse_address(local).zip(inode.parse().ok());
        if let Some(((address, port), inode)) = found.filter(|((_, port), _)| *port != 0) {
            sockets.push(Socket { protocol, port, address, inode });
        }
    }
}

/// Reads `0100007F:1F90`: numbers of the machine's own byte order, then the port.
fn parse_address(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let number = |at: usize| Some(u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let address = match address.len() {
        8 => Ipv4Addr::from(number(0)?).into(),
        32 => {
            let mut bytes = [0; 16];
            for (at, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&number(at * 8)?);
            }
            let address = Ipv6Addr::from(bytes);
            address.to_ipv4_mapped().map_or(IpAddr::V6(address), IpAddr::V4)
        }
        _ => return None,
    };
    Some((address, port))
}

/// Adds what has the sockets.
fn describe(sockets: &[Socket]) -> Listeners {
    let mut owners: HashMap<u64, Option<(u32, String)>> =
        sockets.iter().map(|socket| (socket.inode, None)).collect();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        for descriptor in std::fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            let Ok(target) = std::fs::read_link(descriptor.path()) else { continue };
            let inode = target
                .to_str()
                .and_then(|text| text.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
            let Some(owner) = inode.and_then(|inode: u64| owners.get_mut(&inode)) else { continue };
            // The first process is the parent as a rule.
            if owner.as_ref().is_none_or(|(known, _)| pid < *known) {
                let name = std::fs::read(process.path().join("comm")).unwrap_or_default();
                let name =
                    String::from_utf8_lossy(name.trim_ascii_end()).chars().take(PROCESS_LEN_MAX).collect();
                *owner = Some((pid, name));
            }
        }
    }
    let described = sockets.iter().map(|socket| {
        let (pid, process) = owners.get(&socket.inode).cloned().flatten().unzip();
        let Socket { protocol, port, address, .. } = *socket;
        Listener { protocol, port, address, process, pid }
    });
    Listeners { sockets: described.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_understood() {
        let head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";
        let tcp = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0 0 4242 1 0 1\n\
                   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0 0 7 1 0 1\n\
                   2: 0100007F:0050 0100007F:0051 01 00000000:00000000 00:00000000 00000000  0 0 8 1 0 1\n\
                   3: 0100007F:0052 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0 0 9 1 0 1\n";
        let tcp6 = "0: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 5 1\n";
        let udp = "1: 3500007F:0035 00000000:0000 07 0:0 0:0 0 0 0 6 1\n\
                   2: 0100007F:0035 0100007F:0001 01 0:0 0:0 0 0 0 6 1\nnonsense\n3: x y 07 z\n";
        let mut sockets = Vec::new();
        for (table, protocol) in [(tcp, Protocol::Tcp), (tcp6, Protocol::Tcp), (udp, Protocol::Udp)] {
            read(format!("{head}{table}").as_bytes(), protocol, &mut sockets);
        }
        let found: Vec<String> = sockets
            .iter()
            .map(|socket| {
                format!("{:?} {} {} {}", socket.protocol, socket.address, socket.port, socket.inode)
            })
            .collect();
        if cfg!(target_endian = "little") {
            // What comes after the first connection is not looked at.
            assert_eq!(
                found,
                ["Tcp 127.0.0.1 8080 4242", "Tcp 0.0.0.0 22 7", "Tcp ::1 80 5", "Udp 127.0.0.53 53 6"]
            );
        }
    }

    #[test]
    fn a_listener_of_this_process_is_found_with_its_name() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let sockets: Vec<Socket> = sockets().into_iter().filter(|socket| socket.port == port).collect();
        let described = describe(&sockets).sockets;
        let own = described.iter().find(|listener| listener.protocol == Protocol::Tcp).unwrap();
        assert_eq!((own.address.to_string().as_str(), own.pid), ("127.0.0.1", Some(std::process::id())));
        assert!(own.process.as_ref().is_some_and(|name| !name.is_empty()));
        drop(listener);
        assert!(
            !super::sockets().iter().any(|socket| socket.port == port && socket.protocol == Protocol::Tcp)
        );
    }
}
