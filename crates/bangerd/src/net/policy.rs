//! What packets of a vm may do, as a script for `nft`.
//!
//! The rules live in the vm's own network namespace, which the guest can't enter, and are in force before pasta gives
//! the namespace a way out. Everything is dropped that no rule names: whatever does not come from the guest's own
//! addresses, whatever the namespace itself would send.
//!
//! One transaction makes all of it, and one replaces what can change: sets with the host's part, and the chain
//! `outbound`, which is the mode and the owner's rules, with its mirror image. A packet is
//!
//! ```text
//! refused   never to be reached, the host's own, denied
//! accepted  an inner network that is allowed: it lies wholly in one of those refused next
//! refused   not the public internet, the host's links
//! accepted  mode internet; allowed networks; addresses that allowed names led to
//! refused   everything else
//! ```
//!
//! so that a rule that names more than an inner network, such as `0.0.0.0/0`, opens only what is public of it. What comes
//! back passes the same rules in the chain `inbound`, so that nothing goes on in one direction alone.

use super::host::Host;
use super::member::{NET, RANGE, RANGE_LEN};
use super::special::{self, LOOPBACK, LOOPBACK6, REACHABLE6};
use super::{GATEWAY, GATEWAY6, GUEST, GUEST_MAC, GUEST6, GUEST6_LINK, OUT, TAP};
use banger_wire::daemon::NetMode;
use banger_wire::net::{Cidr, NetRules, NetTarget, Place};
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};

/// A policy, with what it depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Policy {
    mode: NetMode,
    rules: NetRules,
    host: Host,
    /// Whether the guest has IPv6.
    ipv6: bool,
    /// Bytes that may go in a second each way.
    rate: Option<u64>,
    /// The guest's address among the vms of its network.
    member: Option<Ipv4Addr>,
    /// Connections that an allowed name has opened have this as their mark, and go on without it. Another one when rules
    /// have gone ends those that no rule opens any more.
    mark: u32,
}

/// An address that an allowed name led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pin {
    /// The name.
    pub(crate) name: String,
    /// The address.
    pub(crate) address: IpAddr,
    /// How long new connections may be made to it.
    pub(crate) left_s: u64,
}

/// What may go at once, in parts of a second of the rate; the rest of what is too much is dropped, and TCP slows down.
const BURST_PART: u64 = 4;
/// At least this many bytes: the guest hands over up to 64 KiB as one packet.
const BURST_MIN: u64 = 256 << 10;
/// The most that `nft` takes for it.
const BURST_MAX: u64 = 1 << 31;

/// Destinations of refused packets that are remembered, for each of the sets, and for how long.
const DENIED_MAX: usize = 256;
pub(crate) const DENIED_S: u64 = 3600;
/// Elements of each set of open addresses: each pinned address with the ports of its rules.
const NAMED_MAX: usize = 65536;

const NFPROTO: [(&str, &str, bool); 2] = [("4", "ip", false), ("6", "ip6", true)];

impl Policy {
    /// The policy of a mode and rules on this host.
    pub(crate) fn new(mode: NetMode, rules: NetRules, host: Host) -> Self {
        Self { mode, rules, host, ipv6: false, rate: None, member: None, mark: 1 }
    }

    /// The same, with this address of the guest's among the vms of a network, whom it reaches whatever the mode is.
    pub(crate) fn joined(self, member: Option<Ipv4Addr>) -> Self {
        Self { member, ..self }
    }

    /// The same, with IPv6 for the guest or not, and no more than this many bytes a second each way.
    pub(crate) fn limited(self, ipv6: bool, rate: Option<u64>) -> Self {
        Self { ipv6, rate, ..self }
    }

    /// The same on a host as it is now.
    pub(crate) fn on(&self, host: Host) -> Self {
        Self { host, ..self.clone() }
    }

