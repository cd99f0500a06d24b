//! A small tar reader for the archives inside Debian packages.
//!
//! Packages need two things a general reader doesn't give: plain blocking reads, so that many packages unpack in parallel
//! on ordinary threads, and every entry's name before its data, because the package database lists and filters them.
//! ustar, GNU long names and the PAX records that dpkg accepts are understood; anything else is an error, not a guess.

use std::io::{self, Read};

use thiserror::Error;

const BLOCK: usize = 512;
/// The longest file name or link target accepted; Linux has the same limit.
const NAME_MAX: u64 = 4096;
/// The longest PAX header accepted.
const PAX_MAX: u64 = 64 << 10;

/// An archive can't be read.
#[derive(Debug, Error)]
pub enum TarError {
    /// Reading or decompressing failed.
    #[error("could not read the archive")]
    Read(#[source] io::Error),
    /// It isn't a well-formed tar archive.
    #[error("damaged archive: {0}")]
    Damaged(&'static str),
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file with data.
    File,
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
    /// Bytes of data.
    pub size: u64,
    /// Device number.
    pub device: (u32, u32),
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

/// What long-name and PAX entries say of the next entry.
#[derive(Default)]
struct Overrides {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    mtime: Option<i64>,
    uid: Option<u64>,
    gid: Option<u64>,
}

impl<R: Read> TarReader<R> {
    /// Starts reading an archive.
    pub fn new(inner: R) -> Self {
        Self { inner, remaining: 0, padding: 0 }
    }

    /// Skips what is left of the current entry and reads the next header; `None` at the end of the archive.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut overrides = Overrides::default();
        loop {
            self.skip()?;
            let mut header = [0; BLOCK];
            self.inner.read_exact(&mut header).map_err(TarError::Read)?;
            if header.iter().all(|b| *b == 0) {
                return Ok(None);
            }
            check_sum(&header)?;
            let size = number(&header[124..136])?;
            let kind = header[156];
            match kind {
                b'L' | b'K' => {
                    let mut name = self.extension(size, NAME_MAX)?;
                    name.truncate(name.iter().position(|b| *b == 0).unwrap_or(name.len()));
                    let slot = if kind == b'L' { &mut overrides.path } else { &mut overrides.link };
                    *slot = Some(name);
                }
                b'x' => parse_pax(&self.extension(size, PAX_MAX)?, &mut overrides)?,
                b'g' => drop(self.extension(size, PAX_MAX)?),
                _ => {
                    let entry = build_entry(&header, size, overrides)?;
                    self.begin(entry.size);
                    return Ok(Some(entry));
                }
            }
        }
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
        (self.remaining, self.padding) = (0, 0);
        if skipped == rest { Ok(()) } else { Err(TarError::Damaged("it is truncated")) }
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
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.remaining -= got as u64;
        Ok(got)
    }
}

fn check_sum(header: &[u8; BLOCK]) -> Result<(), TarError> {
    let sum: u64 = header
        .iter()
        .enumerate()
        .map(|(at, b)| if (148..156).contains(&at) { 32 } else { u64::from(*b) })
        .sum();
    if number(&header[148..156])? == sum {
        Ok(())
    } else {
        Err(TarError::Damaged("a header's checksum is wrong"))
    }
}

/// Parses an octal field, or GNU's base-256 form for numbers that don't fit.
fn number(field: &[u8]) -> Result<u64, TarError> {
    const BAD: TarError = TarError::Damaged("a header has a number that can't be read");
    match field {
        [0x80, rest @ ..] => {
            rest.iter().try_fold(0u64, |n, b| n.checked_mul(256)?.checked_add(u64::from(*b))).ok_or(BAD)
        }
        _ => {
            let text = std::str::from_utf8(field).map_err(|_| BAD)?.trim_matches([' ', '\0']);
            if text.is_empty() { Ok(0) } else { u64::from_str_radix(text, 8).map_err(|_| BAD) }
        }
    }
}

fn text(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|b| *b == 0).unwrap_or(field.len())]
}

