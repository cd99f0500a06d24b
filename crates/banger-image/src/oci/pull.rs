//! One image from its reference to a filesystem.
//!
//! ```text
//! resolve    reference -> manifest (through indexes, for the platform) -> configuration
//! write_to   blobs -> cache, several at a time ──┐
//!            layers, in order, as they arrive  <─┘ -> ext4
//! ```

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinSet;

use super::blob::{BlobCache, BlobError};
use super::client::{Client, Fetched, RegistryError};
use super::config::RegistryConfig;
use super::digest::Digest;
use super::layer::{Layer, LayerError, write_layers};
use super::limits::Limits;
use super::manifest::{Config, Descriptor, Document, ImageConfig, ManifestError, Platform, choose};
use super::reference::Reference;
use super::stream::Source;
use crate::ext4::Room;
use crate::progress::{Progress, Sink};
use crate::rootfs::RootfsSummary;

/// Blobs downloaded at a time, as docker does.
const PARALLEL: usize = 4;
/// Indexes followed; one is usual, and its digest rules out a circle.
pub(super) const INDEXES_MAX: usize = 4;
/// How often progress is reported.
const TICK: Duration = Duration::from_millis(100);

/// An image could not be pulled.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// The registry doesn't give it.
    #[error("could not get image `{reference}`")]
    Registry {
        /// The image.
        reference: Reference,
        /// Why not.
        source: RegistryError,
    },
    /// What the registry has isn't an image for this platform.
    #[error("could not use image `{reference}`")]
    Manifest {
        /// The image.
        reference: Reference,
        /// Why not.
        source: ManifestError,
    },
    /// Its configuration or a layer can't be had.
    #[error("could not get the content of image `{reference}`")]
    Blob {
        /// The image.
        reference: Reference,
        /// Why not.
        source: BlobError,
    },
    /// Its layers don't make a filesystem.
    #[error("could not unpack image `{reference}`")]
    Layer {
        /// The image.
        reference: Reference,
        /// Why not.
        source: LayerError,
    },
    /// A thread ended without an answer.
    #[error("the pull of image `{0}` was interrupted")]
    Interrupted(Reference),
}

/// An image that became a filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OciImage {
    /// The digest of its manifest.
    pub digest: Digest,
    /// Size of the filesystem in bytes.
    pub size_bytes: u64,
    /// Path of the init the image brings.
    pub init: Option<String>,
    /// How it is started.
    pub config: ImageConfig,
    /// Its configuration and layers, as the cache has them; none of an image without a registry.
    pub blobs: Vec<Digest>,
}

/// An image that was found in a registry and not downloaded yet.
#[derive(Debug)]
pub struct OciPull {
    reference: Reference,
    client: Arc<Client>,
    cache: Arc<BlobCache>,
    limits: Limits,
    digest: Digest,
    platform: Platform,
    config_blob: Digest,
    layers: Vec<Descriptor>,
    diff_ids: Vec<Digest>,
    config: ImageConfig,
}

impl OciPull {
    /// Finds an image for a platform and reads its configuration. Nothing but the cache is written.
    pub async fn resolve(
        config: &RegistryConfig,
        reference: &Reference,
        platform: &Platform,
        sink: Sink<'_>,
    ) -> Result<Self, OciError> {
        sink(Progress::Step { label: format!("resolve {reference}") });
        let registry = |source| OciError::Registry { reference: reference.clone(), source };
        let unusable = |source| OciError::Manifest { reference: reference.clone(), source };
        let client = Client::open(config, reference).await.map_err(registry)?;
        let mut fetched = client.manifest(&reference.selector()).await.map_err(registry)?;
        let mut indexes = 0;
        let (config_blob, layers) = loop {
            match parse(&fetched).map_err(unusable)? {
                Document::Manifest { config, layers } => break (config, layers),
                Document::Index(manifests) => {
                    indexes += 1;
                    if indexes > INDEXES_MAX {
                        return Err(unusable(ManifestError::Depth(INDEXES_MAX)));
                    }
                    let chosen = choose(&manifests, platform).map_err(unusable)?;
                    fetched = client.manifest(&chosen.digest.to_string()).await.map_err(registry)?;
                }
            }
        };
        let limits = &config.limits;
        if layers.len() > limits.layers {
            let (found, limit) = (layers.len(), limits.layers);
            return Err(unusable(ManifestError::TooManyLayers { found, limit }));
        }
        let cache = BlobCache::new(&config.cache_dir);
        let parsed = load_config(&client, &cache, &config_blob, limits, reference).await?;
        parsed.check_platform(platform).map_err(unusable)?;
        if parsed.diff_ids.len() != layers.len() {
            let (layers, diff_ids) = (layers.len(), parsed.diff_ids.len());
            return Err(unusable(ManifestError::LayerCount { layers, diff_ids }));
        }
        Ok(Self {
            reference: reference.clone(),
            client: Arc::new(client),
            cache: Arc::new(cache),
            limits: limits.clone(),
            digest: fetched.digest,
            platform: platform.clone(),
            config_blob: config_blob.digest,
            layers,
            diff_ids: parsed.diff_ids,
            config: parsed.image,
        })
    }

