//! Inodes in memory, data on the disk.

use super::format::{
    self, BG_INODE_UNINIT, BG_INODE_ZEROED, BLOCK, BLOCK_LEN, EXTENT_BLOCKS_MAX, EXTENTS_INLINE,
    EXTENTS_PER_BLOCK, FIRST_INO, FLAG_EXTENTS, GROUP_BLOCKS, Group, INODE_LEN, Leaf, ROOT_INO, RawInode,
    Superblock,
};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// First block of data. Before it, room for the descriptors of 4,000 groups: 500 GiB.
const DATA_START: u64 = 64;
/// Bytes read at once.
const CHUNK: usize = 1 << 20;
/// Hard links ext4 allows to a file.
const LINKS_MAX: u32 = 65_000;

/// A filesystem could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriterError {
    /// The file can't be written, or the data can't be read.
    #[error("could not write the filesystem")]
    Io(#[from] io::Error),
    /// More attributes than ext4 has room for, or one it has no name for.
    #[error("extended attributes that ext4 can't hold")]
    Xattrs,
    /// One hard link too many.
    #[error("more than {LINKS_MAX} hard links to one file")]
    Links,
    /// More than the descriptors' reserve.
    #[error("a filesystem larger than 500 GiB")]
    TooLarge,
    /// More data than announced, or less.
    #[error("{got} bytes of data where {expected} were announced")]
    Size {
        /// What was announced.
        expected: u64,
        /// What came.
        got: u64,
    },
}

/// An inode of the filesystem being written. Not the number it will have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ino(u32);

/// A run of blocks of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    logical: u32,
    physical: u64,
    blocks: u32,
}

/// Owner, mode, time and attributes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Meta {
    /// Permission bits, with setuid, setgid and sticky.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970 and nanoseconds.
    pub mtime: (i64, u32),
    /// Extended attributes by full name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What an inode is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Directory(BTreeMap<Vec<u8>, Ino>),
    /// A regular file.
    File {
        /// Its length in bytes.
        size: u64,
        /// Where its data is.
        extents: Vec<Extent>,
    },
    /// A symbolic link.
    Symlink(Vec<u8>),
    /// A character device with its number.
    Char(u32, u32),
    /// A block device with its number.
    Block(u32, u32),
    /// A fifo.
    Fifo,
}

#[derive(Debug)]
struct Inode {
    meta: Meta,
    node: Node,
    links: u32,
}

/// Writes one filesystem.
#[derive(Debug)]
pub struct Writer {
    file: File,
    next_block: u64,
    free: BTreeMap<u64, u64>,
    inodes: Vec<Option<Inode>>,
    chunk: Vec<u8>,
}

impl Writer {
    /// Begins a filesystem in a new file.
    ///
    /// # Errors
    /// When the file exists or can't be made.
    pub fn create(path: &Path) -> Result<Self, WriterError> {
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        let root = Inode {
            meta: Meta { mode: 0o755, ..Meta::default() },
            node: Node::Directory(BTreeMap::new()),
            links: 1,
        };
        Ok(Self {
            file,
            next_block: DATA_START,
            free: BTreeMap::new(),
            inodes: vec![Some(root)],
            chunk: vec![0; CHUNK],
        })
    }

    /// Returns the root directory.
    #[must_use]
    pub fn root(&self) -> Ino {
        Ino(0)
    }

    /// Returns what an inode is. Only inodes that are in a directory exist.
    #[must_use]
    pub fn node(&self, ino: Ino) -> Option<&Node> {
        self.inodes.get(ino.0 as usize)?.as_ref().map(|inode| &inode.node)
    }

    /// Changes owner, mode, time and attributes.
    pub fn set_meta(&mut self, ino: Ino, meta: Meta) {
        if let Some(Some(inode)) = self.inodes.get_mut(ino.0 as usize) {
            inode.meta = meta;
        }
    }

