//! Sparse files: GNU's old header, and the PAX forms 0.0, 0.1 and 1.0.

use std::io::Read;

use super::pax::integer;
use super::{BLOCK, Entry, Kind, Segment, TarError, TarReader, header};

/// Segments of one file; a map of that length is 16 MiB in memory.
const SEGMENTS_MAX: usize = 1 << 20;

const BAD: TarError = TarError::Damaged("its map of holes can't be read");

/// Where a sparse file has data, and how long it is.
#[derive(Debug, Default)]
pub(super) struct Map {
    segments: Vec<Segment>,
    size: u64,
}

impl Map {
    fn push(&mut self, offset: u64, len: u64) -> Result<(), TarError> {
        if self.segments.len() >= SEGMENTS_MAX {
            return Err(TarError::Damaged("it has too many holes"));
        }
        self.segments.push(Segment { offset, len });
        Ok(())
    }

    /// Makes the entry a sparse file whose segments have `data` bytes together.
    pub(super) fn apply(mut self, entry: &mut Entry, data: u64) -> Result<(), TarError> {
        let (mut end, mut sum) = (0u64, 0u64);
        for segment in &self.segments {
            let next = segment.offset.checked_add(segment.len).ok_or(BAD)?;
            if segment.offset < end || next > self.size {
                return Err(TarError::Damaged("its map of holes overlaps or exceeds the file"));
            }
            end = next;
            sum += segment.len;
        }
        if sum != data || self.size > i64::MAX as u64 {
            return Err(TarError::Damaged("its map of holes doesn't fit its data"));
        }
        self.segments.retain(|segment| segment.len > 0);
        entry.kind = Kind::SparseFile;
        entry.size = self.size;
        entry.segments = self.segments;
        Ok(())
    }
}

/// Reads the map of the old form: four segments in the header, more in blocks behind it.
pub(super) fn read_gnu(header: &[u8; BLOCK], inner: &mut impl Read) -> Result<Map, TarError> {
    let mut map = Map { size: header::number(&header[483..495])?, ..Map::default() };
    let mut add = |entries: &[u8]| -> Result<(), TarError> {
        for entry in entries.chunks_exact(24) {
            if entry[0] == 0 {
                break;
            }
            map.push(header::number(&entry[..12])?, header::number(&entry[12..])?)?;
        }
        Ok(())
    };
    add(&header[386..482])?;
    let mut more = header[482] != 0;
    let mut blocks = 0;
    while more {
        let mut block = [0; BLOCK];
        inner.read_exact(&mut block).map_err(TarError::Read)?;
        add(&block[..504])?;
        more = block[504] != 0;
        blocks += 1;
        if blocks > SEGMENTS_MAX / 21 {
            return Err(TarError::Damaged("it has too many holes"));
        }
    }
    Ok(map)
}

/// What PAX records say of holes, in whichever version.
#[derive(Debug, Default)]
pub(super) struct PaxSparse {
    major: u64,
    minor: u64,
    map: Map,
    offset: Option<u64>,
}

impl PaxSparse {
    /// Takes a record, its key without `GNU.sparse.`.
    pub(super) fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        match key {
            b"major" => self.major = integer(value)?,
            b"minor" => self.minor = integer(value)?,
            b"size" | b"realsize" => self.map.size = integer(value)?,
            b"offset" => self.offset = Some(integer(value)?),
            b"numbytes" => {
                let offset = self.offset.take().ok_or(BAD)?;
                self.map.push(offset, integer(value)?)?;
            }
            b"map" => {
                let numbers: Vec<&[u8]> = value.split(|b| *b == b',').collect();
                for pair in numbers.chunks(2).filter(|_| !value.is_empty()) {
                    let [offset, len] = pair else { return Err(BAD) };
                    self.map.push(integer(offset)?, integer(len)?)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Completes the map; the newest form has it in front of the data.
    pub(super) fn finish<R: Read>(mut self, reader: &mut TarReader<R>) -> Result<Map, TarError> {
        match (self.major, self.minor) {
            (0, _) => {}
            (1, 0) => {
                let mut lines = Lines { reader, block: [0; BLOCK], at: BLOCK };
                for _ in 0..lines.next()? {
                    let offset = lines.next()?;
                    self.map.push(offset, lines.next()?)?;
                }
            }
            _ => return Err(TarError::Damaged("it is sparse in an unknown way")),
        }
        Ok(self.map)
    }
}

/// Decimal numbers, one a line, in whole blocks.
struct Lines<'a, R> {
    reader: &'a mut TarReader<R>,
    block: [u8; BLOCK],
    at: usize,
}

impl<R: Read> Lines<'_, R> {
    fn next(&mut self) -> Result<u64, TarError> {
        let mut digits = Vec::new();
        // The largest number has 20 digits.
        while digits.len() <= 20 {
            if self.at == BLOCK {
                self.reader.read_exact(&mut self.block).map_err(|_| BAD)?;
                self.at = 0;
            }
            let byte = self.block[self.at];
            self.at += 1;
            if byte == b'\n' {
                return integer(&digits);
            }
            digits.push(byte);
        }
        Err(BAD)
    }
}
