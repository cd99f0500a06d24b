//! Connections to the vm's own socket: sessions, status, stop.

use super::link::Link;
use super::net;
use super::terminal;
use super::vm::{Order, Shared};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::WINDOW;
use banger_wire::frame::{Frame, Kind, MESSAGE_LEN_MAX};
use banger_wire::guest::{HostMessage, SessionKind};
use banger_wire::stream::{FrameReader, FrameWriter, StreamError};
use banger_wire::vm::{Phase, VmCall, VmEvent, VmRequest};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;

/// Frames of one client that wait for the guest: its window, and what it and its ssh agent say besides.
const WAITING_MAX: usize = 2 * WINDOW as usize;
/// How long a VMM may take to say what it has counted.
const USE_WAIT: Duration = Duration::from_secs(2);
/// How long the network may take to do what it is told; it first comes up.
const NET_WAIT: Duration = Duration::from_secs(15);
/// The wait after a connection could not be taken, for want of descriptors for example.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Accepts clients until the supervisor ends.
pub(crate) async fn serve(listener: UnixListener, shared: Rc<Shared>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_AGAIN).await;
            continue;
        };
        if allowed(&stream, &shared) {
            let shared = shared.clone();
            tokio::task::spawn_local(async move {
                // A client that breaks the protocol or goes away concerns nobody else.
                let _ = serve_one(stream, &shared).await;
            });
        }
    }
}

/// The owner only, and none of the vm's own processes: those have an id in the vm's pid namespace, where others have
/// none. A vm started by root sees its owner as nobody (root is not in its user namespace); there the directory, which
/// only root can enter, is what keeps others out.
fn allowed(stream: &UnixStream, shared: &Shared) -> bool {
    let own = rustix::process::getuid().as_raw();
    let Ok(peer) = stream.peer_cred() else { return false };
    let is_inside = peer.pid().is_some_and(|pid| pid != 0);
    !is_inside && (shared.started_by_root || peer.uid() == own)
}

async fn serve_one(stream: UnixStream, shared: &Rc<Shared>) -> Result<(), StreamError> {
    let (read, write) = stream.into_split();
    let (mut reader, mut writer) = (FrameReader::new(read, MESSAGE_LEN_MAX), FrameWriter::new(write));
    let Some(first) = reader.next().await? else { return Ok(()) };
    let call: VmCall = first.parse()?;
    match call.request {
        VmRequest::Watch => watch(reader, writer, shared).await,
        VmRequest::Hold => {
            let _used = shared.use_it();
            shared.status.send_modify(|status| status.leased = true);
            let watched = watch(reader, writer, shared).await;
            let _ = shared.orders.send(Order::LeaseEnded).await;
            watched
        }
        VmRequest::Stop { grace_ms } => {
            let _ = shared.orders.send(Order::Stop { grace_ms }).await;
            watch(reader, writer, shared).await
        }
        VmRequest::Kill => {
            let _ = shared.orders.send(Order::Kill).await;
            watch(reader, writer, shared).await
        }
        VmRequest::Use => {
            let (tell, told) = oneshot::channel();
            let _ = shared.orders.send(Order::Use(tell)).await;
            let used = tokio::time::timeout(USE_WAIT, told).await.ok().and_then(Result::ok);
            writer.message(0, &VmEvent::Used(used.unwrap_or_default())).await
        }
        VmRequest::Ports => {
            let ports = shared.ports.borrow().clone();
            writer.message(0, &VmEvent::Ports(Box::new(ports))).await
        }
        VmRequest::Net => {
            let event = match order_of_net(shared, |done| net::Order::Report { done }).await {
                Ok(report) => VmEvent::Net(report),
                Err(error) => VmEvent::Refused(error),
            };
            writer.message(0, &event).await
        }
        VmRequest::SetNet(rules) => {
            let event = match order_of_net(shared, |done| net::Order::SetRules { rules, done }).await {
                Ok(Ok(())) => VmEvent::Accepted,
                Ok(Err(text)) => VmEvent::Refused(WireError::new(ErrorCode::Failed, text)),
                Err(error) => VmEvent::Refused(error),
            };
            writer.message(0, &event).await
        }
        VmRequest::Signal { number } => match wait_ready(&mut reader, shared).await {
            Ok(link) => {
                link.control_later(&HostMessage::Signal { number });
                writer.message(0, &VmEvent::Accepted).await
            }
            Err(error) => writer.message(0, &VmEvent::Refused(error)).await,
        },
        VmRequest::Console => {
            let _used = shared.use_it();
            writer.message(0, &VmEvent::Accepted).await?;
            terminal::serve(reader, writer, shared).await
        }
        VmRequest::Open { what, lease } => {
            let _used = shared.use_it();
            if lease {
                shared.status.send_modify(|status| status.leased = true);
            }
            let served = match wait_ready(&mut reader, shared).await {
                Ok(link) => bridge(&mut reader, &mut writer, &link, what).await,
                Err(error) => writer.message(0, &VmEvent::Refused(error)).await,
            };
            if lease {
                let _ = shared.orders.send(Order::LeaseEnded).await;
            }
            served
        }
    }
}

