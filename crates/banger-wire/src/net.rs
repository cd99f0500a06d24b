//! What a vm reaches, in the words of its owner: targets that are allowed and denied, and what was refused.

use crate::names::{NameError, NetworkName};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Targets of one list; each is a rule that packets pass one after the other.
pub const TARGETS_MAX: usize = 256;
/// The longest name there is (RFC 1035).
const NAME_LEN_MAX: usize = 253;
const LABEL_LEN_MAX: usize = 63;

/// A network: an address whose host bits are zero, and how many bits are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cidr {
    /// Networks of one family come together when they are sorted.
    is_ipv6: bool,
    /// An IPv4 address is in the upper 32 bits.
    bits: u128,
    prefix_len: u8,
}

impl Cidr {
    /// The IPv4 network an address is in; a prefix of more than 32 bits is one of 32.
    #[must_use]
    pub const fn v4(address: Ipv4Addr, prefix_len: u8) -> Self {
        let prefix_len = if prefix_len > 32 { 32 } else { prefix_len };
        Self { is_ipv6: false, bits: ((address.to_bits() as u128) << 96) & mask(prefix_len), prefix_len }
    }

    /// The IPv6 network an address is in; a prefix of more than 128 bits is one of 128.
    #[must_use]
    pub const fn v6(address: Ipv6Addr, prefix_len: u8) -> Self {
        let prefix_len = if prefix_len > 128 { 128 } else { prefix_len };
        Self { is_ipv6: true, bits: address.to_bits() & mask(prefix_len), prefix_len }
    }

    /// The network an address is in.
    #[must_use]
    pub const fn new(address: IpAddr, prefix_len: u8) -> Self {
        match address {
            IpAddr::V4(address) => Self::v4(address, prefix_len),
            IpAddr::V6(address) => Self::v6(address, prefix_len),
        }
    }

    /// A single address.
    #[must_use]
    pub const fn host(address: IpAddr) -> Self {
        Self::new(address, u8::MAX)
    }

    /// Its first address.
    #[must_use]
    pub fn address(self) -> IpAddr {
        match self.is_ipv6 {
            true => Ipv6Addr::from_bits(self.bits).into(),
            false => Ipv4Addr::from_bits((self.bits >> 96) as u32).into(),
        }
    }

    /// Length of the prefix in bits.
    #[must_use]
    pub const fn prefix_len(self) -> u8 {
        self.prefix_len
    }

    /// Whether it is one of IPv6.
    #[must_use]
    pub const fn is_ipv6(self) -> bool {
        self.is_ipv6
    }

    /// Whether an address is within.
    #[must_use]
    pub const fn contains(self, address: IpAddr) -> bool {
        self.covers(Self::host(address))
    }

    /// Whether all of another network is within.
    #[must_use]
    pub const fn covers(self, other: Self) -> bool {
        self.is_ipv6 == other.is_ipv6
            && self.prefix_len <= other.prefix_len
            && other.bits & mask(self.prefix_len) == self.bits
    }

    /// Drops networks that lie within others, and sorts.
    #[must_use]
    pub fn simplify(mut nets: Vec<Self>) -> Vec<Self> {
        nets.sort_unstable();
        let mut kept: Vec<Self> = Vec::with_capacity(nets.len());
        for net in nets {
            // Sorted by address and then by length, a containing network comes before all it contains.
            if kept.last().is_none_or(|last| !last.covers(net)) {
                kept.push(net);
            }
        }
        kept
    }
}

const fn mask(prefix_len: u8) -> u128 {
    if prefix_len == 0 { 0 } else { u128::MAX << (128 - prefix_len as u32) }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = if self.is_ipv6 { 128 } else { 32 };
        match self.prefix_len == whole {
            true => write!(f, "{}", self.address()),
            false => write!(f, "{}/{}", self.address(), self.prefix_len),
        }
    }
}

/// Where a target is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A name, in lower case and without a final dot.
    Name(String),
    /// An address or network.
    Net(Cidr),
}

