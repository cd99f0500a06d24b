//! A vm among others that it reaches: the members of a network that its owner gave a name.
//!
//! ```text
//! guest 10.231.7.2, 10.231.128.N ── tap0 ── forward ── net0 ── supervisor ── its peer's socket ── supervisor ── net0 ── …
//! ```
//!
//! A member has one address more, that of its number, and no other interface: what would be one link for all is IPv4
//! between pairs, and nothing else passes. Everything here is IPv4; a member's name has no other address.

use banger_wire::guest::GuestMember;
use banger_wire::names::NetworkName;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;
use std::path::PathBuf;

/// The interface that leads to the other members.
pub(crate) const NET: &str = "net0";
/// Where members' addresses are: outside of every link that a vm has, and of what Docker, Kubernetes and home routers
/// take. The same for every network, since no vm is in two.
pub(crate) const RANGE: Ipv4Addr = Ipv4Addr::new(10, 231, 128, 0);
/// The length of its prefix.
pub(crate) const RANGE_LEN: u8 = 17;
/// Members of one network. The first and the last address of the range are nobody's.
pub(crate) const MEMBERS_MAX: u16 = (1 << (32 - RANGE_LEN)) - 2;
/// Packets are no longer: [`NET`] has the usual size.
pub(crate) const PACKET_LEN_MAX: usize = 1500;
/// The socket within a member's directory.
pub(crate) const SOCKET: &str = "s";
/// What comes after a vm's name, where it is a link to its number, and where it is asked for.
pub(crate) const NAME_END: &str = ".vm";
/// Header of a packet without options.
const HEADER_LEN: usize = 20;

/// A vm's place in a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MemberPlan {
    /// The network.
    pub(crate) network: NetworkName,
    /// Which of its members the vm is, from 1 to [`MEMBERS_MAX`].
    pub(crate) number: u16,
    /// The network's directory on the host: for each member one of its number, and a link of its name to that.
    pub(crate) dir: PathBuf,
}

impl MemberPlan {
    /// Returns the vm's address in the network.
    pub(crate) fn address(&self) -> Ipv4Addr {
        address(self.number)
    }

    /// What the guest is told.
    pub(crate) fn guest(&self) -> GuestMember {
        GuestMember { address: self.address(), network: RANGE, prefix_len: RANGE_LEN }
    }
}

/// Returns a member's address.
pub(crate) fn address(number: u16) -> Ipv4Addr {
    Ipv4Addr::from_bits(RANGE.to_bits() | u32::from(number))
}

/// Returns which member has an address.
pub(crate) fn number(address: Ipv4Addr) -> Option<u16> {
    let number = u16::try_from(address.to_bits().wrapping_sub(RANGE.to_bits())).ok()?;
    is_number(number).then_some(number)
}

/// Whether there can be such a member.
pub(crate) fn is_number(number: u16) -> bool {
    (1..=MEMBERS_MAX).contains(&number)
}

/// Which members a packet is from and for; none when it is no whole IPv4 packet between two of them. One with options is
/// none: they can name a way to take.
pub(crate) fn ends(packet: &[u8]) -> Option<(u16, u16)> {
    let header = packet.get(..HEADER_LEN)?;
    let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if header[0] != 0x45 || len != packet.len() || len > PACKET_LEN_MAX {
        return None;
    }
    let at = |at: usize| number(Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]));
    at(12).zip(at(16)).filter(|(from, to)| from != to)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{MEMBERS_MAX, PACKET_LEN_MAX, RANGE, address, ends, number};
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    /// A packet of a length.
    pub(crate) fn packet(from: Ipv4Addr, to: Ipv4Addr, len: usize) -> Vec<u8> {
        let mut packet = vec![0; len];
        packet[0] = 0x45;
        packet[2..4].copy_from_slice(&u16::try_from(len).unwrap().to_be_bytes());
        packet[12..16].copy_from_slice(&from.octets());
        packet[16..20].copy_from_slice(&to.octets());
        packet
    }

    #[test]
    fn each_number_has_an_address_and_no_other_address_has_a_number() {
        for number_ in 1..=MEMBERS_MAX {
            assert_eq!(number(address(number_)), Some(number_));
        }
        assert_eq!(address(MEMBERS_MAX), Ipv4Addr::new(10, 231, 255, 254));
        for other in [
            "10.231.128.0",
            "10.231.255.255",
            "10.231.127.255",
            "10.232.0.0",
            "10.231.7.2",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
        ] {
            assert_eq!(number(other.parse().unwrap()), None, "{other}");
        }
    }

    #[test]
    fn only_whole_packets_between_two_members_have_ends() {
        let (one, two) = (address(1), address(2));
        let good = packet(one, two, 100);
        assert_eq!(ends(&good), Some((1, 2)));
        assert_eq!(ends(&packet(one, two, PACKET_LEN_MAX)), Some((1, 2)));
        for (from, to) in [
            (one, one),
            (RANGE, two),
            (one, Ipv4Addr::new(10, 231, 255, 255)),
            (one, Ipv4Addr::new(10, 231, 7, 2)),
            (one, Ipv4Addr::BROADCAST),
            (one, Ipv4Addr::new(224, 0, 0, 1)),
            (Ipv4Addr::new(10, 231, 7, 2), two),
        ] {
            assert_eq!(ends(&packet(from, to, 100)), None, "{from} {to}");
        }
        assert_eq!(ends(&packet(one, two, PACKET_LEN_MAX + 1)), None);
        for (at, byte) in [(0, 0x46), (0, 0x44), (0, 0x65), (3, 99), (3, 101)] {
            let mut bad = good.clone();
            bad[at] = byte;
            assert_eq!(ends(&bad), None, "{at} {byte}");
        }
        assert_eq!(ends(&good[..19]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_looked_at(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Some((from, to)) = ends(&bytes) {
                prop_assert!(from != to && super::is_number(from) && super::is_number(to));
            }
        }
    }
}
