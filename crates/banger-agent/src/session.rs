//! One command: its process, its streams, its end.
//!
//! Output is read only while the host has granted room for it, so a slow reader slows the program and nothing
//! piles up in the guest. Input is acknowledged once the program has taken it. `Exited` follows the last byte of
//! output; a process left in the background that keeps the pipes open is waited for only while it still writes.

use crate::beside;
use crate::command::{Defaults, Prepared, prepare};
use crate::export::ExportError;
use crate::forwarded::{self, Forwarded};
use crate::ssh;
use banger_sys::child;
use banger_wire::channel::{self, ChannelReader, ChannelWriter, Feed};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::{
    ExecSpec, ExitStatus, STDERR, STDIN, STDOUT, SessionControl, SessionEvent, TerminalSize, WINDOW,
};
use banger_wire::frame::{DATA_LEN_MAX, Frame, Kind};
use banger_wire::ssh::SshSpec;
use banger_wire::ssh_agent;
use rustix::process::{Pid, Signal};
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::Stdio;
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{Semaphore, mpsc};

use crate::port::Port;

/// Bytes that a terminal, whose buffer is no larger, has at once.
const TERMINAL_LEN: usize = 4096;
/// Room asked for a pipe, so that a program at full speed is switched to less often. Not granted is no harm.
const PIPE_LEN: usize = 256 * 1024;
/// After the program's end, output that a background process still holds open is waited for while it flows.
pub(crate) const DRAIN_IDLE: Duration = Duration::from_millis(100);
/// The end-of-file character, which is how a terminal's reader learns of the end of input.
pub(crate) const TTY_EOF: &[u8] = &[4];

/// One output stream: the host's grant and what the drain needs to know.
#[derive(Debug)]
struct Output {
    window: Semaphore,
    piece_len_max: usize,
    sent: Cell<u64>,
    waiting: Cell<bool>,
}

impl Output {
    fn new(piece_len_max: usize) -> Rc<Self> {
        Rc::new(Self {
            window: Semaphore::new(WINDOW as usize),
            piece_len_max,
            sent: Cell::new(0),
            waiting: Cell::new(false),
        })
    }

    /// Adds what the host granted; a grant beyond the window is a broken host and ignored.
    fn grant(&self, bytes: u32) {
        if self.window.available_permits() + bytes as usize <= WINDOW as usize {
            self.window.add_permits(bytes as usize);
        }
    }
}

/// Runs a command to its end, speaking as `session`. Frames of the session arrive on `inbox`; its closing means the
/// host has lost interest.
pub(crate) async fn run(
    session: u32,
    spec: ExecSpec,
    defaults: Defaults,
    mut inbox: mpsc::UnboundedReceiver<Frame>,
    out: mpsc::Sender<Frame>,
) {
    let event = match start(session, &spec, &defaults, &out) {
        Err(error) => SessionEvent::Failed(error),
        Ok((started, forwarded)) => {
            send_event(
                &out,
                session,
                &SessionEvent::Started { pid: started.pid.as_raw_nonzero().get().unsigned_abs() },
            )
            .await;
            match follow(session, started, forwarded, &mut inbox, &out).await {
                Some(event) => event,
                None => return,
            }
        }
    };
    send_event(&out, session, &event).await;
    let _ = out.send(Frame::close(session)).await;
}

/// Serves one ssh connection in a process of its own; see [`ssh`].
pub(crate) async fn serve_ssh(
    session: u32,
    spec: SshSpec,
    defaults: Defaults,
    mut inbox: mpsc::UnboundedReceiver<Frame>,
    out: mpsc::Sender<Frame>,
) {
    let start = ssh::Start::new(spec, &defaults);
    let event = match start_ssh(&start).await {
        Ok(started) => match follow(session, started, None, &mut inbox, &out).await {
            Some(event) => event,
            None => return,
        },
        Err(error) => SessionEvent::Failed(WireError {
            causes: vec![error.to_string()],
            ..WireError::new(ErrorCode::Failed, "could not start ssh in the guest")
        }),
    };
    send_event(&out, session, &event).await;
    let _ = out.send(Frame::close(session)).await;
}

