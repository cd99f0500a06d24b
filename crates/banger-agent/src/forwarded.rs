//! The owner's ssh agent in the guest: a socket for one command's user, there as long as the command runs.
//!
//! ```text
//! program ── socket ── a connection, a channel of the session ── host ── the owner's ssh agent
//! ```
//!
//! Messages are passed on whole and not understood; see [`ssh_agent`].

use banger_sys::child::Identity;
use banger_wire::frame::{DATA_LEN_MAX, Frame, Kind};
use banger_wire::ssh_agent::{self, CHANNELS, PREFIX_LEN};
use rustix::fs::{Gid, Mode, Uid};
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, mpsc};
use tokio::task::{AbortHandle, JoinSet};

/// The variable that programs find an ssh agent by.
pub(crate) const VARIABLE: &str = "SSH_AUTH_SOCK";
/// Where the socket's directory is made: a guest's `/run` is its memory, and only root makes anything there. An agent that
/// is not in a guest is told another place by this variable.
const PLACE: &str = "/run";
const PLACE_VARIABLE: &str = "XDG_RUNTIME_DIR";
/// The wait after a connection could not be taken, for want of descriptors for example.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// A socket that leads to the owner's ssh agent; not any more once this is dropped.
#[derive(Debug)]
pub(crate) struct Forwarded {
    dir: PathBuf,
    accepting: Option<AbortHandle>,
    shared: Rc<Shared>,
}

#[derive(Debug)]
struct Shared {
    session: u32,
    out: mpsc::Sender<Frame>,
    /// What the host says to each connection.
    answers: RefCell<HashMap<u8, mpsc::UnboundedSender<Frame>>>,
    /// Held by the connection whose request is under way.
    turn: Mutex<()>,
}

impl Forwarded {
    /// Listens for programs of this user.
    ///
    /// # Errors
    /// When no socket can be made.
    pub(crate) fn listen(session: u32, user: &Identity, out: mpsc::Sender<Frame>) -> io::Result<Self> {
        let answers = RefCell::default();
        let shared = Rc::new(Shared { session, out, answers, turn: Mutex::new(()) });
        let mut forwarded = Self { dir: make_dir()?, accepting: None, shared };
        let path = forwarded.path();
        let listener = UnixListener::bind(&path)?;
        rustix::fs::chmod(&path, Mode::RUSR | Mode::WUSR)?;
        if rustix::process::geteuid().is_root() {
            rustix::fs::chown(&path, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)))?;
        }
        // The directory stays the agent's, so that nobody puts anything else in the socket's place.
        rustix::fs::chmod(&forwarded.dir, Mode::RWXU | Mode::XGRP | Mode::XOTH)?;
        let accepting = tokio::task::spawn_local(accept(listener, Rc::clone(&forwarded.shared)));
        forwarded.accepting = Some(accepting.abort_handle());
        Ok(forwarded)
    }

    /// Returns where the socket is.
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.join("agent")
    }

    /// Takes a frame of the host's for one of the [`CHANNELS`].
    pub(crate) fn receive(&self, frame: Frame) {
        if let Some(connection) = self.shared.answers.borrow().get(&frame.channel) {
            let _ = connection.send(frame);
        }
    }
}

impl Drop for Forwarded {
    fn drop(&mut self) {
        // With it go its connections.
        self.accepting.iter().for_each(AbortHandle::abort);
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Makes a directory that is nobody else's yet.
fn make_dir() -> io::Result<PathBuf> {
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let name = format!("banger-agent-{:016x}", u64::from_ne_bytes(random));
    let place = std::env::var_os(PLACE_VARIABLE).map_or_else(|| PathBuf::from(PLACE), PathBuf::from);
    let dir = place.join(name);
    DirBuilder::new().mode(0o700).create(&dir)?;
    Ok(dir)
}

/// Takes as many connections as there are channels; more wait until one has ended.
async fn accept(listener: UnixListener, shared: Rc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        let free = CHANNELS.clone().find(|channel| !shared.answers.borrow().contains_key(channel));
        tokio::select! {
            accepted = listener.accept(), if free.is_some() => {
                let (Ok((stream, _)), Some(channel)) = (accepted, free) else {
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                    continue;
                };
                let (answers, told) = mpsc::unbounded_channel();
                shared.answers.borrow_mut().insert(channel, answers);
                connections.spawn_local(serve(stream, channel, told, Rc::clone(&shared)));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Serves one connection to its end, and gives its channel back.
async fn serve(
    mut stream: UnixStream,
    channel: u8,
    mut told: mpsc::UnboundedReceiver<Frame>,
    shared: Rc<Shared>,
) {
    let mut progress = Progress::default();
    exchange(&mut stream, channel, &mut told, &shared, &mut progress).await;
    drop(stream);
    if progress.is_known && shared.out.send(Frame::eof(shared.session, channel)).await.is_ok() {
        // What the host still has to say was for the one that has gone.
        while !progress.is_ended {
            progress.is_ended = told.recv().await.is_none_or(|frame| frame.kind == Kind::Eof);
        }
    }
    shared.answers.borrow_mut().remove(&channel);
}

/// What the host knows of a connection.
#[derive(Debug, Default)]
struct Progress {
    /// It has heard of it.
    is_known: bool,
    /// It has ended it.
    is_ended: bool,
}

/// Passes requests on and answers back until either side has no more. None when it has.
async fn exchange(
    stream: &mut UnixStream,
    channel: u8,
    told: &mut mpsc::UnboundedReceiver<Frame>,
    shared: &Shared,
    progress: &mut Progress,
) -> Option<()> {
    loop {
        let request = read_message(stream).await?;
        let answer = {
            let _turn = shared.turn.lock().await;
            progress.is_known = true;
            for piece in request.chunks(DATA_LEN_MAX) {
                shared.out.send(Frame::data(shared.session, channel, piece.to_vec())).await.ok()?;
            }
            take_answer(told, progress).await?
        };
        stream.write_all(&answer).await.ok()?;
    }
}

/// Reads a message with its prefix; none at the end, and where it is none.
async fn read_message(stream: &mut UnixStream) -> Option<Vec<u8>> {
    let mut message = vec![0; PREFIX_LEN];
    stream.read_exact(&mut message).await.ok()?;
    let len = ssh_agent::framed_len(&message).ok()??;
    message.resize(len, 0);
    stream.read_exact(&mut message[PREFIX_LEN..]).await.ok()?;
    Some(message)
}

async fn take_answer(told: &mut mpsc::UnboundedReceiver<Frame>, progress: &mut Progress) -> Option<Vec<u8>> {
    let mut answer = Vec::new();
    loop {
        let frame = told.recv().await?;
        match frame.kind {
            Kind::Data => answer.extend(frame.payload),
            Kind::Eof => {
                progress.is_ended = true;
                return None;
            }
            _ => {}
        }
        if ssh_agent::framed_len(&answer).ok()?.is_some_and(|len| answer.len() >= len) {
            return Some(answer);
        }
    }
}
