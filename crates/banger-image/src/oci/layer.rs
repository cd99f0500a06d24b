//! Layers, applied in order to a root filesystem under construction.
//!
//! What container runtimes do is done here: a parent that is a symbolic link is followed inside the image, as after a
//! `chroot`; a directory over a directory keeps what is in it, everything else replaces; a whiteout hides what *lower*
//! layers have, wherever in its layer it comes. Names with `..` are refused, names that begin with a slash are taken from
//! the image's root. Nothing of it touches a path of the host.

use std::io::Read;
use std::path::Path;

use super::digest::Digest;
use super::limits::Limits;
use super::stream::{LayerReader, Source, with_layers};
use crate::ext4::{Meta, Node, Room};
use crate::hash::{Algorithm, Hasher};
use crate::rootfs::{RootfsBuilder, RootfsError, RootfsSummary};
use crate::tar::{Entry, Kind, TarError, TarReader, clean_path};

/// Device numbers have 12 and 20 bits.
const DEVICE_MAX: (u32, u32) = (0xfff, 0xf_ffff);
/// How many times the archive's length its data can be on the disk, by padding alone: a block for a header and a byte.
const PADDING_MAX: u64 = 4;
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What an old storage driver of docker kept for itself.
const WHITEOUT_META: &[u8] = b".wh..wh.";
/// Attributes a Linux filesystem has; a tool of another system writes others, which no runtime on Linux can set either.
const XATTR_NAMESPACES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
const XATTR_ACLS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

