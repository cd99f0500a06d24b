//! Files with holes, in the form that GNU tar calls PAX 1.0: a map of where there is data, then the data.
//!
//! GNU tar's manual has it as "Storing Sparse Files"; everything that is written in Go reads it (umoci, buildah, podman,
//! docker), and so do libarchive and Python.

use rustix::fs::SeekFrom;
use std::fs::File;
use std::io;

/// Shorter holes are written as zeroes: they would cost more than they save.
const HOLE_MIN: u64 = 16 * 1024;
/// Pieces of one file. Go's reader takes a map of at most 1 MiB, which has room for 24,000 of the longest.
const PIECES_MAX: usize = 16 * 1024;

/// Where a file has data: offsets and lengths, in order.
pub(crate) type Pieces = Vec<(u64, u64)>;

/// Returns the pieces of a file of `len` bytes when it has holes worth mentioning.
pub(crate) fn pieces(file: &File, len: u64) -> Option<Pieces> {
    if len < HOLE_MIN {
        return None;
    }
    // A filesystem that can't tell has none.
    let mut pieces = found(file, len).ok()?;
    let mut hole_min = HOLE_MIN;
    loop {
        pieces = joined(&pieces, hole_min);
        if pieces.len() <= PIECES_MAX {
            break;
        }
        hole_min *= 2;
    }
    let data: u64 = pieces.iter().map(|(_, len)| len).sum();
    (data + HOLE_MIN <= len).then_some(pieces)
}

fn found(file: &File, len: u64) -> io::Result<Pieces> {
    let (mut pieces, mut at) = (Vec::new(), 0);
    while at < len {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Err(rustix::io::Errno::NXIO) => break,
            start => start?,
        };
        at = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(len);
        // It may have grown meanwhile.
        if start >= at {
            break;
        }
        pieces.push((start, at - start));
    }
    Ok(pieces)
}

/// Makes one of pieces that are less than `hole_min` apart.
fn joined(pieces: &[(u64, u64)], hole_min: u64) -> Pieces {
    let mut out: Pieces = Vec::new();
    for (start, len) in pieces {
        match out.last_mut() {
            Some(last) if start - (last.0 + last.1) < hole_min => last.1 = start + len - last.0,
            _ => out.push((*start, *len)),
        }
    }
    out
}

/// Returns the map that comes before the data of a file of `len` bytes.
pub(crate) fn map(pieces: &[(u64, u64)], len: u64) -> Vec<u8> {
    // GNU tar takes the length of a file that ends in a hole from an empty piece there.
    let end = pieces.last().map_or(0, |(start, len)| start + len);
    let last = (end < len).then_some((len, 0));
    let all = pieces.iter().copied().chain(last);
    let mut map = format!("{}\n", all.clone().count());
    all.for_each(|(start, len)| map.push_str(&format!("{start}\n{len}\n")));
    let mut map = map.into_bytes();
    map.resize(map.len().next_multiple_of(crate::tar::BLOCK_LEN), 0);
    map
}

#[cfg(test)]
mod tests {
    use super::{HOLE_MIN, PIECES_MAX, joined, map, pieces};
    use std::os::unix::fs::FileExt as _;

    #[test]
    fn only_holes_that_are_worth_it_count() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 4096], 0).unwrap();
        file.write_all_at(&[1; 4096], 8192).unwrap();
        assert_eq!(pieces(&file, 12288), None);
        file.write_all_at(&[1; 100], 1 << 20).unwrap();
        let len = (1 << 20) + 100;
        assert_eq!(pieces(&file, len), Some(vec![(0, 12288), (1 << 20, 100)]));
        file.set_len(3 << 20).unwrap();
        let found = pieces(&file, 3 << 20).unwrap();
        assert!(map(&found, 3 << 20).starts_with(b"3\n0\n12288\n1048576\n4096\n3145728\n0\n\0"));
        file.set_len(0).unwrap();
        file.set_len(1 << 40).unwrap();
        assert_eq!(pieces(&file, 1 << 40), Some(Vec::new()));
    }

    #[test]
    fn a_map_is_never_too_long() {
        let file = tempfile::tempfile().unwrap();
        let count = PIECES_MAX as u64 + 10;
        (0..count).for_each(|at| file.write_all_at(b"x", at * 3 * HOLE_MIN).unwrap());
        let len = (count - 1) * 3 * HOLE_MIN + 1;
        let found = pieces(&file, len);
        assert_eq!(found, None, "so many holes of three times the least are as good as none");
        assert_eq!(joined(&[(0, 1), (9, 1), (30, 1)], 9), [(0, 10), (30, 1)]);
    }
}
