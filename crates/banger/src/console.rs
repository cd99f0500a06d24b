//! `vm console`: this terminal on a vm's serial console.
//!
//! On a terminal every key goes to the guest but one, which leaves. Otherwise stdin is copied there and its end changes
//! nothing, so that output goes on to be seen.

use crate::args::ConsoleArgs;
use crate::context::{Context, expect_outcome};
use crate::run::not_running;
use crate::session::{self, send_queued};
use crate::signals::Signals;
use crate::stop::{Ended, Stop, failed, unexpected_answer};
use crate::streams::{self, Outputs, Written};
use crate::terminal::{self, RawMode};
use crate::text::ConsoleText;
use banger_wire::daemon::{Request, VmState, VmView};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::{STDIN, STDOUT, SessionControl, SessionEvent, WINDOW};
use banger_wire::frame::{DATA_LEN_MAX, Frame, Kind};
use banger_wire::vm::{VmEvent, VmRequest};
use std::collections::VecDeque;
use std::path::Path;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// The key that leaves: control and `]`.
const LEAVE: u8 = 0x1d;
const LEAVE_NAME: &str = "ctrl-]";

/// Runs `banger vm console`.
pub(crate) async fn attach(context: &mut Context, args: ConsoleArgs) -> Ended {
    let vm = expect_outcome!(context.ask(Request::VmShow { vm: args.vm }).await?, Vm)?;
    if matches!(vm.state, VmState::Created | VmState::Stopped) {
        return Err(not_running(&vm).into());
    }
    let keys = terminal::stdin_is_terminal();
    if keys {
        context.ui.note(&format!("attached to the console of `{}`; {LEAVE_NAME} leaves it", vm.name));
    }
    let left = stay(&vm, keys, &mut context.signals).await;
    if keys {
        context.ui.end_foreign_line();
    }
    match left? {
        Left::ByKey => context.ui.note(&format!("left the console of `{}`, which goes on", vm.name)),
        Left::Ended => context.ui.note(&format!("vm `{}` has ended", vm.name)),
    }
    Ok(0)
}

/// How a console is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    ByKey,
    Ended,
}

async fn stay(vm: &VmView, keys: bool, signals: &mut Signals) -> Result<Left, Stop> {
    let name = vm.name.to_string();
    let connecting = session::request(&name, Path::new(&vm.socket), VmRequest::Console);
    let (mut reader, writer) = signals.unless(connecting).await?;
    let could_not = |error| Stop::from(failed("could not serve the console's bytes", &error));
    let (outputs, mut written) = Outputs::start().map_err(could_not)?;
    let mut resized = signal(SignalKind::window_change()).map_err(could_not)?;
    let raw = if keys { RawMode::enter() } else { None };
    let mut stdin = streams::start_reader().map_err(could_not)?;
    let (queue, queued) = mpsc::unbounded_channel();
    let sender = tokio::spawn(send_queued(writer, queued));
    let escaped = !keys && terminal::stdout_is_terminal();
    let mut attached = Attached {
        queue,
        outputs,
        text: escaped.then(ConsoleText::default),
        writing: VecDeque::new(),
        window: WINDOW as usize,
        pending: Vec::new(),
        stdin_open: true,
        keys,
        announced: false,
        accepted: false,
    };
    if keys {
        attached.announce();
    }
    let left = loop {
        tokio::select! {
            frame = reader.next() => match frame.map_err(|error| session::lost_by(&name, error)) {
                Ok(Some(frame)) => match attached.receive(frame) {
                    Ok(false) => {}
                    Ok(true) => break Ok(Left::Ended),
                    Err(stop) => break Err(stop),
                },
                Ok(None) if !attached.accepted => break Err(no_console(&name).into()),
                // Whether its supervisor got to say so or not.
                Ok(None) => break Ok(Left::Ended),
                Err(error) => break Err(error.into()),
            },
            Some(done) = written.recv() => if let Err(stop) = attached.acknowledge(done) {
                break Err(stop);
            },
            chunk = stdin.recv(), if attached.wants_input() => match chunk {
                Some(bytes) => {
                    let leaves = bytes.iter().position(|byte| keys && *byte == LEAVE);
                    attached.feed(&bytes[..leaves.unwrap_or(bytes.len())]);
                    if leaves.is_some() {
                        break Ok(Left::ByKey);
                    }
                }
                None => attached.stdin_open = false,
            },
            number = signals.next() => break Err(Stop::Signalled(number)),
            _ = resized.recv(), if keys => attached.announce(),
        }
    };
    attached.finish();
    drop(attached);
    while let (Ok(_), Some(done)) = (&left, written.recv().await) {
        if !matches!(done, Written::Bytes { .. }) {
            break;
        }
    }
    // Before anything is said: a raw terminal would show it as a staircase.
    drop(raw);
    sender.abort();
    left
}

