//! The receiving end: creates what arrives, and nothing elsewhere.

use crate::{NANOSECONDS, PERMISSIONS, TOP, about};
use banger_wire::bytes::ByteString;
use banger_wire::item::{Item, ItemReader, Kind};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes taken from the stream at once.
const CHUNK_LEN: usize = 64 * 1024;
const RIGHTS_OF_NEW_DIRECTORY: u32 = 0o700;

/// Where a copy goes.
#[derive(Debug)]
pub struct Target {
    place: Place,
    /// Only a directory may go there.
    only_directory: bool,
    /// For messages.
    shown: PathBuf,
}

#[derive(Debug)]
enum Place {
    /// Under this name in that directory.
    Below(OwnedFd, OsString),
    /// Into this directory itself.
    Itself(OwnedFd),
}

impl Target {
    /// Finds where a copy goes, as `cp` does: into a directory that is there, under the source's `name`, or, if that is
    /// none, as its content; else to `path` itself. `into` demands a directory.
    ///
    /// The caller's own path is followed wherever it leads; nothing of the stream has a part in this.
    ///
    /// # Errors
    /// When there is no directory where one has to be.
    pub fn find(path: &Path, name: Option<&OsStr>, into: bool) -> Result<Self> {
        let failed = |kind, text: &str| Err(about(path, Error::new(kind, text)));
        let open = |dir: &Path| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(dir, flags, Mode::empty()).map_err(|error| about(dir, error))
        };
        let ends_in_slash = path.as_os_str().as_bytes().ends_with(b"/");
        let target = |place, shown| Self { place, only_directory: false, shown };
        match path.metadata() {
            Ok(found) if found.is_dir() => Ok(match name {
                Some(name) => target(Place::Below(open(path)?, name.to_owned()), path.join(name)),
                None => target(Place::Itself(open(path)?), path.to_owned()),
            }),
            Ok(_) if into || name.is_none() => failed(ErrorKind::NotADirectory, "is no directory"),
            Err(error) if error.kind() != ErrorKind::NotFound => Err(about(path, error)),
            Err(_) if into => failed(ErrorKind::NotFound, "there is no such directory"),
            found => {
                // A file that is reached by a link is replaced where it is.
                let place = match found {
                    Ok(_) => path.canonicalize().map_err(|error| about(path, error))?,
                    Err(_) => path.to_owned(),
                };
                let Some(file_name) = place.file_name() else {
                    return failed(ErrorKind::NotFound, "there is no such directory");
                };
                let parent = place.parent().filter(|parent| !parent.as_os_str().is_empty());
                let parent = open(parent.unwrap_or(Path::new(".")))?;
                let place = Place::Below(parent, file_name.to_owned());
                Ok(Self { only_directory: ends_in_slash, ..target(place, path.to_owned()) })
            }
        }
    }
}

/// Creates what arrives up to an `End`. `left_out` hears the names, relative to the copy, of what is not copied.
/// `progress` hears how many bytes of files have arrived.
///
/// A file has its name when it is whole, and not before; directories that were there keep mode and time.
///
/// # Errors
/// When anything can't be created, and when the stream breaks off or is not such a stream. What came before is there.
pub fn receive(
    target: Target,
    input: impl Read,
    left_out: &mut dyn FnMut(&[u8]),
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let mut reader = ItemReader::new(input);
    let mut receiver = Receiver { target, top: None, begun: false, dirs: Vec::new(), file: None, arrived: 0 };
    loop {
        match reader.next_item().map_err(named)? {
            Item::Directory { path, .. } => receiver.directory(&path)?,
            Item::Parts { path } => receiver.begin_file(path)?,
            Item::Part { offset, len } => {
                receiver.part(offset, len, &mut reader)?;
                progress(receiver.arrived);
            }
            Item::Whole { path, mode, modified, len } => receiver.whole(&path, mode, modified, len)?,
            Item::Link { path, target, modified } => receiver.link(&path, &target, modified)?,
            Item::Listed { path, kind: Kind::Special, .. } => {
                receiver.place(&path)?;
                left_out(path.0.get(TOP.len() + 1..).unwrap_or_default());
            }
            Item::End if receiver.is_done() => return Ok(()),
            _ => return Err(out_of_order()),
        }
    }
}