/// What can be allowed or denied: `example.com`, `example.com:443`, `192.0.2.0/24`, `[2001:db8::1]:443`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct NetTarget {
    /// Where it is.
    pub place: Place,
    /// One port, of TCP and UDP; everything when absent.
    pub port: Option<u16>,
}

/// Why a text is no target.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no name, address or network with an optional port: {reason}")]
pub struct ParseTargetError {
    text: String,
    reason: &'static str,
}

impl NetTarget {
    /// Whether a name, in lower case and without a final dot, is this target's.
    #[must_use]
    pub fn is_name(&self, name: &str) -> bool {
        matches!(&self.place, Place::Name(own) if own == name)
    }

    /// Whether a name is this target's or below it.
    #[must_use]
    pub fn is_above(&self, name: &str) -> bool {
        let Place::Name(own) = &self.place else { return false };
        name.strip_suffix(own.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }
}

impl FromStr for NetTarget {
    type Err = ParseTargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = |reason| ParseTargetError { text: text.escape_debug().take(300).collect(), reason };
        let (place, port) = split_port(text).map_err(error)?;
        let port = match port {
            None => None,
            Some(port) => match port.parse::<u16>() {
                Ok(port) if port != 0 => Some(port),
                _ => return Err(error("a port is a number from 1 to 65535")),
            },
        };
        let place = match place.split_once('/') {
            Some((address, len)) => {
                let address: IpAddr =
                    address.parse().map_err(|_| error("a network begins with an address"))?;
                let most = if address.is_ipv4() { 32 } else { 128 };
                let len = len
                    .parse()
                    .ok()
                    .filter(|len| *len <= most)
                    .ok_or_else(|| error("its prefix is too long"))?;
                let net = Cidr::new(address, len);
                if net.address() != address {
                    return Err(error("bits beyond the prefix are set"));
                }
                Place::Net(net)
            }
            None => match place.parse::<IpAddr>() {
                Ok(address) => Place::Net(Cidr::host(address)),
                Err(_) => Place::Name(parse_name(place).map_err(error)?),
            },
        };
        // What an IPv4 address is written as in IPv6 never leaves a machine.
        if let Place::Net(net) = place
            && let IpAddr::V6(address) = net.address()
            && address.to_ipv4_mapped().is_some()
        {
            return Err(error("write an IPv4 address as one"));
        }
        Ok(Self { place, port })
    }
}

/// Splits `host:port`, `[v6]:port`, `[v6/64]:port`; what has several colons and no brackets is an IPv6 address.
fn split_port(text: &str) -> Result<(&str, Option<&str>), &'static str> {
    if let Some(rest) = text.strip_prefix('[') {
        let (inner, after) = rest.split_once(']').ok_or("a bracket is not closed")?;
        return match after.strip_prefix(':') {
            Some(port) => Ok((inner, Some(port))),
            None if after.is_empty() => Ok((inner, None)),
            None => Err("after the bracket comes `:PORT`"),
        };
    }
    match text.split_once(':') {
        Some((_, after)) if after.contains(':') => Ok((text, None)),
        Some((place, port)) => Ok((place, Some(port))),
        None => Ok((text, None)),
    }
}

fn parse_name(text: &str) -> Result<String, &'static str> {
    let name = text.strip_suffix('.').unwrap_or(text);
    if name.is_empty() || name.len() > NAME_LEN_MAX {
        return Err("a name has 1 to 253 characters");
    }
    let good = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
    let label = |label: &str| !label.is_empty() && label.len() <= LABEL_LEN_MAX && label.bytes().all(good);
    if !name.split('.').all(label) {
        return Err("a name is made of letters, digits, `-` and `_`, with dots between");
    }
    // `10.0.0` and `1.2.3.4.5` are addresses with a mistake in them.
    if name.rsplit('.').next().is_some_and(|last| last.bytes().all(|c| c.is_ascii_digit())) {
        return Err("an address has four numbers");
    }
    Ok(name.to_ascii_lowercase())
}

