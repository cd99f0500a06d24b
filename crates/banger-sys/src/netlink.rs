//! The kernel's routing tables, read over a route netlink socket, and word of their changes.
//!
//! Only what the network policy needs: addresses and routes. Dumps are parsed here, by hand and bounds-checked: a
//! handful of attributes is not worth a library. [`add_address`] and [`add_route`] are the little that is written.

mod add;

pub use add::{NewRoute, add_address, add_route};

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const NLM_F_REQUEST_DUMP: u16 = 0x1 | 0x300;
const HEADER_LEN: usize = 16;
/// Both `ifaddrmsg` and the smallest part of `rtmsg` that matters start with family and prefix length.
const IFADDRMSG_LEN: usize = 8;
const RTMSG_LEN: usize = 12;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_MULTIPATH: u16 = 9;
const RTA_VIA: u16 = 18;
const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// Groups of changes: addresses and routes of IPv4, and of IPv6.
const GROUPS: u32 = 0x10 | 0x40 | 0x100 | 0x400;
/// The group of changes of interfaces.
const LINK_GROUP: u32 = 0x1;
/// The kernel's dumps come in pieces of at most this.
const CHUNK_LEN: usize = 64 * 1024;

/// What a route is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteKind {
    /// Towards other machines.
    Unicast,
    /// An address of this machine, also one it shares with others (anycast), or a network of such.
    Local,
    /// A broadcast address.
    Broadcast,
    /// Anything else.
    Other,
}

/// An address with the length of its network's prefix in bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inet {
    /// The address.
    pub address: IpAddr,
    /// At most 32 or 128.
    pub prefix_len: u8,
}

/// A route of any table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Where it leads.
    pub to: Inet,
    /// What it is for.
    pub kind: RouteKind,
    /// True when another machine carries the packets on; false when the destination is on the link itself.
    pub through_gateway: bool,
    /// Index of the interface; 0 when the route names several or none.
    pub interface: u32,
}

/// Tells when something of the network namespace it was opened in changes.
#[derive(Debug)]
pub struct Changes(OwnedFd);

impl Changes {
    /// Begins to listen for changes of interfaces.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn of_links() -> io::Result<Self> {
        Ok(Self(socket(LINK_GROUP, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?))
    }

    /// Begins to listen for changes of addresses and routes.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn open() -> io::Result<Self> {
        Ok(Self(socket(GROUPS, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?))
    }

    /// Takes what has been told so far. Losing some is fine: all that is said is that something changed.
    pub fn drain(&self) {
        let mut chunk = vec![0; CHUNK_LEN];
        // An overflow is told once and then cleared.
        while let Ok(_) | Err(rustix::io::Errno::NOBUFS) =
            rustix::net::recv(&self.0, chunk.as_mut_slice(), RecvFlags::empty())
        {}
    }
}

impl AsFd for Changes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl std::os::fd::AsRawFd for Changes {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

/// Returns the addresses of the caller's network namespace, with the length of their networks.
///
/// # Errors
/// When the kernel gives no answer.
pub fn addresses() -> io::Result<Vec<Inet>> {
    let mut found = Vec::new();
    dump(RTM_GETADDR, |kind, body| {
        if kind == RTM_NEWADDR
            && body.len() >= IFADDRMSG_LEN
            && let Some((whole, _)) = family(body[0])
        {
            let prefix_len = body[1].min(whole);
            // On a point-to-point link `IFA_ADDRESS` is the other end and `IFA_LOCAL` our own; else they are the same.
            attributes(&body[IFADDRMSG_LEN..], |name, value| {
                if let (IFA_ADDRESS | IFA_LOCAL, Some(address)) = (name, address(body[0], value)) {
                    found.push(Inet { address, prefix_len });
                }
            });
        }
    })?;
    found.dedup();
    Ok(found)
}

/// Returns the routes of all tables of the caller's network namespace.
///
/// # Errors
/// When the kernel gives no answer.
pub fn routes() -> io::Result<Vec<Route>> {
    let mut found = Vec::new();
    dump(RTM_GETROUTE, |kind, body| {
        if kind == RTM_NEWROUTE
            && let Some(route) = parse_route(body)
        {
            found.push(route);
        }
    })?;
    Ok(found)
}

fn parse_route(body: &[u8]) -> Option<Route> {
    if body.len() < RTMSG_LEN {
        return None;
    }
    let (whole, anywhere) = family(body[0])?;
    let kind = match body[7] {
        1 => RouteKind::Unicast,
        2 | 4 => RouteKind::Local,
        3 => RouteKind::Broadcast,
        _ => RouteKind::Other,
    };
    let to = Inet { address: anywhere, prefix_len: body[1].min(whole) };
    let mut route = Route { to, kind, through_gateway: false, interface: 0 };
    attributes(&body[RTMSG_LEN..], |name, value| match name {
        RTA_DST => route.to.address = address(body[0], value).unwrap_or(route.to.address),
        RTA_OIF => route.interface = value.try_into().map_or(0, u32::from_ne_bytes),
        RTA_GATEWAY | RTA_VIA | RTA_MULTIPATH => route.through_gateway = true,
        _ => {}
    });
    Some(route)
}

/// Length of an address in bits, and the one that stands for all.
fn family(number: u8) -> Option<(u8, IpAddr)> {
    match number {
        AF_INET => Some((32, Ipv4Addr::UNSPECIFIED.into())),
        AF_INET6 => Some((128, Ipv6Addr::UNSPECIFIED.into())),
        _ => None,
    }
}

fn address(family: u8, value: &[u8]) -> Option<IpAddr> {
    match family {
        AF_INET => Some(Ipv4Addr::from(<[u8; 4]>::try_from(value).ok()?).into()),
        AF_INET6 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(value).ok()?).into()),
        _ => None,
    }
}

