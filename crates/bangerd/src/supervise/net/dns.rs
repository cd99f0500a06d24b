//! As much of DNS messages as a forwarder has to understand. Bytes come from the guest and from whoever answers for the
//! host; both are taken apart with bounds and without following compression pointers, so nothing can loop.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const HEADER_LEN: usize = 12;
const NAME_LEN_MAX: usize = 255;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const TYPE_ANY: u16 = 255;
const CLASS_IN: u16 = 1;
/// Seconds that the address of a name we know ourselves may be kept.
const OWN_TTL: u32 = 5;

/// An outcome, as in the header of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rcode {
    FormatError = 1,
    ServerFailure = 2,
    NoSuchName = 3,
}

/// A message with one question that can be passed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Query {
    bytes: Vec<u8>,
    question_end: usize,
}

/// What a guest sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// A query.
    Query(Query),
    /// Not one, but it can be told so.
    Refuse(Vec<u8>),
    /// Nothing to answer.
    Ignore,
}

/// Takes apart what a guest sent.
pub(crate) fn parse(bytes: &[u8]) -> Parsed {
    let Some(header) = bytes.get(..HEADER_LEN) else { return Parsed::Ignore };
    if header[2] & 0x80 != 0 {
        // An answer: answering answers is how two servers keep each other busy.
        return Parsed::Ignore;
    }
    let standard = header[2] & 0x78 == 0;
    match question_end(bytes) {
        Some(question_end) if standard => Parsed::Query(Query { bytes: bytes.to_vec(), question_end }),
        _ => {
            let mut answer = header.to_vec();
            answer[2] |= 0x80;
            answer[3] = 0x80 | Rcode::FormatError as u8;
            answer[4..].fill(0);
            Parsed::Refuse(answer)
        }
    }
}

impl Query {
    /// The guest's own number of it.
    pub(crate) fn id(&self) -> [u8; 2] {
        [self.bytes[0], self.bytes[1]]
    }

    /// The message under another number.
    pub(crate) fn with_id(&self, id: [u8; 2]) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[..2].copy_from_slice(&id);
        bytes
    }

    /// Whether a message is an answer to this query sent with that number.
    pub(crate) fn is_answered_by(&self, answer: &[u8], id: [u8; 2]) -> bool {
        let ours = &self.bytes[HEADER_LEN..self.question_end];
        answer.len() >= self.question_end
            && answer[..2] == id
            && answer[2] & 0x80 != 0
            && question_end(answer) == Some(self.question_end)
            // Some resolvers change the case of names.
            && answer[HEADER_LEN..self.question_end].eq_ignore_ascii_case(ours)
    }

    /// An answer without records.
    pub(crate) fn fail(&self, rcode: Rcode) -> Vec<u8> {
        let mut answer = self.bytes[..self.question_end].to_vec();
        answer[2] |= 0x80;
        answer[3] = 0x80 | rcode as u8;
        answer[6..HEADER_LEN].fill(0);
        answer
    }

    /// The answer where the name has this address, and none of another kind.
    pub(crate) fn answer(&self, address: Ipv4Addr) -> Vec<u8> {
        let mut answer = self.bytes[..self.question_end].to_vec();
        // An answer, by who knows, to a question that may have been recursive; no failure.
        answer[2] = 0x84 | self.bytes[2] & 0x01;
        answer[3] = 0x80;
        answer[6..HEADER_LEN].fill(0);
        let word = |at: usize| u16::from_be_bytes([self.bytes[at], self.bytes[at + 1]]);
        let (kind, class) = (word(self.question_end - 4), word(self.question_end - 2));
        if matches!(kind, TYPE_A | TYPE_ANY) && class == CLASS_IN {
            answer[7] = 1;
            // The name is that of the question.
            answer.extend_from_slice(&[0xc0, HEADER_LEN as u8]);
            for word in [TYPE_A, CLASS_IN] {
                answer.extend_from_slice(&word.to_be_bytes());
            }
            answer.extend_from_slice(&OWN_TTL.to_be_bytes());
            answer.extend_from_slice(&[0, 4]);
            answer.extend_from_slice(&address.octets());
        }
        answer
    }

    /// The name it asks about, in lower case and without a final dot; what is no letter, digit, `-` or `_` is written as
    /// a number, so that no label can hold a dot.
    pub(crate) fn name(&self) -> String {
        let mut name = String::new();
        for label in self.labels() {
            if !name.is_empty() {
                name.push('.');
            }
            for byte in label {
                match byte.to_ascii_lowercase() {
                    c @ (b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_') => name.push(c.into()),
                    c => name.push_str(&format!("\\{c:03}")),
                }
            }
        }
        name
    }

    fn labels(&self) -> impl Iterator<Item = &[u8]> {
        let mut at = HEADER_LEN;
        std::iter::from_fn(move || {
            let len = usize::from(*self.bytes.get(at)?);
            let label = self.bytes.get(at + 1..at + 1 + len).filter(|label| !label.is_empty());
            at += 1 + len;
            label
        })
    }

    /// The address a reverse lookup asks about.
    pub(crate) fn reverse(&self) -> Option<IpAddr> {
        let labels: Vec<&[u8]> = self.labels().collect();
        let (root, rest) = labels.split_last()?;
        let (zone, digits) = rest.split_last()?;
        if !root.eq_ignore_ascii_case(b"arpa") {
            return None;
        }
        let text = |label: &[u8]| std::str::from_utf8(label).ok().map(str::to_owned);
        if zone.eq_ignore_ascii_case(b"in-addr") && digits.len() == 4 {
            let number = |label: &&[u8]| text(label)?.parse::<u8>().ok();
            let octets: Option<Vec<u8>> = digits.iter().rev().map(number).collect();
            return Some(Ipv4Addr::from(<[u8; 4]>::try_from(octets?).ok()?).into());
        }
        if zone.eq_ignore_ascii_case(b"ip6")
            && digits.len() == 32
            && digits.iter().all(|label| label.len() == 1)
        {
            let digits: Option<String> = digits.iter().rev().map(|label| text(label)).collect();
            return Some(Ipv6Addr::from_bits(u128::from_str_radix(&digits?, 16).ok()?).into());
        }
        None
    }
}

