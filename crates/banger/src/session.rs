//! A command in the guest, with this process's streams as its own.
//!
//! ```text
//! stdin thread ─> chunks ─┐                      ┌─> stdout thread ─┐
//! signals, resize ────────┼─> queue ─> socket    │   stderr thread ─┼─> written ─> credit
//! timeout ────────────────┘           socket ────┘                  │
//! ```
//!
//! One loop owns the state and never waits for a write: frames go through a queue that the windows bound.

use crate::client::connect;
use crate::signals::Signals;
use crate::ssh::agent::{self, Forwarding};
use crate::stop::{Ended, Stop, failed};
use crate::streams::{self, Outputs, Written};
use crate::terminal::{self, RawMode};
use banger_wire::BUILD;
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::{ExecSpec, STDIN, SessionControl, SessionEvent, WINDOW};
use banger_wire::frame::{DATA_LEN_MAX, Frame, Kind, MESSAGE_LEN_MAX};
use banger_wire::guest::SessionKind;
use banger_wire::ssh_agent;
use banger_wire::stream::{FrameReader, FrameWriter, StreamError};
use banger_wire::vm::{VmCall, VmEvent, VmRequest};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// After `--timeout` the command is asked to end and has this long until it is killed.
const TERMINATE_TIME: Duration = Duration::from_secs(5);
/// A killed command is reported at once, unless the guest is beyond reporting.
const KILL_TIME: Duration = Duration::from_secs(2);
const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

/// A session to be opened.
#[derive(Debug)]
pub(crate) struct SessionPlan {
    /// The vm's name, for messages.
    pub(crate) vm: String,
    /// Its supervisor's socket.
    pub(crate) socket: PathBuf,
    /// What to run.
    pub(crate) exec: ExecSpec,
    /// The vm ends with this session.
    pub(crate) lease: bool,
    /// Bounds the command.
    pub(crate) timeout: Option<Duration>,
}

impl SessionPlan {
    fn lost(&self) -> WireError {
        lost(&self.vm)
    }

    fn lost_by(&self, error: StreamError) -> WireError {
        lost_by(&self.vm, error)
    }
}

/// Returns the failure of a connection that ended too early.
pub(crate) fn lost(vm: &str) -> WireError {
    let message = format!("lost the connection to vm `{vm}` before the command had ended");
    WireError::new(ErrorCode::Failed, message).hinted(format!("see `banger vm logs {vm}`"))
}

/// The same, of one that broke.
pub(crate) fn lost_by(vm: &str, error: StreamError) -> WireError {
    let cause = failed("", &error);
    WireError { causes: cause.causes, ..lost(vm) }
}

/// Runs a session to its end and returns the command's status.
///
/// # Errors
/// When the vm can't be reached or the command not started, and when something other than the command's end ends it.
pub(crate) async fn run(plan: SessionPlan, signals: &mut Signals) -> Ended {
    let agent = match plan.exec.forward_agent {
        true => Some(signals.unless(async { Ok(agent::find().await?) }).await?),
        false => None,
    };
    let (mut reader, writer) = signals.unless(open(&plan)).await?;
    let failed_start = |error| Stop::from(failed("could not serve the command's streams", &error));
    let (outputs, mut written) = Outputs::start().map_err(failed_start)?;
    let mut resized = signal(SignalKind::window_change()).map_err(failed_start)?;
    // Before the first read, which would begin with a line of the cooked terminal.
    let raw = plan.exec.tty.and_then(|_| RawMode::enter());
    let mut stdin = streams::start_reader().map_err(failed_start)?;
    let (queue, queued) = mpsc::unbounded_channel();
    let sender = tokio::spawn(send_queued(writer, queued));
    let agent = agent.map(|agent| Forwarding::new(agent, queue.clone()));
    let mut session = Session::new(&plan, queue, outputs, agent);
    if plan.exec.tty.is_some() {
        // It may have changed since the request was made.
        session.control(&SessionControl::Resize(terminal::size()));
    }
    let end = loop {
        let deadline = session.deadline.unwrap_or_else(Instant::now);
        tokio::select! {
            frame = reader.next() => match session.receive(frame) {
                Ok(None) => {}
                Ok(Some(end)) => break Ok(end),
                Err(stop) => break Err(stop),
            },
            Some(done) = written.recv() => if let Err(stop) = session.acknowledge(done, &mut written) {
                break Err(stop);
            },
            chunk = stdin.recv(), if session.wants_input() => session.feed(chunk),
            number = signals.next() => session.control(&SessionControl::Signal(number)),
            _ = resized.recv(), if plan.exec.tty.is_some() => {
                session.control(&SessionControl::Resize(terminal::size()));
            }
            () = tokio::time::sleep_until(deadline), if session.deadline.is_some() => {
                if let Err(stop) = session.advance_timeout() {
                    break Err(stop);
                }
            }
        }
    };
    let timed_out = session.timed_out();
    drop(session);
    let result = match end {
        Ok(status) => signals.unless(drain(&mut written)).await.map(|()| status),
        Err(stop @ (Stop::OutputClosed | Stop::Signalled(_))) => Err(stop),
        Err(stop) => {
            // What the command said before things went wrong explains more than our error does.
            let _ = signals.unless(drain(&mut written)).await;
            Err(stop)
        }
    };
    // Before anything is said: a raw terminal would show it as a staircase.
    drop(raw);
    sender.abort();
    let _ = sender.await;
    match timed_out {
        Some(stop) if !matches!(result, Err(Stop::OutputClosed | Stop::Signalled(_))) => Err(stop),
        _ => result,
    }
}

