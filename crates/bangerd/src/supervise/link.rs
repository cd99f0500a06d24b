//! The conversation with the agent: one stream, many sessions.
//!
//! Bytes from here on come from a guest nobody trusts. Frames are bounded by the decoder, damaged ones make it look for
//! the next mark, and a session that sends beyond its window is closed.

use banger_vmm::AgentSocket;
use banger_wire::exec::WINDOW;
use banger_wire::frame::{DATA_LEN_MAX, Decoder, Frame, FrameError, GUEST_MESSAGE_LEN_MAX, HEADER_LEN, Kind};
use banger_wire::guest::{GuestMessage, HostMessage, SessionKind};
use banger_wire::ssh_agent;
use banger_wire::stream::FrameWriter;
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

/// Frames that wait to be written to the guest: 1 MiB of data at most.
const OUT_QUEUE_LEN: usize = 16;
/// How long a VMM may take to make its socket.
const CONNECT_WAIT: Duration = Duration::from_secs(20);
/// Unforwarded bytes of one session: the windows of two channels, a message of the guest's, and one to an ssh agent.
const PENDING_MAX: usize = 2 * WINDOW as usize + GUEST_MESSAGE_LEN_MAX + ssh_agent::MESSAGE_LEN_MAX;
/// Sessions of one vm at a time: 200 of clients, and as many connections as its ports carry.
const SESSIONS_MAX: usize = 456;

struct Inbox {
    frames: mpsc::UnboundedSender<Frame>,
    pending: Rc<RefCell<usize>>,
}

#[derive(Default)]
struct Sessions {
    next: u32,
    open: HashMap<u32, Inbox>,
}

/// The sending side and the table of sessions; shared by everything in the supervisor.
#[derive(Clone)]
pub(crate) struct Link {
    out: mpsc::Sender<Frame>,
    sessions: Rc<RefCell<Sessions>>,
}

/// A session could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotOpened {
    #[error("too many sessions in this vm")]
    TooMany,
    #[error("what is asked for is too long for a message")]
    TooLong,
    #[error("the vm has ended")]
    Gone,
}

/// One open session.
pub(crate) struct Session {
    pub(crate) id: u32,
    frames: mpsc::UnboundedReceiver<Frame>,
    pending: Rc<RefCell<usize>>,
    link: Link,
}

impl Session {
    /// Returns the guest's next frame; none when the guest is gone.
    pub(crate) async fn next(&mut self) -> Option<Frame> {
        let frame = self.frames.recv().await?;
        *self.pending.borrow_mut() -= cost(&frame);
        Some(frame)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.link.sessions.borrow_mut().open.remove(&self.id);
    }
}

/// Where the agent's stream will come from.
pub(crate) enum Source {
    /// The VMM will listen here.
    Dial(PathBuf),
    /// The VMM will connect here, when the agent does.
    Accept(UnixListener),
}

impl Source {
    /// Listens where the VMM does not. Has to be there before the VMM starts, which may be quick.
    pub(crate) fn new(socket: AgentSocket) -> std::io::Result<Self> {
        Ok(match socket {
            AgentSocket::Dial(path) => Self::Dial(path),
            AgentSocket::Listen(path) => {
                remove_socket(&path)?;
                Self::Accept(UnixListener::bind(path)?)
            }
        })
    }
}

/// Removes what an earlier boot left.
pub(crate) fn remove_socket(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl Link {
    /// Begins the conversation; control messages of the guest arrive on the returned queue. What is sent before there is a
    /// connection waits for that.
    pub(crate) fn through(source: Source) -> (Self, mpsc::Receiver<GuestMessage>) {
        match source {
            Source::Dial(path) => Self::start(async move { connect(&path).await }),
            // One connection, the agent's, which is the guest's first program; later ones of others are refused.
            Source::Accept(listener) => {
                Self::start(async move { listener.accept().await.map(|(stream, _)| stream) })
            }
        }
    }

    fn start(
        stream: impl Future<Output = std::io::Result<UnixStream>> + 'static,
    ) -> (Self, mpsc::Receiver<GuestMessage>) {
        let (out, queue) = mpsc::channel(OUT_QUEUE_LEN);
        let (tell, messages) = mpsc::channel(16);
        let link = Self { out, sessions: Rc::default() };
        let sessions = link.sessions.clone();
        tokio::task::spawn_local(async move {
            let stream = tokio::select! {
                stream = stream => stream,
                // The boot is over.
                () = tell.closed() => return,
            };
            if let Ok(stream) = stream {
                let (read, write) = stream.into_split();
                tokio::task::spawn_local(write_frames(write, queue));
                read_frames(read, sessions, tell).await;
            }
        });
        (link, messages)
    }

    /// Sends a control message as soon as the guest takes it, which may be never: nothing here waits for a guest.
    pub(crate) fn control_later(&self, message: &HostMessage) {
        if let Ok(frame) = Frame::message(0, message) {
            self.send_later(frame);
        }
    }

    /// Sends a control message, unless the guest is behind with reading.
    pub(crate) fn control_now(&self, message: &HostMessage) {
        if let Ok(frame) = Frame::message(0, message) {
            let _ = self.out.try_send(frame);
        }
    }

    /// The same as [`Link::control_later`] for any frame.
    pub(crate) fn send_later(&self, frame: Frame) {
        let out = self.out.clone();
        tokio::task::spawn_local(async move { out.send(frame).await });
    }

    /// Sends a frame of a session once the guest takes it; none when the guest is gone.
    pub(crate) async fn send(&self, frame: Frame) -> Option<()> {
        self.out.send(frame).await.ok()
    }

    /// Waits until there is room for one more frame.
    pub(crate) async fn room(&self) -> Option<mpsc::Permit<'_, Frame>> {
        self.out.reserve().await.ok()
    }

    /// Opens a session.
    pub(crate) async fn open(&self, what: SessionKind) -> Result<Session, NotOpened> {
        let (frames, receive) = mpsc::unbounded_channel();
        let pending = Rc::<RefCell<usize>>::default();
        let id = {
            let mut sessions = self.sessions.borrow_mut();
            if sessions.open.len() >= SESSIONS_MAX {
                return Err(NotOpened::TooMany);
            }
            sessions.next = sessions.next.wrapping_add(1).max(1);
            let id = sessions.next;
            sessions.open.insert(id, Inbox { frames, pending: pending.clone() });
            id
        };
        let opened = Frame::message(0, &HostMessage::Open { session: id, what });
        // Dropped, it is no session any more.
        let session = Session { id, frames: receive, pending, link: self.clone() };
        self.out.send(opened.map_err(|_| NotOpened::TooLong)?).await.map_err(|_| NotOpened::Gone)?;
        Ok(session)
    }
}

