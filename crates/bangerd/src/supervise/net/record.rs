//! What a vm was refused, and which addresses are open by name.
//!
//! Refused packets are counted by the kernel, in sets of the policy's table that hold a bounded number of destinations
//! for an hour: a guest that floods costs the supervisor nothing, and nothing is needed that a namespace of its own does
//! not have (the log of netfilter would need another module of the kernel's). Refused questions are counted here. All of it
//! is bounded, and what does not fit is not remembered.

use crate::net::policy::{DENIED_S, Pin};
use banger_wire::net::{Denial, OpenName};
use serde_json::Value;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Questions that are remembered; the oldest goes.
const QUESTIONS_MAX: usize = 256;
/// Addresses whose names are remembered, to tell what a refused packet wanted; the oldest goes.
const NAMES_MAX: usize = 1024;
/// Addresses that are open by name at a time.
const PINS_MAX: usize = 1024;
/// An address is open for twice as long as the guest may keep it, so that not every question changes what is open, and at
/// least this long: programs ask once and connect when they come to it.
const PIN_MIN: Duration = Duration::from_secs(120);
/// And at most this long.
const PIN_MAX: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug, Default)]
pub(crate) struct Record {
    questions: VecDeque<Denial>,
    names: VecDeque<(IpAddr, String)>,
    pins: Vec<(Pin, Instant)>,
}

impl Record {
    /// Writes a refused question down, with the address that was withheld.
    pub(crate) fn deny(&mut self, name: &str, address: Option<IpAddr>) {
        let known = self
            .questions
            .iter()
            .position(|known| known.name.as_deref() == Some(name) && known.address == address)
            .and_then(|at| self.questions.remove(at));
        let count = known.map_or(0, |known| known.count).saturating_add(1);
        if self.questions.len() == QUESTIONS_MAX {
            self.questions.pop_front();
        }
        self.questions.push_back(Denial {
            last: unix_s(),
            count,
            protocol: "dns".to_owned(),
            name: Some(name.to_owned()),
            address,
            port: None,
        });
    }

    /// Remembers where a name led.
    pub(crate) fn note(&mut self, name: &str, addresses: impl Iterator<Item = IpAddr>) {
        for address in addresses {
            self.names.retain(|(known, _)| *known != address);
            if self.names.len() == NAMES_MAX {
                self.names.pop_front();
            }
            self.names.push_back((address, name.to_owned()));
        }
    }

    /// Writes down that a name leads to an address for so many seconds. Returns whether that is news, or none when there is
    /// no room.
    pub(crate) fn pin(&mut self, name: &str, address: IpAddr, ttl: u32) -> Option<bool> {
        let now = Instant::now();
        self.pins.retain(|(_, until)| *until > now);
        let until = now + (Duration::from_secs(ttl.into()) * 2).clamp(PIN_MIN, PIN_MAX);
        let is_full = self.pins.len() >= PINS_MAX;
        match self.pins.iter_mut().find(|(pin, _)| pin.name == name && pin.address == address) {
            // What is open for half of that yet needs no change.
            Some((_, known)) if *known >= now + (until - now) / 2 => Some(false),
            Some((_, known)) => {
                *known = until;
                Some(true)
            }
            None if is_full => None,
            None => {
                self.pins.push((Pin { name: name.to_owned(), address, left_s: 0 }, until));
                Some(true)
            }
        }
    }

    /// Forgets what was written down for a name.
    pub(crate) fn unpin(&mut self, name: &str) {
        self.pins.retain(|(pin, _)| pin.name != name);
    }

    /// What is pinned now.
    pub(crate) fn pins(&self) -> Vec<Pin> {
        let now = Instant::now();
        let left = |until: &Instant| until.saturating_duration_since(now).as_secs();
        let open = self.pins.iter().filter(|(_, until)| *until > now);
        open.map(|(pin, until)| Pin { left_s: left(until), ..pin.clone() }).collect()
    }

    /// The same for a client, as far as a policy still allows the name.
    pub(crate) fn open(&self, allows: impl Fn(&str) -> bool) -> Vec<OpenName> {
        let pins = self.pins().into_iter().filter(|pin| allows(&pin.name));
        pins.map(|pin| OpenName { name: pin.name, address: pin.address, left_s: pin.left_s }).collect()
    }

    /// All that was refused, the last first; `table` is what `nft` says the policy's table has, at the time `now`.
    pub(crate) fn denials(&self, table: &[u8], now: i64) -> Vec<Denial> {
        let mut denials: Vec<Denial> = packets(table, now);
        for denial in &mut denials {
            let known = self.names.iter().rev().find(|(address, _)| Some(*address) == denial.address);
            denial.name = known.map(|(_, name)| name.clone());
        }
        denials.extend(self.questions.iter().rev().cloned());
        denials.sort_by_key(|denial| std::cmp::Reverse(denial.last));
        denials
    }
}

/// Unix time in seconds.
pub(crate) fn unix_s() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    since.as_secs().cast_signed()
}