/// The client's end of a console.
struct Attached {
    queue: mpsc::UnboundedSender<Frame>,
    outputs: Outputs,
    /// Makes output printable, where it goes to a terminal that is not the guest's own.
    text: Option<ConsoleText>,
    /// Lengths of what arrived and is being written.
    writing: VecDeque<usize>,
    /// Bytes the supervisor takes before it grants more.
    window: usize,
    /// Read from stdin, not yet granted.
    pending: Vec<u8>,
    stdin_open: bool,
    /// What is read are keys, one of which leaves.
    keys: bool,
    announced: bool,
    accepted: bool,
}

/// A supervisor that does not know what is asked hangs up.
fn no_console(vm: &str) -> WireError {
    let message = format!("vm `{vm}` was started by an earlier banger, which had no console to attach to");
    WireError::new(ErrorCode::Failed, message)
        .hinted(format!("see `banger vm logs {vm}`, or restart it with `banger vm restart {vm}`"))
}

impl Attached {
    /// A queue without its sender means a broken connection, of which the reading side learns.
    fn send(&self, frame: Frame) {
        let _ = self.queue.send(frame);
    }

    /// Says that somebody sits here, and before what.
    fn announce(&mut self) {
        self.announced = true;
        if let Ok(frame) = Frame::message(0, &SessionControl::Resize(terminal::size())) {
            self.send(frame);
        }
    }

    fn wants_input(&self) -> bool {
        self.stdin_open && (self.keys || self.pending.is_empty())
    }

    fn feed(&mut self, bytes: &[u8]) {
        if !self.announced {
            self.announce();
        }
        // More is typed at a guest that does not read than anybody will want it to read later.
        if self.pending.len() < WINDOW as usize {
            self.pending.extend_from_slice(bytes);
        }
        self.send_pending();
    }

    fn send_pending(&mut self) {
        while !self.pending.is_empty() && self.window > 0 {
            let len = self.pending.len().min(self.window).min(DATA_LEN_MAX);
            let later = self.pending.split_off(len);
            self.window -= len;
            let now = std::mem::replace(&mut self.pending, later);
            self.send(Frame::data(0, STDIN, now));
        }
    }

    /// Takes a frame; true when the vm has ended.
    fn receive(&mut self, frame: Frame) -> Result<bool, Stop> {
        match frame.kind {
            Kind::Data => {
                let len = frame.payload.len();
                let bytes = match &mut self.text {
                    Some(text) => text.push(&frame.payload).into_bytes(),
                    None => frame.payload,
                };
                self.writing.push_back(len);
                self.outputs.send(STDOUT, bytes);
            }
            Kind::Credit if frame.channel == STDIN => {
                let granted = frame.parse_credit().unwrap_or(0) as usize;
                self.window = self.window.saturating_add(granted).min(WINDOW as usize);
                self.send_pending();
            }
            Kind::Message => match (frame.parse(), frame.parse()) {
                (Ok(SessionEvent::Exited(_)), _) | (_, Ok(VmEvent::Ended(_))) => return Ok(true),
                (_, Ok(VmEvent::Refused(error))) => return Err(error.into()),
                (_, Ok(VmEvent::Accepted)) => self.accepted = true,
                _ => return Err(unexpected_answer().into()),
            },
            Kind::Close => return Ok(true),
            Kind::Credit | Kind::Eof => {}
        }
        Ok(false)
    }

    fn acknowledge(&mut self, done: Written) -> Result<(), Stop> {
        match done {
            Written::Bytes { .. } => {
                let len = self.writing.pop_front().unwrap_or(0);
                self.send(Frame::credit(0, STDOUT, u32::try_from(len).unwrap_or(u32::MAX)));
                Ok(())
            }
            Written::Closed => Err(Stop::OutputClosed),
            Written::Failed(error) => Err(failed("could not write to stdout", &error).into()),
        }
    }

    /// Writes what was still undecided.
    fn finish(&mut self) {
        if let Some(text) = &mut self.text {
            self.outputs.send(STDOUT, text.finish().into_bytes());
        }
    }
}
