//! Whose the other end of a TCP connection within this machine is, as the kernel says (`inet_diag`).

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

const NLMSG_ERROR: u16 = 2;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const HEADER_LEN: usize = 16;
/// `inet_diag_req_v2`: family, protocol, extensions, padding, states, then the ends.
const REQUEST_LEN: usize = 56;
/// `inet_diag_msg`: family, state, timer, retransmissions, the ends (48 bytes), then times, queues, uid, inode.
const ANSWER_LEN: usize = 72;
const STATE_AT: usize = 1;
const PORTS_AT: usize = 4;
const UID_AT: usize = 64;
const INODE_AT: usize = 68;
const TCP: u8 = 6;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const LISTENING: u8 = 10;

/// Asks about connections of the network namespace it was opened in, with user ids as the user namespace has them that
/// it was opened in: one that was opened before a process went elsewhere tells all of them.
#[derive(Debug)]
pub struct SockDiag(OwnedFd);

impl SockDiag {
    /// Opens the way to ask.
    ///
    /// # Errors
    /// When the kernel has no such thing.
    pub fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            flags,
            Some(netlink::SOCK_DIAG),
        )?;
        Ok(Self(socket))
    }

    /// Returns the user whose socket is bound to `local` and connected to `peer`; none when it has been closed, also where
    /// its connection still stands, since nobody knows any more whose it was.
    ///
    /// # Errors
    /// When the kernel gives no answer.
    pub fn owner(&self, local: SocketAddr, peer: SocketAddr) -> io::Result<Option<u32>> {
        let mut request = Vec::with_capacity(HEADER_LEN + REQUEST_LEN);
        request.extend_from_slice(&((HEADER_LEN + REQUEST_LEN) as u32).to_ne_bytes());
        request.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        request.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
        request.extend_from_slice(&[0; 8]);
        let family = if local.is_ipv4() { AF_INET } else { AF_INET6 };
        request.extend_from_slice(&[family, TCP, 0, 0]);
        request.extend_from_slice(&u32::MAX.to_ne_bytes());
        request.extend_from_slice(&local.port().to_be_bytes());
        request.extend_from_slice(&peer.port().to_be_bytes());
        for address in [local.ip(), peer.ip()] {
            match address {
                IpAddr::V4(address) => {
                    request.extend_from_slice(&address.octets());
                    request.extend_from_slice(&[0; 12]);
                }
                IpAddr::V6(address) => request.extend_from_slice(&address.octets()),
            }
        }
        // Any interface, and no cookie, which is all ones.
        request.extend_from_slice(&[0; 4]);
        request.extend_from_slice(&[0xff; 8]);
        rustix::net::send(&self.0, &request, SendFlags::empty())?;
        let mut answer = [0; 1024];
        let (len, _) = rustix::net::recv(&self.0, answer.as_mut_slice(), RecvFlags::empty())?;
        parse(&answer[..len], local.port(), peer.port())
    }
}

fn parse(answer: &[u8], local: u16, peer: u16) -> io::Result<Option<u32>> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let number = |at: usize| Some(u32::from_ne_bytes(answer.get(at..at + 4)?.try_into().ok()?));
    let kind = answer.get(4..6).ok_or_else(invalid)?;
    if kind == NLMSG_ERROR.to_ne_bytes() {
        let code = number(HEADER_LEN).ok_or_else(invalid)?.cast_signed().saturating_neg();
        let error = io::Error::from_raw_os_error(code);
        return if error.kind() == io::ErrorKind::NotFound { Ok(None) } else { Err(error) };
    }
    let body = answer.get(HEADER_LEN..HEADER_LEN + ANSWER_LEN).ok_or_else(invalid)?;
    let ports = [local.to_be_bytes(), peer.to_be_bytes()].concat();
    // Without the connection itself the kernel finds what listens at its address.
    if kind != SOCK_DIAG_BY_FAMILY.to_ne_bytes()
        || body[PORTS_AT..PORTS_AT + 4] != ports
        || body[STATE_AT] == LISTENING
    {
        return Ok(None);
    }
    let (uid, inode) = (number(HEADER_LEN + UID_AT), number(HEADER_LEN + INODE_AT));
    // A socket that was closed has no inode, and then the kernel says root.
    Ok(uid.filter(|_| inode.is_some_and(|inode| inode != 0)))
}

#[cfg(test)]
mod tests {
    use super::{SockDiag, parse};
    use std::io::Write as _;
    use std::net::{SocketAddr, TcpListener, TcpStream};

    #[test]
    fn the_owner_of_a_connection_is_known_until_it_closes_it() {
        let diag = SockDiag::open().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, peer) = listener.accept().unwrap();
        let own = server.local_addr().unwrap();
        match diag.owner(peer, own) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                println!("skipped: the_owner_of_a_connection_is_known_until_it_closes_it: no inet_diag");
                return;
            }
            owner => assert_eq!(owner.unwrap(), Some(rustix::process::getuid().as_raw())),
        }
        client.write_all(b"x").unwrap();
        drop(client);
        assert_eq!(diag.owner(peer, own).unwrap(), None, "it might have been anybody's");
        drop(server);
        // There is a listener, and no connection.
        let nobody = SocketAddr::new(peer.ip(), 1);
        assert_eq!(diag.owner(own, nobody).unwrap(), None);
        assert_eq!(diag.owner(nobody, own).unwrap(), None);
    }

    #[test]
    fn short_answers_are_errors() {
        for len in 0..100 {
            let _ = parse(&vec![0xff; len], 1, 2);
        }
        assert!(parse(&[0; 5], 1, 2).is_err());
    }
}
