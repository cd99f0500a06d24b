//! The journal of a filesystem that nothing has been written to yet.

use super::WriterError;
use super::format::{self, BLOCK, FLAG_EXTENTS, RawInode};
use std::fs::File;
use std::os::unix::fs::FileExt as _;

/// Blocks of a journal: 16 MiB, one extent.
pub(super) const JOURNAL_BLOCKS: u64 = 4096;

/// Returns the inode of a journal that begins at `block`.
pub(super) fn inode(block: u64) -> RawInode {
    let mut map = [0; 60];
    format::extent_node(&mut map, 0, &[(0, block, JOURNAL_BLOCKS as u16)]);
    RawInode {
        mode: 0x8000 | 0o600,
        links: 1,
        size: JOURNAL_BLOCKS * BLOCK,
        blocks: JOURNAL_BLOCKS,
        flags: FLAG_EXTENTS,
        map,
        ..RawInode::default()
    }
}

/// Writes an empty journal's superblock (big-endian, unlike everything else).
pub(super) fn write(file: &File, block: u64, uuid: &[u8; 16]) -> Result<(), WriterError> {
    let mut journal = vec![0; 1024];
    let fields: [(usize, u32); 8] = [
        (0x00, 0xc03b_3998),
        (0x04, 4), // superblock, second version
        (0x0c, BLOCK as u32),
        (0x10, JOURNAL_BLOCKS as u32),
        (0x14, 1), // first block of the log
        (0x18, 1), // first transaction
        (0x1c, 0), // nothing to replay
        (0x40, 1), // one filesystem uses it
    ];
    for (at, value) in fields {
        journal[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
    journal[0x30..0x40].copy_from_slice(uuid);
    journal[0x100..0x110].copy_from_slice(uuid);
    Ok(file.write_all_at(&journal, block * BLOCK)?)
}
