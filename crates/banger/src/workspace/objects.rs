//! Contents as git objects in a repository of banger's own, written here and not by git: nothing converts them on the
//! way, whatever attributes or config say.

use crate::stop::failed;
use banger_wire::error::WireError;
use flate2::Compression;
use flate2::write::ZlibEncoder;
use sha2::Digest as _;
use std::fs::File;
use std::io::{ErrorKind, Read, Result, Write};
use std::path::{Path, PathBuf};

/// Contents up to this length are hashed before it is decided whether to write them.
const BUFFERED_LEN_MAX: u64 = 4 * 1024 * 1024;

/// How objects are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Sha1,
    Sha256,
}

/// A hash under way.
enum Hasher {
    Sha1(sha1::Sha1),
    Sha256(sha2::Sha256),
}

impl Hasher {
    fn blob(format: Format, len: u64) -> Self {
        let mut hasher = match format {
            Format::Sha1 => Self::Sha1(sha1::Sha1::default()),
            Format::Sha256 => Self::Sha256(sha2::Sha256::default()),
        };
        hasher.update(header(len).as_bytes());
        hasher
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha1(hash) => sha1::Digest::update(hash, bytes),
            Self::Sha256(hash) => hash.update(bytes),
        }
    }

    fn name(self) -> String {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match self {
            Self::Sha1(hash) => hex(&sha1::Digest::finalize(hash)),
            Self::Sha256(hash) => hex(&hash.finalize()),
        }
    }
}

fn header(len: u64) -> String {
    format!("blob {len}\0")
}

/// Returns the name of a content.
///
/// # Errors
/// When it can't be read, or has not `len` bytes.
pub(crate) fn name_of(format: Format, len: u64, content: &mut impl Read) -> Result<String> {
    let mut hasher = Hasher::blob(format, len);
    let mut chunk = vec![0; 64 * 1024];
    let mut left = len;
    loop {
        let read = content.read(&mut chunk)?;
        if read == 0 {
            break;
        }
        left = left.checked_sub(read as u64).ok_or(ErrorKind::UnexpectedEof)?;
        hasher.update(&chunk[..read]);
    }
    if left > 0 { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(hasher.name()) }
}

/// A bare repository that only holds contents.
#[derive(Debug)]
pub(crate) struct Objects {
    dir: PathBuf,
    pub(crate) format: Format,
    written: u32,
}

impl Objects {
    /// Makes the repository; it also finds what is in the directories of `others`.
    ///
    /// # Errors
    /// When it can't be written.
    pub(crate) fn make(
        dir: &Path,
        format: Format,
        others: impl IntoIterator<Item = PathBuf>,
    ) -> std::result::Result<Self, WireError> {
        use std::os::unix::ffi::OsStrExt as _;
        let version = match format {
            Format::Sha1 => "\trepositoryFormatVersion = 0\n",
            Format::Sha256 => "\trepositoryFormatVersion = 1\n[extensions]\n\tobjectFormat = sha256\n",
        };
        let mut alternates = Vec::new();
        for other in others {
            // As git quotes names: one with a quote or a line break would end early.
            alternates.push(b'"');
            for &byte in other.as_os_str().as_bytes() {
                match byte {
                    b'"' | b'\\' => alternates.extend([b'\\', byte]),
                    b'\n' => alternates.extend(b"\\n"),
                    _ => alternates.push(byte),
                }
            }
            alternates.extend(b"\"\n");
        }
        let make = || -> Result<()> {
            for part in ["objects/info", "objects/pack", "refs"] {
                std::fs::create_dir_all(dir.join(part))?;
            }
            std::fs::write(dir.join("HEAD"), "ref: refs/heads/none\n")?;
            std::fs::write(dir.join("config"), format!("[core]\n\tbare = true\n{version}"))?;
            std::fs::write(dir.join("objects/info/alternates"), &alternates)
        };
        make().map_err(|error| failed(format!("could not make `{}`", dir.display()), &error))?;
        Ok(Self { dir: dir.to_owned(), format, written: 0 })
    }

