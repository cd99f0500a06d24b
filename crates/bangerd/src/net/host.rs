//! What the host's network looks like now. Called where the host's network namespace is the caller's.

use crate::net::cidr::Cidr;
use anyhow::Context as _;
use banger_sys::netlink::{self, Route, RouteKind};

/// Shorter prefixes are a way out, not a link with neighbours: a VPN often routes `0.0.0.0/1` and `128.0.0.0/1` to its
/// interface directly.
const LINK_PREFIX_MIN: u8 = 8;

/// The host's side, as far as the policy depends on it.
#[derive(Debug)]
pub(crate) struct Host {
    /// Its own addresses, and the networks whose machines it reaches without a router.
    pub(crate) nets: Vec<Cidr>,
    /// Whether there is a way to everywhere.
    pub(crate) has_default_route: bool,
}

/// Asks the kernel.
pub(crate) fn read() -> anyhow::Result<Host> {
    let routes = netlink::routes().context("read the host's routes")?;
    let mut nets = Vec::new();
    for inet in netlink::addresses().context("read the host's addresses")? {
        nets.push(Cidr::host(inet.address));
        if inet.prefix_len >= LINK_PREFIX_MIN {
            nets.push(Cidr::new(inet.address, inet.prefix_len));
        }
    }
    nets.extend(routes.iter().filter_map(near));
    Ok(Host { nets: Cidr::simplify(nets), has_default_route: routes.iter().any(is_default) })
}

fn is_default(route: &Route) -> bool {
    // Two halves of everything are how VPNs take over without replacing the default route.
    route.kind == RouteKind::Unicast && route.to.prefix_len <= 1
}

/// The network of a route that ends on this host or on a link of it.
fn near(route: &Route) -> Option<Cidr> {
    let net = Cidr::new(route.to.address, route.to.prefix_len);
    let near = match route.kind {
        // Packets to these end in the host itself; a broadcast ends there and on the link.
        RouteKind::Local | RouteKind::Broadcast => true,
        RouteKind::Unicast => !route.through_gateway,
        RouteKind::Other => false,
    };
    (near && route.to.prefix_len >= LINK_PREFIX_MIN).then_some(net)
}

#[cfg(test)]
mod tests {
    use super::{Route, RouteKind, is_default, near};
    use banger_sys::netif::Inet4;

    fn route(to: &str, kind: RouteKind, through_gateway: bool) -> Route {
        let (address, len) = to.split_once('/').unwrap();
        let to = Inet4 { address: address.parse().unwrap(), prefix_len: len.parse().unwrap() };
        Route { to, kind, through_gateway, interface: 2 }
    }

    #[test]
    fn links_and_own_addresses_are_near_and_ways_out_are_not() {
        for (to, kind, through_gateway, expected) in [
            ("172.20.1.0/24", RouteKind::Unicast, false, Some("172.20.1.0/24")),
            ("9.8.7.6/32", RouteKind::Local, false, Some("9.8.7.6")),
            ("9.8.7.255/32", RouteKind::Broadcast, false, Some("9.8.7.255")),
            ("9.9.0.0/16", RouteKind::Unicast, true, None),
            ("0.0.0.0/0", RouteKind::Unicast, true, None),
            ("128.0.0.0/1", RouteKind::Unicast, false, None),
            ("9.9.0.0/16", RouteKind::Other, false, None),
        ] {
            let net = near(&route(to, kind, through_gateway)).map(|net| net.to_string());
            assert_eq!(net.as_deref(), expected, "{to}");
        }
    }

    #[test]
    fn halves_of_everything_are_a_way_out() {
        assert!(is_default(&route("0.0.0.0/0", RouteKind::Unicast, true)));
        assert!(is_default(&route("0.0.0.0/1", RouteKind::Unicast, false)));
        assert!(!is_default(&route("0.0.0.0/0", RouteKind::Other, false)));
        assert!(!is_default(&route("10.0.0.0/8", RouteKind::Unicast, true)));
    }
}
