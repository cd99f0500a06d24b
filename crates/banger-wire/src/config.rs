//! The owner's settings, a checkout's own, and caches, as they cross a connection.

use crate::names::CacheName;
use serde::{Deserialize, Serialize};

/// A cache and where it is mounted in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheMount {
    /// The cache.
    pub name: CacheName,
    /// The directory in the guest.
    pub path: String,
}

/// A `.banger.toml` as it is in a checkout. Whoever wrote it is not trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProjectFile {
    /// What it is called in messages.
    pub path: String,
    /// Its content.
    pub text: String,
}

impl ProjectFile {
    /// Its name in a checkout.
    pub const NAME: &'static str = ".banger.toml";
    /// Longest one that is read: it has five keys.
    pub const LEN_MAX: u64 = 16 * 1024;
}

/// The config in force; also the shape of `--json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigView {
    /// The file, whether there is one or not; none without a home.
    pub path: Option<String>,
    /// Whether there is one.
    pub exists: bool,
    /// Every value.
    pub values: Vec<ConfigValue>,
}

/// One value of the config.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigValue {
    /// Its key, such as `vm_defaults.memory`.
    pub key: String,
    /// The value; null for one that is not set and has no default.
    pub value: serde_json::Value,
    /// Where it comes from.
    pub source: ConfigSource,
    /// The line of the file, where that is the source.
    pub line: Option<usize>,
    /// The variable of the daemon's environment, where that is the source.
    pub variable: Option<String>,
}

/// Where a value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConfigSource {
    /// Nobody said anything.
    Default,
    /// The file.
    File,
    /// The environment the daemon was started with.
    Environment,
}

/// A cache; also the shape of `--json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheView {
    /// Its name.
    pub name: CacheName,
    /// Bytes it uses on the host.
    pub disk_bytes: u64,
    /// Bytes it may use.
    pub size_bytes: u64,
    /// Unix time of its last use, seconds.
    pub used: i64,
    /// The running vm that has it.
    pub used_by: Option<String>,
}
