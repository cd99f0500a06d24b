//! Debian version numbers: validation and the order of deb-version(7).
//!
//! The order is not lexical and not semantic versioning: a tilde sorts before the end of the string, letters before
//! everything else, digit runs by value. All of it is one comparison function; nothing here knows about packages.

use std::cmp::Ordering;
use std::fmt;

use thiserror::Error;

/// The longest version accepted; the archive's longest is below 60 characters.
const VERSION_MAX: usize = 256;

/// A version such as `1:2.3~rc1-4+deb12u1`.
#[derive(Debug, Clone)]
pub struct Version {
    text: String,
    epoch: u32,
    /// Where the upstream part starts in `text`.
    upstream: usize,
    /// Where the upstream part ends in `text`: at the last hyphen, or at the end.
    upstream_end: usize,
}

/// A text is not a version number.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{}` is not a Debian version: {reason}", .text.escape_debug())]
pub struct ParseVersionError {
    text: String,
    reason: &'static str,
}

impl Version {
    /// Parses a version number.
    pub fn parse(text: &str) -> Result<Self, ParseVersionError> {
        let err = |reason| ParseVersionError { text: text.chars().take(VERSION_MAX).collect(), reason };
        if text.len() > VERSION_MAX {
            return Err(err("it is too long"));
        }
        let (epoch, upstream) = match text.split_once(':') {
            Some((epoch, _)) => {
                if epoch.is_empty() || !epoch.bytes().all(|b| b.is_ascii_digit()) {
                    return Err(err("the epoch is not a number"));
                }
                (epoch.parse().map_err(|_| err("the epoch is too large"))?, epoch.len() + 1)
            }
            None => (0, 0),
        };
        let upstream_end = text.rfind('-').filter(|at| *at >= upstream).unwrap_or(text.len());
        let version = Self { text: text.to_owned(), epoch, upstream, upstream_end };
        if version.upstream().is_empty() {
            return Err(err("the upstream version is empty"));
        }
        if !version.upstream().starts_with(|c: char| c.is_ascii_digit()) {
            return Err(err("the upstream version doesn't start with a digit"));
        }
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'+' | b'~');
        if !version.upstream().bytes().all(|b| plain(b) || matches!(b, b'-' | b':')) {
            return Err(err("the upstream version has a character that is not allowed"));
        }
        if upstream_end < text.len() && version.revision().is_empty() {
            return Err(err("the revision is empty"));
        }
        if !version.revision().bytes().all(plain) {
            return Err(err("the revision has a character that is not allowed"));
        }
        Ok(version)
    }

    /// Returns the version as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    fn upstream(&self) -> &str {
        &self.text[self.upstream..self.upstream_end]
    }

    fn revision(&self) -> &str {
        self.text.get(self.upstream_end + 1..).unwrap_or("")
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Ord for Version {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.epoch.cmp(&other.epoch))
            .then_with(|| compare_part(self.upstream().as_bytes(), other.upstream().as_bytes()))
            .then_with(|| compare_part(self.revision().as_bytes(), other.revision().as_bytes()))
    }
}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Equality is that of the order: `1.0` and `1.0-0` and `0:1.0` are one version.
impl PartialEq for Version {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Version {}

/// The weight of the character at the head of a non-digit run; the end and a digit weigh the same, a tilde less.
fn weight(byte: Option<u8>) -> i32 {
    match byte {
        None => 0,
        Some(b) if b.is_ascii_digit() => 0,
        Some(b'~') => -1,
        Some(b) if b.is_ascii_alphabetic() => i32::from(b),
        Some(b) => i32::from(b) + 256,
    }
}

fn compare_part(mut a: &[u8], mut b: &[u8]) -> Ordering {
    loop {
        let head = |s: &[u8]| s.first().is_some_and(|c| !c.is_ascii_digit());
        while head(a) || head(b) {
            let order = weight(a.first().copied()).cmp(&weight(b.first().copied()));
            if order != Ordering::Equal {
                return order;
            }
            a = a.get(1..).unwrap_or(&[]);
            b = b.get(1..).unwrap_or(&[]);
        }
        if a.is_empty() && b.is_empty() {
            return Ordering::Equal;
        }
        let (left, right);
        (left, a) = take_number(a);
        (right, b) = take_number(b);
        // Without leading zeroes the longer run of digits is the greater number, whatever its size.
        let order = left.len().cmp(&right.len()).then_with(|| left.cmp(right));
        if order != Ordering::Equal {
            return order;
        }
    }
}

/// Splits the digits at the head off, without their leading zeroes.
fn take_number(s: &[u8]) -> (&[u8], &[u8]) {
    let end = s.iter().position(|b| !b.is_ascii_digit()).unwrap_or(s.len());
    let start = s.iter().position(|b| *b != b'0').unwrap_or(s.len()).min(end);
    (&s[start..end], &s[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(a: &str, b: &str, expected: Ordering) {
        let (left, right) = (Version::parse(a).unwrap(), Version::parse(b).unwrap());
        assert_eq!(left.cmp(&right), expected, "{a} against {b}");
        assert_eq!(right.cmp(&left), expected.reverse(), "{b} against {a}");
    }

    #[test]
    fn order_follows_deb_version_7() {
        // The manual's own example, each with a digit in front: ~~, ~~a, ~, the empty part, a.
        let sorted = ["1~~", "1~~a", "1~", "1", "1a"];
        for pair in sorted.windows(2) {
            check(pair[0], pair[1], Ordering::Less);
        }
        let sorted =
            ["1.0~beta1~svn1245", "1.0~beta1", "1.0", "1.0-0.1", "1.0-1", "1.0+b1-1", "1.1", "1.10", "2:0.1"];
        for pair in sorted.windows(2) {
            check(pair[0], pair[1], Ordering::Less);
        }
    }

    #[test]
    fn absent_revision_and_epoch_are_zero() {
        check("1.0", "1.0-0", Ordering::Equal);
        check("1.0", "0:1.0", Ordering::Equal);
        check("1.00", "1.0", Ordering::Equal);
        check("1.0", "1.0-0+b1", Ordering::Less);
    }

    #[test]
    fn letters_sort_before_other_characters() {
        check("1a", "1+", Ordering::Less);
        check("1.0a-1", "1.0.1-1", Ordering::Less);
        check("1.2.3", "1.2-a3", Ordering::Greater);
        check("7.6p2-4", "7.6-0", Ordering::Greater);
        check("1.0.3-3", "1.0-1", Ordering::Greater);
        check("1.3", "1.2.2-2", Ordering::Greater);
        check("0:10", "0:9", Ordering::Greater);
    }

    #[test]
    fn archive_versions() {
        check("6.12.117-1~deb12u1", "6.12.117-1", Ordering::Less);
        check("6.12.107-1~deb12u1", "6.12.17-1~deb12u1", Ordering::Greater);
        check("252.39-1~deb12u1", "252.39-1~deb12u2", Ordering::Less);
        check("1:9.2p1-2+deb12u7", "1:9.2p1-2", Ordering::Greater);
        check("20.10.24+dfsg1-1+deb12u1+b2", "20.10.24+dfsg1-1+deb12u1", Ordering::Greater);
    }

    #[test]
    fn numbers_of_any_length() {
        let long = format!("1.{}", "9".repeat(200));
        check(&long, "1.99999999999999999999999999", Ordering::Greater);
    }

    #[test]
    fn refuses_what_is_no_version() {
        for text in
            ["", ":1", "a:1", "1:", "-1", "1-", "1 2", "1/2", "1_2", "x1", "99999999999:1", "1-2:3", "1\n"]
        {
            assert!(Version::parse(text).is_err(), "{text:?}");
        }
        assert!(Version::parse(&"1".repeat(VERSION_MAX + 1)).is_err());
    }
}
