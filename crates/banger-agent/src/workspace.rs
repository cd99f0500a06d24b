//! A directory that the host places in the guest, and what it asks of it later.
//!
//! Placing unpacks beside the directory and exchanges the two when everything is there and on the disk, so that whatever
//! breaks off leaves the old state or the new one. Collecting only reads.

use banger_wire::bytes::ByteString;
use banger_wire::item::{Item, ItemReader, ItemWriter, Kind};
use rustix::fs::{AtFlags, CWD, RenameFlags, Timespec, Timestamps};
use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::OsString;
use std::fs::{DirBuilder, File, Metadata, OpenOptions, Permissions};
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// Bits of a mode that travel: who may read, write and execute.
const PERMISSIONS: u32 = 0o777;
const NANOSECONDS: i64 = 1_000_000_000;

/// Names what an error is about.
fn at<'a>(path: &'a Path) -> impl FnOnce(Error) -> Error + 'a {
    move |error| Error::new(error.kind(), format!("`{}`: {error}", path.display().to_string().escape_debug()))
}

/// How a directory is placed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    /// Mounted read-only afterwards.
    pub(crate) readonly: bool,
    /// There may be something already.
    pub(crate) replace: bool,
}

/// Replaces `target` by what arrives, and lists what is there then.
///
/// # Errors
/// When anything does not work; `target` is then as it was.
pub(crate) fn place(target: &Path, how: How, input: impl Read, output: impl Write) -> Result<()> {
    let (Some(parent), Some(name), true) = (target.parent(), target.file_name(), target.is_absolute()) else {
        return Err(Error::new(ErrorKind::InvalidInput, "a place is an absolute path with a name"));
    };
    if !how.replace && std::fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(at(target)(Error::new(ErrorKind::AlreadyExists, "there is something already")));
    }
    std::fs::create_dir_all(parent).map_err(at(parent))?;
    let mut staging = OsString::from(".");
    staging.push(name);
    staging.push(".banger-new");
    let staging = parent.join(staging);
    // What a guest that was ended in the middle left behind.
    remove(&staging)?;
    let placed = unpack(&staging, input).and_then(|kept| {
        // A place that was read-only is a mount of its own.
        let _ = rustix::mount::unmount(target, UnmountFlags::DETACH);
        exchange(&staging, target)?;
        keep(&staging, target, &kept)
    });
    let removed = remove(&staging);
    placed.and(removed)?;
    if how.readonly {
        make_readonly(target).map_err(at(target))?;
    }
    let mut writer = ItemWriter::new(output);
    list(target, &mut writer)?;
    writer.item(&Item::End)?;
    writer.flush()
}

fn remove(tree: &Path) -> Result<()> {
    match std::fs::remove_dir_all(tree) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(at(tree)(error)),
        _ => Ok(()),
    }
}

/// Writes files below `root`, each in place of what has its name. What is there already stays otherwise.
///
/// # Errors
/// When anything can't be written; what came before it is there then.
pub(crate) fn write(root: &Path, input: impl Read) -> Result<()> {
    let mut reader = ItemReader::new(input);
    loop {
        let item = reader.next_item()?;
        let path = item.path().map(|path| root.join(path.as_os_str())).unwrap_or_default();
        match item {
            Item::Directory { mode, .. } => {
                let was_there = path.is_dir();
                std::fs::create_dir_all(&path).map_err(at(&path))?;
                if !was_there {
                    let mode = Permissions::from_mode(mode & PERMISSIONS);
                    std::fs::set_permissions(&path, mode).map_err(at(&path))?;
                }
            }
            Item::File { mode, modified, len, .. } => {
                let mut staging = OsString::from(".");
                staging.push(path.file_name().unwrap_or_default());
                staging.push(".banger-new");
                let staging = path.with_file_name(staging);
                remove_file(&staging)?;
                let mut file = create(&staging).map_err(at(&staging))?;
                let copied = std::io::copy(&mut reader.content(), &mut file).map_err(at(&path))?;
                if copied < len {
                    remove_file(&staging)?;
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                file.set_permissions(Permissions::from_mode(mode & PERMISSIONS)).map_err(at(&path))?;
                rustix::fs::futimens(&file, &times(modified))?;
                std::fs::rename(&staging, &path).map_err(at(&path))?;
            }
            Item::End => return Ok(()),
            _ => return Err(ErrorKind::InvalidData.into()),
        }
    }
}

fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(at(path)(error)),
        _ => Ok(()),
    }
}

