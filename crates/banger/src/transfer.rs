//! Files between this process and a guest: a session whose streams a thread reads and writes.

use crate::session::{lost, lost_by, open_session, send_queued};
use crate::stop::{Stop, failed};
use banger_wire::channel::{self, ChannelReader, ChannelWriter, Feed};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::{ExitStatus, STDERR, STDIN, STDOUT, SessionEvent, WINDOW};
use banger_wire::frame::{DATA_LEN_MAX, Frame, Kind};
use banger_wire::guest::SessionKind;
use std::path::Path;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Time between two looks at how far the work is.
const TICK: Duration = Duration::from_millis(100);
/// What of a command's errors is kept for ours.
const SAID_LEN_MAX: usize = 4096;

/// Does blocking work on a thread, which is not waited for when this is dropped.
///
/// # Errors
/// Those of the work, and when there can be no thread.
pub(crate) async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, WireError> + Send + 'static,
) -> Result<T, Stop> {
    Ok(start_thread(work)?.await.map_err(|error| failed("a thread ended too early", &error))??)
}

/// Starts blocking work on a thread.
///
/// # Errors
/// When there can be none.
pub(crate) fn start_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, WireError> + Send + 'static,
) -> Result<oneshot::Receiver<Result<T, WireError>>, WireError> {
    let (tell, done) = oneshot::channel();
    let run = move || {
        let _ = tell.send(work());
    };
    let thread = std::thread::Builder::new().name("files".to_owned()).spawn(run);
    thread.map_err(|error| failed("could not start a thread", &error))?;
    Ok(done)
}

fn unsuccessful(vm: &str, status: ExitStatus, said: &[u8]) -> WireError {
    let message = format!("a command in vm `{vm}` ended with status {}", status.shell_code());
    let mut error = WireError::new(ErrorCode::Failed, message);
    let said = String::from_utf8_lossy(said).trim().to_owned();
    error.causes.extend(Some(said).filter(|said| !said.is_empty()));
    error
}

/// Opens a session and has `work` serve its streams, until both have ended. `tick` is called now and then. The work keeps
/// its writer to its end.
///
/// # Errors
/// Those of the work, of the guest, and of the connection.
pub(crate) async fn transfer<T: Send + 'static>(
    (vm, socket): (&str, &Path),
    what: SessionKind,
    work: impl FnOnce(ChannelReader, ChannelWriter) -> Result<T, WireError> + Send + 'static,
    tick: &mut (dyn FnMut() + Send),
) -> Result<T, Stop> {
    let (mut reader, writer) = open_session(vm, socket, what, false).await?;
    let (queue, queued) = mpsc::unbounded_channel();
    let sender = tokio::spawn(send_queued(writer, queued));
    let (input, Feed { pieces: to_work, mut read }) = channel::reader();
    let (output, mut pieces) = channel::writer();
    let mut work = start_thread(move || work(input, output))?;
    let gone = |error| failed("a thread ended too early", &error);
    let mut ticks = tokio::time::interval(TICK);
    let (mut window, mut unread, mut sending) = (WINDOW as usize, 0_usize, true);
    let mut said = Vec::new();
    let mut result = None;
    let end = loop {
        tokio::select! {
            frame = reader.next() => {
                let frame = frame.map_err(|error| lost_by(vm, error))?.ok_or_else(|| lost(vm))?;
                match (frame.kind, frame.channel) {
                    (Kind::Data, STDOUT) => {
                        unread += frame.payload.len();
                        if unread > WINDOW as usize {
                            return Err(lost(vm).into());
                        }
                        let _ = to_work.send(frame.payload);
                    }
                    (Kind::Credit, STDIN) => {
                        let granted = frame.parse_credit().map_err(|error| lost_by(vm, error.into()))?;
                        window = window.saturating_add(granted as usize).min(WINDOW as usize);
                    }
                    (Kind::Data, STDERR) => {
                        let _ = queue.send(Frame::credit(0, STDERR, u32::try_from(frame.payload.len()).unwrap_or(0)));
                        let room = SAID_LEN_MAX.saturating_sub(said.len()).min(frame.payload.len());
                        said.extend_from_slice(&frame.payload[..room]);
                    }
                    (Kind::Message, _) => match frame.parse() {
                        Ok(SessionEvent::Started { .. }) => {}
                        Ok(SessionEvent::Exited(ExitStatus::Code(0))) => break Ok(()),
                        Ok(SessionEvent::Exited(status)) => break Err(unsuccessful(vm, status, &said)),
                        Ok(SessionEvent::Failed(error)) => break Err(error),
                        _ => break Err(lost(vm)),
                    },
                    (Kind::Close, _) => break Err(lost(vm)),
                    _ => {}
                }
            }
            piece = pieces.recv(), if sending && window >= DATA_LEN_MAX => match piece {
                Some(piece) => {
                    window -= piece.len();
                    let _ = queue.send(Frame::data(0, STDIN, piece));
                }
                None => {
                    sending = false;
                    let _ = queue.send(Frame::eof(0, STDIN));
                }
            },
            Some(len) = read.recv() => {
                unread = unread.saturating_sub(len);
                let _ = queue.send(Frame::credit(0, STDOUT, u32::try_from(len).unwrap_or(u32::MAX)));
            }
            done = &mut work, if result.is_none() => match done.map_err(gone)? {
                Ok(value) => result = Some(value),
                Err(error) => return Err(error.into()),
            },
            _ = ticks.tick() => tick(),
        }
    };
    drop((to_work, pieces, queue));
    sender.abort();
    // Work that had ended by itself before the guest failed is the cause, if it failed; else it fails in consequence.
    if let (Err(error), true) = (&end, sending) {
        return Err(error.clone().into());
    }
    let result = match result {
        Some(result) => result,
        None => work.await.map_err(gone)??,
    };
    Ok(end.map(|()| result)?)
}
