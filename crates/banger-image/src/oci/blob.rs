//! Blobs in a cache that is addressed by their digests.
//!
//! `<cache>/sha256/<hex>`, or `sha512`, is whole and was verified; it is hashed again before it is used. `<cache>/partial/<hex>` is a
//! beginning, which the next try or the next process continues.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use reqwest::StatusCode;
use reqwest::header::CONTENT_RANGE;

use super::client::{Client, RegistryError, Retry, shown};
use super::digest::Digest;
use super::manifest::Descriptor;
use crate::partial::Partial;

/// A blob could not be brought into the cache.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The registry doesn't give it.
    #[error("could not download blob {digest}")]
    Registry {
        /// The blob.
        digest: Digest,
        /// Why not.
        source: RegistryError,
    },
    /// It has another length than the manifest says.
    #[error("blob {digest} is not {expected} bytes long, as the manifest says")]
    Size {
        /// The blob.
        digest: Digest,
        /// What it should have.
        expected: u64,
    },
    /// It isn't what it is called.
    #[error("blob {digest} was tampered with or damaged: its {} is {found}", .digest.algorithm().name())]
    Digest {
        /// The blob.
        digest: Digest,
        /// What it has.
        found: String,
    },
    /// The cache can't be read or written.
    #[error("could not write to the cache `{}`", .path.display())]
    Cache {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Nobody waits for it any more.
    #[error("the download of blob {digest} was interrupted")]
    Interrupted {
        /// The blob.
        digest: Digest,
    },
}

/// The cache.
#[derive(Debug)]
pub(crate) struct BlobCache {
    dir: PathBuf,
}

/// How one request for a blob ended, when not with the whole of it.
enum Broken {
    /// More may come of another try.
    Transient(RegistryError),
    /// The answer was shorter than it should be, or of a range that isn't there.
    Short,
    Final(BlobError),
}

impl BlobCache {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// Brings a blob into the cache and returns its path. Bytes there and arriving are added to `done`.
    pub(crate) async fn ensure(
        &self,
        client: &Client,
        wanted: &Descriptor,
        done: &AtomicU64,
    ) -> Result<PathBuf, BlobError> {
        let dir = self.dir.join(wanted.digest.algorithm().name());
        let path = dir.join(wanted.digest.hex());
        let cache = |source| BlobError::Cache { path: path.clone(), source };
        if is_whole(wanted, &path).await.map_err(cache)? {
            done.fetch_add(wanted.size, Ordering::Relaxed);
            return Ok(path);
        }
        fs::create_dir_all(&dir).map_err(cache)?;
        let mut part = open_part(self.dir.join("partial"), wanted.digest.clone()).await.map_err(cache)?;
        let mut retry = Retry::new();
        loop {
            let resumed = part.length() > 0;
            done.fetch_add(part.length(), Ordering::Relaxed);
            let result = fetch_once(client, wanted, &mut part, done).await;
            let Err(broken) = result else { break };
            done.fetch_sub(part.length(), Ordering::Relaxed);
            match broken {
                Broken::Transient(err) => {
                    if !retry.after(&err).await {
                        return Err(BlobError::Registry { digest: wanted.digest.clone(), source: err });
                    }
                }
                Broken::Short => {
                    if !retry.wait(None).await {
                        part.discard();
                        return Err(BlobError::Size { digest: wanted.digest.clone(), expected: wanted.size });
                    }
                }
                // What an earlier process left may be damaged: that alone is no reason to accuse the registry.
                Broken::Final(BlobError::Digest { .. } | BlobError::Size { .. }) if resumed => {
                    part.restart().map_err(cache)?;
                }
                Broken::Final(err) => {
                    part.discard();
                    return Err(err);
                }
            }
        }
        part.publish(&path).map_err(cache)?;
        Ok(path)
    }
}

async fn is_whole(wanted: &Descriptor, path: &Path) -> io::Result<bool> {
    match fs::metadata(path) {
        Ok(meta) if meta.len() != wanted.size => return Ok(false),
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(false),
        other => other?,
    };
    let (path, digest) = (path.to_owned(), wanted.digest.clone());
    let same = crate::blocking::start(move || digest.is_of_file(&path)).await;
    same.map_err(io::Error::other)?
}

/// Opens the beginning that is there and hashes it, which takes a while when it is long.
async fn open_part(dir: PathBuf, digest: Digest) -> io::Result<Partial> {
    let open = move || Partial::open_as(digest.algorithm(), &dir, digest.hex());
    crate::blocking::start(open).await.map_err(io::Error::other)?
}

async fn fetch_once(
    client: &Client,
    wanted: &Descriptor,
    part: &mut Partial,
    done: &AtomicU64,
) -> Result<(), Broken> {
    let digest = || wanted.digest.clone();
    let too_long = || Broken::Final(BlobError::Size { digest: digest(), expected: wanted.size });
    let path = part.path().to_owned();
    let cache = |source| Broken::Final(BlobError::Cache { path: path.clone(), source });
    if part.length() > wanted.size {
        return Err(too_long());
    }
    if part.length() < wanted.size {
        let mut response = match client.blob(&wanted.digest, part.length()).await {
            Err(RegistryError::Status { status: StatusCode::RANGE_NOT_SATISFIABLE, .. })
                if part.length() > 0 =>
            {
                done.fetch_sub(part.length(), Ordering::Relaxed);
                part.restart().map_err(cache)?;
                return Err(Broken::Short);
            }
            other => other.map_err(Broken::Transient)?,
        };
        if part.length() > 0 && !continues_at(&response, part.length()) {
            done.fetch_sub(part.length(), Ordering::Relaxed);
            part.restart().map_err(cache)?;
        }
        let url = shown(response.url());
        loop {
            let chunk = response.chunk().await.map_err(|source| {
                Broken::Transient(RegistryError::Request { url: url.clone(), source: source.without_url() })
            })?;
            let Some(chunk) = chunk else { break };
            if part.length() + chunk.len() as u64 > wanted.size {
                return Err(too_long());
            }
            part.append(&chunk).map_err(cache)?;
            done.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        }
    }
    if part.length() < wanted.size {
        return Err(Broken::Short);
    }
    let found = part.digest();
    if found != wanted.digest.hex() {
        return Err(Broken::Final(BlobError::Digest { digest: digest(), found }));
    }
    Ok(())
}

fn continues_at(response: &reqwest::Response, at: u64) -> bool {
    let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).unwrap_or("");
    response.status() == StatusCode::PARTIAL_CONTENT && range.starts_with(&format!("bytes {at}-"))
}
