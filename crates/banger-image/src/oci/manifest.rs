//! Manifests, indexes and image configurations, as registries serve them.
//!
//! Only what an image's files and its start need is read; unknown fields are left alone. Docker's schema 2 and OCI have
//! the same shape and differ in the names of their types.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::digest::Digest;

/// What a manifest may be asked for as.
pub(crate) const MANIFEST_TYPES: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// A manifest can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It isn't what a manifest is.
    #[error("the {what} is not valid json of its kind")]
    Json {
        /// Which document.
        what: &'static str,
        /// Why not.
        source: serde_json::Error,
    },
    /// Docker's first format, which has no digests of its layers' content.
    #[error("the manifest is of docker's schema 1, which registries stopped serving long ago")]
    Schema1,
    /// Something else than an image.
    #[error("the manifest is of type `{}`, which is not an image", .0.escape_debug())]
    Type(String),
    /// A layer that can't be unpacked.
    #[error("layer {layer} is of type `{}`, which can't be unpacked", .media_type.escape_debug())]
    LayerType {
        /// The layer.
        layer: Digest,
        /// Its type.
        media_type: String,
    },
    /// Layers and their content don't match in number.
    #[error("the manifest has {layers} layers, the configuration {diff_ids}")]
    LayerCount {
        /// Layers of the manifest.
        layers: usize,
        /// Layers of the configuration.
        diff_ids: usize,
    },
    /// More layers than an image may have.
    #[error("the image has {found} layers, more than the {limit} allowed")]
    TooManyLayers {
        /// How many there are.
        found: usize,
        /// How many may be.
        limit: usize,
    },
    /// The image isn't made for the platform.
    #[error("there is no image for {wanted}, only for {available}")]
    NoPlatform {
        /// What was asked for.
        wanted: Platform,
        /// What there is.
        available: String,
    },
    /// Indexes in indexes.
    #[error("the index leads to further indexes, more than {0} deep")]
    Depth(usize),
}

/// The text is no platform.
#[derive(Debug, thiserror::Error)]
#[error("`{}` is not a platform, which is for example `linux/amd64` or `linux/arm/v7`", .0.escape_debug())]
pub struct PlatformError(String);

/// What an image is made for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// The operating system.
    #[serde(default)]
    os: String,
    /// The processor, in Go's words.
    #[serde(default)]
    architecture: String,
    /// Which kind of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    variant: Option<String>,
}

impl Platform {
    /// Returns Linux on this machine's processor.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            other => other,
        };
        Self { os: "linux".to_owned(), architecture: architecture.to_owned(), variant: None }
    }

    /// Returns the processor's name.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// How well an image for `self` serves who asked for `wanted`; none when it does not.
    fn serves(&self, wanted: &Self) -> Option<u32> {
        if (&self.os, &self.architecture) != (&wanted.os, &wanted.architecture) {
            return None;
        }
        let level =
            |variant: Option<&str>| variant.and_then(|v| v.trim_start_matches('v').parse::<u32>().ok());
        let default = match self.architecture.as_str() {
            "arm64" => 8,
            "arm" => 7,
            "amd64" => 1,
            _ => 0,
        };
        let (own, most) = (
            level(self.variant.as_deref()).unwrap_or(default),
            level(wanted.variant.as_deref()).unwrap_or(default),
        );
        (own <= most).then_some(own + 1)
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let part = |part: &str| {
            !part.is_empty()
                && part.len() <= 32
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        let parts: Vec<&str> = text.split('/').collect();
        let (os, architecture, variant) = match parts[..] {
            [architecture] => ("linux", architecture, None),
            [os, architecture] => (os, architecture, None),
            [os, architecture, variant] => (os, architecture, Some(variant)),
            _ => return Err(PlatformError(text.chars().take(100).collect())),
        };
        if ![os, architecture, variant.unwrap_or("x")].into_iter().all(part) {
            return Err(PlatformError(text.chars().take(100).collect()));
        }
        let architecture = match architecture {
            "x86_64" | "x86-64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Ok(Self {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What a registry calls it may contain anything.
        write!(f, "{}/{}", self.os.escape_debug(), self.architecture.escape_debug())?;
        match &self.variant {
            Some(variant) => write!(f, "/{}", variant.escape_debug()),
            None => Ok(()),
        }
    }
}

/// Where content is and how long.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Descriptor {
    #[serde(rename = "mediaType", default)]
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    #[serde(default)]
    platform: Option<Platform>,
    /// Remarks; in a layout's index the name of the image is one.
    #[serde(default)]
    pub(crate) annotations: Option<BTreeMap<String, String>>,
}

/// A manifest or an index.
#[derive(Debug)]
pub(crate) enum Document {
    Index(Vec<Descriptor>),
    Manifest { config: Descriptor, layers: Vec<Descriptor> },
}