    /// Returns the digest of the manifest for the platform.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Returns what the image is for.
    pub fn platform(&self) -> &Platform {
        &self.platform
    }

    /// Returns how the image is started.
    pub fn config(&self) -> &ImageConfig {
        &self.config
    }

    /// Returns the bytes of all layers, compressed.
    pub fn compressed_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.size).fold(0, u64::saturating_add)
    }

    /// Downloads what the cache doesn't have and writes the filesystem to a new file. After an error, or when the future
    /// is dropped, the file is gone; what was downloaded stays in the cache.
    pub async fn write_to(&self, rootfs: &Path, sink: Sink<'_>) -> Result<OciImage, OciError> {
        let count = self.layers.len();
        sink(Progress::Step { label: format!("pull {count} layer{}", if count == 1 { "" } else { "s" }) });
        let arrivals = Arc::new(Arrivals::new(count));
        let _cancel = CancelOnDrop(&arrivals);
        let total = self.compressed_bytes();
        let mut writing = crate::blocking::start(self.writer(rootfs, &arrivals));
        let mut downloads = JoinSet::new();
        let mut queue = self.unique_layers();
        let mut failed = None;
        let mut tick = tokio::time::interval(TICK);
        let written = loop {
            while failed.is_none() && downloads.len() < PARALLEL {
                let Some(layer) = queue.next() else { break };
                let (client, cache) = (Arc::clone(&self.client), Arc::clone(&self.cache));
                let (layer, arrivals) = (layer.clone(), Arc::clone(&arrivals));
                downloads.spawn(async move {
                    let result = cache.ensure(&client, &layer, &arrivals.downloaded).await;
                    (layer.digest, result)
                });
            }
            tokio::select! {
                _ = tick.tick() => sink(Progress::Bytes { done: arrivals.done(), total: Some(total) }),
                Some(finished) = downloads.join_next() => match finished {
                    Ok((digest, Ok(path))) => arrivals.here(&self.layers, &digest, &path),
                    Ok((_, Err(err))) => {
                        failed.get_or_insert(err);
                        arrivals.cancel();
                        downloads.abort_all();
                    }
                    Err(_) => arrivals.cancel(),
                },
                written = &mut writing => break written,
            }
        };
        if let Some(source) = failed {
            return Err(OciError::Blob { reference: self.reference.clone(), source });
        }
        let written = written.map_err(|_| OciError::Interrupted(self.reference.clone()))?;
        let summary =
            written.map_err(|source| OciError::Layer { reference: self.reference.clone(), source })?;
        sink(Progress::Bytes { done: total, total: Some(total) });
        Ok(OciImage {
            digest: self.digest.clone(),
            size_bytes: summary.size_bytes,
            init: summary.init,
            config: self.config.clone(),
            blobs: std::iter::once(&self.config_blob)
                .chain(self.unique_layers().map(|layer| &layer.digest))
                .cloned()
                .collect(),
        })
    }

    /// The layers in order, each blob once.
    fn unique_layers(&self) -> impl Iterator<Item = &Descriptor> {
        let is_first = |at: usize| !self.layers[..at].iter().any(|l| l.digest == self.layers[at].digest);
        self.layers.iter().enumerate().filter(move |(at, _)| is_first(*at)).map(|(_, layer)| layer)
    }

    /// What the writing thread does.
    fn writer(
        &self,
        rootfs: &Path,
        arrivals: &Arc<Arrivals>,
    ) -> impl FnOnce() -> Result<RootfsSummary, LayerError> + Send + 'static {
        let (rootfs, arrivals, limits) = (rootfs.to_owned(), Arc::clone(arrivals), self.limits.clone());
        let layers: Vec<Layer> = self
            .layers
            .iter()
            .zip(&self.diff_ids)
            .map(|(layer, diff_id)| Layer { digest: layer.digest.clone(), diff_id: diff_id.clone() })
            .collect();
        move || {
            let mut unfinished = Unfinished(Some(rootfs.clone()));
            let source = Source {
                wait: &|at| arrivals.wait(at, &layers),
                count: layers.len(),
                limits: &limits,
                cancelled: &arrivals.cancelled,
                read: &arrivals.unpacked,
            };
            let result = write_layers(&rootfs, &layers, &source, Room::Spare(0));
            // A file that was there before is not ours to remove.
            if matches!(result, Ok(_) | Err(LayerError::Create(_))) {
                unfinished.0 = None;
            }
            result
        }
    }
}

