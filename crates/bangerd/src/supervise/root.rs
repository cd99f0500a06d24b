//! The root the supervisor and the VMM see: the system's programs and the files of this vm, read-only, and nothing else.

use crate::plan::VmPlan;
use anyhow::Context as _;
use rustix::fs::{Mode, OFlags, StatVfsMountFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::mount::{mount, mount_bind, mount_bind_recursive, mount_change, mount_remount, unmount};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

/// The vm's directory, writable.
pub(crate) const VM_DIR: &str = "/vm";
/// Where the system's programs and libraries are; links among them are copied as links.
pub(crate) const SYSTEM: [&str; 7] = ["/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/libx32"];
/// Single files the programs read.
pub(crate) const SYSTEM_FILES: [&str; 4] =
    ["/etc/ld.so.cache", "/etc/resolv.conf", "/etc/alternatives", "/etc/protocols"];
const DEVICES: [&str; 7] =
    ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/net/tun", KVM];
const KVM: &str = "/dev/kvm";
/// The new root is put together over this directory, which every system has.
const STAGE: &str = "/tmp";
const PROC_FLAGS: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// What becomes of `/proc`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Proc {
    /// The caller is process 1 of its pid namespace and mounts its own.
    Own,
    /// The host's, until [`mount_proc`].
    Host,
}

struct Item {
    source: OwnedFd,
    target: PathBuf,
    directory: bool,
    access: Access,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    ReadOnly,
    Writable,
    Device,
}

/// Builds the root and makes it the caller's. Only the caller's mount namespace changes.
pub(crate) fn enter(plan: &VmPlan, proc: Proc) -> anyhow::Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context("keep mounts private")?;
    // With root's rights this is built for another user, whatever the caller hides from others.
    rustix::process::umask(Mode::from_raw_mode(0o022));
    // Opened before the stage covers one of them.
    let items = items(plan)?;
    let size = c"mode=755,size=16m";
    mount("tmpfs", STAGE, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(size))
        .context("mount a tmpfs")?;
    let stage = Path::new(STAGE);
    for dir in ["proc", "tmp", "run", "old"] {
        std::fs::create_dir(stage.join(dir))?;
    }
    for path in SYSTEM {
        if let Ok(target) = std::fs::read_link(path) {
            std::os::unix::fs::symlink(target, inside(path))?;
        }
    }
    for item in &items {
        show(item).with_context(|| format!("show `{}` to the vm's processes", item.target.display()))?;
    }
    if let Some(owner) = owner_of_kvm(plan) {
        own_kvm(owner).with_context(|| format!("make the vm's own `{KVM}`"))?;
    }
    match proc {
        Proc::Own => mount("proc", inside("/proc"), "proc", PROC_FLAGS, None).context("mount /proc")?,
        Proc::Host => mount_bind_recursive("/proc", inside("/proc")).context("show /proc")?,
    }
    for (dir, options) in [("/run", c"mode=700,size=4m"), ("/tmp", c"mode=700,size=4m")] {
        private_tmpfs(dir, options, plan.run_as)?;
    }
    rustix::process::pivot_root(STAGE, inside("/old")).context("enter the new root")?;
    rustix::process::chdir("/")?;
    unmount("/old", UnmountFlags::DETACH).context("leave the old root")?;
    std::fs::remove_dir("/old")?;
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV, "")
        .context("make the root read-only")?;
    Ok(())
}

/// Covers the host's `/proc` with that of the caller's pid namespace.
pub(crate) fn mount_proc() -> io::Result<()> {
    Ok(mount("proc", "/proc", "proc", PROC_FLAGS, None)?)
}

