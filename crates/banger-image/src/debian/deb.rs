//! Opening a .deb: an `ar` archive of a version, a control archive and a data archive.
//!
//! The file's digest was checked before, but who built it is still not us: members, sizes and what they unpack to are
//! bounded, and everything is read in place without temporary files.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flate2::read::MultiGzDecoder;
use lzma_rust2::XzReader;
use thiserror::Error;

use crate::tar::{Kind, TarError, TarReader};

const AR_MAGIC: &[u8; 8] = b"!<arch>\n";
const AR_HEADER: usize = 60;
/// Members looked at; a .deb has three, vendors add one or two.
const MEMBERS_MAX: usize = 16;
/// The most a control archive may unpack to; the archive's largest is below 4 MiB.
const CONTROL_MAX: u64 = 32 << 20;
/// The most a data archive may unpack to; the largest package of the archive is below 3 GiB.
const DATA_MAX: u64 = 8 << 30;
/// Memory the xz decoder may use, in KiB; `xz -9` needs 64 MiB.
const XZ_MEMORY_KIB: u32 = 192 << 10;
/// The largest zstd window accepted, as a power of two; dpkg writes at most 128 MiB.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// A package file can't be read.
#[derive(Debug, Error)]
pub enum DebError {
    /// The file can't be opened or read.
    #[error("could not read `{}`", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It isn't a package.
    #[error("`{}` is not a Debian package: {reason}", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
    /// One of its archives is damaged.
    #[error("could not unpack `{}`", .path.display())]
    Archive {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: TarError,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Xz,
    Zstd,
}

#[derive(Debug, Clone, Copy)]
struct Member {
    compression: Compression,
    start: u64,
    end: u64,
}

/// An opened package file.
#[derive(Debug)]
pub struct Deb {
    path: PathBuf,
    file: Arc<File>,
    control: Member,
    data: Member,
}

/// A file of the control archive: `control`, `conffiles`, `postinst` and so on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlFile {
    /// Its name, without a directory.
    pub name: String,
    /// Whether it is executable: a maintainer script.
    pub executable: bool,
    /// Its content.
    pub data: Vec<u8>,
}

impl Deb {
    /// Opens a package and finds its members.
    pub fn open(path: &Path) -> Result<Self, DebError> {
        let read = |source| DebError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(read)?;
        let size = file.metadata().map_err(read)?.len();
        let bad = |reason| DebError::Format { path: path.to_owned(), reason };
        let mut magic = [0; AR_MAGIC.len()];
        file.read_exact_at(&mut magic, 0).map_err(|_| bad("it is too short"))?;
        if magic != *AR_MAGIC {
            return Err(bad("it is not an ar archive"));
        }
        let (mut control, mut data, mut versioned) = (None, None, false);
        let mut at = AR_MAGIC.len() as u64;
        for _ in 0..MEMBERS_MAX {
            let mut header = [0; AR_HEADER];
            if at + AR_HEADER as u64 > size {
                break;
            }
            file.read_exact_at(&mut header, at).map_err(read)?;
            let (name, length) = parse_header(&header).ok_or(bad("a member's header is damaged"))?;
            let start = at + AR_HEADER as u64;
            let end = start.checked_add(length).filter(|end| *end <= size).ok_or(bad("it is truncated"))?;
            let member = |compression| Some(Member { compression, start, end });
            match name.split_once('.').map_or((name.as_str(), ""), |(stem, rest)| (stem, rest)) {
                ("debian-binary", "") => {
                    let mut version = [0; 2];
                    file.read_exact_at(&mut version, start).map_err(read)?;
                    if length < 4 || &version != b"2." {
                        return Err(bad("it has an unknown format version"));
                    }
                    versioned = true;
                }
                (stem @ ("control" | "data"), kind) => {
                    let compression = compression(kind).ok_or(bad("it uses an unknown compression"))?;
                    let slot = if stem == "control" { &mut control } else { &mut data };
                    if slot.is_some() {
                        return Err(bad("it has a member twice"));
                    }
                    *slot = member(compression);
                }
                // dpkg skips members whose name starts with an underscore and refuses others.
                _ if name.starts_with('_') => {}
                _ => return Err(bad("it has an unknown member")),
            }
            at = end + (length & 1);
        }
        match (versioned, control, data) {
            (true, Some(control), Some(data)) => {
                Ok(Self { path: path.to_owned(), file: Arc::new(file), control, data })
            }
            _ => Err(bad("a member is missing")),
        }
    }

