//! The owner's ssh agent for a command in a guest (`-A`).
//!
//! ```text
//! guest's program ── channel ── Forwarding ── task of the connection ── $SSH_AUTH_SOCK
//! ```
//!
//! A guest may ask which keys there are and have things signed. What would change the agent, or have it load a library,
//! is not for a guest and is refused here; and the agent is told that whoever asks is not on this machine, so that one
//! that knows such limits keeps to those of its keys (OpenSSH's since 8.9).

use super::keys::PUBLIC_PREFIX;
use crate::stop::{failed, invalid};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::frame::{DATA_LEN_MAX, Frame, Kind};
use banger_wire::ssh_agent::{self, BadLength, PREFIX_LEN};
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// The variable that programs find an ssh agent by.
const VARIABLE: &str = "SSH_AUTH_SOCK";
/// How long an agent may take to accept a connection, which it does without asking anybody.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);
/// Frames of one connection that wait: a message's own, of which there is one at a time, and the end.
const WAITING_MAX: usize = ssh_agent::MESSAGE_LEN_MAX / DATA_LEN_MAX + 2;

/// Kinds of messages (draft-ietf-sshm-ssh-agent, section 6).
const FAILURE: u8 = 5;
const REQUEST_IDENTITIES: u8 = 11;
const SIGN_REQUEST: u8 = 13;
const EXTENSION: u8 = 27;
/// The extension by which a client says for whom it signs.
const BIND: &str = "session-bind@openssh.com";

/// Returns where the owner's agent is, once it was seen to be there.
///
/// # Errors
/// When there is none.
pub(crate) async fn find() -> Result<PathBuf, WireError> {
    let hint = "start one with `eval \"$(ssh-agent)\"`, give it a key with `ssh-add`, or leave `-A` out";
    let named = std::env::var_os(VARIABLE).filter(|path| !path.is_empty());
    let path = named.ok_or_else(|| {
        invalid(format!("there is no ssh agent to forward: `{VARIABLE}` is not set")).hinted(hint)
    })?;
    let shown = path.to_string_lossy().escape_debug().to_string();
    connect(&path).await.map_err(|error| {
        failed(format!("there is no ssh agent to forward at `{shown}`, which `{VARIABLE}` names"), &error)
            .hinted(hint)
    })?;
    Ok(path.into())
}

