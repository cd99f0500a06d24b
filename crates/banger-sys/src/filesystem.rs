//! Whole filesystems.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};

/// `FIFREEZE` of `linux/fs.h`, which libc does not define: `_IOWR('X', 119, int)`.
const FREEZE: libc::Ioctl = 0xc004_5877_u32 as libc::Ioctl;

/// `EXT4_IOC_RESIZE_FS` of `linux/ext4.h`, which libc does not define: `_IOW('f', 16, __u64)`.
const EXT4_RESIZE: libc::Ioctl = 0x4008_6610_u32 as libc::Ioctl;

/// Makes the ext4 filesystem that `file` is on, which is mounted, as large as `blocks` of its blocks. Changes nothing when
/// it is.
///
/// # Errors
/// When the device is smaller, the filesystem is none that its kernel makes larger, or the caller may not.
pub fn grow_ext4(file: impl AsFd, blocks: u64) -> io::Result<()> {
    // SAFETY: the request reads an unsigned 64-bit number at the address, which lives as long as the call, and the
    // descriptor is open.
    let result = unsafe { libc::ioctl(file.as_fd().as_raw_fd(), EXT4_RESIZE, &raw const blocks) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Writes everything of the filesystem `file` is on to its device, leaves it as after an unmount, and makes every later
/// write wait. Meant for a machine that is switched off next.
///
/// # Errors
/// When the filesystem can't be frozen, is frozen already, or the caller may not.
pub fn freeze(file: impl AsFd) -> io::Result<()> {
    let argument: libc::c_int = 0;
    // SAFETY: the request takes an `int`, which the kernel does not use, and the descriptor is open.
    let result = unsafe { libc::ioctl(file.as_fd().as_raw_fd(), FREEZE, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_has_no_filesystem_is_not_frozen() {
        let (pipe, _other) = std::io::pipe().unwrap();
        assert!(super::freeze(&pipe).is_err());
        assert!(super::grow_ext4(&pipe, 1).is_err());
    }
}
