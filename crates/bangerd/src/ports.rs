//! Which address and which ports of the host lead into a vm: decisions, and nothing else.
//!
//! Each vm has an address of its own in a range of the loopback, where its ports have their own numbers, as far as the
//! owner may listen there. No list of who has which is kept: whoever listens at an address's port [`CLAIM_PORT`] has it, and that
//! ends with the process, whatever ends it. The search begins at a place that the vm's id gives, so a vm has the same
//! address at its next start as a rule. `supervise/ports` carries this out.
//!
//! [`CLAIM_PORT`]: banger_wire::ports::CLAIM_PORT

use crate::loopback::LoopbackRange;
use banger_wire::names::VmId;
use banger_wire::ports::{Listener, Protocol, Publish};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};

/// Addresses that are tried. Another user may hold some to annoy, and each try takes microseconds.
const ADDRESS_TRIES: u32 = 4096;
/// Where a port opens that the owner may not listen at, or that is taken: so far above its number.
const ABOVE: u16 = 20_000;
/// From where on ports are everybody's, unless the host says otherwise.
const UNPRIVILEGED_FROM: u16 = 1024;

/// What the supervisor has to know of a vm's ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PortsPlan {
    /// Who may connect, besides root.
    pub(crate) owner: u32,
    /// Where addresses are.
    #[serde(default)]
    pub(crate) range: LoopbackRange,
    /// Where the search for one begins.
    pub(crate) first: u32,
    /// The first port that the owner may listen at.
    pub(crate) unprivileged_from: u16,
    /// Ports that are open as long as the vm runs.
    pub(crate) publish: Vec<Publish>,
}

/// Plans a vm's ports.
pub(crate) fn plan(id: &VmId, range: LoopbackRange, publish: Vec<Publish>) -> PortsPlan {
    let start = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    PortsPlan {
        owner: rustix::process::getuid().as_raw(),
        range,
        first: id.as_str().get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or(0),
        unprivileged_from: start.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(UNPRIVILEGED_FROM),
        publish,
    }
}

/// Returns the addresses that are tried, one after the other and none twice.
pub(crate) fn addresses(range: LoopbackRange, first: u32) -> impl Iterator<Item = Ipv4Addr> {
    let start = first % range.len();
    (0..ADDRESS_TRIES.min(range.len())).map(move |tried| range.address(start + tried))
}

/// Returns the host's ports at which a guest's port may open, the best first.
pub(crate) fn host_ports(guest: u16, unprivileged_from: u16) -> Vec<u16> {
    let own = if guest >= unprivileged_from {
        Some(guest)
    } else {
        match guest {
            80 => Some(8080),
            443 => Some(8443),
            _ => None,
        }
    };
    own.into_iter().chain(guest.checked_add(ABOVE)).filter(|&port| port >= unprivileged_from).collect()
}

/// Returns where in the guest each TCP port that listens is connected to.
pub(crate) fn targets(listeners: &[Listener]) -> BTreeMap<u16, SocketAddr> {
    let mut targets: BTreeMap<u16, SocketAddr> = BTreeMap::new();
    // The loopback always works, the address of a network may go.
    let rank = |address: &SocketAddr| match address.ip() {
        ip if ip.is_unspecified() => (0, ip.is_ipv6()),
        ip => (if ip.is_loopback() { 1 } else { 2 }, ip.is_ipv6()),
    };
    for listener in listeners.iter().filter(|listener| listener.protocol == Protocol::Tcp) {
        let found = SocketAddr::new(listener.address, listener.port);
        let target = targets.entry(listener.port).or_insert(found);
        if rank(&found) < rank(target) {
            *target = found;
        }
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_open_under_their_own_number_or_a_known_one() {
        for (guest, from, expected) in [
            (3000, 1024, vec![3000, 23000]),
            (80, 1024, vec![8080, 20080]),
            (443, 1024, vec![8443, 20443]),
            (22, 1024, vec![20022]),
            (80, 80, vec![80, 20080]),
            (22, 0, vec![22, 20022]),
            (60000, 1024, vec![60000]),
            (22, 65535, vec![]),
        ] {
            assert_eq!(host_ports(guest, from), expected, "{guest} from {from}");
        }
    }

    #[test]
    fn addresses_are_tried_from_the_vms_own_place_on_and_none_twice() {
        let range = LoopbackRange::default();
        let tried: Vec<Ipv4Addr> = addresses(range, u32::MAX).collect();
        let different: std::collections::BTreeSet<_> = tried.iter().collect();
        assert_eq!((tried.len(), different.len()), (4096, 4096));
        assert_eq!(addresses(range, 255).next(), Some(Ipv4Addr::new(127, 77, 1, 2)));
        let small: Vec<Ipv4Addr> = addresses("127.9.9.16/28".parse().unwrap(), 15).collect();
        assert_eq!((small.len(), small[0]), (14, Ipv4Addr::new(127, 9, 9, 18)));
        assert_eq!(small[13], Ipv4Addr::new(127, 9, 9, 17));
    }

    #[test]
    fn the_most_general_listener_of_a_port_is_connected_to() {
        let listener = |protocol, address: &str, port| Listener {
            protocol,
            port,
            address: address.parse().unwrap(),
            process: None,
            pid: None,
        };
        let listeners = [
            listener(Protocol::Tcp, "10.231.7.2", 80),
            listener(Protocol::Tcp, "::1", 80),
            listener(Protocol::Tcp, "::", 443),
            listener(Protocol::Tcp, "0.0.0.0", 443),
            listener(Protocol::Tcp, "127.0.0.53", 53),
            listener(Protocol::Udp, "0.0.0.0", 68),
        ];
        let targets: Vec<String> = targets(&listeners).values().map(ToString::to_string).collect();
        assert_eq!(targets, ["127.0.0.53:53", "[::1]:80", "0.0.0.0:443"]);
    }
}
