//! An ssh server, so that every image has one: a process for each connection, with the connection as its standard
//! input and output.
//!
//! The agent starts it for a session of the host's. What it has to know comes first on its input and is kept nowhere:
//! its host key, the key it lets in, the image's environment. Whoever is in is one user of the image, and from then on
//! so is this process; what speaks to a client without a key can do no more than end.
//!
//! ```text
//! stdin ─> Transport ─> Door, then Connection ─> channels: Session, Forward
//! stdout <─ Transport <─────────────── events <────┘
//! ```
//!
//! Written here and not taken from a library: the one for Rust (`russh`, 0.65.1) grants a channel more room when bytes
//! arrive, not when they were passed on, so that one program that does not read stops every channel, and itself, if it
//! waits to write. What is hard about ssh, the choice among algorithms, is not needed; see [`transport`].

mod auth;
mod connection;
mod fields;
mod forward;
#[cfg(test)]
mod fuzz;
mod session;
mod sftp;
mod stream;
mod terminal;
mod transport;

pub(crate) use sftp::serve as serve_sftp;

use crate::command::Defaults;
use crate::users::User;
use auth::{Door, Outcome};
use banger_wire::bytes::ByteString;
use banger_wire::ssh::SshSpec;
use connection::Connection;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;
use stream::Event;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Instant;
use transport::{Broken, Transport};

/// The process's `argv[0]`, and the argument that makes it one.
pub(crate) const NAME: &str = "banger-ssh";
pub(crate) const ARGUMENT: &str = "ssh";
/// The same of the file server.
pub(crate) const SFTP_NAME: &str = "banger-sftp";
pub(crate) const SFTP_ARGUMENT: &str = "sftp";

/// Longest description of a start; the environment of an image is in it.
const START_LEN_MAX: u32 = 1024 * 1024;
/// Bytes read at once.
const CHUNK_LEN: usize = 64 * 1024;
/// Bytes that wait to be written; beyond, nothing more is read, so that nobody can have answers without taking them.
const OUTPUT_LEN_MAX: usize = 256 * 1024;
/// How long somebody may take to come in: a passphrase has to be typed meanwhile.
const DOOR_TIME_MAX: Duration = Duration::from_secs(300);
/// What channels want to send and waits for that. Their windows bound how much they have.
const EVENTS: usize = 16;

/// What the process has to know: first on its input, after its length as four bytes.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Start {
    spec: SshSpec,
    env: Vec<(ByteString, ByteString)>,
}

impl Start {
    pub(crate) fn new(spec: SshSpec, defaults: &Defaults) -> Self {
        Self { spec, env: defaults.env.clone() }
    }

    /// Returns what is to be written first.
    pub(crate) fn encode(&self) -> io::Result<Vec<u8>> {
        let json = serde_json::to_vec(self)?;
        let len = u32::try_from(json.len()).ok().filter(|&len| len <= START_LEN_MAX);
        let len = len.ok_or_else(|| io::Error::other("the image's environment is too large for ssh"))?;
        Ok([&len.to_be_bytes()[..], &json].concat())
    }
}

/// Serves the connection on the standard streams to its end.
pub(crate) fn serve() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = tokio::task::LocalSet::new().block_on(&runtime, run(Path::new("/")));
    // A read or a write of somebody's that is still under way is not waited for.
    runtime.shutdown_background();
    ended
}

async fn run(root: &Path) -> io::Result<()> {
    let mut input = pipe::Receiver::from_owned_fd(own(0)?)?;
    let mut output = pipe::Sender::from_owned_fd(own(1)?)?;
    let len = input.read_u32().await?;
    if len > START_LEN_MAX {
        return Err(io::Error::other("what ssh is to be started with is too long"));
    }
    let mut start = vec![0; len as usize];
    input.read_exact(&mut start).await?;
    let start: Start = serde_json::from_slice(&start)?;
    let transport = Transport::new(&start.spec.host_key.0);
    let transport = transport.ok_or_else(|| io::Error::other("the host key is none"))?;
    let (events, told) = mpsc::channel(EVENTS);
    let door = Door::new(start.spec.client_key.0);
    let defaults = Defaults { env: start.env, ..Defaults::default() };
    let mut server = Server { transport, stage: Stage::Door(door, defaults), events, root };
    let ended = server.exchange((&mut input, &mut output), told, DOOR_TIME_MAX).await;
    if let Stage::In(connection) = &mut server.stage {
        connection.end();
    }
    match ended {
        // A client that ends in the middle is nothing for the agent to tell.
        Ok(()) | Err(Broken::Left) => Ok(()),
        Err(broken) => Err(io::Error::other(format!("ssh: {broken}"))),
    }
}