async fn start_ssh(start: &ssh::Start) -> std::io::Result<Started> {
    let mut command = child::command("/proc/self/exe".as_ref());
    command.arg0(ssh::NAME).arg(ssh::ARGUMENT).current_dir("/").env_clear();
    let identity = child::Identity { uid: 0, gid: 0, groups: vec![0] };
    let mut started = start_on_pipes(command, identity)?;
    started.stdin.write_all(&start.encode()?).await?;
    Ok(started)
}

/// Sends what `walk` writes as a layer; see [`export`](crate::export). None is a program that is in no vm.
pub(crate) async fn export<W>(
    session: u32,
    walk: Option<W>,
    mut inbox: mpsc::UnboundedReceiver<Frame>,
    out: mpsc::Sender<Frame>,
) where
    W: FnOnce(std::fs::File) -> Result<(), ExportError> + Send + 'static,
{
    let failed = |message: String, causes: Vec<String>| {
        SessionEvent::Failed(WireError { causes, ..WireError::new(ErrorCode::Failed, message) })
    };
    let event = match walk {
        None => failed("there is no vm here that could be exported".to_owned(), Vec::new()),
        Some(walk) => match pump_layer(session, walk, &mut inbox, &out).await {
            Ok(Some(Ok(()))) => SessionEvent::Exited(ExitStatus::Code(0)),
            Ok(Some(Err(ExportError { path, source }))) => {
                let path = path.display().to_string();
                failed(format!("could not export `{}`", path.escape_debug()), vec![source.to_string()])
            }
            Ok(None) => return,
            Err(error) => failed("could not export the vm".to_owned(), vec![error.to_string()]),
        },
    };
    send_event(&out, session, &event).await;
    let _ = out.send(Frame::close(session)).await;
}

/// Reads the layer on a thread of its own, since files block, and passes it on at the host's pace. None when the
/// host closed the session: the pipe's closed end then ends the thread.
async fn pump_layer<W>(
    session: u32,
    walk: W,
    inbox: &mut mpsc::UnboundedReceiver<Frame>,
    out: &mpsc::Sender<Frame>,
) -> std::io::Result<Option<Result<(), ExportError>>>
where
    W: FnOnce(std::fs::File) -> Result<(), ExportError> + Send + 'static,
{
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let _ = rustix::pipe::fcntl_setpipe_size(&reader, PIPE_LEN);
    let reader = tokio::net::unix::pipe::Receiver::from_owned_fd(reader)?;
    let walk = beside::start(move || walk(std::fs::File::from(writer)))?;
    let output = Output::new(DATA_LEN_MAX);
    let pump = pump_output(session, STDOUT, Box::new(reader), Rc::clone(&output), out.clone());
    tokio::pin!(pump);
    loop {
        tokio::select! {
            () = &mut pump => break,
            frame = inbox.recv() => match frame {
                Some(frame) if frame.kind == Kind::Credit && frame.channel == STDOUT => {
                    if let Ok(bytes) = frame.parse_credit() {
                        output.grant(bytes);
                    }
                }
                Some(frame) if frame.kind != Kind::Close => {}
                _ => return Ok(None),
            },
        }
    }
    Ok(Some(walk.await.map_err(std::io::Error::other)?))
}