/// The refused packets in `nft`'s listing; what is not understood is left out.
fn packets(table: &[u8], now: i64) -> Vec<Denial> {
    let Ok(listing) = serde_json::from_slice::<Value>(table) else { return Vec::new() };
    let objects = listing["nftables"].as_array().into_iter().flatten();
    let sets = objects.filter_map(|object| object.get("set")).filter(|set| {
        let name = set["name"].as_str().unwrap_or_default();
        name.starts_with("denied") || name.starts_with("refused")
    });
    let elements = sets.flat_map(|set| set["elem"].as_array().into_iter().flatten());
    elements.filter_map(|element| packet(&element["elem"], now)).collect()
}

fn packet(element: &Value, now: i64) -> Option<Denial> {
    let key = element["val"]["concat"].as_array()?;
    let protocol = match &key.get(1)? {
        Value::String(name) if name == "ipv6-icmp" => "icmpv6".to_owned(),
        Value::String(name) => name.clone(),
        number => number.to_string(),
    };
    let left = element["expires"].as_u64()?.min(DENIED_S);
    Some(Denial {
        last: now - (DENIED_S - left).cast_signed(),
        count: element["counter"]["packets"].as_u64().unwrap_or(1),
        protocol,
        name: None,
        address: Some(key.first()?.as_str()?.parse().ok()?),
        port: key.get(2).and_then(Value::as_u64).and_then(|port| port.try_into().ok()),
    })
}

#[cfg(test)]
mod tests {
    use super::{PINS_MAX, QUESTIONS_MAX, Record};

    const TABLE: &str = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}}, {"table": {"name": "banger"}},
        {"set": {"name": "named4", "elem": [{"elem": {"val": "9.9.9.9", "expires": 57}}]}},
        {"set": {"name": "denied4", "elem": [
            {"elem": {"val": {"concat": ["8.8.4.4", "udp", 53]}, "expires": 3590, "counter": {"packets": 2, "bytes": 31}}},
            {"elem": {"val": {"concat": ["8.8.8.8", 6, 443]}, "expires": 3598, "counter": {"packets": 1, "bytes": 60}}},
            {"elem": {"val": "nonsense"}}]}},
        {"set": {"name": "refused6", "elem": [
            {"elem": {"val": {"concat": ["fd77::9", "ipv6-icmp"]}, "expires": 3599, "counter": {"packets": 3}}}]}},
        {"set": {"name": "denied6"}}]}"#;

    #[test]
    fn packets_are_read_from_the_listing_and_get_their_names() {
        let mut record = Record::default();
        record.note("dns.example", ["8.8.4.4".parse().unwrap()].into_iter());
        let told: Vec<String> = record
            .denials(TABLE.as_bytes(), 10_000)
            .iter()
            .map(|denial| {
                let (name, port) = (denial.name.as_deref().unwrap_or("-"), denial.port.unwrap_or(0));
                let address = denial.address.unwrap();
                format!("{} {} {} {name} {address} {port}", denial.last, denial.count, denial.protocol)
            })
            .collect();
        let expected =
            ["9999 3 icmpv6 - fd77::9 0", "9998 1 6 - 8.8.8.8 443", "9990 2 udp dns.example 8.8.4.4 53"];
        assert_eq!(told, expected);
        for nonsense in
            [&b""[..], b"{}", b"[1]", b"{\"nftables\": [{\"set\": {\"name\": \"denied4\", \"elem\": [1]}}]}"]
        {
            assert!(record.denials(nonsense, 0).is_empty());
        }
    }

    #[test]
    fn questions_alike_are_counted_and_the_oldest_go() {
        let mut record = Record::default();
        record.deny("a.example", None);
        record.deny("a.example", None);
        assert_eq!(record.denials(&[], 0).iter().map(|denial| denial.count).collect::<Vec<_>>(), [2]);
        for number in 0..QUESTIONS_MAX {
            record.deny(&format!("{number}.example"), None);
        }
        let denials = record.denials(&[], 0);
        assert_eq!(denials.len(), QUESTIONS_MAX);
        assert!(!denials.iter().any(|denial| denial.name.as_deref() == Some("a.example")));
    }

    #[test]
    fn addresses_are_pinned_within_bounds() {
        let mut record = Record::default();
        let address = |number: usize| std::net::Ipv4Addr::from(number as u32 + 1).into();
        assert_eq!(record.pin("a.example", address(0), 5), Some(true));
        assert_eq!(record.pin("a.example", address(0), 5), Some(false));
        assert_eq!(record.pin("a.example", address(0), 3600), Some(true));
        assert_eq!(record.pin("b.example", address(0), 5), Some(true));
        let left: Vec<u64> = record.pins().iter().map(|pin| pin.left_s).collect();
        assert!(left[0] > 7190 && (110..=120).contains(&left[1]), "{left:?}");
        for number in 2..PINS_MAX {
            assert_eq!(record.pin("a.example", address(number), 5), Some(true));
        }
        assert_eq!(record.pin("a.example", address(PINS_MAX), 5), None);
        assert_eq!(record.open(|name| name == "b.example").len(), 1);
    }
}
