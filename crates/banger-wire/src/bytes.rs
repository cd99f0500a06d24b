//! Bytes that are usually text: arguments, environment, paths.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

/// A byte string that travels as JSON text when it is UTF-8 and as `{"base64": …}` when it is not.
///
/// Unix arguments and file names are bytes; this keeps them exact and messages readable.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteString(pub Vec<u8>);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Form {
    Text(String),
    Encoded { base64: String },
}

impl Serialize for ByteString {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(&self.0) {
            Ok(text) => serializer.serialize_str(text),
            Err(_) => Form::Encoded { base64: STANDARD.encode(&self.0) }.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for ByteString {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Form::deserialize(deserializer)? {
            Form::Text(text) => Ok(Self(text.into_bytes())),
            Form::Encoded { base64 } => STANDARD.decode(base64).map(Self).map_err(serde::de::Error::custom),
        }
    }
}

impl From<OsString> for ByteString {
    fn from(value: OsString) -> Self {
        Self(value.into_vec())
    }
}

impl From<&str> for ByteString {
    fn from(value: &str) -> Self {
        Self(value.as_bytes().to_vec())
    }
}

impl From<String> for ByteString {
    fn from(value: String) -> Self {
        Self(value.into_bytes())
    }
}

impl ByteString {
    /// Returns the bytes as the operating system's string type.
    #[must_use]
    pub fn as_os_str(&self) -> &OsStr {
        OsStr::from_bytes(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::ByteString;

    #[test]
    fn bytes_survive_json() {
        for bytes in [&b""[..], b"plain", b"it's \"quoted\"\n", b"\xff\xfe\x00x", "grüße".as_bytes()] {
            let there = serde_json::to_string(&ByteString(bytes.to_vec())).unwrap();
            let back: ByteString = serde_json::from_str(&there).unwrap();
            assert_eq!(back.0, bytes, "{there}");
        }
    }
}
