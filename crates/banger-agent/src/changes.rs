//! What a vm changed on its image, as one OCI layer; or the whole of what it shows, or of its image.
//!
//! The changes are the overlay's upper directory, read behind the overlay's back: only there can a deleted name be
//! told from one that never was. What overlayfs says with devices and attributes, a layer says with names:
//!
//! | in the upper directory | in the layer |
//! |---|---|
//! | character device 0:0 `x` | empty file `.wh.x` |
//! | directory with `trusted.overlay.opaque=y` | directory, and `.wh..wh..opq` in it |
//! | directory with `trusted.overlay.redirect` | the same, and everything the merged directory shows |
//! | other `trusted.overlay.*` attributes | nothing |
//!
//! A layer has no way to say "renamed", which is why the third needs the merged view. Left out are sockets, files
//! whose name a reader would take for a whiteout, [`MOUNTED`] and [`IDENTITY`]. The order is that of the names' bytes, so equal
//! changes make equal layers.
//!
//! Not done: when a file that has several names in the image is changed in place through one of them, the layer has
//! it under that name only.

use crate::sparse;
use crate::tar::{END, Entry, Kind, padding};
use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io::{self, Read as _, Seek as _, Write};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Whiteouts and opaque marks begin with this.
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Longest list of attribute names and longest value the kernel has (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const XATTR_LEN_MAX: usize = 64 * 1024;
/// What is this boot's and not the image's: where the agent mounts something.
const MOUNTED: [&str; 7] =
    ["dev", "proc", "sys", "run", "var/lib/docker", "var/lib/containerd", "var/lib/containers"];
/// What is this vm's: what the agent writes about it, and a secret of its own.
const IDENTITY: [&str; 5] =
    ["etc/hostname", "etc/hosts", "etc/machine-id", "etc/resolv.conf", "var/lib/systemd/random-seed"];
/// Where the kernel's modules are mounted; the directory is left out where nothing else is in it.
const MODULES: [&str; 2] = ["lib/modules", "usr/lib/modules"];

/// A step failed on a path of the layer.
#[derive(Debug)]
pub(crate) struct ExportError {
    pub(crate) path: PathBuf,
    pub(crate) source: io::Error,
}

/// Writes the changes on the disk `device` of the running vm as a layer.
pub(crate) fn export(device: &str, out: impl Write) -> Result<(), ExportError> {
    rustix::fs::sync();
    let at_disk = |source: io::Error| ExportError { path: device.into(), source };
    let disk = mount_aside(device, "ext4", false).map_err(at_disk)?;
    let merged = root_alone().map_err(at_disk)?;
    let mut layer = Layer::new(by_descriptor(&disk).join("upper"), by_descriptor(&merged), out);
    layer.write()
}

/// Writes everything the running vm shows, without what is mounted on it.
pub(crate) fn export_merged(out: impl Write) -> Result<(), ExportError> {
    let merged = root_alone().map_err(at(Path::new("")))?;
    Layer::new(PathBuf::new(), by_descriptor(&merged), out).write_tree()
}

/// Writes everything of the image on `device`, a filesystem of this kind.
pub(crate) fn export_image(device: &str, kind: &str, out: impl Write) -> Result<(), ExportError> {
    let at_device = |source: io::Error| ExportError { path: device.into(), source };
    let image = mount_aside(device, kind, true).map_err(at_device)?;
    let mut layer = Layer::new(PathBuf::new(), by_descriptor(&image), out);
    layer.left_out = LeftOut::Nothing;
    layer.write_tree()
}

/// Writes everything of the filesystem that is this machine's root, without what is mounted on it.
pub(crate) fn export_root(out: impl Write) -> Result<(), ExportError> {
    let root = root_alone().map_err(at(Path::new("")))?;
    let mut layer = Layer::new(PathBuf::new(), by_descriptor(&root), out);
    layer.left_out = LeftOut::Identity;
    layer.write_tree()
}

/// A copy of the root's mount alone: without what is mounted on it.
fn root_alone() -> io::Result<std::os::fd::OwnedFd> {
    let flags =
        rustix::mount::OpenTreeFlags::OPEN_TREE_CLONE | rustix::mount::OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(rustix::mount::open_tree(rustix::fs::CWD, "/", flags)?)
}

/// Detached mounts have no path of their own, but one by way of the descriptor.
fn by_descriptor(fd: &std::os::fd::OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Mounts a drive a second time, where no path leads: the first mount is hidden behind the overlay.
fn mount_aside(device: &str, kind: &str, is_image: bool) -> io::Result<std::os::fd::OwnedFd> {
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
        fsmount, fsopen,
    };
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", device)?;
    if is_image {
        // As the first mount of it: one filesystem can't be both.
        fsconfig_set_flag(&context, "ro")?;
        if kind == "ext4" {
            fsconfig_set_flag(&context, "noload")?;
        }
    }
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOATIME;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// What of a tree is not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LeftOut {
    /// An image's own: nothing in it is a vm's.
    Nothing,
    /// A vm's root filesystem, in which nothing of banger's is mounted.
    Identity,
    /// What a vm shows, or its changes.
    MountedAndIdentity,
}

/// Which of the two trees a directory is read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Source {
    Upper,
    /// The upper directory, in a directory that hides the image's already.
    NewUpper,
    Merged,
}