fn build_entry(header: &[u8; BLOCK], size: u64, overrides: Overrides) -> Result<Entry, TarError> {
    let kind = match header[156] {
        b'0' | 0 | b'7' => Kind::File,
        b'1' => Kind::HardLink,
        b'2' => Kind::Symlink,
        b'3' => Kind::CharDevice,
        b'4' => Kind::BlockDevice,
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        _ => return Err(TarError::Damaged("an entry has an unknown type")),
    };
    let mut name = text(&header[..100]).to_vec();
    // In the POSIX form (not GNU's older one) the field behind holds the leading part of the name.
    if &header[257..263] == b"ustar\0" && header[345] != 0 {
        name = [text(&header[345..500]), b"/", &name].concat();
    }
    let narrow =
        |n: u64| u32::try_from(n).map_err(|_| TarError::Damaged("an owner or device number is too large"));
    let size = if kind == Kind::File { overrides.size.unwrap_or(size) } else { 0 };
    if size > i64::MAX as u64 {
        return Err(TarError::Damaged("an entry is too large"));
    }
    let mtime = match overrides.mtime {
        Some(mtime) => mtime,
        None => i64::try_from(number(&header[136..148])?).unwrap_or(0),
    };
    Ok(Entry {
        path: clean_path(&overrides.path.unwrap_or(name))?,
        link: overrides.link.unwrap_or_else(|| text(&header[157..257]).to_vec()),
        kind,
        mode: (number(&header[100..108])? & 0o7777) as u32,
        uid: narrow(overrides.uid.map_or_else(|| number(&header[108..116]), Ok)?)?,
        gid: narrow(overrides.gid.map_or_else(|| number(&header[116..124]), Ok)?)?,
        mtime,
        size,
        device: (narrow(number(&header[329..337])?)?, narrow(number(&header[337..345])?)?),
    })
}

/// Brings a path to the form `a/b`; one that leaves the archive is an error.
pub fn clean_path(path: &[u8]) -> Result<Vec<u8>, TarError> {
    let mut clean: Vec<u8> = Vec::with_capacity(path.len());
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(TarError::Damaged("a path contains `..`")),
            _ if part.contains(&0) => return Err(TarError::Damaged("a path contains a zero byte")),
            _ => {
                if !clean.is_empty() {
                    clean.push(b'/');
                }
                clean.extend_from_slice(part);
            }
        }
    }
    if clean.len() as u64 > NAME_MAX {
        return Err(TarError::Damaged("a path is too long"));
    }
    Ok(clean)
}