async fn connect(path: &OsStr) -> io::Result<UnixStream> {
    let connected = tokio::time::timeout(CONNECT_TIME_MAX, UnixStream::connect(path)).await;
    connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// The agent, for one session.
#[derive(Debug)]
pub(crate) struct Forwarding {
    agent: PathBuf,
    queue: mpsc::UnboundedSender<Frame>,
    connections: HashMap<u8, mpsc::Sender<Vec<u8>>>,
    tasks: JoinSet<()>,
}

impl Forwarding {
    /// Lets a session reach the agent at this path; answers go to the queue.
    pub(crate) fn new(agent: PathBuf, queue: mpsc::UnboundedSender<Frame>) -> Self {
        Self { agent, queue, connections: HashMap::new(), tasks: JoinSet::new() }
    }

    /// Takes a frame of the guest's for one of the [`CHANNELS`](ssh_agent::CHANNELS).
    ///
    /// # Errors
    /// When the guest sends more than it may.
    pub(crate) fn receive(&mut self, frame: Frame) -> Result<(), WireError> {
        while self.tasks.try_join_next().is_some() {}
        match frame.kind {
            Kind::Data => {
                let connection = self.connections.entry(frame.channel).or_insert_with(|| {
                    let (requests, queued) = mpsc::channel(WAITING_MAX);
                    let (agent, queue) = (self.agent.clone(), self.queue.clone());
                    self.tasks.spawn(serve(agent, frame.channel, queued, queue));
                    requests
                });
                connection.try_send(frame.payload).map_err(|_| {
                    WireError::new(ErrorCode::Failed, "the guest asks the ssh agent for more than it may")
                })
            }
            Kind::Eof => {
                self.connections.remove(&frame.channel);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// Serves one connection of a guest's until it has ended it.
async fn serve(
    agent: PathBuf,
    channel: u8,
    mut queued: mpsc::Receiver<Vec<u8>>,
    queue: mpsc::UnboundedSender<Frame>,
) {
    // A guest learns no more than that there is no answer.
    let _ = answer(agent, channel, &mut queued, &queue).await;
    let _ = queue.send(Frame::eof(0, channel));
    while queued.recv().await.is_some() {}
}

async fn answer(
    agent: PathBuf,
    channel: u8,
    queued: &mut mpsc::Receiver<Vec<u8>>,
    queue: &mpsc::UnboundedSender<Frame>,
) -> io::Result<()> {
    let mut stream = connect(agent.as_os_str()).await?;
    if let Some(bind) = bind() {
        // An agent that does not know this says so, and that is as good.
        ask(&mut stream, &bind).await?;
    }
    let mut received = Vec::new();
    while let Some(bytes) = queued.recv().await {
        received.extend(bytes);
        while let Some(len) = framed_len(&received)?.filter(|&len| len <= received.len()) {
            let rest = received.split_off(len);
            let request = std::mem::replace(&mut received, rest);
            let answer =
                if is_for_guests(&request) { ask(&mut stream, &request).await? } else { message(&[FAILURE]) };
            for piece in answer.chunks(DATA_LEN_MAX) {
                let _ = queue.send(Frame::data(0, channel, piece.to_vec()));
            }
        }
    }
    Ok(())
}

/// Sends a request, and returns the answer; both with their lengths.
async fn ask(stream: &mut UnixStream, request: &[u8]) -> io::Result<Vec<u8>> {
    stream.write_all(request).await?;
    let mut answer = vec![0; PREFIX_LEN];
    stream.read_exact(&mut answer).await?;
    let len = framed_len(&answer)?.unwrap_or(PREFIX_LEN);
    answer.resize(len, 0);
    stream.read_exact(&mut answer[PREFIX_LEN..]).await?;
    Ok(answer)
}

fn framed_len(bytes: &[u8]) -> io::Result<Option<usize>> {
    ssh_agent::framed_len(bytes).map_err(|error: BadLength| io::Error::other(error))
}

/// Returns true for what asks, as opposed to what changes something.
fn is_for_guests(request: &[u8]) -> bool {
    match &request[PREFIX_LEN..] {
        [REQUEST_IDENTITIES | SIGN_REQUEST, ..] => true,
        [EXTENSION, rest @ ..] => rest.starts_with(&string(BIND.as_bytes())),
        _ => false,
    }
}

/// Says for whom things will be signed: for another machine, which goes on to others. That machine is known by a key, and
/// a guest's is made anew here, so a key that is only for some machines is for none that a guest goes to. None without
/// random numbers.
fn bind() -> Option<Vec<u8>> {
    let mut random = [[0; 32]; 2];
    let source = SystemRandom::new();
    random.iter_mut().try_for_each(|bytes| source.fill(bytes)).ok()?;
    let [seed, session] = random;
    let key = Ed25519KeyPair::from_seed_unchecked(&seed).ok()?;
    let public = [PUBLIC_PREFIX, key.public_key().as_ref()].concat();
    let signature = [string(b"ssh-ed25519"), string(key.sign(&session).as_ref())].concat();
    let is_forwarding = vec![1];
    let fields =
        [string(BIND.as_bytes()), string(&public), string(&session), string(&signature), is_forwarding];
    Some(message(&[vec![EXTENSION], fields.concat()].concat()))
}

/// Bytes after their length, as a field.
fn string(bytes: &[u8]) -> Vec<u8> {
    message(bytes)
}

/// A message after its length; none here is of 4 GiB.
fn message(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes()[..], bytes].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_may_ask_and_change_nothing() {
        for kind in 0..=u8::MAX {
            let expected = matches!(kind, REQUEST_IDENTITIES | SIGN_REQUEST);
            assert_eq!(is_for_guests(&message(&[kind])), expected, "{kind}");
        }
        let extension = |name: &str| message(&[vec![EXTENSION], string(name.as_bytes())].concat());
        assert!(is_for_guests(&extension(BIND)));
        assert!(!is_for_guests(&extension("session-bind@openssh.co")));
        assert!(!is_for_guests(&extension("another@example")));
    }

    #[test]
    #[allow(clippy::disallowed_methods, reason = "the agent of OpenSSH is tried")]
    fn openssh_is_told_that_it_is_asked_from_afar() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let mut started = std::process::Command::new("ssh-agent");
        started.arg("-D").arg("-a").arg(&path).stdout(std::process::Stdio::null());
        started.stderr(std::process::Stdio::null());
        let Ok(mut agent) = started.spawn() else {
            println!("skipped: openssh_is_told_that_it_is_asked_from_afar: there is no `ssh-agent` here");
            return;
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let answers = runtime.block_on(async {
            let deadline = tokio::time::Instant::now() + CONNECT_TIME_MAX;
            let mut stream = loop {
                match connect(path.as_os_str()).await {
                    Err(_) if tokio::time::Instant::now() < deadline => tokio::task::yield_now().await,
                    connected => break connected.unwrap(),
                }
            };
            let mut wrong = bind().unwrap();
            *wrong.iter_mut().nth_back(1).unwrap() ^= 1;
            let wrong = ask(&mut stream, &wrong).await.unwrap();
            (wrong, ask(&mut stream, &bind().unwrap()).await.unwrap())
        });
        agent.kill().unwrap();
        agent.wait().unwrap();
        const SUCCESS: u8 = 6;
        const EXTENSION_FAILURE: u8 = 28;
        assert!([FAILURE, EXTENSION_FAILURE].contains(&answers.0[PREFIX_LEN]), "{answers:?}");
        if answers.1[PREFIX_LEN] != SUCCESS {
            println!(
                "skipped: openssh_is_told_that_it_is_asked_from_afar: this `ssh-agent` is older than 8.9"
            );
        }
    }
}
