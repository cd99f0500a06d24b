//! The disk of a vm before its first boot: an empty filesystem with a journal, nearly all of it holes.
//!
//! It is laid out so that the guest's kernel can make it larger while it is mounted (`EXT4_IOC_RESIZE_FS`).

use super::WriterError;
use super::format::{
    self, BG_BLOCK_UNINIT, BG_INODE_UNINIT, BG_INODE_ZEROED, BLOCK, BLOCK_LEN, FIRST_INO, FLAG_EXTENTS,
    GROUP_BLOCKS, Group, INODE_LEN, JOURNAL_INO, META_GROUP, ROOT_INO, RawInode, Superblock, has_descriptors,
    has_superblock,
};
use super::journal::{self, JOURNAL_BLOCKS};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Inodes of a group: one for 16 KiB, as mke2fs gives.
const INODES_PER_GROUP: u32 = 8192;
const TABLE_BLOCKS: u64 = INODES_PER_GROUP as u64 * INODE_LEN as u64 / BLOCK;
/// The smallest disk: the journal's group.
const BLOCKS_MIN: u64 = GROUP_BLOCKS;
/// Groups of the largest disk, whose descriptors are 16 MiB.
const GROUPS_MAX: u32 = 262_144;

/// Makes an empty filesystem of `size` bytes (at least 128 MiB) in a new sparse file.
///
/// # Errors
/// When the file exists or can't be written, or the size does not fit.
pub fn format_empty(path: &Path, size: u64, uuid: [u8; 16]) -> Result<(), WriterError> {
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    let len = disk_len(size);
    let blocks = len / BLOCK;
    let groups = u32::try_from(blocks.div_ceil(GROUP_BLOCKS)).map_err(|_| WriterError::TooLarge)?;
    if groups > GROUPS_MAX {
        return Err(WriterError::TooLarge);
    }
    file.set_len(len)?;
    let seed = Superblock::seed(&uuid);
    // The first group: superblock, descriptors, its bitmaps and table, the root directory, the journal.
    let tables = base_blocks(0);
    let root_block = tables + 2 + TABLE_BLOCKS;
    let journal_block = root_block + 1;
    journal::write(&file, journal_block, &uuid)?;
    let map = write_inodes(&file, tables + 2, root_block, journal_block, seed)?;
    let mut descriptors = Vec::new();
    let (mut free_blocks, mut free_inodes) = (0u64, 0);
    for number in 0..groups {
        let group = write_group(&file, number, blocks, seed)?;
        free_blocks += u64::from(group.free_blocks);
        free_inodes += group.free_inodes;
        descriptors.extend_from_slice(&group.encode(number, seed));
    }
    let superblock = Superblock {
        uuid,
        blocks,
        free_blocks,
        inodes_per_group: INODES_PER_GROUP,
        groups,
        free_inodes,
        journal: Some(map),
        grows: true,
    };
    let blocks_of_descriptors: Vec<&[u8]> = descriptors.chunks(BLOCK_LEN).collect();
    for number in 0..groups {
        let start = u64::from(number) * GROUP_BLOCKS * BLOCK;
        if has_superblock(number) {
            // The first one leaves room for a boot sector.
            let at = if number == 0 { 1024 } else { start };
            file.write_all_at(&superblock.encode(number), at)?;
        }
        if has_descriptors(number) {
            let at = start + if has_superblock(number) { BLOCK } else { 0 };
            file.write_all_at(blocks_of_descriptors[(number / META_GROUP) as usize], at)?;
        }
    }
    file.sync_all()?;
    Ok(())
}

/// Returns how long a disk is that was asked to be `size` bytes: a last group too small for its own tables would have to
/// be special, and is left out instead.
#[must_use]
pub fn disk_len(size: u64) -> u64 {
    let mut blocks = (size / BLOCK).max(BLOCKS_MIN);
    if (1..TABLE_BLOCKS + 64).contains(&(blocks % GROUP_BLOCKS)) {
        blocks -= blocks % GROUP_BLOCKS;
    }
    blocks * BLOCK
}

