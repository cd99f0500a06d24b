//! What kind of filesystem is in a file, told by its superblock alone.
//!
//! For root filesystems that others made: the kinds a guest's kernel can mount read-only. Nothing but the superblock is
//! read, with bounds, and nothing is mounted.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

/// Where the superblocks of ext4 and erofs begin.
const SUPERBLOCK_AT: u64 = 1024;
/// Length of ext4's, the longest of the three.
const SUPERBLOCK_LEN: usize = 1024;
/// ext4, in the names and places of the kernel's `ext4.h`.
const EXT4_MAGIC: u16 = 0xef53;
const EXT4_INCOMPAT_RECOVER: u32 = 0x4;
const EXT4_INCOMPAT_64BIT: u32 = 0x80;
const EXT4_RO_COMPAT_METADATA_CSUM: u32 = 0x400;
/// Largest exponent of a block's size beyond 1 KiB: 64 KiB.
const EXT4_LOG_BLOCK_SIZE_MAX: u32 = 6;
/// `EROFS_SUPER_MAGIC_V1` of `erofs_fs.h`.
const EROFS_MAGIC: u32 = 0xe0f5_e1e2;
/// `SQUASHFS_MAGIC` of `squashfs_fs.h`, and the one version kernels since 2.6.29 read.
const SQUASHFS_MAGIC: &[u8] = b"hsqs";
const SQUASHFS_MAJOR: u16 = 4;

/// A file can't be a root filesystem.
#[derive(Debug, thiserror::Error)]
pub enum FilesystemError {
    /// It can't be read.
    #[error("could not read it")]
    Read(#[from] io::Error),
    /// It begins like none of the kinds there are.
    #[error(
        "it is neither an ext4, an erofs nor a squashfs filesystem; one with a partition table is not a filesystem"
    )]
    Unknown,
    /// It is longer than its file.
    #[error("the {kind} filesystem is {expected} bytes long, and only {found} of them are there")]
    Short {
        /// The kind.
        kind: Filesystem,
        /// How long it says it is.
        expected: u64,
        /// How long the file is.
        found: u64,
    },
    /// Its superblock can't be right.
    #[error("the superblock of the {kind} filesystem is damaged: {reason}")]
    Damaged {
        /// The kind.
        kind: Filesystem,
        /// In which respect.
        reason: &'static str,
    },
    /// It was in use, and what its journal has is not in its place.
    #[error("the ext4 filesystem was not unmounted, and its journal has to be replayed first")]
    Journal,
}

/// A kind of filesystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filesystem {
    /// ext2, ext3 and ext4.
    Ext4,
    /// erofs.
    Erofs,
    /// squashfs.
    Squashfs,
}

impl Filesystem {
    /// Returns what `mount -t` calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Erofs => "erofs",
            Self::Squashfs => "squashfs",
        }
    }

    /// Tells what is in a file, and checks that it is all there.
    ///
    /// # Errors
    /// When it is none of these, is cut off, or can't be mounted as it is.
    pub fn detect(file: &File) -> Result<Self, FilesystemError> {
        let length = file.metadata()?.len();
        let mut begin = [0; 96];
        read_up_to(file, &mut begin, 0)?;
        let mut block = [0; SUPERBLOCK_LEN];
        read_up_to(file, &mut block, SUPERBLOCK_AT)?;
        let (kind, expected) = if begin.starts_with(SQUASHFS_MAGIC) {
            if u16_at(&begin, 28) != SQUASHFS_MAJOR {
                return Err(damaged(Self::Squashfs, "it is of another version than 4"));
            }
            (Self::Squashfs, u64_at(&begin, 40))
        } else if u32_at(&block, 0) == EROFS_MAGIC {
            let bits = u32::from(block[12]);
            if !(9..=16).contains(&bits) {
                return Err(damaged(Self::Erofs, "its block size"));
            }
            (Self::Erofs, u64::from(u32_at(&block, 36)) << bits)
        } else if u16_at(&block, 0x38) == EXT4_MAGIC {
            (Self::Ext4, check_ext4(&block)?)
        } else {
            return Err(FilesystemError::Unknown);
        };
        if expected > length {
            return Err(FilesystemError::Short { kind, expected, found: length });
        }
        Ok(kind)
    }
}

