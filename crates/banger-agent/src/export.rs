//! A whole tree as one OCI layer: what a vm shows, its root filesystem, or its image.
//!
//! Left out are sockets, files whose name a reader would take for a whiteout, attributes that are overlayfs's own, and
//! what is no part of an image ([`LeftOut`]). The order is that of the names' bytes, so equal trees make equal layers.

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

/// A reader of layers takes a file that is called so for the absence of another one.
const WHITEOUT: &[u8] = b".wh.";
/// What begins like this is overlayfs's.
const OVERLAY_ATTRIBUTES: &[u8] = b"trusted.overlay.";
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

/// Writes everything the running vm shows, without what is mounted on it.
pub(crate) fn export_merged(out: impl Write) -> Result<(), ExportError> {
    let merged = root_alone().map_err(at(Path::new("")))?;
    Layer::new(by_descriptor(&merged), out).write()
}

/// Writes everything of the image on `device`, a filesystem of this kind.
pub(crate) fn export_image(device: &str, kind: &str, out: impl Write) -> Result<(), ExportError> {
    let at_device = |source: io::Error| ExportError { path: device.into(), source };
    let image = mount_aside(device, kind).map_err(at_device)?;
    let mut layer = Layer::new(by_descriptor(&image), out);
    layer.left_out = LeftOut::Nothing;
    layer.write()
}

