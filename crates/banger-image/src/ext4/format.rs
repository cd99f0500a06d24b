//! The on-disk structures, as bytes.

use super::journal::JOURNAL_BLOCKS;

/// Bytes of a block.
pub(super) const BLOCK: u64 = 4096;
/// The same, for buffers.
pub(super) const BLOCK_LEN: usize = 4096;
/// Blocks of a group: one bitmap block has that many bits.
pub(super) const GROUP_BLOCKS: u64 = 32768;
/// Bytes of an inode.
pub(super) const INODE_LEN: usize = 256;
/// Bytes of a group descriptor.
pub(super) const DESC_LEN: usize = 64;
/// Number of the root directory's inode.
pub(super) const ROOT_INO: u32 = 2;
/// Number of the journal's inode.
pub(super) const JOURNAL_INO: u32 = 8;
/// The first inode that is not reserved.
pub(super) const FIRST_INO: u32 = 11;
/// Extents that fit into an inode.
pub(super) const EXTENTS_INLINE: usize = 4;
/// Extents that fit into a block, before its checksum.
pub(super) const EXTENTS_PER_BLOCK: usize = (BLOCK_LEN - 16) / 12;
/// Blocks of one extent at most.
pub(super) const EXTENT_BLOCKS_MAX: u64 = 32768;
/// Room for attributes within an inode: what follows the fixed part, its extension and the magic number.
pub(super) const INODE_XATTR_LEN: usize = INODE_LEN - 128 - 32 - 4;

const EXTENT_MAGIC: u16 = 0xf30a;
const XATTR_MAGIC: u32 = 0xea02_0000;
/// The inode's block map is an extent tree.
pub(super) const FLAG_EXTENTS: u32 = 0x8_0000;

/// Group descriptor: no inode of the group is in use, its bitmap is not written.
pub(super) const BG_INODE_UNINIT: u16 = 1;
/// Group descriptor: no data block of the group is in use, its bitmap is not written.
pub(super) const BG_BLOCK_UNINIT: u16 = 2;
/// Group descriptor: the inode table is all zeroes where it is unused.
pub(super) const BG_INODE_ZEROED: u16 = 4;

/// The kernel's crc32c: no inversion before or after.
pub(super) fn crc(seed: u32, data: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, data)
}