/// Runs `work` on a thread of its own with the session's stdin and stdout, and says how it ended.
pub(crate) async fn exchange_items(
    session: u32,
    what: &'static str,
    work: impl FnOnce(ChannelReader, ChannelWriter) -> std::io::Result<()> + Send + 'static,
    mut inbox: mpsc::UnboundedReceiver<Frame>,
    out: mpsc::Sender<Frame>,
) {
    let (input, feed) = channel::reader();
    let (output, pieces) = channel::writer();
    let done = match beside::start(move || work(input, output)) {
        Ok(work) => {
            // Dropping the streams' other ends makes the work end, too.
            if carry(session, feed, pieces, &mut inbox, &out).await.is_none() {
                return;
            }
            work.await.map_err(std::io::Error::other).flatten()
        }
        Err(error) => Err(error),
    };
    let event = match done {
        Ok(()) => SessionEvent::Exited(ExitStatus::Code(0)),
        Err(error) => {
            let message = format!("could not {what} in the guest");
            SessionEvent::Failed(WireError {
                causes: vec![error.to_string()],
                ..WireError::new(ErrorCode::Failed, message)
            })
        }
    };
    send_event(&out, session, &event).await;
    let _ = out.send(Frame::close(session)).await;
}

/// Carries bytes between the host and a thread until the thread writes no more. None when the host closed the session.
async fn carry(
    session: u32,
    feed: Feed,
    mut pieces: mpsc::Receiver<Vec<u8>>,
    inbox: &mut mpsc::UnboundedReceiver<Frame>,
    out: &mpsc::Sender<Frame>,
) -> Option<()> {
    let Feed { pieces: input, mut read } = feed;
    let mut input = Some(input);
    let mut window = WINDOW as usize;
    loop {
        tokio::select! {
            // No piece is longer than this.
            piece = pieces.recv(), if window >= DATA_LEN_MAX => {
                let Some(piece) = piece else { return Some(()) };
                window -= piece.len();
                out.send(Frame::data(session, STDOUT, piece)).await.ok()?;
            }
            Some(len) = read.recv() => {
                let len = u32::try_from(len).unwrap_or(u32::MAX);
                out.send(Frame::credit(session, STDIN, len)).await.ok()?;
            }
            frame = inbox.recv() => match frame {
                Some(frame) => match (frame.kind, frame.channel) {
                    (Kind::Close, _) => return None,
                    (Kind::Data, STDIN) => {
                        if let Some(input) = &input {
                            let _ = input.send(frame.payload);
                        }
                    }
                    (Kind::Eof, STDIN) => input = None,
                    (Kind::Credit, STDOUT) => {
                        let granted = frame.parse_credit().unwrap_or(0);
                        window = window.saturating_add(granted as usize).min(WINDOW as usize);
                    }
                    _ => {}
                },
                None => return None,
            },
        }
    }
}

async fn send_event(out: &mpsc::Sender<Frame>, session: u32, event: &SessionEvent) {
    if let Ok(frame) = Frame::message(session, event) {
        let _ = out.send(frame).await;
    }
}

pub(crate) type Reader = Box<dyn AsyncRead + Unpin>;
pub(crate) type Writer = Box<dyn AsyncWrite + Unpin>;

/// A program that runs, and its streams.
pub(crate) struct Started {
    pub(crate) child: tokio::process::Child,
    pub(crate) pid: Pid,
    pub(crate) stdin: Writer,
    pub(crate) outputs: Vec<(u8, Reader)>,
    pub(crate) terminal: Option<OwnedFd>,
}

/// Starts a command, with the way to the client's ssh agent that it was to have.
fn start(
    session: u32,
    spec: &ExecSpec,
    defaults: &Defaults,
    out: &mpsc::Sender<Frame>,
) -> Result<(Started, Option<Forwarded>), WireError> {
    let mut prepared = prepare(spec, defaults)?;
    let forwarded = spec.forward_agent.then(|| Forwarded::listen(session, &prepared.identity, out.clone()));
    let forwarded = forwarded.transpose().map_err(|error| WireError {
        causes: vec![error.to_string()],
        ..WireError::new(ErrorCode::Failed, "could not make a socket for the ssh agent in the guest")
    })?;
    if let Some(forwarded) = &forwarded {
        prepared.command.env(forwarded::VARIABLE, forwarded.path());
    }
    Ok((start_prepared(prepared, spec.tty)?, forwarded))
}