    /// The same with other rules.
    pub(crate) fn with(&self, rules: NetRules) -> Self {
        let grows = self.rules.deny == rules.deny
            && self.rules.allow.iter().all(|target| rules.allow.contains(target));
        let mark = if grows { self.mark } else { self.mark.wrapping_add(1).max(1) };
        Self { rules, mark, ..self.clone() }
    }

    /// Whether the guest may ask for this name, which is in lower case and without a final dot.
    pub(crate) fn allows_name(&self, name: &str) -> bool {
        self.mode != NetMode::None
            && !self.rules.deny.iter().any(|target| target.is_above(name))
            && (self.mode != NetMode::Allow || self.rules.allow.iter().any(|target| target.is_name(name)))
    }

    /// Whether addresses are reached because a name led there.
    pub(crate) fn opens_by_name(&self) -> bool {
        self.mode == NetMode::Allow
    }

    /// Whether answers of the resolver that name this address are withheld: the guest can't reach it anyway, and a name
    /// that leads there is a mistake or an attempt (DNS rebinding).
    pub(crate) fn withholds(&self, address: IpAddr) -> bool {
        let net = Cidr::host(address);
        let within = |nets: &[Cidr]| nets.iter().any(|outer| outer.covers(net));
        let opened = |target: &NetTarget| matches!(target.place, Place::Net(outer) if outer.covers(net) && self.is_inner(outer));
        if self.mode == NetMode::Full {
            return false;
        }
        if within(&special::never()) || within(&special::with_translated(&self.host.own)) {
            return true;
        }
        if net.is_ipv6() && !within(&REACHABLE6) {
            return true;
        }
        self.is_inner(net) && !self.rules.allow.iter().any(opened)
    }

    /// Whether a network lies wholly where only a rule that names it leads.
    fn is_inner(&self, net: Cidr) -> bool {
        let links = special::with_translated(&self.host.links);
        special::special().iter().chain(&links).any(|outer| outer.covers(net))
    }

