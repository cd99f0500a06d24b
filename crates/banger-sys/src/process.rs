//! Other processes.

use std::io;

/// Stops a process for as long as the calling thread lives, also process 1, which no signal stops. It is not told.
///
/// Returns once every one of its threads stands still, or was asked to and didn't within `patience`: one that waits for a
/// device does so in the kernel, and will go no further.
///
/// # Errors
/// When there is no such process, or the caller may not trace it.
#[allow(clippy::disallowed_methods, reason = "no call waits for a traced thread's stop with a deadline")]
pub fn hold(pid: i32, patience: std::time::Duration) -> io::Result<()> {
    let deadline = std::time::Instant::now() + patience;
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let name = entry?.file_name();
        let Some(thread) = name.to_str().and_then(|name| name.parse::<libc::pid_t>().ok()) else { continue };
        ptrace(libc::PTRACE_SEIZE, thread)?;
        ptrace(libc::PTRACE_INTERRUPT, thread)?;
        while !has_stopped(thread)? && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
    Ok(())
}

fn ptrace(request: libc::c_uint, thread: libc::pid_t) -> io::Result<()> {
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: neither request reads or writes memory of the caller.
    if unsafe { libc::ptrace(request as _, thread, none, none) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn has_stopped(thread: libc::pid_t) -> io::Result<bool> {
    let mut status = 0;
    // SAFETY: the status is a local that outlives the call.
    let found = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL | libc::WNOHANG) };
    if found < 0 { Err(io::Error::last_os_error()) } else { Ok(found == thread) }
}

/// Returns the user of the process at the other end of a connected Unix socket, as it was when it connected; one that the
/// caller's user namespace does not know has the number that stands for such. Its process may be of another namespace, where
/// it has no number here.
///
/// # Errors
/// When the socket is not connected, or no Unix socket.
pub fn peer_uid(socket: &std::os::fd::OwnedFd) -> io::Result<u32> {
    use std::os::fd::AsRawFd as _;
    let mut found = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    let value = (&raw mut found).cast();
    // SAFETY: the option's value is such a structure, of whose length the kernel is told, and both outlive the call.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, value, &raw mut len)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(found.uid) }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::process::Stdio;
    use std::time::Duration;

    #[test]
    fn a_held_process_gets_no_further() {
        let mut command = crate::child::command("sh".as_ref());
        command.args(["-c", "trap 'echo told' TERM; echo began; while :; do sleep 0.01; done"]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut output = child.stdout.take().unwrap();
        let mut word = [0; 6];
        output.read_exact(&mut word).unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        super::hold(pid, Duration::from_secs(5)).unwrap();
        let state = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat.rsplit(')').next().unwrap().trim_start().chars().next()
        };
        assert_eq!(state(), Some('t'));
        let process = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(process, rustix::process::Signal::TERM).unwrap();
        let silence = rustix::time::Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        let mut said = [rustix::event::PollFd::new(&output, rustix::event::PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut said, Some(&silence)).unwrap(), 0, "no signal wakes it");
        assert_eq!(state(), Some('t'));
        child.kill().unwrap();
        child.wait().unwrap();
        let mut rest = String::new();
        output.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "");
    }

    #[test]
    fn the_user_at_the_other_end_is_known() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(super::peer_uid(&one.into()).unwrap(), rustix::process::getuid().as_raw());
        let alone = std::os::unix::net::UnixDatagram::unbound().unwrap();
        let uid = super::peer_uid(&alone.into());
        assert!(uid.is_err() || uid.is_ok_and(|uid| uid == u32::MAX), "there is nobody");
    }
}