fn parse(fetched: &Fetched) -> Result<Document, ManifestError> {
    Document::parse(&fetched.body, &fetched.content_type)
}

async fn load_config(
    client: &Client,
    cache: &BlobCache,
    blob: &Descriptor,
    limits: &Limits,
    reference: &Reference,
) -> Result<Config, OciError> {
    if blob.size > limits.document_bytes {
        let url = format!("blob {}", blob.digest);
        let source = RegistryError::TooLarge { url, limit: limits.document_bytes };
        return Err(OciError::Registry { reference: reference.clone(), source });
    }
    let unavailable = |source| OciError::Blob { reference: reference.clone(), source };
    let path = cache.ensure(client, blob, &AtomicU64::new(0)).await.map_err(unavailable)?;
    let body = std::fs::read(&path).map_err(|source| unavailable(BlobError::Cache { path, source }))?;
    Config::parse(&body).map_err(|source| OciError::Manifest { reference: reference.clone(), source })
}

/// Removes a file that was not finished, also after a panic.
pub(super) struct Unfinished(pub(super) Option<PathBuf>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // The error that led here says more than this one would.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Which layers are in the cache; the writing thread waits here for the next one.
#[derive(Debug)]
struct Arrivals {
    paths: Mutex<Vec<Option<PathBuf>>>,
    changed: Condvar,
    cancelled: AtomicBool,
    downloaded: AtomicU64,
    unpacked: AtomicU64,
}

impl Arrivals {
    fn new(count: usize) -> Self {
        Self {
            paths: Mutex::new(vec![None; count]),
            changed: Condvar::new(),
            cancelled: AtomicBool::new(false),
            downloaded: AtomicU64::new(0),
            unpacked: AtomicU64::new(0),
        }
    }

    fn here(&self, layers: &[Descriptor], digest: &Digest, path: &Path) {
        let mut paths = self.paths.lock().unwrap_or_else(PoisonError::into_inner);
        for (slot, layer) in paths.iter_mut().zip(layers) {
            if layer.digest == *digest {
                *slot = Some(path.to_owned());
            }
        }
        self.changed.notify_all();
    }

    fn cancel(&self) {
        let _paths = self.paths.lock().unwrap_or_else(PoisonError::into_inner);
        self.cancelled.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }

    fn wait(&self, at: usize, layers: &[Layer]) -> Result<PathBuf, BlobError> {
        let mut paths = self.paths.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(BlobError::Interrupted { digest: layers[at].digest.clone() });
            }
            if let Some(path) = paths.get(at).cloned().flatten() {
                return Ok(path);
            }
            paths = self.changed.wait(paths).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// How far the pull is, in compressed bytes: halfway through a byte once it is here, through when it is unpacked.
    fn done(&self) -> u64 {
        self.downloaded.load(Ordering::Relaxed) / 2 + self.unpacked.load(Ordering::Relaxed) / 2
    }
}

struct CancelOnDrop<'a>(&'a Arrivals);

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        self.0.cancel();
    }
}
