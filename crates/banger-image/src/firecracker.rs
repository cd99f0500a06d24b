//! Firecracker's releases: downloaded, compared with a digest that is known beforehand, unpacked, put in place.
//!
//! The digest is all the trust there is: where the bytes come from does not matter, so any mirror will do and redirects
//! are followed. Nothing is read from an archive before the whole of it has the right digest, and from it two files are
//! taken by their exact names; no name in it ever becomes a path.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use thiserror::Error;

use crate::debian::fetch::{Client, FetchError};
use crate::partial::hex;
use crate::progress::{Progress, Sink};
use crate::tar::{Kind, TarError, TarReader};

/// The release that is fetched unless the config names another.
pub const VERSION: &str = "1.17.0";
/// Digests of its archives by architecture: those that several projects pin which fetch them from its publisher.
const PINNED: [(&str, &str); 2] = [
    ("x86_64", "06094a1108ae9e82aa4c23a775aa92758f53f1175d422270d9d6162cb9ade558"),
    ("aarch64", "e351ebe4f7a16b5873bbd51005d2e6767103cff4d5ebc829df2d3f95a93e2256"),
];
/// Where releases are; a mirror has the same paths below its own address.
pub const RELEASES_URL: &str = "https://github.com/firecracker-microvm/firecracker/releases/download";
/// The programs that are installed, in this order: the first may be there without the second, which means whole.
const PROGRAMS: [&str; 2] = ["jailer", "firecracker"];

/// Longest archive; that of 1.17.0 has 8 MB.
const ARCHIVE_LEN_MAX: u64 = 64 << 20;
/// Longest program in it.
const PROGRAM_LEN_MAX: u64 = 64 << 20;

/// A release could not be installed. What was there before is untouched.
#[derive(Debug, Error)]
pub enum FirecrackerError {
    /// No digest is known for it.
    #[error("no digest is known for Firecracker {version} on {arch}")]
    Unpinned {
        /// The version.
        version: String,
        /// The architecture.
        arch: String,
    },
    /// What the config states is no version or no digest.
    #[error("`{text}` is no {what}")]
    Malformed {
        /// What was found.
        text: String,
        /// What it should be.
        what: &'static str,
    },
    /// It could not be downloaded.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The content isn't the release.
    #[error("`{url}` was tampered with or damaged: its sha256 is {found}, it must be {expected}")]
    Digest {
        /// What was asked for.
        url: String,
        /// What it has.
        found: String,
        /// What it must have.
        expected: String,
    },
    /// The archive can't be read.
    #[error("could not unpack `{url}`")]
    Unpack {
        /// What was asked for.
        url: String,
        /// Why not.
        source: TarError,
    },
    /// The archive lacks a program.
    #[error("`{url}` has no `{member}`")]
    Missing {
        /// What was asked for.
        url: String,
        /// What should be in it.
        member: String,
    },
    /// The programs can't be written.
    #[error("could not write `{}`", .path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// A release for one architecture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    version: String,
    arch: String,
    sha256: String,
    base: String,
}