/// The VMM makes its socket some milliseconds after it was started and tells nobody.
pub(crate) async fn connect(path: &Path) -> std::io::Result<UnixStream> {
    let deadline = tokio::time::Instant::now() + CONNECT_WAIT;
    loop {
        match UnixStream::connect(path).await {
            Ok(stream) => return Ok(stream),
            Err(error) if tokio::time::Instant::now() > deadline => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

async fn write_frames(write: OwnedWriteHalf, mut queue: mpsc::Receiver<Frame>) {
    let mut writer = FrameWriter::new(write);
    while let Some(frame) = queue.recv().await {
        if frame.session == 0 && writer.sync().await.is_err() {
            return;
        }
        if writer.write(&frame).await.is_err() {
            return;
        }
    }
}

async fn read_frames(
    mut read: OwnedReadHalf,
    sessions: Rc<RefCell<Sessions>>,
    tell: mpsc::Sender<GuestMessage>,
) {
    let mut decoder = Decoder::resyncing(GUEST_MESSAGE_LEN_MAX);
    let mut chunk = vec![0; DATA_LEN_MAX + HEADER_LEN];
    loop {
        match decoder.next_frame() {
            Ok(Some(frame)) if frame.session == 0 => {
                if let (Kind::Message, Ok(message)) = (frame.kind, frame.parse()) {
                    // Control messages are few; a guest that floods them waits for the supervisor.
                    let _ = tell.send(message).await;
                }
            }
            Ok(Some(frame)) => deliver(&sessions, frame),
            Ok(None) => match read.read(&mut chunk).await {
                Ok(0) | Err(_) => break,
                Ok(len) => decoder.push(&chunk[..len]),
            },
            Err(FrameError::Damaged | FrameError::UnknownKind { .. } | FrameError::TooLong { .. }) => {
                decoder.resync()
            }
            Err(_) => break,
        }
    }
    // Readers of sessions see the end.
    sessions.borrow_mut().open.clear();
}

/// What a waiting frame counts. Only data has a window of its own; of the rest a guest could send without end.
fn cost(frame: &Frame) -> usize {
    if frame.kind == Kind::Data { frame.payload.len().max(1) } else { frame.payload.len() + 64 }
}

fn deliver(sessions: &RefCell<Sessions>, frame: Frame) {
    let mut sessions = sessions.borrow_mut();
    let id = frame.session;
    let Some(inbox) = sessions.open.get(&id) else { return };
    let mut pending = inbox.pending.borrow_mut();
    *pending += cost(&frame);
    let broken = *pending > PENDING_MAX || inbox.frames.send(frame).is_err();
    drop(pending);
    if broken {
        sessions.open.remove(&id);
    }
}

#[cfg(test)]
mod fuzz;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn why_no_session_is_opened_is_told_apart() {
        let (out, mut queue) = mpsc::channel(SESSIONS_MAX + 1);
        let link = Link { out, sessions: Rc::default() };
        let mut open = Vec::new();
        for _ in 0..SESSIONS_MAX {
            open.push(link.open(SessionKind::Stats).await.unwrap());
        }
        let refused = async || link.open(SessionKind::Stats).await.map(|_| ()).unwrap_err().to_string();
        assert_eq!(refused().await, "too many sessions in this vm");
        open.clear();
        queue.close();
        assert_eq!(refused().await, "the vm has ended");
        assert_eq!(link.sessions.borrow().open.len(), 0);
    }
}
