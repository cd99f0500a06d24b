//! The process that starts `pasta`.
//!
//! `pasta` shuts itself in with mounts and namespaces of its own, which nothing the supervisor starts can make once the
//! supervisor is confined: what Landlock denies it denies to all descendants. So the vm's first process splits off this
//! one while it is still alone and has all its rights. What is started is decided before the split, and all that is
//! understood afterwards is three bytes: whoever takes over the supervisor can start the same `pasta` again, with IPv6 or
//! without, or end it.

use crate::net::pasta::{ONLY_IPV4, PastaPlan};
use anyhow::{Context as _, bail};
use banger_sys::namespace::{self, Capability};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream as BlockingStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use tokio::net::UnixStream;

const START: u8 = b's';
const START_IPV4: u8 = b'4';
const END: u8 = b'e';

/// The supervisor's end.
#[derive(Debug)]
pub(crate) struct Starter {
    socket: UnixStream,
    state: State,
}

/// What the other process is expected to say next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    /// Whether it could start the program.
    Starting,
    /// How the program ended.
    Running,
}

/// Which process one is after a split.
#[derive(Debug)]
pub(crate) enum Split {
    /// The vm's first one, with the way to the other if there is one.
    First(Option<BlockingStream>),
    /// The other, when its work is over.
    Other,
}

/// Splits the process, which has one thread. Without a pasta to start there is nothing to split off.
pub(crate) fn split(pasta: Option<&PastaPlan>) -> anyhow::Result<Split> {
    let Some((program, args)) = pasta.and_then(|pasta| Some((&pasta.program, pasta.args.as_ref()?))) else {
        return Ok(Split::First(None));
    };
    let (own, other) = BlockingStream::pair().context("make a pair of sockets")?;
    if namespace::fork().context("split off what starts `pasta`")?.is_some() {
        return Ok(Split::First(Some(own)));
    }
    drop(own);
    // Over when the supervisor is gone; the kernel ends this process as well then.
    let _ = serve(other, |only_ipv4| pasta_command(program, args, only_ipv4));
    Ok(Split::Other)
}

fn pasta_command(program: &Path, args: &[String], only_ipv4: bool) -> Command {
    let mut command = banger_sys::child::command(program.as_os_str());
    let more = if only_ipv4 { ONLY_IPV4.as_slice() } else { &[] };
    command.args(args).args(more).env_clear().env("PATH", "/usr/bin:/bin");
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let rights = [Capability::NetAdmin, Capability::SysAdmin, Capability::NetBindService];
    namespace::helper(&mut command, &rights);
    command
}

/// Starts and ends the program as the other end says. Answers with whether it started, and later how it ended.
fn serve(mut socket: BlockingStream, command: impl Fn(bool) -> Command) -> io::Result<()> {
    loop {
        let only_ipv4 = match read_byte(&mut socket)? {
            START => false,
            START_IPV4 => true,
            _ => continue,
        };
        let mut child = match command(only_ipv4).spawn() {
            Ok(child) => child,
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                socket.write_all(&errno.to_ne_bytes())?;
                continue;
            }
        };
        socket.write_all(&0i32.to_ne_bytes())?;
        let pid = Pid::from_raw(child.id().cast_signed()).ok_or(io::ErrorKind::NotFound)?;
        let handle = pidfd_open(pid, PidfdFlags::empty())?;
        loop {
            let mut ready = [PollFd::new(&socket, PollFlags::IN), PollFd::new(&handle, PollFlags::IN)];
            poll(&mut ready, None)?;
            if !ready[1].revents().is_empty() {
                break;
            }
            if read_byte(&mut socket)? == END {
                child.kill()?;
            }
        }
        socket.write_all(&child.wait()?.into_raw().to_ne_bytes())?;
    }
}

fn read_byte(socket: &mut BlockingStream) -> io::Result<u8> {
    let mut byte = [0];
    socket.read_exact(&mut byte)?;
    Ok(byte[0])
}

impl Starter {
    /// Takes over the first process's end of a split.
    pub(crate) fn new(socket: BlockingStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket: UnixStream::from_std(socket)?, state: State::Idle })
    }

    /// Starts the program, after an earlier one has ended. May be given up at any point.
    pub(crate) async fn start(&mut self, only_ipv4: bool) -> anyhow::Result<()> {
        self.end();
        while self.state != State::Idle {
            self.word().await?;
        }
        self.socket.writable().await?;
        self.socket.try_write(&[if only_ipv4 { START_IPV4 } else { START }]).context("ask for `pasta`")?;
        self.state = State::Starting;
        let errno = self.word().await?;
        if errno != 0 {
            return Err(io::Error::from_raw_os_error(errno)).context("start `pasta`");
        }
        Ok(())
    }

    /// Returns when the program has ended. May be given up at any point.
    pub(crate) async fn ended(&mut self) -> anyhow::Result<ExitStatus> {
        Ok(ExitStatus::from_raw(self.word().await?))
    }

    /// Ends the program, if there is one.
    pub(crate) fn end(&self) {
        if self.state != State::Idle {
            // A process that is not there any more has taken the program along.
            let _ = self.socket.try_write(&[END]);
        }
    }

    async fn word(&mut self) -> anyhow::Result<i32> {
        let mut word = [0; size_of::<i32>()];
        loop {
            self.socket.readable().await?;
            match self.socket.try_read(&mut word) {
                // Written at once and shorter than any buffer, so it arrives whole.
                Ok(len) if len == word.len() => break,
                Ok(_) => bail!("what starts `pasta` has ended"),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        let word = i32::from_ne_bytes(word);
        self.state = if self.state == State::Starting && word == 0 { State::Running } else { State::Idle };
        Ok(word)
    }
}

#[cfg(test)]
mod tests {
    use super::{BlockingStream, Starter, State, serve};
    use std::os::unix::process::ExitStatusExt as _;

    fn starter(program: &'static str, args: &'static [&'static str]) -> Starter {
        let (own, other) = BlockingStream::pair().unwrap();
        std::thread::spawn(move || {
            serve(other, |_| {
                let mut command = banger_sys::child::command(program.as_ref());
                command.args(args);
                command
            })
        });
        Starter::new(own).unwrap()
    }

    #[tokio::test]
    async fn a_program_is_started_again_and_ended() {
        let mut ends = starter("sh", &["-c", "exit 7"]);
        for _ in 0..2 {
            ends.start(true).await.unwrap();
            assert_eq!(ends.ended().await.unwrap().code(), Some(7));
        }
        let mut stays = starter("sleep", &["600"]);
        for _ in 0..2 {
            // The second time in place of the first.
            stays.start(false).await.unwrap();
        }
        stays.end();
        assert_eq!(stays.ended().await.unwrap().signal(), Some(9));
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_an_error() {
        let mut starter = starter("/nonexistent/pasta", &[]);
        for _ in 0..2 {
            let error = format!("{:#}", starter.start(false).await.unwrap_err());
            assert!(error.starts_with("start `pasta`: No such file"), "{error}");
            assert_eq!(starter.state, State::Idle);
        }
    }
}