fn socket(groups: u32, flags: SocketFlags) -> io::Result<OwnedFd> {
    // Protocol 0 is `NETLINK_ROUTE`.
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, groups))?;
    Ok(socket)
}

fn dump(request: u16, mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
    let socket = socket(0, SocketFlags::CLOEXEC)?;
    let mut message = Vec::with_capacity(HEADER_LEN + RTMSG_LEN);
    message.extend_from_slice(&((HEADER_LEN + RTMSG_LEN) as u32).to_ne_bytes());
    message.extend_from_slice(&request.to_ne_bytes());
    message.extend_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    message.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
    message.push(AF_UNSPEC);
    message.resize(HEADER_LEN + RTMSG_LEN, 0);
    rustix::net::send(&socket, &message, SendFlags::empty())?;
    let mut chunk = vec![0; CHUNK_LEN];
    loop {
        let (len, _) = rustix::net::recv(&socket, chunk.as_mut_slice(), RecvFlags::empty())?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if messages(&chunk[..len], &mut each)? {
            return Ok(());
        }
    }
}

/// Goes through the messages of one datagram; true when the dump is complete.
fn messages(mut bytes: &[u8], each: &mut impl FnMut(u16, &[u8])) -> io::Result<bool> {
    while let Some(header) = bytes.get(..HEADER_LEN) {
        let len = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let Some(body) = bytes.get(HEADER_LEN..len) else { return Err(io::ErrorKind::InvalidData.into()) };
        match kind {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let code = body.get(..4).and_then(|code| code.try_into().ok()).map_or(0, i32::from_ne_bytes);
                return Err(io::Error::from_raw_os_error(code.saturating_neg()));
            }
            kind => each(kind, body),
        }
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

fn attributes(mut bytes: &[u8], mut each: impl FnMut(u16, &[u8])) {
    while let Some(header) = bytes.get(..4) {
        let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let Some(value) = bytes.get(4..len) else { return };
        each(u16::from_ne_bytes([header[2], header[3]]), value);
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::{Changes, RouteKind, addresses, attributes, messages, routes};
    use std::net::Ipv4Addr;

    #[test]
    fn loopback_is_found() {
        let loopback = std::net::IpAddr::from(Ipv4Addr::LOCALHOST);
        assert!(addresses().unwrap().iter().any(|inet| inet.address == loopback && inet.prefix_len == 8));
        let local = |route: &super::Route| route.kind == RouteKind::Local && route.to.address == loopback;
        assert!(routes().unwrap().iter().any(local));
        Changes::open().unwrap().drain();
    }

    #[test]
    fn lengths_that_lie_end_the_walk() {
        let mut seen = 0;
        for bytes in [&[0; 8][..], &[3, 0, 1, 0, 9], &[200, 0, 1, 0], &[4, 0, 1, 0, 255, 255, 1, 0]] {
            attributes(bytes, |_, _| seen += 1);
        }
        assert_eq!(seen, 1);
        assert!(messages(&[255; 32], &mut |_, _| ()).is_err());
        assert!(messages(&[0; 32], &mut |_, _| ()).is_err());
    }
}