type Halves = (FrameReader<OwnedReadHalf>, FrameWriter<OwnedWriteHalf>);

async fn open(plan: &SessionPlan) -> Result<Halves, Stop> {
    open_session(&plan.vm, &plan.socket, SessionKind::Exec(Box::new(plan.exec.clone())), plan.lease).await
}

/// Sends a request to a vm's supervisor.
///
/// # Errors
/// When it can't be reached.
pub(crate) async fn request(vm: &str, socket: &Path, request: VmRequest) -> Result<Halves, Stop> {
    let stream = connect(socket).await.map_err(|error| {
        failed(format!("could not reach vm `{vm}`"), &error).hinted(format!("see `banger vm logs {vm}`"))
    })?;
    let (reader, writer) = stream.into_split();
    let reader = FrameReader::new(reader, MESSAGE_LEN_MAX);
    let mut writer = FrameWriter::new(writer);
    let call = VmCall { build: BUILD.to_owned(), request };
    writer.message(0, &call).await.map_err(|error| lost_by(vm, error))?;
    Ok((reader, writer))
}

/// Opens a session.
///
/// # Errors
/// When the vm can't be reached, or refuses.
pub(crate) async fn open_session(
    vm: &str,
    socket: &Path,
    what: SessionKind,
    lease: bool,
) -> Result<Halves, Stop> {
    let (mut reader, writer) = request(vm, socket, VmRequest::Open { what, lease }).await?;
    loop {
        let frame = reader.next().await.map_err(|error| lost_by(vm, error))?.ok_or_else(|| lost(vm))?;
        if frame.kind != Kind::Message {
            continue;
        }
        match frame.parse() {
            Ok(VmEvent::Accepted) => return Ok((reader, writer)),
            Ok(VmEvent::Refused(error)) => return Err(error.into()),
            Ok(VmEvent::Ended(end)) => return Err(ended(vm, end.detail).into()),
            Ok(VmEvent::State(_) | VmEvent::Used(_) | VmEvent::Ports(_) | VmEvent::Net(_)) => {}
            Err(error) => return Err(lost_by(vm, error.into()).into()),
        }
    }
}

fn ended(vm: &str, detail: String) -> WireError {
    let mut error = WireError::new(ErrorCode::Failed, format!("vm `{vm}` ended before the command did"));
    error.causes.push(detail);
    error
}

/// Writes frames until the queue or the connection ends.
pub(crate) async fn send_queued(
    mut writer: FrameWriter<OwnedWriteHalf>,
    mut queue: mpsc::UnboundedReceiver<Frame>,
) {
    while let Some(frame) = queue.recv().await {
        // The reading side learns of a broken connection and says so.
        if writer.write(&frame).await.is_err() {
            return;
        }
    }
}

/// Waits until all output was passed on.
async fn drain(written: &mut mpsc::UnboundedReceiver<Written>) -> Result<(), Stop> {
    while let Some(done) = written.recv().await {
        written_len(done)?;
    }
    Ok(())
}

fn written_len(done: Written) -> Result<(u8, usize), Stop> {
    match done {
        Written::Bytes { channel, len } => Ok((channel, len)),
        Written::Closed => Err(Stop::OutputClosed),
        Written::Failed(error) => Err(failed("could not write the command's output", &error).into()),
    }
}

/// How far an exceeded `--timeout` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Overrun {
    Not,
    Terminated,
    Killed,
}

#[derive(Debug)]
struct Session<'a> {
    plan: &'a SessionPlan,
    queue: mpsc::UnboundedSender<Frame>,
    outputs: Outputs,
    /// Where the command was to have it.
    agent: Option<Forwarding>,
    /// Bytes the guest takes before it grants more.
    window: usize,
    /// Bytes of each output channel that are not passed on yet.
    unacknowledged: [usize; 3],
    /// Read from stdin, not yet granted.
    pending: Vec<u8>,
    stdin_open: bool,
    overrun: Overrun,
    deadline: Option<Instant>,
}

impl<'a> Session<'a> {
    fn new(
        plan: &'a SessionPlan,
        queue: mpsc::UnboundedSender<Frame>,
        outputs: Outputs,
        agent: Option<Forwarding>,
    ) -> Self {
        Self {
            plan,
            queue,
            outputs,
            agent,
            window: WINDOW as usize,
            unacknowledged: [0; 3],
            pending: Vec::new(),
            stdin_open: true,
            overrun: Overrun::Not,
            deadline: plan.timeout.and_then(|timeout| Instant::now().checked_add(timeout)),
        }
    }