/// Writes the one file that arrives to a stream, its holes as zeroes.
///
/// # Errors
/// Those of both streams, and when it is no file.
pub fn receive_into(output: &mut impl Write, input: impl Read, progress: &mut dyn FnMut(u64)) -> Result<()> {
    let mut reader = ItemReader::new(input);
    match reader.next_item().map_err(named)? {
        Item::Parts { .. } => {}
        Item::Directory { .. } => {
            return Err(Error::new(
                ErrorKind::IsADirectory,
                "it is a directory, which is no stream of bytes",
            ));
        }
        _ => return Err(out_of_order()),
    }
    let (mut at, mut chunk) = (0_u64, vec![0; CHUNK_LEN]);
    let pad = |output: &mut _, at: u64, to: u64| {
        let missing = to.checked_sub(at).ok_or_else(out_of_order)?;
        std::io::copy(&mut std::io::repeat(0).take(missing), output).map(|_| to)
    };
    loop {
        match reader.next_item().map_err(named)? {
            Item::Part { offset, len } => {
                at = pad(output, at, offset)?;
                let mut left = len;
                while left > 0 {
                    let read = take(&mut reader, &mut chunk, left)?;
                    output.write_all(&chunk[..read])?;
                    (left, at) = (left - read as u64, at.saturating_add(read as u64));
                    progress(at);
                }
            }
            Item::Whole { len, .. } => at = pad(output, at, len)?,
            Item::End => return output.flush(),
            _ => return Err(out_of_order()),
        }
    }
}

fn out_of_order() -> Error {
    Error::new(ErrorKind::InvalidData, "what arrived is no copy of a file or directory")
}

/// Says of an end that is too early what it is.
fn named(error: Error) -> Error {
    if error.kind() == ErrorKind::UnexpectedEof {
        return Error::new(error.kind(), "the copy broke off before its end");
    }
    error
}

/// Reads some content, at most `left` bytes, and at least one.
fn take(reader: &mut ItemReader<impl Read>, chunk: &mut [u8], left: u64) -> Result<usize> {
    let room = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
    match reader.content().read(&mut chunk[..room])? {
        0 => Err(named(ErrorKind::UnexpectedEof.into())),
        len => Ok(len),
    }
}

/// A directory under way.
struct Entered {
    path: ByteString,
    /// It is this copy's: it gets mode and time at the end.
    is_new: bool,
}

struct Receiver {
    target: Target,
    /// The copied directory, once it is there.
    top: Option<OwnedFd>,
    begun: bool,
    /// From the top to the one that is being filled.
    dirs: Vec<Entered>,
    file: Option<NewFile>,
    arrived: u64,
}

impl Receiver {
    fn is_done(&self) -> bool {
        self.begun && self.dirs.is_empty() && self.file.is_none()
    }

    fn shown(&self, path: &ByteString) -> PathBuf {
        match path.0.get(TOP.len() + 1..) {
            Some(below) => self.target.shown.join(OsStr::from_bytes(below)),
            None => self.target.shown.clone(),
        }
    }

    /// Opens the directory that something goes to, and returns its name there. That directory is the last one that
    /// arrived and has not ended, so no name leads to another place; the kernel sees to that, too.
    fn place(&mut self, path: &ByteString) -> Result<(OwnedFd, OsString)> {
        if self.file.is_some() {
            return Err(out_of_order());
        }
        let Some(at) = path.0.iter().rposition(|&byte| byte == b'/') else {
            if path.0 != TOP.as_bytes() || std::mem::replace(&mut self.begun, true) {
                return Err(out_of_order());
            }
            return match &self.target.place {
                Place::Below(dir, name) => Ok((dir.try_clone()?, name.clone())),
                Place::Itself(_) => Err(about(
                    &self.target.shown,
                    Error::new(ErrorKind::IsADirectory, "is a directory, and what arrives is none"),
                )),
            };
        };
        let (parent, name) = (&path.0[..at], &path.0[at + 1..]);
        let is_open = self.dirs.last().is_some_and(|last| last.path.0 == parent);
        if !is_open {
            return Err(out_of_order());
        }
        Ok((self.enter(parent, OFlags::PATH)?, OsString::from_vec(name.to_vec())))
    }

