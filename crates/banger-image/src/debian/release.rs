//! Release files: what a suite's signed index of indexes says, and when it is refused.
//!
//! A good signature is not enough: the archive signs many suites, and signed them yesterday too. So the file must be of
//! Debian, of the suite asked for, not expired, and not older than the last one accepted on this machine.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use thiserror::Error;

use super::control::Paragraph;

/// The `Origin` a Release file must state.
pub const ORIGIN: &str = "Debian";

/// Why a signed Release file was refused.
#[derive(Debug, Error)]
pub enum ReleaseError {
    /// A field is missing or can't be read.
    #[error("the Release file of `{suite}` has no valid `{field}`")]
    Field {
        /// The suite asked for.
        suite: String,
        /// The field.
        field: &'static str,
    },
    /// It is signed, but of something else.
    #[error("the Release file of `{suite}` says `{field}: {}`, expected `{expected}`", .found.escape_debug())]
    Mismatch {
        /// The suite asked for.
        suite: String,
        /// The field.
        field: &'static str,
        /// What it says.
        found: String,
        /// What it must say.
        expected: String,
    },
    /// It says itself that it must no longer be used.
    #[error(
        "the Release file of `{suite}` expired on {until}; the mirror is stale, or somebody replays an old one"
    )]
    Expired {
        /// The suite asked for.
        suite: String,
        /// The date in the file.
        until: String,
    },
    /// A newer one was accepted before.
    #[error("the Release file of `{suite}` is of {found}, older than the one of {accepted} accepted before")]
    Rollback {
        /// The suite asked for.
        suite: String,
        /// The date in the file.
        found: String,
        /// The date of the newest one accepted.
        accepted: String,
    },
    /// The record of accepted dates can't be read or written.
    #[error("could not update the record of accepted Release files for `{suite}`")]
    State {
        /// The suite.
        suite: String,
        /// Why not.
        source: io::Error,
    },
}

/// Name, size and digest of a file listed in a Release file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedFile {
    /// Lower-case hex.
    pub sha256: String,
    /// In bytes.
    pub size: u64,
}

/// A Release file that passed all checks.
#[derive(Debug, Clone)]
pub struct Release {
    date: String,
    files: HashMap<String, ListedFile>,
}

/// What a Release file is checked against.
#[derive(Debug, Clone, Copy)]
pub struct Expect<'a> {
    /// The codename of the suite, such as `bookworm-security`.
    pub suite: &'a str,
    /// Seconds since 1970.
    pub now: i64,
    /// False for a mirror frozen on purpose.
    pub check_valid_until: bool,
}

impl Release {
    /// Reads the signed text of a Release file and checks that it is what was asked for.
    pub fn parse(text: &str, expect: &Expect<'_>) -> Result<Self, ReleaseError> {
        let suite = || expect.suite.to_owned();
        let fields = Paragraph::parse(text);
        for (field, expected) in [("Origin", ORIGIN), ("Codename", expect.suite)] {
            let found = fields.get(field).ok_or(ReleaseError::Field { suite: suite(), field })?;
            if found != expected {
                let (found, expected) = (found.to_owned(), expected.to_owned());
                return Err(ReleaseError::Mismatch { suite: suite(), field, found, expected });
            }
        }
        let date = fields.get("Date").unwrap_or("");
        parse_date(date).ok_or(ReleaseError::Field { suite: suite(), field: "Date" })?;
        if let Some(until) = fields.get("Valid-Until") {
            let limit =
                parse_date(until).ok_or(ReleaseError::Field { suite: suite(), field: "Valid-Until" })?;
            if limit < expect.now && expect.check_valid_until {
                return Err(ReleaseError::Expired { suite: suite(), until: until.to_owned() });
            }
        }
        let listed = fields.get("SHA256").ok_or(ReleaseError::Field { suite: suite(), field: "SHA256" })?;
        let files = listed.lines().filter_map(parse_listed).collect();
        Ok(Self { date: date.to_owned(), files })
    }

    /// Returns what the Release file says of `path`, relative to the suite's directory.
    pub fn file(&self, path: &str) -> Option<&ListedFile> {
        self.files.get(path)
    }

    /// Refuses the file when a newer one of this suite was accepted before, else records it as the newest.
    ///
    /// The record is one small file a suite below `state_dir`, replaced by rename.
    pub fn accept(&self, suite: &str, state_dir: &Path) -> Result<(), ReleaseError> {
        let state = |source| ReleaseError::State { suite: suite.to_owned(), source };
        let path = state_dir.join(format!("release-{suite}"));
        let accepted = match fs::read_to_string(&path) {
            Ok(text) => text.trim().to_owned(),
            Err(err) if err.kind() == io::ErrorKind::NotFound => String::new(),
            Err(err) => return Err(state(err)),
        };
        // An unreadable record must not lock the user out: it protects nothing any more.
        match (parse_date(&self.date), parse_date(&accepted)) {
            (Some(found), Some(last)) if found < last => {
                let (suite, found) = (suite.to_owned(), self.date.clone());
                return Err(ReleaseError::Rollback { suite, found, accepted });
            }
            (Some(found), Some(last)) if found == last => return Ok(()),
            _ => {}
        }
        fs::create_dir_all(state_dir).map_err(state)?;
        let mut file = tempfile::NamedTempFile::new_in(state_dir).map_err(state)?;
        file.write_all(self.date.as_bytes()).map_err(state)?;
        file.as_file().sync_all().map_err(state)?;
        file.persist(&path).map_err(|err| state(err.error))?;
        Ok(())
    }
}

