//! IPv4 networks.

use std::fmt;
use std::net::Ipv4Addr;

/// An IPv4 network: an address whose host bits are zero, and how many bits are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Cidr {
    address: u32,
    prefix_len: u8,
}

impl Cidr {
    /// The network an address is in.
    pub(crate) const fn new(address: Ipv4Addr, prefix_len: u8) -> Self {
        let prefix_len = if prefix_len > 32 { 32 } else { prefix_len };
        Self { address: address.to_bits() & mask(prefix_len), prefix_len }
    }

    /// A single address.
    pub(crate) const fn host(address: Ipv4Addr) -> Self {
        Self::new(address, 32)
    }

    /// Whether an address is within.
    pub(crate) const fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & mask(self.prefix_len) == self.address
    }

    /// Drops networks that lie within others, and sorts: nft refuses a set whose intervals overlap.
    pub(crate) fn simplify(mut nets: Vec<Self>) -> Vec<Self> {
        nets.sort_unstable();
        let mut kept: Vec<Self> = Vec::with_capacity(nets.len());
        for net in nets {
            // Sorted by address and then by length, a containing network comes before all it contains.
            if kept.last().is_none_or(|last| !last.contains(Ipv4Addr::from_bits(net.address))) {
                kept.push(net);
            }
        }
        kept
    }
}

const fn mask(prefix_len: u8) -> u32 {
    if prefix_len == 0 { 0 } else { u32::MAX << (32 - prefix_len) }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = Ipv4Addr::from_bits(self.address);
        if self.prefix_len == 32 {
            write!(f, "{address}")
        } else {
            write!(f, "{address}/{}", self.prefix_len)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Cidr;
    use std::net::Ipv4Addr;

    fn net(text: &str) -> Cidr {
        let (address, len) = text.split_once('/').unwrap();
        Cidr::new(address.parse().unwrap(), len.parse().unwrap())
    }

    #[test]
    fn membership_follows_the_prefix() {
        for (network, inside, outside) in [
            ("10.0.0.0/8", "10.255.255.255", "11.0.0.0"),
            ("192.0.2.77/24", "192.0.2.1", "192.0.3.1"),
            ("192.0.2.7/32", "192.0.2.7", "192.0.2.6"),
        ] {
            assert!(net(network).contains(inside.parse().unwrap()), "{network}");
            assert!(!net(network).contains(outside.parse().unwrap()), "{network}");
        }
        assert!(net("9.9.9.9/0").contains(Ipv4Addr::BROADCAST));
    }

    #[test]
    fn networks_within_others_go() {
        let nets = ["10.0.0.3/32", "192.168.1.0/24", "10.0.0.0/8", "192.168.1.7/32", "10.0.0.3/32"];
        let kept: Vec<String> =
            Cidr::simplify(nets.map(net).to_vec()).iter().map(ToString::to_string).collect();
        assert_eq!(kept, ["10.0.0.0/8", "192.168.1.0/24"]);
    }
}