    /// Looks a name up in a directory.
    #[must_use]
    pub fn lookup(&self, directory: Ino, name: &[u8]) -> Option<Ino> {
        match self.node(directory)? {
            Node::Directory(entries) => entries.get(name).copied(),
            _ => None,
        }
    }

    /// Returns the number of inodes in use.
    #[must_use]
    pub fn inode_count(&self) -> usize {
        self.inodes.iter().flatten().count()
    }

    /// Writes data to its place and returns what a file needs to have it.
    ///
    /// # Errors
    /// When `data` ends before `size` bytes, can't be read, or the disk can't be written.
    pub fn write_data(&mut self, size: u64, data: &mut dyn Read) -> Result<Node, WriterError> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut done = 0;
        let mut chunk = std::mem::take(&mut self.chunk);
        while done < size {
            let want = usize::try_from(size - done).unwrap_or(CHUNK).min(CHUNK);
            let got = read_full(data, &mut chunk[..want])?;
            if got < want {
                return Err(WriterError::Size { expected: size, got: done + got as u64 });
            }
            let padded = want.next_multiple_of(BLOCK_LEN);
            chunk[want..padded].fill(0);
            self.write_blocks((done / BLOCK) as u32, &chunk[..padded], &mut extents)?;
            done += want as u64;
        }
        self.chunk = chunk;
        Ok(Node::File { size, extents })
    }

    /// Writes whole blocks, leaving out those that are zero.
    fn write_blocks(
        &mut self,
        logical: u32,
        data: &[u8],
        extents: &mut Vec<Extent>,
    ) -> Result<(), WriterError> {
        let zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
        let mut rest = data;
        let mut logical = logical;
        while !rest.is_empty() {
            let first_zero = zero(&rest[..BLOCK_LEN]);
            let run = rest.chunks_exact(BLOCK_LEN).take_while(|block| zero(block) == first_zero).count();
            let (now, later) = rest.split_at(run * BLOCK_LEN);
            if !first_zero {
                let physical = self.next_block;
                self.file.write_all_at(now, physical * BLOCK)?;
                self.next_block += run as u64;
                match extents.last_mut() {
                    Some(last)
                        if last.logical + last.blocks == logical
                            && last.physical + u64::from(last.blocks) == physical =>
                    {
                        last.blocks += run as u32;
                    }
                    _ => extents.push(Extent { logical, physical, blocks: run as u32 }),
                }
            }
            logical += run as u32;
            rest = later;
        }
        Ok(())
    }

    /// Makes an inode under a name, replacing what had it. A directory that replaces a directory keeps its entries.
    pub fn add(&mut self, directory: Ino, name: &[u8], meta: Meta, node: Node) -> Ino {
        if let (Some(old), Node::Directory(_)) = (self.lookup(directory, name), &node)
            && matches!(self.node(old), Some(Node::Directory(_)))
        {
            self.set_meta(old, meta);
            return old;
        }
        self.remove(directory, name);
        let ino = Ino(self.inodes.len() as u32);
        self.inodes.push(Some(Inode { meta, node, links: 1 }));
        self.insert(directory, name, ino);
        ino
    }

    /// Gives a file another name.
    ///
    /// # Errors
    /// When it has too many already.
    pub fn link(&mut self, directory: Ino, name: &[u8], ino: Ino) -> Result<(), WriterError> {
        if self.lookup(directory, name) == Some(ino) {
            return Ok(());
        }
        self.remove(directory, name);
        if let Some(Some(inode)) = self.inodes.get_mut(ino.0 as usize) {
            if inode.links >= LINKS_MAX {
                return Err(WriterError::Links);
            }
            inode.links += 1;
        }
        self.insert(directory, name, ino);
        Ok(())
    }

    fn insert(&mut self, directory: Ino, name: &[u8], ino: Ino) {
        if let Some(Some(Inode { node: Node::Directory(entries), .. })) =
            self.inodes.get_mut(directory.0 as usize)
        {
            entries.insert(name.to_vec(), ino);
        }
    }

    /// Removes a name, and with the last one the inode and everything below it.
    pub fn remove(&mut self, directory: Ino, name: &[u8]) {
        let Some(Some(Inode { node: Node::Directory(entries), .. })) =
            self.inodes.get_mut(directory.0 as usize)
        else {
            return;
        };
        let mut doomed: Vec<Ino> = entries.remove(name).into_iter().collect();
        while let Some(ino) = doomed.pop() {
            let Some(slot) = self.inodes.get_mut(ino.0 as usize) else { continue };
            let Some(inode) = slot else { continue };
            inode.links -= 1;
            if inode.links > 0 {
                continue;
            }
            match slot.take().map(|inode| inode.node) {
                Some(Node::Directory(entries)) => doomed.extend(entries.into_values()),
                Some(Node::File { extents, .. }) => {
                    for extent in extents {
                        self.free.insert(extent.physical, u64::from(extent.blocks));
                    }
                }
                _ => {}
            }
        }
    }

    /// Returns the names in a directory.
    #[must_use]
    pub fn names(&self, directory: Ino) -> Vec<Vec<u8>> {
        match self.node(directory) {
            Some(Node::Directory(entries)) => entries.keys().cloned().collect(),
            _ => Vec::new(),
        }
    }

    /// Writes all metadata and returns the filesystem's size in bytes. `spare` blocks and inodes stay free.
    ///
    /// # Errors
    /// When the disk can't be written or something does not fit into ext4.
    pub fn finish(mut self, uuid: [u8; 16], spare: u64) -> Result<u64, WriterError> {
        self.punch()?;
        let seed = Superblock::seed(&uuid);
        let numbers = self.numbers();
        let used_inodes = FIRST_INO - 1 + self.inode_count() as u32 - 1;
        let raw = self.raw_inodes(&numbers, seed)?;
        Layout::new(self.next_block, used_inodes, spare)?.write(&self, &raw, uuid, used_inodes)
    }

    /// Gives the blocks of replaced files back to the host.
    fn punch(&self) -> io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        for (start, blocks) in &self.free {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match fallocate(&self.file, flags, start * BLOCK, blocks * BLOCK) {
                // Not every filesystem can; the blocks then merely stay.
                Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The number of every inode that is left.
    fn numbers(&self) -> Vec<u32> {
        let mut next = FIRST_INO;
        let mut number = |(index, inode): (usize, &Option<Inode>)| match (index, inode) {
            (0, _) => ROOT_INO,
            (_, None) => 0,
            _ => {
                next += 1;
                next - 1
            }
        };
        self.inodes.iter().enumerate().map(&mut number).collect()
    }

    fn raw_inodes(
        &mut self,
        numbers: &[u32],
        seed: u32,
    ) -> Result<Vec<(u32, bool, [u8; INODE_LEN])>, WriterError> {
        let parents = self.parents();
        let inodes = std::mem::take(&mut self.inodes);
        let mut out = Vec::with_capacity(inodes.len());
        for (index, inode) in inodes.iter().enumerate() {
            let Some(inode) = inode else { continue };
            let number = numbers[index];
            let mut raw = RawInode {
                uid: inode.meta.uid,
                gid: inode.meta.gid,
                mtime: inode.meta.mtime,
                links: inode.links as u16,
                ..RawInode::default()
            };
            let kind = match &inode.node {
                Node::Directory(entries) => {
                    let parent = numbers[parents.get(&(index as u32)).copied().unwrap_or(0) as usize];
                    let below = self.write_directory(&inodes, entries, numbers, (number, parent), seed)?;
                    raw.size = below.1 * BLOCK;
                    self.map_extents(&mut raw, &below.0, number, seed)?;
                    let subdirectories = entries.values().filter(|ino| is_directory(&inodes, **ino)).count();
                    // More than fits is written as one, which dir_nlink defines.
                    raw.links = u16::try_from(subdirectories + 2).ok().filter(|n| *n < 65_000).unwrap_or(1);
                    0x4000
                }
                Node::File { size, extents } => {
                    raw.size = *size;
                    self.map_extents(&mut raw, extents, number, seed)?;
                    0x8000
                }
                Node::Symlink(target) => {
                    raw.size = target.len() as u64;
                    if target.len() < 60 {
                        raw.map[..target.len()].copy_from_slice(target);
                    } else {
                        let extents = self.append(target)?;
                        self.map_extents(&mut raw, &extents, number, seed)?;
                    }
                    0xa000
                }
                Node::Char(major, minor) => {
                    device(&mut raw.map, *major, *minor);
                    0x2000
                }
                Node::Block(major, minor) => {
                    device(&mut raw.map, *major, *minor);
                    0x6000
                }
                Node::Fifo => 0x1000,
            };
            raw.mode = kind | (inode.meta.mode & 0o7777);
            self.attach_xattrs(&mut raw, &inode.meta.xattrs, seed)?;
            out.push((number, kind == 0x4000, raw.encode(number, seed)));
        }
        Ok(out)
    }

    /// The directory each directory is in.
    fn parents(&self) -> BTreeMap<u32, u32> {
        let mut parents = BTreeMap::new();
        for (index, inode) in self.inodes.iter().enumerate() {
            if let Some(Inode { node: Node::Directory(entries), .. }) = inode {
                let below = entries.values().filter(|ino| is_directory(&self.inodes, **ino));
                parents.extend(below.map(|ino| (ino.0, index as u32)));
            }
        }
        parents
    }

    fn write_directory(
        &mut self,
        inodes: &[Option<Inode>],
        entries: &BTreeMap<Vec<u8>, Ino>,
        numbers: &[u32],
        (number, parent): (u32, u32),
        seed: u32,
    ) -> Result<(Vec<Extent>, u64), WriterError> {
        let dots = [(&b"."[..], number, 2), (&b".."[..], parent, 2)];
        let rest = entries.iter().map(|(name, ino)| {
            let kind = match inodes[ino.0 as usize].as_ref().map(|inode| &inode.node) {
                Some(Node::File { .. }) => 1,
                Some(Node::Directory(_)) => 2,
                Some(Node::Char(..)) => 3,
                Some(Node::Block(..)) => 4,
                Some(Node::Fifo) => 5,
                Some(Node::Symlink(_)) => 7,
                None => 0,
            };
            (name.as_slice(), numbers[ino.0 as usize], kind)
        });
        let bytes = format::directory(dots.into_iter().chain(rest), number, seed);
        let extents = self.append(&bytes)?;
        Ok((extents, (bytes.len() / BLOCK_LEN) as u64))
    }

    /// Appends bytes, padded to whole blocks.
    fn append(&mut self, bytes: &[u8]) -> Result<Vec<Extent>, WriterError> {
        let blocks = bytes.len().div_ceil(BLOCK_LEN);
        let extent = Extent { logical: 0, physical: self.next_block, blocks: blocks as u32 };
        self.file.write_all_at(bytes, self.next_block * BLOCK)?;
        self.next_block += blocks as u64;
        Ok(vec![extent])
    }

    /// Builds the extent tree: into the inode when it fits, else into blocks below it.
    fn map_extents(
        &mut self,
        raw: &mut RawInode,
        extents: &[Extent],
        number: u32,
        seed: u32,
    ) -> Result<(), WriterError> {
        raw.flags = FLAG_EXTENTS;
        let mut level: Vec<Leaf> = Vec::new();
        for extent in extents {
            let mut done = 0;
            while done < u64::from(extent.blocks) {
                // The largest length means something else on disk when the extent is unwritten; it is never that here.
                let len = (u64::from(extent.blocks) - done).min(EXTENT_BLOCKS_MAX);
                level.push((extent.logical + done as u32, extent.physical + done, len as u16));
                done += len;
            }
        }
        raw.blocks = extents.iter().map(|extent| u64::from(extent.blocks)).sum();
        let mut depth = 0;
        while level.len() > EXTENTS_INLINE {
            let mut above = Vec::new();
            for entries in level.chunks(EXTENTS_PER_BLOCK) {
                let mut block = vec![0; BLOCK_LEN];
                format::extent_node(&mut block[..BLOCK_LEN - 4], depth, entries);
                let sum = format::crc(format::inode_seed(number, seed), &block[..BLOCK_LEN - 4]);
                format::put32(&mut block, BLOCK_LEN - 4, sum);
                above.push((entries[0].0, self.next_block, 0));
                self.append(&block)?;
                raw.blocks += 1;
            }
            level = above;
            depth += 1;
        }
        format::extent_node(&mut raw.map, depth, &level);
        Ok(())
    }

    fn attach_xattrs(
        &mut self,
        raw: &mut RawInode,
        xattrs: &[(Vec<u8>, Vec<u8>)],
        seed: u32,
    ) -> Result<(), WriterError> {
        if xattrs.is_empty() {
            return Ok(());
        }
        let entries = format::raw_xattrs(xattrs).ok_or(WriterError::Xattrs)?;
        if let Some(area) = format::xattrs_inline(&entries) {
            raw.xattrs = area;
            return Ok(());
        }
        let block = format::xattrs_block(&entries, self.next_block, seed).ok_or(WriterError::Xattrs)?;
        raw.xattr_block = self.next_block;
        raw.blocks += 1;
        self.append(&block)?;
        Ok(())
    }
}

fn is_directory(inodes: &[Option<Inode>], ino: Ino) -> bool {
    matches!(inodes.get(ino.0 as usize), Some(Some(Inode { node: Node::Directory(_), .. })))
}

/// Small numbers in the old form, large ones in the new.
fn device(map: &mut [u8; 60], major: u32, minor: u32) {
    if major < 256 && minor < 256 {
        format::put32(map, 0, (major << 8) | minor);
    } else {
        format::put32(map, 4, (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12));
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

/// Where the metadata goes.
#[derive(Debug)]
struct Layout {
    blocks: u64,
    groups: u32,
    inodes_per_group: u32,
    table_blocks: u64,
    /// First block after the data; all inode tables, then all block bitmaps, then all inode bitmaps.
    start: u64,
    end: u64,
}

impl Layout {
    fn new(data_end: u64, used_inodes: u32, spare: u64) -> Result<Self, WriterError> {
        let inodes = u64::from(used_inodes) + spare.min(u64::from(u32::MAX / 4));
        let mut groups = 1;
        loop {
            let per_group = inodes.div_ceil(groups).next_multiple_of(16);
            let table_blocks = per_group * INODE_LEN as u64 / BLOCK;
            let end = data_end + groups * (table_blocks + 2);
            let blocks = end + spare;
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

    fn write(
        &self,
        writer: &Writer,
        inodes: &[(u32, bool, [u8; INODE_LEN])],
        uuid: [u8; 16],
        used_inodes: u32,
    ) -> Result<u64, WriterError> {
        let seed = Superblock::seed(&uuid);
        let file = &writer.file;
        file.set_len(self.blocks * BLOCK)?;
        for (number, _, bytes) in inodes {
            let (group, index) = ((number - 1) / self.inodes_per_group, (number - 1) % self.inodes_per_group);
            file.write_all_at(bytes, self.table(group) * BLOCK + u64::from(index) * INODE_LEN as u64)?;
        }
        let mut free = writer.free.clone();
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
            group.directories = inodes
                .iter()
                .filter(|(ino, directory, _)| *directory && (ino - 1) / self.inodes_per_group == number)
                .count() as u32;
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
            journal: None,
            journal_size: 0,
        };
        file.write_all_at(&superblock.encode(), 1024)?;
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
