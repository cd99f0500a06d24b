//! Kernels that are on this machine already: a file, with or without its modules, or a directory such as `/boot`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::module::name_of;
use super::{
    Contents, KernelError, KernelMeta, Origin, TREE_BYTES_MAX, TREE_FILES_MAX, is_module, write_kernel,
};

/// The longest kernel file that is read.
const KERNEL_FILE_MAX: u64 = 512 << 20;
/// What kernel files' names begin with.
const KERNEL_NAMES: [&str; 4] = ["vmlinuz", "vmlinux", "bzImage", "Image"];
/// What is in a directory of modules besides the modules and needed again.
const BUILTIN: [&str; 3] = ["modules.order", "modules.builtin", "modules.builtin.modinfo"];
/// Directories deep.
const DEPTH_MAX: usize = 24;
/// How a kernel begins to say what it is.
const BANNER: &[u8] = b"Linux version ";
/// The longest release, as in `struct new_utsname`.
const RELEASE_LEN_MAX: usize = 64;
/// What no vm gets on without, as a module or built in.
const DRIVERS: [&str; 5] = ["virtio_pci", "virtio_blk", "virtio_console", "overlay", "ext4"];

/// A kernel that was found, not yet read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFiles {
    /// The kernel: a vmlinux, bzImage or arm64 Image.
    pub kernel: PathBuf,
    /// Its modules: `/lib/modules/<release>`, or a directory with that below it.
    pub modules: Option<PathBuf>,
}

impl KernelFiles {
    /// Looks for a kernel in a directory: `/boot`, or the root of a tree that has one. Of several the one of `release` is
    /// taken.
    ///
    /// # Errors
    /// When the directory can't be read, there is none in it, or several and none is of the release.
    pub fn find(dir: &Path, release: Option<&str>) -> Result<Self, KernelError> {
        // Distributions close `/boot` to users; only what is below may be missing.
        fs::read_dir(dir).map_err(|source| KernelError::Read { path: dir.to_owned(), source })?;
        let mut found = Vec::new();
        for place in [dir.to_owned(), dir.join("boot")] {
            let Ok(entries) = fs::read_dir(&place) else { continue };
            for entry in entries.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let named = KERNEL_NAMES.iter().any(|kernel| {
                    name.strip_prefix(kernel)
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '.']))
                });
                // A link beside it is the same kernel once more.
                if named && entry.file_type().is_ok_and(|kind| kind.is_file()) {
                    found.push(entry.path());
                }
            }
        }
        found.sort();
        if let (Some(release), true) = (release, found.len() > 1) {
            found.retain(|path| {
                path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(release))
            });
        }
        let kernel = match &found[..] {
            [kernel] => kernel.clone(),
            [] => return Err(KernelError::NotFound(dir.to_owned())),
            several => {
                let names = several.iter().map(|path| format!("`{}`", path.display())).collect::<Vec<_>>();
                return Err(KernelError::Several(names.join(", ")));
            }
        };
        Ok(Self { modules: modules_beside(dir), kernel })
    }

    /// Makes the kernel directory in `dir`, which exists and is empty. On failure the caller removes it.
    ///
    /// # Errors
    /// When the kernel or a module can't be used, or the modules are another kernel's.
    pub fn import(&self, name: &str, dir: &Path) -> Result<KernelMeta, KernelError> {
        let read = |source| KernelError::Read { path: self.kernel.clone(), source };
        let file = File::open(&self.kernel).map_err(read)?;
        let metadata = file.metadata().map_err(read)?;
        if !metadata.is_file() {
            return Err(read(std::io::Error::other("it is not a regular file")));
        }
        let mut packed = Vec::new();
        file.take(KERNEL_FILE_MAX + 1).read_to_end(&mut packed).map_err(read)?;
        if packed.len() as u64 > KERNEL_FILE_MAX {
            return Err(KernelError::TooLarge);
        }
        let kernel = super::vmlinux::extract(&packed)?;
        let release = release_of(&kernel).ok_or(KernelError::NoRelease)?;
        let tree = match &self.modules {
            Some(modules) => read_modules(modules, &release)?,
            None => BTreeMap::new(),
        };
        check_drivers(&tree)?;
        let contents = Contents { release, kernel: packed, tree, mtime: metadata.mtime() };
        let origin = Origin {
            name: name.to_owned(),
            package: "imported".to_owned(),
            version: self.kernel.display().to_string(),
            source: self.kernel.display().to_string(),
            sha256: crate::oci::Digest::of(&contents.kernel).hex().to_owned(),
        };
        write_kernel(&contents, origin, dir)
    }
}