    /// Opens a directory that has arrived. None stays open but the top: a tree may be deeper than descriptors go.
    fn enter(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd> {
        let top = self.top.as_ref().ok_or_else(out_of_order)?;
        let below = path.get(TOP.len() + 1..).filter(|below| !below.is_empty()).unwrap_or(b".");
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat2(top, OsStr::from_bytes(below), flags, Mode::empty(), beneath)
            .map_err(|error| about(&self.shown(&ByteString(path.to_vec())), error))
    }

    fn directory(&mut self, path: &ByteString) -> Result<()> {
        let is_top = path.0 == TOP.as_bytes();
        if let (true, false, Place::Itself(dir)) = (is_top, self.begun, &self.target.place) {
            self.top = Some(dir.try_clone()?);
            self.begun = true;
            self.dirs.push(Entered { path: path.clone(), is_new: false });
            return Ok(());
        }
        let (parent, name) = self.place(path)?;
        let failed = |receiver: &Self, error| about(&receiver.shown(path), error);
        let mode = Mode::from_raw_mode(RIGHTS_OF_NEW_DIRECTORY);
        let is_new = match rustix::fs::mkdirat(&parent, &name, mode) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(error) => return Err(failed(self, error)),
        };
        // One of somebody else's may be open to be entered only.
        let flags = if is_new { OFlags::RDONLY } else { OFlags::PATH };
        let flags = flags | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = match rustix::fs::openat(&parent, &name, flags, Mode::empty()) {
            Err(Errno::NOTDIR | Errno::LOOP) => {
                let text = "there is a file or link, which a directory does not replace";
                return Err(about(&self.shown(path), Error::new(ErrorKind::NotADirectory, text)));
            }
            dir => dir.map_err(|error| failed(self, error))?,
        };
        if is_top {
            self.top = Some(dir.try_clone()?);
        }
        self.dirs.push(Entered { path: path.clone(), is_new });
        Ok(())
    }

    fn begin_file(&mut self, path: ByteString) -> Result<()> {
        let (dir, name) = self.place(&path)?;
        let shown = self.shown(&path);
        self.check_replaced(&path, &dir, &name)?;
        self.file = Some(NewFile::create(path, dir, name).map_err(|error| about(&shown, error))?);
        Ok(())
    }

