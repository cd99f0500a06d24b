//! Network interfaces: up, name, addresses, default route. By `ioctl`, which every kernel of interest has and which
//! needs no netlink library in the guest.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, OwnedFd};

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inet4 {
    /// The address.
    pub address: Ipv4Addr,
    /// Length of the network prefix in bits, at most 32.
    pub prefix_len: u8,
}

fn socket(domain: rustix::net::AddressFamily) -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(
        domain,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?)
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: `ifreq` is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.len() >= request.ifr_name.len() || bytes.contains(&0) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    Ok(request)
}

fn ioctl<T>(fd: &OwnedFd, number: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: every caller in this module passes the structure the request number is defined for, and it outlives
    // the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, std::ptr::from_mut(argument)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn sockaddr(address: Ipv4Addr) -> libc::sockaddr {
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from(address).to_be() },
        sin_zero: [0; 8],
    };
    // SAFETY: both are 16 bytes of plain data, and the kernel reads one as the other by its family.
    unsafe { std::mem::transmute(address) }
}

/// Sets an interface up or down.
///
/// # Errors
/// When there is no such interface or the caller may not change it.
pub fn set_up(name: &str, up: bool) -> io::Result<()> {
    let fd = socket(rustix::net::AddressFamily::INET)?;
    let mut request = request(name)?;
    ioctl(&fd, libc::SIOCGIFFLAGS as libc::Ioctl, &mut request)?;
    // SAFETY: the kernel filled the flags in.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let bit = libc::IFF_UP as libc::c_short;
    request.ifr_ifru.ifru_flags = if up { flags | bit } else { flags & !bit };
    ioctl(&fd, libc::SIOCSIFFLAGS as libc::Ioctl, &mut request)
}

/// Renames an interface, which must be down.
///
/// # Errors
/// When there is no such interface, the new name is taken, or the caller may not change it.
pub fn rename(name: &str, to: &str) -> io::Result<()> {
    let fd = socket(rustix::net::AddressFamily::INET)?;
    let mut from = request(name)?;
    from.ifr_ifru.ifru_newname = request(to)?.ifr_name;
    ioctl(&fd, libc::SIOCSIFNAME as libc::Ioctl, &mut from)
}

/// Gives an interface an IPv4 address.
///
/// # Errors
/// When the prefix is longer than 32 bits, there is no such interface, or the caller may not change it.
pub fn set_address(name: &str, inet: Inet4) -> io::Result<()> {
    let host_bits = 32u32.checked_sub(u32::from(inet.prefix_len)).ok_or(io::ErrorKind::InvalidInput)?;
    let mask = Ipv4Addr::from(u32::MAX.checked_shl(host_bits).unwrap_or(0));
    let fd = socket(rustix::net::AddressFamily::INET)?;
    let mut request = request(name)?;
    request.ifr_ifru.ifru_addr = sockaddr(inet.address);
    ioctl(&fd, libc::SIOCSIFADDR as libc::Ioctl, &mut request)?;
    request.ifr_ifru.ifru_netmask = sockaddr(mask);
    ioctl(&fd, libc::SIOCSIFNETMASK as libc::Ioctl, &mut request)
}

/// Gives an interface a hardware address.
///
/// # Errors
/// When there is no such interface or the caller may not change it.
pub fn set_mac(name: &str, mac: [u8; 6]) -> io::Result<()> {
    let fd = socket(rustix::net::AddressFamily::INET)?;
    let mut request = request(name)?;
    let mut data = [0; 14];
    for (to, from) in data.iter_mut().zip(mac) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_hwaddr = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: data };
    ioctl(&fd, libc::SIOCSIFHWADDR as libc::Ioctl, &mut request)
}

/// Adds a default route through `gateway`.
///
/// # Errors
/// When the gateway is not on a known network or the caller may not change routes.
pub fn add_default_route(gateway: Ipv4Addr) -> io::Result<()> {
    let fd = socket(rustix::net::AddressFamily::INET)?;
    // SAFETY: `rtentry` is plain data for which all zeroes is a valid value.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = sockaddr(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = sockaddr(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = sockaddr(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    ioctl(&fd, libc::SIOCADDRT as libc::Ioctl, &mut route)
}

#[repr(C)]
struct In6Ifreq {
    address: [u8; 16],
    prefix_len: u32,
    index: libc::c_int,
}

/// Returns the index of an interface.
///
/// # Errors
/// When there is no such interface.
pub fn index(name: &str) -> io::Result<u32> {
    let fd = socket(rustix::net::AddressFamily::INET)?;
    let mut request = request(name)?;
    ioctl(&fd, libc::SIOCGIFINDEX as libc::Ioctl, &mut request)?;
    // SAFETY: the kernel filled the index in.
    let index = unsafe { request.ifr_ifru.ifru_ifindex };
    index.try_into().map_err(io::Error::other)
}

#[repr(C)]
struct In6Rtmsg {
    to: [u8; 16],
    from: [u8; 16],
    gateway: [u8; 16],
    kind: u32,
    to_len: u16,
    from_len: u16,
    metric: u32,
    info: libc::c_ulong,
    flags: u32,
    index: libc::c_int,
}

/// Adds an IPv6 default route through `gateway` on the interface of this index.
///
/// # Errors
/// When the gateway is not on a known network or the caller may not change routes.
pub fn add_default_route6(index: u32, gateway: Ipv6Addr) -> io::Result<()> {
    let fd = socket(rustix::net::AddressFamily::INET6)?;
    let mut route = In6Rtmsg {
        to: [0; 16],
        from: [0; 16],
        gateway: gateway.octets(),
        kind: 0,
        to_len: 0,
        from_len: 0,
        // What the kernel takes for a route that names none (IP6_RT_PRIO_USER).
        metric: 1024,
        info: 0,
        flags: u32::from(libc::RTF_UP | libc::RTF_GATEWAY),
        index: index.try_into().map_err(|_| io::ErrorKind::InvalidInput)?,
    };
    ioctl(&fd, libc::SIOCADDRT as libc::Ioctl, &mut route)
}

/// Gives the interface of this index an IPv6 address.
///
/// # Errors
/// When there is no such interface or the caller may not change it.
pub fn set_address6(index: u32, address: Ipv6Addr, prefix_len: u8) -> io::Result<()> {
    let fd = socket(rustix::net::AddressFamily::INET6)?;
    let index = index.try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut request = In6Ifreq { address: address.octets(), prefix_len: u32::from(prefix_len), index };
    ioctl(&fd, libc::SIOCSIFADDR as libc::Ioctl, &mut request)
}

#[cfg(test)]
mod tests {
    use super::{Inet4, index, set_address, set_up};
    use std::net::Ipv4Addr;

    #[test]
    fn names_that_do_not_fit_are_refused() {
        for name in ["", "a-name-of-sixteen", "a\0b"] {
            assert_eq!(set_up(name, true).unwrap_err().kind(), std::io::ErrorKind::InvalidInput, "{name:?}");
        }
    }

    #[test]
    fn an_absent_interface_is_an_error() {
        let inet = Inet4 { address: Ipv4Addr::new(10, 0, 0, 1), prefix_len: 24 };
        assert!(set_address("none0", inet).is_err());
        assert!(index("none0").is_err() && index("lo").unwrap() > 0);
    }
}