impl fmt::Display for NetTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.place, self.port) {
            (Place::Name(name), None) => write!(f, "{name}"),
            (Place::Name(name), Some(port)) => write!(f, "{name}:{port}"),
            (Place::Net(net), None) => write!(f, "{net}"),
            (Place::Net(net), Some(port)) if net.is_ipv6() => write!(f, "[{net}]:{port}"),
            (Place::Net(net), Some(port)) => write!(f, "{net}:{port}"),
        }
    }
}

impl Serialize for NetTarget {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for NetTarget {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What is allowed and denied besides what the mode says. What is denied is denied, whatever else is allowed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NetRules {
    /// Allowed.
    #[serde(default)]
    pub allow: Vec<NetTarget>,
    /// Denied.
    #[serde(default)]
    pub deny: Vec<NetTarget>,
}

impl NetRules {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.allow.is_empty() && self.deny.is_empty()
    }
}

/// What a vm reaches; also the shape of `vm net show --json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetView {
    /// What its rules add to or take from.
    pub mode: crate::daemon::NetMode,
    /// The same from the next start on, where that is something else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_mode: Option<crate::daemon::NetMode>,
    /// Its rules.
    #[serde(flatten)]
    pub rules: NetRules,
    /// Whether this is in force now; if not, it is from the next start on.
    pub live: bool,
    /// Addresses that are open because an allowed name led there.
    pub open: Vec<OpenName>,
}

/// An address that an allowed name leads to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenName {
    /// The name.
    pub name: String,
    /// The address.
    pub address: IpAddr,
    /// Seconds it stays open for new connections.
    pub left_s: u64,
}

/// Something that was refused; also the shape of `vm net denials --json`. Alike ones are counted together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// Unix time of the last one, seconds.
    pub last: i64,
    /// How many packets, or questions.
    pub count: u64,
    /// `tcp`, `udp`, `icmp`, `icmpv6`, another protocol's number, or `dns` for a question.
    pub protocol: String,
    /// The name asked for, or one that led to the address before.
    pub name: Option<String>,
    /// Where it was to go, or where the name leads and may not.
    pub address: Option<IpAddr>,
    /// The port, of TCP and UDP.
    pub port: Option<u16>,
}

/// What a supervisor knows of its vm's network.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NetReport {
    /// Open by name.
    pub open: Vec<OpenName>,
    /// Refused, the last first.
    pub denials: Vec<Denial>,
}

/// A vm's place in a network of vms.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberView {
    /// The network.
    pub name: NetworkName,
    /// The vm's address there, as long as the vm exists.
    pub address: Option<Ipv4Addr>,
    /// Why it reaches no other vm of the network, while it runs.
    pub warning: Option<String>,
}

/// Which network of vms one is to be in. As text a name, or `none`, which therefore names no network here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum NetworkChoice {
    /// In no network.
    None,
    /// In the network of this name.
    Named(NetworkName),
}

impl NetworkChoice {
    /// The network, if it is one.
    pub fn name(self) -> Option<NetworkName> {
        match self {
            Self::None => None,
            Self::Named(name) => Some(name),
        }
    }
}

impl From<Option<NetworkName>> for NetworkChoice {
    fn from(name: Option<NetworkName>) -> Self {
        name.map_or(Self::None, Self::Named)
    }
}

impl FromStr for NetworkChoice {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text == "none" { Ok(Self::None) } else { text.parse().map(Self::Named) }
    }
}

