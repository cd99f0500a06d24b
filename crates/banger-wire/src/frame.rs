//! The frame codec of every local conversation.
//!
//! ```text
//! 0        4         8      9     10        12
//! | length | session | kind | chan | check   | payload …
//! ```
//!
//! All numbers little-endian. `check` covers the ten bytes before it, so that a reader that starts in the middle
//! of old frames (a virtio-serial port after a reconnect) notices at once instead of trusting a random length.
//! It then looks for [`SYNC`], which each side sends first on a new connection of such a transport.
//!
//! The decoder holds at most one frame and what came behind it, and never allocates more than a length it has checked
//! against its limit.

/// Bytes of a header.
pub const HEADER_LEN: usize = 12;
/// Largest payload of a data frame that is sent. Small enough that a keystroke waits behind at most one of these. With
/// its header it is 64 KiB, which Linux takes in two writes to a virtio-serial port.
pub const DATA_LEN_MAX: usize = 64 * 1024 - HEADER_LEN;
/// Largest payload of a data frame that is accepted: agents in vms that an earlier banger started send as much.
const DATA_LEN_ACCEPTED: usize = 64 * 1024;
/// Largest message a host program accepts from another, or the agent from the host: a full argument list
/// (2 MiB of `ARG_MAX`) in its worst encoding.
pub const MESSAGE_LEN_MAX: usize = 4 * 1024 * 1024;
/// Largest message accepted from a guest: events are small, a guest is not trusted.
pub const GUEST_MESSAGE_LEN_MAX: usize = 256 * 1024;
/// Marks the beginning of a conversation on a transport that can start in the middle of an older one.
pub const SYNC: [u8; 16] = *b"\x00banger-sync-1\xff\n";

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A JSON message.
    Message,
    /// Bytes of a channel.
    Data,
    /// Four bytes: how many more bytes the peer may send on the channel.
    Credit,
    /// No more data on the channel.
    Eof,
    /// The session is over; frames of it that are still under way are ignored.
    Close,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Message,
            1 => Self::Data,
            2 => Self::Credit,
            3 => Self::Eof,
            4 => Self::Close,
            _ => return None,
        })
    }

    fn byte(self) -> u8 {
        match self {
            Self::Message => 0,
            Self::Data => 1,
            Self::Credit => 2,
            Self::Eof => 3,
            Self::Close => 4,
        }
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The session it belongs to; 0 is the connection itself.
    pub session: u32,
    /// What it carries.
    pub kind: Kind,
    /// Channel within the session; 0 where it means nothing.
    pub channel: u8,
    /// The payload.
    pub payload: Vec<u8>,
}

/// The peer broke the protocol.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The header's check does not match.
    #[error("frame header is damaged")]
    Damaged,
    /// The kind byte has no meaning.
    #[error("frame kind {kind} is unknown")]
    UnknownKind {
        /// The byte.
        kind: u8,
    },
    /// The payload is longer than this end accepts.
    #[error("frame of {len} bytes exceeds the limit of {limit}")]
    TooLong {
        /// Announced length.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// A message is not the JSON that was expected.
    #[error("message is malformed")]
    Malformed(#[source] serde_json::Error),
    /// A credit frame is not four bytes.
    #[error("credit frame of {len} bytes")]
    BadCredit {
        /// Its length.
        len: usize,
    },
}

impl Frame {
    /// Returns a message frame.
    ///
    /// # Errors
    /// When the message can't be encoded or is longer than [`MESSAGE_LEN_MAX`].
    pub fn message<T: serde::Serialize>(session: u32, message: &T) -> Result<Self, FrameError> {
        let payload = serde_json::to_vec(message).map_err(FrameError::Malformed)?;
        if payload.len() > MESSAGE_LEN_MAX {
            return Err(FrameError::TooLong { len: payload.len(), limit: MESSAGE_LEN_MAX });
        }
        Ok(Self { session, kind: Kind::Message, channel: 0, payload })
    }

    /// Returns a data frame; the caller keeps `bytes` within [`DATA_LEN_MAX`].
    #[must_use]
    pub fn data(session: u32, channel: u8, bytes: Vec<u8>) -> Self {
        debug_assert!(bytes.len() <= DATA_LEN_MAX);
        Self { session, kind: Kind::Data, channel, payload: bytes }
    }

    /// Returns a frame that allows the peer `bytes` more on the channel.
    #[must_use]
    pub fn credit(session: u32, channel: u8, bytes: u32) -> Self {
        Self { session, kind: Kind::Credit, channel, payload: bytes.to_le_bytes().to_vec() }
    }

    /// Returns the end of a channel.
    #[must_use]
    pub fn eof(session: u32, channel: u8) -> Self {
        Self { session, kind: Kind::Eof, channel, payload: Vec::new() }
    }

    /// Returns the end of a session.
    #[must_use]
    pub fn close(session: u32) -> Self {
        Self { session, kind: Kind::Close, channel: 0, payload: Vec::new() }
    }

    /// Decodes the message of a message frame.
    ///
    /// # Errors
    /// When the payload is not such a message.
    pub fn parse<T: serde::de::DeserializeOwned>(&self) -> Result<T, FrameError> {
        serde_json::from_slice(&self.payload).map_err(FrameError::Malformed)
    }

    /// Returns the number of bytes a credit frame grants.
    ///
    /// # Errors
    /// When the payload is not four bytes.
    pub fn parse_credit(&self) -> Result<u32, FrameError> {
        let bytes: [u8; 4] = self
            .payload
            .as_slice()
            .try_into()
            .map_err(|_| FrameError::BadCredit { len: self.payload.len() })?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Returns the header that precedes this frame's payload on the wire.
    #[must_use]
    pub fn header(&self) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        let len = u32::try_from(self.payload.len()).unwrap_or(u32::MAX);
        header[0..4].copy_from_slice(&len.to_le_bytes());
        header[4..8].copy_from_slice(&self.session.to_le_bytes());
        header[8] = self.kind.byte();
        header[9] = self.channel;
        let check = check(&header);
        header[10..12].copy_from_slice(&check.to_le_bytes());
        header
    }

    /// Appends the frame's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.header());
        out.extend_from_slice(&self.payload);
    }
}