/// Where the only question of a message ends; none when there is not exactly one.
fn question_end(bytes: &[u8]) -> Option<usize> {
    if bytes.get(4..6)? != [0, 1] {
        return None;
    }
    let mut at = HEADER_LEN;
    loop {
        let len = usize::from(*bytes.get(at)?);
        if len > 63 || at - HEADER_LEN > NAME_LEN_MAX {
            return None;
        }
        at += 1 + len;
        if len == 0 {
            break;
        }
    }
    (at + 4 <= bytes.len() && at - HEADER_LEN <= NAME_LEN_MAX).then_some(at + 4)
}

/// The outcome of an answer.
pub(crate) fn rcode(answer: &[u8]) -> u8 {
    answer.get(3).map_or(Rcode::ServerFailure as u8, |flags| flags & 0x0f)
}

/// An address in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) address: IpAddr,
    /// Seconds it may be kept.
    pub(crate) ttl: u32,
    /// Whether it is part of the answer itself and not of what is said besides.
    pub(crate) is_answer: bool,
}

/// The addresses all records of an answer name; none when it is malformed.
pub(crate) fn addresses(answer: &[u8]) -> Option<Vec<Found>> {
    let count = |at: usize| Some(u32::from(u16::from_be_bytes([*answer.get(at)?, *answer.get(at + 1)?])));
    let answers = count(6)?;
    let records = answers + count(8)? + count(10)?;
    let mut at = question_end(answer)?;
    let mut found = Vec::new();
    for index in 0..records {
        at = skip_name(answer, at)?;
        let fixed = answer.get(at..at + 10)?;
        let kind = u16::from_be_bytes([fixed[0], fixed[1]]);
        let ttl = u32::from_be_bytes([fixed[4], fixed[5], fixed[6], fixed[7]]);
        let len = usize::from(u16::from_be_bytes([fixed[8], fixed[9]]));
        at += 10;
        let data = answer.get(at..at + len)?;
        at += len;
        let address: IpAddr = match kind {
            TYPE_A => Ipv4Addr::from(<[u8; 4]>::try_from(data).ok()?).into(),
            TYPE_AAAA => Ipv6Addr::from(<[u8; 16]>::try_from(data).ok()?).into(),
            _ => continue,
        };
        found.push(Found { address, ttl, is_answer: index < answers });
    }
    Some(found)
}

