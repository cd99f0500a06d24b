//! What packets of a vm may do, as a script for `nft`.
//!
//! The rules live in the vm's own network namespace, which the guest can't enter, and are in force before pasta gives
//! the namespace a way out. Everything is dropped that no rule names: all of IPv6, whatever does not come from the
//! guest's own address, whatever the namespace itself would send.
//!
//! One transaction makes all of it. What depends on the host is in the set `host`, which is replaced when the host's
//! addresses change.

use super::cidr::Cidr;
use super::{GATEWAY, GUEST, GUEST_MAC, OUT, TAP};
use banger_wire::daemon::NetMode;
use std::fmt::Write as _;
use std::net::Ipv4Addr;

/// Networks that are not the public internet (RFC 6890 and after): this host, private and shared networks, link-local
/// with the metadata services of clouds, protocol assignments, documentation, 6to4 relays, benchmarks, multicast,
/// reserved, broadcast.
const SPECIAL: [Cidr; 16] = [
    Cidr::new(Ipv4Addr::new(0, 0, 0, 0), 8),
    Cidr::new(Ipv4Addr::new(10, 0, 0, 0), 8),
    Cidr::new(Ipv4Addr::new(100, 64, 0, 0), 10),
    LOOPBACK,
    // Azure's platform services, metadata among them, at a public address.
    Cidr::new(Ipv4Addr::new(168, 63, 129, 16), 32),
    Cidr::new(Ipv4Addr::new(169, 254, 0, 0), 16),
    Cidr::new(Ipv4Addr::new(172, 16, 0, 0), 12),
    Cidr::new(Ipv4Addr::new(192, 0, 0, 0), 24),
    Cidr::new(Ipv4Addr::new(192, 0, 2, 0), 24),
    Cidr::new(Ipv4Addr::new(192, 88, 99, 0), 24),
    Cidr::new(Ipv4Addr::new(192, 168, 0, 0), 16),
    Cidr::new(Ipv4Addr::new(198, 18, 0, 0), 15),
    Cidr::new(Ipv4Addr::new(198, 51, 100, 0), 24),
    Cidr::new(Ipv4Addr::new(203, 0, 113, 0), 24),
    Cidr::new(Ipv4Addr::new(224, 0, 0, 0), 4),
    Cidr::new(Ipv4Addr::new(240, 0, 0, 0), 4),
];
const LOOPBACK: Cidr = Cidr::new(Ipv4Addr::new(127, 0, 0, 0), 8);

/// A policy, with what it depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Policy {
    mode: NetMode,
    /// The host's own addresses and the networks on its links.
    host: Vec<Cidr>,
    /// Bytes that may go in a second each way.
    rate: Option<u64>,
}

/// What may go at once, in parts of a second of the rate; the rest of what is too much is dropped, and TCP slows down.
const BURST_PART: u64 = 4;
/// At least this many bytes: the guest hands over up to 64 KiB as one packet.
const BURST_MIN: u64 = 256 << 10;
/// The most that `nft` takes for it.
const BURST_MAX: u64 = 1 << 31;

impl Policy {
    /// The policy of a mode on a host with these addresses and on-link networks.
    pub(crate) fn new(mode: NetMode, host: Vec<Cidr>) -> Self {
        Self { mode, host: Cidr::simplify(host), rate: None }
    }

    /// The same, with no more than this many bytes a second each way.
    pub(crate) fn limited(self, rate: Option<u64>) -> Self {
        Self { rate, ..self }
    }

    /// Whether answers of the resolver that name this address are withheld: the guest can't reach it anyway, and a name
    /// that leads there is a mistake or an attempt (DNS rebinding).
    pub(crate) fn withholds(&self, address: Ipv4Addr) -> bool {
        self.mode != NetMode::Full && SPECIAL.iter().chain(&self.host).any(|net| net.contains(address))
    }

