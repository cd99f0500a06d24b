//! Whether user namespaces can be made and are good for anything, found out by doing it.
//!
//! Making one is not enough: where AppArmor restricts them, that succeeds and every right in it is missing. So a process
//! of its own makes one and mounts in it, as a vm's supervisor does, and ends with everything it made.

use crate::store::RUN_AS_BUILD;
use anyhow::Context as _;
use banger_sys::namespace;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::UnshareFlags;
use std::process::Stdio;

/// What the process says of its first step when that fails.
pub(crate) const REFUSED: &str = "make namespaces";

/// The process: `bangerd probe-namespaces`.
pub(crate) fn probe() -> anyhow::Result<()> {
    if rustix::process::getuid().is_root() {
        // Vms of root run as other users, whose rights are what counts.
        namespace::become_user(RUN_AS_BUILD, RUN_AS_BUILD).context("give up root")?;
    }
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let flags = UnshareFlags::NEWUSER
        | UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS;
    namespace::unshare(flags).context(REFUSED)?;
    namespace::map_own_ids(uid, gid).context("map the own id into the user namespace")?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).context("keep mounts private")?;
    mount("tmpfs", "/tmp", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, None).context("mount a tmpfs")?;
    namespace::unshare(UnshareFlags::NEWNET).context("make a network namespace")
}

/// Runs that process; its words are the error.
pub(crate) fn try_out() -> Result<(), String> {
    // Not by its path, which may lead to another build by now, or nowhere.
    let mut command = banger_sys::child::command("/proc/self/exe".as_ref());
    command.arg("probe-namespaces").stdin(Stdio::null()).stdout(Stdio::null());
    let output = command.output().map_err(|error| format!("start `bangerd probe-namespaces`: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let line = said.lines().next_back().unwrap_or("the probe ended without a word");
    Err(line.trim_start_matches("error: ").escape_debug().take(300).collect())
}
