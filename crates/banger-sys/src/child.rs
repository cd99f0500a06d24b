//! What happens between `fork` and `exec` of a child.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// Signals that a Rust program or its parent may have changed and that a fresh program expects untouched.
const SIGNALS_RESET: [libc::c_int; 9] = [
    libc::SIGPIPE,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGCHLD,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
];

/// Returns a command. The one door to process creation, so that a reader finds every caller.
#[allow(clippy::disallowed_methods, reason = "this is the door")]
#[must_use]
pub fn command(program: &std::ffi::OsStr) -> Command {
    Command::new(program)
}

/// Whose rights a child gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// Makes the child a session leader with default signal dispositions, the given identity and, where `terminal` is
/// given, that terminal as its controlling one. An identity of none keeps the parent's.
pub fn new_session(command: &mut Command, identity: Option<Identity>, terminal: Option<OwnedFd>) {
    let setup = move || {
        // SAFETY: only async-signal-safe calls on values prepared before the fork; the descriptor is owned by
        // this closure, which lives as long as the command.
        unsafe {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            check(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()))?;
            for signal in SIGNALS_RESET {
                if libc::signal(signal, libc::SIG_DFL) == libc::SIG_ERR {
                    return Err(std::io::Error::last_os_error());
                }
            }
            check(libc::setsid())?;
            if let Some(terminal) = &terminal {
                check(libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0))?;
            }
            if let Some(identity) = &identity {
                // The raw call: glibc's wrapper synchronises threads, which do not exist after a fork.
                check(libc::setgroups(identity.groups.len(), identity.groups.as_ptr()))?;
                check(libc::setresgid(identity.gid, identity.gid, identity.gid))?;
                check(libc::setresuid(identity.uid, identity.uid, identity.uid))?;
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes async-signal-safe calls only and allocates nothing.
    unsafe { command.pre_exec(setup) };
}

fn check(result: libc::c_int) -> std::io::Result<()> {
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::{command, new_session};

    #[test]
    fn a_child_leads_its_own_session() {
        let mut child = command("sh".as_ref());
        child.args(["-c", "cut -d' ' -f1,6 /proc/self/stat; echo $$"]);
        new_session(&mut child, None, None);
        let output = child.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let mut lines = text.lines();
        let session = lines.next().unwrap().split(' ').nth(1).unwrap();
        assert_eq!(session, lines.next().unwrap());
    }
}
