//! An ssh connection to a guest.

use crate::bytes::ByteString;
use serde::{Deserialize, Serialize};

/// Length of an Ed25519 public key, and of the seed a private one is made of.
pub const KEY_LEN: usize = 32;

/// Who the server is, and who may come in. The guest keeps neither.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshSpec {
    /// The seed of the host key (Ed25519), [`KEY_LEN`] bytes.
    pub host_key: ByteString,
    /// The one public key (Ed25519) that is let in, [`KEY_LEN`] bytes.
    pub client_key: ByteString,
}
