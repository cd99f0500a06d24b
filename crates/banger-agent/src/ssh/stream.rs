//! What carries the bytes of one channel: the client's grant, what is sent within it, what was received.

use super::fields::Packet;
pub(crate) use crate::session::{Reader, Writer};
use std::cell::Cell;
use std::rc::Rc;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{Semaphore, mpsc};

/// Bytes that a client may have on its way into one channel.
pub(crate) const WINDOW: u32 = 512 * 1024;
/// Longest piece of data in one packet, of either side (RFC 4254, section 5.2, has everybody take this much).
pub(crate) const DATA_LEN_MAX: usize = 32 * 1024;

const DATA: u8 = 94;
const EXTENDED_DATA: u8 = 95;
/// Number of standard error among extended data.
pub(crate) const STDERR: u32 = 1;

/// What the tasks of channels tell the connection.
pub(crate) enum Event {
    /// Passes a packet of this channel's on. One that has gone has nothing more to say: the client may have another channel
    /// by its number there.
    Send { channel: u32, packet: Packet },
    /// So many bytes of this channel's input were passed on.
    Consumed { channel: u32, len: usize },
    /// Nothing more comes out of this channel.
    Ended { channel: u32 },
    /// A channel that the client wants to be connected to something is, or why not.
    Connected { channel: u32, streams: Result<(Reader, Writer), String> },
    /// Somebody came where the client has us listen. `details` follow what every channel's opening has.
    Accepted { kind: &'static str, details: Packet, streams: (Reader, Writer) },
}

/// Tells the connection; it waits while that is behind with sending.
pub(crate) type Events = mpsc::Sender<Event>;

/// The numbers of a channel: ours, and the client's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ends {
    pub(crate) local: u32,
    pub(crate) remote: u32,
}

/// How many bytes the client takes, and how far sending is.
#[derive(Debug)]
pub(crate) struct Grant {
    window: Semaphore,
    piece_len_max: usize,
    sent: Cell<u64>,
    waiting: Cell<u32>,
}

impl Grant {
    pub(crate) fn new(window: u32, piece_len_max: u32) -> Rc<Self> {
        Rc::new(Self {
            window: Semaphore::new(window as usize),
            piece_len_max: (piece_len_max as usize).clamp(1, DATA_LEN_MAX),
            sent: Cell::new(0),
            waiting: Cell::new(0),
        })
    }

    /// Adds what the client takes more. A window of more than 4 GiB can't be (RFC 4254, section 5.2).
    pub(crate) fn add(&self, bytes: u32) {
        if self.window.available_permits() + (bytes as usize) <= u32::MAX as usize {
            self.window.add_permits(bytes as usize);
        }
    }

    /// Bytes sent so far, and whether the client is waited for.
    pub(crate) fn progress(&self) -> (u64, bool) {
        (self.sent.get(), self.waiting.get() > 0)
    }
}

/// Sends bytes as data of a channel; `kind` is that of extended data. None when the connection is over.
pub(crate) async fn send(
    mut bytes: &[u8],
    to: Ends,
    kind: Option<u32>,
    grant: &Grant,
    events: &Events,
) -> Option<()> {
    while !bytes.is_empty() {
        grant.waiting.set(grant.waiting.get() + 1);
        let len = bytes.len().min(grant.piece_len_max).min(grant.window.available_permits().max(1));
        let granted = grant.window.acquire_many(u32::try_from(len).unwrap_or(1)).await;
        if let Ok(granted) = granted {
            granted.forget();
        }
        let (piece, rest) = bytes.split_at(len);
        bytes = rest;
        let packet = match kind {
            None => Packet::new(DATA).number(to.remote),
            Some(kind) => Packet::new(EXTENDED_DATA).number(to.remote).number(kind),
        };
        let sent = events.send(Event::Send { channel: to.local, packet: packet.bytes(piece) }).await;
        grant.waiting.set(grant.waiting.get() - 1);
        grant.sent.set(grant.sent.get() + len as u64);
        sent.ok()?;
    }
    Some(())
}

/// Sends what is read, to its end.
pub(crate) async fn pump(mut reader: Reader, to: Ends, kind: Option<u32>, grant: Rc<Grant>, events: Events) {
    let mut chunk = vec![0; DATA_LEN_MAX];
    // A terminal whose last process has gone reads as an error: its end.
    while let Ok(len @ 1..) = reader.read(&mut chunk).await {
        if send(&chunk[..len], to, kind, &grant, &events).await.is_none() {
            return;
        }
    }
}

/// Writes what was received. What nobody wants any more counts as passed on.
pub(crate) async fn feed(
    mut writer: Writer,
    mut queue: mpsc::UnboundedReceiver<Vec<u8>>,
    channel: u32,
    events: Events,
    last: &'static [u8],
) {
    let mut broken = false;
    while let Some(bytes) = queue.recv().await {
        broken = broken || writer.write_all(&bytes).await.is_err();
        if events.send(Event::Consumed { channel, len: bytes.len() }).await.is_err() {
            return;
        }
    }
    if !last.is_empty() {
        let _ = writer.write_all(last).await;
    }
    let _ = writer.shutdown().await;
}
