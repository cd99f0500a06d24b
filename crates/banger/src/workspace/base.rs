//! What was placed, as it was: what a later export compares with. In `workspaces/ID/` beside the record.

use super::objects::Format;
use crate::stop::failed;
use banger_wire::bytes::ByteString;
use banger_wire::error::WireError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Name of the list.
pub(crate) const LIST: &str = "base.json";
/// Name of the repository with the contents that no repository of the owner's has.
pub(crate) const REPOSITORY: &str = "base.git";

/// Everything that was placed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Base {
    /// True when names of objects are SHA-256.
    pub(crate) sha256: bool,
    /// Tops of the owner's repositories whose objects are counted on.
    pub(crate) repositories: Vec<ByteString>,
    /// The commit that the guest's branch began at; none before the first one.
    pub(crate) commit: Option<String>,
    pub(crate) files: BTreeMap<ByteString, BaseFile>,
}

/// A file or link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BaseFile {
    pub(crate) kind: FileKind,
    /// Name of its content as a git object.
    pub(crate) object: String,
    pub(crate) len: u64,
    /// What the guest said when it had it: permission bits, and time of last change.
    pub(crate) seen: Option<(u32, i64)>,
}

/// What git tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FileKind {
    Plain,
    Executable,
    Link,
}

impl FileKind {
    /// A regular file with these permission bits.
    pub(crate) fn of_mode(mode: u32) -> Self {
        if mode & 0o100 != 0 { Self::Executable } else { Self::Plain }
    }

    /// The mode in a tree.
    pub(crate) fn git_mode(self) -> &'static str {
        match self {
            Self::Plain => "100644",
            Self::Executable => "100755",
            Self::Link => "120000",
        }
    }
}

impl Base {
    pub(crate) fn format(&self) -> Format {
        if self.sha256 { Format::Sha256 } else { Format::Sha1 }
    }

    /// Reads the list; none where nothing was placed.
    ///
    /// # Errors
    /// When it is damaged.
    pub(crate) fn load(dir: &Path) -> Result<Option<Self>, WireError> {
        let path = dir.join(LIST);
        let unreadable = |error: &(dyn std::error::Error + 'static)| {
            failed(format!("could not read `{}`", path.display()), error)
        };
        match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            read => {
                let bytes = read.map_err(|error| unreadable(&error))?;
                serde_json::from_slice::<List>(&bytes)
                    .map(|list| Some(list.into()))
                    .map_err(|e| unreadable(&e))
            }
        }
    }

    /// Returns the list as it is stored.
    pub(crate) fn to_json(&self) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(&List::from(self.clone()))
    }
}

/// How it is stored: a name that is not UTF-8 can't be a key in JSON.
#[derive(Serialize, Deserialize)]
struct List {
    sha256: bool,
    repositories: Vec<ByteString>,
    #[serde(default)]
    commit: Option<String>,
    files: Vec<(ByteString, BaseFile)>,
}

impl From<Base> for List {
    fn from(base: Base) -> Self {
        let Base { sha256, repositories, commit, files } = base;
        Self { sha256, repositories, commit, files: files.into_iter().collect() }
    }
}

impl From<List> for Base {
    fn from(list: List) -> Self {
        let List { sha256, repositories, commit, files } = list;
        Self { sha256, repositories, commit, files: files.into_iter().collect() }
    }
}
