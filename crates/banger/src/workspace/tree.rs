//! A directory of the owner's, in which files are looked at and replaced without following any link.

use super::base::FileKind;
use super::objects::{Format, name_of};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{ErrorKind, Read as _, Result, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// What is under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) kind: FileKind,
    /// Permission bits.
    pub(crate) mode: u32,
    pub(crate) content: Vec<u8>,
}

impl Found {
    /// Kind and name of the content, as lists have them.
    pub(crate) fn name(&self, format: Format) -> Result<(FileKind, String)> {
        Ok((self.kind, name_of(format, self.content.len() as u64, &mut self.content.as_slice())?))
    }
}

/// An open directory.
#[derive(Debug)]
pub(crate) struct Tree {
    root: OwnedFd,
}

impl Tree {
    /// Opens a directory.
    ///
    /// # Errors
    /// When it is none.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { root: rustix::fs::open(path, flags, Mode::empty())? })
    }

    fn open_below(&self, path: &Path, flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        rustix::fs::openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), beneath)
    }

    /// Opens the directory that has this name; none when there is none.
    fn parent(&self, path: &Path) -> Result<Option<(OwnedFd, OsString)>> {
        let parent = path.parent().unwrap_or(Path::new(""));
        let name = path.file_name().ok_or(ErrorKind::InvalidInput)?.to_owned();
        match self.open_below(parent, OFlags::PATH | OFlags::DIRECTORY) {
            Ok(parent) => Ok(Some((parent, name))),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads what is under a name; none when there is no file and no link.
    ///
    /// # Errors
    /// When a parent is a link, or it can't be read.
    pub(crate) fn read(&self, path: &Path) -> Result<Option<Found>> {
        let Some((parent, name)) = self.parent(path)? else { return Ok(None) };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match rustix::fs::openat(&parent, &name, flags, Mode::empty()) {
            Ok(file) => {
                let mut file = File::from(file);
                let metadata = file.metadata()?;
                if !metadata.is_file() {
                    return Ok(None);
                }
                let mut content = Vec::new();
                file.read_to_end(&mut content)?;
                let mode = metadata.mode() & 0o777;
                Ok(Some(Found { kind: FileKind::of_mode(mode), mode, content }))
            }
            Err(Errno::LOOP) => {
                let target = rustix::fs::readlinkat(&parent, &name, Vec::new())?;
                Ok(Some(Found { kind: FileKind::Link, mode: 0o777, content: target.into_bytes() }))
            }
            Err(Errno::NOENT | Errno::NXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Tells whether anything at all is under a name, a directory for instance.
    pub(crate) fn is_taken(&self, path: &Path) -> Result<bool> {
        let Some((parent, name)) = self.parent(path)? else { return Ok(false) };
        match rustix::fs::statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Puts a file or link under a name, replacing what is there, which is no directory. Parents are made.
    ///
    /// # Errors
    /// When a parent is a link or no directory, and those of writing.
    pub(crate) fn write(&self, path: &Path, kind: FileKind, mode: u32, content: &[u8]) -> Result<()> {
        let mut made = PathBuf::new();
        for part in path.parent().into_iter().flat_map(Path::components) {
            let (parent, name) = self.parent(&made.join(part))?.ok_or(ErrorKind::NotFound)?;
            match rustix::fs::mkdirat(&parent, &name, Mode::from_raw_mode(0o777)) {
                Err(Errno::EXIST) | Ok(()) => made.push(part),
                Err(error) => return Err(error.into()),
            }
        }
        let (parent, name) = self.parent(path)?.ok_or(ErrorKind::NotFound)?;
        let temporary = format!(".banger-{}", std::process::id());
        let _ = rustix::fs::unlinkat(&parent, &temporary, AtFlags::empty());
        if kind == FileKind::Link {
            rustix::fs::symlinkat(OsStr::from_bytes(content), &parent, &temporary)?;
        } else {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&parent, &temporary, flags, Mode::from_raw_mode(mode & 0o777))?;
            File::from(file).write_all(content)?;
        }
        let renamed = rustix::fs::renameat(&parent, &temporary, &parent, &name);
        if renamed.is_err() {
            let _ = rustix::fs::unlinkat(&parent, &temporary, AtFlags::empty());
        }
        Ok(renamed?)
    }

    /// Sets the permission bits of a file that was just written, which the umask may have narrowed.
    ///
    /// # Errors
    /// Those of `fchmod`.
    pub(crate) fn set_mode(&self, path: &Path, mode: u32) -> Result<()> {
        let file = self.open_below(path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK)?;
        Ok(rustix::fs::fchmod(file, Mode::from_raw_mode(mode & 0o777))?)
    }

    /// Removes a file or link, and the directories that are empty then, as git does.
    ///
    /// # Errors
    /// When a parent is a link, and those of removing.
    pub(crate) fn remove(&self, path: &Path) -> Result<()> {
        let Some((parent, name)) = self.parent(path)? else { return Ok(()) };
        match rustix::fs::unlinkat(&parent, &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let mut dir = path.parent();
        while let Some(path) = dir.filter(|path| !path.as_os_str().is_empty()) {
            let Some((parent, name)) = self.parent(path)? else { break };
            if rustix::fs::unlinkat(&parent, &name, AtFlags::REMOVEDIR).is_err() {
                break;
            }
            dir = path.parent();
        }
        Ok(())
    }
}

/// Returns a name from a list as a path.
pub(crate) fn path_of(name: &banger_wire::bytes::ByteString) -> PathBuf {
    PathBuf::from(OsString::from_vec(name.0.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn nothing_is_read_or_written_through_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
        std::fs::create_dir(&root).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("file"), "theirs").unwrap();
        symlink(&outside, root.join("link")).unwrap();
        symlink(outside.join("file"), root.join("name")).unwrap();
        let tree = Tree::open(&root).unwrap();
        assert!(tree.read(Path::new("link/file")).is_err());
        assert!(tree.write(Path::new("link/file"), FileKind::Plain, 0o644, b"x").is_err());
        assert!(tree.write(Path::new("link/new/file"), FileKind::Plain, 0o644, b"x").is_err());
        assert!(tree.remove(Path::new("link/file")).is_err());
        assert!(tree.write(Path::new("../outside/file"), FileKind::Plain, 0o644, b"x").is_err());
        // The link itself is replaced, not what it names.
        assert_eq!(tree.read(Path::new("name")).unwrap().unwrap().kind, FileKind::Link);
        tree.write(Path::new("name"), FileKind::Plain, 0o4777, b"x").unwrap();
        assert_eq!(std::fs::read_to_string(outside.join("file")).unwrap(), "theirs");
        assert_eq!(root.join("name").symlink_metadata().unwrap().mode() & 0o7000, 0);
        tree.write(Path::new("a/b/c"), FileKind::Executable, 0o777, b"x").unwrap();
        assert_eq!(tree.read(Path::new("a/b/c")).unwrap().unwrap().kind, FileKind::Executable);
        tree.remove(Path::new("a/b/c")).unwrap();
        assert!(!root.join("a").exists() && outside.join("file").exists());
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
    }
}
