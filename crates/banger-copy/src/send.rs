//! The sending end: reads a file or tree.

use crate::{NANOSECONDS, PERMISSIONS, TOP, about};
use banger_wire::bytes::ByteString;
use banger_wire::item::{Item, ItemWriter, Kind};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, SeekFrom, Stat};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes read at once, and of one part.
const PART_LEN: usize = 256 * 1024;
/// Mode of a file that is made of a stream.
const STREAM_MODE: u32 = 0o644;
/// Filesystems that the kernel makes up: proc, sysfs, cgroup, cgroup2, debugfs, tracefs, securityfs, bpf, devpts. What is
/// in them is no file that could be had elsewhere, and some of it has no end.
const MADE_UP: [u64; 9] =
    [0x9fa0, 0x6265_6572, 0x27_e0eb, 0x6367_7270, 0x6462_6720, 0x7472_6163, 0x7363_6673, 0xcafe_4a11, 0x1cd1];

/// Sends what `source` names, and an `End`. A link is sent as such, unless `follow` says to go where it leads; links
/// within a tree always are. `left_out` hears the names, relative to the source, of what is no file, directory or link;
/// `progress` how many bytes were sent of files, again and again.
///
/// # Errors
/// Those of the stream, and when something can't be read; the stream is of no use any more then.
pub fn send(
    source: &Path,
    follow: bool,
    writer: &mut ItemWriter<impl Write>,
    left_out: &mut dyn FnMut(&[u8]),
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let found = if follow { source.metadata() } else { source.symlink_metadata() };
    let found = found.map_err(|error| about(source, error))?;
    let mut sender = Sender { writer, left_out, progress, sent: 0, buffer: vec![0; PART_LEN] };
    let kind = found.file_type();
    if kind.is_dir() {
        sender.tree(source)?;
    } else if kind.is_symlink() {
        let target = source.read_link().map_err(|error| about(source, error))?;
        let target = ByteString::from(target.into_os_string());
        let modified = found.mtime().saturating_mul(NANOSECONDS).saturating_add(found.mtime_nsec());
        sender.writer.item(&Item::Link { path: TOP.into(), target, modified })?;
    } else if kind.is_file() {
        let follows = if follow { OFlags::empty() } else { OFlags::NOFOLLOW };
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC | follows;
        let file = rustix::fs::open(source, flags, Mode::empty()).map_err(|error| about(source, error))?;
        sender.file(TOP.into(), file.into(), source)?;
    } else {
        let what = if kind.is_fifo() { "a pipe" } else { "a device or socket" };
        return Err(about(
            source,
            Error::new(ErrorKind::InvalidInput, format!("is {what}, no file or directory")),
        ));
    }
    sender.writer.item(&Item::End)?;
    sender.writer.flush()
}

/// Sends a stream of unknown length as one file.
///
/// # Errors
/// Those of both streams.
pub fn send_stream(
    source: &mut impl Read,
    writer: &mut ItemWriter<impl Write>,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    writer.item(&Item::Parts { path: TOP.into() })?;
    let (mut buffer, mut at) = (vec![0; PART_LEN], 0);
    loop {
        let len = match source.read(&mut buffer) {
            Ok(0) => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            len => len?,
        };
        writer.part(at, &buffer[..len])?;
        at += len as u64;
        progress(at);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let modified = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
    writer.item(&Item::Whole { path: TOP.into(), mode: STREAM_MODE, modified, len: at })?;
    writer.item(&Item::End)?;
    writer.flush()
}

/// What is left to do of a tree; names are relative to its root.
enum Step {
    Enter(PathBuf),
    Leave(PathBuf, u32, i64),
}

struct Sender<'a, W> {
    writer: &'a mut ItemWriter<W>,
    left_out: &'a mut dyn FnMut(&[u8]),
    progress: &'a mut dyn FnMut(u64),
    sent: u64,
    buffer: Vec<u8>,
}