    /// The whole table. Fails as a whole when there is one already.
    ///
    /// Refused packets are answered, not swallowed: the policy is no secret, and a build script that tries the LAN
    /// should fail at once instead of after two minutes. Destinations are checked for every packet, not only the first
    /// of a connection, so that an address the host gets later is out of reach from then on.
    pub(crate) fn render(&self) -> String {
        let rate = self.rate.map(rules_of_rate).unwrap_or_default();
        let mut sets = String::new();
        for (family, _, _) in NFPROTO {
            let address = format!("ipv{family}_addr");
            for name in ["never", "own", "special", "links"] {
                let _ =
                    write!(sets, "\tset {name}{family} {{\n\t\ttype {address}\n\t\tflags interval\n\t}}\n");
            }
            for (name, more) in [("named", ""), ("ports", " . inet_service")] {
                let _ = write!(
                    sets,
                    "\tset {name}{family} {{\n\t\ttype {address}{more}\n\t\tflags timeout\n\t\tsize {NAMED_MAX}\n\t}}\n"
                );
            }
            for (name, more) in [("denied", " . inet_service"), ("refused", "")] {
                let _ = write!(
                    sets,
                    "\tset {name}{family} {{\n\t\ttype {address} . inet_proto{more}\n\t\tflags dynamic,timeout\n\
                     \t\ttimeout {DENIED_S}s\n\t\tsize {DENIED_MAX}\n\t}}\n"
                );
            }
        }
        let ipv6 = if self.ipv6 {
            format!(
                r#"		iifname "{TAP}" meta protocol ip6 ip6 saddr != {{ {GUEST6}, {GUEST6_LINK} }} drop
"#
            )
        } else {
            "\t\tmeta nfproto ipv6 drop\n".to_owned()
        };
        let Joined { guest, spoofed, forward } = self.member.map_or_else(Joined::nobody, Joined::member);
        let table = format!(
            r#"create table inet banger
table inet banger {{
{sets}	chain spoofed {{
		type filter hook prerouting priority raw; policy accept;
		iifname "{TAP}" meta protocol != {{ ip, ip6 }} drop
		iifname "{TAP}" ether saddr != {GUEST_MAC} drop
		iifname "{TAP}" meta protocol ip ip saddr != {guest} drop
{spoofed}{ipv6}	}}
	chain refuse {{
		meta nfproto ipv4 meta l4proto {{ tcp, udp }} update @denied4 {{ ip daddr . meta l4proto . th dport counter }}
		meta nfproto ipv4 meta l4proto != {{ tcp, udp }} update @refused4 {{ ip daddr . meta l4proto counter }}
		meta nfproto ipv6 meta l4proto {{ tcp, udp }} update @denied6 {{ ip6 daddr . meta l4proto . th dport counter }}
		meta nfproto ipv6 meta l4proto != {{ tcp, udp }} update @refused6 {{ ip6 daddr . meta l4proto counter }}
		reject with icmpx type admin-prohibited
	}}
	chain outbound {{
	}}
	chain inbound {{
	}}
	chain forward {{
		type filter hook forward priority filter; policy drop;
{rate}{forward}		iifname "{TAP}" oifname "{OUT}" ip saddr {GUEST} goto outbound
		iifname "{TAP}" oifname "{OUT}" ip6 saddr {GUEST6} goto outbound
		iifname "{OUT}" oifname "{TAP}" ip daddr {GUEST} ct state established,related goto inbound
		iifname "{OUT}" oifname "{TAP}" ip6 daddr {GUEST6} ct state established,related goto inbound
	}}
	chain input {{
		type filter hook input priority filter; policy drop;
		iifname "{TAP}" ip daddr {GATEWAY} udp dport 53 accept
		iifname "{TAP}" ip daddr {GATEWAY} tcp dport 53 accept
		iifname "{TAP}" ip daddr {GATEWAY} icmp type echo-request accept
		iifname "{TAP}" ip6 daddr {GATEWAY6} icmpv6 type echo-request accept
		iifname {{ "{TAP}", "{OUT}" }} icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
	}}
	chain output {{
		type filter hook output priority filter; policy drop;
		oifname "{TAP}" ip saddr {GATEWAY} ip daddr {GUEST} udp sport 53 accept
		oifname "{TAP}" ip saddr {GATEWAY} ip daddr {GUEST} tcp sport 53 accept
		oifname "{TAP}" ip daddr {guest} icmp type {{ echo-reply, destination-unreachable, time-exceeded }} accept
		oifname "{TAP}" ip6 daddr {GUEST6} icmpv6 type {{ echo-reply, destination-unreachable, packet-too-big, time-exceeded }} accept
		oifname {{ "{TAP}", "{OUT}" }} icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
	}}
	chain leaving {{
		type nat hook postrouting priority srcnat; policy accept;
		oifname "{OUT}" masquerade
	}}
}}
"#
        );
        table + &self.render_change(&[])
    }

    /// What replaces the part of the table that can change.
    pub(crate) fn render_change(&self, pins: &[Pin]) -> String {
        let mut text = String::new();
        let (never, own, special, links) = match self.mode {
            NetMode::Full => {
                let never = [LOOPBACK].into_iter().chain(LOOPBACK6).collect();
                (never, Vec::new(), Vec::new(), Vec::new())
            }
            NetMode::Internet | NetMode::None | NetMode::Allow => {
                let translated = special::with_translated;
                (
                    special::never(),
                    translated(&self.host.own),
                    special::special(),
                    translated(&self.host.links),
                )
            }
        };
        for (family, _, is_ipv6) in NFPROTO {
            for (name, nets) in [("never", &never), ("own", &own), ("special", &special), ("links", &links)] {
                let _ = writeln!(text, "flush set inet banger {name}{family}");
                // `nft` refuses a set whose intervals overlap.
                let nets = nets.iter().copied().filter(|net| net.is_ipv6() == is_ipv6).collect();
                let nets: Vec<String> = Cidr::simplify(nets).iter().map(ToString::to_string).collect();
                add_elements(&mut text, &format!("{name}{family}"), &nets);
            }
        }
        for way in [OUTBOUND, INBOUND] {
            let _ = writeln!(text, "flush chain inet banger {}", way.chain);
            for rule in self.chain(&way) {
                let _ = writeln!(text, "add rule inet banger {} {rule}", way.chain);
            }
        }
        text + &self.render_pins(pins)
    }