/// Has the network do something and returns what it says.
async fn order_of_net<T>(
    shared: &Shared,
    order: impl FnOnce(oneshot::Sender<T>) -> net::Order,
) -> Result<T, WireError> {
    let (done, told) = oneshot::channel();
    let ask = async {
        shared.net.send(order(done)).await.ok()?;
        told.await.ok()
    };
    let answer = tokio::time::timeout(NET_WAIT, ask)
        .await
        .map_err(|_| WireError::new(ErrorCode::Failed, "the vm's network is not up yet"))?;
    answer.ok_or_else(|| WireError::new(ErrorCode::Failed, "the vm has no network"))
}

/// Sends the status at every change until the client leaves.
async fn watch(
    mut reader: FrameReader<OwnedReadHalf>,
    mut writer: FrameWriter<OwnedWriteHalf>,
    shared: &Shared,
) -> Result<(), StreamError> {
    let mut status = shared.status.subscribe();
    let mut end = shared.end.subscribe();
    loop {
        let now = status.borrow_and_update().clone();
        writer.message(0, &VmEvent::State(now)).await?;
        tokio::select! {
            changed = status.changed() => if changed.is_err() { return Ok(()) },
            ended = end.wait_for(Option::is_some) => {
                if let Ok(end) = ended.map(|end| end.clone()) && let Some(end) = end {
                    writer.message(0, &VmEvent::Ended(end)).await?;
                }
                return Ok(());
            }
            frame = reader.next() => if frame?.is_none() { return Ok(()) },
        }
    }
}

/// Waits until sessions can be opened.
async fn wait_ready(reader: &mut FrameReader<OwnedReadHalf>, shared: &Shared) -> Result<Link, WireError> {
    let failed = |message: &str| WireError::new(ErrorCode::Failed, message);
    let mut status = shared.status.subscribe();
    let settled = status.wait_for(|status| {
        matches!(status.phase, Phase::Ready | Phase::InitReady | Phase::Failed { .. } | Phase::Stopping)
    });
    let phase = tokio::select! {
        settled = settled => settled.map_err(|_| failed("the vm has ended"))?.phase.clone(),
        // Nothing is to be said before `Accepted`: a frame, or the end, means the client gave up.
        _ = reader.next() => return Err(failed("the client left")),
    };
    match phase {
        Phase::Failed { stage, cause } => {
            Err(WireError::new(ErrorCode::Unreachable, format!("the vm did not start: {stage}: {cause}")))
        }
        Phase::Stopping => Err(failed("the vm is stopping")),
        _ => shared.link.borrow().clone().ok_or_else(|| failed("the vm has ended")),
    }
}

/// Passes frames between a client, whose session is 0, and the guest, whose session has a number.
async fn bridge(
    reader: &mut FrameReader<OwnedReadHalf>,
    writer: &mut FrameWriter<OwnedWriteHalf>,
    link: &Link,
    what: SessionKind,
) -> Result<(), StreamError> {
    let mut session = match link.open(what).await {
        Ok(session) => session,
        Err(why) => {
            let error = WireError::new(ErrorCode::Failed, why.to_string());
            return writer.message(0, &VmEvent::Refused(error)).await;
        }
    };
    writer.message(0, &VmEvent::Accepted).await?;
    let id = session.id;
    let to_client = async {
        while let Some(mut frame) = session.next().await {
            frame.session = 0;
            let last = frame.kind == Kind::Close;
            writer.write(&frame).await?;
            if last {
                break;
            }
        }
        Ok(())
    };
    tokio::select! {
        () = pass_to_guest(reader, link, id) => {
            // The client is done, or gone: the guest ends the program.
            link.send_later(Frame::close(id));
            Ok(())
        }
        done = to_client => done,
    }
}

/// Passes a client's frames on until it has no more. Goes on reading while the guest does not, so that a client that is
/// gone is noticed whatever the guest does.
async fn pass_to_guest(reader: &mut FrameReader<OwnedReadHalf>, link: &Link, id: u32) {
    let (mut waiting, mut len) = (VecDeque::new(), 0);
    // A client sends no more than it has credit for; one that does is broken.
    while len <= WAITING_MAX {
        tokio::select! {
            frame = reader.next() => match frame {
                Ok(Some(mut frame)) if frame.kind != Kind::Close => {
                    len += frame.payload.len();
                    frame.session = id;
                    waiting.push_back(frame);
                }
                _ => return,
            },
            room = link.room(), if !waiting.is_empty() => {
                let (Some(room), Some(frame)) = (room, waiting.pop_front()) else { return };
                len -= frame.payload.len();
                room.send(frame);
            }
        }
    }
}