fn skip_name(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 1),
            // A pointer is the end of a name.
            len if len & 0xc0 == 0xc0 => return Some(at + 2),
            len if len <= 63 => at += 1 + usize::from(len),
            _ => return None,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{Found, Parsed, Query, Rcode, addresses, parse, rcode};
    use proptest::prelude::*;
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    /// A query for the addresses of a name.
    pub(crate) fn query(name: &str, id: u16) -> Vec<u8> {
        let mut bytes = id.to_be_bytes().to_vec();
        bytes.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        for label in name.split('.') {
            bytes.push(label.len() as u8);
            bytes.extend_from_slice(label.as_bytes());
        }
        bytes.extend_from_slice(&[0, 0, 1, 0, 1]);
        bytes
    }

    /// An answer to such a query.
    pub(crate) fn answer(query: &[u8], addresses: &[Ipv4Addr]) -> Vec<u8> {
        let mut bytes = query.to_vec();
        bytes[2] |= 0x80;
        bytes[7] = addresses.len() as u8;
        for address in addresses {
            bytes.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            bytes.extend_from_slice(&address.octets());
        }
        bytes
    }

    fn parsed(bytes: &[u8]) -> Query {
        match parse(bytes) {
            Parsed::Query(query) => query,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn answers_are_matched_by_number_and_question() {
        let bytes = query("a.example", 7);
        let asked = parsed(&bytes);
        let good = answer(&bytes, &[Ipv4Addr::LOCALHOST]);
        assert!(asked.is_answered_by(&good, [0, 7]));
        assert!(!asked.is_answered_by(&good, [0, 8]));
        assert!(!asked.is_answered_by(&bytes, [0, 7]), "a question is no answer");
        assert!(!asked.is_answered_by(&answer(&query("b.example", 7), &[]), [0, 7]));
        let found = Found { address: Ipv4Addr::LOCALHOST.into(), ttl: 60, is_answer: true };
        assert_eq!(addresses(&good), Some(vec![found]));
    }

    #[test]
    fn failures_repeat_the_question() {
        let asked = parsed(&query("a.example", 7));
        let failure = asked.fail(Rcode::ServerFailure);
        assert!(asked.is_answered_by(&failure, [0, 7]));
        assert_eq!((rcode(&failure), addresses(&failure)), (2, Some(Vec::new())));
    }

    #[test]
    fn a_name_of_our_own_has_one_address_and_nothing_else() {
        let address = Ipv4Addr::new(10, 231, 128, 2);
        let bytes = query("web.vm", 7);
        let answer = parsed(&bytes).answer(address);
        assert!(parsed(&bytes).is_answered_by(&answer, [0, 7]));
        let found = Found { address: address.into(), ttl: 5, is_answer: true };
        assert_eq!((rcode(&answer), addresses(&answer)), (0, Some(vec![found])));
        let mut bytes = bytes;
        let at = bytes.len() - 3;
        bytes[at] = 28;
        let answer = parsed(&bytes).answer(address);
        assert_eq!((rcode(&answer), addresses(&answer)), (0, Some(Vec::new())));
    }

    #[test]
    fn what_is_no_query_is_refused_or_ignored() {
        assert_eq!(parse(b"short"), Parsed::Ignore);
        assert_eq!(parse(&answer(&query("a", 1), &[])), Parsed::Ignore);
        let mut two = query("a", 1);
        two[5] = 2;
        assert!(matches!(parse(&two), Parsed::Refuse(answer) if answer.len() == 12 && rcode(&answer) == 1));
        let long = query(&["a23456789"; 40].join("."), 1);
        assert!(matches!(parse(&long), Parsed::Refuse(_)));
    }

    #[test]
    fn reverse_names_are_read_backwards() {
        let address = |name: &str| parsed(&query(name, 1)).reverse();
        assert_eq!(address("4.3.2.10.IN-ADDR.arpa"), Some(IpAddr::V4(Ipv4Addr::new(10, 2, 3, 4))));
        let nibbles = format!("7.{}d.f.ip6.ARPA", "0.".repeat(29));
        assert_eq!(address(&nibbles), Some(IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 7))));
        for name in ["3.2.10.in-addr.arpa", "x.3.2.10.in-addr.arpa", "4.3.2.10.in-addr.example", "a"] {
            assert_eq!(address(name), None, "{name}");
        }
    }

    #[test]
    fn names_are_written_as_rules_have_them() {
        assert_eq!(parsed(&query("WWW.Example.com", 1)).name(), "www.example.com");
        // A label that has a dot in it is another name.
        let mut bytes = query("a.example", 1);
        bytes[12..15].copy_from_slice(b"\x02a.");
        bytes.splice(15..22, *b"\x07example");
        assert_eq!(parsed(&bytes).name(), "a\\046.example");
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_apart(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Parsed::Query(query) = parse(&bytes) {
                let _ = (query.reverse(), query.name());
                prop_assert!(query.is_answered_by(&query.fail(Rcode::NoSuchName), query.id()));
            }
            let _ = addresses(&bytes);
        }

        #[test]
        fn damaged_answers_are_taken_apart(at in 0usize..60, value: u8, cut in 0usize..60) {
            let mut bytes = answer(&query("name.example", 3), &[Ipv4Addr::LOCALHOST, Ipv4Addr::BROADCAST]);
            let len = bytes.len();
            bytes[at % len] = value;
            bytes.truncate(len - cut.min(len));
            let _ = addresses(&bytes);
            let _ = parse(&bytes);
        }
    }
}
