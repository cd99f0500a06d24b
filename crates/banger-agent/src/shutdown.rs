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

/// Makes the initramfs what systemd enters last. `initramfs` is its root, `root` the new one, with `/proc` and `/run`.
pub(crate) fn prepare(initramfs: &Path, root: &Path, devices: &[String]) -> io::Result<()> {
    for dir in ["oldroot", "run"] {
        super::guest::make_dir(&initramfs.join(dir))?;
    }
    std::fs::write(initramfs.join(DEVICES_FILE.trim_start_matches('/')), devices.join("\n"))?;
    std::fs::hard_link(initramfs.join("init"), initramfs.join("shutdown"))?;
    // Loaded long ago, and this memory would be the guest's no more.
    let _ = std::fs::remove_dir_all(initramfs.join("modules"));
    let mounts = std::fs::read_to_string(root.join("proc/self/mountinfo"))?;
    let table = root.join("run/mount");
    std::fs::create_dir_all(&table)?;
    std::fs::write(table.join("utab"), own_mounts(&mounts, root))?;
    let place = root.join("run/initramfs");
    std::fs::create_dir_all(&place)?;
    rustix::mount::mount_bind(initramfs, place)?;
    Ok(())
}

/// The drives mounted below the root, as mounts of an initramfs, which systemd leaves to what comes after it
/// (`x-initrd.mount`, systemd.mount(5)). Otherwise it unmounts each by a process of its own, and fails at the modules,
/// which udev reads until it ends. The form is that of libmount's `utab`.
fn own_mounts(mountinfo: &str, root: &Path) -> String {
    let line = |line: &str| {
        let (own, filesystem) = line.split_once(" - ")?;
        let [id, _, _, part, target, ..] = own.split(' ').collect::<Vec<_>>()[..] else { return None };
        let source = filesystem.split(' ').nth(1).filter(|source| source.starts_with("/dev/"))?;
        let target = Path::new(target).strip_prefix(root).ok().filter(|target| *target != Path::new(""))?;
        Some(format!("ID={id} SRC={source} TARGET=/{} ROOT={part} OPTS=x-initrd.mount\n", target.display()))
    };
    mountinfo.lines().filter_map(line).collect()
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
    match mount(device, &place, "ext4", MountFlags::NOATIME, None) {
        // Made read-only already, by systemd for one, which writes everything out and closes the journal.
        Err(rustix::io::Errno::BUSY) => return Ok(mount(device, &place, "ext4", MountFlags::RDONLY, None)?),
        mounted => mounted?,
    }
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

#[cfg(test)]
mod tests {
    use super::own_mounts;
    use std::path::Path;

    #[test]
    fn drives_below_the_root_are_the_initramfs_own() {
        let mounts = "29 1 0:26 / /root rw - overlay overlay rw\n\
                      30 1 254:0 / /image ro - ext4 /dev/vda ro\n\
                      31 29 254:16 /docker /root/var/lib/docker rw,noatime shared:2 - ext4 /dev/vdb rw\n\
                      32 29 0:27 / /root/run rw - tmpfs tmpfs rw\n\
                      34 29 254:48 / /root/a\\040b rw - ext4 /dev/vdd rw\n";
        assert_eq!(
            own_mounts(mounts, Path::new("/root")),
            "ID=31 SRC=/dev/vdb TARGET=/var/lib/docker ROOT=/docker OPTS=x-initrd.mount\n\
             ID=34 SRC=/dev/vdd TARGET=/a\\040b ROOT=/ OPTS=x-initrd.mount\n"
        );
    }
}