/// Blocks at the beginning of a group before its own tables.
fn base_blocks(group: u32) -> u64 {
    u64::from(has_superblock(group)) + u64::from(has_descriptors(group))
}

/// Writes what an empty group has besides copies, and returns its descriptor.
fn write_group(file: &File, number: u32, blocks: u64, seed: u32) -> Result<Group, WriterError> {
    let first = u64::from(number) * GROUP_BLOCKS;
    let start = first + base_blocks(number);
    let len = (blocks - first).min(GROUP_BLOCKS);
    let is_last = first + len == blocks;
    // The first has the root directory and the journal as well.
    let more = if number == 0 { 1 + JOURNAL_BLOCKS } else { 0 };
    let used = base_blocks(number) + 2 + TABLE_BLOCKS + more;
    let used_inodes = if number == 0 { FIRST_INO - 1 } else { 0 };
    let mut group = Group {
        block_bitmap: start,
        inode_bitmap: start + 1,
        inode_table: start + 2,
        free_blocks: (len - used) as u32,
        free_inodes: INODES_PER_GROUP - used_inodes,
        inodes_never_used: INODES_PER_GROUP - used_inodes,
        directories: u32::from(number == 0),
        flags: BG_INODE_ZEROED,
        ..Group::default()
    };
    if number == 0 {
        let bits = INODES_PER_GROUP as usize;
        group.inode_bitmap_sum = write_bitmap(file, start + 1, seed, bits, |bit| {
            bit < u64::from(used_inodes) || bit >= u64::from(INODES_PER_GROUP)
        })?;
    } else {
        group.flags |= BG_INODE_UNINIT;
    }
    // The kernel computes the bitmap of an untouched group, but not of the last one, which may be short.
    if number == 0 || is_last {
        let bits = GROUP_BLOCKS as usize;
        group.block_bitmap_sum = write_bitmap(file, start, seed, bits, |bit| bit < used || bit >= len)?;
    } else {
        group.flags |= BG_BLOCK_UNINIT;
    }
    Ok(group)
}

/// Writes a bitmap and returns the checksum of its first `bits` bits.
fn write_bitmap(
    file: &File,
    block: u64,
    seed: u32,
    bits: usize,
    used: impl Fn(u64) -> bool,
) -> Result<u32, WriterError> {
    let mut bitmap = vec![0; BLOCK_LEN];
    for bit in (0..GROUP_BLOCKS).filter(|bit| used(*bit)) {
        bitmap[bit as usize / 8] |= 1 << (bit % 8);
    }
    file.write_all_at(&bitmap, block * BLOCK)?;
    Ok(format::crc(seed, &bitmap[..bits / 8]))
}

/// Writes the root directory and the journal's inode; returns the journal's map.
fn write_inodes(
    file: &File,
    table: u64,
    root_block: u64,
    journal_block: u64,
    seed: u32,
) -> Result<[u8; 60], WriterError> {
    let dots = [(&b"."[..], ROOT_INO, 2), (&b".."[..], ROOT_INO, 2)];
    file.write_all_at(&format::directory(dots.into_iter(), ROOT_INO, seed), root_block * BLOCK)?;
    let mut map = [0; 60];
    format::extent_node(&mut map, 0, &[(0, root_block, 1)]);
    let root = RawInode {
        mode: 0x4000 | 0o755,
        links: 2,
        size: BLOCK,
        blocks: 1,
        flags: FLAG_EXTENTS,
        map,
        ..RawInode::default()
    };
    let journal = journal::inode(journal_block);
    let journal_map = journal.map;
    for (number, inode) in [(ROOT_INO, root), (JOURNAL_INO, journal)] {
        let at = table * BLOCK + u64::from(number - 1) * INODE_LEN as u64;
        file.write_all_at(&inode.encode(number, seed), at)?;
    }
    Ok(journal_map)
}
