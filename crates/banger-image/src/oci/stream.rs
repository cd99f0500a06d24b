//! Layers from their files to a reader: decompressed on a thread of its own, hashed and measured.
//!
//! ```text
//! decompressor thread:  layer 1 ── chunks ──┐   starts with layer 2 while the end of layer 1 is still being written
//!                       layer 2 ── chunks ──┴─> LayerReader ──> tar ──> ext4
//! ```
//!
//! Memory is bounded by the chunks on the way, which are reused. What a layer is compressed with is told from its first
//! bytes, as other tools do: registries and their tools get the type wrong.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use crate::hash::{Algorithm, Hasher};

use super::blob::BlobError;
use super::digest::Digest;
use super::limits::Limits;
use flate2::bufread::MultiGzDecoder;

/// Bytes handed over at a time.
const CHUNK: usize = 256 << 10;
/// Chunks on the way: 4 MiB, enough to keep both ends busy through a burst of small files.
const CHUNKS: usize = 16;
/// Bytes read from a file at once.
pub(super) const FILE_BUFFER: usize = 128 << 10;
/// The largest zstd window accepted, as a power of two: what `zstd --ultra -22` writes.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// A layer can't be read.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// Its file isn't there.
    #[error("could not get the layer's file")]
    Blob(#[source] BlobError),
    /// The file can't be read.
    #[error("could not read the layer's file")]
    File(#[source] io::Error),
    /// It is damaged.
    #[error("could not decompress the layer")]
    Decompress(#[source] io::Error),
    /// It unpacks to more than it may.
    #[error("the image unpacks to more than the {0} bytes allowed")]
    TooLarge(u64),
    /// It unpacks to many times its size.
    #[error("the layer unpacks to more than {ratio} times its {compressed} bytes, as no real one does")]
    Ratio {
        /// The limit.
        ratio: u64,
        /// The layer's size, as far as it was read.
        compressed: u64,
    },
    /// Nobody wants it any more.
    #[error("interrupted")]
    Interrupted,
}

enum Message {
    Chunk(Vec<u8>),
    End,
    Failed(StreamError),
}

/// Where the layers come from, and what may stop them.
pub(crate) struct Source<'a> {
    /// Waits for a layer's file.
    pub(crate) wait: &'a (dyn Fn(usize) -> Result<PathBuf, BlobError> + Sync),
    /// How many there are.
    pub(crate) count: usize,
    pub(crate) limits: &'a Limits,
    /// Set when nobody waits for the result any more.
    pub(crate) cancelled: &'a AtomicBool,
    /// Counts compressed bytes that were read.
    pub(crate) read: &'a AtomicU64,
}

/// Calls `consume` with the layers' readers, while they are decompressed beside it.
pub(crate) fn with_layers<T>(source: &Source<'_>, consume: impl FnOnce(&mut Layers) -> T) -> T {
    let (filled, chunks) = sync_channel(CHUNKS);
    let (back, empty) = sync_channel(CHUNKS + 2);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut decompressor = Decompressor { source, filled, empty, unpacked: 0 };
            for at in 0..source.count {
                let ending = match decompressor.layer(at) {
                    Ok(true) => Message::End,
                    Ok(false) => return,
                    Err(err) => Message::Failed(err),
                };
                let failed = matches!(ending, Message::Failed(_));
                if decompressor.filled.send(ending).is_err() || failed {
                    return;
                }
            }
        });
        // Dropping the receiver at the end of `consume` ends the thread.
        consume(&mut Layers { chunks, back })
    })
}

struct Decompressor<'a> {
    source: &'a Source<'a>,
    filled: SyncSender<Message>,
    empty: Receiver<Vec<u8>>,
    unpacked: u64,
}

