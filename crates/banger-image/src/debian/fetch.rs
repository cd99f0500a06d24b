//! Downloads over http: small files into memory, big ones into a cache that is addressed by their sha256.
//!
//! Nothing is believed of what arrives: a file has the size and the digest that a signed index states, or it is deleted.
//! A cached file is hashed again before it is used. Interrupted downloads are continued, also by the next process.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use reqwest::StatusCode;
use reqwest::header::{CONTENT_RANGE, RANGE};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};
use thiserror::Error;
use tokio::task::JoinSet;

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

/// An http client with a verified cache.
#[derive(Debug)]
pub struct Fetcher {
    client: reqwest::Client,
    cache: PathBuf,
}

impl Fetcher {
    /// Makes a client; files are kept below `cache`. `proxy` is for plain http, else the environment's settings count.
    pub fn new(cache: &Path, proxy: Option<&str>) -> Result<Self, FetchError> {
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
        Ok(Self { client: builder.build().map_err(FetchError::Client)?, cache: cache.to_owned() })
    }

    /// Downloads a file of at most `limit` bytes into memory.
    pub async fn get(&self, url: &str, limit: u64) -> Result<Vec<u8>, FetchError> {
        let mut attempt = 1;
        loop {
            match self.get_once(url, limit).await {
                Err(err) if is_transient(&err) && attempt < ATTEMPTS => pause(&mut attempt).await,
                result => return result,
            }
        }
    }

    async fn get_once(&self, url: &str, limit: u64) -> Result<Vec<u8>, FetchError> {
        let request = |source| FetchError::Request { url: url.to_owned(), source };
        let mut response = self.client.get(url).send().await.map_err(request)?;
        if !response.status().is_success() {
            return Err(FetchError::Status { url: url.to_owned(), status: response.status() });
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(request)? {
            if body.len() as u64 + chunk.len() as u64 > limit {
                return Err(FetchError::TooLarge { url: url.to_owned(), limit });
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
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
            let start = part.length;
            let resumed = start > 0;
            done.fetch_add(start, Ordering::Relaxed);
            match self.fetch_once(file, &mut part, done).await {
                Ok(()) => break,
                // What an earlier process left may be damaged: that alone is no reason to accuse the mirror.
                Err(FetchError::Digest { .. } | FetchError::Size { .. }) if resumed => {
                    done.fetch_sub(part.length, Ordering::Relaxed);
                    part.restart().map_err(cache)?;
                }
                Err(err) if is_transient(&err) && attempt < ATTEMPTS => {
                    done.fetch_sub(part.length, Ordering::Relaxed);
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
        let hash = tokio::task::spawn_blocking(move || hash_file(&mut File::open(path)?)).await;
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
        let path = part.path.clone();
        let cache = |source| FetchError::Cache { path: path.clone(), source };
        if part.length > file.size {
            return Err(FetchError::Size { url: url(), expected: file.size });
        }
        if part.length < file.size {
            let mut get = self.client.get(&file.url);
            if part.length > 0 {
                get = get.header(RANGE, format!("bytes={}-", part.length));
            }
            let mut response = get.send().await.map_err(request)?;
            if !response.status().is_success() {
                return Err(FetchError::Status { url: url(), status: response.status() });
            }
            if part.length > 0 && !continues_at(&response, part.length) {
                done.fetch_sub(part.length, Ordering::Relaxed);
                part.restart().map_err(cache)?;
            }
            while let Some(chunk) = response.chunk().await.map_err(request)? {
                if part.length + chunk.len() as u64 > file.size {
                    return Err(FetchError::Size { url: url(), expected: file.size });
                }
                part.append(&chunk).map_err(cache)?;
                done.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            }
        }
        if part.length != file.size {
            return Err(FetchError::Size { url: url(), expected: file.size });
        }
        let found = hex(part.hash.clone().finalize());
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

/// A download on its way: the file, its length and the hash so far.
#[derive(Debug)]
struct Partial {
    path: PathBuf,
    file: File,
    length: u64,
    hash: Sha256,
}

impl Partial {
    /// Opens the partial file of that digest, or a private one while another process writes it.
    fn open(dir: &Path, sha256: &str) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        for n in 0u32.. {
            let path = if n == 0 { dir.join(sha256) } else { dir.join(format!("{sha256}.{n}")) };
            let file = File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            // Another process may have published this file between our open and our lock.
            if !is_same_file(&file, &path) {
                continue;
            }
            let mut part = Self { path, file, length: 0, hash: Sha256::new() };
            part.rehash()?;
            return Ok(part);
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn rehash(&mut self) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(0))?;
        self.hash = Sha256::new();
        self.length = io::copy(&mut self.file, &mut HashWriter(&mut self.hash))?;
        Ok(())
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.rehash()
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hash.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    fn publish(self, path: &Path) -> io::Result<()> {
        // No fsync: after a crash the hash decides whether the content is there.
        fs::rename(&self.path, path)
    }

    fn discard(&self) {
        // Best effort: a bad partial file that stays is found bad again.
        let _ = fs::remove_file(&self.path);
    }
}

fn is_same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hashes the rest of a reader.
pub fn hash_file(reader: &mut dyn Read) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(hex(hash.finalize())),
            Ok(n) => hash.update(&buffer[..n]),
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
}

/// Renders bytes in lower-case hex.
pub fn hex(bytes: impl AsRef<[u8]>) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |n: u8| char::from(DIGITS[usize::from(n)]);
    bytes.as_ref().iter().flat_map(|b| [digit(b >> 4), digit(b & 15)]).collect()
}
