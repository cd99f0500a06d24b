//! The archive client: from a mirror's address to verified package files.
//!
//! ```text
//! InRelease --signature--> text --origin, suite, dates--> digest of Packages.xz --sha256--> index --sha256, size--> .deb
//! ```
//!
//! Every arrow is checked before the next byte is used. The suites are fixed: the release, its updates and its security
//! fixes, always together.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use lzma_rust2::XzReader;
use thiserror::Error;

use super::fetch::{FetchError, Fetcher, Wanted};
use super::index::{EntryError, Index, Package};
use super::keyring::{Keyring, KeyringError, VerifyError};
use super::mirror::{MirrorError, Mirrors};
use super::release::{Expect, Release, ReleaseError};
use crate::progress::{Progress, Sink};

/// The release that images and kernels are made of.
pub const RELEASE: &str = "bookworm";
/// The component with all free software.
pub const COMPONENT: &str = "main";
/// The largest InRelease file read; the largest of the three is 150 kB.
const INRELEASE_MAX: u64 = 8 << 20;
/// The largest package index accepted, unpacked; the release's is 50 MB.
const PACKAGES_MAX: u64 = 512 << 20;
/// Memory the xz decoder may use, in KiB; the archive's files need 64 MiB.
const XZ_MEMORY_KIB: u32 = 192 << 10;

/// Debian's name of a host architecture we know.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// What the archive client needs to know of its surroundings.
#[derive(Debug, Clone)]
pub struct ArchiveConfig {
    /// The root of the host's file system; another directory in tests.
    pub root: PathBuf,
    /// The mirror the user configured, if any.
    pub mirror: Option<String>,
    /// Where downloads are kept.
    pub cache_dir: PathBuf,
    /// Where the dates of accepted Release files are kept.
    pub state_dir: PathBuf,
}

