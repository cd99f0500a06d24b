//! The file server behind `scp`, `sftp` and editors: version 3 of the protocol (draft-ietf-secsh-filexfer-02), with
//! OpenSSH's additions, between standard input and output.
//!
//! A process of the user's own, so the kernel decides what it may. Names are bytes. One request is answered after the
//! other; clients have many under way.

mod beyond;

use super::fields::{Fields, Packet};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{File, Metadata, ReadDir};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

const INIT: u8 = 1;
const VERSION: u8 = 2;
const OPEN: u8 = 3;
const CLOSE: u8 = 4;
const READ: u8 = 5;
const WRITE: u8 = 6;
const LSTAT: u8 = 7;
const FSTAT: u8 = 8;
const SETSTAT: u8 = 9;
const FSETSTAT: u8 = 10;
const OPENDIR: u8 = 11;
const READDIR: u8 = 12;
const REMOVE: u8 = 13;
const MKDIR: u8 = 14;
const RMDIR: u8 = 15;
const REALPATH: u8 = 16;
const STAT: u8 = 17;
const RENAME: u8 = 18;
const READLINK: u8 = 19;
const SYMLINK: u8 = 20;
const STATUS: u8 = 101;
const HANDLE: u8 = 102;
const DATA: u8 = 103;
const NAME: u8 = 104;
const ATTRS: u8 = 105;
const EXTENDED: u8 = 200;
const EXTENDED_REPLY: u8 = 201;

const OK: u32 = 0;
const END_OF_FILE: u32 = 1;
const NO_SUCH_FILE: u32 = 2;
const PERMISSION_DENIED: u32 = 3;
const FAILURE: u32 = 4;
const BAD_MESSAGE: u32 = 5;
const UNSUPPORTED: u32 = 8;

const HAS_SIZE: u32 = 1;
const HAS_OWNER: u32 = 2;
const HAS_MODE: u32 = 4;
const HAS_TIMES: u32 = 8;

/// Bits of `OPEN`.
const FOR_READING: u32 = 1;
const FOR_WRITING: u32 = 2;
const APPEND: u32 = 4;
const CREATE: u32 = 8;
const TRUNCATE: u32 = 16;
const EXCLUSIVE: u32 = 32;

/// Longest message, as OpenSSH has it.
const MESSAGE_LEN_MAX: u32 = 256 * 1024;
/// Longest piece of a file in one message; the rest is room for what is around it.
const PIECE_LEN_MAX: u32 = MESSAGE_LEN_MAX - 1024;
/// Open files and directories.
const HANDLES_MAX: usize = 256;
/// Names told at once; a client asks again.
const NAMES_AT_ONCE: usize = 100;
/// Extensions, each with its version.
const EXTENSIONS: [(&str, &str); 9] = [
    ("posix-rename@openssh.com", "1"),
    ("hardlink@openssh.com", "1"),
    ("fsync@openssh.com", "1"),
    ("statvfs@openssh.com", "2"),
    ("lsetstat@openssh.com", "1"),
    ("limits@openssh.com", "1"),
    ("expand-path@openssh.com", "1"),
    ("copy-data", "1"),
    ("users-groups-by-id@openssh.com", "1"),
];

/// Serves until the input ends.
///
/// # Errors
/// When the client broke the protocol, or its end of the streams is gone.
pub(crate) fn serve() -> io::Result<()> {
    let (mut input, mut output) = (io::stdin().lock(), io::stdout().lock());
    let mut server = Server { handles: HashMap::new(), next: 0 };
    let mut message = Vec::new();
    loop {
        let mut len = [0; 4];
        match input.read_exact(&mut len) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        let len = u32::from_be_bytes(len);
        if len > MESSAGE_LEN_MAX {
            return Err(io::Error::other("sftp: a message that is too long"));
        }
        message.resize(len as usize, 0);
        input.read_exact(&mut message)?;
        let answer = server.answer(&message).ok_or_else(|| io::Error::other("sftp: no request"))?;
        output.write_all(&Packet::part().bytes(answer.0).0)?;
        output.flush()?;
    }
}

enum Handle {
    File(File),
    Directory { path: PathBuf, entries: ReadDir, begun: bool },
}

struct Server {
    handles: HashMap<u32, Handle>,
    next: u32,
}