/// Layers could not be made into a filesystem.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The file can't be made.
    #[error("could not begin the filesystem")]
    Create(#[source] RootfsError),
    /// A layer can't be read.
    #[error("could not read layer {layer}")]
    Archive {
        /// The layer.
        layer: Digest,
        /// Why not.
        source: TarError,
    },
    /// An entry of a layer can't be unpacked.
    #[error("could not unpack entry `{}` of layer {layer}", .entry.escape_ascii())]
    Entry {
        /// The layer.
        layer: Digest,
        /// The entry's path.
        entry: Vec<u8>,
        /// Why not.
        source: EntryError,
    },
    /// More entries than an image may have.
    #[error("layer {layer} brings the image to more than the {limit} entries allowed")]
    Entries {
        /// The layer.
        layer: Digest,
        /// The limit.
        limit: u64,
    },
    /// The content isn't what the configuration says.
    #[error("layer {layer} unpacks to {found}, but the image's configuration says {expected}")]
    DiffId {
        /// The layer.
        layer: Digest,
        /// What it should unpack to.
        expected: Digest,
        /// What it does.
        found: Digest,
    },
    /// The end of the filesystem.
    #[error("could not write the filesystem")]
    Finish(#[source] RootfsError),
}

/// What is wrong with an entry.
#[derive(Debug, thiserror::Error)]
pub enum EntryError {
    /// Its header.
    #[error("{0}")]
    Header(&'static str),
    /// It brings the data on the disk over the limit; a piece of a sparse file takes a block, however short it is.
    #[error("it brings the image to several times the {0} bytes allowed")]
    Data(u64),
    /// Its device number.
    #[error("its device number {0}:{1} is larger than Linux has")]
    Device(u32, u32),
    /// Its name begins like a whiteout and is none.
    #[error("its name is reserved for whiteouts")]
    Whiteout,
    /// Its link's target.
    #[error("its target `{}` leads out of the image", .0.escape_ascii())]
    Target(Vec<u8>),
    /// It has no place in the image.
    #[error("it can't be placed in the image")]
    Rootfs(#[source] RootfsError),
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layer {
    /// What it is called.
    pub(crate) digest: Digest,
    /// What it must unpack to.
    pub(crate) diff_id: Digest,
}

/// Writes layers into a new filesystem. The same layers make the same bytes.
pub(crate) fn write_layers(
    path: &Path,
    layers: &[Layer],
    source: &Source<'_>,
    room: Room,
) -> Result<RootfsSummary, LayerError> {
    let mut rootfs = RootfsBuilder::create(path).map_err(LayerError::Create)?;
    let mut left = source.limits.entries;
    with_layers(source, |streams| {
        for layer in layers {
            rootfs.begin_layer();
            apply(&mut rootfs, layer, streams.next(layer.diff_id.algorithm()), &mut left, source.limits)?;
        }
        Ok(())
    })?;
    let mut identity = Hasher::new(Algorithm::Sha256);
    for layer in layers {
        identity.update(format!("{}\n", layer.diff_id).as_bytes());
    }
    rootfs.finish(&identity.finish(), room).map_err(LayerError::Finish)
}

fn apply(
    rootfs: &mut RootfsBuilder,
    layer: &Layer,
    stream: LayerReader<'_>,
    left: &mut u64,
    limits: &Limits,
) -> Result<(), LayerError> {
    let archive = |err| match err {
        TarError::Entry { name, reason } => {
            LayerError::Entry { layer: layer.digest.clone(), entry: name, source: EntryError::Header(reason) }
        }
        source => LayerError::Archive { layer: layer.digest.clone(), source },
    };
    let mut reader = TarReader::new(stream);
    while let Some(mut entry) = reader.next_entry().map_err(archive)? {
        *left = left
            .checked_sub(1)
            .ok_or_else(|| LayerError::Entries { layer: layer.digest.clone(), limit: limits.entries })?;
        let placed = place(rootfs, &mut entry, &mut reader);
        let fits = rootfs.data_bytes() <= limits.unpacked_bytes.saturating_mul(PADDING_MAX);
        let placed = if fits { placed } else { Err(EntryError::Data(limits.unpacked_bytes)) };
        placed.map_err(|source| LayerError::Entry {
            layer: layer.digest.clone(),
            entry: std::mem::take(&mut entry.path),
            source,
        })?;
    }
    let found = reader.into_inner().finish().map_err(|err| archive(TarError::Read(err)))?;
    if found == layer.diff_id {
        Ok(())
    } else {
        let (layer, expected) = (layer.digest.clone(), layer.diff_id.clone());
        Err(LayerError::DiffId { layer, expected, found })
    }
}

/// Puts one entry where it belongs.
fn place(rootfs: &mut RootfsBuilder, entry: &mut Entry, data: &mut dyn Read) -> Result<(), EntryError> {
    let path = &entry.path;
    let cut = path.iter().rposition(|byte| *byte == b'/');
    let (parent, name) = cut.map_or((&[][..], &path[..]), |at| (&path[..at], &path[at + 1..]));
    let mut parts = path.split(|byte| *byte == b'/');
    if parts.clone().any(|part| part.starts_with(WHITEOUT_META) && part != OPAQUE) {
        return Ok(());
    }
    let below_whiteout = parts.any(|part| part.starts_with(WHITEOUT)) && !name.starts_with(WHITEOUT);
    if below_whiteout || parent.split(|byte| *byte == b'/').any(|part| part.starts_with(WHITEOUT)) {
        return Err(EntryError::Whiteout);
    }
    if name == OPAQUE {
        rootfs.empty_older(parent);
        return Ok(());
    }
    if let Some(hidden) = name.strip_prefix(WHITEOUT) {
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(EntryError::Whiteout);
        }
        rootfs.remove_older(&[parent, b"/", hidden].concat());
        return Ok(());
    }
    let xattrs = std::mem::take(&mut entry.xattrs);
    let meta = Meta {
        mode: (entry.mode & 0o7777) as u16,
        uid: entry.uid,
        gid: entry.gid,
        mtime: (entry.mtime, entry.mtime_nanos),
        xattrs: xattrs.into_iter().filter(|(name, _)| is_linux_xattr(name)).collect(),
    };
    put(rootfs, entry, meta, data)
}

fn put(rootfs: &mut RootfsBuilder, entry: &Entry, meta: Meta, data: &mut dyn Read) -> Result<(), EntryError> {
    let path = &entry.path;
    if entry.device.0 > DEVICE_MAX.0 || entry.device.1 > DEVICE_MAX.1 {
        return Err(EntryError::Device(entry.device.0, entry.device.1));
    }
    let node = match entry.kind {
        Kind::File => {
            rootfs.write_data(path, entry.size, &[(0, entry.size)], data).map_err(EntryError::Rootfs)?
        }
        Kind::SparseFile => {
            let pieces: Vec<(u64, u64)> = entry.segments.iter().map(|s| (s.offset, s.len)).collect();
            rootfs.write_data(path, entry.size, &pieces, data).map_err(EntryError::Rootfs)?
        }
        Kind::Directory => Node::Directory(Default::default()),
        Kind::Symlink => Node::Symlink(entry.link.clone()),
        Kind::HardLink => {
            let target = clean_path(&entry.link).map_err(|_| EntryError::Target(entry.link.clone()))?;
            return rootfs.link(path, &target).map_err(EntryError::Rootfs);
        }
        Kind::CharDevice => Node::Char(entry.device.0, entry.device.1),
        Kind::BlockDevice => Node::Block(entry.device.0, entry.device.1),
        Kind::Fifo => Node::Fifo,
    };
    rootfs.put(path, meta, node).map_err(EntryError::Rootfs)
}

fn is_linux_xattr(name: &[u8]) -> bool {
    XATTR_NAMESPACES.iter().any(|prefix| name.starts_with(prefix)) || XATTR_ACLS.contains(&name)
}
