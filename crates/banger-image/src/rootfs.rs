//! A root filesystem under construction: paths in, ext4 out.
//!
//! Paths are resolved inside the tree alone, symbolic links as a chroot would, so whatever a package or a layer calls
//! its files, nothing outside the image is ever touched. What can't be resolved is an error that names the path.

use crate::debian::tree::{Attributes, Special, Tree};
use crate::ext4::{Ino, Meta, Node, Room, Writer, WriterError, check_xattrs};
use sha2::{Digest as _, Sha256};
use std::collections::VecDeque;
use std::io::{self, Read};
use std::path::Path;

/// Symbolic links followed in one path, as in Linux.
const LINKS_FOLLOWED_MAX: usize = 40;
/// Components looked up for one path, links included; otherwise forty long links make one path cost a day.
const STEPS_MAX: usize = 4096;
/// Bytes of one component, as in Linux.
const NAME_LEN_MAX: usize = 255;
/// Bytes of a link's target, as in Linux.
const TARGET_LEN_MAX: usize = 4095;
/// Entries of one image; far above a distribution's full installation.
const ENTRIES_MAX: usize = 4_000_000;
/// Memory for one image's names, attributes, link targets and extents: ten times what a full installation needs.
const MEMORY_MAX: u64 = 1 << 30;
/// Where an image keeps its init, in the order a kernel looks.
const INITS: [&str; 4] = ["/sbin/init", "/usr/sbin/init", "/lib/systemd/systemd", "/usr/lib/systemd/systemd"];

/// A path can't be placed in the tree.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// Not a path that can be in an image.
    #[error("`{}` is not a path inside an image", .0.escape_ascii())]
    Path(Vec<u8>),
    /// Links that lead in a circle, or through something that is no directory.
    #[error("`{}` leads through links or files that are no directories", .0.escape_ascii())]
    Links(Vec<u8>),
    /// A hard link to something that isn't there.
    #[error("`{}` is a link to `{}`, which is not a file of the image", .path.escape_ascii(), .target.escape_ascii())]
    Target {
        /// The link.
        path: Vec<u8>,
        /// What it should be another name of.
        target: Vec<u8>,
    },
    /// A target no symbolic link can have.
    #[error("`{}` is a symbolic link to nothing, or to more than a path can be", .0.escape_ascii())]
    Symlink(Vec<u8>),
    /// Too many entries.
    #[error("more than {ENTRIES_MAX} entries")]
    Entries,
    /// Entries that take too much memory, by their number or by what they carry.
    #[error("the entries' names, attributes and links take more than {MEMORY_MAX} bytes")]
    Memory,
    /// The filesystem.
    #[error("could not write `{}`", .path.escape_ascii())]
    Write {
        /// The entry.
        path: Vec<u8>,
        /// Why.
        source: WriterError,
    },
    /// The end of the filesystem.
    #[error("could not finish the filesystem")]
    Finish(#[source] WriterError),
}

/// What a finished image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootfsSummary {
    /// Size of the filesystem in bytes.
    pub size_bytes: u64,
    /// Path of the init the image brings.
    pub init: Option<String>,
}

/// Where following a path ended.
enum Walk {
    Found(Ino),
    Missing { directory: Ino, name: Vec<u8> },
}

/// Builds one root filesystem.
#[derive(Debug)]
pub struct RootfsBuilder {
    writer: Writer,
}

impl RootfsBuilder {
    /// Begins a root filesystem in a new file.
    ///
    /// # Errors
    /// When the file exists or can't be made.
    pub fn create(path: &Path) -> Result<Self, RootfsError> {
        Ok(Self { writer: Writer::create(path).map_err(RootfsError::Finish)? })
    }