    /// The whole table. Fails as a whole when there is one already.
    ///
    /// Refused packets are answered, not swallowed: the policy is no secret, and a build script that tries the LAN
    /// should fail at once instead of after two minutes. Destinations are checked for every packet, not only the first
    /// of a connection, so that an address the host gets later is out of reach from then on.
    pub(crate) fn render(&self) -> String {
        let (special, host) = match self.mode {
            NetMode::Full => (elements(&[LOOPBACK]), String::new()),
            NetMode::Internet | NetMode::None => (elements(&SPECIAL), elements(&self.host)),
        };
        let rate = self.rate.map(rules_of_rate).unwrap_or_default();
        format!(
            r#"create table inet banger
table inet banger {{
	set special {{
		type ipv4_addr
		flags interval
{special}	}}
	set host {{
		type ipv4_addr
		flags interval
{host}	}}
	chain spoofed {{
		type filter hook prerouting priority raw; policy accept;
		iifname "{TAP}" meta protocol != ip drop
		iifname "{TAP}" ether saddr != {GUEST_MAC} drop
		iifname "{TAP}" ip saddr != {GUEST} drop
		meta nfproto ipv6 drop
	}}
	chain forward {{
		type filter hook forward priority filter; policy drop;
{rate}		iifname "{TAP}" oifname "{OUT}" ip saddr {GUEST} goto outbound
		iifname "{OUT}" oifname "{TAP}" ip daddr {GUEST} ct state established,related accept
	}}
	chain outbound {{
		ct state invalid drop
		ip daddr @special reject with icmp type admin-prohibited
		ip daddr @host reject with icmp type admin-prohibited
		meta nfproto ipv4 accept
	}}
	chain input {{
		type filter hook input priority filter; policy drop;
		iifname "{TAP}" ip daddr {GATEWAY} udp dport 53 accept
		iifname "{TAP}" ip daddr {GATEWAY} tcp dport 53 accept
		iifname "{TAP}" ip daddr {GATEWAY} icmp type echo-request accept
	}}
	chain output {{
		type filter hook output priority filter; policy drop;
		oifname "{TAP}" ip saddr {GATEWAY} ip daddr {GUEST} udp sport 53 accept
		oifname "{TAP}" ip saddr {GATEWAY} ip daddr {GUEST} tcp sport 53 accept
		oifname "{TAP}" ip daddr {GUEST} icmp type {{ echo-reply, destination-unreachable, time-exceeded }} accept
	}}
	chain leaving {{
		type nat hook postrouting priority srcnat; policy accept;
		oifname "{OUT}" masquerade
	}}
}}
"#
        )
    }

    /// What replaces the host's part of the table that [`render`](Self::render) made.
    pub(crate) fn render_host(&self) -> String {
        let mut text = "flush set inet banger host\n".to_owned();
        if self.mode != NetMode::Full && !self.host.is_empty() {
            let _ = writeln!(text, "add element inet banger host {{ {} }}", list(&self.host));
        }
        text
    }
}

/// A limit for each direction; both count what `nft` sees of a packet, its headers included.
fn rules_of_rate(rate: u64) -> String {
    let burst = (rate / BURST_PART).clamp(BURST_MIN, BURST_MAX);
    let rule =
        |way| format!("\t\t{way} \"{TAP}\" limit rate over {rate} bytes/second burst {burst} bytes drop\n");
    ["iifname", "oifname"].map(rule).concat()
}

fn list(nets: &[Cidr]) -> String {
    nets.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn elements(nets: &[Cidr]) -> String {
    if nets.is_empty() { String::new() } else { format!("\t\telements = {{ {} }}\n", list(nets)) }
}

#[cfg(test)]
mod tests {
    use super::{Cidr, Policy};
    use banger_wire::daemon::NetMode;
    use std::net::Ipv4Addr;

    fn policy(mode: NetMode) -> Policy {
        let home = Cidr::new(Ipv4Addr::new(198, 51, 99, 7), 24);
        Policy::new(mode, vec![Cidr::host(Ipv4Addr::new(8, 8, 4, 4)), home, home])
    }

    #[test]
    fn policies_are_as_written_down() {
        let advice = "change the golden file when the change is meant";
        let internet = policy(NetMode::Internet).render();
        assert_eq!(internet, include_str!("../../tests/golden/policy-internet.nft"), "{advice}");
        let limited = policy(NetMode::Internet).limited(Some(8 << 20)).render();
        let rules: Vec<&str> =
            limited.lines().filter(|line| !internet.contains(line)).map(str::trim).collect();
        let rule = "limit rate over 8388608 bytes/second burst 2097152 bytes drop";
        assert_eq!(rules, [format!("iifname \"tap0\" {rule}"), format!("oifname \"tap0\" {rule}")]);
        let full = policy(NetMode::Full).render();
        assert_eq!(full, include_str!("../../tests/golden/policy-full.nft"), "{advice}");
    }

    #[test]
    fn the_hosts_part_is_replaced_as_a_whole() {
        assert_eq!(
            policy(NetMode::Internet).render_host(),
            "flush set inet banger host\nadd element inet banger host { 8.8.4.4, 198.51.99.0/24 }\n"
        );
        let flush = "flush set inet banger host\n";
        assert_eq!(Policy::new(NetMode::Internet, Vec::new()).render_host(), flush);
        assert_eq!(policy(NetMode::Full).render_host(), flush);
    }

    #[test]
    fn answers_that_lead_inside_are_withheld() {
        let internet = policy(NetMode::Internet);
        for inside in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "172.31.0.1",
            "192.168.0.1",
            "224.0.0.251",
            "255.255.255.255",
            "8.8.4.4",
            "198.51.99.200",
        ] {
            assert!(internet.withholds(inside.parse().unwrap()), "{inside}");
            assert!(!policy(NetMode::Full).withholds(inside.parse().unwrap()), "{inside}");
        }
        for outside in ["93.184.216.34", "172.32.0.1", "100.128.0.1", "8.8.8.8", "1.1.1.1"] {
            assert!(!internet.withholds(outside.parse().unwrap()), "{outside}");
        }
    }
}