/// Why there is no answer but a status.
enum Refused {
    Io(io::Error),
    Status(u32),
    /// The message can't be read.
    Bad,
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<rustix::io::Errno> for Refused {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Io(error.into())
    }
}

type Answer = Result<Packet, Refused>;

impl Server {
    /// Answers a message; none when it is not even a request.
    fn answer(&mut self, message: &[u8]) -> Option<Packet> {
        let mut fields = Fields::of(message);
        let kind = fields.byte()?;
        if kind == INIT {
            let version = Packet::new(VERSION).number(3);
            return Some(
                EXTENSIONS.iter().fold(version, |packet, (name, value)| packet.bytes(name).bytes(value)),
            );
        }
        let id = fields.number()?;
        // The id comes after the kind, which the parts below do not know.
        let answer = match self.request(kind, fields) {
            Ok(answer) => answer,
            Err(Refused::Status(code)) => status(code, text(code)),
            Err(Refused::Bad) => status(BAD_MESSAGE, text(BAD_MESSAGE)),
            Err(Refused::Io(error)) => status(code_of(&error), &error.to_string()),
        };
        let (kind, rest) = answer.0.split_first()?;
        Some(Packet::new(*kind).number(id).raw(rest))
    }

    fn request(&mut self, kind: u8, mut fields: Fields<'_>) -> Answer {
        let fields = &mut fields;
        match kind {
            OPEN => self.open(fields),
            CLOSE => {
                let number = handle(fields)?;
                self.handles.remove(&number).map(|_| done()).ok_or(Refused::Status(FAILURE))
            }
            READ => {
                let file = self.file(fields)?;
                let (offset, len) = (long(fields)?, number(fields)?.min(PIECE_LEN_MAX));
                let mut bytes = vec![0; len as usize];
                match file.read_at(&mut bytes, offset)? {
                    0 => Err(Refused::Status(END_OF_FILE)),
                    len => Ok(Packet::new(DATA).bytes(&bytes[..len])),
                }
            }
            WRITE => {
                let file = self.file(fields)?;
                let (offset, bytes) = (long(fields)?, bytes(fields)?);
                file.write_all_at(bytes, offset)?;
                Ok(done())
            }
            LSTAT => Ok(attributes(&std::fs::symlink_metadata(path(fields)?)?)),
            STAT => Ok(attributes(&std::fs::metadata(path(fields)?)?)),
            FSTAT => Ok(attributes(&self.file(fields)?.metadata()?)),
            SETSTAT => {
                let path = path(fields)?;
                let changes = Changes::parse(fields).ok_or(Refused::Bad)?;
                changes.apply(path, AtFlags::empty())
            }
            FSETSTAT => {
                let file = self.file(fields)?;
                Changes::parse(fields).ok_or(Refused::Bad)?.apply_to_file(file)
            }
            OPENDIR => {
                let path = path(fields)?;
                let entries = std::fs::read_dir(path)?;
                self.keep(Handle::Directory { path: path.to_path_buf(), entries, begun: false })
            }
            READDIR => self.read_directory(fields),
            REMOVE => no_value(rustix::fs::unlink(path(fields)?)),
            MKDIR => {
                let path = path(fields)?;
                let changes = Changes::parse(fields).ok_or(Refused::Bad)?;
                no_value(rustix::fs::mkdir(path, Mode::from_raw_mode(changes.mode.unwrap_or(0o777) & 0o7777)))
            }
            RMDIR => no_value(rustix::fs::rmdir(path(fields)?)),
            REALPATH => Ok(one_name(absolute(path(fields)?)?.as_os_str().as_bytes())),
            RENAME => {
                let (from, to) = (path(fields)?, path(fields)?);
                // Version 3 does not replace what is there; `posix-rename` does.
                if std::fs::symlink_metadata(to).is_ok() {
                    return Err(Refused::Io(ErrorKind::AlreadyExists.into()));
                }
                no_value(rustix::fs::rename(from, to))
            }
            READLINK => Ok(one_name(std::fs::read_link(path(fields)?)?.as_os_str().as_bytes())),
            SYMLINK => {
                // OpenSSH has these the other way round than the draft, and so has everybody since.
                let (target, link) = (path(fields)?, path(fields)?);
                no_value(rustix::fs::symlink(target, link))
            }
            EXTENDED => self.extended(fields),
            _ => Err(Refused::Status(UNSUPPORTED)),
        }
    }