struct Layer<'a, W: Write> {
    upper: PathBuf,
    merged: PathBuf,
    overlay_attributes: &'a [u8],
    /// The kernel's, which names the directory its modules are mounted on.
    release: Vec<u8>,
    /// Files with several names: where the first was written.
    links: HashMap<(bool, u64, u64), Vec<u8>>,
    left_out: LeftOut,
    out: io::BufWriter<W>,
}

impl<W: Write> Layer<'_, W> {
    fn new(upper: PathBuf, merged: PathBuf, out: W) -> Self {
        Self {
            upper,
            merged,
            overlay_attributes: b"trusted.overlay.",
            release: rustix::system::uname().release().to_bytes().to_vec(),
            links: HashMap::new(),
            left_out: LeftOut::MountedAndIdentity,
            out: io::BufWriter::with_capacity(64 * 1024, out),
        }
    }

    /// Writes the merged tree, and its root first.
    fn write_tree(&mut self) -> Result<(), ExportError> {
        let root = Path::new("");
        let real = self.merged.join(".");
        let metadata = std::fs::metadata(&real).map_err(at(root))?;
        let xattrs = self.xattrs(&real).map_err(at(root))?;
        self.header(Path::new("."), &metadata, Kind::Directory, xattrs)?;
        self.directory(root, Source::Merged)?;
        self.out.write_all(&END).and_then(|()| self.out.flush()).map_err(at(root))
    }

    fn write(&mut self) -> Result<(), ExportError> {
        self.directory(Path::new(""), Source::Upper)?;
        self.out.write_all(&END).and_then(|()| self.out.flush()).map_err(at(Path::new("")))
    }

    fn real(&self, path: &Path, source: Source) -> PathBuf {
        if source == Source::Merged { self.merged.join(path) } else { self.upper.join(path) }
    }

    fn directory(&mut self, path: &Path, source: Source) -> Result<(), ExportError> {
        for name in names(&self.real(path, source)).map_err(at(path))? {
            if name.as_bytes().starts_with(WHITEOUT) {
                continue;
            }
            let path = path.join(&name);
            if !self.is_left_out(&path, source) {
                self.entry(&path, source)?;
            }
        }
        Ok(())
    }

    fn is_left_out(&self, path: &Path, source: Source) -> bool {
        let is_one_of = |paths: &[&str]| paths.iter().any(|left_out| Path::new(left_out) == path);
        match self.left_out {
            LeftOut::Nothing => return false,
            LeftOut::Identity => return is_one_of(&IDENTITY),
            LeftOut::MountedAndIdentity if is_one_of(&MOUNTED) || is_one_of(&IDENTITY) => return true,
            LeftOut::MountedAndIdentity => {}
        }
        let is_release = |name: &std::ffi::OsStr| name.as_bytes() == self.release;
        if path.file_name().is_some_and(is_release) {
            return MODULES.iter().any(|modules| path.parent() == Some(Path::new(modules)));
        }
        MODULES.iter().any(|modules| Path::new(modules) == path)
            && names(&self.real(path, source)).is_ok_and(|names| names.len() == 1 && is_release(&names[0]))
    }

    fn entry(&mut self, path: &Path, source: Source) -> Result<(), ExportError> {
        let real = self.real(path, source);
        let metadata = match std::fs::symlink_metadata(&real) {
            // The vm is running; what was removed meanwhile is not there.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => result.map_err(at(path))?,
        };
        let kind = metadata.file_type();
        if kind.is_dir() {
            return self.subdirectory(path, &metadata, source);
        }
        if kind.is_char_device() && metadata.rdev() == 0 && source != Source::Merged {
            let name = path.file_name().unwrap_or_default();
            return self.mark(path, &path.with_file_name(prefixed(name)));
        }
        let key = (source == Source::Merged, metadata.dev(), metadata.ino());
        if metadata.nlink() > 1 {
            if let Some(to) = self.links.get(&key) {
                let kind = Kind::HardLink { to: to.clone() };
                return self.header(path, &metadata, kind, Vec::new());
            }
            self.links.insert(key, path.as_os_str().as_bytes().to_vec());
        }
        let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
        let kind = if kind.is_file() {
            return self.file(path, &real);
        } else if kind.is_symlink() {
            let to = std::fs::read_link(&real).map_err(at(path))?;
            Kind::SymbolicLink { to: to.into_os_string().into_vec() }
        } else if kind.is_char_device() {
            Kind::CharacterDevice { major, minor }
        } else if kind.is_block_device() {
            Kind::BlockDevice { major, minor }
        } else if kind.is_fifo() {
            Kind::Fifo
        } else {
            return Ok(());
        };
        let xattrs = self.xattrs(&real).map_err(at(path))?;
        self.header(path, &metadata, kind, xattrs)
    }

    fn subdirectory(&mut self, path: &Path, metadata: &Metadata, source: Source) -> Result<(), ExportError> {
        let real = self.real(path, source);
        let xattrs = self.xattrs(&real).map_err(at(path))?;
        self.header(path, metadata, Kind::Directory, xattrs)?;
        let redirected = || self.overlay_attribute(&real, b"redirect").is_some();
        let inside = if source == Source::Merged || redirected() {
            Source::Merged
        } else if self.overlay_attribute(&real, b"opaque").as_deref() == Some(b"y") {
            Source::NewUpper
        } else {
            source
        };
        if source == Source::Upper && inside != Source::Upper {
            self.mark(path, &path.join(std::ffi::OsStr::from_bytes(OPAQUE)))?;
        }
        self.directory(path, inside)
    }

    fn file(&mut self, path: &Path, real: &Path) -> Result<(), ExportError> {
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        let flags = flags.bits().cast_signed();
        let file = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(real);
        let file = file.map_err(at(path))?;
        let metadata = file.metadata().map_err(at(path))?;
        let len = metadata.len();
        let xattrs = self.xattrs(real).map_err(at(path))?;
        let Some(pieces) = sparse::pieces(&file, len) else {
            self.header(path, &metadata, Kind::File { len }, xattrs)?;
            self.content(&file, (0, len)).map_err(at(path))?;
            return self.out.write_all(padding(len)).map_err(at(path));
        };
        let map = sparse::map(&pieces, len);
        let stored = map.len() as u64 + pieces.iter().map(|(_, len)| len).sum::<u64>();
        self.header(path, &metadata, Kind::Sparse { len, stored }, xattrs)?;
        self.out.write_all(&map).map_err(at(path))?;
        for piece in pieces {
            self.content(&file, piece).map_err(at(path))?;
        }
        self.out.write_all(padding(stored)).map_err(at(path))
    }

    /// Writes a piece of a file, `(offset, length)`. The length is written down already: a file that changes meanwhile is
    /// cut, or filled up with zeroes.
    fn content(&mut self, mut file: &File, (start, len): (u64, u64)) -> io::Result<()> {
        file.seek(io::SeekFrom::Start(start))?;
        let copied = io::copy(&mut file.take(len), &mut self.out)?;
        io::copy(&mut io::repeat(0).take(len - copied), &mut self.out)?;
        Ok(())
    }

    fn header(
        &mut self,
        path: &Path,
        metadata: &Metadata,
        kind: Kind,
        xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    ) -> Result<(), ExportError> {
        let entry = Entry {
            path: path.as_os_str().as_bytes().to_vec(),
            kind,
            mode: metadata.mode(),
            uid: metadata.uid(),
            gid: metadata.gid(),
            mtime: (metadata.mtime(), u32::try_from(metadata.mtime_nsec()).unwrap_or(0)),
            xattrs,
        };
        self.out.write_all(&entry.header()).map_err(at(path))
    }

    /// Writes an empty file whose name alone says something.
    fn mark(&mut self, about: &Path, path: &Path) -> Result<(), ExportError> {
        let path = path.as_os_str().as_bytes().to_vec();
        let kind = Kind::File { len: 0 };
        let entry = Entry { path, kind, mode: 0, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() };
        self.out.write_all(&entry.header()).map_err(at(about))
    }

    fn overlay_attribute(&self, real: &Path, name: &[u8]) -> Option<Vec<u8>> {
        value(real, &[self.overlay_attributes, name].concat()).ok()
    }

    /// The attributes of what is at `real`, without those that are overlayfs's own.
    fn xattrs(&self, real: &Path) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        // Nearly no file has any, so asking is worth it.
        if matches!(rustix::fs::llistxattr_query(real), Ok(0) | Err(rustix::io::Errno::OPNOTSUPP)) {
            return Ok(Vec::new());
        }
        let mut list = vec![0; XATTR_LEN_MAX];
        let len = rustix::fs::llistxattr(real, &mut list[..])?;
        let mut names: Vec<&[u8]> = list[..len].split(|&byte| byte == 0).collect();
        names.retain(|name| !name.is_empty() && !name.starts_with(self.overlay_attributes));
        names.sort_unstable();
        names.into_iter().map(|name| Ok((name.to_vec(), value(real, name)?))).collect()
    }
}

