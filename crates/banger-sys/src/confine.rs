//! Rights that a process gives up for good, for itself or in a child before its program starts.
//!
//! What is given up is decided and compiled beforehand: between `fork` and `exec` only system calls on prepared numbers
//! are allowed, since another thread may have held any lock at the moment of the fork.

use crate::namespace::{Capability, CapabilityHeader, CapabilitySet};
use seccompiler::BpfProgram;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// Numbers of capabilities, known and to come.
const CAPABILITIES: libc::c_ulong = 64;

/// A limit on what a process uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// Bytes of memory it maps.
    AddressSpace,
    /// Bytes of a core dump.
    Core,
    /// Bytes of the largest file it can write.
    FileSize,
    /// Bytes of memory that can't be swapped out.
    LockedMemory,
    /// Open descriptors.
    OpenFiles,
    /// Processes and threads of its user within its user namespace. Before Linux 5.14 on the whole host.
    Processes,
}

impl Limit {
    #[allow(clippy::unnecessary_cast, reason = "the type of these differs between C libraries")]
    const fn resource(self) -> u32 {
        let resource = match self {
            Self::AddressSpace => libc::RLIMIT_AS,
            Self::Core => libc::RLIMIT_CORE,
            Self::FileSize => libc::RLIMIT_FSIZE,
            Self::LockedMemory => libc::RLIMIT_MEMLOCK,
            Self::OpenFiles => libc::RLIMIT_NOFILE,
            Self::Processes => libc::RLIMIT_NPROC,
        };
        resource as u32
    }
}

/// What a thread gives up. A process does so as long as it has no other threads.
#[derive(Debug, Default)]
pub struct Confinement {
    /// Limits, in force for children as well.
    pub limits: Vec<(Limit, u64)>,
    /// The capabilities that stay, of those it has; with none given all stay.
    pub capabilities: Option<Vec<Capability>>,
    /// A Landlock ruleset.
    pub ruleset: Option<OwnedFd>,
    /// Programs that judge system calls. The strictest verdict holds.
    pub filters: Vec<BpfProgram>,
}

impl Confinement {
    /// Gives it up for the calling thread, and those it starts.
    ///
    /// # Errors
    /// When the kernel refuses. Some of it may be in force then.
    pub fn enter(&self) -> io::Result<()> {
        let keep = self.capabilities.as_deref().map(mask);
        // Later steps need what the filters and the missing capabilities would deny to earlier ones.
        for (limit, value) in &self.limits {
            let value = libc::rlimit64 { rlim_cur: *value, rlim_max: *value };
            // SAFETY: a system call on a structure that outlives it; no old value is asked for.
            check(unsafe {
                libc::syscall(
                    libc::SYS_prlimit64,
                    0,
                    limit.resource(),
                    &raw const value,
                    std::ptr::null_mut::<libc::rlimit64>(),
                )
            })?;
        }
        // SAFETY: plain numbers.
        check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
        if let Some(keep) = keep {
            drop_capabilities(keep)?;
        }
        if let Some(ruleset) = &self.ruleset {
            // SAFETY: a descriptor that is open, and flags.
            check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) })?;
        }
        for filter in &self.filters {
            seccompiler::apply_filter(filter).map_err(|_| io::Error::last_os_error())?;
        }
        Ok(())
    }

    /// Has the command's process give it up before its program starts.
    pub fn on_exec(self, command: &mut Command) {
        // SAFETY: `enter` allocates nothing and makes system calls only; errors carry their number and no text.
        unsafe { command.pre_exec(move || self.enter()) };
    }
}

/// Returns the version of Landlock the kernel offers.
#[must_use]
pub fn landlock_version() -> Option<u32> {
    // SAFETY: with this flag the call takes no structure and returns a number.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0, 1) };
    u32::try_from(version).ok().filter(|version| *version > 0)
}

fn mask(capabilities: &[Capability]) -> u64 {
    capabilities.iter().fold(0, |mask, capability| mask | 1 << capability.number())
}

/// Keeps those of `keep` that the thread has, and sees to it that no program it starts brings others back.
fn drop_capabilities(keep: u64) -> io::Result<()> {
    let header = CapabilityHeader { version: 0x2008_0522, pid: 0 };
    let mut sets = [CapabilitySet::default(); 2];
    // SAFETY: plain numbers, and structures as version 3 of the call takes them.
    unsafe {
        check(libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0).into())?;
        for number in (0..CAPABILITIES).filter(|number| keep >> number & 1 == 0) {
            // It fails for numbers this kernel has no capability for, all later ones among them; and without the right
            // to do it, where nothing can be brought back anyway, since privileges can't be gained.
            if libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) != 0 {
                break;
            }
        }
        check(libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr()))?;
        for (set, keep) in sets.iter_mut().zip([keep as u32, (keep >> 32) as u32]) {
            set.permitted &= keep;
            set.effective &= keep;
            set.inheritable = 0;
        }
        check(libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()))
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::{Confinement, Limit};

    /// Runs a shell command under limits and without capabilities.
    fn confined(script: &str, limits: Vec<(Limit, u64)>) -> String {
        let mut command = crate::child::command("sh".as_ref());
        command.args(["-c", script]);
        let confinement = Confinement { limits, capabilities: Some(Vec::new()), ..Confinement::default() };
        confinement.on_exec(&mut command);
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    }

    #[test]
    fn a_program_starts_without_capabilities_and_within_limits() {
        let text = confined(
            "grep -E 'Cap(Prm|Eff|Amb)|NoNew' /proc/self/status; ulimit -n",
            vec![(Limit::OpenFiles, 77)],
        );
        let values: Vec<&str> = text.lines().map(|line| line.split('\t').next_back().unwrap()).collect();
        let none = "0000000000000000";
        assert_eq!(values, [none, none, none, "1", "77"]);
    }
}