/// Starts a command, on a terminal of this size or on pipes.
///
/// # Errors
/// With the code a client turns into 125, 126 or 127.
pub(crate) fn start_prepared(prepared: Prepared, tty: Option<TerminalSize>) -> Result<Started, WireError> {
    let Prepared { command, identity } = prepared;
    let program = command.get_program().to_string_lossy().into_owned();
    let started = match tty {
        Some(size) => start_on_terminal(command, identity, size),
        None => start_on_pipes(command, identity),
    };
    started.map_err(|error| {
        let code = match error.kind() {
            std::io::ErrorKind::NotFound => ErrorCode::CommandNotFound,
            std::io::ErrorKind::PermissionDenied => ErrorCode::CommandNotExecutable,
            _ if error.raw_os_error() == Some(8) => ErrorCode::CommandNotExecutable,
            _ => ErrorCode::Failed,
        };
        let mut failed =
            WireError::new(code, format!("could not start `{}` in the guest", program.escape_debug()));
        failed.causes.push(error.to_string());
        failed
    })
}

/// Runs in the child between fork and exec would be too late to see errors by name, so the agent's own protection
/// from the out-of-memory killer is undone by the parent.
fn adjust(pid: Pid) {
    let _ = std::fs::write(format!("/proc/{}/oom_score_adj", pid.as_raw_nonzero()), "0");
}

/// Starts a command with none of the agent's own protection.
pub(crate) fn spawned(command: std::process::Command) -> std::io::Result<(tokio::process::Child, Pid)> {
    let mut command = tokio::process::Command::from(command);
    let child = command.spawn()?;
    let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
    let pid = pid.ok_or_else(|| std::io::Error::other("the program ended at once"))?;
    adjust(pid);
    Ok((child, pid))
}

fn start_on_pipes(mut command: std::process::Command, identity: child::Identity) -> std::io::Result<Started> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    child::new_session(&mut command, changed(identity), None);
    let (mut child, pid) = spawned(command)?;
    let missing = || std::io::Error::other("a pipe is missing");
    let stdin = child.stdin.take().ok_or_else(missing)?;
    let stdout = child.stdout.take().ok_or_else(missing)?;
    let stderr = child.stderr.take().ok_or_else(missing)?;
    let _ = rustix::pipe::fcntl_setpipe_size(&stdin, PIPE_LEN);
    let _ = rustix::pipe::fcntl_setpipe_size(&stdout, PIPE_LEN);
    Ok(Started {
        child,
        pid,
        stdin: Box::new(stdin),
        outputs: vec![(STDOUT, Box::new(stdout)), (STDERR, Box::new(stderr))],
        terminal: None,
    })
}

fn start_on_terminal(
    mut command: std::process::Command,
    identity: child::Identity,
    size: TerminalSize,
) -> std::io::Result<Started> {
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    set_size(&master, size);
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    if let Some(identity) = changed(identity.clone()) {
        let uid = rustix::fs::Uid::from_raw(identity.uid);
        rustix::fs::fchown(&slave, Some(uid), None)?;
    }
    command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave.try_clone()?);
    child::new_session(&mut command, changed(identity), Some(slave));
    let (child, pid) = spawned(command)?;
    let port = Port::new(master.try_clone()?, true)?;
    Ok(Started {
        child,
        pid,
        stdin: Box::new(port.clone()),
        outputs: vec![(STDOUT, Box::new(port))],
        terminal: Some(master),
    })
}

/// Only a privileged agent may change identity; unprivileged (in tests) it runs commands as itself.
fn changed(identity: child::Identity) -> Option<child::Identity> {
    rustix::process::geteuid().is_root().then_some(identity)
}

