//! The serial console for clients that attach to it, as many as there are: each sees everything, and what any of them
//! types arrives. It goes on over reboots.
//!
//! Nothing here holds the vm up: a client that takes nothing off misses output, and what a guest does not read stays
//! with whoever typed it.

use super::console::Console;
use super::vm::Shared;
use banger_wire::exec::{ExitStatus, STDIN, STDOUT, SessionControl, SessionEvent, TerminalSize, WINDOW};
use banger_wire::frame::{Frame, Kind};
use banger_wire::guest::HostMessage;
use banger_wire::stream::{FrameReader, FrameWriter, StreamError};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::pipe;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};

/// Bytes of output that are kept for the slowest client.
const KEPT_MAX: usize = 1 << 20;
/// Longest piece of output.
const PIECE_LEN: usize = 16 * 1024;
/// Lines of what was printed before that a client sees first.
const LINES: usize = 20;
/// Pieces of input that wait for the VMM.
const INPUT_PIECES: usize = 2;
/// What stands where output is missing.
const MISSED: &[u8] = b"\r\n[output is missing here]\r\n";

/// The console as clients see it.
pub(crate) struct Terminal {
    /// The last of the output, while anybody is attached.
    kept: RefCell<VecDeque<u8>>,
    /// How many bytes there have been.
    end: watch::Sender<u64>,
    boot: RefCell<Option<Boot>>,
}

/// The console of one boot.
struct Boot {
    console: Rc<RefCell<Console>>,
    input: mpsc::Sender<Vec<u8>>,
}

impl Default for Terminal {
    fn default() -> Self {
        Self { kept: RefCell::default(), end: watch::channel(0).0, boot: RefCell::default() }
    }
}

impl Terminal {
    /// Takes over the console of a VMM that was started, with the pipe to its input.
    pub(crate) fn connect(&self, console: Rc<RefCell<Console>>, input: OwnedFd) -> std::io::Result<()> {
        let mut pipe = pipe::Sender::from_owned_fd(input)?;
        let (input, mut pieces) = mpsc::channel::<Vec<u8>>(INPUT_PIECES);
        *self.boot.borrow_mut() = Some(Boot { console, input });
        tokio::task::spawn_local(async move {
            while let Some(piece) = pieces.recv().await {
                // The VMM has ended.
                if pipe.write_all(&piece).await.is_err() {
                    return;
                }
            }
        });
        Ok(())
    }

    /// Shows output to whoever is attached. It is in the console's file already.
    pub(crate) fn show(&self, bytes: &[u8]) {
        let mut kept = self.kept.borrow_mut();
        if self.end.receiver_count() == 0 {
            *kept = VecDeque::new();
            return;
        }
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(KEPT_MAX);
        kept.drain(..excess);
        self.end.send_modify(|end| *end += bytes.len() as u64);
    }

    /// Returns the last lines, and what tells of everything after them.
    fn attach(&self) -> (Vec<u8>, watch::Receiver<u64>) {
        let boot = self.boot.borrow();
        let lines = boot.as_ref().map(|boot| boot.console.borrow().last_lines(LINES));
        (lines.unwrap_or_default(), self.end.subscribe())
    }

    /// Returns what there is from a position on, at most so many bytes, and moves the position; or that it is gone.
    fn take(&self, at: &mut u64, len_max: usize) -> Vec<u8> {
        let (kept, end) = (self.kept.borrow(), *self.end.borrow());
        let start = end - kept.len() as u64;
        if *at < start {
            *at = start;
            return MISSED.to_vec();
        }
        let from = usize::try_from(*at - start).unwrap_or(kept.len());
        let to = kept.len().min(from + len_max);
        *at += (to - from) as u64;
        kept.range(from..to).copied().collect()
    }

    fn input(&self) -> Option<mpsc::Sender<Vec<u8>>> {
        self.boot.borrow().as_ref().map(|boot| boot.input.clone())
    }
}

/// What a client has said, and may still be sent.
struct Client {
    /// Bytes of output it has room for.
    window: usize,
    /// What it typed and nobody has taken yet.
    typed: VecDeque<Vec<u8>>,
    typed_len: usize,
    /// The size of its terminal, once somebody sits there.
    size: Option<TerminalSize>,
    /// The boot whose guest knows of that.
    told: Option<String>,
}

