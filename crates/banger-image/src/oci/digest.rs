//! Digests: what content is called, and the only names that become file names.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::partial::hex;

/// The text is no digest.
#[derive(Debug, thiserror::Error)]
#[error("`{}` is not a digest of the form `sha256:` and 64 lower-case hex digits", .0.escape_debug())]
pub struct DigestError(String);

/// A sha256 digest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// Computes the digest of bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(hex(Sha256::digest(bytes)))
    }

    /// Computes the digest of a file's content.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn of_file(path: &std::path::Path) -> std::io::Result<Self> {
        crate::partial::hash_file(&mut std::fs::File::open(path)?).map(Self)
    }

    /// Takes the result of a computation.
    pub(crate) fn from_hash(hash: Sha256) -> Self {
        Self(hex(hash.finalize()))
    }

    /// Returns the 64 digits.
    pub fn hex(&self) -> &str {
        &self.0
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        match text.strip_prefix("sha256:") {
            Some(hex) if hex.len() == 64 && hex.bytes().all(digit) => Ok(Self(hex.to_owned())),
            _ => Err(DigestError(text.chars().take(200).collect())),
        }
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, DigestError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}