impl Decompressor<'_> {
    /// Sends one layer; false when nobody takes it.
    fn layer(&mut self, at: usize) -> Result<bool, StreamError> {
        let path = (self.source.wait)(at).map_err(StreamError::Blob)?;
        let file = File::open(path).map_err(StreamError::File)?;
        let compressed = AtomicU64::new(0);
        let counted = Counted { file, here: &compressed, all: self.source.read };
        let mut reader = open(BufReader::with_capacity(FILE_BUFFER, counted))?;
        let (limits, mut unpacked) = (self.source.limits, 0);
        loop {
            if self.source.cancelled.load(Ordering::Relaxed) {
                return Err(StreamError::Interrupted);
            }
            let mut chunk = self.empty.try_recv().unwrap_or_default();
            chunk.resize(CHUNK, 0);
            let got = fill(&mut reader, &mut chunk).map_err(StreamError::Decompress)?;
            if got == 0 {
                return Ok(true);
            }
            chunk.truncate(got);
            unpacked += got as u64;
            self.unpacked += got as u64;
            if self.unpacked > limits.unpacked_bytes {
                return Err(StreamError::TooLarge(limits.unpacked_bytes));
            }
            let compressed = compressed.load(Ordering::Relaxed);
            if unpacked > limits.ratio_free_bytes && unpacked > compressed.saturating_mul(limits.ratio) {
                return Err(StreamError::Ratio { ratio: limits.ratio, compressed });
            }
            if self.filled.send(Message::Chunk(chunk)).is_err() {
                return Ok(false);
            }
        }
    }
}

fn fill(reader: &mut dyn Read, chunk: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < chunk.len() {
        match reader.read(&mut chunk[got..]) {
            Ok(0) => break,
            Ok(count) => got += count,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
    Ok(got)
}

/// Finds out how a layer, or an archive of layers, is compressed.
pub(super) fn open<'a, R: Read + 'a>(mut file: BufReader<R>) -> Result<Box<dyn Read + 'a>, StreamError> {
    use std::io::BufRead as _;
    let start = file.fill_buf().map_err(StreamError::File)?;
    let is_zstd_skippable = start.len() >= 4 && start[0] & 0xf0 == 0x50 && start[1..4] == [0x2a, 0x4d, 0x18];
    if start.starts_with(&[0x1f, 0x8b]) {
        Ok(Box::new(MultiGzDecoder::new(file)))
    } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || is_zstd_skippable {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(file).map_err(StreamError::Decompress)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(StreamError::Decompress)?;
        Ok(Box::new(decoder))
    } else {
        Ok(Box::new(file))
    }
}

struct Counted<'a> {
    file: File,
    here: &'a AtomicU64,
    all: &'a AtomicU64,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.file.read(buffer)?;
        self.here.fetch_add(got as u64, Ordering::Relaxed);
        self.all.fetch_add(got as u64, Ordering::Relaxed);
        Ok(got)
    }
}

/// The receiving end of all layers.
pub(crate) struct Layers {
    chunks: Receiver<Message>,
    back: SyncSender<Vec<u8>>,
}

impl Layers {
    /// Begins with the next layer, whose content is hashed with this; the one before must have been read to its end.
    pub(crate) fn next(&mut self, algorithm: Algorithm) -> LayerReader<'_> {
        LayerReader { layers: self, chunk: Vec::new(), at: 0, hash: Hasher::new(algorithm), ended: false }
    }
}

/// One layer, uncompressed.
pub(crate) struct LayerReader<'a> {
    layers: &'a mut Layers,
    chunk: Vec<u8>,
    at: usize,
    hash: Hasher,
    ended: bool,
}

impl LayerReader<'_> {
    /// Reads what is left and returns the digest of the whole.
    pub(crate) fn finish(mut self) -> io::Result<Digest> {
        while !self.ended {
            self.at = self.chunk.len();
            self.refill()?;
        }
        Ok(self.hash.into())
    }

    fn refill(&mut self) -> io::Result<()> {
        let used = std::mem::take(&mut self.chunk);
        self.at = 0;
        if used.capacity() > 0 {
            // No room, or nobody there: then it is freed instead.
            let _ = self.layers.back.try_send(used);
        }
        match self.layers.chunks.recv() {
            Ok(Message::Chunk(chunk)) => {
                self.hash.update(&chunk);
                self.chunk = chunk;
            }
            Ok(Message::End) => self.ended = true,
            Ok(Message::Failed(err)) => return Err(io::Error::other(err)),
            Err(_) => return Err(io::Error::other(StreamError::Interrupted)),
        }
        Ok(())
    }
}

impl Read for LayerReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.chunk.len() && !self.ended {
            self.refill()?;
        }
        let count = buffer.len().min(self.chunk.len() - self.at);
        buffer[..count].copy_from_slice(&self.chunk[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}
