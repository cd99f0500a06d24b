//! Kernels: from Debian's signed kernel package, or files of this machine, to a directory a vm can boot from.
//!
//! ```text
//! vmlinux        the plain kernel
//! boot/          modules an initramfs may need, unpacked, and modules.list: what each needs, in load order
//! modules.ext4   the whole module tree, mounted read-only at /lib/modules/<release> in guests; where it has modules
//! kernel.json    what this is and where it came from
//! ```
//!
//! Nothing of the package is executed. The directory is complete and on disk before anybody sees it: publishing it
//! under its name is the store's business.

pub mod depmod;
mod elf;
pub mod import;
pub mod kmod_index;
pub mod module;
pub mod vmlinux;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::debian::archive::{Archive, ArchiveConfig, ArchiveError, architecture};
use crate::debian::deb::{Deb, DebError};
use crate::debian::index::{Index, Package};
use crate::debian::tree::{Attributes, Tree as _};
use crate::ext4::Room;
use crate::partial::{hash_file, hex};
use crate::progress::{Progress, Sink};
use crate::rootfs::{RootfsBuilder, RootfsError};
use crate::tar::{Kind, TarError, TarReader};
use depmod::{DepmodError, ModuleTree};
use module::{Module, ModuleError};
use vmlinux::VmlinuxError;

/// Kernels that can be pulled: name, and Debian's metapackage for each architecture.
const CATALOG: [(&str, [(&str, &str); 2]); 1] = [(
    "generic-6.12",
    [("amd64", "linux-image-6.12-cloud-amd64"), ("arm64", "linux-image-6.12-cloud-arm64")],
)];

/// What the initramfs may have to load, most needed first. What a kernel has built in is left out, so this also serves
/// kernels that are configured otherwise.
const BOOT_MODULES: [&str; 12] = [
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "overlay",
    "ext4",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "erofs",
    "squashfs",
];

/// Files a module tree may have; Debian's cloud kernel has 1,100.
const TREE_FILES_MAX: usize = 50_000;
/// Bytes a kernel package may unpack to in memory; Debian's cloud kernel has 36 MB, its generic one 110 MB.
const TREE_BYTES_MAX: u64 = 1 << 30;