impl fmt::Display for Filesystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Returns how long the filesystem is.
fn check_ext4(block: &[u8; SUPERBLOCK_LEN]) -> Result<u64, FilesystemError> {
    let incompat = u32_at(block, 0x60);
    if u32_at(block, 0x64) & EXT4_RO_COMPAT_METADATA_CSUM != 0 {
        let (content, checksum) = block.split_at(SUPERBLOCK_LEN - 4);
        // The kernel's crc has no final complement.
        if !crc32c::crc32c(content) != u32_at(checksum, 0) {
            return Err(damaged(Filesystem::Ext4, "its checksum"));
        }
    }
    let log = u32_at(block, 0x18);
    if log > EXT4_LOG_BLOCK_SIZE_MAX {
        return Err(damaged(Filesystem::Ext4, "its block size"));
    }
    if incompat & EXT4_INCOMPAT_RECOVER != 0 {
        return Err(FilesystemError::Journal);
    }
    let high = if incompat & EXT4_INCOMPAT_64BIT != 0 { u64::from(u32_at(block, 0x150)) } else { 0 };
    let blocks = u64::from(u32_at(block, 4)) | high << 32;
    blocks.checked_mul(1024 << log).ok_or(damaged(Filesystem::Ext4, "its length"))
}

fn damaged(kind: Filesystem, reason: &'static str) -> FilesystemError {
    FilesystemError::Damaged { kind, reason }
}

/// Reads what is there of a buffer; the rest stays zero.
fn read_up_to(file: &File, buffer: &mut [u8], at: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], at + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::{Filesystem, FilesystemError};
    use proptest::prelude::*;
    use std::fs::File;
    use std::io::Write as _;
    use std::os::unix::fs::FileExt as _;

    fn file(content: &[u8], length: u64) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file.set_len(length).unwrap();
        file
    }

    fn ext4() -> (tempfile::TempDir, File) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fs");
        crate::ext4::format_empty(&path, 128 << 20, [7; 16]).unwrap();
        let file = File::options().read(true).write(true).open(path).unwrap();
        (dir, file)
    }

    #[test]
    fn each_kind_is_told() {
        assert_eq!(Filesystem::detect(&ext4().1).unwrap(), Filesystem::Ext4);
        let mut erofs = vec![0; 4096];
        erofs[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
        (erofs[1036], erofs[1060]) = (12, 3);
        assert_eq!(Filesystem::detect(&file(&erofs, 3 * 4096)).unwrap(), Filesystem::Erofs);
        let mut squashfs = vec![0; 96];
        squashfs[..4].copy_from_slice(b"hsqs");
        (squashfs[28], squashfs[41]) = (4, 16);
        assert_eq!(Filesystem::detect(&file(&squashfs, 4096)).unwrap(), Filesystem::Squashfs);
        assert!(matches!(
            Filesystem::detect(&file(&squashfs, 4095)),
            Err(FilesystemError::Short { expected: 4096, found: 4095, .. })
        ));
        assert!(matches!(Filesystem::detect(&file(b"", 0)), Err(FilesystemError::Unknown)));
    }

    #[test]
    fn an_ext4_that_is_not_whole_is_refused() {
        let (_dir, file) = ext4();
        let length = file.metadata().unwrap().len();
        file.set_len(length - 1).unwrap();
        assert!(matches!(Filesystem::detect(&file), Err(FilesystemError::Short { .. })));
        file.set_len(length).unwrap();
        file.write_all_at(&[9], 1024 + 0x70).unwrap();
        let error = Filesystem::detect(&file).unwrap_err().to_string();
        assert_eq!(error, "the superblock of the ext4 filesystem is damaged: its checksum");
    }

    #[test]
    fn a_journal_to_replay_is_refused() {
        let (_dir, file) = ext4();
        let mut block = [0; 1024];
        file.read_exact_at(&mut block, 1024).unwrap();
        block[0x60] |= 4;
        let sum = !crc32c::crc32c(&block[..1020]);
        block[1020..].copy_from_slice(&sum.to_le_bytes());
        file.write_all_at(&block, 1024).unwrap();
        assert!(matches!(Filesystem::detect(&file), Err(FilesystemError::Journal)));
    }

    proptest! {
        #[test]
        fn random_superblocks_never_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..2048), magic in 0usize..4
        ) {
            let mut bytes = bytes;
            let magics: [(usize, &[u8]); 4] =
                [(0, b""), (0, b"hsqs"), (1024, &[0xe2, 0xe1, 0xf5, 0xe0]), (1024 + 0x38, &[0x53, 0xef])];
            let (at, magic) = magics[magic];
            if bytes.len() >= at + magic.len() {
                bytes[at..at + magic.len()].copy_from_slice(magic);
            }
            let _ = Filesystem::detect(&file(&bytes, bytes.len() as u64));
        }
    }
}
