//! Validated names and ids. None of them can hold a path separator, a dot-dot or a NUL.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A label of at most 63 characters: it becomes a hostname and a DNS label.
const LABEL_LEN_MAX: usize = 63;
/// Images and kernels are directories; 128 leaves room for a staging suffix under the 255 of the filesystem.
const STORE_NAME_LEN_MAX: usize = 128;
/// Twelve hexadecimal digits: 48 bits, enough to be unique on one host and short enough to type.
const VM_ID_LEN: usize = 12;

/// Why a text is not a valid name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not a vm name.
    #[error(
        "`{text}` is not a valid vm name: use 1 to 63 lower-case letters, digits and hyphens, \
         starting and ending with a letter or digit"
    )]
    Vm {
        /// What was given, made printable.
        text: String,
    },
    /// Not the name of a network.
    #[error(
        "`{text}` is not a valid network name: use 1 to 63 lower-case letters, digits and hyphens, \
         starting and ending with a letter or digit"
    )]
    Network {
        /// What was given, made printable.
        text: String,
    },
    /// Not a vm id.
    #[error("`{text}` is not a vm id: an id is {VM_ID_LEN} hexadecimal digits")]
    Id {
        /// What was given, made printable.
        text: String,
    },
    /// Not a store name.
    #[error(
        "`{text}` is not a valid {what} name: use 1 to {STORE_NAME_LEN_MAX} lower-case letters, digits, \
         `.`, `_` and `-`, starting with a letter or digit"
    )]
    Store {
        /// `image`, `kernel` or `cache`.
        what: &'static str,
        /// What was given, made printable.
        text: String,
    },
}

fn printable(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_debug).collect()
}

fn alphanumeric(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

fn is_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else { return false };
    bytes.len() <= LABEL_LEN_MAX
        && alphanumeric(first)
        && alphanumeric(last)
        && bytes.iter().all(|&b| alphanumeric(b) || b == b'-')
}

fn is_store_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.first().is_some_and(|&b| alphanumeric(b))
        && bytes.len() <= STORE_NAME_LEN_MAX
        && bytes.iter().all(|&b| alphanumeric(b) || matches!(b, b'.' | b'_' | b'-'))
}

macro_rules! text_type {
    ($(#[$doc:meta])* $name:ident, $valid:expr, $error:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Returns the text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                let valid: fn(&str) -> bool = $valid;
                let error: fn(String) -> NameError = $error;
                if valid(text) { Ok(Self(text.to_owned())) } else { Err(error(printable(text))) }
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text_type!(
    /// The name of a vm: a DNS label, never normalised.
    VmName,
    is_label,
    |text| NameError::Vm { text }
);
text_type!(
    /// The name of a network of vms.
    NetworkName,
    is_label,
    |text| NameError::Network { text }
);
text_type!(
    /// The id of a vm: twelve lower-case hexadecimal digits.
    VmId,
    |text| text.len() == VM_ID_LEN && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')),
    |text| NameError::Id { text }
);
text_type!(
    /// The name of an image in the store, also its directory.
    ImageName,
    is_store_name,
    |text| NameError::Store { what: "image", text }
);
text_type!(
    /// The name of a cache, also its directory.
    CacheName,
    is_store_name,
    |text| NameError::Store { what: "cache", text }
);
text_type!(
    /// The name of a kernel in the store, also its directory.
    KernelName,
    is_store_name,
    |text| NameError::Store { what: "kernel", text }
);

impl VmId {
    /// Returns the id made of the given 48 random bits (the upper 16 are ignored).
    #[must_use]
    pub fn from_bits(bits: u64) -> Self {
        Self(format!("{:012x}", bits & 0xffff_ffff_ffff))
    }
}

#[cfg(test)]
mod tests {
    use super::{ImageName, VmId, VmName};
    use proptest::prelude::*;

    #[test]
    fn vm_names() {
        for good in ["a", "0", "web", "a-b", "a--b", &"x".repeat(63)] {
            assert!(good.parse::<VmName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", "a b", "../x", "ü", "a\0", &"x".repeat(64)] {
            assert!(bad.parse::<VmName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_invalid_name_is_named_and_escaped() {
        let error = "a\u{1b}[31m".parse::<VmName>().unwrap_err().to_string();
        assert!(error.contains("a\\u{1b}[31m"), "{error}");
    }

    #[test]
    fn ids_are_twelve_digits() {
        assert_eq!(VmId::from_bits(0xfff_0000_0000_00ab).as_str(), "0000000000ab");
        assert!("0000000000aB".parse::<VmId>().is_err());
    }

    proptest! {
        #[test]
        fn no_name_can_leave_its_directory(text in ".*") {
            if let Ok(name) = text.parse::<ImageName>() {
                prop_assert!(!name.as_str().contains('/') && !name.as_str().starts_with('.'));
            }
        }
    }
}
