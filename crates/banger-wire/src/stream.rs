//! Frames over an asynchronous stream.

use crate::frame::{Decoder, Frame, FrameError, HEADER_LEN, SYNC};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Bytes asked of the stream at once: one full data frame.
const READ_LEN: usize = crate::frame::DATA_LEN_MAX + HEADER_LEN;

/// A conversation could not go on.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The connection failed.
    #[error("connection failed")]
    Io(#[from] std::io::Error),
    /// The peer broke the protocol.
    #[error("peer broke the protocol")]
    Frame(#[from] FrameError),
    /// The peer closed the connection in the middle of a frame.
    #[error("connection ended in the middle of a frame")]
    Truncated,
}

/// Reads frames.
#[derive(Debug)]
pub struct FrameReader<R> {
    inner: R,
    decoder: Decoder,
    chunk: Vec<u8>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Returns a reader that accepts messages of at most `message_len_max` bytes.
    pub fn new(inner: R, message_len_max: usize) -> Self {
        Self { inner, decoder: Decoder::new(message_len_max), chunk: vec![0; READ_LEN] }
    }

    /// Returns the next frame, or none at the end of the connection. Cancel-safe.
    ///
    /// # Errors
    /// When the connection fails or the peer breaks the protocol.
    pub async fn next(&mut self) -> Result<Option<Frame>, StreamError> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(Some(frame));
            }
            let len = self.inner.read(&mut self.chunk).await?;
            if len == 0 {
                return if self.decoder.has_partial() { Err(StreamError::Truncated) } else { Ok(None) };
            }
            self.decoder.push(&self.chunk[..len]);
        }
    }
}

/// Writes frames. Each frame is flushed as it is written.
#[derive(Debug)]
pub struct FrameWriter<W> {
    inner: W,
    /// The last frame's bytes, for its room.
    bytes: Vec<u8>,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// Returns a writer.
    pub fn new(inner: W) -> Self {
        Self { inner, bytes: Vec::new() }
    }

    /// Writes the marker that begins a conversation on a resyncing transport.
    ///
    /// # Errors
    /// When the connection fails.
    pub async fn sync(&mut self) -> Result<(), StreamError> {
        self.inner.write_all(&SYNC).await?;
        Ok(self.inner.flush().await?)
    }

    /// Writes one frame. Not cancel-safe: give up the connection after cancelling.
    ///
    /// # Errors
    /// When the connection fails.
    pub async fn write(&mut self, frame: &Frame) -> Result<(), StreamError> {
        self.bytes.clear();
        // A message may have been far longer than what there is room for between frames.
        self.bytes.shrink_to(READ_LEN);
        frame.encode(&mut self.bytes);
        self.inner.write_all(&self.bytes).await?;
        Ok(self.inner.flush().await?)
    }

    /// Writes a message of the given session.
    ///
    /// # Errors
    /// When it can't be encoded or the connection fails.
    pub async fn message<T: serde::Serialize>(
        &mut self,
        session: u32,
        message: &T,
    ) -> Result<(), StreamError> {
        self.write(&Frame::message(session, message)?).await
    }
}
