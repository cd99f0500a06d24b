//! What happens between `fork` and `exec` of a child.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io::Read as _;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

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

/// Most bytes kept of what a program says in [`output_within`].
const SAID_LEN_MAX: usize = 256 * 1024;

/// What a program said, and how it ended.
#[derive(Debug)]
pub struct Said {
    /// Its output and error stream, in one.
    pub bytes: Vec<u8>,
    /// None when its time was over, and it was killed.
    pub status: Option<ExitStatus>,
}

/// Runs a program without input, for as long as `time`; it is killed then.
///
/// # Errors
/// When it can't be started.
pub fn output_within(mut command: Command, time: Duration) -> std::io::Result<Said> {
    let deadline = Instant::now() + time;
    let (mut output, input) = std::io::pipe()?;
    let mut child = command.stdin(Stdio::null()).stdout(input.try_clone()?).stderr(input).spawn()?;
    // It holds the pipe's other end, without which there is no end of what is read.
    drop(command);
    let mut bytes = Vec::new();
    let mut part = [0; 4096];
    while bytes.len() < SAID_LEN_MAX && is_ready(&output, deadline) {
        match output.read(&mut part) {
            Ok(0) | Err(_) => break,
            Ok(len) => bytes.extend_from_slice(&part[..len]),
        }
    }
    let ended = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
    if ended.is_ok_and(|ended| is_ready(&ended, deadline))
        && let Some(status) = child.try_wait()?
    {
        return Ok(Said { bytes, status: Some(status) });
    }
    let _ = child.kill();
    // One that is stuck in the kernel ends when it can; nobody needs to wait for that.
    std::thread::spawn(move || child.wait());
    Ok(Said { bytes, status: None })
}

/// Waits until a descriptor can be read, or is at its end; false when the deadline has come first.
fn is_ready(fd: impl AsFd, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], left.as_ref()) {
            Err(rustix::io::Errno::INTR) => {}
            ready => return ready.is_ok_and(|count| count > 0),
        }
    }
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

/// Makes this process, all of its threads, and what it starts somebody else's, for good.
///
/// # Errors
/// When the process may not, and is who it was.
pub fn become_identity(identity: &Identity) -> std::io::Result<()> {
    // SAFETY: the list of groups is as long as said; the wrappers of the C library include every thread.
    unsafe {
        check(libc::setgroups(identity.groups.len(), identity.groups.as_ptr()))?;
        check(libc::setresgid(identity.gid, identity.gid, identity.gid))?;
        check(libc::setresuid(identity.uid, identity.uid, identity.uid))
    }
}

fn check(result: libc::c_int) -> std::io::Result<()> {
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::{command, new_session, output_within};
    use std::time::{Duration, Instant};

    #[test]
    fn a_program_that_goes_on_is_ended() {
        let shell = |script: &str| {
            let mut shell = command("sh".as_ref());
            shell.args(["-c", script]);
            shell
        };
        let said = output_within(shell("echo out; echo err >&2; exit 3"), Duration::from_secs(60)).unwrap();
        assert_eq!((&*said.bytes, said.status.unwrap().code()), (&b"out\nerr\n"[..], Some(3)));
        // Silent, with its streams closed, and never silent.
        for script in ["echo begun; exec sleep 60", "exec >&- 2>&-; exec sleep 60", "exec yes"] {
            let begun = Instant::now();
            let said = output_within(shell(script), Duration::from_millis(200)).unwrap();
            assert!(said.status.is_none() && begun.elapsed() < Duration::from_secs(30), "{script}");
        }
        assert!(output_within(command("/nowhere".as_ref()), Duration::from_secs(1)).is_err());
    }

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
