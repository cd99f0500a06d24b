//! Decompresses packages ahead of the one being written, on other processors, with bounded memory.
//!
//! ```text
//! workers take packages in order:   deb 1 ──chunks──┐
//!                                   deb 2 ──chunks──┤──> the caller reads deb 1, deb 2, … in order
//!                                   …               │
//! ```
//!
//! A worker takes packages in ascending order, so the one the caller waits for is always in work or done: no deadlock.
//! How far workers run ahead is bounded by a count of packages, and for each package by a number of chunks.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Condvar, Mutex, PoisonError};

use super::deb::{ControlFile, Deb, DebError};

/// Bytes handed over at a time.
const CHUNK: usize = 256 << 10;
/// Chunks of one package that may wait: 8 MiB.
const CHUNKS_WAITING: usize = 32;
/// Packages that may wait. With the above, at most 64 MiB.
const PACKAGES_AHEAD: usize = 8;
/// Workers; writing keeps up with no more than a few.
const WORKERS_MAX: usize = 4;

/// One package on its way to the caller.
pub(crate) struct Incoming {
    /// The files of its control archive.
    pub(crate) control: Vec<ControlFile>,
    /// Its data archive, decompressed.
    pub(crate) data: Chunks,
}

enum Message {
    Control(Vec<ControlFile>),
    Data(Vec<u8>),
    Failed(DebError),
    Broken(io::Error),
    /// The end; without it a reader sees an early end as an error.
    End,
}

/// Calls `each` with every package in order; an error of `each` or of a package ends everything.
pub(crate) fn for_each<E: From<DebError> + From<io::Error>>(
    debs: &[PathBuf],
    mut each: impl FnMut(usize, Incoming) -> Result<(), E>,
) -> Result<(), E> {
    let (senders, receivers): (Vec<_>, Vec<_>) = debs.iter().map(|_| sync_channel(CHUNKS_WAITING)).unzip();
    let senders: Vec<Mutex<Option<SyncSender<Message>>>> =
        senders.into_iter().map(|sender| Mutex::new(Some(sender))).collect();
    let next = AtomicUsize::new(0);
    let gate = Gate::default();
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get()).min(WORKERS_MAX);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(sender) = senders.get(at) else { return };
                    if !gate.wait(at) {
                        return;
                    }
                    let sender = sender.lock().unwrap_or_else(PoisonError::into_inner).take();
                    if let Some(sender) = sender {
                        // The receiver is gone when the caller has failed; then nobody misses the rest.
                        let _ = send_package(&debs[at], &sender);
                    }
                }
            });
        }
        // Opens the gate for good when this scope is left, in whatever way.
        let _close = CloseOnDrop(&gate);
        for (at, receiver) in receivers.into_iter().enumerate() {
            gate.advance(at);
            each(at, receive::<E>(receiver)?)?;
        }
        Ok(())
    })
}

fn receive<E: From<DebError> + From<io::Error>>(receiver: Receiver<Message>) -> Result<Incoming, E> {
    match receiver.recv() {
        Ok(Message::Control(control)) => {
            Ok(Incoming { control, data: Chunks { receiver, chunk: Vec::new(), at: 0, ended: false } })
        }
        Ok(Message::Failed(err)) => Err(err.into()),
        Ok(Message::Broken(err)) => Err(err.into()),
        Ok(Message::Data(_) | Message::End) | Err(_) => {
            Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
        }
    }
}

fn send_package(path: &std::path::Path, sender: &SyncSender<Message>) -> Result<(), ()> {
    let send = |message| sender.send(message).map_err(drop);
    let deb = match Deb::open(path).and_then(|deb| deb.control().map(|control| (deb, control))) {
        Ok((deb, control)) => {
            send(Message::Control(control))?;
            deb
        }
        Err(err) => return send(Message::Failed(err)),
    };
    let mut data = deb.data();
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        match data.by_ref().take(CHUNK as u64).read_to_end(&mut chunk) {
            Ok(0) => return send(Message::End),
            Ok(_) => send(Message::Data(chunk))?,
            Err(err) => return send(Message::Broken(err)),
        }
    }
}

/// How far workers may go.
#[derive(Default)]
struct Gate {
    /// The package the caller is at; `usize::MAX` when it is done.
    at: Mutex<usize>,
    moved: Condvar,
}

impl Gate {
    fn wait(&self, package: usize) -> bool {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        while *at != usize::MAX && package > *at + PACKAGES_AHEAD {
            at = self.moved.wait(at).unwrap_or_else(PoisonError::into_inner);
        }
        *at != usize::MAX
    }

    fn advance(&self, to: usize) {
        *self.at.lock().unwrap_or_else(PoisonError::into_inner) = to;
        self.moved.notify_all();
    }
}

struct CloseOnDrop<'a>(&'a Gate);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.advance(usize::MAX);
    }
}

/// Reads the chunks of one package.
pub(crate) struct Chunks {
    receiver: Receiver<Message>,
    chunk: Vec<u8>,
    at: usize,
    ended: bool,
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.chunk.len() && !self.ended {
            match self.receiver.recv() {
                Ok(Message::Data(chunk)) => (self.chunk, self.at) = (chunk, 0),
                Ok(Message::End) => self.ended = true,
                Ok(Message::Broken(err)) => return Err(err),
                Ok(Message::Control(_) | Message::Failed(_)) | Err(_) => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
        }
        let rest = &self.chunk[self.at..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.at += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::deb::tests::build;
    use super::*;
    use crate::tar::tests::entry;

    #[derive(Debug, thiserror::Error)]
    enum TestError {
        #[error("deb")]
        Deb(#[from] DebError),
        #[error("io")]
        Io(#[from] io::Error),
        #[error("stop")]
        Stop,
    }

    fn debs(dir: &std::path::Path, count: usize) -> Vec<PathBuf> {
        (0..count)
            .map(|n| {
                let path = dir.join(format!("{n}.deb"));
                let data = vec![n as u8; 300_000 * (n % 3)];
                fs::write(
                    &path,
                    build(
                        &[("control", &format!("Package: p{n}\n"))],
                        vec![entry("f", b'0', 0o644, "", &data)],
                    ),
                )
                .unwrap();
                path
            })
            .collect()
    }

    #[test]
    fn packages_arrive_in_order_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let mut seen = Vec::new();
        for_each::<TestError>(&debs(dir.path(), 40), |at, mut package| {
            assert_eq!(package.control[0].data, format!("Package: p{at}\n").as_bytes());
            let mut data = Vec::new();
            package.data.read_to_end(&mut data)?;
            assert_eq!(data.len() / 512, 3 + (300_000 * (at % 3)).div_ceil(512));
            seen.push(at);
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, (0..40).collect::<Vec<_>>());
    }

    #[test]
    fn an_error_ends_the_workers() {
        let dir = tempfile::tempdir().unwrap();
        let result =
            for_each(&debs(dir.path(), 40), |at, _| if at == 3 { Err(TestError::Stop) } else { Ok(()) });
        assert!(matches!(result, Err(TestError::Stop)));
        let mut broken = debs(dir.path(), 5);
        broken.push(dir.path().join("absent.deb"));
        assert!(matches!(for_each(&broken, |_, _| Ok(())), Err(TestError::Deb(_))));
    }
}