    fn open(&mut self, fields: &mut Fields<'_>) -> Answer {
        let (path, bits) = (path(fields)?, number(fields)?);
        let changes = Changes::parse(fields).ok_or(Refused::Bad)?;
        let mut flags = match (bits & FOR_READING != 0, bits & FOR_WRITING != 0) {
            (true, true) => OFlags::RDWR,
            (false, true) => OFlags::WRONLY,
            _ => OFlags::RDONLY,
        };
        for (bit, flag) in [
            (APPEND, OFlags::APPEND),
            (CREATE, OFlags::CREATE),
            (TRUNCATE, OFlags::TRUNC),
            (EXCLUSIVE, OFlags::EXCL),
        ] {
            flags.set(flag, bits & bit != 0);
        }
        let mode = Mode::from_raw_mode(changes.mode.unwrap_or(0o666) & 0o7777);
        // A pipe that nobody writes to would stop everything else.
        let file = rustix::fs::open(path, flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK, mode)?;
        rustix::fs::fcntl_setfl(&file, flags & OFlags::APPEND)?;
        self.keep(Handle::File(file.into()))
    }

    fn keep(&mut self, handle: Handle) -> Answer {
        if self.handles.len() >= HANDLES_MAX {
            return Err(Refused::Io(rustix::io::Errno::MFILE.into()));
        }
        while self.handles.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        self.handles.insert(number, handle);
        Ok(Packet::new(HANDLE).bytes(number.to_be_bytes()))
    }

    fn file(&self, fields: &mut Fields<'_>) -> Result<&File, Refused> {
        match self.handles.get(&handle(fields)?) {
            Some(Handle::File(file)) => Ok(file),
            _ => Err(Refused::Status(FAILURE)),
        }
    }

    fn read_directory(&mut self, fields: &mut Fields<'_>) -> Answer {
        let Some(Handle::Directory { path, entries, begun }) = self.handles.get_mut(&handle(fields)?) else {
            return Err(Refused::Status(FAILURE));
        };
        let mut names = Vec::new();
        if !std::mem::replace(begun, true) {
            names.extend(
                [".", ".."]
                    .map(|name| (name.as_bytes().to_vec(), std::fs::symlink_metadata(path.join(name)))),
            );
        }
        for entry in entries.by_ref().take(NAMES_AT_ONCE) {
            let entry = entry?;
            names.push((entry.file_name().as_bytes().to_vec(), entry.metadata()));
        }
        // What has gone meanwhile is not there.
        let names: Vec<_> =
            names.into_iter().filter_map(|(name, metadata)| Some((name, metadata.ok()?))).collect();
        let count = u32::try_from(names.len()).unwrap_or(0);
        if count == 0 {
            return Err(Refused::Status(END_OF_FILE));
        }
        Ok(names.iter().fold(Packet::new(NAME).number(count), |packet, (name, metadata)| {
            put_attributes(packet.bytes(name).bytes(long_name(name, metadata)), metadata)
        }))
    }

