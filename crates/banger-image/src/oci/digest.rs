//! Digests: what content is called, and the only names that become file names.

use std::fmt;
use std::io::{self, Read};
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::hash::{Algorithm, Hasher};

const BUFFER_LEN: usize = 256 << 10;

/// The text is no digest.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{}` is not a digest: `sha256:` and 64 lower-case hex digits, or `sha512:` and 128",
    .0.escape_debug()
)]
pub struct DigestError(String);

/// A sha256 or sha512 digest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest {
    algorithm: Algorithm,
    hex: String,
}

impl Digest {
    /// Computes the sha256 of bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self::of_as(Algorithm::Sha256, bytes)
    }

    /// Computes the digest of bytes that is comparable with another.
    pub(crate) fn of_as(algorithm: Algorithm, bytes: &[u8]) -> Self {
        let mut hash = Hasher::new(algorithm);
        hash.update(bytes);
        hash.into()
    }

    /// Computes the sha256 of a file's content.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        Self::of_reader(Algorithm::Sha256, &mut std::fs::File::open(path)?)
    }

    /// Tells whether this is the digest of a file's content.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn is_of_file(&self, path: &Path) -> io::Result<bool> {
        Ok(Self::of_reader(self.algorithm, &mut std::fs::File::open(path)?)? == *self)
    }

    /// Computes the digest of the rest of a reader.
    pub(crate) fn of_reader(algorithm: Algorithm, reader: &mut dyn Read) -> io::Result<Self> {
        let (mut hash, mut buffer) = (Hasher::new(algorithm), vec![0; BUFFER_LEN]);
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return Ok(hash.into()),
                Ok(count) => hash.update(&buffer[..count]),
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
            }
        }
    }

    /// Returns what it was computed with.
    pub(crate) fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Returns the digits after the colon.
    pub fn hex(&self) -> &str {
        &self.hex
    }
}

impl From<Hasher> for Digest {
    fn from(hash: Hasher) -> Self {
        Self { algorithm: hash.algorithm(), hex: hash.finish() }
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        let parse = |algorithm: Algorithm| {
            let hex = text.strip_prefix(algorithm.name())?.strip_prefix(':')?;
            (hex.len() == algorithm.digits() && hex.bytes().all(digit))
                .then(|| Self { algorithm, hex: hex.to_owned() })
        };
        let found = Algorithm::ALL.into_iter().find_map(parse);
        found.ok_or_else(|| DigestError(text.chars().take(200).collect()))
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
        write!(f, "{}:{}", self.algorithm.name(), self.hex)
    }
}
