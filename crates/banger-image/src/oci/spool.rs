//! Archives of images as they arrive: `docker save`, podman's, skopeo's, OCI layouts in a tar.
//!
//! The manifest may come last, and the archive may be a pipe, so its files are put aside first: under numbers, in a
//! directory of ours, hashed on the way. What the archive calls them is a key of a map and never a path.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::digest::Digest;
use super::limits::Limits;
use super::stream::{FILE_BUFFER, StreamError, open};
use crate::hash::{Algorithm, Hasher};
use crate::tar::{Kind, TarError, TarReader, clean_path};

/// Files of one archive; two for each layer and a few for each image are usual.
const MEMBERS_MAX: usize = 20_000;
/// Bytes copied at a time.
const CHUNK: usize = 256 << 10;

/// An archive can't be read.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// Its bytes.
    #[error("could not read the archive")]
    Stream(#[from] StreamError),
    /// Its entries.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// An entry that no image has.
    #[error("entry `{}` of the archive can't be used: {reason}", .name.escape_ascii())]
    Member {
        /// Its name.
        name: Vec<u8>,
        /// Why not.
        reason: &'static str,
    },
    /// More entries than images have.
    #[error("the archive has more than {MEMBERS_MAX} entries")]
    Members,
    /// A file can't be put aside.
    #[error("could not write `{}`", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// A file of an archive, put aside.
#[derive(Debug, Clone)]
pub(super) struct Member {
    pub(super) path: PathBuf,
    pub(super) size: u64,
    pub(super) digest: Digest,
}

#[derive(Debug)]
enum Named {
    File(Member),
    /// Docker once wrote a layer that two images share as a link.
    Link(String),
}

/// The files of an archive. They are the caller's directory's, and go with it.
#[derive(Debug)]
pub struct Archive {
    members: BTreeMap<String, Named>,
}

impl Archive {
    /// Puts the files of an archive aside in `dir`, which exists. It may be compressed. Blocks; `cancelled` ends it.
    pub fn spool(
        input: &mut dyn Read,
        dir: &Path,
        limits: &Limits,
        cancelled: &AtomicBool,
    ) -> Result<Self, SpoolError> {
        let compressed = AtomicU64::new(0);
        let counted = Counted { inner: input, count: &compressed };
        let bounded = Bounded {
            inner: open(BufReader::with_capacity(FILE_BUFFER, counted))?,
            compressed: &compressed,
            unpacked: 0,
            limits,
            cancelled,
        };
        let mut reader = TarReader::new(bounded);
        let mut members = BTreeMap::new();
        while let Some(entry) = reader.next_entry()? {
            let bad = |reason| SpoolError::Member { name: entry.path.clone(), reason };
            if members.len() == MEMBERS_MAX {
                return Err(SpoolError::Members);
            }
            let name = String::from_utf8(entry.path.clone()).map_err(|_| bad("its name is not UTF-8"))?;
            let named = match entry.kind {
                Kind::Directory => continue,
                Kind::File => {
                    let path = dir.join(members.len().to_string());
                    let copied = copy(&mut reader, &path)?;
                    Named::File(copied)
                }
                Kind::Symlink => Named::Link(
                    link_target(&entry.path, &entry.link)
                        .ok_or_else(|| bad("its link leads out of the archive"))?,
                ),
                _ => return Err(bad("it is neither a file, a directory nor a symbolic link")),
            };
            if members.insert(name, named).is_some() {
                return Err(bad("it is there twice"));
            }
        }
        reader.drain()?;
        Ok(Self { members })
    }

    /// Finds a file by its name; one link is followed.
    pub(super) fn member(&self, name: &str) -> Option<&Member> {
        match self.members.get(name)? {
            Named::File(member) => Some(member),
            Named::Link(target) => match self.members.get(target)? {
                Named::File(member) => Some(member),
                Named::Link(_) => None,
            },
        }
    }
}

fn copy(reader: &mut dyn Read, path: &Path) -> Result<Member, SpoolError> {
    let failed = |source| SpoolError::Write { path: path.to_owned(), source };
    let mut file = File::create_new(path).map_err(failed)?;
    let (mut hash, mut size, mut chunk) = (Hasher::new(Algorithm::Sha256), 0, vec![0; CHUNK]);
    loop {
        let got = match reader.read(&mut chunk) {
            Ok(0) => break,
            Ok(got) => got,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
            Err(err) => return Err(TarError::Read(err).into()),
        };
        file.write_all(&chunk[..got]).map_err(failed)?;
        hash.update(&chunk[..got]);
        size += got as u64;
    }
    Ok(Member { path: path.to_owned(), size, digest: hash.into() })
}

/// Where a link of the archive leads, as a name of the archive; none when that is outside.
fn link_target(name: &[u8], link: &[u8]) -> Option<String> {
    let mut parts: Vec<&[u8]> = name.split(|byte| *byte == b'/').collect();
    parts.pop();
    for part in link.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    let clean = clean_path(&parts.join(&b'/')).ok()?;
    (!link.starts_with(b"/")).then(|| String::from_utf8(clean).ok())?
}

struct Counted<'a> {
    inner: &'a mut dyn Read,
    count: &'a AtomicU64,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.count.fetch_add(got as u64, Ordering::Relaxed);
        Ok(got)
    }
}

/// Ends an archive that unpacks to too much, or that nobody waits for.
struct Bounded<'a> {
    inner: Box<dyn Read + 'a>,
    compressed: &'a AtomicU64,
    unpacked: u64,
    limits: &'a Limits,
    cancelled: &'a AtomicBool,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(io::Error::other(StreamError::Interrupted));
        }
        let got = self.inner.read(buffer)?;
        self.unpacked += got as u64;
        if self.unpacked > self.limits.unpacked_bytes {
            return Err(io::Error::other(StreamError::TooLarge(self.limits.unpacked_bytes)));
        }
        let (compressed, ratio) = (self.compressed.load(Ordering::Relaxed), self.limits.ratio);
        if self.unpacked > self.limits.ratio_free_bytes && self.unpacked > compressed.saturating_mul(ratio) {
            return Err(io::Error::other(StreamError::Ratio { ratio, compressed }));
        }
        Ok(got)
    }
}