fn value(real: &Path, name: &[u8]) -> io::Result<Vec<u8>> {
    let mut value = vec![0; XATTR_LEN_MAX];
    let len = rustix::fs::lgetxattr(real, name, &mut value[..])?;
    value.truncate(len);
    Ok(value)
}

fn prefixed(name: &std::ffi::OsStr) -> OsString {
    OsString::from_vec([WHITEOUT, name.as_bytes()].concat())
}

fn names(dir: &Path) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        names.push(entry?.file_name());
    }
    names.sort_unstable();
    Ok(names)
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> ExportError {
    let path = path.to_path_buf();
    |source| ExportError { path, source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods, reason = "a test")]
    use super::{Layer, LeftOut};
    use rustix::fs::{CWD, FileType, Mode, XattrFlags, lsetxattr, mknodat};
    use std::fs::{create_dir_all, hard_link, write};
    use std::os::unix::fs::{FileExt as _, symlink};
    use std::path::Path;

    /// The layer of these two trees. Attributes of overlayfs are `user.` ones here: `trusted.` needs privileges.
    fn layer(dir: &Path) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut layer = Layer {
            upper: dir.join("upper"),
            merged: dir.join("merged"),
            overlay_attributes: b"user.overlay.",
            release: b"6.0".to_vec(),
            links: std::collections::HashMap::new(),
            left_out: LeftOut::MountedAndIdentity,
            out: std::io::BufWriter::new(&mut bytes),
        };
        layer.write().unwrap();
        drop(layer);
        bytes
    }

    /// Types and names, one to a line.
    fn list(layer: &[u8]) -> Vec<String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, layer).unwrap();
        let mut tar = std::process::Command::new("tar");
        let output = tar.args(["-tv", "--quoting-style=literal", "-f"]).arg(file.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let words = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            format!("{} {}", &line[..1], words[5..].join(" "))
        };
        String::from_utf8(output.stdout).unwrap().lines().map(words).collect()
    }

    fn mark(path: &Path, name: &str, value: &[u8]) {
        lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
    }

    fn node(path: &Path, kind: FileType) {
        mknodat(CWD, path, kind, Mode::from_raw_mode(0o600), 0).unwrap();
    }

    #[test]
    fn overlay_becomes_layer() {
        let dir = tempfile::tempdir().unwrap();
        let (upper, merged) = (dir.path().join("upper"), dir.path().join("merged"));
        for path in
            ["etc", "old/sub", "new/deep", "moved", "proc/1", "usr/lib/modules/6.0", "lib/modules/5.0"]
        {
            create_dir_all(upper.join(path)).unwrap();
        }
        for path in ["etc/hostname", "etc/motd", "etc/.wh.odd", "old/sub/file", "new/deep/file"] {
            write(upper.join(path), path).unwrap();
        }
        hard_link(upper.join("etc/motd"), upper.join("etc/z-motd")).unwrap();
        symlink("motd", upper.join("etc/link")).unwrap();
        node(&upper.join("etc/pipe"), FileType::Fifo);
        node(&upper.join("etc/gone"), FileType::CharacterDevice);
        node(&upper.join("moved/gone-inside"), FileType::CharacterDevice);
        let _socket = std::os::unix::net::UnixListener::bind(upper.join("etc/socket")).unwrap();
        mark(&upper.join("new"), "user.overlay.opaque", b"y");
        mark(&upper.join("new/deep"), "user.overlay.opaque", b"y");
        mark(&upper.join("old/sub"), "user.overlay.opaque", b"x");
        mark(&upper.join("moved"), "user.overlay.redirect", b"/image-name");
        create_dir_all(merged.join("moved/dir")).unwrap();
        write(merged.join("moved/dir/from-image"), "image").unwrap();
        write(merged.join("moved/own"), "own").unwrap();
        let first = layer(dir.path());
        let expected = "d etc/|- etc/.wh.gone|l etc/link -> motd|- etc/motd|p etc/pipe|h etc/z-motd link to etc/motd|\
            d lib/|d lib/modules/|d lib/modules/5.0/|d moved/|- moved/.wh..wh..opq|d moved/dir/|\
            - moved/dir/from-image|- moved/own|d new/|- new/.wh..wh..opq|d new/deep/|- new/deep/file|d old/|\
            d old/sub/|- old/sub/file|d usr/|d usr/lib/";
        assert_eq!(list(&first), expected.split('|').collect::<Vec<_>>());
        assert_eq!(layer(dir.path()), first, "the same changes make the same layer");
    }

    #[test]
    fn attributes_and_contents_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        create_dir_all(dir.path().join("upper")).unwrap();
        let file = dir.path().join("upper/file");
        write(&file, vec![b'x'; 100_000]).unwrap();
        mark(&file, "user.kept", b"\0\xff");
        mark(&file, "user.overlay.origin", b"handle");
        let layer = layer(dir.path());
        let has = |text: &[u8]| layer.windows(text.len()).any(|window| window == text);
        assert!(has(b" SCHILY.xattr.user.kept=\0\xff\n") && !has(b"overlay"));
        assert!(has(&[b'x'; 100_000]));
        assert_eq!(layer.len() % 512, 0);
    }

    #[test]
    fn holes_are_left_out_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let name = format!("deep/{}", "n".repeat(120));
        let file = dir.path().join("upper").join(&name);
        create_dir_all(file.parent().unwrap()).unwrap();
        let made = std::fs::File::create(&file).unwrap();
        for at in [0, 5 << 20, (9 << 20) + 77] {
            made.write_all_at(b"some data", at).unwrap();
        }
        made.set_len(20 << 20).unwrap();
        let tree = dir.path().join("back");
        create_dir_all(&tree).unwrap();
        let layer = layer(dir.path());
        assert!(layer.len() < 64 << 10, "{}", layer.len());
        write(dir.path().join("layer.tar"), &layer).unwrap();
        let mut tar = std::process::Command::new("tar");
        let tar = tar.arg("-xf").arg(dir.path().join("layer.tar")).arg("-C").arg(&tree);
        assert!(tar.status().unwrap().success());
        assert!(std::fs::read(tree.join(&name)).unwrap() == std::fs::read(&file).unwrap());
        assert_eq!(list(&layer)[1], format!("- {name}"));
    }

    #[test]
    fn no_changes_are_an_empty_layer() {
        let dir = tempfile::tempdir().unwrap();
        create_dir_all(dir.path().join("upper")).unwrap();
        assert_eq!(layer(dir.path()), [0; 1024]);
    }
}