    /// Returns the path it was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads all files of the control archive.
    pub fn control(&self) -> Result<Vec<ControlFile>, DebError> {
        let archive = |source| DebError::Archive { path: self.path.clone(), source };
        let mut reader = TarReader::new(self.member(self.control, CONTROL_MAX));
        let mut files = Vec::new();
        while let Some(entry) = reader.next_entry().map_err(archive)? {
            if entry.kind != Kind::File {
                continue;
            }
            let name = String::from_utf8(entry.path)
                .ok()
                .filter(|name| !name.contains('/') && !name.is_empty())
                .ok_or(archive(TarError::Damaged("a control file has an odd name")))?;
            let data = reader.read_data(CONTROL_MAX).map_err(archive)?;
            files.push(ControlFile { name, executable: entry.mode & 0o111 != 0, data });
        }
        reader.drain().map_err(archive)?;
        Ok(files)
    }

    /// Starts reading the data archive, decompressed.
    pub fn data(&self) -> impl Read + Send + use<> {
        self.member(self.data, DATA_MAX)
    }

    fn member(&self, member: Member, limit: u64) -> Bounded {
        let section = Section { file: Arc::clone(&self.file), at: member.start, end: member.end };
        let section = BufReader::with_capacity(128 << 10, section);
        let inner: Box<dyn Read + Send> = match member.compression {
            Compression::None => Box::new(section),
            Compression::Gzip => Box::new(MultiGzDecoder::new(section)),
            Compression::Xz => Box::new(XzReader::new_mem_limit(section, true, XZ_MEMORY_KIB)),
            Compression::Zstd => match zstd::stream::read::Decoder::with_buffer(section) {
                Ok(mut decoder) => match decoder.window_log_max(ZSTD_WINDOW_LOG_MAX) {
                    Ok(()) => Box::new(decoder),
                    Err(err) => Box::new(Broken(Some(err))),
                },
                Err(err) => Box::new(Broken(Some(err))),
            },
        };
        Bounded { inner, left: limit }
    }
}

fn compression(kind: &str) -> Option<Compression> {
    match kind {
        "tar" => Some(Compression::None),
        "tar.gz" => Some(Compression::Gzip),
        "tar.xz" => Some(Compression::Xz),
        "tar.zst" => Some(Compression::Zstd),
        _ => None,
    }
}

fn parse_header(header: &[u8; AR_HEADER]) -> Option<(String, u64)> {
    if &header[58..60] != b"`\n" {
        return None;
    }
    let name = std::str::from_utf8(&header[..16]).ok()?.trim_end().trim_end_matches('/');
    let size = std::str::from_utf8(&header[48..58]).ok()?.trim_end().parse().ok()?;
    Some((name.to_owned(), size))
}

/// A range of a file that doesn't share a position with other readers of it.
#[derive(Debug)]
struct Section {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let want = buffer.len().min(left);
        let got = self.file.read_at(&mut buffer[..want], self.at)?;
        self.at += got as u64;
        Ok(got)
    }
}

/// Fails, rather than ends, when more than the limit is read.
struct Bounded {
    inner: Box<dyn Read + Send>,
    left: u64,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.left = self.left.checked_sub(got as u64).ok_or_else(|| {
            io::Error::new(io::ErrorKind::FileTooLarge, "it unpacks to more than is allowed")
        })?;
        Ok(got)
    }
}