/// Writes everything of the filesystem that is this machine's root, without what is mounted on it.
pub(crate) fn export_root(out: impl Write) -> Result<(), ExportError> {
    let root = root_alone().map_err(at(Path::new("")))?;
    let mut layer = Layer::new(by_descriptor(&root), out);
    layer.left_out = LeftOut::Identity;
    layer.write()
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

/// Mounts an image's drive a second time, where no path leads: the first mount is hidden behind the overlay.
fn mount_aside(device: &str, kind: &str) -> io::Result<std::os::fd::OwnedFd> {
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
        fsmount, fsopen,
    };
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", device)?;
    // As the first mount of it: one filesystem can't be both.
    fsconfig_set_flag(&context, "ro")?;
    if kind == "ext4" {
        fsconfig_set_flag(&context, "noload")?;
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
    /// What a vm shows.
    MountedAndIdentity,
}

struct Layer<W: Write> {
    top: PathBuf,
    /// The kernel's, which names the directory its modules are mounted on.
    release: Vec<u8>,
    /// Files with several names, by device and number: where the first was written.
    links: HashMap<(u64, u64), Vec<u8>>,
    left_out: LeftOut,
    out: io::BufWriter<W>,
}

impl<W: Write> Layer<W> {
    fn new(top: PathBuf, out: W) -> Self {
        Self {
            top,
            release: rustix::system::uname().release().to_bytes().to_vec(),
            links: HashMap::new(),
            left_out: LeftOut::MountedAndIdentity,
            out: io::BufWriter::with_capacity(64 * 1024, out),
        }
    }

    /// Writes the tree, and its root first.
    fn write(&mut self) -> Result<(), ExportError> {
        let root = Path::new("");
        let real = self.top.join(".");
        let metadata = std::fs::metadata(&real).map_err(at(root))?;
        let xattrs = xattrs(&real).map_err(at(root))?;
        self.header(Path::new("."), &metadata, Kind::Directory, xattrs)?;
        self.directory(root)?;
        self.out.write_all(&END).and_then(|()| self.out.flush()).map_err(at(root))
    }

    fn directory(&mut self, path: &Path) -> Result<(), ExportError> {
        for name in names(&self.top.join(path)).map_err(at(path))? {
            if name.as_bytes().starts_with(WHITEOUT) {
                continue;
            }
            let path = path.join(&name);
            if !self.is_left_out(&path) {
                self.entry(&path)?;
            }
        }
        Ok(())
    }

    fn is_left_out(&self, path: &Path) -> bool {
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
            && names(&self.top.join(path)).is_ok_and(|names| names.len() == 1 && is_release(&names[0]))
    }

    fn entry(&mut self, path: &Path) -> Result<(), ExportError> {
        let real = self.top.join(path);
        let metadata = match std::fs::symlink_metadata(&real) {
            // The vm is running; what was removed meanwhile is not there.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => result.map_err(at(path))?,
        };
        let kind = metadata.file_type();
        if kind.is_dir() {
            let xattrs = xattrs(&real).map_err(at(path))?;
            self.header(path, &metadata, Kind::Directory, xattrs)?;
            return self.directory(path);
        }
        let key = (metadata.dev(), metadata.ino());
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
        let xattrs = xattrs(&real).map_err(at(path))?;
        self.header(path, &metadata, kind, xattrs)
    }

    fn file(&mut self, path: &Path, real: &Path) -> Result<(), ExportError> {
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        let flags = flags.bits().cast_signed();
        let file = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(real);
        let file = file.map_err(at(path))?;
        let metadata = file.metadata().map_err(at(path))?;
        let len = metadata.len();
        let xattrs = xattrs(real).map_err(at(path))?;
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
}

/// The attributes of what is at `real`, without those that are overlayfs's own.
fn xattrs(real: &Path) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    // Nearly no file has any, so asking is worth it.
    if matches!(rustix::fs::llistxattr_query(real), Ok(0) | Err(rustix::io::Errno::OPNOTSUPP)) {
        return Ok(Vec::new());
    }
    let mut list = vec![0; XATTR_LEN_MAX];
    let len = rustix::fs::llistxattr(real, &mut list[..])?;
    let mut names: Vec<&[u8]> = list[..len].split(|&byte| byte == 0).collect();
    names.retain(|name| !name.is_empty() && !name.starts_with(OVERLAY_ATTRIBUTES));
    names.sort_unstable();
    names.into_iter().map(|name| Ok((name.to_vec(), value(real, name)?))).collect()
}

fn value(real: &Path, name: &[u8]) -> io::Result<Vec<u8>> {
    let mut value = vec![0; XATTR_LEN_MAX];
    let len = rustix::fs::lgetxattr(real, name, &mut value[..])?;
    value.truncate(len);
    Ok(value)
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

    /// The layer of this tree.
    fn layer(top: &Path, left_out: LeftOut) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut layer = Layer {
            top: top.to_owned(),
            release: b"6.0".to_vec(),
            links: std::collections::HashMap::new(),
            left_out,
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

    #[test]
    fn a_tree_becomes_a_layer_without_what_is_this_vms() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path();
        for path in ["etc", "proc/1", "usr/lib/modules/6.0", "lib/modules/5.0", "old/sub"] {
            create_dir_all(top.join(path)).unwrap();
        }
        for path in ["etc/hostname", "etc/motd", "etc/.wh.odd", "old/sub/file"] {
            write(top.join(path), path).unwrap();
        }
        hard_link(top.join("etc/motd"), top.join("etc/z-motd")).unwrap();
        symlink("motd", top.join("etc/link")).unwrap();
        mknodat(CWD, top.join("etc/pipe"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(top.join("etc/socket")).unwrap();
        let shown = layer(top, LeftOut::MountedAndIdentity);
        let expected = "d ./|d etc/|l etc/link -> motd|- etc/motd|p etc/pipe|h etc/z-motd link to etc/motd|d lib/|\
            d lib/modules/|d lib/modules/5.0/|d old/|d old/sub/|- old/sub/file|d usr/|d usr/lib/";
        assert_eq!(list(&shown), expected.split('|').collect::<Vec<_>>());
        assert_eq!(layer(top, LeftOut::MountedAndIdentity), shown, "the same tree makes the same layer");
        let of_root = list(&layer(top, LeftOut::Identity));
        let has = |list: &[String], name: &str| list.iter().any(|line| line == name);
        assert!(has(&of_root, "d proc/1/") && has(&of_root, "d usr/lib/modules/6.0/"), "{of_root:?}");
        assert!(!has(&of_root, "- etc/hostname"), "{of_root:?}");
        assert!(has(&list(&layer(top, LeftOut::Nothing)), "- etc/hostname"));
    }

    #[test]
    fn attributes_and_contents_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        write(&file, vec![b'x'; 100_000]).unwrap();
        mark(&file, "user.kept", b"\0\xff");
        let layer = layer(dir.path(), LeftOut::Nothing);
        let has = |text: &[u8]| layer.windows(text.len()).any(|window| window == text);
        assert!(has(b" SCHILY.xattr.user.kept=\0\xff\n"));
        assert!(has(&[b'x'; 100_000]));
        assert_eq!(layer.len() % 512, 0);
    }

    #[test]
    fn holes_are_left_out_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let name = format!("deep/{}", "n".repeat(120));
        let top = dir.path().join("top");
        let file = top.join(&name);
        create_dir_all(file.parent().unwrap()).unwrap();
        let made = std::fs::File::create(&file).unwrap();
        for at in [0, 5 << 20, (9 << 20) + 77] {
            made.write_all_at(b"some data", at).unwrap();
        }
        made.set_len(20 << 20).unwrap();
        let tree = dir.path().join("back");
        create_dir_all(&tree).unwrap();
        let layer = layer(&top, LeftOut::Nothing);
        assert!(layer.len() < 64 << 10, "{}", layer.len());
        write(dir.path().join("layer.tar"), &layer).unwrap();
        let mut tar = std::process::Command::new("tar");
        let tar = tar.arg("-xf").arg(dir.path().join("layer.tar")).arg("-C").arg(&tree);
        assert!(tar.status().unwrap().success());
        assert!(std::fs::read(tree.join(&name)).unwrap() == std::fs::read(&file).unwrap());
        assert_eq!(list(&layer)[2], format!("- {name}"));
    }
}
