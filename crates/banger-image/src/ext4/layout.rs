//! Where everything goes once all data is written, and the tables that say so.

use super::format::{
    self, BG_INODE_UNINIT, BG_INODE_ZEROED, BLOCK, BLOCK_LEN, FIRST_INO, GROUP_BLOCKS, Group, INODE_LEN,
    Superblock,
};
use super::writer::DATA_START;
use super::{Room, WriterError};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

/// Blocks that are free at least on a disk: 64 MiB.
const DISK_SPARE: u64 = 16 * 1024;
/// Bytes of a disk for each free inode, as mke2fs gives.
const INODE_RATIO: u64 = 16 * 1024;

/// All inodes by number, as bytes.
#[derive(Debug)]
pub(super) struct InodeTable {
    bytes: Vec<u8>,
    directories: Vec<bool>,
}

impl InodeTable {
    /// Makes room for `used` inodes besides the reserved ones and the root.
    pub(super) fn new(used: usize) -> Self {
        let len = FIRST_INO as usize - 1 + used;
        Self { bytes: vec![0; len * INODE_LEN], directories: vec![false; len] }
    }

    pub(super) fn len(&self) -> u32 {
        self.directories.len() as u32
    }

    pub(super) fn set(&mut self, number: u32, is_directory: bool, raw: &[u8; INODE_LEN]) {
        let at = number as usize - 1;
        self.bytes[at * INODE_LEN..(at + 1) * INODE_LEN].copy_from_slice(raw);
        self.directories[at] = is_directory;
    }
}

/// Where the metadata goes.
#[derive(Debug)]
pub(super) struct Layout {
    blocks: u64,
    groups: u32,
    inodes_per_group: u32,
    table_blocks: u64,
    /// First block after the data; all inode tables, then all block bitmaps, then all inode bitmaps.
    start: u64,
    end: u64,
}

impl Layout {
    pub(super) fn new(data_end: u64, used_inodes: u32, room: Room) -> Result<Self, WriterError> {
        let (spare, spare_inodes, blocks_min) = match room {
            Room::Spare(spare) => (spare, spare, 0),
            Room::Disk(bytes) => (DISK_SPARE, bytes / INODE_RATIO, bytes / BLOCK),
        };
        let inodes = u64::from(used_inodes) + spare_inodes.min(u64::from(u32::MAX / 4));
        let mut groups = 1;
        loop {
            let per_group = inodes.div_ceil(groups).next_multiple_of(16);
            let table_blocks = per_group * INODE_LEN as u64 / BLOCK;
            let end = data_end + groups * (table_blocks + 2);
            let blocks = (end + spare).max(blocks_min);
            // The bitmap of a group's inodes is one block, so there may have to be more groups than data needs.
            let blocks = blocks.max((groups - 1) * GROUP_BLOCKS + 1);
            let needed = blocks.div_ceil(GROUP_BLOCKS);
            if needed > groups || per_group > GROUP_BLOCKS {
                groups = needed.max(groups + 1);
                continue;
            }
            if groups * format::DESC_LEN as u64 > (DATA_START - 1) * BLOCK {
                return Err(WriterError::TooLarge);
            }
            return Ok(Self {
                blocks,
                groups: groups as u32,
                inodes_per_group: per_group as u32,
                table_blocks,
                start: data_end,
                end,
            });
        }
    }

    fn table(&self, group: u32) -> u64 {
        self.start + u64::from(group) * self.table_blocks
    }

    fn block_bitmap(&self, group: u32) -> u64 {
        self.table(self.groups) + u64::from(group)
    }

    fn inode_bitmap(&self, group: u32) -> u64 {
        self.table(self.groups) + u64::from(self.groups) + u64::from(group)
    }

