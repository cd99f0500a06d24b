//! A connection that came in on the host, continued to a port of the guest's.
//!
//! It does not go by the guest's network device or its routes: only the loopback has to work, or whatever address the
//! listener has.

use crate::session::read_piece;
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::{ExitStatus, STDIN, STDOUT, SessionEvent, WINDOW};
use banger_wire::frame::{DATA_LEN_MAX, Frame, Kind};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc};

/// How long a listener may take to be connected to: it is in this machine.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// Connects, and carries bytes until both directions have ended or either side gives up.
pub(crate) async fn run(
    session: u32,
    address: SocketAddr,
    mut inbox: mpsc::UnboundedReceiver<Frame>,
    out: mpsc::Sender<Frame>,
) {
    // The host sends what fits the window without waiting.
    let mut early = Vec::new();
    let connecting = tokio::time::timeout(CONNECT_TIME, connect(address));
    tokio::pin!(connecting);
    let stream = loop {
        tokio::select! {
            connected = &mut connecting => {
                break connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            }
            frame = inbox.recv() => match frame {
                Some(frame) if frame.kind != Kind::Close => early.push(frame),
                _ => return,
            },
        }
    };
    let done = match stream {
        Ok(stream) => carry(session, stream, early, &mut inbox, &out).await,
        Err(error) => Some(Err(error)),
    };
    let event = match done {
        None => return,
        Some(Ok(())) => SessionEvent::Exited(ExitStatus::Code(0)),
        Some(Err(error)) => {
            let message = format!("the connection to {address} in the guest failed");
            SessionEvent::Failed(WireError {
                causes: vec![error.to_string()],
                ..WireError::new(ErrorCode::Failed, message)
            })
        }
    };
    if let Ok(frame) = Frame::message(session, &event) {
        let _ = out.send(frame).await;
    }
    let _ = out.send(Frame::close(session)).await;
}

/// What listens at all addresses is reached by the loopback. One of IPv6 takes both kinds as a rule, and the guest may
/// have no IPv6 to reach it by.
async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    if !address.ip().is_unspecified() {
        return TcpStream::connect(address).await;
    }
    match TcpStream::connect((Ipv4Addr::LOCALHOST, address.port())).await {
        Err(error) if address.is_ipv6() && error.kind() == io::ErrorKind::ConnectionRefused => {
            TcpStream::connect((Ipv6Addr::LOCALHOST, address.port())).await
        }
        connected => connected,
    }
}

/// None when the host closed the session: dropping the stream then tells the listener.
async fn carry(
    session: u32,
    stream: TcpStream,
    early: Vec<Frame>,
    inbox: &mut mpsc::UnboundedReceiver<Frame>,
    out: &mpsc::Sender<Frame>,
) -> Option<io::Result<()>> {
    let _ = stream.set_nodelay(true);
    let (read, write) = stream.into_split();
    let (input, queue) = mpsc::unbounded_channel();
    let mut input = Some(input);
    let window = Rc::new(Semaphore::new(WINDOW as usize));
    let both = both(
        pump_out(session, read, Rc::clone(&window), out.clone()),
        pump_in(session, write, queue, out.clone()),
    );
    tokio::pin!(both);
    let mut receive = |frame: Frame| match (frame.kind, frame.channel) {
        (Kind::Data, STDIN) => {
            if let Some(input) = &input {
                let _ = input.send(frame.payload);
            }
        }
        (Kind::Eof, STDIN) => input = None,
        (Kind::Credit, STDOUT) => {
            let bytes = frame.parse_credit().unwrap_or(0) as usize;
            if window.available_permits() + bytes <= WINDOW as usize {
                window.add_permits(bytes);
            }
        }
        _ => {}
    };
    early.into_iter().for_each(&mut receive);
    loop {
        tokio::select! {
            done = &mut both => return Some(done),
            frame = inbox.recv() => receive(frame.filter(|frame| frame.kind != Kind::Close)?),
        }
    }
}

/// Waits for the ends of both directions. A listener that takes nothing more may have said something before, which is
/// still read; one that can't be read from any more has gone.
async fn both(
    from_guest: impl Future<Output = io::Result<()>>,
    to_guest: impl Future<Output = io::Result<()>>,
) -> io::Result<()> {
    tokio::pin!(from_guest, to_guest);
    tokio::select! {
        ended = &mut from_guest => {
            ended?;
            to_guest.await
        }
        ended = &mut to_guest => {
            from_guest.await?;
            ended
        }
    }
}

/// What the listener says goes out while the host has granted room.
async fn pump_out(
    session: u32,
    mut read: OwnedReadHalf,
    window: Rc<Semaphore>,
    out: mpsc::Sender<Frame>,
) -> io::Result<()> {
    let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
    loop {
        drop(window.acquire().await);
        let room = window.available_permits().min(DATA_LEN_MAX);
        let piece = read_piece(&mut read, room).await?;
        if piece.is_empty() {
            return out.send(Frame::eof(session, STDOUT)).await.map_err(|_| gone());
        }
        window.forget_permits(piece.len());
        out.send(Frame::data(session, STDOUT, piece)).await.map_err(|_| gone())?;
    }
}

/// What the client says goes to the listener, and then the end of it.
async fn pump_in(
    session: u32,
    mut write: OwnedWriteHalf,
    mut queue: mpsc::UnboundedReceiver<Vec<u8>>,
    out: mpsc::Sender<Frame>,
) -> io::Result<()> {
    while let Some(bytes) = queue.recv().await {
        write.write_all(&bytes).await?;
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let credit = Frame::credit(session, STDIN, len);
        out.send(credit).await.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
    }
    write.shutdown().await
}