pub(crate) fn set_size(terminal: &OwnedFd, size: TerminalSize) {
    let size = rustix::termios::Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    let _ = rustix::termios::tcsetwinsize(terminal, size);
}

/// Follows the command to its end. None when the host closed the session: nobody wants to hear of it then.
async fn follow(
    session: u32,
    mut started: Started,
    forwarded: Option<Forwarded>,
    inbox: &mut mpsc::UnboundedReceiver<Frame>,
    out: &mpsc::Sender<Frame>,
) -> Option<SessionEvent> {
    let piece_len_max = if started.terminal.is_some() { TERMINAL_LEN } else { DATA_LEN_MAX };
    let outputs = [Output::new(piece_len_max), Output::new(piece_len_max)];
    let mut pumps = tokio::task::JoinSet::new();
    for (channel, reader) in std::mem::take(&mut started.outputs) {
        let output = Rc::clone(&outputs[usize::from(channel - STDOUT)]);
        pumps.spawn_local(pump_output(session, channel, reader, output, out.clone()));
    }
    let (input, input_queue) = mpsc::unbounded_channel();
    let tty = started.terminal.is_some();
    let feeder = tokio::task::spawn_local(feed_input(session, started.stdin, input_queue, out.clone(), tty));
    let mut input = Some(input);
    let status = loop {
        tokio::select! {
            status = started.child.wait() => break status,
            frame = inbox.recv() => match frame {
                Some(frame) if frame.kind != Kind::Close && ssh_agent::CHANNELS.contains(&frame.channel) => {
                    if let Some(forwarded) = &forwarded {
                        forwarded.receive(frame);
                    }
                }
                Some(frame) if frame.kind != Kind::Close => {
                    receive(frame, &mut input, &outputs, started.pid, started.terminal.as_ref());
                }
                _ => {
                    end_group(&mut started.child, started.pid).await;
                    feeder.abort();
                    return None;
                }
            },
        }
    };
    feeder.abort();
    drop(forwarded);
    drain(&mut pumps, &outputs, inbox).await?;
    Some(match status {
        Ok(status) => SessionEvent::Exited(exit_status(status)),
        Err(error) => {
            SessionEvent::Failed(WireError::new(ErrorCode::Failed, format!("wait for the command: {error}")))
        }
    })
}

pub(crate) fn exit_status(status: std::process::ExitStatus) -> ExitStatus {
    match (status.code(), status.signal()) {
        (Some(code), _) => ExitStatus::Code(u8::try_from(code & 0xff).unwrap_or(u8::MAX)),
        (None, Some(signal)) => ExitStatus::Signal(signal),
        (None, None) => ExitStatus::Code(u8::MAX),
    }
}

fn receive(
    frame: Frame,
    input: &mut Option<mpsc::UnboundedSender<Vec<u8>>>,
    outputs: &[Rc<Output>; 2],
    pid: Pid,
    terminal: Option<&OwnedFd>,
) {
    match (frame.kind, frame.channel) {
        (Kind::Data, STDIN) => {
            if let Some(input) = input {
                let _ = input.send(frame.payload);
            }
        }
        (Kind::Eof, STDIN) => *input = None,
        (Kind::Credit, channel @ (STDOUT | STDERR)) => {
            if let Ok(bytes) = frame.parse_credit() {
                outputs[usize::from(channel - STDOUT)].grant(bytes);
            }
        }
        (Kind::Message, _) => match frame.parse() {
            Ok(SessionControl::Resize(size)) => {
                if let Some(terminal) = terminal {
                    set_size(terminal, size);
                }
            }
            Ok(SessionControl::Signal(number)) => {
                if let Some(signal) = Signal::from_named_raw(number) {
                    let _ = rustix::process::kill_process_group(pid, signal);
                }
            }
            Err(_) => {}
        },
        _ => {}
    }
}

