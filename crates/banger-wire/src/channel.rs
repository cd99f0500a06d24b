//! A session's channels as blocking streams, for code on a thread of its own.
//!
//! ```text
//! thread: ChannelWriter ── pieces ──> task: data frames, while there is credit
//! thread: ChannelReader <── pieces ── task: data frames; what was read ──> credit
//! ```

use crate::frame::DATA_LEN_MAX;
use std::io::{ErrorKind, Read, Write};
use tokio::sync::mpsc;

/// Pieces that wait for the task: enough that neither waits for the other at each one.
const PIECES: usize = 4;

/// Writes into a channel; full pieces, and at a flush what there is. Dropping it without a flush loses that.
#[derive(Debug)]
pub struct ChannelWriter {
    piece: Vec<u8>,
    pieces: mpsc::Sender<Vec<u8>>,
}

/// Returns a writer, and the pieces that come out of it; they end with the writer.
#[must_use]
pub fn writer() -> (ChannelWriter, mpsc::Receiver<Vec<u8>>) {
    let (pieces, receive) = mpsc::channel(PIECES);
    (ChannelWriter { piece: Vec::with_capacity(DATA_LEN_MAX), pieces }, receive)
}

impl Write for ChannelWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let len = bytes.len().min(DATA_LEN_MAX - self.piece.len());
        self.piece.extend_from_slice(&bytes[..len]);
        if self.piece.len() == DATA_LEN_MAX {
            self.flush()?;
        }
        Ok(len)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(DATA_LEN_MAX));
        self.pieces.blocking_send(piece).map_err(|_| ErrorKind::BrokenPipe.into())
    }
}

/// Reads from a channel, and says how much it has read.
#[derive(Debug)]
pub struct ChannelReader {
    piece: Vec<u8>,
    start: usize,
    pieces: mpsc::UnboundedReceiver<Vec<u8>>,
    read: mpsc::UnboundedSender<usize>,
}

/// Where a [`ChannelReader`] gets its bytes. The peer's window bounds what waits in it.
#[derive(Debug)]
pub struct Feed {
    /// Takes pieces; the reader's stream ends when this is dropped.
    pub pieces: mpsc::UnboundedSender<Vec<u8>>,
    /// Lengths of pieces that were read, to be granted anew.
    pub read: mpsc::UnboundedReceiver<usize>,
}

/// Returns a reader and what feeds it.
#[must_use]
pub fn reader() -> (ChannelReader, Feed) {
    let (pieces, receive) = mpsc::unbounded_channel();
    let (tell, read) = mpsc::unbounded_channel();
    (ChannelReader { piece: Vec::new(), start: 0, pieces: receive, read: tell }, Feed { pieces, read })
}

impl Read for ChannelReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.start == self.piece.len() {
            let Some(piece) = self.pieces.blocking_recv() else { return Ok(0) };
            // Whoever does not listen any more has no use for the credit.
            let _ = self.read.send(piece.len());
            (self.piece, self.start) = (piece, 0);
        }
        let len = buffer.len().min(self.piece.len() - self.start);
        buffer[..len].copy_from_slice(&self.piece[self.start..self.start + len]);
        self.start += len;
        Ok(len)
    }
}