    /// Passes a content of `len` bytes on to `pass`, and keeps it unless `known` has its name: whoever names it has it.
    /// Returns its name.
    ///
    /// # Errors
    /// When it is shorter, and those of reading, passing and writing.
    pub(crate) fn keep(
        &mut self,
        len: u64,
        content: &mut impl Read,
        known: &[String],
        pass: impl FnOnce(&mut dyn Read) -> Result<()>,
    ) -> Result<String> {
        if len <= BUFFERED_LEN_MAX {
            let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or_default());
            content.take(len).read_to_end(&mut bytes)?;
            let name = name_of(self.format, len, &mut bytes.as_slice())?;
            pass(&mut bytes.as_slice())?;
            if !known.contains(&name) && !self.place(&name).exists() {
                let mut object = self.begin(len)?;
                object.write_all(&bytes)?;
                object.finish()?;
                self.end(&name)?;
            }
            return Ok(name);
        }
        let object = self.begin(len)?;
        let mut copying =
            Copying { content: content.take(len), hasher: Hasher::blob(self.format, len), object, left: len };
        pass(&mut copying)?;
        if copying.left > 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        copying.object.finish()?;
        let name = copying.hasher.name();
        if known.contains(&name) {
            std::fs::remove_file(self.unnamed())?
        } else {
            self.end(&name)?
        }
        Ok(name)
    }

    fn place(&self, name: &str) -> PathBuf {
        let (dir, rest) = name.split_at(2);
        self.dir.join("objects").join(dir).join(rest)
    }

    fn unnamed(&self) -> PathBuf {
        self.dir.join(format!("object-{}", self.written))
    }

    fn begin(&mut self, len: u64) -> Result<ZlibEncoder<File>> {
        self.written += 1;
        let mut object = ZlibEncoder::new(File::create(self.unnamed())?, Compression::fast());
        object.write_all(header(len).as_bytes())?;
        Ok(object)
    }

    fn end(&self, name: &str) -> Result<()> {
        let place = self.place(name);
        std::fs::create_dir_all(place.parent().unwrap_or(&place))?;
        std::fs::rename(self.unnamed(), place)
    }
}

/// Hashes and keeps what is read through it.
struct Copying<R> {
    content: R,
    hasher: Hasher,
    object: ZlibEncoder<File>,
    left: u64,
}

impl<R: Read> Read for Copying<R> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let len = self.content.read(buffer)?;
        self.hasher.update(&buffer[..len]);
        self.object.write_all(&buffer[..len])?;
        self.left -= len as u64;
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::git::Git;

    #[test]
    fn git_reads_what_was_kept() {
        for format in [Format::Sha1, Format::Sha256] {
            let dir = tempfile::tempdir().unwrap();
            let repository = dir.path().join("a \"repo\"\n");
            let mut objects = Objects::make(&repository, format, []).unwrap();
            let long = vec![b'x'; 5 << 20];
            let mut passed = Vec::new();
            let mut keep = |content: &[u8], known: &[String]| {
                let pass = |content: &mut dyn Read| content.read_to_end(&mut passed).map(drop);
                objects.keep(content.len() as u64, &mut &*content, known, pass).unwrap()
            };
            let names = [keep(b"a\r\nb", &[]), keep(b"", &[]), keep(&long, &[])];
            let known = keep(b"known", &[name_of(format, 5, &mut &b"known"[..]).unwrap()]);
            assert_eq!(passed.len(), long.len() + 9);
            // Another repository finds it there.
            let other = dir.path().join("other");
            Objects::make(&other, format, [repository.join("objects")]).unwrap();
            let git = Git::own(&other);
            assert_eq!(git.run(&["cat-file", "blob", &names[0]]).unwrap(), b"a\r\nb");
            assert_eq!(git.run(&["cat-file", "blob", &names[1]]).unwrap(), b"");
            assert_eq!(git.run(&["cat-file", "blob", &names[2]]).unwrap(), long);
            assert_eq!(git.ask(&["cat-file", "-e", &known]).unwrap(), None);
            let short = objects.keep(9, &mut &b"short"[..], &[], |content| {
                std::io::copy(content, &mut std::io::sink()).map(drop)
            });
            assert_eq!(short.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        }
    }
}
