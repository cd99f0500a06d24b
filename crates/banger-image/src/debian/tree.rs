//! What unpacked packages are written into: a file tree under construction.
//!
//! Paths are bytes without a leading slash; parents exist before their children. A later entry replaces an earlier one of
//! the same path, except that a directory keeps its children.

use std::io::{self, Read};

/// Owner, mode and time of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: i64,
}

/// A device, or a fifo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// A character device with its number.
    Char(u32, u32),
    /// A block device with its number.
    Block(u32, u32),
    /// A fifo.
    Fifo,
}

/// A file tree being written.
pub trait Tree {
    /// Adds a directory, or changes the attributes of one.
    fn directory(&mut self, path: &[u8], attributes: &Attributes) -> io::Result<()>;
    /// Adds a regular file of `size` bytes.
    fn file(
        &mut self,
        path: &[u8],
        attributes: &Attributes,
        size: u64,
        data: &mut dyn Read,
    ) -> io::Result<()>;
    /// Adds a symbolic link.
    fn symlink(&mut self, path: &[u8], target: &[u8], attributes: &Attributes) -> io::Result<()>;
    /// Adds another name of a file that is in the tree.
    fn hard_link(&mut self, path: &[u8], existing: &[u8]) -> io::Result<()>;
    /// Adds a device or a fifo.
    fn special(&mut self, path: &[u8], special: Special, attributes: &Attributes) -> io::Result<()>;
}