    /// What replaces the addresses that are open by name.
    pub(crate) fn render_pins(&self, pins: &[Pin]) -> String {
        let mut text = String::new();
        for (family, _, is_ipv6) in NFPROTO {
            // Two names may lead to one address; the longer time counts.
            let mut elements = std::collections::BTreeMap::<(IpAddr, Option<u16>), u64>::new();
            for pin in
                pins.iter().filter(|pin| pin.address.is_ipv6() == is_ipv6 && self.allows_name(&pin.name))
            {
                for target in self.rules.allow.iter().filter(|target| target.is_name(&pin.name)) {
                    let left = elements.entry((pin.address, target.port)).or_default();
                    *left = pin.left_s.max(1).max(*left);
                }
            }
            let (ports, named): (Vec<_>, Vec<_>) =
                elements.into_iter().partition(|((_, port), _)| port.is_some());
            for (name, elements) in [("named", named), ("ports", ports)] {
                let _ = writeln!(text, "flush set inet banger {name}{family}");
                let written = elements.iter().map(|((address, port), left)| {
                    let port = port.map(|port| format!(" . {port}")).unwrap_or_default();
                    format!("{address}{port} timeout {left}s")
                });
                add_elements(&mut text, &format!("{name}{family}"), &written.collect::<Vec<_>>());
            }
        }
        text
    }

    /// The rules of one way.
    fn chain(&self, way: &Way) -> Vec<String> {
        let Way { first, addr, refuse, .. } = way;
        if self.mode == NetMode::None {
            return vec![(*refuse).to_owned()];
        }
        let mut rules = vec![(*first).to_owned()];
        let both = |rules: &mut Vec<String>, set: &str| {
            for (family, ip, _) in NFPROTO {
                rules.push(format!("{ip} {addr} @{set}{family} {refuse}"));
            }
        };
        both(&mut rules, "never");
        if self.mode != NetMode::Full {
            rules.push(format!("ip6 {addr} != {{ {} }} {refuse}", list(&REACHABLE6)));
        }
        both(&mut rules, "own");
        rules.extend(self.rules.deny.iter().filter_map(|target| way.rule(target, refuse)));
        if self.mode != NetMode::Full {
            let inner = self.rules.allow.iter().filter(|target| self.is_inner_target(target));
            rules.extend(inner.filter_map(|target| way.rule(target, "accept")));
        }
        both(&mut rules, "special");
        both(&mut rules, "links");
        match self.mode {
            NetMode::None => {}
            NetMode::Internet | NetMode::Full => rules.push("accept".to_owned()),
            NetMode::Allow => {
                let outer = self.rules.allow.iter().filter(|target| !self.is_inner_target(target));
                rules.extend(outer.filter_map(|target| way.rule(target, "accept")));
                let mark = self.mark;
                rules.push(format!("ct state established,related ct mark {mark} accept"));
                // What was not opened from inside has no mark.
                for (family, ip, _) in NFPROTO.into_iter().filter(|_| way.opens) {
                    rules.push(format!("{ip} {addr} @named{family} ct mark set {mark} accept"));
                    rules.push(format!(
                        "meta l4proto {{ tcp, udp }} {ip} {addr} . th dport @ports{family} ct mark set {mark} accept"
                    ));
                }
                rules.push((*refuse).to_owned());
            }
        }
        rules
    }

    fn is_inner_target(&self, target: &NetTarget) -> bool {
        matches!(target.place, Place::Net(net) if self.is_inner(net))
    }
}

