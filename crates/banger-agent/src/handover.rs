//! Machines that boot the classic way, with an initrd of the image's own.
//!
//! Ours was appended to it, and `rdinit=` names this program. Process 1 becomes the image's `/init` once the agent knows
//! which vm this is; that mounts the root filesystem and enters it, and the agent follows. Nobody tells when it has, so
//! process 1's root is looked at again and again.

use crate::{disk, guest, init};
use banger_wire::guest::GuestDrives;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long the image's initrd may take to enter the root filesystem. One that waits for a device that never comes
/// gives up after 30 s by Debian's default, and opens a shell on the console.
const ENTER_TIME: Duration = Duration::from_secs(120);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Where the root filesystem is mounted before the image's initrd does.
const PLACE: &str = "/banger/root";

/// Makes the root filesystem as large as its drive, the vm's disk, and has `write` put something into it.
///
/// # Errors
/// When it can't be mounted, or `write` fails. One that can't be grown stays as it is.
pub(crate) fn prepare(drives: &GuestDrives, write: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    guest::make_dir(Path::new(PLACE))?;
    mount(&drives.image, PLACE, &drives.image_fs, MountFlags::NOATIME, None)?;
    // One that banger wrote, of a vm that became an image, is as large as that vm's was.
    if let Err(stays) = disk::grow(Path::new(&drives.image), Path::new(PLACE))
        && !stays.is_for_good()
    {
        init::log(&format!("{}, ignoring", stays.text()));
    }
    let written = write(Path::new(PLACE));
    unmount(PLACE, UnmountFlags::empty())?;
    written
}

/// Lets process 1 go, and returns in the root filesystem it has entered.
///
/// # Errors
/// When it has not for [`ENTER_TIME`].
#[allow(clippy::disallowed_methods, reason = "there is no event to wait for")]
pub(crate) fn follow() -> io::Result<()> {
    let open = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // Process 1 unmounts this; what is open stays.
    let processes = rustix::fs::open("/proc", open, Mode::empty())?;
    let initramfs = rustix::fs::stat("/")?;
    init::send_order(init::HANDOVER)?;
    let deadline = Instant::now() + ENTER_TIME;
    loop {
        let root = rustix::fs::openat(&processes, "1/root", open, Mode::empty())?;
        if rustix::fs::fstat(&root)?.st_dev != initramfs.st_dev {
            rustix::process::fchdir(&root)?;
            return Ok(rustix::process::chroot(".")?);
        }
        if Instant::now() > deadline {
            let waited = ENTER_TIME.as_secs();
            return Err(io::Error::other(format!(
                "the image's initrd has not entered a root filesystem for {waited} s"
            )));
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}