    fn extended(&mut self, fields: &mut Fields<'_>) -> Answer {
        let name = fields.text().ok_or(Refused::Bad)?;
        match name {
            "posix-rename@openssh.com" => {
                let (from, to) = (path(fields)?, path(fields)?);
                no_value(rustix::fs::rename(from, to))
            }
            "hardlink@openssh.com" => {
                let (from, to) = (path(fields)?, path(fields)?);
                no_value(rustix::fs::link(from, to))
            }
            "fsync@openssh.com" => {
                self.file(fields)?.sync_all()?;
                Ok(done())
            }
            "lsetstat@openssh.com" => {
                let path = path(fields)?;
                Changes::parse(fields).ok_or(Refused::Bad)?.apply(path, AtFlags::SYMLINK_NOFOLLOW)
            }
            "statvfs@openssh.com" => {
                let about = rustix::fs::statvfs(path(fields)?)?;
                let numbers = [
                    about.f_bsize,
                    about.f_frsize,
                    about.f_blocks,
                    about.f_bfree,
                    about.f_bavail,
                    about.f_files,
                    about.f_ffree,
                    about.f_favail,
                    about.f_fsid,
                    u64::from(about.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY)),
                    about.f_namemax,
                ];
                Ok(numbers.into_iter().fold(Packet::new(EXTENDED_REPLY), Packet::long))
            }
            "limits@openssh.com" => {
                let numbers =
                    [MESSAGE_LEN_MAX.into(), PIECE_LEN_MAX.into(), PIECE_LEN_MAX.into(), HANDLES_MAX as u64];
                Ok(numbers.into_iter().fold(Packet::new(EXTENDED_REPLY), Packet::long))
            }
            "expand-path@openssh.com" => {
                let path = path(fields)?;
                let home = std::env::var_os("HOME").unwrap_or_else(|| "/".into());
                let expanded = match path.strip_prefix("~") {
                    Ok(rest) => Path::new(&home).join(rest),
                    Err(_) => path.to_path_buf(),
                };
                Ok(one_name(absolute(&expanded)?.as_os_str().as_bytes()))
            }
            "copy-data" => {
                let (from, offset, len) = (self.file(fields)?, long(fields)?, long(fields)?);
                beyond::copy((from, offset), len, (self.file(fields)?, long(fields)?))
            }
            "users-groups-by-id@openssh.com" => beyond::names(Path::new("/"), bytes(fields)?, bytes(fields)?),
            _ => Err(Refused::Status(UNSUPPORTED)),
        }
    }
}

fn number(fields: &mut Fields<'_>) -> Result<u32, Refused> {
    fields.number().ok_or(Refused::Bad)
}

fn long(fields: &mut Fields<'_>) -> Result<u64, Refused> {
    fields.long().ok_or(Refused::Bad)
}

fn bytes<'a>(fields: &mut Fields<'a>) -> Result<&'a [u8], Refused> {
    fields.bytes().ok_or(Refused::Bad)
}

fn handle(fields: &mut Fields<'_>) -> Result<u32, Refused> {
    let number = bytes(fields)?.try_into().map_err(|_| Refused::Status(FAILURE))?;
    Ok(u32::from_be_bytes(number))
}

/// An empty path means where one is.
fn path<'a>(fields: &mut Fields<'a>) -> Result<&'a Path, Refused> {
    let bytes = bytes(fields)?;
    Ok(Path::new(if bytes.is_empty() { OsStr::new(".") } else { OsStr::from_bytes(bytes) }))
}

/// Resolves links as far as there is something; a client may ask about what it is to make.
fn absolute(path: &Path) -> io::Result<PathBuf> {
    if let Ok(real) = std::fs::canonicalize(path) {
        return Ok(real);
    }
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            Ok(std::fs::canonicalize(parent)?.join(name))
        }
        _ => std::path::absolute(path),
    }
}

fn status(code: u32, text: &str) -> Packet {
    Packet::new(STATUS).number(code).bytes(text).bytes("en")
}

fn done() -> Packet {
    status(OK, text(OK))
}

fn no_value(result: Result<(), rustix::io::Errno>) -> Answer {
    Ok(result.map(|()| done())?)
}

fn text(code: u32) -> &'static str {
    match code {
        OK => "done",
        END_OF_FILE => "end of file",
        BAD_MESSAGE => "a message that can't be read",
        UNSUPPORTED => "not supported",
        _ => "no such handle",
    }
}

fn code_of(error: &io::Error) -> u32 {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => NO_SUCH_FILE,
        ErrorKind::PermissionDenied => PERMISSION_DENIED,
        _ => FAILURE,
    }
}

fn one_name(name: &[u8]) -> Packet {
    Packet::new(NAME).number(1).bytes(name).bytes(name).number(0)
}

fn attributes(metadata: &Metadata) -> Packet {
    put_attributes(Packet::new(ATTRS), metadata)
}

fn put_attributes(packet: Packet, metadata: &Metadata) -> Packet {
    // Times have 32 bits in this version of the protocol.
    let seconds = |time: i64| u32::try_from(time.clamp(0, u32::MAX.into())).unwrap_or(0);
    packet
        .number(HAS_SIZE | HAS_OWNER | HAS_MODE | HAS_TIMES)
        .long(metadata.len())
        .number(metadata.uid())
        .number(metadata.gid())
        .number(metadata.mode())
        .number(seconds(metadata.atime()))
        .number(seconds(metadata.mtime()))
}