/// The client is gone: hang up as a terminal would, then make sure.
async fn end_group(child: &mut tokio::process::Child, pid: Pid) {
    let _ = rustix::process::kill_process_group(pid, Signal::HUP);
    let _ = rustix::process::kill_process_group(pid, Signal::CONT);
    let patience = Duration::from_secs(2);
    if tokio::time::timeout(patience, child.wait()).await.is_err() {
        let _ = rustix::process::kill_process_group(pid, Signal::KILL);
        let _ = child.wait().await;
    }
}

/// Waits until all output was sent. None when the host closed the session meanwhile.
async fn drain(
    pumps: &mut tokio::task::JoinSet<()>,
    outputs: &[Rc<Output>; 2],
    inbox: &mut mpsc::UnboundedReceiver<Frame>,
) -> Option<()> {
    let progress = || outputs.iter().map(|output| output.sent.get()).sum::<u64>();
    let mut before = progress();
    let mut idle = tokio::time::interval_at(tokio::time::Instant::now() + DRAIN_IDLE, DRAIN_IDLE);
    loop {
        tokio::select! {
            ended = pumps.join_next() => if ended.is_none() { return Some(()) },
            frame = inbox.recv() => match frame {
                Some(frame) if frame.kind == Kind::Credit && frame.channel >= STDOUT && frame.channel <= STDERR => {
                    if let Ok(bytes) = frame.parse_credit() {
                        outputs[usize::from(frame.channel - STDOUT)].grant(bytes);
                    }
                }
                Some(frame) if frame.kind != Kind::Close => {}
                _ => return None,
            },
            _ = idle.tick() => {
                let now = progress();
                if now == before && !outputs.iter().any(|output| output.waiting.get()) {
                    pumps.abort_all();
                }
                before = now;
            }
        }
    }
}

/// Reads at most `room` bytes into memory of their own, which then goes on as it is; empty at the end.
pub(crate) async fn read_piece(
    reader: &mut (impl AsyncRead + Unpin),
    room: usize,
) -> std::io::Result<Vec<u8>> {
    let mut piece = Vec::with_capacity(room);
    reader.take(room as u64).read_buf(&mut piece).await?;
    // What waits to be sent holds no more memory than its window is for.
    if piece.len() < room / 2 {
        piece.shrink_to_fit();
    }
    Ok(piece)
}

async fn pump_output(
    session: u32,
    channel: u8,
    mut reader: Reader,
    output: Rc<Output>,
    out: mpsc::Sender<Frame>,
) {
    loop {
        output.waiting.set(true);
        if let Ok(permit) = output.window.acquire().await {
            drop(permit);
        }
        output.waiting.set(false);
        let room = output.window.available_permits().min(output.piece_len_max);
        // A terminal whose last process has gone reads as EIO: its end of file.
        let Ok(piece) = read_piece(&mut reader, room).await else { break };
        let len = piece.len();
        if len == 0 {
            break;
        }
        output.window.forget_permits(len);
        output.waiting.set(true);
        if out.send(Frame::data(session, channel, piece)).await.is_err() {
            break;
        }
        output.waiting.set(false);
        output.sent.set(output.sent.get() + len as u64);
    }
    let _ = out.send(Frame::eof(session, channel)).await;
}

async fn feed_input(
    session: u32,
    mut stdin: Writer,
    mut queue: mpsc::UnboundedReceiver<Vec<u8>>,
    out: mpsc::Sender<Frame>,
    tty: bool,
) {
    let mut broken = false;
    while let Some(bytes) = queue.recv().await {
        // A program that closed its input is no error; what it does not want is acknowledged and dropped.
        broken = broken || stdin.write_all(&bytes).await.is_err();
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        if out.send(Frame::credit(session, STDIN, len)).await.is_err() {
            return;
        }
    }
    if tty {
        let _ = stdin.write_all(TTY_EOF).await;
        // Dropping a clone of the terminal closes nothing; the reader's half lives on.
    }
}
