//! Downloads over http: small files into memory, big ones into a cache that is addressed by their sha256.
//!
//! Nothing is believed of what arrives: a file has the size and the digest that a signed index states, or it is deleted.
//! A cached file is hashed again before it is used. Interrupted downloads are continued, also by the next process.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use reqwest::StatusCode;
use reqwest::header::{CONTENT_RANGE, RANGE};
use thiserror::Error;
use tokio::task::JoinSet;

use crate::partial::{Partial, hash_file};
use crate::progress::{Progress, Sink};

/// Downloads at a time: enough to hide round trips, few enough for a polite client.
const PARALLEL: usize = 6;
/// Tries for each file.
const ATTEMPTS: u32 = 4;
/// The wait before the second try; it doubles each time.
const BACKOFF: Duration = Duration::from_millis(500);
/// How long a mirror may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a mirror may be silent in the middle of an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// How often progress is reported.
const TICK: Duration = Duration::from_millis(100);

/// A download failed.
#[derive(Debug, Error)]
pub enum FetchError {
    /// The client could not be made, for example because of a bad proxy address.
    #[error("could not set up the http client")]
    Client(#[source] reqwest::Error),
    /// No answer, or it broke off.
    #[error("could not download `{url}`")]
    Request {
        /// What was asked for.
        url: String,
        /// Why not.
        source: reqwest::Error,
    },
    /// The mirror answered with an error.
    #[error("could not download `{url}`: the mirror answered {status}")]
    Status {
        /// What was asked for.
        url: String,
        /// The answer.
        status: StatusCode,
    },
    /// The file is longer than it may be, or than the signed index says, or shorter.
    #[error("`{url}` is not {expected} bytes long")]
    Size {
        /// What was asked for.
        url: String,
        /// The size stated.
        expected: u64,
    },
    /// The file is larger than any file of that kind.
    #[error("`{url}` is larger than {limit} bytes")]
    TooLarge {
        /// What was asked for.
        url: String,
        /// The most that is read.
        limit: u64,
    },
    /// The content isn't what the signed index says.
    #[error("`{url}` was tampered with or damaged: its sha256 is {found}, the signed index says {expected}")]
    Digest {
        /// What was asked for.
        url: String,
        /// What it has.
        found: String,
        /// What it must have.
        expected: String,
    },
    /// The cache can't be read or written.
    #[error("could not write to the download cache `{}`", .path.display())]
    Cache {
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A task ended without an answer.
    #[error("the download of `{url}` was interrupted")]
    Interrupted {
        /// What was asked for.
        url: String,
    },
}

/// A file to have in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Where it can be had.
    pub url: String,
    /// 64 lower-case hex digits.
    pub sha256: String,
    /// In bytes.
    pub size: u64,
}

/// An http client that tries again.
#[derive(Debug)]
pub struct Client(reqwest::Client);

impl Client {
    /// Makes one. `proxy` is for plain http, else the environment's settings count.
    pub fn new(proxy: Option<&str>) -> Result<Self, FetchError> {
        // An error only says that the process has a provider already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("banger/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT);
        if let Some(proxy) = proxy {
            let proxy = reqwest::Proxy::http(proxy).map_err(FetchError::Client)?;
            builder = builder.proxy(proxy.no_proxy(reqwest::NoProxy::from_env()));
        }
        Ok(Self(builder.build().map_err(FetchError::Client)?))
    }

    /// Downloads a file of at most `limit` bytes into memory.
    pub async fn get(&self, url: &str, limit: u64, sink: Sink<'_>) -> Result<Vec<u8>, FetchError> {
        let mut attempt = 1;
        loop {
            match self.get_once(url, limit, sink).await {
                Err(err) if is_transient(&err) && attempt < ATTEMPTS => pause(&mut attempt).await,
                result => return result,
            }
        }
    }

    async fn get_once(&self, url: &str, limit: u64, sink: Sink<'_>) -> Result<Vec<u8>, FetchError> {
        let request = |source| FetchError::Request { url: url.to_owned(), source };
        let mut response = self.0.get(url).send().await.map_err(request)?;
        if !response.status().is_success() {
            return Err(FetchError::Status { url: url.to_owned(), status: response.status() });
        }
        let total = response.content_length();
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(request)? {
            if body.len() as u64 + chunk.len() as u64 > limit {
                return Err(FetchError::TooLarge { url: url.to_owned(), limit });
            }
            body.extend_from_slice(&chunk);
            sink(Progress::Bytes { done: body.len() as u64, total });
        }
        Ok(body)
    }
}

/// A client with a verified cache.
#[derive(Debug)]
pub struct Fetcher {
    client: Client,
    cache: PathBuf,
}

impl Fetcher {
    /// Keeps files below `cache`; `proxy` as for [`Client::new`].
    pub fn new(cache: &Path, proxy: Option<&str>) -> Result<Self, FetchError> {
        Ok(Self { client: Client::new(proxy)?, cache: cache.to_owned() })
    }

    /// Downloads a file that nothing has a digest of, of at most `limit` bytes, into memory.
    pub async fn get(&self, url: &str, limit: u64) -> Result<Vec<u8>, FetchError> {
        self.client.get(url, limit, &|_| {}).await
    }