impl TryFrom<String> for NetworkChoice {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<NetworkChoice> for String {
    fn from(choice: NetworkChoice) -> Self {
        choice.to_string()
    }
}

impl fmt::Display for NetworkChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Named(name) => name.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Cidr, NetTarget, NetworkChoice};

    fn net(text: &str) -> Cidr {
        let (address, len) = text.split_once('/').unwrap();
        Cidr::new(address.parse().unwrap(), len.parse().unwrap())
    }

    #[test]
    fn no_network_is_a_word_and_no_name() {
        let choice = |text: &str| text.parse::<NetworkChoice>();
        assert_eq!(choice("none").unwrap().name(), None);
        assert_eq!(choice("shop").unwrap().name().unwrap().as_str(), "shop");
        assert_eq!(
            choice("a/b").unwrap_err().to_string(),
            "`a/b` is not a valid network name: use 1 to 63 lower-case letters, digits and hyphens, starting and \
             ending with a letter or digit"
        );
        for text in ["none", "shop"] {
            let json = serde_json::to_string(&choice(text).unwrap()).unwrap();
            assert_eq!(json, format!("\"{text}\""));
            assert_eq!(serde_json::from_str::<NetworkChoice>(&json).unwrap(), choice(text).unwrap());
        }
    }

    #[test]
    fn membership_follows_the_prefix() {
        for (network, inside, outside) in [
            ("10.0.0.0/8", "10.255.255.255", "11.0.0.0"),
            ("192.0.2.77/24", "192.0.2.1", "192.0.3.1"),
            ("192.0.2.7/32", "192.0.2.7", "192.0.2.6"),
            ("fe80::1/10", "febf::9", "fec0::"),
            ("2001:db8::7/128", "2001:db8::7", "2001:db8::6"),
            // The same bits in the other family.
            ("10.0.0.0/8", "10.0.0.0", "a00::"),
        ] {
            assert!(net(network).contains(inside.parse().unwrap()), "{network}");
            assert!(!net(network).contains(outside.parse().unwrap()), "{network}");
        }
        assert!(net("9.9.9.9/0").contains("255.255.255.255".parse().unwrap()));
        assert!(!net("::/0").contains("1.1.1.1".parse().unwrap()));
    }

    #[test]
    fn networks_within_others_go() {
        let nets = [
            "10.0.0.3/32",
            "fd00::1/128",
            "192.168.1.0/24",
            "10.0.0.0/8",
            "fc00::/7",
            "192.168.1.7/32",
            "10.0.0.3/32",
        ];
        let kept: Vec<String> =
            Cidr::simplify(nets.map(net).to_vec()).iter().map(ToString::to_string).collect();
        assert_eq!(kept, ["10.0.0.0/8", "192.168.1.0/24", "fc00::/7"]);
    }

    #[test]
    fn targets_are_read_and_written_alike() {
        for (text, written) in [
            ("Example.COM.", "example.com"),
            ("example.com:443", "example.com:443"),
            ("_x.a-b.example", "_x.a-b.example"),
            ("192.0.2.7", "192.0.2.7"),
            ("192.0.2.7/32:80", "192.0.2.7:80"),
            ("10.0.0.0/8:5432", "10.0.0.0/8:5432"),
            ("2001:db8::7", "2001:db8::7"),
            ("[2001:DB8::7]:443", "[2001:db8::7]:443"),
            ("[2001:db8::/32]:443", "[2001:db8::/32]:443"),
            ("2001:db8::/32", "2001:db8::/32"),
        ] {
            let target: NetTarget = text.parse().unwrap();
            assert_eq!(target.to_string(), written);
            assert_eq!(written.parse::<NetTarget>().unwrap(), target);
        }
    }

    #[test]
    fn what_is_no_target_is_refused() {
        let refused = |text: &str| text.parse::<NetTarget>().unwrap_err().to_string();
        assert_eq!(
            refused("example.com:0"),
            "`example.com:0` is no name, address or network with an optional port: a port is a number from 1 to 65535"
        );
        for text in [
            "",
            ":80",
            "a..b",
            "10.0.0",
            "1.2.3.4.5",
            "10.0.0.1/8",
            "10.0.0.0/33",
            "a b",
            "*.example.com",
            "[::1",
            "[::1]80",
            "::ffff:10.0.0.1",
            "a:",
            "x/8",
            "fe80::1%eth0",
            "http://a",
            "2001:db8::/129",
            "1:65536",
        ] {
            refused(text);
        }
    }

    #[test]
    fn a_denied_name_takes_what_is_below_it() {
        let target: NetTarget = "example.com".parse().unwrap();
        assert!(target.is_name("example.com") && !target.is_name("a.example.com"));
        assert!(target.is_above("example.com") && target.is_above("a.b.example.com"));
        assert!(!target.is_above("badexample.com") && !target.is_above("com"));
    }
}
