//! How registries are reached.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::limits::Limits;

/// Settings for pulling images.
#[derive(Debug, Clone, Default)]
pub struct RegistryConfig {
    /// Settings of single registries, by host with port as in a reference. `docker.io` is called that.
    pub hosts: BTreeMap<String, HostConfig>,
    /// Files of docker's and podman's format that credentials are taken from; the first that has some for a registry
    /// counts.
    pub auth_files: Vec<PathBuf>,
    /// Where blobs are kept, shared by all images.
    pub cache_dir: PathBuf,
    /// How much an image may be.
    pub limits: Limits,
}

/// Settings of one registry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostConfig {
    /// Asked before the registry, in order: a host, or an address such as `https://mirror.example/prefix`.
    pub mirrors: Vec<String>,
    /// Speak plain http. Registries on this machine may do so without being asked.
    pub plain_http: bool,
    /// Trust the certificates in this PEM file, besides the system's.
    pub ca_file: Option<PathBuf>,
}