    /// Writes the metadata. The filesystem's identity is derived from `name`.
    ///
    /// # Errors
    /// When the disk is full or something does not fit into ext4.
    pub fn finish(self, name: &str, room: Room) -> Result<RootfsSummary, RootfsError> {
        let init = INITS.into_iter().find(|path| self.is_file(path.as_bytes())).map(str::to_owned);
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&Sha256::digest(name.as_bytes())[..16]);
        uuid[6] = (uuid[6] & 0x0f) | 0x80;
        uuid[8] = (uuid[8] & 0x3f) | 0x80;
        let size_bytes = self.writer.finish(uuid, room).map_err(RootfsError::Finish)?;
        Ok(RootfsSummary { size_bytes, init })
    }

    fn is_file(&self, path: &[u8]) -> bool {
        let mut path = path.to_vec();
        for _ in 0..LINKS_FOLLOWED_MAX {
            let Some((directory, name)) = self.existing_parent(&path) else { return false };
            match self.writer.lookup(directory, &name).and_then(|ino| self.writer.node(ino)) {
                Some(Node::File { .. }) => return true,
                Some(Node::Symlink(target)) if target.starts_with(b"/") => path = target.clone(),
                Some(Node::Symlink(target)) => {
                    let cut = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
                    path.truncate(cut);
                    path.push(b'/');
                    path.extend_from_slice(target);
                }
                _ => return false,
            }
        }
        false
    }

    fn existing_parent(&self, path: &[u8]) -> Option<(Ino, Vec<u8>)> {
        let mut parts: Vec<&[u8]> =
            path.split(|byte| *byte == b'/').filter(|part| !part.is_empty()).collect();
        let name = parts.pop()?.to_vec();
        match self.walk(parts.into_iter().map(<[u8]>::to_vec).collect())? {
            Walk::Found(directory) => Some((directory, name)),
            Walk::Missing { .. } => None,
        }
    }

    /// Follows components to a directory. None is a loop or a way through a file.
    fn walk(&self, mut todo: VecDeque<Vec<u8>>) -> Option<Walk> {
        let mut stack = vec![self.writer.root()];
        let (mut links, mut steps) = (0, 0);
        while let Some(part) = todo.pop_front() {
            steps += 1;
            if steps > STEPS_MAX {
                return None;
            }
            let at = *stack.last()?;
            match part.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    if stack.len() > 1 {
                        stack.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let Some(ino) = self.writer.lookup(at, &part) else {
                return Some(Walk::Missing { directory: at, name: part });
            };
            match self.writer.node(ino)? {
                Node::Directory(_) => stack.push(ino),
                Node::Symlink(target) => {
                    links += 1;
                    if links > LINKS_FOLLOWED_MAX {
                        return None;
                    }
                    if target.starts_with(b"/") {
                        stack.truncate(1);
                    }
                    for part in target.split(|byte| *byte == b'/').rev() {
                        todo.push_front(part.to_vec());
                    }
                }
                _ => return None,
            }
        }
        stack.last().copied().map(Walk::Found)
    }

    /// Resolves the directory of a path, making what is missing, and returns it with the last component.
    fn place(&mut self, path: &[u8]) -> Result<(Ino, Vec<u8>), RootfsError> {
        if self.writer.inode_count() >= ENTRIES_MAX {
            return Err(RootfsError::Entries);
        }
        if self.writer.memory_bytes() > MEMORY_MAX {
            return Err(RootfsError::Memory);
        }
        let parts: Vec<&[u8]> =
            path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
        let bad = |part: &&[u8]| *part == b".." || part.len() > NAME_LEN_MAX || part.contains(&0);
        let Some((name, parents)) = parts.split_last() else { return Err(RootfsError::Path(path.to_vec())) };
        if parts.iter().any(bad) {
            return Err(RootfsError::Path(path.to_vec()));
        }
        loop {
            let todo = parents.iter().map(|part| part.to_vec()).collect();
            match self.walk(todo).ok_or_else(|| RootfsError::Links(path.to_vec()))? {
                Walk::Found(directory) => return Ok((directory, name.to_vec())),
                // A parent nobody described. What follows it may still climb, so the walk starts over.
                Walk::Missing { directory, name } => {
                    let meta = Meta { mode: 0o755, ..Meta::default() };
                    self.writer.add(directory, &name, meta, Node::Directory(Default::default()));
                }
            }
        }
    }

    /// Begins a layer: what is there now is older than what comes.
    pub(crate) fn begin_layer(&mut self) {
        self.writer.begin_layer();
    }

    /// Writes the data of a file, which `put` then gives a name.
    pub(crate) fn write_data(
        &mut self,
        path: &[u8],
        size: u64,
        pieces: &[(u64, u64)],
        data: &mut dyn Read,
    ) -> Result<Node, RootfsError> {
        let written = self.writer.write_sparse(size, pieces, data);
        written.map_err(|source| RootfsError::Write { path: path.to_vec(), source })
    }

    /// Returns how many bytes of data were written.
    pub(crate) fn data_bytes(&self) -> u64 {
        self.writer.data_bytes()
    }

    /// Removes what older layers have under a path. What leads nowhere has nothing to remove.
    pub(crate) fn remove_older(&mut self, path: &[u8]) {
        if let Some((directory, name)) = self.existing_parent(path) {
            self.writer.remove_older(directory, &name);
        }
    }

    /// Removes what older layers have in a directory.
    pub(crate) fn empty_older(&mut self, path: &[u8]) {
        let parts = path.split(|byte| *byte == b'/').map(<[u8]>::to_vec).collect();
        if let Some(Walk::Found(directory)) = self.walk(parts) {
            self.writer.empty_older(directory);
        }
    }

    /// Gives what is under one path another name. The last component is not followed, as `link` doesn't.
    pub(crate) fn link(&mut self, path: &[u8], existing: &[u8]) -> Result<(), RootfsError> {
        let found = self.existing_parent(existing).and_then(|(directory, name)| {
            let ino = self.writer.lookup(directory, &name)?;
            (!matches!(self.writer.node(ino)?, Node::Directory(_))).then_some(ino)
        });
        let missing = || RootfsError::Target { path: path.to_vec(), target: existing.to_vec() };
        let ino = found.ok_or_else(missing)?;
        let (directory, name) = self.place(path)?;
        let linked = self.writer.link(directory, &name, ino);
        linked.map_err(|source| RootfsError::Write { path: path.to_vec(), source })
    }

    /// Puts something under a path, replacing what had it.
    pub(crate) fn put(&mut self, path: &[u8], meta: Meta, node: Node) -> Result<(), RootfsError> {
        let write = |source| RootfsError::Write { path: path.to_vec(), source };
        if !meta.xattrs.is_empty() {
            check_xattrs(&meta.xattrs).map_err(write)?;
        }
        if matches!(&node, Node::Symlink(to) if to.is_empty() || to.len() > TARGET_LEN_MAX || to.contains(&0))
        {
            return Err(RootfsError::Symlink(path.to_vec()));
        }
        let is_root = path.iter().all(|byte| matches!(byte, b'/' | b'.')) && !path.starts_with(b"..");
        if is_root && matches!(node, Node::Directory(_)) {
            self.writer.set_meta(self.writer.root(), meta);
            return Ok(());
        }
        let (directory, name) = self.place(path)?;
        self.writer.add(directory, &name, meta, node);
        Ok(())
    }
}