/// Why a rule that allows this would allow nothing.
pub(crate) fn is_never_reached(target: &NetTarget) -> bool {
    let Place::Net(net) = target.place else { return false };
    let outside = net.is_ipv6() && !REACHABLE6.iter().any(|outer| outer.covers(net) || net.covers(*outer));
    outside || special::never().iter().any(|outer| outer.covers(net))
}

/// What differs between what leaves and what comes back.
struct Way {
    chain: &'static str,
    first: &'static str,
    /// Where the other end is.
    addr: &'static str,
    port: &'static str,
    refuse: &'static str,
    /// Whether connections begin this way.
    opens: bool,
}

const OUTBOUND: Way = Way {
    chain: "outbound",
    first: "ct state invalid drop",
    addr: "daddr",
    port: "dport",
    refuse: "goto refuse",
    opens: true,
};
/// Errors of routers come from anywhere.
const INBOUND: Way = Way {
    chain: "inbound",
    first: "ct state related accept",
    addr: "saddr",
    port: "sport",
    refuse: "drop",
    opens: false,
};

impl Way {
    /// A rule for a network; the addresses behind a name come and go.
    fn rule(&self, target: &NetTarget, verdict: &str) -> Option<String> {
        let Place::Net(net) = target.place else { return None };
        let (family, addr) = (if net.is_ipv6() { "ip6" } else { "ip" }, self.addr);
        Some(match target.port {
            None => format!("{family} {addr} {net} {verdict}"),
            Some(port) => {
                format!("{family} {addr} {net} meta l4proto {{ tcp, udp }} th {} {port} {verdict}", self.port)
            }
        })
    }
}

/// What a network of vms adds to the table.
struct Joined {
    /// The guest's addresses.
    guest: String,
    spoofed: String,
    forward: String,
}

impl Joined {
    fn nobody() -> Self {
        Self { guest: GUEST.to_string(), spoofed: String::new(), forward: String::new() }
    }

