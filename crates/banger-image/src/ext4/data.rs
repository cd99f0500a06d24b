//! The data of a file, cut into chunks of whole blocks.

use super::WriterError;
use super::format::{BLOCK, BLOCK_LEN};
use std::io::{self, Read};

/// Reads the pieces of a file and fills the rest of the blocks they touch with zeroes.
pub(super) struct Pieces<'a> {
    size: u64,
    pieces: &'a [(u64, u64)],
    data: &'a mut dyn Read,
    /// Where in the file the next chunk begins.
    at: u64,
    /// Bytes of data read.
    got: u64,
}

impl<'a> Pieces<'a> {
    pub(super) fn new(size: u64, pieces: &'a [(u64, u64)], data: &'a mut dyn Read) -> Self {
        Self { size, pieces, data, at: 0, got: 0 }
    }

    /// Fills `chunk` (of whole blocks) from the next block with data on; returns that block's number and how many bytes,
    /// padded to whole blocks, there are. `None` after the last piece.
    pub(super) fn next_chunk(&mut self, chunk: &mut [u8]) -> Result<Option<(u32, usize)>, WriterError> {
        self.drop_done();
        let Some((offset, _)) = self.pieces.first() else { return Ok(None) };
        self.at = self.at.max(offset / BLOCK * BLOCK);
        let start = self.at;
        let mut filled = 0;
        while filled < chunk.len() {
            self.drop_done();
            let Some((offset, len)) = self.pieces.first().copied() else { break };
            let begin = offset.max(self.at);
            // The gap before the piece, or what of it has room.
            let gap = usize::try_from(begin - self.at).unwrap_or(usize::MAX).min(chunk.len() - filled);
            if gap > BLOCK_LEN && filled > 0 {
                break;
            }
            chunk[filled..filled + gap].fill(0);
            filled += gap;
            self.at += gap as u64;
            let left = usize::try_from(offset + len - begin).unwrap_or(usize::MAX).min(chunk.len() - filled);
            let got = read_full(self.data, &mut chunk[filled..filled + left])?;
            self.got += got as u64;
            self.at += got as u64;
            filled += got;
            if got < left {
                let expected = self
                    .pieces
                    .iter()
                    .fold(self.got, |sum, (from, len)| sum + (from + len).saturating_sub(self.at.max(*from)));
                return Err(WriterError::Size { expected, got: self.got });
            }
        }
        let padded = filled.next_multiple_of(BLOCK_LEN);
        chunk[filled..padded].fill(0);
        debug_assert!(self.at <= self.size, "pieces are within the file");
        // A chunk that ends within a block ends with a piece; what follows in the same block must not be cut off.
        Ok(Some(((start / BLOCK) as u32, padded)))
    }

    fn drop_done(&mut self) {
        while let Some((offset, len)) = self.pieces.first()
            && offset + len <= self.at
        {
            self.pieces = &self.pieces[1..];
        }
    }
}

fn read_full(data: &mut dyn Read, mut buf: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while !buf.is_empty() {
        match data.read(buf) {
            Ok(0) => break,
            Ok(len) => {
                got += len;
                buf = &mut buf[len..];
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}