    /// A queue without its sender means a broken connection, of which the reading side learns.
    fn send(&self, frame: Frame) {
        let _ = self.queue.send(frame);
    }

    fn control(&self, control: &SessionControl) {
        if let Ok(frame) = Frame::message(0, control) {
            self.send(frame);
        }
    }

    fn wants_input(&self) -> bool {
        self.stdin_open && self.pending.is_empty() && self.window > 0
    }

    fn feed(&mut self, chunk: Option<Vec<u8>>) {
        match chunk {
            Some(bytes) => {
                self.pending = bytes;
                self.send_pending();
            }
            None => {
                self.stdin_open = false;
                self.send(Frame::eof(0, STDIN));
            }
        }
    }

    fn send_pending(&mut self) {
        let len = self.pending.len().min(self.window).min(DATA_LEN_MAX);
        if len > 0 {
            let later = self.pending.split_off(len);
            self.window -= len;
            let now = std::mem::replace(&mut self.pending, later);
            self.send(Frame::data(0, STDIN, now));
        }
    }

    /// Takes a frame; returns the status once the command has ended.
    fn receive(&mut self, frame: Result<Option<Frame>, StreamError>) -> Result<Option<u8>, Stop> {
        let frame = match frame {
            Ok(Some(frame)) => frame,
            Ok(None) => return Err(self.plan.lost().into()),
            Err(error) => return Err(self.plan.lost_by(error).into()),
        };
        match frame.kind {
            Kind::Data | Kind::Eof if ssh_agent::CHANNELS.contains(&frame.channel) => {
                // A guest that was not given the agent does not keep to the protocol.
                let agent = self.agent.as_mut().ok_or_else(|| self.plan.lost())?;
                agent.receive(frame)?;
            }
            Kind::Data => {
                let waiting = self.unacknowledged.get_mut(usize::from(frame.channel));
                let Some(waiting) =
                    waiting.filter(|waiting| **waiting + frame.payload.len() <= WINDOW as usize)
                else {
                    // More than it was granted: this guest does not keep to the protocol.
                    return Err(self.plan.lost().into());
                };
                *waiting += frame.payload.len();
                self.outputs.send(frame.channel, frame.payload);
            }
            Kind::Credit if frame.channel == STDIN => {
                let granted = frame.parse_credit().map_err(|error| self.plan.lost_by(error.into()))?;
                self.window = self.window.saturating_add(granted as usize).min(WINDOW as usize);
                self.send_pending();
            }
            Kind::Close => return Err(self.plan.lost().into()),
            Kind::Message => return self.receive_event(&frame),
            Kind::Credit | Kind::Eof => {}
        }
        Ok(None)
    }

    fn receive_event(&self, frame: &Frame) -> Result<Option<u8>, Stop> {
        match frame.parse() {
            Ok(SessionEvent::Started { .. }) => Ok(None),
            Ok(SessionEvent::Exited(status)) => Ok(Some(status.shell_code())),
            Ok(SessionEvent::Failed(error)) => Err(error.into()),
            Err(error) => match frame.parse() {
                // The supervisor's own word, when it still gets to say it.
                Ok(VmEvent::Ended(end)) => Err(ended(&self.plan.vm, end.detail).into()),
                Ok(VmEvent::Refused(refusal)) => Err(refusal.into()),
                Ok(_) => Ok(None),
                Err(_) => Err(self.plan.lost_by(error.into()).into()),
            },
        }
    }

    /// Returns credit for what was passed on, this and all that is waiting.
    fn acknowledge(
        &mut self,
        done: Written,
        written: &mut mpsc::UnboundedReceiver<Written>,
    ) -> Result<(), Stop> {
        let mut grants = [0_usize; 3];
        let mut next = Some(done);
        while let Some(done) = next {
            let (channel, len) = written_len(done)?;
            grants[usize::from(channel)] += len;
            next = written.try_recv().ok();
        }
        for (channel, len) in (0..).zip(grants) {
            if len > 0 {
                let waiting = &mut self.unacknowledged[usize::from(channel)];
                *waiting = waiting.saturating_sub(len);
                self.send(Frame::credit(0, channel, u32::try_from(len).unwrap_or(u32::MAX)));
            }
        }
        Ok(())
    }

    /// Asks an overdue command to end, then kills it, then gives it up.
    fn advance_timeout(&mut self) -> Result<(), Stop> {
        let (overrun, number, patience) = match self.overrun {
            Overrun::Not => (Overrun::Terminated, SIGTERM, TERMINATE_TIME),
            Overrun::Terminated => (Overrun::Killed, SIGKILL, KILL_TIME),
            Overrun::Killed => {
                return Err(Stop::TimedOut(self.plan.timeout.unwrap_or_default()));
            }
        };
        self.control(&SessionControl::Signal(number));
        self.overrun = overrun;
        self.deadline = Some(Instant::now() + patience);
        Ok(())
    }

    fn timed_out(&self) -> Option<Stop> {
        let timeout = self.plan.timeout.filter(|_| self.overrun != Overrun::Not)?;
        Some(Stop::TimedOut(timeout))
    }
}