/// Where the modules of a kernel in a directory are.
fn modules_beside(dir: &Path) -> Option<PathBuf> {
    let below = [dir.join("lib/modules"), dir.join("usr/lib/modules"), dir.join("modules")];
    let parent = dir.file_name().filter(|name| *name == "boot").and_then(|_| dir.parent());
    let beside = parent.into_iter().flat_map(|root| [root.join("lib/modules"), root.join("usr/lib/modules")]);
    below.into_iter().chain(beside).find(|place| place.is_dir())
}

/// Finds what `uname -r` says in a plain kernel.
fn release_of(kernel: &[u8]) -> Option<String> {
    let mut rest = kernel;
    while let Some(at) = memmem(rest, BANNER) {
        rest = &rest[at + BANNER.len()..];
        let text = &rest[..rest.len().min(RELEASE_LEN_MAX + 1)];
        let end = text.iter().position(|byte| *byte == b' ');
        let release = end.and_then(|end| std::str::from_utf8(&text[..end]).ok());
        // The same words begin a format elsewhere in the kernel.
        let plain = |text: &&str| {
            let good = |b: u8| b.is_ascii_alphanumeric() || b"._+~-".contains(&b);
            text.starts_with(|c: char| c.is_ascii_digit()) && text.bytes().all(good)
        };
        if let Some(release) = release.filter(plain) {
            return Some(release.to_owned());
        }
    }
    None
}

fn memmem(text: &[u8], wanted: &[u8]) -> Option<usize> {
    let mut at = 0;
    while let Some(next) = text[at..].iter().position(|byte| *byte == wanted[0]) {
        if text[at + next..].starts_with(wanted) {
            return Some(at + next);
        }
        at += next + 1;
    }
    None
}

/// Reads the modules of a release by their paths below its directory.
fn read_modules(dir: &Path, release: &str) -> Result<BTreeMap<String, Vec<u8>>, KernelError> {
    let below = ["", "modules", "lib/modules", "usr/lib/modules"].map(|place| dir.join(place).join(release));
    let places: Vec<PathBuf> = std::iter::once(dir.to_owned()).chain(below).collect();
    let is_release =
        |place: &&PathBuf| place.file_name().is_some_and(|name| name == release) && place.is_dir();
    let plain = || places.first().filter(|place| place.join("kernel").is_dir());
    let Some(root) = places.iter().find(is_release).or_else(plain) else {
        return Err(KernelError::OtherModules { path: dir.to_owned(), release: release.to_owned() });
    };
    // A directory of another name has to be this release's all the same.
    let mut tree = BTreeMap::new();
    let mut left = TREE_BYTES_MAX;
    let mut todo = vec![(root.clone(), String::new(), 0)];
    while let Some((at, prefix, depth)) = todo.pop() {
        let read = |source| KernelError::Read { path: at.clone(), source };
        for entry in fs::read_dir(&at).map_err(read)? {
            let entry = entry.map_err(read)?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let path = format!("{prefix}{name}");
            let kind = entry.file_type().map_err(read)?;
            if kind.is_dir() {
                if depth < DEPTH_MAX {
                    todo.push((entry.path(), format!("{path}/"), depth + 1));
                }
                continue;
            }
            if !kind.is_file() || !(is_module(&path) || BUILTIN.contains(&path.as_str())) {
                continue;
            }
            let mut data = Vec::new();
            let file = File::open(entry.path()).map_err(read)?;
            file.take(left + 1).read_to_end(&mut data).map_err(read)?;
            left = left.checked_sub(data.len() as u64).ok_or(KernelError::TooLarge)?;
            tree.insert(path, data);
            if tree.len() > TREE_FILES_MAX {
                return Err(KernelError::TooLarge);
            }
        }
    }
    if !tree.keys().any(|path| is_module(path)) {
        return Err(KernelError::NoModules(root.clone()));
    }
    Ok(tree)
}

