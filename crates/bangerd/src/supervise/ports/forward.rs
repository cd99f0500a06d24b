//! One connection of the host's, carried on to a port of the guest's by the agent's channel.
//!
//! Bytes wait where they come from: the client's are read as far as the guest has granted room, and the guest is granted
//! what the client has taken. The end of either direction is passed on by itself, and a connection that breaks inside
//! breaks outside.

use crate::supervise::link::{Link, Session};
use banger_wire::exec::{ExitStatus, STDIN, STDOUT, SessionEvent, WINDOW};
use banger_wire::frame::{DATA_LEN_MAX, Frame, Kind};
use banger_wire::guest::SessionKind;
use std::cell::Cell;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::{Semaphore, mpsc};

/// The connection did not end in order.
struct Broken;

/// Ends a connection as if nobody listened.
pub(super) fn reset(stream: TcpStream) {
    let _ = rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
    drop(stream);
}

/// Carries a connection to its end.
pub(super) async fn carry(mut client: TcpStream, link: &Link, address: SocketAddr) {
    let _ = client.set_nodelay(true);
    let Ok(mut session) = link.open(SessionKind::Connect { address }).await else { return reset(client) };
    let id = session.id;
    let carried = exchange(&mut client, link, &mut session).await;
    if carried.is_err() {
        link.send_later(Frame::close(id));
        reset(client);
    }
}

async fn exchange(client: &mut TcpStream, link: &Link, session: &mut Session) -> Result<(), Broken> {
    let id = session.id;
    let (read, write) = client.split();
    let window = Semaphore::new(WINDOW as usize);
    // Bytes of the guest's that the client has not taken.
    let unread = Cell::new(0_usize);
    let (pieces, queue) = mpsc::unbounded_channel();
    let mut pieces = Some(pieces);
    let to_guest = pass_on(read, link, id, &window);
    let to_client = hand_out(write, queue, link, id, &unread);
    tokio::pin!(to_guest, to_client);
    let (mut is_sent, mut is_taken) = (false, false);
    let end = loop {
        tokio::select! {
            done = &mut to_guest, if !is_sent => {
                done?;
                is_sent = true;
            }
            done = &mut to_client, if !is_taken => {
                done?;
                is_taken = true;
            }
            frame = session.next() => {
                let frame = frame.ok_or(Broken)?;
                match (frame.kind, frame.channel) {
                    (Kind::Data, STDOUT) => {
                        unread.set(unread.get() + frame.payload.len());
                        let pieces = pieces.as_ref().filter(|_| unread.get() <= WINDOW as usize);
                        pieces.ok_or(Broken)?.send(frame.payload).map_err(|_| Broken)?;
                    }
                    (Kind::Eof, STDOUT) => pieces = None,
                    (Kind::Credit, STDIN) => {
                        let granted = frame.parse_credit().map_err(|_| Broken)? as usize;
                        if window.available_permits() + granted <= WINDOW as usize {
                            window.add_permits(granted);
                        }
                    }
                    (Kind::Message, _) => match frame.parse() {
                        Ok(SessionEvent::Exited(ExitStatus::Code(0))) => break Ok(()),
                        _ => break Err(Broken),
                    },
                    (Kind::Close, _) => return Err(Broken),
                    _ => {}
                }
            }
        }
    };
    // What came before the end, in order or not, is the client's.
    drop(pieces);
    if !is_taken {
        to_client.await?;
    }
    end
}

/// Sends what the client says, and its end.
async fn pass_on(mut read: ReadHalf<'_>, link: &Link, id: u32, window: &Semaphore) -> Result<(), Broken> {
    let mut chunk = vec![0; DATA_LEN_MAX];
    loop {
        drop(window.acquire().await);
        let room = window.available_permits().min(DATA_LEN_MAX);
        let len = read.read(&mut chunk[..room]).await.map_err(|_| Broken)?;
        if len == 0 {
            return link.send(Frame::eof(id, STDIN)).await.ok_or(Broken);
        }
        window.forget_permits(len);
        link.send(Frame::data(id, STDIN, chunk[..len].to_vec())).await.ok_or(Broken)?;
    }
}

/// Writes what the guest says, and its end.
async fn hand_out(
    mut write: WriteHalf<'_>,
    mut queue: mpsc::UnboundedReceiver<Vec<u8>>,
    link: &Link,
    id: u32,
    unread: &Cell<usize>,
) -> Result<(), Broken> {
    while let Some(piece) = queue.recv().await {
        write.write_all(&piece).await.map_err(|_| Broken)?;
        unread.set(unread.get() - piece.len());
        let len = u32::try_from(piece.len()).unwrap_or(u32::MAX);
        link.send(Frame::credit(id, STDOUT, len)).await.ok_or(Broken)?;
    }
    write.shutdown().await.map_err(|_| Broken)
}