/// An archive operation failed.
#[derive(Debug, Error)]
pub enum ArchiveError {
    /// No mirror.
    #[error("no Debian mirror to fetch from")]
    Mirror(#[from] MirrorError),
    /// No keys.
    #[error("could not load the Debian archive keys")]
    Keyring(#[from] KeyringError),
    /// A download failed.
    #[error("could not fetch from the Debian archive")]
    Fetch(#[from] FetchError),
    /// The signature of a Release file isn't good.
    #[error("refused `{url}`")]
    Verify {
        /// The file.
        url: String,
        /// Why.
        source: VerifyError,
    },
    /// The Release file is signed, but not acceptable.
    #[error("refused `{url}`")]
    Release {
        /// The file.
        url: String,
        /// Why.
        source: ReleaseError,
    },
    /// The Release file doesn't list the package index.
    #[error("suite `{suite}` has no packages for architecture `{arch}`")]
    NoIndex {
        /// The suite.
        suite: String,
        /// Debian's architecture name.
        arch: String,
    },
    /// The verified index can't be unpacked.
    #[error("could not unpack the package index of `{suite}`")]
    Unpack {
        /// The suite.
        suite: String,
        /// Why not.
        source: io::Error,
    },
    /// An entry of the index is broken.
    #[error("the package index is damaged")]
    Entry(#[from] EntryError),
    /// A task ended without an answer.
    #[error("reading the package indexes was interrupted")]
    Interrupted,
}

/// The archive as seen through the host's or the user's mirror.
#[derive(Debug)]
pub struct Archive {
    fetcher: Arc<Fetcher>,
    mirrors: Mirrors,
    keyring: Keyring,
    state_dir: PathBuf,
}

/// A suite whose Release file was accepted.
struct Suite {
    name: String,
    base: String,
    packages: Wanted,
    /// Size of the index when unpacked.
    unpacked: u64,
}

/// The addresses that were accepted, for the image's own apt sources.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bases {
    /// Base of the main archive.
    pub main: String,
    /// Base of the security archive.
    pub security: String,
}

impl Archive {
    /// Finds the mirror and loads the keys; nothing is fetched yet.
    pub fn open(config: &ArchiveConfig) -> Result<Self, ArchiveError> {
        let mirrors = Mirrors::find(&config.root, config.mirror.as_deref())?;
        let keyring = Keyring::debian(&config.root)?;
        let fetcher = Arc::new(Fetcher::new(&config.cache_dir, mirrors.proxy.as_deref())?);
        Ok(Self { fetcher, mirrors, keyring, state_dir: config.state_dir.clone() })
    }

    /// Fetches and verifies the indexes of all three suites.
    pub async fn load(&self, sink: Sink<'_>) -> Result<(Index, Bases), ArchiveError> {
        sink(Progress::Step { label: "verify the Debian archive".into() });
        let (updates, fixes) = (format!("{RELEASE}-updates"), format!("{RELEASE}-security"));
        let suites: [Suite; 3] = tokio::try_join!(
            self.suite(RELEASE, &self.mirrors.main),
            self.suite(&updates, &self.mirrors.main),
            self.suite(&fixes, &self.mirrors.security),
        )?
        .into();
        let bases = Bases { main: suites[0].base.clone(), security: suites[2].base.clone() };
        sink(Progress::Step { label: "fetch the package indexes".into() });
        let wanted: Vec<Wanted> = suites.iter().map(|suite| suite.packages.clone()).collect();
        let paths = self.fetcher.fetch_all(&wanted, sink).await?;
        let index = crate::blocking::start(move || read_indexes(&suites, &paths)).await;
        Ok((index.map_err(|_| ArchiveError::Interrupted)??, bases))
    }

    /// Brings the packages' files into the cache and returns their paths in the same order.
    pub async fn fetch(&self, packages: &[Package], sink: Sink<'_>) -> Result<Vec<PathBuf>, ArchiveError> {
        let wanted: Vec<Wanted> = packages
            .iter()
            .map(|package| Wanted {
                url: package.url.clone(),
                sha256: package.sha256.clone(),
                size: package.size,
            })
            .collect();
        Ok(self.fetcher.fetch_all(&wanted, sink).await?)
    }

    /// Finds the first mirror with a Release file of the suite that passes all checks.
    async fn suite(&self, name: &str, candidates: &[String]) -> Result<Suite, ArchiveError> {
        let mut first_error = None;
        for base in candidates {
            match self.suite_at(name, base).await {
                Ok(suite) => return Ok(suite),
                Err(err) => {
                    tracing::debug!(suite = name, base, %err, "mirror is not usable");
                    first_error = first_error.or(Some(err));
                }
            }
        }
        Err(first_error.unwrap_or(ArchiveError::Mirror(MirrorError::Unknown)))
    }

    async fn suite_at(&self, name: &str, base: &str) -> Result<Suite, ArchiveError> {
        let url = format!("{base}/dists/{name}/InRelease");
        let file = self.fetcher.get(&url, INRELEASE_MAX).await?;
        let text =
            self.keyring.verify(&file).map_err(|source| ArchiveError::Verify { url: url.clone(), source })?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
        let expect = Expect {
            suite: name,
            now: i64::try_from(now).unwrap_or(i64::MAX),
            check_valid_until: self.mirrors.check_valid_until,
        };
        let refused = |source| ArchiveError::Release { url: url.clone(), source };
        let release = Release::parse(&text, &expect).map_err(refused)?;
        release.accept(name, &self.state_dir).map_err(refused)?;
        let plain = format!("{COMPONENT}/binary-{}/Packages", architecture());
        let packed = format!("{plain}.xz");
        match (release.file(&packed), release.file(&plain)) {
            (Some(listed), Some(unpacked)) => Ok(Suite {
                name: name.to_owned(),
                base: base.to_owned(),
                packages: Wanted {
                    url: format!("{base}/dists/{name}/{packed}"),
                    sha256: listed.sha256.clone(),
                    size: listed.size,
                },
                unpacked: unpacked.size,
            }),
            _ => Err(ArchiveError::NoIndex { suite: name.to_owned(), arch: architecture().to_owned() }),
        }
    }
}

fn read_indexes(suites: &[Suite], paths: &[PathBuf]) -> Result<Index, ArchiveError> {
    let mut index = Index::default();
    for (suite, path) in suites.iter().zip(paths) {
        let text = read_index(path, suite.unpacked)
            .map_err(|source| ArchiveError::Unpack { suite: suite.name.clone(), source })?;
        index.add(&suite.base, text);
    }
    Ok(index)
}

/// Unpacks an index whose digest was checked; its stated size bounds what is read.
fn read_index(path: &Path, size: u64) -> io::Result<String> {
    if size > PACKAGES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it states an absurd size"));
    }
    let packed = std::fs::read(path)?;
    let mut text = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    XzReader::new_mem_limit(packed.as_slice(), true, XZ_MEMORY_KIB).take(size + 1).read_to_end(&mut text)?;
    if text.len() as u64 != size {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it doesn't have the size the Release file states",
        ));
    }
    String::from_utf8(text).map_err(|err| io::Error::new(io::ErrorKind::InvalidData, err))
}