#[derive(Deserialize)]
struct RawDocument {
    #[serde(rename = "schemaVersion", default)]
    schema_version: u64,
    #[serde(rename = "mediaType", default)]
    media_type: Option<String>,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

impl Document {
    /// Parses what a registry served as `content_type`.
    pub(crate) fn parse(body: &[u8], content_type: &str) -> Result<Self, ManifestError> {
        let json = |source| ManifestError::Json { what: "manifest", source };
        let raw: RawDocument = serde_json::from_slice(body).map_err(json)?;
        if raw.schema_version == 1 {
            return Err(ManifestError::Schema1);
        }
        match raw {
            // A document that claims to be both is neither.
            RawDocument { manifests: Some(manifests), config: None, layers: None, .. } => {
                Ok(Self::Index(manifests))
            }
            RawDocument { manifests: None, config: Some(config), layers: Some(layers), .. } => {
                for layer in &layers {
                    check_layer(layer)?;
                }
                Ok(Self::Manifest { config, layers })
            }
            other => Err(ManifestError::Type(other.media_type.unwrap_or_else(|| content_type.to_owned()))),
        }
    }
}

/// Layers are told apart by their content; the type only has to say that it is one.
fn check_layer(layer: &Descriptor) -> Result<(), ManifestError> {
    let media_type = layer.media_type.as_str();
    let is_tar = ["application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs."]
        .iter()
        .any(|prefix| media_type.starts_with(prefix));
    if (is_tar || media_type.is_empty()) && !media_type.contains("encrypted") {
        Ok(())
    } else {
        let media_type = media_type.chars().take(200).collect();
        Err(ManifestError::LayerType { layer: layer.digest.clone(), media_type })
    }
}

/// Chooses the manifest for a platform.
pub(crate) fn choose<'a>(
    manifests: &'a [Descriptor],
    wanted: &Platform,
) -> Result<&'a Descriptor, ManifestError> {
    let mut best: Option<(u32, &Descriptor)> = None;
    for descriptor in manifests {
        let score = match &descriptor.platform {
            Some(platform) => platform.serves(wanted),
            // An index of one needs no platform.
            None => (manifests.len() == 1).then_some(0),
        };
        // The first of equals, as other tools do.
        if let Some(score) = score
            && best.is_none_or(|(before, _)| score > before)
        {
            best = Some((score, descriptor));
        }
    }
    best.map(|(_, descriptor)| descriptor).ok_or_else(|| {
        let mut available: Vec<String> = manifests
            .iter()
            .filter_map(|descriptor| descriptor.platform.as_ref())
            .filter(|platform| platform.os != "unknown")
            .take(20)
            .map(Platform::to_string)
            .collect();
        available.dedup();
        let available = if available.is_empty() { "none".to_owned() } else { available.join(", ") };
        ManifestError::NoPlatform { wanted: wanted.clone(), available }
    })
}

/// How an image is started.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Environment, as `NAME=value`.
    #[serde(default)]
    pub env: Vec<String>,
    /// Directory to start in.
    #[serde(default)]
    pub workdir: Option<String>,
    /// User, and group after a colon, by name or number.
    #[serde(default)]
    pub user: Option<String>,
    /// The program, and the arguments that always come first.
    #[serde(default)]
    pub entrypoint: Vec<String>,
    /// Arguments when none are given, or the program when there is no entry point.
    #[serde(default)]
    pub cmd: Vec<String>,
}

/// What is read of an image's configuration.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) image: ImageConfig,
    pub(crate) platform: Platform,
    pub(crate) diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(flatten)]
    platform: Platform,
    #[serde(default)]
    config: Option<RawImageConfig>,
    rootfs: RawRootfs,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(default)]
    diff_ids: Option<Vec<Digest>>,
}

/// Lists may be null, and texts empty.
#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct RawImageConfig {
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
}

impl Config {
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ManifestError> {
        let json = |source| ManifestError::Json { what: "image configuration", source };
        let raw: RawConfig = serde_json::from_slice(body).map_err(json)?;
        let config = raw.config.unwrap_or_default();
        let some = |text: Option<String>| text.filter(|text| !text.is_empty());
        Ok(Self {
            image: ImageConfig {
                env: config.env.unwrap_or_default(),
                workdir: some(config.working_dir),
                user: some(config.user),
                entrypoint: config.entrypoint.unwrap_or_default(),
                cmd: config.cmd.unwrap_or_default(),
            },
            platform: raw.platform,
            diff_ids: raw.rootfs.diff_ids.unwrap_or_default(),
        })
    }

    /// Makes sure that the image is for the platform, where it says for which.
    pub(crate) fn check_platform(&self, wanted: &Platform) -> Result<(), ManifestError> {
        if self.platform.architecture.is_empty() || self.platform.serves(wanted).is_some() {
            return Ok(());
        }
        Err(ManifestError::NoPlatform { wanted: wanted.clone(), available: self.platform.to_string() })
    }
}
