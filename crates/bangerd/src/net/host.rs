//! What the host's network looks like now. Called where the host's network namespace is the caller's.

use anyhow::Context as _;
use banger_sys::netlink::{self, Inet, Route, RouteKind};
use banger_wire::net::Cidr;
use std::net::IpAddr;

/// Shorter prefixes are a way out, not a link with neighbours: a VPN often routes `0.0.0.0/1` and `128.0.0.0/1`, or
/// `2000::/3`, to its interface directly.
const LINK_PREFIX_MIN: u8 = 8;
const LINK_PREFIX_MIN6: u8 = 16;
/// A route this short is the way to everywhere, or to a half of it: that is how VPNs take over without replacing the
/// default route. All that is handed out of IPv6 is in `2000::/3`.
const DEFAULT_PREFIX_MAX: u8 = 1;
const DEFAULT_PREFIX_MAX6: u8 = 3;

/// The host's side, as far as the policy depends on it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Host {
    /// Its own addresses.
    pub(crate) own: Vec<Cidr>,
    /// The networks whose machines it reaches without a router.
    pub(crate) links: Vec<Cidr>,
    /// Whether there is a way to everywhere.
    pub(crate) has_ipv4: bool,
    /// The same for IPv6.
    pub(crate) has_ipv6: bool,
}

impl Host {
    /// Whether there is any way to everywhere.
    pub(crate) fn has_default_route(&self) -> bool {
        self.has_ipv4 || self.has_ipv6
    }
}

/// Asks the kernel.
pub(crate) fn read() -> anyhow::Result<Host> {
    let routes = netlink::routes().context("read the host's routes")?;
    let addresses = netlink::addresses().context("read the host's addresses")?;
    Ok(host(&addresses, &routes))
}

fn host(addresses: &[Inet], routes: &[Route]) -> Host {
    let (mut own, mut links) = (Vec::new(), Vec::new());
    for inet in addresses {
        own.push(Cidr::host(inet.address));
        links.extend(link(*inet));
    }
    for route in routes {
        match route.kind {
            // Packets to these end in the host itself; a broadcast ends there and on the link.
            RouteKind::Local | RouteKind::Broadcast => own.extend(link(route.to)),
            RouteKind::Unicast if !route.through_gateway => links.extend(link(route.to)),
            RouteKind::Unicast | RouteKind::Other => {}
        }
    }
    let leads_out =
        |is_ipv6| routes.iter().any(|route| route.to.address.is_ipv6() == is_ipv6 && is_default(route));
    Host {
        own: Cidr::simplify(own),
        links: Cidr::simplify(links),
        has_ipv4: leads_out(false),
        has_ipv6: leads_out(true),
    }
}

fn is_default(route: &Route) -> bool {
    let most = if route.to.address.is_ipv4() { DEFAULT_PREFIX_MAX } else { DEFAULT_PREFIX_MAX6 };
    // The kernel's own routes of last resort refuse everything and lead nowhere.
    route.kind == RouteKind::Unicast && route.to.prefix_len <= most
}

/// The network of an address or a route, unless it is a way out.
fn link(to: Inet) -> Option<Cidr> {
    let least = match to.address {
        IpAddr::V4(_) => LINK_PREFIX_MIN,
        IpAddr::V6(_) => LINK_PREFIX_MIN6,
    };
    (to.prefix_len >= least).then(|| Cidr::new(to.address, to.prefix_len))
}

#[cfg(test)]
mod tests {
    use super::{Inet, Route, RouteKind, host, is_default};

    fn inet(text: &str) -> Inet {
        let (address, len) = text.split_once('/').unwrap();
        Inet { address: address.parse().unwrap(), prefix_len: len.parse().unwrap() }
    }

    fn route(to: &str, kind: RouteKind, through_gateway: bool) -> Route {
        Route { to: inet(to), kind, through_gateway, interface: 2 }
    }

    #[test]
    fn links_and_own_addresses_are_near_and_ways_out_are_not() {
        for (to, kind, through_gateway, own, links) in [
            ("172.20.1.0/24", RouteKind::Unicast, false, "", "172.20.1.0/24"),
            ("9.8.7.6/32", RouteKind::Local, false, "9.8.7.6", ""),
            ("9.8.7.255/32", RouteKind::Broadcast, false, "9.8.7.255", ""),
            ("9.9.0.0/16", RouteKind::Unicast, true, "", ""),
            ("0.0.0.0/0", RouteKind::Unicast, true, "", ""),
            ("128.0.0.0/1", RouteKind::Unicast, false, "", ""),
            ("9.9.0.0/16", RouteKind::Other, false, "", ""),
            ("2a01:4f8:0:7::/64", RouteKind::Unicast, false, "", "2a01:4f8:0:7::/64"),
            ("2a01:4f8:0:7::2/128", RouteKind::Local, false, "2a01:4f8:0:7::2", ""),
            ("2000::/3", RouteKind::Unicast, false, "", ""),
        ] {
            let found = host(&[], &[route(to, kind, through_gateway)]);
            let text = |nets: &[super::Cidr]| nets.iter().map(ToString::to_string).collect::<String>();
            assert_eq!((text(&found.own).as_str(), text(&found.links).as_str()), (own, links), "{to}");
        }
        let found = host(&[inet("2a01:4f8::7/64"), inet("5.6.7.8/24")], &[]);
        let text = |nets: &[super::Cidr]| nets.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(text(&found.own), ["5.6.7.8", "2a01:4f8::7"]);
        assert_eq!(text(&found.links), ["5.6.7.0/24", "2a01:4f8::/64"]);
    }

    #[test]
    fn halves_of_everything_are_a_way_out() {
        assert!(is_default(&route("0.0.0.0/0", RouteKind::Unicast, true)));
        assert!(is_default(&route("0.0.0.0/1", RouteKind::Unicast, false)));
        assert!(is_default(&route("::/0", RouteKind::Unicast, true)));
        assert!(is_default(&route("2000::/3", RouteKind::Unicast, false)));
        assert!(!is_default(&route("0.0.0.0/0", RouteKind::Other, false)));
        assert!(!is_default(&route("10.0.0.0/8", RouteKind::Unicast, true)));
        assert!(!is_default(&route("fd00::/8", RouteKind::Unicast, true)));
        let found = host(&[], &[route("::/0", RouteKind::Unicast, true)]);
        assert!(found.has_default_route() && found.has_ipv6 && !found.has_ipv4);
    }
}
