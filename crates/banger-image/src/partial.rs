//! Files that are being downloaded, and their hashes.
//!
//! What has arrived is kept under the digest it must have in the end, and continued by the next try or the next process.
//! Two processes never write the same file: the second one takes another name.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

use crate::hash::{Algorithm, Hasher};

/// A download on its way: the file, its length and the hash so far.
#[derive(Debug)]
pub(crate) struct Partial {
    path: PathBuf,
    file: File,
    length: u64,
    hash: Hasher,
}

impl Partial {
    /// Opens the partial file of that sha256, or a private one while another process writes it.
    pub(crate) fn open(dir: &Path, sha256: &str) -> io::Result<Self> {
        Self::open_as(Algorithm::Sha256, dir, sha256)
    }

    /// Opens the partial file of the digest with these digits.
    pub(crate) fn open_as(algorithm: Algorithm, dir: &Path, hex: &str) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        for n in 0u32.. {
            let path = if n == 0 { dir.join(hex) } else { dir.join(format!("{hex}.{n}")) };
            let file = File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            // Another process may have published this file between our open and our lock.
            if !is_same_file(&file, &path) {
                continue;
            }
            let mut part = Self { path, file, length: 0, hash: Hasher::new(algorithm) };
            part.rehash()?;
            return Ok(part);
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Returns how many bytes are there.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Returns the digits of the digest of what is there.
    pub(crate) fn digest(&self) -> String {
        self.hash.clone().finish()
    }

    /// Returns where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn rehash(&mut self) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(0))?;
        self.hash = Hasher::new(self.hash.algorithm());
        self.length = io::copy(&mut self.file, &mut HashWriter(&mut self.hash))?;
        Ok(())
    }

    /// Forgets what is there.
    pub(crate) fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.rehash()
    }

    /// Adds bytes that arrived.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hash.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Gives the whole file its final name.
    pub(crate) fn publish(self, path: &Path) -> io::Result<()> {
        // No fsync: after a crash the hash decides whether the content is there.
        fs::rename(&self.path, path)
    }

    /// Removes what is no beginning of the file.
    pub(crate) fn discard(&self) {
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

struct HashWriter<'a>(&'a mut Hasher);

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
pub(crate) fn hash_file(reader: &mut dyn Read) -> io::Result<String> {
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
pub(crate) fn hex(bytes: impl AsRef<[u8]>) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |n: u8| char::from(DIGITS[usize::from(n)]);
    bytes.as_ref().iter().flat_map(|b| [digit(b >> 4), digit(b & 15)]).collect()
}