/// FNV-1a over the first ten bytes, folded: no secrecy wanted, only that garbage is noticed.
fn check(header: &[u8; HEADER_LEN]) -> u16 {
    let mut hash: u32 = 0x811c_9dc5;
    for &byte in &header[..10] {
        hash = (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    }
    ((hash >> 16) ^ (hash & 0xffff)) as u16
}

/// Splits a byte stream into frames.
#[derive(Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
    /// A frame whose header is here and whose payload is not yet, and the length that the payload will have.
    partial: Option<(Frame, usize)>,
    message_len_max: usize,
    synced: bool,
}

impl Decoder {
    /// Returns a decoder for a reliable connection that begins with a frame.
    #[must_use]
    pub fn new(message_len_max: usize) -> Self {
        Self { buffer: Vec::new(), start: 0, partial: None, message_len_max, synced: true }
    }

    /// Returns a decoder that ignores everything up to and including [`SYNC`], and does so again after damage.
    #[must_use]
    pub fn resyncing(message_len_max: usize) -> Self {
        Self { synced: false, ..Self::new(message_len_max) }
    }

    /// Adds received bytes.
    pub fn push(&mut self, mut bytes: &[u8]) {
        if let Some((frame, len)) = &mut self.partial {
            let missing = bytes.len().min(*len - frame.payload.len());
            frame.payload.extend_from_slice(&bytes[..missing]);
            bytes = &bytes[missing..];
        }
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Goes back to looking for [`SYNC`]; call it after a [`FrameError::Damaged`] on a resyncing transport.
    pub fn resync(&mut self) {
        self.synced = false;
    }

    /// Returns true when a [`SYNC`] was seen since creation or the last [`Self::resync`].
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// Returns true when the beginning of a frame is buffered.
    #[must_use]
    pub fn has_partial(&self) -> bool {
        self.synced && (self.partial.is_some() || self.start < self.buffer.len())
    }

    /// Returns the next whole frame, or none when more bytes are needed.
    ///
    /// A [`SYNC`] in front of a frame is skipped: a peer that has restarted sends it again.
    ///
    /// # Errors
    /// When the peer broke the protocol; the connection is then of no more use, unless resynced.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            if let Some((frame, len)) = self.partial.take() {
                if frame.payload.len() == len {
                    return Ok(Some(frame));
                }
                self.partial = Some((frame, len));
                return Ok(None);
            }
            if !self.synced && !self.find_sync() {
                return Ok(None);
            }
            let bytes = &self.buffer[self.start..];
            if bytes.first() == Some(&SYNC[0]) && bytes.len() >= SYNC.len() && bytes[..SYNC.len()] == SYNC {
                self.start += SYNC.len();
                continue;
            }
            let Some(header) = bytes.first_chunk::<HEADER_LEN>() else { return Ok(None) };
            // A header can't begin like SYNC and carry a valid check, but SYNC may still be incomplete here.
            if SYNC.starts_with(header) && bytes.len() < SYNC.len() {
                return Ok(None);
            }
            let (len, kind) = self.check_header(header)?;
            let here = &bytes[HEADER_LEN..bytes.len().min(HEADER_LEN + len)];
            let mut payload = Vec::with_capacity(len);
            payload.extend_from_slice(here);
            self.start += HEADER_LEN + here.len();
            let session = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
            let channel = header[9];
            self.partial = Some((Frame { session, kind, channel, payload }, len));
        }
    }

    fn check_header(&self, header: &[u8; HEADER_LEN]) -> Result<(usize, Kind), FrameError> {
        if u16::from_le_bytes([header[10], header[11]]) != check(header) {
            return Err(FrameError::Damaged);
        }
        let kind = Kind::from_byte(header[8]).ok_or(FrameError::UnknownKind { kind: header[8] })?;
        let len = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let limit = match kind {
            Kind::Message => self.message_len_max,
            Kind::Data => DATA_LEN_ACCEPTED,
            Kind::Credit => 4,
            Kind::Eof | Kind::Close => 0,
        };
        if len > limit {
            return Err(FrameError::TooLong { len, limit });
        }
        Ok((len, kind))
    }

    /// Drops bytes up to the end of a SYNC; keeps a possible beginning of one at the end of the buffer.
    fn find_sync(&mut self) -> bool {
        let bytes = &self.buffer[self.start..];
        if let Some(at) = bytes.windows(SYNC.len()).position(|window| window == SYNC) {
            self.start += at + SYNC.len();
            self.synced = true;
            return true;
        }
        let keep = bytes.len().min(SYNC.len() - 1);
        self.start = self.buffer.len() - keep;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame_strategy() -> impl Strategy<Value = Frame> {
        (any::<u32>(), 0u8..5, any::<u8>(), proptest::collection::vec(any::<u8>(), 0..200)).prop_map(
            |(session, kind, channel, bytes)| {
                let kind = Kind::from_byte(kind).unwrap();
                let payload = match kind {
                    Kind::Message | Kind::Data => bytes,
                    Kind::Credit => vec![1, 2, 3, 4],
                    Kind::Eof | Kind::Close => Vec::new(),
                };
                Frame { session, kind, channel, payload }
            },
        )
    }

    proptest! {
        #[test]
        fn frames_survive_any_split(frames in proptest::collection::vec(frame_strategy(), 1..8), step in 1usize..50) {
            let mut bytes = SYNC.to_vec();
            frames.iter().for_each(|frame| frame.encode(&mut bytes));
            let mut decoder = Decoder::resyncing(MESSAGE_LEN_MAX);
            let mut got = Vec::new();
            for part in bytes.chunks(step) {
                decoder.push(part);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    got.push(frame);
                }
            }
            prop_assert_eq!(got, frames);
        }

        #[test]
        fn garbage_never_panics_and_never_buffers_more_than_given(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let mut decoder = Decoder::new(GUEST_MESSAGE_LEN_MAX);
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next_frame() {}
        }
    }

    #[test]
    fn a_reader_that_starts_in_the_middle_waits_for_sync() {
        let mut old = Vec::new();
        Frame::data(7, 1, vec![b'x'; 1000]).encode(&mut old);
        let mut decoder = Decoder::resyncing(MESSAGE_LEN_MAX);
        decoder.push(&old[300..]);
        assert_eq!(decoder.next_frame().unwrap(), None);
        let mut fresh = SYNC.to_vec();
        Frame::eof(1, 0).encode(&mut fresh);
        decoder.push(&fresh);
        assert_eq!(decoder.next_frame().unwrap(), Some(Frame::eof(1, 0)));
    }

    #[test]
    fn a_repeated_sync_between_frames_is_skipped() {
        let mut bytes = Vec::new();
        Frame::close(3).encode(&mut bytes);
        bytes.extend_from_slice(&SYNC);
        Frame::close(4).encode(&mut bytes);
        let mut decoder = Decoder::new(100);
        decoder.push(&bytes);
        assert_eq!(decoder.next_frame().unwrap(), Some(Frame::close(3)));
        assert_eq!(decoder.next_frame().unwrap(), Some(Frame::close(4)));
    }

    #[test]
    fn too_long_is_refused_before_it_is_read() {
        let mut bytes = Vec::new();
        Frame { session: 0, kind: Kind::Message, channel: 0, payload: vec![b' '; 101] }.encode(&mut bytes);
        let mut decoder = Decoder::new(100);
        decoder.push(&bytes[..HEADER_LEN]);
        assert!(matches!(decoder.next_frame(), Err(FrameError::TooLong { len: 101, limit: 100 })));
    }

    #[test]
    fn a_frame_of_an_earlier_agent_is_taken_whole_and_no_longer_one() {
        let frame = Frame { session: 1, kind: Kind::Data, channel: 1, payload: vec![7; 64 * 1024] };
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        Frame::close(1).encode(&mut bytes);
        let mut decoder = Decoder::new(100);
        for part in bytes.chunks(4096) {
            assert_eq!(decoder.next_frame().unwrap(), None);
            decoder.push(part);
        }
        assert_eq!(decoder.next_frame().unwrap(), Some(frame.clone()));
        assert_eq!(decoder.next_frame().unwrap(), Some(Frame::close(1)));
        assert!(!decoder.has_partial());
        let mut bytes = Vec::new();
        Frame { payload: vec![7; 64 * 1024 + 1], ..frame }.encode(&mut bytes);
        decoder.push(&bytes);
        assert!(matches!(decoder.next_frame(), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn one_flipped_bit_in_a_header_is_noticed() {
        let mut bytes = Vec::new();
        Frame::data(1, 1, vec![0; 4]).encode(&mut bytes);
        for bit in 0..80 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let mut decoder = Decoder::new(100);
            decoder.push(&damaged);
            assert!(matches!(decoder.next_frame(), Err(FrameError::Damaged)), "bit {bit}");
        }
    }
}