/// A kernel could not be made.
#[derive(Debug, Error)]
pub enum KernelError {
    /// No kernel of that name can be pulled.
    #[error("no kernel `{}` in the catalog (there is {available})", .name.escape_debug())]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        available: String,
    },
    /// The kernel exists, but not for this kind of machine.
    #[error("kernel `{name}` does not exist for architecture `{arch}`")]
    Architecture {
        /// The kernel.
        name: String,
        /// Debian's architecture name.
        arch: String,
    },
    /// The archive could not be used.
    #[error("could not get the kernel from the Debian archive")]
    Archive(#[from] ArchiveError),
    /// The archive doesn't have the package.
    #[error("the Debian archive has no kernel package for `{0}`")]
    NoPackage(String),
    /// The package file is damaged.
    #[error("could not open the kernel package")]
    Package(#[from] DebError),
    /// The package's data can't be read.
    #[error("could not unpack the kernel package")]
    Unpack(#[from] TarError),
    /// The package lacks a part.
    #[error("the kernel package has no {0}")]
    Incomplete(&'static str),
    /// The package holds more than a kernel can.
    #[error("the kernel package is larger than a kernel can be")]
    TooLarge,
    /// The kernel itself.
    #[error("could not extract the kernel")]
    Vmlinux(#[from] VmlinuxError),
    /// A module.
    #[error("could not read the kernel's modules")]
    Module(#[from] ModuleError),
    /// The dependencies of the modules.
    #[error("could not order the kernel's modules")]
    Depmod(#[from] DepmodError),
    /// The filesystem with the modules.
    #[error("could not write the kernel's module tree")]
    Rootfs(#[from] RootfsError),
    /// No kernel in a directory.
    #[error("there is no kernel in `{}`: a file that is called `vmlinuz`, `vmlinux`, `bzImage` or `Image`, or so with a release", .0.display())]
    NotFound(PathBuf),
    /// More than one, and none was named.
    #[error("there are several kernels: {0}")]
    Several(String),
    /// The kernel doesn't say what it is.
    #[error("the kernel does not say which release it is, so it is not one of Linux")]
    NoRelease,
    /// Modules of another kernel.
    #[error("there are no modules of release `{release}`, which the kernel is, in `{}`", .path.display())]
    OtherModules {
        /// Where they should be.
        path: PathBuf,
        /// The kernel's release.
        release: String,
    },
    /// A directory without modules.
    #[error("there is no module in `{}`", .0.display())]
    NoModules(PathBuf),
    /// A vm of it could not do anything.
    #[error("the kernel has no driver `{0}`, neither built in nor as a module")]
    NoDriver(&'static str),
    /// A file of this machine can't be read.
    #[error("could not read `{}`", .path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The directory can't be written.
    #[error("could not write `{}`", .path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A task ended without an answer.
    #[error("making the kernel was interrupted")]
    Interrupted,
}

/// What `kernel.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelMeta {
    /// Name in the store.
    pub name: String,
    /// What `uname -r` says.
    pub release: String,
    /// Debian's architecture name.
    pub arch: String,
    /// The package it was made of.
    pub package: String,
    /// Its version.
    pub package_version: String,
    /// Where the package was downloaded.
    pub source: String,
    /// Digest of the package.
    pub source_sha256: String,
    /// Digests of the files in the directory.
    pub sha256: BTreeMap<String, String>,
    /// Seconds since 1970.
    pub created: u64,
}

/// A kernel found in the archive, not yet downloaded.
#[derive(Debug)]
pub struct KernelPull {
    archive: Archive,
    name: String,
    package: Package,
}

impl KernelPull {
    /// Looks a catalog name up in the archive, after verifying the archive.
    pub async fn resolve(config: &ArchiveConfig, name: &str, sink: Sink<'_>) -> Result<Self, KernelError> {
        let meta = metapackage(name, architecture())?;
        let archive = Archive::open(config)?;
        let (index, _) = archive.load(sink).await?;
        let package = kernel_package(&index, meta)?;
        Ok(Self { archive, name: name.to_owned(), package })
    }

    /// Returns the version of the package, to compare with `KernelMeta::package_version`.
    pub fn version(&self) -> &str {
        self.package.version.as_str()
    }

    /// Downloads the package and makes the kernel directory in `dir`, which exists and is empty.
    ///
    /// On success everything in `dir` is on disk; on failure the caller removes it.
    pub async fn write_to(self, dir: &Path, sink: Sink<'_>) -> Result<KernelMeta, KernelError> {
        sink(Progress::Step { label: format!("fetch kernel {}", self.package.version) });
        let paths = self.archive.fetch(std::slice::from_ref(&self.package), sink).await?;
        let deb = paths.into_iter().next().ok_or(KernelError::Interrupted)?;
        sink(Progress::Step { label: "unpack the kernel".into() });
        let (dir, name, package) = (dir.to_owned(), self.name, self.package);
        let built = crate::blocking::start(move || build(&deb, &name, &package, &dir)).await;
        built.map_err(|_| KernelError::Interrupted)?
    }
}

/// Returns the names that can be pulled.
pub fn catalog() -> impl Iterator<Item = &'static str> {
    CATALOG.iter().map(|(name, _)| *name)
}

fn metapackage(name: &str, arch: &str) -> Result<&'static str, KernelError> {
    let Some((_, packages)) = CATALOG.iter().find(|(known, _)| *known == name) else {
        let available = catalog().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        return Err(KernelError::Unknown { name: name.to_owned(), available });
    };
    packages
        .iter()
        .find(|(for_arch, _)| *for_arch == arch)
        .map(|(_, package)| *package)
        .ok_or_else(|| KernelError::Architecture { name: name.to_owned(), arch: arch.to_owned() })
}

/// Follows the metapackage to the package with the kernel in it.
fn kernel_package(index: &Index, meta: &str) -> Result<Package, KernelError> {
    let missing = || KernelError::NoPackage(meta.to_owned());
    let meta = index.best(meta).map_err(ArchiveError::from)?.ok_or_else(missing)?;
    let needs = meta.depends.iter().flatten().find(|relation| relation.name.starts_with("linux-image-"));
    let needs = needs.ok_or_else(missing)?;
    let package = index.best(&needs.name).map_err(ArchiveError::from)?.ok_or_else(missing)?;
    if needs.accepts(&package.version) { Ok(package) } else { Err(missing()) }
}

/// What a kernel package contains, in memory.
#[derive(Debug, Default)]
struct Contents {
    release: String,
    kernel: Vec<u8>,
    /// Files of the module tree by path below `/lib/modules/<release>`.
    tree: BTreeMap<String, Vec<u8>>,
    mtime: i64,
}

fn build(deb: &Path, name: &str, package: &Package, dir: &Path) -> Result<KernelMeta, KernelError> {
    let contents = read_package(&Deb::open(deb)?)?;
    let origin = Origin {
        name: name.to_owned(),
        package: package.name.clone(),
        version: package.version.to_string(),
        source: package.url.clone(),
        sha256: package.sha256.clone(),
    };
    write_kernel(&contents, origin, dir)
}

/// What a kernel is called and where it came from.
#[derive(Debug)]
struct Origin {
    name: String,
    package: String,
    version: String,
    source: String,
    sha256: String,
}

/// Makes the directory.
fn write_kernel(contents: &Contents, origin: Origin, dir: &Path) -> Result<KernelMeta, KernelError> {
    let (kernel, modules) = std::thread::scope(|scope| {
        let kernel = scope.spawn(|| vmlinux::extract(&contents.kernel));
        let modules = parse_modules(&contents.tree);
        let kernel = kernel.join().map_err(|_| KernelError::Interrupted)?;
        Ok::<_, KernelError>((kernel?, modules?))
    })?;
    let text = |name: &str| contents.tree.get(name).map_or(&[][..], Vec::as_slice);
    let tree = ModuleTree::new(
        modules,
        &String::from_utf8_lossy(text("modules.order")),
        &String::from_utf8_lossy(text("modules.builtin")),
        text("modules.builtin.modinfo"),
    );
    let mut out = Output { dir, sha256: BTreeMap::new() };
    out.write("vmlinux", &kernel)?;
    write_boot_modules(&mut out, &tree, contents)?;
    if !contents.tree.is_empty() {
        write_module_tree(&mut out, &tree, contents)?;
    }
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
    let meta = KernelMeta {
        name: origin.name,
        release: contents.release.clone(),
        arch: architecture().to_owned(),
        package: origin.package,
        package_version: origin.version,
        source: origin.source,
        source_sha256: origin.sha256,
        sha256: out.sha256.clone(),
        created,
    };
    let json = serde_json::to_vec_pretty(&meta).map_err(|err| out.error("kernel.json", err.into()))?;
    out.write("kernel.json", &json)?;
    sync_dir(&dir.join("boot")).and_then(|()| sync_dir(dir)).map_err(|err| out.error("", err))?;
    Ok(meta)
}

fn read_package(deb: &Deb) -> Result<Contents, KernelError> {
    let mut contents = Contents::default();
    let mut reader = TarReader::new(deb.data());
    let mut left = TREE_BYTES_MAX;
    while let Some(entry) = reader.next_entry()? {
        if entry.kind != Kind::File {
            continue;
        }
        let path = String::from_utf8_lossy(&entry.path).into_owned();
        let is_kernel = path.strip_prefix("boot/").is_some_and(|name| name.starts_with("vmlinu"));
        let module = path.strip_prefix("usr/").unwrap_or(&path).strip_prefix("lib/modules/");
        let module = module.and_then(|rest| rest.split_once('/'));
        if !is_kernel && module.is_none() {
            continue;
        }
        left = left.checked_sub(entry.size).ok_or(KernelError::TooLarge)?;
        let data = reader.read_data(TREE_BYTES_MAX)?;
        match module {
            None => {
                contents.kernel = data;
                contents.mtime = entry.mtime;
            }
            Some((release, path)) => {
                contents.release = release.to_owned();
                contents.tree.insert(path.to_owned(), data);
            }
        }
        if contents.tree.len() > TREE_FILES_MAX {
            return Err(KernelError::TooLarge);
        }
    }
    reader.drain()?;
    if contents.kernel.is_empty() {
        return Err(KernelError::Incomplete("kernel in /boot"));
    }
    if contents.tree.is_empty() {
        return Err(KernelError::Incomplete("modules"));
    }
    Ok(contents)
}

/// Unpacks and parses all modules, on all processors.
fn parse_modules(tree: &BTreeMap<String, Vec<u8>>) -> Result<Vec<Module>, ModuleError> {
    let files: Vec<_> = tree.iter().filter(|(path, _)| is_module(path)).collect();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(8);
    let next = std::sync::atomic::AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some((path, data)) = files.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
            done.push(Module::parse(path, &module::unpack(path, data)?)?);
        }
        Ok(done)
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut modules = Vec::new();
        for worker in workers {
            // A panic in a worker is a bug and goes on in the caller.
            modules.extend(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(modules)
    })
}

fn is_module(path: &str) -> bool {
    [".ko", ".ko.xz", ".ko.zst", ".ko.gz"].iter().any(|end| path.ends_with(end))
}

fn write_boot_modules(
    out: &mut Output<'_>,
    tree: &ModuleTree,
    contents: &Contents,
) -> Result<(), KernelError> {
    let boot = out.dir.join("boot");
    fs::create_dir(&boot).map_err(|err| out.error("boot", err))?;
    for module in tree.load_order(&BOOT_MODULES)? {
        let packed = contents.tree.get(&module.path).map_or(&[][..], Vec::as_slice);
        let unpacked = module::unpack(&module.path, packed)?;
        out.write(&format!("boot/{}.ko", module.name), module::without_signature(&unpacked))?;
    }
    let mut list = String::new();
    for wanted in BOOT_MODULES {
        list.push_str(&format!("{wanted}:"));
        for module in tree.load_order(&[wanted])? {
            list.push_str(&format!(" {}.ko", module.name));
        }
        list.push('\n');
    }
    out.write("boot/modules.list", list.as_bytes())
}

/// Writes the whole module tree as a filesystem of its own. `modules.devname` is left out on purpose: with it, systemd's
/// `kmod-static-nodes.service` runs, and fails in an image without kmod.
fn write_module_tree(
    out: &mut Output<'_>,
    tree: &ModuleTree,
    contents: &Contents,
) -> Result<(), KernelError> {
    let rendered = tree.render()?;
    let path = out.dir.join("modules.ext4");
    let mut rootfs = RootfsBuilder::create(&path)?;
    let attributes = |mode| Attributes { mode, uid: 0, gid: 0, mtime: contents.mtime };
    rootfs.directory(b"", &attributes(0o755)).map_err(|err| out.error("modules.ext4", err))?;
    let packaged = contents.tree.iter().map(|(path, data)| (path.as_str(), data));
    let files = packaged.chain(rendered.iter().map(|(path, data)| (*path, data)));
    for (path, mut data) in files.map(|(path, data)| (path, data.as_slice())) {
        if path != "modules.devname" {
            let size = data.len() as u64;
            rootfs
                .file(path.as_bytes(), &attributes(0o644), size, &mut data)
                .map_err(|err| out.error("modules.ext4", err))?;
        }
    }
    rootfs.finish(&format!("modules {}", contents.release), Room::Spare(0))?;
    let digest = File::open(&path).and_then(|mut file| hash_file(&mut file));
    out.sha256.insert("modules.ext4".to_owned(), digest.map_err(|err| out.error("modules.ext4", err))?);
    Ok(())
}

/// Writes files of the kernel directory and remembers their digests.
struct Output<'a> {
    dir: &'a Path,
    sha256: BTreeMap<String, String>,
}

impl Output<'_> {
    fn write(&mut self, name: &str, data: &[u8]) -> Result<(), KernelError> {
        let write = || {
            let mut file = File::create_new(self.dir.join(name))?;
            file.write_all(data)?;
            file.sync_all()
        };
        write().map_err(|err| self.error(name, err))?;
        self.sha256.insert(name.to_owned(), hex(Sha256::digest(data)));
        Ok(())
    }

    fn error(&self, name: &str, source: io::Error) -> KernelError {
        KernelError::Write { path: self.dir.join(name), source }
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