impl Release {
    /// Names a release. Without a digest it must be the one that is known here; `base` is a mirror's address.
    ///
    /// # Errors
    /// When no digest is known, or version or digest are malformed.
    pub fn new(
        version: Option<&str>,
        arch: &str,
        sha256: Option<&str>,
        base: Option<&str>,
    ) -> Result<Self, FirecrackerError> {
        let version = version.unwrap_or(VERSION);
        let malformed = |text: &str, what| FirecrackerError::Malformed { text: text.to_owned(), what };
        let number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        if version.split('.').count() != 3 || !version.split('.').all(number) {
            return Err(malformed(version, "version of Firecracker, such as `1.17.0`"));
        }
        let known = || PINNED.iter().find(|(name, _)| *name == arch && version == VERSION);
        let sha256 = match sha256.or_else(|| known().map(|(_, sha256)| *sha256)) {
            Some(text) if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                text.to_ascii_lowercase()
            }
            Some(text) => return Err(malformed(text, "sha256: that has 64 hex digits")),
            None => {
                return Err(FirecrackerError::Unpinned {
                    version: version.to_owned(),
                    arch: arch.to_owned(),
                });
            }
        };
        let base = base.unwrap_or(RELEASES_URL).trim_end_matches('/').to_owned();
        Ok(Self { version: version.to_owned(), arch: arch.to_owned(), sha256, base })
    }

    /// Returns its version.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Returns where its archive is.
    #[must_use]
    pub fn url(&self) -> String {
        let Self { version, arch, base, .. } = self;
        format!("{base}/v{version}/firecracker-v{version}-{arch}.tgz")
    }

    /// Downloads it and puts its programs into a directory, which is made where it is missing.
    ///
    /// # Errors
    /// When it can't be had, is not what it must be, or can't be written.
    pub async fn install(&self, dir: &Path, sink: Sink<'_>) -> Result<(), FirecrackerError> {
        sink(Progress::Step { label: format!("download Firecracker {}", self.version) });
        let archive = Client::new(None)?.get(&self.url(), ARCHIVE_LEN_MAX, sink).await?;
        let found = hex(Sha256::digest(&archive));
        if found != self.sha256 {
            return Err(FirecrackerError::Digest { url: self.url(), found, expected: self.sha256.clone() });
        }
        let programs = self.unpack(&archive)?;
        let write = |path: &Path| {
            let path = path.to_owned();
            move |source| FirecrackerError::Write { path, source }
        };
        fs::create_dir_all(dir).map_err(write(dir))?;
        for (name, bytes) in programs {
            place(dir, name, &bytes).map_err(write(&dir.join(name)))?;
        }
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(write(dir))
    }

    /// Takes the programs out of the archive; whatever else is in it is passed over.
    fn unpack(&self, archive: &[u8]) -> Result<[(&'static str, Vec<u8>); 2], FirecrackerError> {
        let unpack = |source| FirecrackerError::Unpack { url: self.url(), source };
        let mut reader = TarReader::new(flate2::read::MultiGzDecoder::new(archive));
        let mut programs = PROGRAMS.map(|name| (name, Vec::new()));
        while let Some(entry) = reader.next_entry().map_err(unpack)? {
            for (name, bytes) in &mut programs {
                if entry.kind == Kind::File && entry.path == self.member(name).as_bytes() {
                    *bytes = reader.read_data(PROGRAM_LEN_MAX).map_err(unpack)?;
                }
            }
        }
        match programs.iter().find(|(_, bytes)| bytes.is_empty()) {
            Some((name, _)) => Err(FirecrackerError::Missing { url: self.url(), member: self.member(name) }),
            None => Ok(programs),
        }
    }

    fn member(&self, name: &str) -> String {
        let Self { version, arch, .. } = self;
        format!("release-v{version}-{arch}/{name}-v{version}-{arch}")
    }
}

/// Makes a program visible whole or not at all; one that runs goes on with its old file.
fn place(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    // CRASH: before the rename a `.new-` file is left, which `banger doctor --fix` removes.
    let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(dir)?;
    file.write_all(bytes)?;
    file.as_file().set_permissions(fs::Permissions::from_mode(0o755))?;
    file.as_file().sync_all()?;
    file.persist(dir.join(name))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{PINNED, RELEASES_URL, Release, VERSION};

    #[test]
    fn the_known_release_has_its_digest_and_address() {
        for (arch, sha256) in PINNED {
            let release = Release::new(None, arch, None, None).unwrap();
            assert_eq!(release.sha256, sha256);
            let url = format!("{RELEASES_URL}/v{VERSION}/firecracker-v{VERSION}-{arch}.tgz");
            assert_eq!(release.url(), url);
        }
        let mirror = Release::new(None, "x86_64", None, Some("http://mirror.example/fc/")).unwrap();
        assert_eq!(
            mirror.url(),
            format!("http://mirror.example/fc/v{VERSION}/firecracker-v{VERSION}-x86_64.tgz")
        );
    }

    #[test]
    fn a_release_without_a_digest_is_refused() {
        let text = |version, arch, sha256| Release::new(version, arch, sha256, None).unwrap_err().to_string();
        let hex = "A".repeat(64);
        assert!(Release::new(Some("1.16.2"), "x86_64", Some(&hex), None).is_ok());
        assert_eq!(
            text(Some("1.16.2"), "x86_64", None),
            "no digest is known for Firecracker 1.16.2 on x86_64"
        );
        assert_eq!(
            text(None, "riscv64", None),
            format!("no digest is known for Firecracker {VERSION} on riscv64")
        );
        assert_eq!(text(None, "x86_64", Some("abc")), "`abc` is no sha256: that has 64 hex digits");
        for version in ["", "1.2", "../../1", "1.2.3/..", "v1.2.3"] {
            assert!(text(Some(version), "x86_64", Some(&hex)).contains("is no version"), "{version}");
        }
    }
}