/// A decoder that could not be made: reports why on the first read.
struct Broken(Option<io::Error>);

impl Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(self.0.take().unwrap_or_else(|| io::ErrorKind::InvalidData.into()))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;
    use crate::tar::tests::{end, entry};

    fn ar_member(name: &str, data: &[u8]) -> Vec<u8> {
        let mut out =
            format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, "100644", data.len()).into_bytes();
        out.extend_from_slice(data);
        if data.len() % 2 == 1 {
            out.push(b'\n');
        }
        out
    }

    /// Builds a package file for tests from its control files and the entries of its data archive.
    pub(crate) fn build(control: &[(&str, &str)], data: Vec<Vec<u8>>) -> Vec<u8> {
        let control = control
            .iter()
            .map(|(name, text)| entry(&format!("./{name}"), b'0', 0o755, "", text.as_bytes()))
            .collect::<Vec<_>>();
        let data = zstd::stream::encode_all(&end(data.concat())[..], 1).unwrap();
        [
            AR_MAGIC.to_vec(),
            ar_member("debian-binary", b"2.0\n"),
            ar_member("control.tar.gz", &gzip(&end(control.concat()))),
            ar_member("data.tar.zst", &data),
        ]
        .concat()
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn open(bytes: &[u8]) -> Result<Deb, DebError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.deb");
        std::fs::write(&path, bytes).unwrap();
        Deb::open(&path)
    }

    #[test]
    fn reads_control_and_data() {
        let deb = open(&build(&[("control", "Package: x\n")], vec![entry("./f", b'0', 0o644, "", b"text")]))
            .unwrap();
        let control = deb.control().unwrap();
        assert_eq!((control[0].name.as_str(), control[0].data.as_slice()), ("control", &b"Package: x\n"[..]));
        let mut reader = TarReader::new(deb.data());
        assert_eq!(reader.next_entry().unwrap().unwrap().path, b"f");
        assert_eq!(reader.read_data(10).unwrap(), b"text");
        assert!(reader.next_entry().unwrap().is_none());
    }

    #[test]
    fn refuses_damaged_containers() {
        let good = build(&[("control", "Package: x\n")], vec![]);
        for cut in [0, 7, 8, 50, 68, 72, 100, good.len() - 20] {
            assert!(open(&good[..cut]).is_err(), "{cut}");
        }
        let swap = |from: &str, to: &str| {
            let at = good.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
            let mut bytes = good.clone();
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
            open(&bytes)
        };
        assert!(swap("!<arch>", "!<ARCH>").is_err());
        assert!(swap("2.0\n", "3.0\n").is_err());
        assert!(swap("data.tar.zst", "data.tar.bz2").is_err());
        assert!(swap("data.tar.zst", "evil.tar.zst").is_err());
        assert!(swap("data.tar.zst    ", "control.tar.zst ").is_err());
        assert!(swap("`\n", "xx").is_err());
    }

    #[test]
    fn refuses_control_files_with_directories() {
        let deb = open(&build(&[("a/control", "x")], vec![])).unwrap();
        assert!(deb.control().is_err());
    }

    #[test]
    fn bounds_what_it_unpacks() {
        let mut reader = Bounded { inner: Box::new(io::repeat(0)), left: 1000 };
        let err = io::copy(&mut reader, &mut io::sink()).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::FileTooLarge);
    }

    proptest! {
        #[test]
        fn damaged_packages_never_panic(at in 8usize..600, value in any::<u8>()) {
            let mut bytes = build(&[("control", "Package: x\n")], vec![entry("./f", b'0', 0o644, "", b"text")]);
            let at = at % bytes.len();
            bytes[at] = value;
            if let Ok(deb) = open(&bytes) {
                let _ = deb.control();
                let _ = io::copy(&mut deb.data(), &mut io::sink());
            }
        }
    }
}
