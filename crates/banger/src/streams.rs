//! The process's own stdin, stdout and stderr, each on a thread.
//!
//! They may be terminals or pipes shared with other programs, so they stay blocking, and a full stdout must not keep
//! a signal or stderr waiting. The threads are never joined: a read from a terminal ends when it pleases, and the
//! process ends without it.

use banger_wire::exec::{STDERR, STDOUT};
use banger_wire::frame::DATA_LEN_MAX;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::os::fd::BorrowedFd;
use tokio::sync::mpsc;

/// Chunks read ahead of what the guest takes.
const READ_AHEAD: usize = 2;

/// What became of bytes for stdout or stderr.
#[derive(Debug)]
pub(crate) enum Written {
    /// So many were passed on.
    Bytes {
        /// Their channel.
        channel: u8,
        /// How many.
        len: usize,
    },
    /// Nobody reads the stream any more.
    Closed,
    /// The stream can't be written.
    Failed(std::io::Error),
}

/// Both output streams.
#[derive(Debug)]
pub(crate) struct Outputs {
    stdout: std::sync::mpsc::Sender<Vec<u8>>,
    stderr: std::sync::mpsc::Sender<Vec<u8>>,
}

impl Outputs {
    /// Starts to write what is sent; what was written is told on the returned channel, which ends once the outputs
    /// were dropped and everything was written. The peer's window bounds what is queued.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(crate) fn start() -> std::io::Result<(Self, mpsc::UnboundedReceiver<Written>)> {
        let (told, written) = mpsc::unbounded_channel();
        let stdout = start_writer(STDOUT, rustix::stdio::stdout(), told.clone())?;
        let stderr = start_writer(STDERR, rustix::stdio::stderr(), told)?;
        Ok((Self { stdout, stderr }, written))
    }

    /// Queues bytes of a channel; those of an unknown one are dropped.
    pub(crate) fn send(&self, channel: u8, bytes: Vec<u8>) {
        let _ = match channel {
            STDOUT => self.stdout.send(bytes),
            STDERR => self.stderr.send(bytes),
            _ => Ok(()),
        };
    }
}

fn start_writer(
    channel: u8,
    fd: BorrowedFd<'static>,
    told: mpsc::UnboundedSender<Written>,
) -> std::io::Result<std::sync::mpsc::Sender<Vec<u8>>> {
    let (sender, queue) = std::sync::mpsc::channel::<Vec<u8>>();
    let write = move || {
        for bytes in queue {
            let result = match write_all(fd, &bytes) {
                Ok(()) => Written::Bytes { channel, len: bytes.len() },
                Err(Errno::PIPE) => Written::Closed,
                Err(error) => Written::Failed(error.into()),
            };
            let go_on = matches!(result, Written::Bytes { .. });
            if told.send(result).is_err() || !go_on {
                return;
            }
        }
    };
    std::thread::Builder::new().name(format!("output {channel}")).spawn(write)?;
    Ok(sender)
}

/// Another program that shares the description may have made it non-blocking.
fn wait(fd: BorrowedFd<'_>, flags: PollFlags) {
    let _ = poll(&mut [PollFd::from_borrowed_fd(fd, flags)], None);
}

/// Writes everything, also where another program has made the stream non-blocking.
///
/// # Errors
/// Those of the stream.
pub(crate) fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(len) => bytes = &bytes[len..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(fd, PollFlags::OUT),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Starts to read stdin; the returned channel ends with it.
///
/// # Errors
/// When no thread can be started.
pub(crate) fn start_reader() -> std::io::Result<mpsc::Receiver<Vec<u8>>> {
    let (sender, chunks) = mpsc::channel(READ_AHEAD);
    let read = move || {
        let stdin = rustix::stdio::stdin();
        let mut chunk = vec![0; DATA_LEN_MAX];
        loop {
            match rustix::io::read(stdin, &mut chunk[..]) {
                // A terminal that has gone reads as EIO: its end of file.
                Ok(0) => return,
                Ok(len) => {
                    if sender.blocking_send(chunk[..len].to_vec()).is_err() {
                        return;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => wait(stdin, PollFlags::IN),
                Err(_) => return,
            }
        }
    };
    std::thread::Builder::new().name("input".to_owned()).spawn(read)?;
    Ok(chunks)
}

/// Reads one line of stdin, for an answer.
///
/// # Errors
/// When no thread can be started.
pub(crate) async fn read_line() -> std::io::Result<String> {
    let mut chunks = start_reader()?;
    let mut line = Vec::new();
    while !line.contains(&b'\n') && line.len() < DATA_LEN_MAX {
        let Some(chunk) = chunks.recv().await else { break };
        line.extend_from_slice(&chunk);
    }
    Ok(String::from_utf8_lossy(&line).lines().next().unwrap_or_default().to_owned())
}
