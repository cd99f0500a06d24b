//! The end of a guest: everything written is on the disk, and the disk's filesystem is as after an unmount.
//!
//! Two ways lead here. Where the image's init is systemd, it ends everything in its order and then becomes `/shutdown`
//! of the "exit initramfs", which is this program in the initramfs the kernel began with ([`run`]). Elsewhere the agent
//! does it all itself ([`power_off`]).
//!
//! The overlay keeps the disk's filesystem in use to the end, so it can't be unmounted; freezing it does the same to the
//! bytes on the disk.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use rustix::system::RebootCommand;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// The name systemd runs it by.
pub(crate) const NAME: &str = "/shutdown";
/// Where the initramfs says which devices are written to, one a line.
const DEVICES_FILE: &str = "/disk.devices";
/// Where those are mounted once more to be frozen.
const PLACE: &str = "/run/banger-disk";
/// How long processes may take to end when asked, before they are killed.
const TERMINATE_TIME: Duration = Duration::from_secs(2);
/// How long the image's init may take to stand still.
const HOLD_TIME: Duration = Duration::from_secs(1);
/// How long killed ones may take: they wait for the disk at most.
const KILL_TIME: Duration = Duration::from_secs(5);

/// Makes the initramfs what systemd enters last. `initramfs` is its root, `run` the new root's `/run`.
pub(crate) fn prepare(initramfs: &Path, run: &Path, devices: &[String]) -> io::Result<()> {
    for dir in ["oldroot", "run"] {
        super::guest::make_dir(&initramfs.join(dir))?;
    }
    std::fs::write(initramfs.join(DEVICES_FILE.trim_start_matches('/')), devices.join("\n"))?;
    std::fs::hard_link(initramfs.join("init"), initramfs.join("shutdown"))?;
    // Loaded long ago, and this memory would be the guest's no more.
    let _ = std::fs::remove_dir_all(initramfs.join("modules"));
    let place = run.join("initramfs");
    std::fs::create_dir_all(&place)?;
    rustix::mount::mount_bind(initramfs, place)?;
    Ok(())
}

/// Is `/shutdown`, process 1 of a machine whose services have ended. Returns only when it could not end the machine.
pub(crate) fn run(how: &str) -> io::Result<()> {
    end_processes(KILL_TIME, Signal::KILL);
    let devices = std::fs::read_to_string(DEVICES_FILE).unwrap_or_default();
    for (number, device) in devices.lines().enumerate() {
        freeze(device, number)?;
    }
    Ok(rustix::system::reboot(command(how == "reboot"))?)
}

/// Ends the machine from the agent: everything else first, then the disk. Returns only when it could not.
///
/// Process 1 can't be ended. It is held instead: it would see its children die and do something about it, and at the very
/// end it would lose its drives under its feet, which Linux 6.12 takes away before the power, and panic.
pub(crate) fn power_off(reboot: bool, devices: &[String]) {
    if let Err(error) = banger_sys::process::hold(Pid::INIT.as_raw_nonzero().get(), HOLD_TIME) {
        crate::init::log(&format!("hold process 1: {error}, ignoring"));
    }
    end_processes(TERMINATE_TIME, Signal::TERM);
    end_processes(KILL_TIME, Signal::KILL);
    rustix::fs::sync();
    // A disk that can't be frozen has a journal, and what was synced is in it.
    for (number, device) in devices.iter().enumerate() {
        if let Err(error) = freeze(device, number) {
            crate::init::log(&format!("freeze `{device}`: {error}, ignoring"));
        }
    }
    let _ = rustix::system::reboot(command(reboot));
}

fn command(reboot: bool) -> RebootCommand {
    if reboot { RebootCommand::Restart } else { RebootCommand::PowerOff }
}

fn freeze(device: &str, number: usize) -> io::Result<()> {
    let place = format!("{PLACE}-{number}");
    std::fs::create_dir_all(&place)?;
    mount(device, &place, "ext4", MountFlags::NOATIME, None)?;
    banger_sys::filesystem::freeze(std::fs::File::open(&place)?)
}

/// Signals every process but the first and this one, and waits until they have ended, at most for `patience`.
fn end_processes(patience: Duration, signal: Signal) {
    let deadline = Instant::now() + patience;
    let processes = processes();
    for (_, handle) in &processes {
        let _ = rustix::process::pidfd_send_signal(handle, signal);
    }
    for (_, handle) in &processes {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = rustix::time::Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(0),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let _ = poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&left));
    }
}

/// Every process of userspace but the first and this one.
fn processes() -> Vec<(Pid, OwnedFd)> {
    let own = rustix::process::getpid();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
        .filter(|pid| *pid != own && *pid != Pid::INIT)
        // A kernel thread has no program, so no command line either; neither has a process that has ended.
        .filter(|pid| {
            let path = format!("/proc/{}/cmdline", pid.as_raw_nonzero());
            std::fs::read(path).is_ok_and(|text| !text.is_empty())
        })
        .filter_map(|pid| Some((pid, pidfd_open(pid, PidfdFlags::empty()).ok()?)))
        .collect()
}