pub(super) fn put16(buf: &mut [u8], at: usize, value: u16) {
    buf[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

pub(super) fn put32(buf: &mut [u8], at: usize, value: u32) {
    buf[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// The low half of a checksum.
fn low(value: u32) -> u16 {
    (value & 0xffff) as u16
}

/// The high half.
fn high(value: u32) -> u16 {
    (value >> 16) as u16
}

/// What a superblock says.
#[derive(Debug, Clone)]
pub(super) struct Superblock {
    pub(super) uuid: [u8; 16],
    pub(super) blocks: u64,
    pub(super) free_blocks: u64,
    pub(super) inodes_per_group: u32,
    pub(super) groups: u32,
    pub(super) free_inodes: u32,
    /// The map of the journal's inode.
    pub(super) journal: Option<[u8; 60]>,
    /// Whether a kernel can make it larger while it is mounted. Without, there is one superblock and nothing else that is
    /// written more than once.
    pub(super) grows: bool,
}

/// Groups whose descriptors fit into one block: a filesystem that grows has them in the first of these groups, and
/// copies in the second and the last (`meta_bg`), so that more groups need no room kept free.
pub(super) const META_GROUP: u32 = (BLOCK_LEN / DESC_LEN) as u32;

/// Tells whether a group of a filesystem that grows begins with a superblock: group 0, and powers of 3, 5 and 7
/// (`sparse_super`).
pub(super) fn has_superblock(group: u32) -> bool {
    let is_power = |of: u32| {
        let mut power = of;
        while power < group {
            power = power.saturating_mul(of);
        }
        power == group
    };
    group <= 1 || [3, 5, 7].into_iter().any(is_power)
}

/// Tells whether a group of a filesystem that grows has the descriptors of its [`META_GROUP`].
pub(super) fn has_descriptors(group: u32) -> bool {
    matches!(group % META_GROUP, 0 | 1) || group % META_GROUP == META_GROUP - 1
}

impl Superblock {
    /// Encodes it for the place at the beginning of `group`.
    pub(super) fn encode(&self, group: u32) -> [u8; 1024] {
        let mut sb = [0; 1024];
        put32(&mut sb, 0x00, self.inodes_per_group * self.groups);
        put32(&mut sb, 0x04, self.blocks as u32);
        put32(&mut sb, 0x0c, self.free_blocks as u32);
        put32(&mut sb, 0x10, self.free_inodes);
        put32(&mut sb, 0x18, 2); // block size 1024 << 2
        put32(&mut sb, 0x1c, 2);
        put32(&mut sb, 0x20, GROUP_BLOCKS as u32);
        put32(&mut sb, 0x24, GROUP_BLOCKS as u32);
        put32(&mut sb, 0x28, self.inodes_per_group);
        put16(&mut sb, 0x36, u16::MAX); // never checked because of a mount count
        put16(&mut sb, 0x38, 0xef53);
        put16(&mut sb, 0x3a, 1); // cleanly unmounted
        put16(&mut sb, 0x3c, 1); // on errors: continue
        put32(&mut sb, 0x4c, 1); // dynamic revision
        put32(&mut sb, 0x54, FIRST_INO);
        put16(&mut sb, 0x58, INODE_LEN as u16);
        put16(&mut sb, 0x5a, low(group));
        let journal = if self.journal.is_some() { 0x4 } else { 0 };
        // sparse_super2, which no kernel makes larger; else meta_bg and sparse_super
        let (copies2, meta, copies) = if self.grows { (0, 0x10, 0x1) } else { (0x200, 0, 0) };
        // ext_attr; has_journal
        put32(&mut sb, 0x5c, 0x8 | journal | copies2);
        // filetype, extents, 64bit, flex_bg
        put32(&mut sb, 0x60, 0x2 | 0x40 | 0x80 | 0x200 | meta);
        // large_file, huge_file, dir_nlink, extra_isize, metadata_csum
        put32(&mut sb, 0x64, 0x2 | 0x8 | 0x20 | 0x40 | 0x400 | copies);
        sb[0x68..0x78].copy_from_slice(&self.uuid);
        if let Some(map) = &self.journal {
            put32(&mut sb, 0xe0, JOURNAL_INO);
            sb[0xfd] = 1; // a copy of the journal's map follows
            sb[0x10c..0x10c + 60].copy_from_slice(map);
            let size = JOURNAL_BLOCKS * BLOCK;
            put32(&mut sb, 0x10c + 60, (size >> 32) as u32);
            put32(&mut sb, 0x10c + 64, size as u32);
        }
        sb[0xec..0xfc].copy_from_slice(&self.uuid); // hash seed
        sb[0xfc] = 1; // half MD4
        put16(&mut sb, 0xfe, DESC_LEN as u16);
        put32(&mut sb, 0x100, 0xc); // user_xattr, acl
        put32(&mut sb, 0x150, (self.blocks >> 32) as u32);
        put32(&mut sb, 0x158, (self.free_blocks >> 32) as u32);
        put16(&mut sb, 0x15c, 32);
        put16(&mut sb, 0x15e, 32);
        sb[0x174] = 4; // 16 groups to a flexible group
        sb[0x175] = 1; // crc32c
        let sum = crc(u32::MAX, &sb[..0x3fc]);
        put32(&mut sb, 0x3fc, sum);
        sb
    }

    /// What every other checksum begins with.
    pub(super) fn seed(uuid: &[u8; 16]) -> u32 {
        crc(u32::MAX, uuid)
    }
}

/// What a group descriptor says.
#[derive(Debug, Clone, Default)]
pub(super) struct Group {
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) inode_table: u64,
    pub(super) free_blocks: u32,
    pub(super) free_inodes: u32,
    pub(super) directories: u32,
    pub(super) inodes_never_used: u32,
    pub(super) flags: u16,
    pub(super) block_bitmap_sum: u32,
    pub(super) inode_bitmap_sum: u32,
}

impl Group {
    pub(super) fn encode(&self, number: u32, seed: u32) -> [u8; DESC_LEN] {
        let mut desc = [0; DESC_LEN];
        for (low_at, high_at, value) in
            [(0x0, 0x20, self.block_bitmap), (0x4, 0x24, self.inode_bitmap), (0x8, 0x28, self.inode_table)]
        {
            put32(&mut desc, low_at, value as u32);
            put32(&mut desc, high_at, (value >> 32) as u32);
        }
        for (low_at, high_at, value) in [
            (0x0c, 0x2c, self.free_blocks),
            (0x0e, 0x2e, self.free_inodes),
            (0x10, 0x30, self.directories),
            (0x1c, 0x32, self.inodes_never_used),
            (0x18, 0x38, self.block_bitmap_sum),
            (0x1a, 0x3a, self.inode_bitmap_sum),
        ] {
            put16(&mut desc, low_at, low(value));
            put16(&mut desc, high_at, high(value));
        }
        put16(&mut desc, 0x12, self.flags);
        let sum = crc(crc(seed, &number.to_le_bytes()), &desc);
        put16(&mut desc, 0x1e, low(sum));
        desc
    }
}

/// What an inode says.
#[derive(Debug, Clone)]
pub(super) struct RawInode {
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    pub(super) links: u16,
    pub(super) mtime: (i64, u32),
    /// Blocks of all kinds it uses.
    pub(super) blocks: u64,
    pub(super) flags: u32,
    pub(super) map: [u8; 60],
    pub(super) xattr_block: u64,
    /// Attributes that fit into the inode, encoded.
    pub(super) xattrs: Vec<u8>,
}

impl Default for RawInode {
    fn default() -> Self {
        Self {
            mode: 0,
            uid: 0,
            gid: 0,
            size: 0,
            links: 0,
            mtime: (0, 0),
            blocks: 0,
            flags: 0,
            map: [0; 60],
            xattr_block: 0,
            xattrs: Vec::new(),
        }
    }
}

impl RawInode {
    pub(super) fn encode(&self, number: u32, seed: u32) -> [u8; INODE_LEN] {
        let mut raw = [0; INODE_LEN];
        let sectors = self.blocks * (BLOCK / 512);
        put16(&mut raw, 0x00, self.mode);
        put16(&mut raw, 0x02, low(self.uid));
        put32(&mut raw, 0x04, self.size as u32);
        let (seconds, extra) = time(self.mtime);
        for (at, extra_at) in [(0x08, 0x8c), (0x0c, 0x84), (0x10, 0x88), (0x90, 0x94)] {
            put32(&mut raw, at, seconds);
            put32(&mut raw, extra_at, extra);
        }
        put16(&mut raw, 0x18, low(self.gid));
        put16(&mut raw, 0x1a, self.links);
        put32(&mut raw, 0x1c, sectors as u32);
        put32(&mut raw, 0x20, self.flags);
        raw[0x28..0x28 + 60].copy_from_slice(&self.map);
        put32(&mut raw, 0x68, self.xattr_block as u32);
        put32(&mut raw, 0x6c, (self.size >> 32) as u32);
        put16(&mut raw, 0x74, (sectors >> 32) as u16);
        put16(&mut raw, 0x76, (self.xattr_block >> 32) as u16);
        put16(&mut raw, 0x78, high(self.uid));
        put16(&mut raw, 0x7a, high(self.gid));
        put16(&mut raw, 0x80, 32);
        if !self.xattrs.is_empty() {
            put32(&mut raw, 0xa0, XATTR_MAGIC);
            raw[0xa4..0xa4 + self.xattrs.len()].copy_from_slice(&self.xattrs);
        }
        let sum = crc(inode_seed(number, seed), &raw);
        put16(&mut raw, 0x7c, low(sum));
        put16(&mut raw, 0x82, high(sum));
        raw
    }
}

/// What checksums of an inode and of its blocks begin with; generations are always zero.
pub(super) fn inode_seed(number: u32, seed: u32) -> u32 {
    crc(crc(seed, &number.to_le_bytes()), &[0; 4])
}

/// Seconds since 1970 as 34 bits, signed, and nanoseconds. Times out of range become the nearest one.
fn time((seconds, nanos): (i64, u32)) -> (u32, u32) {
    let seconds = seconds.clamp(i64::from(i32::MIN), i64::from(i32::MIN) + (1 << 34) - 1);
    let epoch = ((seconds - i64::from(seconds as i32)) >> 32) & 3;
    (seconds as u32, (nanos.min(999_999_999) << 2) | epoch as u32)
}

/// An entry of an extent tree: `(first logical block, physical block, blocks)`; for an index the last one is unused.
pub(super) type Leaf = (u32, u64, u16);

/// Writes an extent node into `buf`, which is an inode's map or a block without its checksum.
pub(super) fn extent_node(buf: &mut [u8], depth: u16, entries: &[Leaf]) {
    put16(buf, 0, EXTENT_MAGIC);
    put16(buf, 2, entries.len() as u16);
    put16(buf, 4, ((buf.len() - 12) / 12) as u16);
    put16(buf, 6, depth);
    for (n, (logical, physical, len)) in entries.iter().enumerate() {
        let at = 12 + n * 12;
        put32(buf, at, *logical);
        if depth == 0 {
            put16(buf, at + 4, *len);
            put16(buf, at + 6, (physical >> 32) as u16);
            put32(buf, at + 8, *physical as u32);
        } else {
            put32(buf, at + 4, *physical as u32);
            put16(buf, at + 8, (physical >> 32) as u16);
        }
    }
}

/// The name of an attribute as ext4 has it: a number for the well-known prefixes, and the rest.
fn xattr_name(name: &[u8]) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" => return Some((2, b"")),
        b"system.posix_acl_default" => return Some((3, b"")),
        _ => {}
    }
    [(1, &b"user."[..]), (4, b"trusted."), (6, b"security."), (7, b"system.")]
        .into_iter()
        .find_map(|(number, prefix)| Some((number, name.strip_prefix(prefix)?)))
        .filter(|(_, rest)| !rest.is_empty() && rest.len() <= 255)
}

/// Converts the attribute form of an ACL into the form on disk. None when it is not one.
fn acl(value: &[u8]) -> Option<Vec<u8>> {
    let (version, entries) = value.split_at_checked(4)?;
    if version != 2u32.to_le_bytes() || entries.len() % 8 != 0 {
        return None;
    }
    let mut out = 1u32.to_le_bytes().to_vec();
    for entry in entries.chunks_exact(8) {
        // Named users and groups have a number, the others don't.
        let named = matches!(u16::from_le_bytes([entry[0], entry[1]]), 0x02 | 0x08);
        out.extend_from_slice(&entry[..if named { 8 } else { 4 }]);
    }
    Some(out)
}

fn xattr_hash(name: &[u8], value: &[u8]) -> u32 {
    let mut hash = 0u32;
    for byte in name {
        hash = (hash << 5) ^ (hash >> 27) ^ u32::from(*byte);
    }
    for word in value.chunks(4) {
        let mut bytes = [0; 4];
        bytes[..word.len()].copy_from_slice(word);
        hash = hash.rotate_left(16) ^ u32::from_le_bytes(bytes);
    }
    hash
}

/// An attribute in the form on disk.
#[derive(Debug)]
pub(super) struct RawXattr {
    index: u8,
    name: Vec<u8>,
    value: Vec<u8>,
}

/// Turns names and values into the form on disk, sorted as ext4 wants them. The error is a name that has none.
pub(super) fn raw_xattrs(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<Vec<RawXattr>, Vec<u8>> {
    let mut raw = Vec::new();
    for (name, value) in xattrs {
        let (index, rest) = xattr_name(name).ok_or_else(|| name.clone())?;
        let value =
            if matches!(index, 2 | 3) { acl(value).ok_or_else(|| name.clone())? } else { value.clone() };
        raw.push(RawXattr { index, name: rest.to_vec(), value });
    }
    raw.sort_by(|a, b| (a.index, a.name.len(), &a.name).cmp(&(b.index, b.name.len(), &b.name)));
    Ok(raw)
}

/// Writes entries from the front of `area` and values from its back. None when they don't fit. `head` bytes before
/// `area` count for the values' offsets.
fn xattr_entries(area: &mut [u8], head: usize, xattrs: &[RawXattr]) -> Option<u32> {
    let (mut at, mut end, mut combined) = (0, area.len(), 0u32);
    for xattr in xattrs {
        let entry_len = (16 + xattr.name.len()).next_multiple_of(4);
        let value_len = xattr.value.len().next_multiple_of(4);
        // Four zero bytes end the list.
        if at + entry_len + 4 + value_len > end {
            return None;
        }
        end -= value_len;
        area[end..end + xattr.value.len()].copy_from_slice(&xattr.value);
        let hash = xattr_hash(&xattr.name, &xattr.value);
        combined = combined.rotate_left(16) ^ hash;
        area[at] = xattr.name.len() as u8;
        area[at + 1] = xattr.index;
        put16(area, at + 2, if xattr.value.is_empty() { 0 } else { (head + end) as u16 });
        put32(area, at + 8, xattr.value.len() as u32);
        put32(area, at + 12, hash);
        area[at + 16..at + 16 + xattr.name.len()].copy_from_slice(&xattr.name);
        at += entry_len;
    }
    Some(combined)
}

/// Attributes within an inode, or none when they need a block.
pub(super) fn xattrs_inline(xattrs: &[RawXattr]) -> Option<Vec<u8>> {
    let mut area = vec![0; INODE_XATTR_LEN];
    xattr_entries(&mut area, 0, xattrs).map(|_| area)
}

/// Attributes in a block of their own, or none when they don't fit.
pub(super) fn xattrs_block(xattrs: &[RawXattr], number: u64, seed: u32) -> Option<Vec<u8>> {
    let mut block = vec![0; BLOCK_LEN];
    let hash = xattr_entries(&mut block[32..], 32, xattrs)?;
    put32(&mut block, 0, XATTR_MAGIC);
    put32(&mut block, 4, 1);
    put32(&mut block, 8, 1);
    put32(&mut block, 12, hash);
    let sum = crc(crc(seed, &number.to_le_bytes()), &block);
    put32(&mut block, 16, sum);
    Some(block)
}

/// Encodes a directory: its blocks, each with a checksum. Entries are `(name, inode, file type)`.
pub(super) fn directory<'a>(
    entries: impl Iterator<Item = (&'a [u8], u32, u8)>,
    number: u32,
    seed: u32,
) -> Vec<u8> {
    const ROOM: usize = BLOCK_LEN - 12;
    let mut out: Vec<u8> = Vec::new();
    let (mut at, mut last) = (ROOM, 0);
    for (name, ino, kind) in entries {
        let len = (8 + name.len()).next_multiple_of(4);
        if at + len > ROOM {
            close_block(&mut out, at, last);
            out.resize(out.len() + BLOCK_LEN, 0);
            at = 0;
        }
        let start = out.len() - BLOCK_LEN + at;
        put32(&mut out, start, ino);
        put16(&mut out, start + 4, len as u16);
        out[start + 6] = name.len() as u8;
        out[start + 7] = kind;
        out[start + 8..start + 8 + name.len()].copy_from_slice(name);
        last = at;
        at += len;
    }
    close_block(&mut out, at, last);
    for block in out.chunks_exact_mut(BLOCK_LEN) {
        put16(block, ROOM + 4, 12);
        block[ROOM + 7] = 0xde;
        let sum = crc(inode_seed(number, seed), &block[..ROOM]);
        put32(block, ROOM + 8, sum);
    }
    out
}

/// Lets the last entry of the last block reach to the checksum.
fn close_block(out: &mut [u8], at: usize, last: usize) {
    const ROOM: usize = BLOCK_LEN - 12;
    if out.is_empty() || at >= ROOM {
        return;
    }
    let start = out.len() - BLOCK_LEN + last;
    put16(out, start + 4, (ROOM - last) as u16);
}