/// A pipe of the process's own, without waiting.
fn own(number: u8) -> io::Result<OwnedFd> {
    let fd = match number {
        0 => rustix::io::dup(rustix::stdio::stdin())?,
        _ => rustix::io::dup(rustix::stdio::stdout())?,
    };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    rustix::fs::fcntl_setfl(&fd, rustix::fs::fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
    Ok(fd)
}

enum Stage {
    Door(Door, Defaults),
    In(Box<Connection>),
}

struct Server<'a> {
    transport: Transport,
    stage: Stage,
    events: stream::Events,
    root: &'a Path,
}

impl Server<'_> {
    /// Reads, answers and writes until the connection ends; `patience` is for who is not in yet.
    async fn exchange(
        &mut self,
        (input, output): (&mut pipe::Receiver, &mut pipe::Sender),
        mut told: mpsc::Receiver<Event>,
        patience: Duration,
    ) -> Result<(), Broken> {
        let lost = |_| Broken::Left;
        let mut ended = signal(SignalKind::hangup()).map_err(lost)?;
        let mut chunk = vec![0; CHUNK_LEN];
        let deadline = Instant::now() + patience;
        loop {
            let waiting = self.transport.output().len();
            let may_send = waiting < OUTPUT_LEN_MAX && !self.transport.is_exchanging();
            tokio::select! {
                written = output.write(self.transport.output()), if waiting > 0 => {
                    let written = written.map_err(lost)?;
                    self.transport.output().drain(..written);
                }
                read = input.read(&mut chunk), if waiting < OUTPUT_LEN_MAX => {
                    let read = read.map_err(lost)?;
                    if read == 0 {
                        return Ok(());
                    }
                    self.transport.push(&chunk[..read]);
                    while let Some(packet) = self.transport.next()? {
                        self.answer(&packet)?;
                    }
                }
                event = told.recv(), if may_send => if let (Some(event), Stage::In(connection)) = (event, &mut self.stage) {
                    connection.tell(event, &mut self.transport);
                    self.transport.check_keys()?;
                },
                _ = ended.recv() => return Ok(()),
                () = tokio::time::sleep_until(deadline), if matches!(self.stage, Stage::Door(..)) => {
                    return Err(Broken::Protocol("nobody came in"));
                }
            }
        }
    }

    fn answer(&mut self, packet: &[u8]) -> Result<(), Broken> {
        let (door, defaults) = match &mut self.stage {
            Stage::In(connection) => return connection.answer(packet, &mut self.transport),
            Stage::Door(door, defaults) => (door, defaults),
        };
        let id =
            self.transport.session_id().ok_or(Broken::Protocol("a packet before the exchange of keys"))?;
        match door.answer(packet, &id, self.root) {
            None => Err(Broken::Protocol("a packet that nobody may send who is not in")),
            Some(Outcome::Answer(packets)) => {
                packets.iter().for_each(|packet| self.transport.send(packet));
                Ok(())
            }
            Some(Outcome::In(user, packet)) => {
                become_user(&user)
                    .map_err(|_| Broken::Protocol("the process could not become the user's"))?;
                self.transport.send(&packet);
                let connection = Connection::new(*user, std::mem::take(defaults), self.events.clone());
                self.stage = Stage::In(Box::new(connection));
                Ok(())
            }
        }
    }
}

/// Gives up every right the user has not. Without any to give up (in tests) everybody stays who they are.
fn become_user(user: &User) -> io::Result<()> {
    if rustix::process::geteuid().is_root() {
        banger_sys::child::become_identity(&user.identity)?;
    }
    let home = Path::new(&user.home);
    std::env::set_current_dir(home).or_else(|_| std::env::set_current_dir("/"))
}