    pub(super) fn write(
        &self,
        file: &File,
        free: &BTreeMap<u64, u64>,
        table: &InodeTable,
        uuid: [u8; 16],
        journal: Option<[u8; 60]>,
    ) -> Result<u64, WriterError> {
        let seed = Superblock::seed(&uuid);
        file.set_len(self.blocks * BLOCK)?;
        let used_inodes = table.len();
        for (group, inodes) in (0..).zip(table.bytes.chunks(self.inodes_per_group as usize * INODE_LEN)) {
            file.write_all_at(inodes, self.table(group) * BLOCK)?;
        }
        let mut free = free.clone();
        let descriptor_blocks = (u64::from(self.groups) * format::DESC_LEN as u64).div_ceil(BLOCK);
        free.insert(1 + descriptor_blocks, DATA_START - 1 - descriptor_blocks);
        let mut descriptors = Vec::new();
        let (mut free_blocks, mut free_inodes) = (0u64, 0u32);
        for number in 0..self.groups {
            let mut group = Group {
                block_bitmap: self.block_bitmap(number),
                inode_bitmap: self.inode_bitmap(number),
                inode_table: self.table(number),
                flags: BG_INODE_ZEROED,
                ..Group::default()
            };
            let bitmap = self.blocks_of(number, &free);
            group.free_blocks = count_zeroes(&bitmap);
            group.block_bitmap_sum = format::crc(seed, &bitmap);
            file.write_all_at(&bitmap, group.block_bitmap * BLOCK)?;
            let first = number * self.inodes_per_group;
            let used = used_inodes.saturating_sub(first).min(self.inodes_per_group);
            let mut bitmap = vec![0xff; BLOCK_LEN];
            (used..self.inodes_per_group).for_each(|bit| bitmap[bit as usize / 8] &= !(1 << (bit % 8)));
            group.free_inodes = self.inodes_per_group - used;
            group.inodes_never_used = group.free_inodes;
            if used == 0 {
                group.flags |= BG_INODE_UNINIT;
            }
            let inodes = first as usize..(first + used) as usize;
            group.directories =
                table.directories.get(inodes).map_or(0, |inodes| inodes.iter().filter(|is| **is).count())
                    as u32;
            group.inode_bitmap_sum = format::crc(seed, &bitmap[..self.inodes_per_group as usize / 8]);
            file.write_all_at(&bitmap, group.inode_bitmap * BLOCK)?;
            free_blocks += u64::from(group.free_blocks);
            free_inodes += group.free_inodes;
            descriptors.extend_from_slice(&group.encode(number, seed));
        }
        file.write_all_at(&descriptors, BLOCK)?;
        let superblock = Superblock {
            uuid,
            blocks: self.blocks,
            free_blocks,
            inodes_per_group: self.inodes_per_group,
            groups: self.groups,
            free_inodes,
            journal,
            grows: false,
        };
        file.write_all_at(&superblock.encode(0), 1024)?;
        file.sync_all()?;
        Ok(self.blocks * BLOCK)
    }

    /// The bitmap of a group's blocks: everything up to the end of the metadata is used, except what was freed.
    fn blocks_of(&self, group: u32, free: &BTreeMap<u64, u64>) -> Vec<u8> {
        let first = u64::from(group) * GROUP_BLOCKS;
        let last = first + GROUP_BLOCKS;
        let mut bitmap = vec![0; BLOCK_LEN];
        let mut set = |block: u64, value: bool| {
            let bit = (block - first) as usize;
            if value { bitmap[bit / 8] |= 1 << (bit % 8) } else { bitmap[bit / 8] &= !(1 << (bit % 8)) }
        };
        (first..last).filter(|block| *block < self.end || *block >= self.blocks).for_each(|b| set(b, true));
        for (start, blocks) in free.range(..last) {
            (*start.max(&first)..(start + blocks).min(last)).for_each(|block| set(block, false));
        }
        bitmap
    }
}

fn count_zeroes(bitmap: &[u8]) -> u32 {
    bitmap.iter().map(|byte| byte.count_zeros()).sum()
}
