//! The kernel's random number generator.

use std::io;
use std::os::fd::AsRawFd as _;

/// `RNDADDENTROPY` of `linux/random.h`, which libc does not define: `_IOW('R', 0x03, int[2])`.
const ADD_ENTROPY: libc::Ioctl = 0x4008_5203_u32 as libc::Ioctl;
/// `RNDRESEEDCRNG`: `_IO('R', 0x07)`.
const RESEED: libc::Ioctl = 0x5207;
/// Most bytes one call takes; 32 are all a reseed can use.
const SEED_LEN_MAX: usize = 64;

/// `struct rand_pool_info` with its bytes.
#[repr(C)]
struct PoolInfo {
    entropy_bits: libc::c_int,
    len: libc::c_int,
    bytes: [u8; SEED_LEN_MAX],
}

/// Adds secret random bytes and makes every number drawn from now on depend on them, those the kernel had made in
/// advance included: two machines that were one until now go apart here. Of `seed` the first 64 bytes count.
///
/// # Errors
/// When the caller may not, which takes `CAP_SYS_ADMIN`.
pub fn reseed(seed: &[u8]) -> io::Result<()> {
    let device = std::fs::OpenOptions::new().write(true).open("/dev/urandom")?;
    let mut info = PoolInfo { entropy_bits: 0, len: 0, bytes: [0; SEED_LEN_MAX] };
    let len = seed.len().min(SEED_LEN_MAX);
    info.bytes[..len].copy_from_slice(&seed[..len]);
    info.len = len as libc::c_int;
    info.entropy_bits = 8 * info.len;
    // SAFETY: the request reads a `rand_pool_info` with as many bytes behind it as `len` says, and the struct has them.
    check(unsafe { libc::ioctl(device.as_raw_fd(), ADD_ENTROPY, &raw const info) })?;
    // SAFETY: the request takes no argument, and the descriptor is open.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RESEED, 0) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn whoever_may_can_reseed() {
        let tried = super::reseed(b"not a secret");
        let allowed = rustix::process::geteuid().is_root();
        assert!(tried.is_ok() || !allowed || tried.unwrap_err().raw_os_error() == Some(libc::EPERM));
    }
}