fn parse_pax(mut data: &[u8], overrides: &mut Overrides) -> Result<(), TarError> {
    const BAD: TarError = TarError::Damaged("an extended header can't be read");
    while !data.is_empty() {
        let space = data.iter().take(8).position(|b| *b == b' ').ok_or(BAD)?;
        let length: usize =
            std::str::from_utf8(&data[..space]).ok().and_then(|n| n.parse().ok()).ok_or(BAD)?;
        // The length counts itself, the blank and the newline.
        let record = data.get(space + 1..length).and_then(|r| r.strip_suffix(b"\n")).ok_or(BAD)?;
        data = &data[length..];
        let equals = record.iter().position(|b| *b == b'=').ok_or(BAD)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        let digits = || std::str::from_utf8(value).ok().and_then(|v| v.split('.').next()).unwrap_or("");
        match key {
            b"path" => overrides.path = Some(value.to_vec()),
            b"linkpath" => overrides.link = Some(value.to_vec()),
            b"size" => overrides.size = Some(digits().parse().map_err(|_| BAD)?),
            b"mtime" => overrides.mtime = Some(digits().parse().map_err(|_| BAD)?),
            b"uid" => overrides.uid = Some(digits().parse().map_err(|_| BAD)?),
            b"gid" => overrides.gid = Some(digits().parse().map_err(|_| BAD)?),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Builds an entry's bytes for tests, with a correct checksum.
    pub(crate) fn entry(path: &str, kind: u8, mode: u32, link: &str, data: &[u8]) -> Vec<u8> {
        let mut header = [0u8; BLOCK];
        header[..path.len()].copy_from_slice(path.as_bytes());
        header[100..107].copy_from_slice(format!("{mode:07o}").as_bytes());
        header[124..135].copy_from_slice(format!("{:011o}", data.len()).as_bytes());
        header[136..147].copy_from_slice(b"00000000052");
        header[156] = kind;
        header[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header[257..265].copy_from_slice(b"ustar  \0");
        seal(&mut header);
        let mut out = header.to_vec();
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(BLOCK), 0);
        out
    }

    fn seal(header: &mut [u8]) {
        header[148..156].fill(b' ');
        let sum: u32 = header[..BLOCK].iter().map(|b| u32::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }

    /// Ends an archive.
    pub(crate) fn end(mut tar: Vec<u8>) -> Vec<u8> {
        tar.resize(tar.len() + 2 * BLOCK, 0);
        tar
    }

    fn read_all(tar: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
        let mut reader = TarReader::new(tar);
        let mut out = Vec::new();
        while let Some(entry) = reader.next_entry()? {
            let data = reader.read_data(1 << 20)?;
            out.push((entry, data));
        }
        Ok(out)
    }

    #[test]
    fn reads_what_packages_contain() {
        let long = format!("./usr/share/{}", "x".repeat(200));
        let tar = [
            entry("./", b'5', 0o755, "", b""),
            entry("./usr/bin/x", b'0', 0o4755, "", b"hello"),
            entry("./usr/bin/y", b'2', 0o777, "x", b""),
            entry("./usr/bin/z", b'1', 0o644, "./usr/bin/x", b""),
            entry("././@LongLink", b'L', 0, "", format!("{long}\0").as_bytes()),
            entry("short", b'0', 0o644, "", b"long"),
            entry("pax", b'x', 0, "", b"16 path=a/b/c/d\n20 mtime=1700000000.5\n"[..38].into()),
        ]
        .concat();
        // The second record's length is wrong on purpose: it must be an error, not a guess.
        assert!(read_all(&end(tar.clone())).is_err());
        let pax = b"16 path=a/b/c/d\n22 mtime=1700000000.5\n";
        let tar = [
            &tar[..tar.len() - 2 * BLOCK],
            &entry("pax", b'x', 0, "", pax),
            &entry("q", b'0', 0o600, "", b""),
        ]
        .concat();
        let found = read_all(&end(tar)).unwrap();
        assert_eq!(found[0].0.path, b"");
        assert_eq!(found[1].0.path, b"usr/bin/x");
        assert_eq!((found[1].0.mode, found[1].0.mtime, &found[1].1[..]), (0o4755, 42, &b"hello"[..]));
        assert_eq!((found[2].0.kind, &found[2].0.link[..]), (Kind::Symlink, &b"x"[..]));
        assert_eq!(found[3].0.kind, Kind::HardLink);
        assert_eq!(found[4].0.path, &long.as_bytes()[2..]);
        assert_eq!((&found[5].0.path[..], found[5].0.mtime), (&b"a/b/c/d"[..], 1_700_000_000));
    }

    #[test]
    fn refuses_damage() {
        let good = end(entry("a", b'0', 0o644, "", b"data"));
        assert!(read_all(&good).is_ok());
        let mut flipped = good.clone();
        flipped[0] ^= 1;
        assert!(read_all(&flipped).is_err());
        for cut in [1, 511, 513, 700, 1024] {
            assert!(read_all(&good[..cut]).is_err(), "{cut}");
        }
        for path in ["../x", "a/../../b", "/.."] {
            assert!(read_all(&end(entry(path, b'0', 0o644, "", b""))).is_err(), "{path}");
        }
        assert!(read_all(&end(entry("a", b'Z', 0o644, "", b""))).is_err());
        let mut huge = entry("a", b'0', 0o644, "", b"");
        huge[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        seal(&mut huge);
        assert!(read_all(&end(huge)).is_err());
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let _ = read_all(&bytes);
        }

        #[test]
        fn random_pax_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_pax(&bytes, &mut Overrides::default());
        }
    }
}
