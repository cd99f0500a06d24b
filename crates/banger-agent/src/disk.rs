//! Making a filesystem as large as its drive, when that has grown since the last boot.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Where ext4 has its superblock, and how much of it says how large the filesystem is.
const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK_LEN: usize = 1024;
/// What it has at 0x38.
const MAGIC: [u8; 2] = [0x53, 0xef];
/// The largest block there is, as a power of two beyond 1 KiB.
const BLOCK_SHIFT_MAX: u32 = 6;

/// Why a filesystem is no larger than before.
#[derive(Debug)]
pub(crate) struct Stays {
    mib: u64,
    error: io::Error,
}

impl Stays {
    /// Tells whether its kind never grows.
    pub(crate) fn is_for_good(&self) -> bool {
        self.error.raw_os_error() == Some(rustix::io::Errno::OPNOTSUPP.raw_os_error())
    }

    /// A sentence for the owner of the vm whose disk it is.
    pub(crate) fn text(&self) -> String {
        let why = if self.is_for_good() {
            "it was made by an earlier banger, whose disks do not grow; a new vm has one that does".to_owned()
        } else {
            self.error.to_string()
        };
        format!("the disk stays as it is, {} MiB: {why}", self.mib)
    }
}

/// Grows the ext4 filesystem of `device`, which is mounted at `place`, to the device's length. Another filesystem stays as
/// it is. After an error, so does this one, and can be used.
pub(crate) fn grow(device: &Path, place: &Path) -> Result<(), Stays> {
    let sizes = || -> io::Result<_> {
        let mut file = File::open(device)?;
        let mut superblock = [0; SUPERBLOCK_LEN];
        file.read_exact_at(&mut superblock, SUPERBLOCK_AT)?;
        Ok((size(&superblock), file.seek(SeekFrom::End(0))?))
    };
    let (of_filesystem, of_device) = sizes().map_err(|error| Stays { mib: 0, error })?;
    let Some((blocks, block_len)) = of_filesystem else { return Ok(()) };
    let wanted = of_device / block_len;
    if wanted <= blocks {
        return Ok(());
    }
    let grown = File::open(place).and_then(|root| banger_sys::filesystem::grow_ext4(root, wanted));
    grown.map_err(|error| Stays { mib: (blocks * block_len) >> 20, error })
}

/// How many blocks an ext4 has, and bytes a block.
fn size(superblock: &[u8; SUPERBLOCK_LEN]) -> Option<(u64, u64)> {
    if superblock[0x38..0x3a] != MAGIC {
        return None;
    }
    let number = |at: usize| {
        let bytes = superblock[at..at + 4].try_into().unwrap_or_default();
        u64::from(u32::from_le_bytes(bytes))
    };
    let shift = u32::try_from(number(0x18)).ok().filter(|shift| *shift <= BLOCK_SHIFT_MAX)?;
    let has_high = number(0x60) & 0x80 != 0;
    let high = if has_high { number(0x150) << 32 } else { 0 };
    Some((number(0x04) | high, 1024 << shift))
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_of_all_lengths_are_read() {
        let mut superblock = [0; 1024];
        assert_eq!(size(&superblock), None, "another filesystem");
        superblock[0x38..0x3a].copy_from_slice(&super::MAGIC);
        superblock[0x04..0x08].copy_from_slice(&7u32.to_le_bytes());
        superblock[0x18] = 2;
        superblock[0x150] = 1;
        assert_eq!(size(&superblock), Some((7, 4096)), "without 64bit the high half means something else");
        superblock[0x60] = 0x80;
        assert_eq!(size(&superblock), Some(((1 << 32) | 7, 4096)));
        superblock[0x18] = 40;
        assert_eq!(size(&superblock), None);
    }
}
