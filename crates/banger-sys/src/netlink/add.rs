//! Addresses and routes that `ioctl` can't express: a second address of an interface, and a route that says which of
//! them packets come from.

use super::{HEADER_LEN, NLMSG_ERROR, RTA_DST, RTA_GATEWAY, RTA_OIF, socket};
use rustix::net::{RecvFlags, SendFlags, SocketFlags};
use std::io;
use std::net::Ipv4Addr;

const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
/// A request that is answered, for something that is not there yet.
const FLAGS: u16 = 0x1 | 0x4 | 0x200 | 0x400;
const IFA_LOCAL: u16 = 2;
const RTA_PREFSRC: u16 = 7;
const AF_INET: u8 = 2;
const TABLE_MAIN: u8 = 254;
/// Set by an administrator at start-up.
const PROTOCOL_BOOT: u8 = 3;
const SCOPE_ANYWHERE: u8 = 0;
const SCOPE_LINK: u8 = 253;
const UNICAST: u8 = 1;

/// A route to be added to the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewRoute {
    /// Where it leads; no bit beyond the prefix is set.
    pub to: Ipv4Addr,
    /// Length of the prefix in bits, at most 32.
    pub prefix_len: u8,
    /// Who carries packets on; none when the destination is on the link itself.
    pub gateway: Option<Ipv4Addr>,
    /// The caller's own address that packets come from, unless a program chose one.
    pub source: Option<Ipv4Addr>,
    /// Index of the interface.
    pub interface: u32,
}

/// Gives the interface of this index one more IPv4 address, of no network.
///
/// # Errors
/// When it has that address, there is no such interface, or the caller may not change it.
pub fn add_address(interface: u32, address: Ipv4Addr) -> io::Result<()> {
    let mut body = vec![AF_INET, 32, 0, SCOPE_ANYWHERE];
    body.extend_from_slice(&interface.to_ne_bytes());
    attribute(&mut body, IFA_LOCAL, &address.octets());
    request(RTM_NEWADDR, &body)
}

/// Adds a route.
///
/// # Errors
/// When there is one, its parts don't fit each other, or the caller may not change routes.
pub fn add_route(route: &NewRoute) -> io::Result<()> {
    let scope = if route.gateway.is_some() { SCOPE_ANYWHERE } else { SCOPE_LINK };
    let mut body =
        vec![AF_INET, route.prefix_len, 0, 0, TABLE_MAIN, PROTOCOL_BOOT, scope, UNICAST, 0, 0, 0, 0];
    attribute(&mut body, RTA_DST, &route.to.octets());
    attribute(&mut body, RTA_OIF, &route.interface.to_ne_bytes());
    for (name, address) in [(RTA_GATEWAY, route.gateway), (RTA_PREFSRC, route.source)] {
        if let Some(address) = address {
            attribute(&mut body, name, &address.octets());
        }
    }
    request(RTM_NEWROUTE, &body)
}

/// All values here have four bytes, so nothing has to be padded.
fn attribute(body: &mut Vec<u8>, name: u16, value: &[u8; 4]) {
    body.extend_from_slice(&8u16.to_ne_bytes());
    body.extend_from_slice(&name.to_ne_bytes());
    body.extend_from_slice(value);
}

fn request(kind: u16, body: &[u8]) -> io::Result<()> {
    let socket = socket(0, SocketFlags::CLOEXEC)?;
    let len = u32::try_from(HEADER_LEN + body.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut message = len.to_ne_bytes().to_vec();
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&FLAGS.to_ne_bytes());
    message.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
    message.extend_from_slice(body);
    rustix::net::send(&socket, &message, SendFlags::empty())?;
    let mut answer = [0; 1024];
    let (len, _) = rustix::net::recv(&socket, answer.as_mut_slice(), RecvFlags::empty())?;
    outcome(&answer[..len.min(answer.len())])
}

/// What the kernel answered: an error, whose number is 0 when there was none.
fn outcome(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6).and_then(|kind| kind.try_into().ok()).map(u16::from_ne_bytes);
    let code = answer.get(HEADER_LEN..HEADER_LEN + 4).and_then(|code| code.try_into().ok());
    match (kind, code.map(i32::from_ne_bytes)) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::{NewRoute, add_address, add_route, outcome};
    use crate::netlink::{addresses, routes};
    use crate::{namespace, netif};
    use rustix::thread::UnshareFlags;
    use std::net::{IpAddr, Ipv4Addr};

    #[test]
    fn an_address_and_a_route_from_it_are_added_once() {
        let tried = std::thread::spawn(|| {
            let flags = UnshareFlags::NEWUSER | UnshareFlags::NEWNET;
            // A thread can't enter a user namespace of its own, but with root's rights needs none.
            if namespace::unshare(flags).or_else(|_| namespace::unshare(UnshareFlags::NEWNET)).is_err() {
                return println!(
                    "skipped: an_address_and_a_route_from_it_are_added_once: no network namespace"
                );
            }
            netif::set_up("lo", true).unwrap();
            let lo = netif::index("lo").unwrap();
            let (own, to) = (Ipv4Addr::new(10, 231, 128, 7), Ipv4Addr::new(10, 231, 128, 0));
            let route = NewRoute { to, prefix_len: 17, gateway: None, source: Some(own), interface: lo };
            assert!(add_route(&route).is_err(), "nobody has its source yet");
            add_address(lo, own).unwrap();
            add_route(&route).unwrap();
            assert!(add_address(lo, own).is_err() && add_route(&route).is_err());
            let has =
                |inet: &crate::netlink::Inet| inet.address == IpAddr::from(own) && inet.prefix_len == 32;
            assert!(addresses().unwrap().iter().any(has));
            let is_there = |route: &crate::netlink::Route| {
                route.to.address == IpAddr::from(to) && route.to.prefix_len == 17 && route.interface == lo
            };
            assert!(routes().unwrap().iter().any(is_there));
        });
        tried.join().unwrap();
    }

    #[test]
    fn an_answer_that_is_none_is_an_error() {
        for answer in [&[][..], &[0; 15], &[0; 64], &[2; 18]] {
            assert!(outcome(answer).is_err(), "{answer:?}");
        }
    }
}