fn meta(attributes: &Attributes) -> Meta {
    Meta {
        mode: (attributes.mode & 0o7777) as u16,
        uid: attributes.uid,
        gid: attributes.gid,
        mtime: (attributes.mtime, 0),
        xattrs: Vec::new(),
    }
}

impl Tree for RootfsBuilder {
    fn directory(&mut self, path: &[u8], attributes: &Attributes) -> io::Result<()> {
        self.put(path, meta(attributes), Node::Directory(Default::default())).map_err(io::Error::other)
    }

    fn file(
        &mut self,
        path: &[u8],
        attributes: &Attributes,
        size: u64,
        data: &mut dyn Read,
    ) -> io::Result<()> {
        let written = self.writer.write_data(size, data);
        let node =
            written.map_err(|source| io::Error::other(RootfsError::Write { path: path.to_vec(), source }))?;
        self.put(path, meta(attributes), node).map_err(io::Error::other)
    }

    fn symlink(&mut self, path: &[u8], target: &[u8], attributes: &Attributes) -> io::Result<()> {
        self.put(path, meta(attributes), Node::Symlink(target.to_vec())).map_err(io::Error::other)
    }

    fn hard_link(&mut self, path: &[u8], existing: &[u8]) -> io::Result<()> {
        self.link(path, existing).map_err(io::Error::other)
    }

    fn special(&mut self, path: &[u8], special: Special, attributes: &Attributes) -> io::Result<()> {
        let node = match special {
            Special::Char(major, minor) => Node::Char(major, minor),
            Special::Block(major, minor) => Node::Block(major, minor),
            Special::Fifo => Node::Fifo,
        };
        self.put(path, meta(attributes), node).map_err(io::Error::other)
    }
}