    /// Refuses to replace what is no file and no link.
    fn check_replaced(&self, path: &ByteString, dir: &OwnedFd, name: &OsStr) -> Result<()> {
        let failed = |kind, text: &str| Err(about(&self.shown(path), Error::new(kind, text)));
        if self.target.only_directory && path.0 == TOP.as_bytes() {
            return failed(ErrorKind::NotADirectory, "there is no such directory");
        }
        match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(about(&self.shown(path), error)),
            Ok(found) => match FileType::from_raw_mode(found.st_mode) {
                FileType::RegularFile | FileType::Symlink => Ok(()),
                FileType::Directory => {
                    failed(ErrorKind::IsADirectory, "there is a directory, which a file does not replace")
                }
                _ => failed(
                    ErrorKind::AlreadyExists,
                    "there is a device, pipe or socket, which is not replaced",
                ),
            },
        }
    }

    fn part(&mut self, offset: u64, len: u64, reader: &mut ItemReader<impl Read>) -> Result<()> {
        let Some(new) = &self.file else { return Err(out_of_order()) };
        let (mut at, mut left) = (offset, len);
        let mut chunk = vec![0; CHUNK_LEN.min(usize::try_from(len).unwrap_or(CHUNK_LEN))];
        while left > 0 {
            let read = take(reader, &mut chunk, left)?;
            new.file
                .write_all_at(&chunk[..read], at)
                .map_err(|error| about(&self.shown(&new.path), error))?;
            at = at.checked_add(read as u64).ok_or_else(out_of_order)?;
            left -= read as u64;
            self.arrived += read as u64;
        }
        Ok(())
    }

    fn whole(&mut self, path: &ByteString, mode: u32, modified: i64, len: u64) -> Result<()> {
        let shown = self.shown(path);
        let failed = |error: Error| about(&shown, error);
        let mode = Mode::from_raw_mode(mode & PERMISSIONS);
        match (self.file.take(), self.dirs.last()) {
            (Some(new), _) if new.path == *path => {
                new.file.set_len(len).map_err(failed)?;
                rustix::fs::fchmod(&new.file, mode).map_err(|error| about(&shown, error))?;
                rustix::fs::futimens(&new.file, &times(modified)).map_err(|error| about(&shown, error))?;
                new.publish().map_err(|error| about(&shown, error))
            }
            (None, Some(last)) if last.path == *path => {
                if self.dirs.pop().is_some_and(|last| last.is_new) {
                    let dir = self.enter(&path.0, OFlags::RDONLY)?;
                    rustix::fs::fchmod(&dir, mode).map_err(|error| about(&shown, error))?;
                    rustix::fs::futimens(&dir, &times(modified)).map_err(|error| about(&shown, error))?;
                }
                Ok(())
            }
            _ => Err(out_of_order()),
        }
    }

    fn link(&mut self, path: &ByteString, target: &ByteString, modified: i64) -> Result<()> {
        let (dir, name) = self.place(path)?;
        self.check_replaced(path, &dir, &name)?;
        let make = || {
            let temporary = temporary_name();
            rustix::fs::symlinkat(target.as_os_str(), &dir, &temporary)?;
            let made = rustix::fs::utimensat(&dir, &temporary, &times(modified), AtFlags::SYMLINK_NOFOLLOW)
                .and_then(|()| rustix::fs::renameat(&dir, &temporary, &dir, &name));
            if made.is_err() {
                let _ = rustix::fs::unlinkat(&dir, &temporary, AtFlags::empty());
            }
            made
        };
        make().map_err(|error| about(&self.shown(path), error))
    }
}

/// A file without its name.
struct NewFile {
    path: ByteString,
    file: File,
    dir: OwnedFd,
    name: OsString,
    /// The name it has until it is whole, where a file can't be without one.
    temporary: Option<OsString>,
}

impl NewFile {
    fn create(path: ByteString, dir: OwnedFd, name: OsString) -> rustix::io::Result<Self> {
        let mode = Mode::RUSR | Mode::WUSR;
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let (file, temporary) = match rustix::fs::openat(&dir, ".", flags | OFlags::TMPFILE, mode) {
            Ok(file) => (file, None),
            // What filesystems say that have no such files.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {
                let temporary = temporary_name();
                let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
                (rustix::fs::openat(&dir, &temporary, flags, mode)?, Some(temporary))
            }
            Err(error) => return Err(error),
        };
        Ok(Self { path, file: file.into(), dir, name, temporary })
    }

    /// Gives it its name, in place of what has it.
    fn publish(mut self) -> rustix::io::Result<()> {
        if self.temporary.is_none() {
            let number = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let link =
                |name: &OsStr| rustix::fs::linkat(CWD, &number, &self.dir, name, AtFlags::SYMLINK_FOLLOW);
            match link(&self.name) {
                Err(Errno::EXIST) => {}
                linked => return linked,
            }
            let temporary = temporary_name();
            link(&temporary)?;
            self.temporary = Some(temporary);
        }
        if let Some(temporary) = &self.temporary {
            rustix::fs::renameat(&self.dir, temporary, &self.dir, &self.name)?;
        }
        self.temporary = None;
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = rustix::fs::unlinkat(&self.dir, temporary, AtFlags::empty());
        }
    }
}

/// A name that nothing else of this process has.
fn temporary_name() -> OsString {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    format!(".banger-cp-{}-{number}", std::process::id()).into()
}

fn times(modified: i64) -> Timestamps {
    let time =
        Timespec { tv_sec: modified.div_euclid(NANOSECONDS), tv_nsec: modified.rem_euclid(NANOSECONDS) };
    Timestamps { last_access: time, last_modification: time }
}
