//! The range of the loopback in which vms have their addresses on the host (`loopback_cidr`).

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// Where the loopback is. The kernel takes all of it for this machine's own.
const LOOPBACK: u8 = 127;
/// The shortest prefix: half of the loopback, the other half of which has what nobody's vm may have.
const PREFIX_MIN: u8 = 9;
/// The longest prefix, with 14 addresses.
const PREFIX_MAX: u8 = 28;
/// Addresses of a block of 256, or of what there is of one, that are none of a vm's: its first and its last, which look
/// like something else.
const NOT_USED: u32 = 2;

/// A range of addresses of the loopback, apart from 127.0.0.0/24, where the machine's own services are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(crate) struct LoopbackRange {
    network: Ipv4Addr,
    prefix_len: u8,
}

/// What a text has to be that is a [`LoopbackRange`].
pub(crate) const ACCEPTED: &str =
    "a range such as `\"127.77.0.0/16\"`: in 127.0.0.0/8, from /9 to /28, without 127.0.0.0/24";

/// A text that is no range for vms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is not {ACCEPTED}")]
pub(crate) struct BadRange;

impl Default for LoopbackRange {
    fn default() -> Self {
        Self { network: Ipv4Addr::new(LOOPBACK, 77, 0, 0), prefix_len: 16 }
    }
}

impl LoopbackRange {
    /// Returns how many vms it has addresses for.
    pub(crate) fn len(self) -> u32 {
        self.blocks() * (self.block_len() - NOT_USED)
    }

    /// Returns one of its addresses, counted from 0; beyond the last, the first ones again.
    pub(crate) fn address(self, number: u32) -> Ipv4Addr {
        let used = self.block_len() - NOT_USED;
        let number = number % self.len();
        Ipv4Addr::from(self.network.to_bits() + number / used * self.block_len() + number % used + 1)
    }

    fn size(self) -> u32 {
        1 << (32 - u32::from(self.prefix_len))
    }

    fn block_len(self) -> u32 {
        self.size().min(256)
    }

    fn blocks(self) -> u32 {
        self.size() / self.block_len()
    }
}

impl FromStr for LoopbackRange {
    type Err = BadRange;

    fn from_str(text: &str) -> Result<Self, BadRange> {
        let (network, prefix_len) = text.split_once('/').ok_or(BadRange)?;
        // A number has one way to be written.
        let is_plain = !prefix_len.starts_with(['0', '+']);
        let range = Self {
            network: network.parse().map_err(|_| BadRange)?,
            prefix_len: prefix_len.parse().ok().filter(|_| is_plain).ok_or(BadRange)?,
        };
        let is_sized = (PREFIX_MIN..=PREFIX_MAX).contains(&range.prefix_len);
        let is_whole = is_sized && range.network.to_bits().is_multiple_of(range.size());
        let is_apart = |network: Ipv4Addr| network.octets()[..3] != [LOOPBACK, 0, 0];
        if is_whole && range.network.octets()[0] == LOOPBACK && is_apart(range.network) {
            Ok(range)
        } else {
            Err(BadRange)
        }
    }
}

impl TryFrom<String> for LoopbackRange {
    type Error = BadRange;

    fn try_from(text: String) -> Result<Self, BadRange> {
        text.parse()
    }
}

impl From<LoopbackRange> for String {
    fn from(range: LoopbackRange) -> Self {
        range.to_string()
    }
}

impl fmt::Display for LoopbackRange {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{}/{}", self.network, self.prefix_len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_range_is_whole_in_the_loopback_and_apart_from_its_beginning() {
        for text in ["127.77.0.0/16", "127.128.0.0/9", "127.0.1.0/24", "127.1.2.240/28", "127.64.0.0/10"] {
            assert_eq!(text.parse().map(|range: LoopbackRange| range.to_string()), Ok(text.to_owned()));
        }
        for text in [
            "",
            "127.77.0.0",
            "127.77.0.0/",
            "127.77.0.0/016",
            "127.77.0.0/+16",
            "127.77.1.0/16",
            "127.0.0.0/8",
            "127.0.0.0/9",
            "127.0.0.0/16",
            "127.0.0.0/24",
            "127.0.0.240/28",
            "127.77.0.0/29",
            "127.77.0.0/32",
            "128.0.0.0/16",
            "10.0.0.0/16",
            "126.0.0.0/7",
            "127.128.0.0/0",
            "::1/128",
            " 127.77.0.0/16",
        ] {
            assert_eq!(text.parse::<LoopbackRange>(), Err(BadRange), "{text}");
        }
    }

    #[test]
    fn addresses_are_all_different_in_the_range_and_look_like_one() {
        for (text, len, first, last) in [
            ("127.77.0.0/16", 65024, [127, 77, 0, 1], [127, 77, 255, 254]),
            ("127.5.6.0/24", 254, [127, 5, 6, 1], [127, 5, 6, 254]),
            ("127.5.6.128/25", 126, [127, 5, 6, 129], [127, 5, 6, 254]),
            ("127.5.6.240/28", 14, [127, 5, 6, 241], [127, 5, 6, 254]),
            ("127.5.6.0/23", 508, [127, 5, 6, 1], [127, 5, 7, 254]),
        ] {
            let range: LoopbackRange = text.parse().unwrap();
            assert_eq!(range.len(), len, "{text}");
            let addresses: BTreeSet<Ipv4Addr> = (0..len).map(|number| range.address(number)).collect();
            assert_eq!(addresses.len(), len as usize, "{text}");
            assert_eq!(addresses.first().map(Ipv4Addr::octets), Some(first), "{text}");
            assert_eq!(addresses.last().map(Ipv4Addr::octets), Some(last), "{text}");
            assert!(addresses.iter().all(|address| ![0, 255].contains(&address.octets()[3])), "{text}");
            assert_eq!(range.address(len), range.address(0), "{text}");
        }
        let largest: LoopbackRange = "127.128.0.0/9".parse().unwrap();
        assert_eq!(largest.address(largest.len() - 1).octets(), [127, 255, 255, 254]);
        assert_eq!(LoopbackRange::default(), "127.77.0.0/16".parse().unwrap());
    }
}