fn private_tmpfs(dir: &str, options: &CStr, owner: Option<u32>) -> anyhow::Result<()> {
    mount("tmpfs", inside(dir), "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(options))?;
    Ok(std::os::unix::fs::chown(inside(dir), owner, owner)?)
}

/// Who gets a KVM device of their own: a user made for one vm, who is in no group that may open the host's.
fn owner_of_kvm(plan: &VmPlan) -> Option<u32> {
    plan.run_as.filter(|_| plan.machine.kvm && Path::new(KVM).exists())
}

/// Makes the device anew, for its owner only. It takes root's rights, and a filesystem that root has mounted.
fn own_kvm(owner: u32) -> io::Result<()> {
    let number = rustix::fs::stat(KVM)?.st_rdev;
    let place = inside("/kvm");
    std::fs::create_dir(&place)?;
    mount("tmpfs", &place, "tmpfs", MountFlags::NOSUID | MountFlags::NOEXEC, Some(c"mode=700,size=4k"))?;
    let node = place.join("kvm");
    let mode = Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &node, rustix::fs::FileType::CharacterDevice, mode, number)?;
    std::os::unix::fs::chown(&node, Some(owner), Some(owner))?;
    let target = inside(KVM);
    std::fs::File::create_new(&target)?;
    mount_bind(&node, &target)?;
    // What is bound keeps the filesystem.
    unmount(&place, UnmountFlags::DETACH)?;
    std::fs::remove_dir(place)
}

/// The place of an absolute path while the root is being put together.
fn inside(path: impl AsRef<Path>) -> PathBuf {
    Path::new(STAGE).join(path.as_ref().strip_prefix("/").unwrap_or(path.as_ref()))
}

fn items(plan: &VmPlan) -> anyhow::Result<Vec<Item>> {
    let mut items = Vec::new();
    let mut add = |host: &Path, target: &Path, access| -> io::Result<()> {
        let source = rustix::fs::open(host, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&source)?.st_mode);
        let directory = kind == rustix::fs::FileType::Directory;
        items.push(Item { source, target: target.to_owned(), directory, access });
        Ok(())
    };
    let optional = |result: io::Result<()>| match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    for path in SYSTEM.map(Path::new).into_iter().filter(|path| !path.is_symlink()) {
        optional(add(path, path, Access::ReadOnly))?;
    }
    for path in SYSTEM_FILES.map(Path::new) {
        optional(add(path, path, Access::ReadOnly))?;
    }
    let own_kvm = owner_of_kvm(plan).is_some();
    for path in DEVICES.iter().filter(|path| !own_kvm || **path != KVM).map(Path::new) {
        optional(add(path, path, Access::Device))?;
    }
    for bind in &plan.binds {
        add(&bind.host, &bind.inside, Access::ReadOnly)
            .with_context(|| format!("open `{}`", bind.host.display()))?;
    }
    for bind in &plan.writable {
        add(&bind.host, &bind.inside, Access::Writable)
            .with_context(|| format!("open `{}`", bind.host.display()))?;
    }
    add(&plan.dir, Path::new(VM_DIR), Access::Writable)?;
    Ok(items)
}

fn show(item: &Item) -> io::Result<()> {
    let target = inside(&item.target);
    if let Some(parent) = target.parent() {
        std::fs::create_dir_all(parent)?;
    }
    if item.directory {
        std::fs::create_dir(&target)?;
    } else {
        std::fs::File::create_new(&target)?;
    }
    let source = format!("/proc/self/fd/{}", item.source.as_raw_fd());
    if item.directory {
        mount_bind_recursive(source, &target)?
    } else {
        mount_bind(source, &target)?
    }
    if item.access == Access::Device {
        return Ok(());
    }
    // In a user namespace, flags that are set already must stay.
    let now = rustix::fs::statvfs(&target)?.f_flag;
    let mut flags = MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV;
    flags.set(MountFlags::NOEXEC, now.contains(StatVfsMountFlags::NOEXEC));
    flags.set(MountFlags::RDONLY, item.access == Access::ReadOnly || now.contains(StatVfsMountFlags::RDONLY));
    Ok(mount_remount(&target, flags, "")?)
}
