//! Images from registries: Docker's and OCI's, any Linux image.
//!
//! ```text
//! Reference ──> client ──> manifest ──> blobs in a cache ──> stream ──> tar ──> layer ──> ext4
//!  a name       who may      what        verified           unpacked        merged       a file
//! ```
//!
//! [`OciPull`] is the whole way; [`LocalImage`] begins at an archive or a directory instead. Layers are never unpacked into the host's file system: what a layer calls its files is
//! data, and ends in one new file or nowhere. Everything is bounded by [`Limits`], and every byte has a digest that was
//! checked before the file counts as finished.

mod blob;
mod challenge;
mod client;
mod config;
mod credential;
mod digest;
mod endpoint;
mod export;
mod layer;
mod limits;
mod local;
mod manifest;
mod pull;
mod reference;
mod spool;
mod stream;

pub use blob::BlobError;
pub use client::RegistryError;
pub use config::{HostConfig, RegistryConfig};
pub use credential::CredentialError;
pub use digest::{Digest, DigestError};
pub use export::{ExportMeta, write_archive, write_layout};
pub use layer::{EntryError, LayerError};
pub use limits::Limits;
pub use local::{LocalError, LocalImage};
pub use manifest::{ImageConfig, ManifestError, Platform, PlatformError};
pub use pull::{OciError, OciImage, OciPull};
pub use reference::{Reference, ReferenceError};
pub use spool::{Archive, SpoolError};
pub use stream::StreamError;
