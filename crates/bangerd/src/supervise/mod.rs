//! `bangerd supervise`: the host side of one vm.
//!
//! ```text
//! owner's process      reads the plan, locks the disk, unshares user, mount, pid, ipc and uts namespaces, splits, ends
//!   process 1 of them  private root ([`root`]), network, gives up what it needs no more ([`confine`]), everything else
//!     thread "net"     the vm's network namespace ([`net`]); starts the VMM there ([`machine`])
//!     thread "member"  carries packets to other vms, for one that is in a network ([`net::member`])
//!     process 2        not confined; starts pasta ([`net::starter`])
//!       child pasta    the host's network namespace, joined to the vm's
//! ```
//!
//! The lock on the disk is the vm's liveness: it goes with the last process that holds it, whatever the reason. When
//! process 1 ends, the kernel ends the rest. What happened is in `end.json`, written as the last act.

mod api;
mod client;
pub(crate) mod confine;
mod console;
mod counters;
mod link;
mod machine;
mod monitor;
mod net;
mod ports;
pub(crate) mod root;
mod terminal;
mod vm;

use crate::plan::{DISK_FILE, END_FILE, PLAN_FILE, VmPlan};
use anyhow::{Context as _, bail};
use banger_sys::namespace;
use banger_sys::sock_diag::SockDiag;
use banger_wire::vm::{EndReason, VmEnd};
use net::starter::{self, Split, Starter};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::thread::UnshareFlags;
use std::fs::File;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::Path;

/// How often and at what distance the lock is tried.
const LOCK_TRIES: u32 = 20;
const LOCK_PAUSE_NS: i64 = 5_000_000;

/// Runs until the vm has ended. The process that was started ends early; its child goes on.
pub(crate) fn run(dir: &Path) -> anyhow::Result<()> {
    // The kernel takes the last part of the path a program was started by, and that was `/proc/self/exe`.
    let _ = rustix::thread::set_name(c"bangerd");
    let text = std::fs::read(dir.join(PLAN_FILE)).context("read the vm's plan")?;
    let plan: VmPlan = serde_json::from_slice(&text).context("understand the vm's plan")?;
    // Whoever the vm's processes are, they could have put a link here.
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let disk = rustix::fs::open(dir.join(DISK_FILE), flags, Mode::empty()).context("open the vm's disk")?;
    lock(&disk).context("lock the vm's disk: another supervisor runs this vm")?;
    let mut locked = vec![disk];
    for cache in &plan.caches {
        let shown = cache.display();
        let file = rustix::fs::open(cache, flags, Mode::empty())
            .with_context(|| format!("open the cache `{shown}`"))?;
        lock(&file).with_context(|| format!("lock the cache `{shown}`: another vm has it"))?;
        locked.push(file);
    }
    if let Some(dir) = &plan.cgroup {
        // First of all, so that everything of the vm is in it, and nothing of it sees it.
        crate::cgroup::join(dir).with_context(|| format!("enter the control group `{}`", dir.display()))?;
    }
    // Before the namespaces: whoever asks in its own user namespace hears of no user but its owner.
    let diag = plan.ports.as_ref().and_then(|_| SockDiag::open().ok());
    // Not in the private root, where the VMM would see it.
    let network = plan.net.member.as_ref().map(net::member::open);
    let namespaces = UnshareFlags::NEWUSER
        | UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS;
    if let Some(id) = plan.run_as {
        // With root's rights the root is built first: afterwards nothing of root's is readable.
        namespace::unshare(UnshareFlags::NEWNS).context("make a mount namespace")?;
        root::enter(&plan, root::Proc::Host).context("build the vm's private root")?;
        namespace::become_user(id, id).context("give up root")?;
    }
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    if uid == 0 {
        bail!("nothing of a vm runs as root, and the plan names no other user");
    }
    namespace::unshare(namespaces).context("make namespaces")?;
    namespace::map_own_ids(uid, gid).context("map the owner's id into the user namespace")?;
    if namespace::fork().context("start process 1 of the vm")?.is_some() {
        return Ok(());
    }
    let kept: Vec<RawFd> = locked.iter().map(|file| file.as_raw_fd()).collect();
    let (place, done) = match enter(&plan) {
        Ok(()) => (Path::new(root::VM_DIR), supervise(&plan, &kept, diag, network)),
        Err(error) => (dir, Err(error)),
    };
    let end = match done {
        Ok(Some(end)) => end,
        // This was the process that starts `pasta`.
        Ok(None) => return Ok(()),
        Err(error) => {
            let causes: Vec<String> = error.chain().map(ToString::to_string).collect();
            VmEnd { reason: EndReason::Failed, detail: causes.join(": ") }
        }
    };
    save_end(place, &end).with_context(|| format!("write how the vm ended ({})", end.detail))?;
    drop(locked);
    Ok(())
}

/// Whoever looks whether a vm runs holds its lock for a moment, so one try is not enough.
fn lock(disk: &OwnedFd) -> rustix::io::Result<()> {
    let mut tries = 0;
    loop {
        match rustix::fs::flock(disk, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if tries < LOCK_TRIES => tries += 1,
            other => return other,
        }
        let pause = rustix::time::Timespec { tv_sec: 0, tv_nsec: LOCK_PAUSE_NS };
        let _ = rustix::thread::nanosleep(&pause);
    }
}

/// Leaves the host's files behind, if that has not been done.
fn enter(plan: &VmPlan) -> anyhow::Result<()> {
    if plan.run_as.is_some() {
        return root::mount_proc().context("mount /proc");
    }
    root::enter(plan, root::Proc::Own).context("build the vm's private root")
}

/// `kept` are the locked files, which the VMM keeps too: as long as it could write, they are in use.
/// `network` is the directory of the network of vms it is in.
fn supervise(
    plan: &VmPlan,
    kept: &[RawFd],
    diag: Option<SockDiag>,
    network: Option<std::io::Result<OwnedFd>>,
) -> anyhow::Result<Option<VmEnd>> {
    rustix::process::umask(Mode::from_raw_mode(0o077));
    let starter = match starter::split(plan.net.pasta.as_ref())? {
        Split::First(socket) => socket,
        Split::Other => return Ok(None),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let run = async {
        let starter = starter.map(Starter::new).transpose().context("reach what starts `pasta`")?;
        vm::run(plan, kept, starter, diag, network).await
    };
    tokio::task::LocalSet::new().block_on(&runtime, run).map(Some)
}

/// Visible whole or not at all.
fn save_end(dir: &Path, end: &VmEnd) -> anyhow::Result<()> {
    let new = dir.join("end.json.new");
    std::fs::write(&new, serde_json::to_vec(end)?)?;
    File::open(&new)?.sync_all()?;
    Ok(std::fs::rename(new, dir.join(END_FILE))?)
}
