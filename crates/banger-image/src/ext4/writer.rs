//! Inodes in memory, data on the disk.

use super::data::Pieces;
use super::format::{
    self, BLOCK, BLOCK_LEN, EXTENT_BLOCKS_MAX, EXTENTS_INLINE, EXTENTS_PER_BLOCK, FIRST_INO, FLAG_EXTENTS,
    JOURNAL_INO, Leaf, ROOT_INO, RawInode, Superblock,
};
use super::journal::{self, JOURNAL_BLOCKS};
use super::layout::{InodeTable, Layout};
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// First block of data. Before it, room for the descriptors of 4,000 groups: 500 GiB.
pub(super) const DATA_START: u64 = 64;
/// Bytes read at once.
const CHUNK: usize = 1 << 20;
/// Longest file: block numbers have 32 bits.
const FILE_LEN_MAX: u64 = (u32::MAX as u64) * BLOCK;
/// Hard links ext4 allows to a file.
const LINKS_MAX: u32 = 65_000;

/// A filesystem could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriterError {
    /// The file can't be written, or the data can't be read.
    #[error("could not write the filesystem")]
    Io(#[from] io::Error),
    /// An attribute that ext4 has no room or no form for.
    #[error("extended attribute `{}` {reason}", .name.escape_ascii())]
    Xattr {
        /// The attribute's name.
        name: Vec<u8>,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// One hard link too many.
    #[error("more than {LINKS_MAX} hard links to one file")]
    Links,
    /// A file that is too long, with its holes.
    #[error("a file of {0} bytes, more than the 16 TiB ext4 allows")]
    FileTooLarge(u64),
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

/// What a name in a directory stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    ino: Ino,
    /// The layer that put it there.
    layer: u32,
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
    Directory(BTreeMap<Vec<u8>, Slot>),
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

/// What a finished filesystem has besides what was put into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// So many free blocks of 4 KiB and as many free inodes. No journal: it is read, or written to just once.
    Spare(u64),
    /// A journal, and what is free of so many bytes in all, with an inode for 16 KiB: a machine will live on it. Larger
    /// than that where the content leaves less than 64 MiB.
    Disk(u64),
}

/// Writes one filesystem.
#[derive(Debug)]
pub struct Writer {
    file: File,
    next_block: u64,
    free: BTreeMap<u64, u64>,
    inodes: Vec<Option<Inode>>,
    /// How many of them are left.
    in_use: usize,
    chunk: Vec<u8>,
    /// The last blocks before `next_block`, not yet written: many small files become one write.
    pending: Vec<u8>,
    /// Bytes of memory that all calls so far asked for, about.
    memory: u64,
    layer: u32,
    /// Directories in which nothing of an earlier layer is left.
    emptied: HashSet<Ino>,
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
            in_use: 1,
            chunk: vec![0; CHUNK],
            pending: Vec::with_capacity(CHUNK),
            memory: 0,
            layer: 0,
            emptied: HashSet::new(),
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
        self.slot(directory, name).map(|slot| slot.ino)
    }

    fn slot(&self, directory: Ino, name: &[u8]) -> Option<Slot> {
        match self.node(directory)? {
            Node::Directory(entries) => entries.get(name).copied(),
            _ => None,
        }
    }

    /// Begins a new layer: what is there now can be told from what comes.
    pub fn begin_layer(&mut self) {
        self.layer += 1;
        self.emptied.clear();
    }

    /// Returns the number of inodes in use.
    #[must_use]
    pub fn inode_count(&self) -> usize {
        self.in_use
    }

    /// Returns about how many bytes of memory were asked for, what was removed since included.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory
    }

    /// Returns how many bytes of data are in their place, what was removed since included.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        (self.next_block - DATA_START) * BLOCK
    }

    /// Writes data to its place and returns what a file needs to have it.
    ///
    /// # Errors
    /// When `data` ends before `size` bytes, can't be read, or the disk can't be written.
    pub fn write_data(&mut self, size: u64, data: &mut dyn Read) -> Result<Node, WriterError> {
        self.write_sparse(size, &[(0, size)], data)
    }

    /// The same for a file with holes: `data` has the `(offset, length)` pieces one after another, which must be in order
    /// and within the size.
    ///
    /// # Errors
    /// As `write_data`, and when the file is too long.
    pub fn write_sparse(
        &mut self,
        size: u64,
        pieces: &[(u64, u64)],
        data: &mut dyn Read,
    ) -> Result<Node, WriterError> {
        if size > FILE_LEN_MAX {
            return Err(WriterError::FileTooLarge(size));
        }
        let mut extents: Vec<Extent> = Vec::new();
        let mut chunk = std::mem::take(&mut self.chunk);
        let mut pieces = Pieces::new(size, pieces, data);
        let result = loop {
            match pieces.next_chunk(&mut chunk) {
                Ok(None) => break Ok(()),
                Ok(Some((logical, padded))) => {
                    if let Err(err) = self.write_blocks(logical, &chunk[..padded], &mut extents) {
                        break Err(err);
                    }
                }
                Err(err) => break Err(err),
            }
        };
        self.chunk = chunk;
        self.memory += (extents.len() * size_of::<Extent>()) as u64;
        result.map(|()| Node::File { size, extents })
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
                self.push(now)?;
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

    /// Puts whole blocks at the end.
    fn push(&mut self, blocks: &[u8]) -> io::Result<()> {
        // What waits has its place right before these blocks, so it goes first.
        let direct = blocks.len() >= CHUNK / 2;
        if direct || self.pending.len() + blocks.len() > CHUNK {
            self.flush()?;
        }
        if direct {
            self.file.write_all_at(blocks, self.next_block * BLOCK)?;
        } else {
            self.pending.extend_from_slice(blocks);
        }
        self.next_block += (blocks.len() / BLOCK_LEN) as u64;
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let start = self.next_block * BLOCK - self.pending.len() as u64;
        self.file.write_all_at(&self.pending, start)?;
        self.pending.clear();
        Ok(())
    }

    /// Makes an inode under a name, replacing what had it. A directory that replaces a directory keeps its entries.
    pub fn add(&mut self, directory: Ino, name: &[u8], meta: Meta, node: Node) -> Ino {
        if let (Some(old), Node::Directory(_)) = (self.lookup(directory, name), &node)
            && matches!(self.node(old), Some(Node::Directory(_)))
        {
            self.set_meta(old, meta);
            self.insert(directory, name, old);
            return old;
        }
        self.remove(directory, name);
        let attributes: usize = meta.xattrs.iter().map(|(name, value)| name.len() + value.len() + 64).sum();
        let target = if let Node::Symlink(target) = &node { target.len() } else { 0 };
        self.memory += (size_of::<Option<Inode>>() + attributes + target) as u64;
        let ino = Ino(self.inodes.len() as u32);
        self.inodes.push(Some(Inode { meta, node, links: 1 }));
        self.in_use += 1;
        self.insert(directory, name, ino);
        ino
    }

    /// Gives a file another name.
    ///
    /// # Errors
    /// When it has too many already.
    pub fn link(&mut self, directory: Ino, name: &[u8], ino: Ino) -> Result<(), WriterError> {
        if self.lookup(directory, name) == Some(ino) {
            self.insert(directory, name, ino);
            return Ok(());
        }
        if let Some(Some(inode)) = self.inodes.get_mut(ino.0 as usize) {
            if inode.links >= LINKS_MAX {
                return Err(WriterError::Links);
            }
            inode.links += 1;
        }
        self.remove(directory, name);
        self.insert(directory, name, ino);
        Ok(())
    }

    fn insert(&mut self, directory: Ino, name: &[u8], ino: Ino) {
        if let Some(Some(Inode { node: Node::Directory(entries), .. })) =
            self.inodes.get_mut(directory.0 as usize)
        {
            entries.insert(name.to_vec(), Slot { ino, layer: self.layer });
            self.memory += (size_of::<(Vec<u8>, Slot)>() + name.len()) as u64;
        }
    }

    /// Removes a name, and with the last one the inode and everything below it.
    pub fn remove(&mut self, directory: Ino, name: &[u8]) {
        let Some(Some(Inode { node: Node::Directory(entries), .. })) =
            self.inodes.get_mut(directory.0 as usize)
        else {
            return;
        };
        let mut doomed: Vec<Ino> = entries.remove(name).into_iter().map(|slot| slot.ino).collect();
        while let Some(ino) = doomed.pop() {
            let Some(slot) = self.inodes.get_mut(ino.0 as usize) else { continue };
            let Some(inode) = slot else { continue };
            inode.links -= 1;
            if inode.links > 0 {
                continue;
            }
            self.in_use -= 1;
            match slot.take().map(|inode| inode.node) {
                Some(Node::Directory(entries)) => doomed.extend(entries.into_values().map(|slot| slot.ino)),
                Some(Node::File { extents, .. }) => {
                    for extent in extents {
                        self.free.insert(extent.physical, u64::from(extent.blocks));
                    }
                }
                _ => {}
            }
        }
    }

    /// Removes what earlier layers put under a name. What the current one put there stays, whatever came first.
    pub fn remove_older(&mut self, directory: Ino, name: &[u8]) {
        let Some(slot) = self.slot(directory, name) else { return };
        if matches!(self.node(slot.ino), Some(Node::Directory(_))) {
            self.empty_older(slot.ino);
        }
        self.settle(directory, name, slot);
    }

    /// Removes what earlier layers put into a directory.
    pub fn empty_older(&mut self, directory: Ino) {
        let (mut todo, mut order) = (vec![directory], Vec::new());
        while let Some(at) = todo.pop() {
            // Once is enough for a layer, however many whiteouts it has.
            if !self.emptied.insert(at) {
                continue;
            }
            order.push(at);
            if let Some(Node::Directory(entries)) = self.node(at) {
                todo.extend(
                    entries.values().map(|slot| slot.ino).filter(|ino| is_directory(&self.inodes, *ino)),
                );
            }
        }
        // What is below was found later.
        for at in order.into_iter().rev() {
            let Some(Node::Directory(entries)) = self.node(at) else { continue };
            let older: Vec<(Vec<u8>, Slot)> = entries
                .iter()
                .filter(|(_, slot)| slot.layer < self.layer)
                .map(|(name, slot)| (name.clone(), *slot))
                .collect();
            for (name, slot) in older {
                self.settle(at, &name, slot);
            }
        }
    }

    /// Removes a name of an earlier layer, unless it is a directory that the current layer put something into: then it is
    /// as if that had made it.
    fn settle(&mut self, directory: Ino, name: &[u8], slot: Slot) {
        if slot.layer == self.layer {
            return;
        }
        if matches!(self.node(slot.ino), Some(Node::Directory(entries)) if !entries.is_empty()) {
            self.set_meta(slot.ino, Meta { mode: 0o755, ..Meta::default() });
            self.insert(directory, name, slot.ino);
        } else {
            self.remove(directory, name);
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

    /// Writes all metadata and returns the filesystem's size in bytes.
    ///
    /// # Errors
    /// When the disk can't be written or something does not fit into ext4.
    pub fn finish(mut self, uuid: [u8; 16], room: Room) -> Result<u64, WriterError> {
        let seed = Superblock::seed(&uuid);
        let numbers = self.numbers();
        let mut table = self.inode_table(&numbers, seed)?;
        self.flush()?;
        self.punch()?;
        let journal = match room {
            Room::Spare(_) => None,
            Room::Disk(_) => {
                let inode = journal::inode(self.next_block);
                journal::write(&self.file, self.next_block, &uuid)?;
                self.next_block += JOURNAL_BLOCKS;
                table.set(JOURNAL_INO, false, &inode.encode(JOURNAL_INO, seed));
                Some(inode.map)
            }
        };
        let layout = Layout::new(self.next_block, table.len(), room)?;
        layout.write(&self.file, &self.free, &table, uuid, journal)
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

    fn inode_table(&mut self, numbers: &[u32], seed: u32) -> Result<InodeTable, WriterError> {
        let parents = self.parents();
        let inodes = std::mem::take(&mut self.inodes);
        let mut table = InodeTable::new(self.in_use - 1);
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
                    let subdirectories =
                        entries.values().filter(|slot| is_directory(&inodes, slot.ino)).count();
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
            table.set(number, kind == 0x4000, &raw.encode(number, seed));
        }
        Ok(table)
    }

    /// The directory each directory is in.
    fn parents(&self) -> BTreeMap<u32, u32> {
        let mut parents = BTreeMap::new();
        for (index, inode) in self.inodes.iter().enumerate() {
            if let Some(Inode { node: Node::Directory(entries), .. }) = inode {
                let below = entries.values().filter(|slot| is_directory(&self.inodes, slot.ino));
                parents.extend(below.map(|slot| (slot.ino.0, index as u32)));
            }
        }
        parents
    }

    fn write_directory(
        &mut self,
        inodes: &[Option<Inode>],
        entries: &BTreeMap<Vec<u8>, Slot>,
        numbers: &[u32],
        (number, parent): (u32, u32),
        seed: u32,
    ) -> Result<(Vec<Extent>, u64), WriterError> {
        let dots = [(&b"."[..], number, 2), (&b".."[..], parent, 2)];
        let rest = entries.iter().map(|(name, Slot { ino, .. })| {
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
        let mut padded = bytes.to_vec();
        padded.resize(blocks * BLOCK_LEN, 0);
        self.push(&padded)?;
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
        let entries = raw_xattrs(xattrs)?;
        if let Some(area) = format::xattrs_inline(&entries) {
            raw.xattrs = area;
            return Ok(());
        }
        let block = format::xattrs_block(&entries, self.next_block, seed).ok_or_else(|| too_large(xattrs))?;
        raw.xattr_block = self.next_block;
        raw.blocks += 1;
        self.append(&block)?;
        Ok(())
    }
}

/// Says whether ext4 can hold these attributes, before anything is built on it.
///
/// # Errors
/// The attribute that is in the way.
pub fn check_xattrs(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<(), WriterError> {
    let entries = raw_xattrs(xattrs)?;
    format::xattrs_block(&entries, 0, 0).map(drop).ok_or_else(|| too_large(xattrs))
}

fn raw_xattrs(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<Vec<format::RawXattr>, WriterError> {
    format::raw_xattrs(xattrs)
        .map_err(|name| WriterError::Xattr { name, reason: "has no valid form in ext4" })
}

fn too_large(xattrs: &[(Vec<u8>, Vec<u8>)]) -> WriterError {
    let largest = xattrs.iter().max_by_key(|(_, value)| value.len());
    let name = largest.map(|(name, _)| name.clone()).unwrap_or_default();
    WriterError::Xattr { name, reason: "is too large for ext4, which has 4 KiB for all of a file's" }
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