    /// Packets between members are from one of their addresses and for the other, and are not looked at any more: what
    /// two vms of one owner say to each other is theirs. They leave no trace in the kernel either, which remembers
    /// connections for all of the host in one place.
    fn member(member: Ipv4Addr) -> Self {
        let range = format!("{RANGE}/{RANGE_LEN}");
        let spoofed = format!(
            r#"		iifname "{TAP}" ip saddr {member} ip daddr != {range} drop
		iifname "{NET}" meta protocol != ip drop
		iifname "{NET}" ip saddr != {range} drop
		iifname "{NET}" ip saddr {member} drop
		iifname "{NET}" ip daddr != {member} drop
		iifname {{ "{TAP}", "{NET}" }} ip daddr {range} notrack
"#
        );
        let forward = format!(
            r#"		iifname "{TAP}" oifname "{NET}" ip saddr {member} ip daddr {range} accept
		iifname "{TAP}" oifname "{NET}" goto refuse
		iifname "{NET}" oifname "{TAP}" ip saddr {range} ip daddr {member} accept
"#
        );
        Self { guest: format!("{{ {GUEST}, {member} }}"), spoofed, forward }
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

fn add_elements(text: &mut String, set: &str, elements: &[String]) {
    if !elements.is_empty() {
        let _ = writeln!(text, "add element inet banger {set} {{ {} }}", elements.join(", "));
    }
}

#[cfg(test)]
mod tests {
    use super::{Host, Pin, Policy, is_never_reached};
    use crate::net::member;
    use banger_wire::daemon::NetMode;
    use banger_wire::net::{Cidr, NetRules};

    fn host() -> Host {
        let net = |address: &str, len| Cidr::new(address.parse().unwrap(), len);
        Host {
            own: vec![net("8.8.4.4", 32), net("2a01:4f8:0:7::2", 128)],
            links: vec![net("198.51.99.0", 24), net("2a01:4f8:0:7::", 64)],
            has_ipv4: true,
            has_ipv6: true,
        }
    }

    fn rules(allow: &str, deny: &str) -> NetRules {
        let targets = |text: &str| text.split_whitespace().map(|target| target.parse().unwrap()).collect();
        NetRules { allow: targets(allow), deny: targets(deny) }
    }

    fn policy(mode: NetMode) -> Policy {
        Policy::new(mode, NetRules::default(), host()).limited(true, None)
    }

    fn allowing(allow: &str) -> Policy {
        Policy::new(NetMode::Allow, rules(allow, ""), host()).limited(true, None)
    }

    #[test]
    fn policies_are_as_written_down() {
        let advice = "change the golden file when the change is meant";
        for (name, policy, golden) in [
            ("internet", policy(NetMode::Internet), include_str!("../../tests/golden/policy-internet.nft")),
            ("full", policy(NetMode::Full), include_str!("../../tests/golden/policy-full.nft")),
            (
                "member",
                Policy::new(NetMode::None, NetRules::default(), host()).joined(Some(member::address(5))),
                include_str!("../../tests/golden/policy-member.nft"),
            ),
            (
                "allow",
                Policy::new(
                    NetMode::Allow,
                    rules(
                        "example.com:443 10.1.0.0/16:5432 9.9.0.0/16 [2606:4700::/32]:443",
                        "9.9.9.9 evil.test",
                    ),
                    host(),
                )
                .limited(false, None),
                include_str!("../../tests/golden/policy-allow.nft"),
            ),
        ] {
            let text = policy.render();
            if std::env::var_os("UPDATE_GOLDEN").is_some() {
                let path = format!("{}/tests/golden/policy-{name}.nft", env!("CARGO_MANIFEST_DIR"));
                std::fs::write(path, &text).unwrap();
            } else {
                assert_eq!(text, golden, "{name}: {advice}, with `UPDATE_GOLDEN=1`");
            }
        }
        let internet = policy(NetMode::Internet).render();
        let none = Policy::new(NetMode::None, NetRules::default(), Host::default());
        let refused = none.render();
        let (outbound, inbound) = refused.split_once("flush chain inet banger inbound").unwrap();
        assert!(
            outbound
                .ends_with("flush chain inet banger outbound\nadd rule inet banger outbound goto refuse\n")
        );
        assert!(inbound.starts_with("\nadd rule inet banger inbound drop\n"));
        let limited = policy(NetMode::Internet).limited(true, Some(8 << 20)).render();
        let rules: Vec<&str> =
            limited.lines().filter(|line| !internet.contains(line)).map(str::trim).collect();
        let rule = "limit rate over 8388608 bytes/second burst 2097152 bytes drop";
        assert_eq!(rules, [format!("iifname \"tap0\" {rule}"), format!("oifname \"tap0\" {rule}")]);
    }

    #[test]
    fn an_address_is_open_as_long_as_a_name_leads_there_and_a_rule_names_it() {
        let policy = allowing("a.example:443 a.example:80 b.example");
        let pin = |name: &str, address: &str, left_s| Pin {
            name: name.into(),
            address: address.parse().unwrap(),
            left_s,
        };
        let pins = [
            pin("a.example", "9.9.9.9", 60),
            pin("b.example", "9.9.9.9", 90),
            pin("c.example", "9.9.9.8", 90),
            pin("b.example", "2606:4700::1", 0),
        ];
        let text = policy.render_pins(&pins);
        assert_eq!(
            text,
            "flush set inet banger named4\nadd element inet banger named4 { 9.9.9.9 timeout 90s }\n\
             flush set inet banger ports4\nadd element inet banger ports4 { 9.9.9.9 . 80 timeout 60s, 9.9.9.9 . 443 timeout 60s }\n\
             flush set inet banger named6\nadd element inet banger named6 { 2606:4700::1 timeout 1s }\n\
             flush set inet banger ports6\n"
        );
        let less = policy.with(rules("b.example", ""));
        assert!(!less.render_pins(&pins).contains("ports4 {"), "{less:?}");
        // What was opened by what is gone has another mark, and what only grew the same.
        assert_ne!(less.mark, policy.mark);
        assert_eq!(
            policy.with(rules("a.example:443 a.example:80 b.example c.example", "")).mark,
            policy.mark
        );
    }

    #[test]
    fn names_are_allowed_by_mode_and_rules() {
        assert!(policy(NetMode::Internet).allows_name("any.example"));
        assert!(!policy(NetMode::None).allows_name("any.example"));
        let denying = policy(NetMode::Internet).with(rules("", "evil.test"));
        assert!(denying.allows_name("any.example") && !denying.allows_name("a.evil.test"));
        let allowing = allowing("a.example:443");
        assert!(allowing.allows_name("a.example") && !allowing.allows_name("b.a.example"));
        assert!(!allowing.with(rules("a.example", "example")).allows_name("a.example"));
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
            "168.63.129.16",
            "172.31.0.1",
            "192.168.0.1",
            "224.0.0.251",
            "255.255.255.255",
            "8.8.4.4",
            "198.51.99.200",
            "::",
            "::1",
            "::ffff:10.0.0.1",
            "::10.0.0.1",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "fc00::1",
            "fd00:ec2::254",
            "fd20:ce::254",
            "2001:0:1::1",
            "2001:db8::1",
            "2002:a00:1::",
            "2a01:4f8:0:7::2",
            "2a01:4f8:0:7::99",
            // Translators to IPv4: private, the host's own, its links, metadata.
            "64:ff9b::10.0.0.1",
            "64:ff9b::8.8.4.4",
            "64:ff9b::198.51.99.1",
            "64:ff9b::169.254.169.254",
            "64:ff9b:1::8.8.8.8",
        ] {
            assert!(internet.withholds(inside.parse().unwrap()), "{inside}");
            assert!(!policy(NetMode::Full).withholds(inside.parse().unwrap()), "{inside}");
        }
        for outside in [
            "93.184.216.34",
            "172.32.0.1",
            "100.128.0.1",
            "8.8.8.8",
            "1.1.1.1",
            "2606:4700::1111",
            "2a01:4f8:0:8::1",
            "64:ff9b::8.8.8.8",
        ] {
            assert!(!internet.withholds(outside.parse().unwrap()), "{outside}");
        }
    }

    #[test]
    fn inner_networks_are_open_when_a_rule_names_them_and_no_more() {
        let withholds = |allow: &str, address: &str| allowing(allow).withholds(address.parse().unwrap());
        assert!(!withholds("10.1.0.0/16", "10.1.2.3"));
        assert!(withholds("10.1.0.0/16", "10.2.0.1"));
        // More than an inner network opens only what is public of it.
        assert!(withholds("0.0.0.0/0", "10.1.2.3") && withholds("::/0", "fd00::1"));
        assert!(!withholds("fd12::/16", "fd12::1"));
        // A machine of the host's link, but not the host, which may be there too.
        assert!(!withholds("198.51.99.0/24", "198.51.99.200"));
        assert!(withholds("8.8.4.4", "8.8.4.4") && withholds("fd00::/8", "fd00:ec2::254"));
    }

    #[test]
    fn what_is_never_reached_is_known() {
        let never = |text: &str| is_never_reached(&text.parse().unwrap());
        for text in [
            "127.0.0.1",
            "169.254.169.254:80",
            "0.0.0.0",
            "224.0.0.0/4",
            "::1",
            "fe80::/10",
            "ff02::1",
            "fd00:ec2::254",
        ] {
            assert!(never(text), "{text}");
        }
        for text in ["10.0.0.0/8", "0.0.0.0/0", "::/0", "example.com", "fd12::1", "2606:4700::1"] {
            assert!(!never(text), "{text}");
        }
    }
}