impl<W: Write> Sender<'_, W> {
    fn tree(&mut self, source: &Path) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(source, flags, Mode::empty()).map_err(|error| about(source, error))?;
        let device = rustix::fs::fstat(&root)?.st_dev;
        let mut steps = vec![Step::Enter(PathBuf::new())];
        while let Some(step) = steps.pop() {
            let path = match step {
                Step::Leave(path, mode, modified) => {
                    self.writer.item(&Item::Whole { path: named(&path), mode, modified, len: 0 })?;
                    continue;
                }
                Step::Enter(path) => path,
            };
            let full = source.join(&path);
            let dir = match open_dir(&root, &path) {
                // Gone, or something else, since its name was read.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) if !path.as_os_str().is_empty() => continue,
                dir => dir.map_err(|error| about(&full, error))?,
            };
            let found = rustix::fs::fstat(&dir).map_err(|error| about(&full, error))?;
            let mode = found.st_mode & PERMISSIONS;
            self.writer.item(&Item::Directory { path: named(&path), mode })?;
            steps.push(Step::Leave(path.clone(), mode, modified(&found)));
            if found.st_dev != device && is_made_up(&dir) {
                continue;
            }
            self.entries(&dir, &path, &full, &mut steps)?;
        }
        Ok(())
    }

    /// Sends a directory's files; its directories become steps.
    fn entries(&mut self, dir: &OwnedFd, path: &Path, full: &Path, steps: &mut Vec<Step>) -> Result<()> {
        for name in names(dir).map_err(|error| about(full, error))? {
            let (path, full) = (path.join(&name), full.join(&name));
            let found = match rustix::fs::statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => continue,
                found => found.map_err(|error| about(&full, error))?,
            };
            match FileType::from_raw_mode(found.st_mode) {
                FileType::Directory => steps.push(Step::Enter(path)),
                FileType::RegularFile => match open_file(dir, &name) {
                    Err(Errno::NOENT | Errno::LOOP) => {}
                    file => {
                        let file = File::from(file.map_err(|error| about(&full, error))?);
                        if file.metadata()?.is_file() {
                            self.file(named(&path), file, &full)?;
                        }
                    }
                },
                FileType::Symlink => match rustix::fs::readlinkat(dir, &name, Vec::new()) {
                    Err(Errno::NOENT | Errno::INVAL) => {}
                    target => {
                        let target = target.map_err(|error| about(&full, error))?.into_bytes();
                        let modified = modified(&found);
                        let target = ByteString(target);
                        self.writer.item(&Item::Link { path: named(&path), target, modified })?;
                    }
                },
                _ => {
                    (self.left_out)(path.as_os_str().as_bytes());
                    let (path, mode) = (named(&path), found.st_mode & PERMISSIONS);
                    self.writer.item(&Item::Listed {
                        path,
                        kind: Kind::Special,
                        mode,
                        len: 0,
                        changed: 0,
                    })?;
                }
            }
        }
        Ok(())
    }

    /// Sends a file's data without its holes. One that becomes shorter meanwhile is sent as short as it is; of one that
    /// has no length, as the kernel's own have none, all that can be read.
    fn file(&mut self, path: ByteString, file: File, full: &Path) -> Result<()> {
        let found = file.metadata().map_err(|error| about(full, error))?;
        self.writer.item(&Item::Parts { path: path.clone() })?;
        let announced = found.len();
        let (mut at, mut len) = (0, announced);
        while let Some((start, end)) = next_data(&file, at, announced) {
            at = start;
            while at < end {
                let room = usize::try_from(end - at).unwrap_or(usize::MAX).min(PART_LEN);
                let read = match file.read_at(&mut self.buffer[..room], at) {
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    read => read.map_err(|error| about(full, error))?,
                };
                if read == 0 {
                    len = at;
                    break;
                }
                self.writer.part(at, &self.buffer[..read])?;
                at += read as u64;
                self.sent += read as u64;
                (self.progress)(self.sent);
            }
            if at < end {
                break;
            }
        }
        let modified = found.mtime().saturating_mul(NANOSECONDS).saturating_add(found.mtime_nsec());
        self.writer.item(&Item::Whole { path, mode: found.mode() & PERMISSIONS, modified, len })
    }
}

/// Where data follows within a file's first `len` bytes, from `at` on.
fn next_data(file: &File, at: u64, len: u64) -> Option<(u64, u64)> {
    if len == 0 {
        return (at == 0).then_some((0, u64::MAX));
    }
    if at >= len {
        return None;
    }
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) if start < len => {
            let end = rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap_or(len).min(len);
            Some((start, if end > start { end } else { len }))
        }
        Ok(_) | Err(Errno::NXIO) => None,
        // Filesystems that do not know of holes have none.
        Err(_) => Some((at, len)),
    }
}

fn open_dir(root: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(root, path, flags, Mode::empty(), beneath)
}

fn open_file(dir: &OwnedFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    // A pipe that has taken the file's place must not be waited for.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::empty())
}

/// In order, so that two copies of one tree are the same stream.
fn names(dir: &OwnedFd) -> rustix::io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name));
        }
    }
    names.sort();
    Ok(names)
}

fn is_made_up(dir: &OwnedFd) -> bool {
    let kind = rustix::fs::fstatfs(dir.as_fd()).map(|found| found.f_type.cast_unsigned());
    kind.is_ok_and(|kind| MADE_UP.contains(&kind))
}

fn named(path: &Path) -> ByteString {
    let mut name = TOP.as_bytes().to_vec();
    if !path.as_os_str().is_empty() {
        name.push(b'/');
        name.extend_from_slice(path.as_os_str().as_bytes());
    }
    ByteString(name)
}

fn modified(found: &Stat) -> i64 {
    let nanoseconds = i64::try_from(found.st_mtime_nsec).unwrap_or(0);
    found.st_mtime.saturating_mul(NANOSECONDS).saturating_add(nanoseconds)
}
