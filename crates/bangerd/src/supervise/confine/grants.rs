//! The files of the private root that the VMM and the supervisor get to.
//!
//! The private root is common to all of a vm's processes and has what any of them needs. The VMM gets the files of its
//! machine: of the vm's directory that is the disk, and neither plan, socket, console nor end.

use crate::plan::{SAVED_FILE, STATE_FILE, Start, VmPlan};
use crate::supervise::root::{SYSTEM, SYSTEM_FILES, VM_DIR};
use banger_vmm::{Driver, firecracker};
use landlock::{AccessFs, BitFlags};
use std::path::{Path, PathBuf};

/// What may be done to a file, or to those in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Reading.
    Read,
    /// Reading, and starting as a program.
    Run,
    /// Reading and writing what is there.
    Write,
    /// Making and removing sockets.
    Sockets,
    /// Reading, writing, making and removing files, pipes and sockets, and replacing them.
    Own,
}

/// Access to a path of the private root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) path: PathBuf,
    pub(crate) access: Access,
}

impl Access {
    pub(crate) fn rights(self) -> BitFlags<AccessFs> {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        match self {
            Self::Read => read,
            Self::Run => read | AccessFs::Execute,
            Self::Write => read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev,
            Self::Sockets => AccessFs::MakeSock | AccessFs::RemoveFile,
            Self::Own => {
                let make = AccessFs::MakeReg | AccessFs::MakeDir | AccessFs::MakeFifo;
                Self::Write.rights() | Self::Sockets.rights() | make
            }
        }
    }
}

fn grant(path: impl AsRef<Path>, access: Access) -> Grant {
    Grant { path: path.as_ref().to_owned(), access }
}

/// Programs and libraries; the programs among them bring no rights.
fn system() -> impl Iterator<Item = Grant> {
    let programs = SYSTEM.iter().map(|path| grant(path, Access::Run));
    programs.chain(SYSTEM_FILES.iter().map(|path| grant(path, Access::Read)))
}

/// What the VMM opens.
pub(crate) fn vmm(plan: &VmPlan) -> Vec<Grant> {
    let machine = &plan.machine;
    let mut grants: Vec<Grant> = system().collect();
    grants.push(grant(&machine.program, Access::Run));
    grants.extend(["/dev/null", "/dev/zero"].map(|path| grant(path, Access::Write)));
    grants.extend(["/dev/random", "/dev/urandom"].map(|path| grant(path, Access::Read)));
    if machine.kvm {
        grants.push(grant("/dev/kvm", Access::Write));
    }
    // These are read-only in the private root as well, and those below are writable there.
    grants.extend(plan.binds.iter().map(|bind| grant(&bind.inside, Access::Read)));
    for drive in &machine.drives {
        let access = if drive.read_only { Access::Read } else { Access::Write };
        grants.push(grant(&drive.path, access));
    }
    grants.push(grant(&machine.run_dir, Access::Sockets));
    if machine.driver == Driver::Firecracker {
        grants.push(grant(firecracker::config_path(machine), Access::Read));
        grants.push(grant(firecracker::counters_path(machine), Access::Write));
        if plan.net.has_link() {
            // It opens the tap of its network namespace, where it may make no other.
            grants.push(grant("/dev/net/tun", Access::Write));
        }
        if plan.start == Start::Save {
            // It opens these itself; QEMU is given a descriptor.
            let files = [SAVED_FILE, STATE_FILE].map(|name| Path::new(VM_DIR).join(name));
            grants.extend(files.map(|file| grant(file, Access::Write)));
        }
    }
    grants
}

/// What the supervisor opens, and the VMM and `nft`, which it starts: they can't have more than it has.
pub(crate) fn supervisor(plan: &VmPlan) -> Vec<Grant> {
    let mut grants = vmm(plan);
    grants.push(grant("/dev", Access::Write));
    grants.push(grant("/proc", Access::Read));
    // Forwarding is turned on there.
    grants.push(grant("/proc/sys/net", Access::Write));
    grants.push(grant(VM_DIR, Access::Own));
    grants.push(grant(&plan.machine.run_dir, Access::Own));
    grants
}