/// Returns what of the old tree is to stay.
fn unpack(root: &Path, input: impl Read) -> Result<Vec<ByteString>> {
    DirBuilder::new().mode(0o755).create(root).map_err(at(root))?;
    let mut reader = ItemReader::new(input);
    let mut kept = Vec::new();
    loop {
        let item = reader.next_item()?;
        let path = item.path().map(|path| root.join(path.as_os_str())).unwrap_or_default();
        match item {
            Item::Directory { mode, .. } => {
                std::fs::create_dir_all(&path).map_err(at(&path))?;
                let mode = Permissions::from_mode(mode & PERMISSIONS);
                std::fs::set_permissions(&path, mode).map_err(at(&path))?;
            }
            Item::File { mode, modified, len, .. } => {
                let mut file = create(&path).map_err(at(&path))?;
                let copied = std::io::copy(&mut reader.content(), &mut file).map_err(at(&path))?;
                if copied < len {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                file.set_permissions(Permissions::from_mode(mode & PERMISSIONS)).map_err(at(&path))?;
                rustix::fs::futimens(&file, &times(modified))?;
            }
            Item::Link { target, modified, .. } => {
                with_parents(&path, || std::os::unix::fs::symlink(target.as_os_str(), &path))
                    .map_err(at(&path))?;
                rustix::fs::utimensat(CWD, &path, &times(modified), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            Item::Keep { path } => kept.push(path),
            Item::End => break,
            _ => return Err(ErrorKind::InvalidData.into()),
        }
    }
    // A rename may reach the disk before what was written into new files.
    rustix::fs::syncfs(File::open(root)?)?;
    Ok(kept)
}

fn create(path: &Path) -> Result<File> {
    let open = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    with_parents(path, open)
}

/// Most parents are there already, so they are made only when one is missing.
fn with_parents<T>(path: &Path, make: impl Fn() -> Result<T>) -> Result<T> {
    match make() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            std::fs::create_dir_all(path.parent().unwrap_or(path))?;
            make()
        }
        made => made,
    }
}

fn times(modified: i64) -> Timestamps {
    let time =
        Timespec { tv_sec: modified.div_euclid(NANOSECONDS), tv_nsec: modified.rem_euclid(NANOSECONDS) };
    Timestamps { last_access: time, last_modification: time }
}

/// Puts the new tree in its place; the old one, where there is one, is under the new one's name afterwards.
fn exchange(staging: &Path, target: &Path) -> Result<()> {
    let exchanged = rustix::fs::renameat_with(CWD, staging, CWD, target, RenameFlags::EXCHANGE);
    match exchanged {
        Err(rustix::io::Errno::NOENT) => std::fs::rename(staging, target),
        exchanged => exchanged.map_err(Error::from),
    }
    .map_err(at(target))
}

/// Moves what is to stay from the old tree into the new one, unless the new one has such a name.
fn keep(old: &Path, new: &Path, kept: &[ByteString]) -> Result<()> {
    for path in kept {
        let (from, to) = (old.join(path.as_os_str()), new.join(path.as_os_str()));
        if from.symlink_metadata().is_ok() && to.symlink_metadata().is_err() {
            with_parents(&to, || std::fs::rename(&from, &to)).map_err(at(&to))?;
        }
    }
    Ok(())
}

/// Mounts the directory on itself, read-only: permission bits would not stop the guest's root.
fn make_readonly(target: &Path) -> Result<()> {
    rustix::mount::mount_bind(target, target)?;
    rustix::mount::mount_remount(target, MountFlags::BIND | MountFlags::RDONLY, c"")?;
    Ok(())
}

/// Lists `root`, then sends what is asked for.
///
/// # Errors
/// When anything can't be read, or a stream ends.
pub(crate) fn collect(root: &Path, input: impl Read, output: impl Write) -> Result<()> {
    let mut writer = ItemWriter::new(output);
    list(root, &mut writer)?;
    writer.item(&Item::End)?;
    writer.flush()?;
    let mut reader = ItemReader::new(input);
    loop {
        match reader.next_item()? {
            Item::Want { path } => {
                let full = root.join(path.as_os_str());
                send(&full, path, &mut writer).map_err(at(&full))?;
                // The host may wait for it before it asks for more.
                writer.flush()?;
            }
            Item::End => break,
            _ => return Err(ErrorKind::InvalidData.into()),
        }
    }
    writer.item(&Item::End)?;
    writer.flush()
}

fn list(root: &Path, writer: &mut ItemWriter<impl Write>) -> Result<()> {
    let device = root.symlink_metadata().map_err(at(root))?.dev();
    let mut waiting = vec![PathBuf::new()];
    while let Some(dir) = waiting.pop() {
        let full = root.join(&dir);
        let entries = match std::fs::read_dir(&full) {
            // Gone meanwhile: whoever works in the guest goes on doing so.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            entries => entries.map_err(at(&full))?,
        };
        for entry in entries {
            let entry = entry.map_err(at(&full))?;
            if entry.file_name() == ".git" {
                continue;
            }
            let path = dir.join(entry.file_name());
            let Ok(found) = entry.metadata() else { continue };
            // What is mounted here is not the tree's.
            if found.is_dir() && found.dev() == device {
                waiting.push(path.clone());
            }
            writer.item(&listed(&path, &found))?;
        }
    }
    Ok(())
}

fn listed(path: &Path, found: &Metadata) -> Item {
    let kind = match found.file_type() {
        kind if kind.is_dir() => Kind::Directory,
        kind if kind.is_file() => Kind::File,
        kind if kind.is_symlink() => Kind::Link,
        _ => Kind::Special,
    };
    Item::Listed {
        path: ByteString(path.as_os_str().as_bytes().to_vec()),
        kind,
        mode: found.mode() & 0o7777,
        len: found.len(),
        changed: found.ctime().saturating_mul(NANOSECONDS).saturating_add(found.ctime_nsec()),
    }
}

fn send(full: &Path, path: ByteString, writer: &mut ItemWriter<impl Write>) -> Result<()> {
    let found = full.symlink_metadata().ok();
    let modified =
        |found: &Metadata| found.mtime().saturating_mul(NANOSECONDS).saturating_add(found.mtime_nsec());
    match found {
        Some(found) if found.is_symlink() => {
            let target = ByteString::from(std::fs::read_link(full)?.into_os_string());
            writer.item(&Item::Link { path, target, modified: modified(&found) })
        }
        Some(found) if found.is_file() => {
            let mut file = File::open(full)?;
            let found = file.metadata()?;
            let item = Item::File {
                path,
                mode: found.mode() & 0o7777,
                modified: modified(&found),
                len: found.len(),
            };
            writer.file(&item, &mut file)
        }
        _ => writer.item(&Item::Missing { path }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::sink;
    use std::os::unix::fs::symlink;

    const HOW: How = How { readonly: false, replace: true };

    fn bytes(path: &str) -> ByteString {
        ByteString::from(path)
    }

    /// A stream of one file of each `(name, content)`, of the names to keep, and an end unless it breaks off.
    fn stream(files: &[(&str, &str)], kept: &[&str], ends: bool) -> Vec<u8> {
        let mut stream = Vec::new();
        let mut writer = ItemWriter::new(&mut stream);
        for (name, content) in files {
            let len = content.len() as u64;
            let item = Item::File { path: bytes(name), mode: 0o4755, modified: 1_500_000_000, len };
            writer.file(&item, &mut content.as_bytes()).unwrap();
        }
        let link = Item::Link { path: bytes("dir/link"), target: bytes("/etc"), modified: 1_500_000_000 };
        writer.item(&link).unwrap();
        for path in kept {
            writer.item(&Item::Keep { path: bytes(path) }).unwrap();
        }
        if ends {
            writer.item(&Item::End).unwrap();
        }
        stream
    }

    #[test]
    fn a_directory_is_replaced_as_a_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a/repo");
        place(&target, HOW, stream(&[("dir/one", "1"), ("two", "2")], &[], true).as_slice(), &mut sink())
            .unwrap();
        let one = target.join("dir/one").metadata().unwrap();
        assert_eq!((one.mode() & 0o7777, one.mtime()), (0o755, 1));
        assert_eq!(target.join("dir/link").read_link().unwrap(), Path::new("/etc"));
        assert_eq!(target.join("dir/link").symlink_metadata().unwrap().mtime(), 1);
        std::fs::create_dir_all(target.join("built/deep")).unwrap();
        std::fs::write(target.join("built/deep/x"), "x").unwrap();
        let broken = place(&target, HOW, stream(&[("other", "")], &[], false).as_slice(), &mut sink());
        assert_eq!(broken.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert_eq!(std::fs::read_to_string(target.join("two")).unwrap(), "2");
        let again = stream(&[("dir/one", "new")], &["built", "dir/one", "gone"], true);
        place(&target, HOW, again.as_slice(), &mut sink()).unwrap();
        assert_eq!(std::fs::read_to_string(target.join("dir/one")).unwrap(), "new");
        assert!(target.join("built/deep/x").exists() && !target.join("two").exists());
        assert_eq!(
            std::fs::read_dir(dir.path().join("a")).unwrap().count(),
            1,
            "something was left beside it"
        );
    }

    #[test]
    fn files_are_written_beside_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("dir")).unwrap();
        std::fs::set_permissions(dir.path().join("dir"), Permissions::from_mode(0o700)).unwrap();
        std::fs::write(dir.path().join("dir/other"), "stays").unwrap();
        std::fs::write(dir.path().join("elsewhere"), "stays too").unwrap();
        symlink("../elsewhere", dir.path().join("dir/one")).unwrap();
        let items = |ends: bool| {
            let mut stream = Vec::new();
            let mut writer = ItemWriter::new(&mut stream);
            writer.item(&Item::Directory { path: bytes("dir"), mode: 0o755 }).unwrap();
            writer.item(&Item::Directory { path: bytes("new"), mode: 0o750 }).unwrap();
            let item = Item::File { path: bytes("dir/one"), mode: 0o640, modified: 1_500_000_000, len: 1 };
            writer.file(&item, &mut "1".as_bytes()).unwrap();
            if ends {
                writer.item(&Item::End).unwrap();
            }
            stream
        };
        write(dir.path(), items(true).as_slice()).unwrap();
        let mode = |name: &str| dir.path().join(name).symlink_metadata().unwrap().mode() & 0o7777;
        assert_eq!((mode("dir"), mode("new"), mode("dir/one")), (0o700, 0o750, 0o640));
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        // The link was replaced, not written through.
        let read = [read("dir/one"), read("dir/other"), read("elsewhere")];
        assert_eq!(read, ["1", "stays", "stays too"]);
        let broken = write(dir.path(), items(false).as_slice());
        assert_eq!(broken.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        let link = Item::Link { path: bytes("x"), target: bytes("/"), modified: 0 };
        let mut stream = Vec::new();
        ItemWriter::new(&mut stream).item(&link).unwrap();
        assert!(write(dir.path(), stream.as_slice()).is_err(), "links are not written");
    }

    #[test]
    fn what_is_there_is_listed_and_sent_without_git() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        std::fs::create_dir_all(root.join("a/.git")).unwrap();
        std::fs::write(root.join("a/.git/config"), "").unwrap();
        std::fs::write(root.join("a/file"), "content").unwrap();
        symlink("nowhere", root.join("link")).unwrap();
        rustix::fs::mknodat(CWD, root.join("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let mut wants = Vec::new();
        let mut writer = ItemWriter::new(&mut wants);
        for path in ["a/file", "link", "pipe", "none", "a"] {
            writer.item(&Item::Want { path: bytes(path) }).unwrap();
        }
        writer.item(&Item::End).unwrap();
        let mut answer = Vec::new();
        collect(root, wants.as_slice(), &mut answer).unwrap();
        let mut reader = ItemReader::new(answer.as_slice());
        let mut listed = Vec::new();
        while let Item::Listed { path, kind, .. } = reader.next_item().unwrap() {
            listed.push((String::from_utf8(path.0).unwrap(), kind));
        }
        listed.sort_by(|a, b| a.0.cmp(&b.0));
        let expected =
            [("a", Kind::Directory), ("a/file", Kind::File), ("link", Kind::Link), ("pipe", Kind::Special)];
        assert_eq!(listed, expected.map(|(name, kind)| (name.to_owned(), kind)));
        assert!(matches!(reader.next_item().unwrap(), Item::File { len: 7, .. }));
        let mut content = String::new();
        reader.content().read_to_string(&mut content).unwrap();
        assert_eq!(content, "content");
        assert!(matches!(reader.next_item().unwrap(), Item::Link { .. }));
        for _ in 0..3 {
            assert!(matches!(reader.next_item().unwrap(), Item::Missing { .. }));
        }
        assert_eq!(reader.next_item().unwrap(), Item::End);
    }
}