fn parse_listed(line: &str) -> Option<(String, ListedFile)> {
    let mut words = line.split_whitespace();
    let (sha256, size, path) = (words.next()?, words.next()?, words.next()?);
    let file = ListedFile { sha256: parse_sha256(sha256)?, size: size.parse().ok()? };
    Some((path.to_owned(), file))
}

/// Accepts 64 hex digits and returns them in lower case.
pub fn parse_sha256(text: &str) -> Option<String> {
    (text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit())).then(|| text.to_ascii_lowercase())
}

/// Parses `Sat, 11 Jul 2026 10:16:37 UTC` to seconds since 1970; Release files use no other zone.
pub fn parse_date(text: &str) -> Option<i64> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let rest = text.split_once(", ").map_or(text, |(_, rest)| rest);
    let words: Vec<&str> = rest.split_whitespace().collect();
    let [day, month, year, time, zone] = words.as_slice() else { return None };
    if !["UTC", "GMT", "+0000", "Z"].contains(zone) {
        return None;
    }
    let number = |text: &str, max: i64| text.parse::<u32>().ok().map(i64::from).filter(|n| *n <= max);
    let month = MONTHS.iter().position(|name| name == month)? as i64 + 1;
    let (day, year) = (number(day, 31)?, number(year, 9999)?);
    let mut clock = time.split(':');
    let (h, m, s) = (number(clock.next()?, 23)?, number(clock.next()?, 59)?, number(clock.next()?, 60)?);
    // Days since 1970 in the proleptic Gregorian calendar, the year starting in March.
    let y = if month <= 2 { year - 1 } else { year };
    let era = y.div_euclid(400);
    let yoe = y.rem_euclid(400);
    let doy = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let doe = yoe * 365 + yoe / 4 - yoe / 100 + doy;
    let days = era * 146_097 + doe - 719_468;
    Some(((days * 24 + h) * 60 + m) * 60 + s)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_795_000_000;

    fn text(change: impl Fn(&str) -> String) -> String {
        change(&format!(
            "Origin: Debian\nSuite: oldstable\nCodename: bookworm\nDate: Sat, 11 Jul 2026 10:16:37 UTC\n\
             Valid-Until: Sat, 28 Nov 2026 00:53:02 UTC\nMD5Sum:\n 00 1 main/x\nSHA256:\n {} 12 main/x\n junk\n",
            "ab".repeat(32)
        ))
    }

    fn parse(text: &str, suite: &str) -> Result<Release, ReleaseError> {
        Release::parse(text, &Expect { suite, now: NOW, check_valid_until: true })
    }

    #[test]
    fn dates() {
        assert_eq!(parse_date("Thu, 01 Jan 1970 00:00:00 UTC"), Some(0));
        assert_eq!(parse_date("Sat, 11 Jul 2026 10:16:37 UTC"), Some(1_783_764_997));
        assert_eq!(parse_date("Thu, 29 Feb 2024 23:59:59 UTC"), Some(1_709_251_199));
        for bad in [
            "",
            "yesterday",
            "Sat, 11 Jul 2026 10:16:37 +0200",
            "Sat, 11 Xxx 2026 10:16:37 UTC",
            "1 Jan 99999999999 0:0:0 UTC",
        ] {
            assert_eq!(parse_date(bad), None, "{bad}");
        }
    }

    #[test]
    fn accepts_what_was_asked_for() {
        let release = parse(&text(str::to_owned), "bookworm").unwrap();
        assert_eq!(release.file("main/x").unwrap().size, 12);
        assert_eq!(release.file("main/y"), None);
    }

    #[test]
    fn refuses_another_origin_or_suite() {
        let vendor = text(|t| t.replace("Origin: Debian", "Origin: Vendor"));
        assert!(matches!(parse(&vendor, "bookworm"), Err(ReleaseError::Mismatch { field: "Origin", .. })));
        let plain = text(str::to_owned);
        assert!(matches!(
            parse(&plain, "bookworm-security"),
            Err(ReleaseError::Mismatch { field: "Codename", .. })
        ));
        let nothing = text(|t| t.replace("Origin: Debian\n", ""));
        assert!(matches!(parse(&nothing, "bookworm"), Err(ReleaseError::Field { field: "Origin", .. })));
    }

    #[test]
    fn refuses_an_expired_file_unless_told_not_to() {
        let old = text(|t| t.replace("28 Nov 2026", "28 Nov 2025"));
        assert!(matches!(parse(&old, "bookworm"), Err(ReleaseError::Expired { .. })));
        assert!(
            Release::parse(&old, &Expect { suite: "bookworm", now: NOW, check_valid_until: false }).is_ok()
        );
        let broken = text(|t| t.replace("28 Nov 2026", "someday"));
        assert!(matches!(parse(&broken, "bookworm"), Err(ReleaseError::Field { field: "Valid-Until", .. })));
    }

    #[test]
    fn refuses_a_rollback() {
        let dir = tempfile::tempdir().unwrap();
        let new = parse(&text(str::to_owned), "bookworm").unwrap();
        let old = parse(&text(|t| t.replace("11 Jul", "10 Jul")), "bookworm").unwrap();
        old.accept("bookworm", dir.path()).unwrap();
        new.accept("bookworm", dir.path()).unwrap();
        new.accept("bookworm", dir.path()).unwrap();
        let err = old.accept("bookworm", dir.path()).unwrap_err();
        assert!(matches!(err, ReleaseError::Rollback { .. }), "{err}");
        old.accept("bookworm-updates", dir.path()).unwrap();
    }
}
