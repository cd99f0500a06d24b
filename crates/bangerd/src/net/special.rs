//! Networks that are not the public internet (RFC 6890 and after).

use banger_wire::net::Cidr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub(super) const LOOPBACK: Cidr = v4([127, 0, 0, 0], 8);

/// Out of reach even where a rule names them: this host, link-local with the metadata services of clouds, multicast,
/// reserved, broadcast.
pub(super) const NEVER: [Cidr; 6] = [
    v4([0, 0, 0, 0], 8),
    LOOPBACK,
    // Azure's platform services, metadata among them, at a public address.
    v4([168, 63, 129, 16], 32),
    v4([169, 254, 0, 0], 16),
    v4([224, 0, 0, 0], 4),
    v4([240, 0, 0, 0], 4),
];

/// Out of reach unless a rule names them: private and shared networks, protocol assignments, documentation, 6to4 relays,
/// benchmarks.
pub(super) const SPECIAL: [Cidr; 10] = [
    v4([10, 0, 0, 0], 8),
    v4([100, 64, 0, 0], 10),
    v4([172, 16, 0, 0], 12),
    v4([192, 0, 0, 0], 24),
    v4([192, 0, 2, 0], 24),
    v4([192, 88, 99, 0], 24),
    v4([192, 168, 0, 0], 16),
    v4([198, 18, 0, 0], 15),
    v4([198, 51, 100, 0], 24),
    v4([203, 0, 113, 0], 24),
];

/// Where IPv6 leads at all: what is handed out, the well-known prefix of translators to IPv4 (RFC 6052), and private
/// networks. Loopback, link-local, multicast, and IPv4 addresses in other spellings are outside.
pub(super) const REACHABLE6: [Cidr; 3] =
    [v6([0x2000, 0, 0, 0, 0, 0, 0, 0], 3), NAT64, v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7)];

const NAT64: Cidr = v6([0x64, 0xff9b, 0, 0, 0, 0, 0, 0], 96);

/// What IPv6 has of [`NEVER`] within [`REACHABLE6`]: the metadata services of Amazon, Google and Oracle.
const NEVER6: [Cidr; 3] = [
    v6([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0], 32),
    v6([0xfd00, 0xc1, 0, 0, 0, 0, 0, 0], 32),
    v6([0xfd20, 0xce, 0, 0, 0, 0, 0, 0], 32),
];

/// What it has of [`SPECIAL`]: private networks; protocol assignments with Teredo; documentation; 6to4, whose addresses
/// have IPv4 ones in them.
const SPECIAL6: [Cidr; 5] = [
    v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7),
    v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 23),
    v6([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0], 32),
    v6([0x2002, 0, 0, 0, 0, 0, 0, 0], 16),
    v6([0x3fff, 0, 0, 0, 0, 0, 0, 0], 20),
];

/// In full mode nothing is out of reach but what would be the vm's own loopback, in every spelling.
pub(super) const LOOPBACK6: [Cidr; 2] =
    [v6([0, 0, 0, 0, 0, 0, 0, 0], 95), v6([0, 0, 0, 0, 0, 0xffff, 0, 0], 96)];

const fn v4(octets: [u8; 4], prefix_len: u8) -> Cidr {
    let [a, b, c, d] = octets;
    Cidr::v4(Ipv4Addr::new(a, b, c, d), prefix_len)
}

const fn v6(words: [u16; 8], prefix_len: u8) -> Cidr {
    let [a, b, c, d, e, f, g, h] = words;
    Cidr::v6(Ipv6Addr::new(a, b, c, d, e, f, g, h), prefix_len)
}

/// These networks, and what a translator makes of those that are IPv4.
pub(super) fn with_translated(nets: &[Cidr]) -> Vec<Cidr> {
    nets.iter().copied().chain(nets.iter().filter_map(|net| translated(*net))).collect()
}

/// The part of [`NAT64`] that leads to an IPv4 network.
fn translated(net: Cidr) -> Option<Cidr> {
    let (IpAddr::V4(address), IpAddr::V6(prefix)) = (net.address(), NAT64.address()) else { return None };
    let bits = prefix.to_bits() | u128::from(address.to_bits());
    Some(Cidr::v6(Ipv6Addr::from_bits(bits), NAT64.prefix_len() + net.prefix_len()))
}

/// All networks that are never reached, of both families.
pub(super) fn never() -> Vec<Cidr> {
    with_translated(&NEVER).into_iter().chain(NEVER6).collect()
}

/// All networks that are reached by rule only.
pub(super) fn special() -> Vec<Cidr> {
    with_translated(&SPECIAL).into_iter().chain(SPECIAL6).collect()
}