/// A line as `ls -l` has it, for people. The time is UTC.
fn long_name(name: &[u8], metadata: &Metadata) -> Vec<u8> {
    let mode = metadata.mode();
    let kind = match mode & 0o170_000 {
        0o040_000 => 'd',
        0o120_000 => 'l',
        0o060_000 => 'b',
        0o020_000 => 'c',
        0o010_000 => 'p',
        0o140_000 => 's',
        _ => '-',
    };
    let special = [(0o4000, 6, 's'), (0o2000, 3, 's'), (0o1000, 0, 't')];
    let mut rights = String::new();
    for (bit, shift, letter) in special {
        let [read, write, run] = [4, 2, 1].map(|right| mode >> shift & right != 0);
        rights.push(if read { 'r' } else { '-' });
        rights.push(if write { 'w' } else { '-' });
        rights.push(match (mode & bit != 0, run) {
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    let (year, month, day) = date(metadata.mtime().div_euclid(86_400));
    let (links, uid, gid, len) = (metadata.nlink(), metadata.uid(), metadata.gid(), metadata.len());
    let mut line =
        format!("{kind}{rights} {links:>4} {uid:<8} {gid:<8} {len:>8} {year:04}-{month:02}-{day:02} ")
            .into_bytes();
    line.extend(name);
    line
}

/// Year, month and day of a day since 1970, by the calendar's 400 years of 146,097 days.
fn date(day: i64) -> (i64, i64, i64) {
    // Years here begin with March, so that the day that comes and goes is their last.
    let shifted = day + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let part = (5 * day_of_year + 2) / 153;
    let month = if part < 10 { part + 3 } else { part - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day_of_year - (153 * part + 2) / 5 + 1)
}

/// What a client wants a file to have.
#[derive(Debug, Default, PartialEq, Eq)]
struct Changes {
    size: Option<u64>,
    owner: Option<(u32, u32)>,
    mode: Option<u32>,
    /// Of the last access and the last change.
    times: Option<(u32, u32)>,
}

impl Changes {
    fn parse(fields: &mut Fields<'_>) -> Option<Self> {
        let bits = fields.number()?;
        let mut changes = Self::default();
        if bits & HAS_SIZE != 0 {
            changes.size = Some(fields.long()?);
        }
        if bits & HAS_OWNER != 0 {
            changes.owner = Some((fields.number()?, fields.number()?));
        }
        if bits & HAS_MODE != 0 {
            changes.mode = Some(fields.number()?);
        }
        if bits & HAS_TIMES != 0 {
            changes.times = Some((fields.number()?, fields.number()?));
        }
        Some(changes)
    }

    fn timestamps(&self) -> Timestamps {
        let time = |seconds: Option<u32>| match seconds {
            Some(seconds) => Timespec { tv_sec: seconds.into(), tv_nsec: 0 },
            None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        };
        Timestamps {
            last_access: time(self.times.map(|times| times.0)),
            last_modification: time(self.times.map(|times| times.1)),
        }
    }

    /// Times last: the others change them.
    fn apply(&self, path: &Path, flags: AtFlags) -> Answer {
        if let Some(size) = self.size {
            // A pipe that nobody reads from would stop everything else.
            let mut how = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
            how.set(OFlags::NOFOLLOW, flags.contains(AtFlags::SYMLINK_NOFOLLOW));
            rustix::fs::ftruncate(rustix::fs::open(path, how, Mode::empty())?, size)?;
        }
        if let Some((uid, gid)) = self.owner {
            rustix::fs::chownat(CWD, path, owner(uid), group(gid), flags)?;
        }
        if let Some(mode) = self.mode
            && !(flags.contains(AtFlags::SYMLINK_NOFOLLOW) && path.is_symlink())
        {
            // A link has no mode of its own.
            rustix::fs::chmod(path, Mode::from_raw_mode(mode & 0o7777))?;
        }
        if self.times.is_some() {
            rustix::fs::utimensat(CWD, path, &self.timestamps(), flags)?;
        }
        Ok(done())
    }

    fn apply_to_file(&self, file: &File) -> Answer {
        if let Some(size) = self.size {
            file.set_len(size)?;
        }
        if let Some((uid, gid)) = self.owner {
            rustix::fs::fchown(file, owner(uid), group(gid))?;
        }
        if let Some(mode) = self.mode {
            rustix::fs::fchmod(file, Mode::from_raw_mode(mode & 0o7777))?;
        }
        if self.times.is_some() {
            rustix::fs::futimens(file, &self.timestamps())?;
        }
        Ok(done())
    }
}

/// The number that means "unchanged" leaves it so.
fn owner(uid: u32) -> Option<rustix::fs::Uid> {
    (uid != u32::MAX).then(|| rustix::fs::Uid::from_raw(uid))
}

fn group(gid: u32) -> Option<rustix::fs::Gid> {
    (gid != u32::MAX).then(|| rustix::fs::Gid::from_raw(gid))
}

#[cfg(test)]
mod fuzz;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn days_have_dates() {
        for (day, text) in
            [(0, (1970, 1, 1)), (19_782, (2024, 2, 29)), (20_782, (2026, 11, 25)), (-1, (1969, 12, 31))]
        {
            assert_eq!(date(day), text);
        }
    }

    #[test]
    fn a_pipe_that_nobody_reads_stops_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (pipe, link) = (dir.path().join("pipe"), dir.path().join("link"));
        rustix::fs::mknodat(CWD, &pipe, rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let mut server = Server { handles: HashMap::new(), next: 0 };
        let mut status = |packet: Packet| {
            let answer = server.answer(&packet.0).unwrap();
            (answer.0[0], Fields::of(&answer.0[5..]).number().unwrap())
        };
        let pipe = pipe.as_os_str().as_bytes();
        let shorten = Packet::new(SETSTAT).number(1).bytes(pipe).number(HAS_SIZE).long(1);
        assert_eq!(status(shorten), (STATUS, FAILURE));
        let open = Packet::new(OPEN).number(2).bytes(pipe).number(FOR_WRITING).number(0);
        assert_eq!(status(open), (STATUS, FAILURE));
        // A link's own attributes are not those of what it leads to.
        std::fs::write(dir.path().join("file"), "content").unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        let of_link = Packet::new(EXTENDED).number(3).bytes("lsetstat@openssh.com");
        let shorten = of_link.bytes(link.as_os_str().as_bytes()).number(HAS_SIZE).long(1);
        assert_eq!(status(shorten), (STATUS, FAILURE));
        assert_eq!(std::fs::read(dir.path().join("file")).unwrap(), b"content");
    }

    #[test]
    fn names_need_not_be_text() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().join(OsStr::from_bytes(b"a\xff\n"));
        std::fs::write(&name, "content").unwrap();
        let mut server = Server { handles: HashMap::new(), next: 0 };
        let open = Packet::new(OPENDIR).number(1).bytes(dir.path().as_os_str().as_bytes());
        let answer = server.answer(&open.0).unwrap();
        assert_eq!(answer, Packet::new(HANDLE).number(1).bytes(0_u32.to_be_bytes()));
        let listed = server.answer(&Packet::new(READDIR).number(2).bytes(0_u32.to_be_bytes()).0).unwrap();
        let mut fields = Fields::of(&listed.0[5..]);
        assert_eq!(fields.number(), Some(3));
        assert!(listed.0.windows(3).any(|part| part == b"a\xff\n"));
        let over = server.answer(&Packet::new(READDIR).number(3).bytes(0_u32.to_be_bytes()).0).unwrap();
        assert_eq!(over.0[..9], [STATUS, 0, 0, 0, 3, 0, 0, 0, END_OF_FILE as u8]);
    }

    proptest! {
        // Kinds that change files are left out: any bytes may be a path.
        #[test]
        fn any_message_has_an_answer_or_none(
            kind in proptest::sample::select(vec![INIT, CLOSE, READ, WRITE, LSTAT, FSTAT, OPENDIR, READDIR, REALPATH, STAT, READLINK, 99, 255]),
            rest in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut server = Server { handles: HashMap::new(), next: 0 };
            let mut message = vec![kind];
            message.extend(rest);
            let _ = server.answer(&message);
        }
    }
}
