//! ext4, written as a stream and never read.
//!
//! ```text
//! block 0      superblock
//! block 1..    group descriptors (a fixed reserve)
//! then         data, in the order it arrives, with holes for zeroes
//! at the end   directories, extent and attribute blocks, inode tables, bitmaps
//! ```
//!
//! Data goes to its final place as it arrives; everything else is held in memory and written by
//! [`Writer::finish`]. `flex_bg` lets the metadata lie anywhere and `sparse_super2` without backups keeps every other
//! block free for data, so a layout is a single running number. Same calls, same bytes.
//!
//! Source of the format: the kernel's `Documentation/filesystems/ext4`.

mod data;
mod empty;
mod format;
mod journal;
mod layout;
mod writer;

pub use empty::{disk_len, format_empty};
pub use writer::{Extent, Ino, Meta, Node, Room, Slot, Writer, WriterError, check_xattrs};