impl Client {
    /// Takes a frame; false ends the connection.
    fn take(&mut self, frame: Frame, shared: &Shared) -> bool {
        match (frame.kind, frame.channel) {
            (Kind::Close, _) => return false,
            (Kind::Data, STDIN) => {
                self.typed_len += frame.payload.len();
                self.typed.push_back(frame.payload);
                // A client sends no more than it has credit for; one that does is broken.
                return self.typed_len <= WINDOW as usize;
            }
            (Kind::Credit, STDOUT) => {
                let granted = frame.parse_credit().unwrap_or(0) as usize;
                self.window = self.window.saturating_add(granted).min(WINDOW as usize);
            }
            (Kind::Message, _) => {
                if let Ok(SessionControl::Resize(size)) = frame.parse() {
                    self.size = Some(size);
                    self.told = None;
                    self.tell(shared);
                }
            }
            _ => {}
        }
        true
    }

    /// Tells the guest of this boot that somebody sits at its console.
    fn tell(&mut self, shared: &Shared) {
        let (link, boot) = (shared.link.borrow(), shared.status.borrow().boot_id.clone());
        if let (Some(link), Some(size)) = (link.as_ref(), self.size)
            && self.told != boot
        {
            self.told = boot;
            link.control_later(&HostMessage::Console { size });
        }
    }
}

/// Serves a client until it leaves or the vm has ended.
pub(crate) async fn serve(
    mut reader: FrameReader<OwnedReadHalf>,
    mut writer: FrameWriter<OwnedWriteHalf>,
    shared: &Shared,
) -> Result<(), StreamError> {
    let terminal = &shared.terminal;
    let (lines, mut output) = terminal.attach();
    let mut at = *output.borrow();
    let window = WINDOW as usize - lines.len();
    let mut client = Client { window, typed: VecDeque::new(), typed_len: 0, size: None, told: None };
    if !lines.is_empty() {
        writer.write(&Frame::data(0, STDOUT, lines)).await?;
    }
    let (mut status, mut end) = (shared.status.subscribe(), shared.end.subscribe());
    loop {
        let input = terminal.input();
        let has_output = at < *output.borrow_and_update() && client.window > MISSED.len();
        tokio::select! {
            frame = reader.next() => if !frame?.is_some_and(|frame| client.take(frame, shared)) {
                return Ok(());
            },
            () = std::future::ready(()), if has_output => {
                let bytes = terminal.take(&mut at, client.window.min(PIECE_LEN));
                client.window -= bytes.len();
                writer.write(&Frame::data(0, STDOUT, bytes)).await?;
            }
            changed = output.changed() => if changed.is_err() { return Ok(()) },
            room = room(input.as_ref()), if !client.typed.is_empty() => {
                let Some(piece) = client.typed.pop_front() else { continue };
                let len = u32::try_from(piece.len()).unwrap_or(u32::MAX);
                client.typed_len -= piece.len();
                // Without a VMM there is nobody to read it.
                if let Some(room) = room {
                    room.send(piece);
                }
                writer.write(&Frame::credit(0, STDIN, len)).await?;
            }
            changed = status.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                client.tell(shared);
            }
            _ = end.wait_for(Option::is_some), if !has_output => {
                return writer.message(0, &SessionEvent::Exited(ExitStatus::Code(0))).await;
            }
        }
    }
}

async fn room(input: Option<&mpsc::Sender<Vec<u8>>>) -> Option<mpsc::Permit<'_, Vec<u8>>> {
    input?.reserve().await.ok()
}

#[cfg(test)]
mod tests {
    use super::{KEPT_MAX, MISSED, Terminal};

    #[test]
    fn what_is_too_old_is_missed_and_the_rest_is_not() {
        let terminal = Terminal::default();
        terminal.show(b"nobody is there");
        let (lines, output) = terminal.attach();
        let mut at = *output.borrow();
        assert!(lines.is_empty());
        for byte in b"one by one" {
            terminal.show(&[*byte]);
        }
        assert_eq!(terminal.take(&mut at, 4), b"one ");
        assert_eq!(terminal.take(&mut at, 100), b"by one");
        assert_eq!(terminal.take(&mut at, 100), b"");
        terminal.show(b"lost");
        terminal.show(&vec![b'x'; KEPT_MAX]);
        assert_eq!(terminal.take(&mut at, 100), MISSED);
        assert_eq!(terminal.take(&mut at, 2 * KEPT_MAX).len(), KEPT_MAX);
        assert_eq!(at, *output.borrow());
        drop(output);
        terminal.show(b"nobody again");
        assert!(terminal.kept.borrow().is_empty());
    }
}
