//! Sizes of memory and disks.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A size in whole MiB. Text form: `2G`, `512M`, `4GiB`; a plain number is MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Mebibytes(pub u64);

/// A text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a size: use a number with M, G or T, such as `512M` or `2G` (a plain number is MiB)"
)]
pub struct SizeError {
    /// What was given, made printable.
    pub text: String,
}

impl Mebibytes {
    /// Returns the size in bytes, saturating.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.0.saturating_mul(1 << 20)
    }
}

impl FromStr for Mebibytes {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let error = || SizeError { text: text.chars().take(40).flat_map(char::escape_debug).collect() };
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| error())?;
        let factor: u64 = match unit.to_ascii_lowercase().as_str() {
            "" | "m" | "mb" | "mib" => 1,
            "g" | "gb" | "gib" => 1 << 10,
            "t" | "tb" | "tib" => 1 << 20,
            _ => return Err(error()),
        };
        number.checked_mul(factor).map(Self).ok_or_else(error)
    }
}

impl fmt::Display for Mebibytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 >= 1024 && self.0.is_multiple_of(1024) {
            write!(f, "{} GiB", self.0 / 1024)
        } else {
            write!(f, "{} MiB", self.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Mebibytes;

    #[test]
    fn sizes() {
        for (text, mib) in
            [("512", 512), ("512M", 512), ("2G", 2048), ("4GiB", 4096), ("1t", 1 << 20), ("0", 0)]
        {
            assert_eq!(text.parse(), Ok(Mebibytes(mib)), "{text}");
        }
        for bad in ["", "G", "-1", "1.5G", "1K", "1 G", "99999999999999999999", "18446744073709551615T"] {
            assert!(bad.parse::<Mebibytes>().is_err(), "{bad}");
        }
        assert_eq!(Mebibytes(2048).to_string(), "2 GiB");
        assert_eq!(Mebibytes(2000).to_string(), "2000 MiB");
    }
}
