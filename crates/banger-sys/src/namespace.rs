//! Namespaces, processes that live in them and what they may, and taps.

use rustix::thread::UnshareFlags;
use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// Moves the caller (a process, or one thread where the flags allow it) into new namespaces.
///
/// # Errors
/// When the kernel or its configuration forbids it.
pub fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: none of the flags callers use unshares the descriptor table, which is what could invalidate
    // descriptors other code holds.
    unsafe { rustix::thread::unshare_unsafe(flags - UnshareFlags::FILES) }.map_err(Into::into)
}

/// Makes the caller known in its new user namespace under its own ids and no others.
///
/// # Errors
/// When the caller is not in a fresh user namespace.
pub fn map_own_ids(uid: u32, gid: u32) -> io::Result<()> {
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))
}

/// Splits the process; returns the child's id in the parent and none in the child.
///
/// # Errors
/// When the process has other threads, whose locks a child would inherit held, or there is no memory.
pub fn fork() -> io::Result<Option<i32>> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("a process with threads can't be split"));
    }
    // SAFETY: there is one thread, so the child is a complete copy.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        pid => Ok(Some(pid)),
    }
}

/// Gives up root for good: groups, group, user. `/proc/self` stays the caller's own.
///
/// # Errors
/// When the caller may not.
pub fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: plain system calls on numbers; the caller has one thread.
    let result = unsafe {
        if libc::setgroups(0, std::ptr::null()) != 0
            || libc::setresgid(gid, gid, gid) != 0
            || libc::setresuid(uid, uid, uid) != 0
        {
            -1
        } else {
            libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0)
        }
    };
    if result != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Prepares a command whose process is not trusted: no new privileges, its own session, dies with its parent, and keeps
/// the descriptors in `keep` across `exec`, and no others that this process may have been given open. It does not hear
/// SIGTERM, SIGINT and SIGHUP: a host that goes down sends them to every process, and whoever started this one ends it in
/// its own order.
pub fn untrusted(command: &mut Command, keep: Vec<RawFd>) {
    let setup = move || {
        // SAFETY: async-signal-safe calls on numbers prepared before the fork, and on a set that lives as long as they do.
        unsafe {
            let mut blocked: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut blocked);
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
                libc::sigaddset(&raw mut blocked, signal);
            }
            if libc::sigprocmask(libc::SIG_BLOCK, &raw const blocked, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) != 0
                || libc::setsid() < 0
            {
                return Err(io::Error::last_os_error());
            }
            // Unknown before Linux 5.11, where what whoever started the daemon left open stays so.
            libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
            for fd in &keep {
                if libc::fcntl(*fd, libc::F_SETFD, 0) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes async-signal-safe calls only and allocates nothing.
    unsafe { command.pre_exec(setup) };
}

/// A right a helper needs within the vm's own namespaces. It means nothing outside of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// Interfaces, routes and packet filters.
    NetAdmin,
    /// Ports below 1024.
    NetBindService,
    /// Giving capabilities of its own to children, and none beyond those.
    SetPcap,
    /// Entering namespaces and mounting.
    SysAdmin,
}

impl Capability {
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::SetPcap => 8,
            Self::NetBindService => 10,
            Self::NetAdmin => 12,
            Self::SysAdmin => 21,
        }
    }
}

/// Prepares a command that works for the vm and is trusted with some capabilities of its user namespace: without this
/// it has none, because the user it runs as is not 0 there. It gains no others, has its own session, and dies with the
/// thread that starts it.
pub fn helper(command: &mut Command, capabilities: &[Capability]) {
    let numbers: Vec<u32> = capabilities.iter().map(|capability| capability.number()).collect();
    let mask = numbers.iter().fold(0u32, |mask, number| mask | 1 << number);
    let setup = move || {
        let header = CapabilityHeader { version: 0x2008_0522, pid: 0 };
        let low = CapabilitySet { effective: mask, permitted: mask, inheritable: mask };
        let sets = [low, CapabilitySet { effective: 0, permitted: 0, inheritable: 0 }];
        // SAFETY: async-signal-safe calls on values prepared before the fork; the structures are what version 3 of
        // the call takes, and outlive it.
        unsafe {
            if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::setsid() < 0
                || libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) != 0
            {
                return Err(io::Error::last_os_error());
            }
            for number in &numbers {
                if libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, *number, 0, 0) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            // Last: a change of rights would clear it.
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes async-signal-safe calls only and allocates nothing.
    unsafe { command.pre_exec(setup) };
}

/// Prepares a command that runs in a new user and a new network namespace, to try something that must leave no trace.
pub fn isolated(command: &mut Command) {
    // SAFETY: one async-signal-safe call; the child has one thread, as a new user namespace requires.
    let setup = || unsafe {
        if libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: the closure makes an async-signal-safe call only and allocates nothing.
    unsafe { command.pre_exec(setup) };
}

#[repr(C)]
pub(crate) struct CapabilityHeader {
    pub(crate) version: u32,
    pub(crate) pid: c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct CapabilitySet {
    pub(crate) effective: u32,
    pub(crate) permitted: u32,
    pub(crate) inheritable: u32,
}

/// Makes a tap of this name in the caller's network namespace. It lives as long as the descriptor.
///
/// # Errors
/// When `/dev/net/tun` can't be opened or the name is taken.
pub fn open_tap(name: &str) -> io::Result<OwnedFd> {
    // With the header of virtio in front of each packet the guest may leave checksums and segmenting to the kernel.
    open_interface(name, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR, 0)
}

/// Makes an interface of this name in the caller's network namespace that hands over whole IP packets, with nothing in
/// front, and whose reads and writes never wait. It lives as long as the descriptor.
///
/// # Errors
/// When `/dev/net/tun` can't be opened or the name is taken.
pub fn open_tun(name: &str) -> io::Result<OwnedFd> {
    open_interface(name, libc::IFF_TUN | libc::IFF_NO_PI, libc::O_NONBLOCK)
}

fn open_interface(name: &str, kind: c_int, flags: c_int) -> io::Result<OwnedFd> {
    // SAFETY: `ifreq` is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    request.ifr_ifru.ifru_flags = kind as libc::c_short;
    // SAFETY: a NUL-terminated constant.
    let fd = unsafe { libc::open(c"/dev/net/tun".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC | flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `open` returned it just now and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: TUNSETIFF takes an `ifreq`, which outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    if result as c_int != 0 { Err(io::Error::last_os_error()) } else { Ok(fd) }
}

/// Makes a tap stay when it is closed, until its network namespace goes. Processes of the caller's user that may open
/// `/dev/net/tun` in that namespace can then open it by its name: a tap of nobody's was everybody's only before Linux 6.13
/// and the stable kernels of that time.
///
/// # Errors
/// When the descriptor is not a tap's, or the caller may not.
pub fn keep_tap(tap: &OwnedFd) -> io::Result<()> {
    let owner = rustix::process::geteuid().as_raw();
    for (request, value) in [(libc::TUNSETOWNER, owner), (libc::TUNSETPERSIST, 1)] {
        // SAFETY: both requests take a number, and the descriptor is open.
        let result = unsafe { libc::ioctl(tap.as_raw_fd(), request as _, libc::c_ulong::from(value)) };
        if result as c_int != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_process_with_threads_is_not_split() {
        // The test harness runs this in a thread of its own.
        assert!(super::fork().is_err());
    }
}