/// Refuses a kernel that is known to lack a driver; without the list of what is built in nothing is known.
fn check_drivers(tree: &BTreeMap<String, Vec<u8>>) -> Result<(), KernelError> {
    let Some(builtin) = tree.get("modules.builtin") else { return Ok(()) };
    let builtin = String::from_utf8_lossy(builtin);
    let modules = tree.keys().map(String::as_str).filter(|path| is_module(path));
    let all: Vec<String> = builtin.lines().chain(modules).filter_map(name_of).collect();
    match DRIVERS.iter().find(|driver| !all.iter().any(|name| name == *driver)) {
        Some(driver) => Err(KernelError::NoDriver(driver)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::elf::tests::{executable, module};
    use super::*;

    fn kernel() -> Vec<u8> {
        let mut kernel = executable();
        kernel.extend_from_slice(b"Linux version %s (x)\0Linux version 6.1.0-test (gcc) #1\0");
        kernel
    }

    fn write(path: &Path, data: &[u8]) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, data).unwrap();
    }

    fn import(files: &KernelFiles) -> Result<(KernelMeta, tempfile::TempDir), KernelError> {
        let out = tempfile::tempdir().unwrap();
        Ok((files.import("own", out.path())?, out))
    }

    #[test]
    fn a_boot_directory_with_compressed_modules() {
        let root = tempfile::tempdir().unwrap();
        let boot = root.path().join("boot");
        write(&boot.join("vmlinuz-6.1.0-test"), &kernel());
        write(&boot.join("vmlinuz-5.0.0-other"), &kernel());
        write(&boot.join("System.map-6.1.0-test"), b"");
        let modules = root.path().join("lib/modules/6.1.0-test");
        let packed = |file: &[u8]| zstd::stream::encode_all(file, 1).unwrap();
        write(&modules.join("kernel/a/virtio_blk.ko.zst"), &packed(&module(&["depends=virtio"], &[])));
        write(&modules.join("kernel/a/virtio.ko"), &module(&["depends="], &[]));
        write(&modules.join("modules.dep"), b"stale");
        let several = KernelFiles::find(&boot, None).unwrap_err().to_string();
        assert!(
            several.contains("vmlinuz-5.0.0-other") && several.contains("vmlinuz-6.1.0-test"),
            "{several}"
        );
        let files = KernelFiles::find(&boot, Some("6.1.0-test")).unwrap();
        assert_eq!(files.modules, Some(root.path().join("lib/modules")));
        let (meta, out) = import(&files).unwrap();
        assert_eq!((meta.release.as_str(), meta.name.as_str()), ("6.1.0-test", "own"));
        let list = fs::read_to_string(out.path().join("boot/modules.list")).unwrap();
        assert!(list.contains("virtio_blk: virtio.ko virtio_blk.ko\n"), "{list}");
        assert!(out.path().join("modules.ext4").exists() && out.path().join("boot/virtio.ko").exists());
        assert_eq!(KernelFiles::find(root.path(), Some("6.1.0-test")).unwrap().kernel, files.kernel);
    }

    #[test]
    fn a_directory_that_is_not_there_is_not_one_without_a_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let none = dir.path().join("none");
        let error = KernelFiles::find(&none, None).unwrap_err();
        assert!(matches!(&error, KernelError::Read { path, .. } if *path == none), "{error}");
        assert!(matches!(KernelFiles::find(dir.path(), None), Err(KernelError::NotFound(_))));
    }

    #[test]
    fn a_kernel_without_modules_and_modules_of_another() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("bzImage");
        write(&path, &kernel());
        let mut files = KernelFiles::find(root.path(), None).unwrap();
        let (_, out) = import(&files).unwrap();
        assert!(!out.path().join("modules.ext4").exists());
        let list = fs::read_to_string(out.path().join("boot/modules.list")).unwrap();
        assert!(list.starts_with("virtio_mmio:\n"), "{list}");
        write(&root.path().join("lib/modules/6.2.0/kernel/a.ko"), &module(&["depends="], &[]));
        files.modules = Some(root.path().join("lib/modules"));
        let error = import(&files).unwrap_err().to_string();
        assert_eq!(
            error,
            format!(
                "there are no modules of release `6.1.0-test`, which the kernel is, in `{}`",
                root.path().join("lib/modules").display()
            )
        );
        let modules = root.path().join("lib/modules/6.1.0-test");
        write(&modules.join("kernel/a.ko"), &module(&["depends="], &[]));
        write(&modules.join("modules.builtin"), b"kernel/virtio/virtio_pci.ko\nkernel/virtio_blk.ko\n");
        let error = import(&files).unwrap_err().to_string();
        assert_eq!(error, "the kernel has no driver `virtio_console`, neither built in nor as a module");
        write(&path, &executable());
        assert!(matches!(import(&files), Err(KernelError::NoRelease)));
    }
}
