//! A tar reader for what comes from outside: Debian packages and image layers.
//!
//! Both need what a general reader doesn't give: plain blocking reads, so that archives unpack on ordinary threads beside
//! their decompressors, and every entry's header before its data, because the caller decides where it goes. ustar, GNU and
//! PAX are understood, sparse files in all four forms; anything else is an error, not a guess. PAX records are taken by
//! their length, never by line: a value may contain a newline.
//!
//! The reader never touches a file, and holds no more than one header of bounded size in memory.

mod header;
mod pax;
mod sparse;

use std::io::{self, Read};

use pax::Overrides;
use thiserror::Error;

pub use header::clean_path;

const BLOCK: usize = 512;
/// The longest file name or link target accepted; Linux has the same limit.
const NAME_MAX: u64 = 4096;
/// The longest PAX header accepted. One attribute may have 64 KiB, and an entry several.
const PAX_MAX: u64 = 1 << 20;
/// Extension headers in front of one entry; three are usual.
const EXTENSIONS_MAX: u32 = 16;

/// An archive can't be read.
#[derive(Debug, Error)]
pub enum TarError {
    /// Reading or decompressing failed.
    #[error("could not read the archive")]
    Read(#[source] io::Error),
    /// It isn't a well-formed tar archive.
    #[error("damaged archive: {0}")]
    Damaged(&'static str),
    /// One of its entries isn't acceptable.
    #[error("damaged archive: entry `{}`: {reason}", .name.escape_ascii())]
    Entry {
        /// The name as it is in the archive.
        name: Vec<u8>,
        /// What is wrong.
        reason: &'static str,
    },
}

impl TarError {
    /// Says which entry is meant.
    fn of(self, name: &[u8]) -> Self {
        match self {
            Self::Damaged(reason) => Self::Entry { name: name.to_vec(), reason },
            other => other,
        }
    }
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file with data.
    File,
    /// A regular file with holes: its data are the segments, one after another.
    SparseFile,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// Another name of an earlier entry.
    HardLink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A fifo.
    Fifo,
}

/// A part of a sparse file that has data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it is in the file.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
}

/// The header of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path without a leading `./` and without slashes at either end; empty for the root.
    pub path: Vec<u8>,
    /// Target of a link, as written.
    pub link: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: i64,
    /// And nanoseconds.
    pub mtime_nanos: u32,
    /// Length of a file, with its holes.
    pub size: u64,
    /// The parts of a sparse file that have data, in order.
    pub segments: Vec<Segment>,
    /// Device number.
    pub device: (u32, u32),
    /// Extended attributes by full name, sorted.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads entries one after another; between two calls of `next_entry`, reading it gives the entry's data.
#[derive(Debug)]
pub struct TarReader<R> {
    inner: R,
    /// Bytes of the entry's data not yet read.
    remaining: u64,
    /// Bytes that fill its last block.
    padding: u64,
}

impl<R: Read> TarReader<R> {
    /// Starts reading an archive.
    pub fn new(inner: R) -> Self {
        Self { inner, remaining: 0, padding: 0 }
    }

    /// Skips what is left of the current entry and reads the next header; `None` at the end of the archive.
    ///
    /// An archive may end without its closing zeroes and those of its last block, as some tools write it. Whoever must know that nothing is missing has
    /// a digest of the whole.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut overrides = Overrides::default();
        for _ in 0..EXTENSIONS_MAX {
            self.skip()?;
            let Some(header) = self.header()? else { return Ok(None) };
            header::check_sum(&header)?;
            let size = header::number(&header[124..136])?;
            match header[156] {
                kind @ (b'L' | b'K') => {
                    let mut name = self.extension(size, NAME_MAX)?;
                    name.truncate(name.iter().position(|b| *b == 0).unwrap_or(name.len()));
                    let slot = if kind == b'L' { &mut overrides.path } else { &mut overrides.link };
                    *slot = Some(name);
                }
                b'x' => overrides.parse(&self.extension(size, PAX_MAX)?)?,
                b'g' => drop(self.extension(size, PAX_MAX)?),
                _ => return self.entry(&header, size, overrides).map(Some),
            }
        }
        Err(TarError::Damaged("too many extended headers in a row"))
    }

    /// Reads the whole data of the current entry, which must not be larger than `limit`.
    pub fn read_data(&mut self, limit: u64) -> Result<Vec<u8>, TarError> {
        if self.remaining > limit {
            return Err(TarError::Damaged("an entry is too large"));
        }
        let mut data = Vec::with_capacity(usize::try_from(self.remaining).unwrap_or(0));
        self.read_to_end(&mut data).map_err(TarError::Read)?;
        Ok(data)
    }

    /// Reads everything up to the end, so that the checks of a decompressor below run too.
    pub fn drain(mut self) -> Result<(), TarError> {
        self.remaining = 0;
        io::copy(&mut self.inner, &mut io::sink()).map_err(TarError::Read).map(drop)
    }

    /// Returns what the archive was read from.
    pub fn into_inner(self) -> R {
        self.inner
    }

    /// Reads a header; `None` at the end.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut header = [0; BLOCK];
        let mut got = 0;
        while got < BLOCK {
            match self.inner.read(&mut header[got..]) {
                Ok(0) if got == 0 => return Ok(None),
                Ok(0) => return Err(TarError::Damaged("it is truncated")),
                Ok(count) => got += count,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(TarError::Read(err)),
            }
        }
        Ok(header.iter().any(|b| *b != 0).then_some(header))
    }

    fn entry(
        &mut self,
        header: &[u8; BLOCK],
        size: u64,
        mut overrides: Overrides,
    ) -> Result<Entry, TarError> {
        let name = overrides.path.clone().unwrap_or_else(|| header::name(header));
        let sparse = overrides.sparse.take();
        let mut entry = header::entry(header, size, overrides).map_err(|err| err.of(&name))?;
        self.begin(entry.size);
        if header[156] == b'S' {
            let map = sparse::read_gnu(header, &mut self.inner).map_err(|err| err.of(&name))?;
            map.apply(&mut entry, self.remaining).map_err(|err| err.of(&name))?;
        } else if let Some(sparse) = sparse.filter(|_| entry.kind == Kind::File) {
            let map = sparse.finish(self).map_err(|err| err.of(&name))?;
            map.apply(&mut entry, self.remaining).map_err(|err| err.of(&name))?;
        }
        Ok(entry)
    }

    fn begin(&mut self, size: u64) {
        self.remaining = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
    }

    fn extension(&mut self, size: u64, limit: u64) -> Result<Vec<u8>, TarError> {
        if size > limit {
            return Err(TarError::Damaged("a long name or extended header is too long"));
        }
        self.begin(size);
        self.read_data(limit)
    }

    fn skip(&mut self) -> Result<(), TarError> {
        let rest = self.remaining + self.padding;
        let skipped =
            io::copy(&mut self.inner.by_ref().take(rest), &mut io::sink()).map_err(TarError::Read)?;
        // `umoci insert` leaves the zeroes out that should fill the last block, and other readers do not miss them.
        let wanted = self.remaining;
        (self.remaining, self.padding) = (0, 0);
        if skipped >= wanted { Ok(()) } else { Err(TarError::Damaged("it is truncated")) }
    }
}

impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = buffer.len().min(usize::try_from(self.remaining).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        let got = self.inner.read(&mut buffer[..want])?;
        if got == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the archive is truncated"));
        }
        self.remaining -= got as u64;
        Ok(got)
    }
}

#[cfg(test)]
pub(crate) mod tests;