    /// Brings all files into the cache, several at a time, and returns their paths in the same order.
    ///
    /// Dropping the future stops the downloads; what has arrived is continued next time.
    pub async fn fetch_all(
        self: &Arc<Self>,
        wanted: &[Wanted],
        sink: Sink<'_>,
    ) -> Result<Vec<PathBuf>, FetchError> {
        let total = wanted.iter().map(|w| w.size).sum();
        let done = Arc::new(AtomicU64::new(0));
        let mut tasks = JoinSet::new();
        let mut paths = vec![PathBuf::new(); wanted.len()];
        let mut queue = wanted.iter().enumerate();
        let mut tick = tokio::time::interval(TICK);
        loop {
            while tasks.len() < PARALLEL {
                let Some((at, file)) = queue.next() else { break };
                let (this, file, done) = (Arc::clone(self), file.clone(), Arc::clone(&done));
                tasks.spawn(async move { (at, this.fetch(&file, &done).await) });
            }
            tokio::select! {
                _ = tick.tick() => sink(Progress::Bytes { done: done.load(Ordering::Relaxed), total: Some(total) }),
                finished = tasks.join_next() => match finished {
                    None => break,
                    Some(Ok((at, path))) => paths[at] = path?,
                    Some(Err(_)) => return Err(FetchError::Interrupted { url: self.cache.display().to_string() }),
                },
            }
        }
        sink(Progress::Bytes { done: total, total: Some(total) });
        Ok(paths)
    }

    async fn fetch(&self, file: &Wanted, done: &AtomicU64) -> Result<PathBuf, FetchError> {
        let dir = self.cache.join("sha256");
        let path = dir.join(&file.sha256);
        let cache = |source| FetchError::Cache { path: path.clone(), source };
        if self.is_cached(file, &path).await.map_err(cache)? {
            done.fetch_add(file.size, Ordering::Relaxed);
            return Ok(path);
        }
        fs::create_dir_all(&dir).map_err(cache)?;
        let mut part = Partial::open(&self.cache.join("partial"), &file.sha256).map_err(cache)?;
        let mut attempt = 1;
        loop {
            let start = part.length();
            let resumed = start > 0;
            done.fetch_add(start, Ordering::Relaxed);
            match self.fetch_once(file, &mut part, done).await {
                Ok(()) => break,
                // What an earlier process left may be damaged: that alone is no reason to accuse the mirror.
                Err(FetchError::Digest { .. } | FetchError::Size { .. }) if resumed => {
                    done.fetch_sub(part.length(), Ordering::Relaxed);
                    part.restart().map_err(cache)?;
                }
                Err(err) if is_transient(&err) && attempt < ATTEMPTS => {
                    done.fetch_sub(part.length(), Ordering::Relaxed);
                    pause(&mut attempt).await;
                }
                Err(err) => {
                    if !is_transient(&err) {
                        part.discard();
                    }
                    return Err(err);
                }
            }
        }
        part.publish(&path).map_err(cache)?;
        Ok(path)
    }

    async fn is_cached(&self, file: &Wanted, path: &Path) -> io::Result<bool> {
        match fs::metadata(path) {
            Ok(meta) if meta.len() != file.size => return Ok(false),
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(false),
            other => other?,
        };
        let path = path.to_owned();
        let hash = crate::blocking::start(move || hash_file(&mut File::open(path)?)).await;
        Ok(hash.map_err(io::Error::other)?? == file.sha256)
    }

    async fn fetch_once(
        &self,
        file: &Wanted,
        part: &mut Partial,
        done: &AtomicU64,
    ) -> Result<(), FetchError> {
        let url = || file.url.clone();
        let request = |source| FetchError::Request { url: file.url.clone(), source };
        let path = part.path().to_owned();
        let cache = |source| FetchError::Cache { path: path.clone(), source };
        if part.length() > file.size {
            return Err(FetchError::Size { url: url(), expected: file.size });
        }
        if part.length() < file.size {
            let mut get = self.client.0.get(&file.url);
            if part.length() > 0 {
                get = get.header(RANGE, format!("bytes={}-", part.length()));
            }
            let mut response = get.send().await.map_err(request)?;
            if !response.status().is_success() {
                return Err(FetchError::Status { url: url(), status: response.status() });
            }
            if part.length() > 0 && !continues_at(&response, part.length()) {
                done.fetch_sub(part.length(), Ordering::Relaxed);
                part.restart().map_err(cache)?;
            }
            while let Some(chunk) = response.chunk().await.map_err(request)? {
                if part.length() + chunk.len() as u64 > file.size {
                    return Err(FetchError::Size { url: url(), expected: file.size });
                }
                part.append(&chunk).map_err(cache)?;
                done.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            }
        }
        if part.length() != file.size {
            return Err(FetchError::Size { url: url(), expected: file.size });
        }
        let found = part.digest();
        if found != file.sha256 {
            return Err(FetchError::Digest { url: url(), found, expected: file.sha256.clone() });
        }
        Ok(())
    }
}

fn continues_at(response: &reqwest::Response, at: u64) -> bool {
    let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).unwrap_or("");
    response.status() == StatusCode::PARTIAL_CONTENT && range.starts_with(&format!("bytes {at}-"))
}

fn is_transient(err: &FetchError) -> bool {
    match err {
        FetchError::Request { source, .. } => !source.is_builder() && !source.is_redirect(),
        FetchError::Status { status, .. } => {
            status.is_server_error()
                || matches!(*status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS)
        }
        _ => false,
    }
}

async fn pause(attempt: &mut u32) {
    tokio::time::sleep(BACKOFF * 2u32.pow(*attempt - 1)).await;
    *attempt += 1;
}
