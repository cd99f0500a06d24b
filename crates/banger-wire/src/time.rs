//! Spans of time as people write them.

use serde::{Deserialize, Serialize};
use std::str::FromStr;
use std::time::Duration;

/// Parses a span of time: a number with `ms`, `s`, `m`, `h` or `d`; a plain number is seconds.
///
/// # Errors
/// When the text is something else, is zero, or is too long to count; a sentence for a person.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let bad = || {
        let shown: String = text.chars().take(40).flat_map(char::escape_debug).collect();
        format!("`{shown}` is not a time: use a number with s, m or h, such as `30s` or `5m`")
    };
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| bad())?;
    let factor: u64 = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(bad()),
    };
    match number.checked_mul(factor) {
        None => Err(bad()),
        Some(0) => Err("a time of zero leaves nothing to run in".to_owned()),
        Some(ms) => Ok(Duration::from_millis(ms)),
    }
}

/// Returns whole milliseconds; what is too long to count is as long as can be counted.
#[must_use]
pub fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// How long a vm runs without a session. Text form: `30m`, or `never`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AutoStop {
    /// Until somebody stops it.
    Never,
    /// So many milliseconds.
    AfterMs(u64),
}

impl AutoStop {
    /// Returns the time, if there is one.
    #[must_use]
    pub fn after(self) -> Option<Duration> {
        match self {
            Self::Never => None,
            Self::AfterMs(ms) => Some(Duration::from_millis(ms)),
        }
    }
}

impl FromStr for AutoStop {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "never" {
            return Ok(Self::Never);
        }
        let time = parse_duration(text).map_err(|error| format!("{error}, or `never`"))?;
        Ok(Self::AfterMs(millis(time)))
    }
}

#[cfg(test)]
mod tests {
    use super::{AutoStop, parse_duration};
    use std::time::Duration;

    #[test]
    fn times_are_parsed() {
        for (text, ms) in [("30s", 30_000), ("5m", 300_000), ("7", 7000), ("250ms", 250), ("2h", 7_200_000)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for bad in ["", "0", "-1", "1.5s", "s", "5 m", "99999999999999999999", "18446744073709551615d"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn never_is_a_time_to_stop_by_itself() {
        assert_eq!("never".parse(), Ok(AutoStop::Never));
        assert_eq!("30m".parse::<AutoStop>().unwrap().after(), Some(Duration::from_secs(1800)));
        assert!("0".parse::<AutoStop>().is_err() && "no".parse::<AutoStop>().is_err());
    }
}
