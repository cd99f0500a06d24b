//! Files on a session's channels, in both directions: how a workspace travels into a guest and back.
//!
//! A stream is a sequence of items, and ends with [`Item::End`]. An item is the length of its header (four bytes,
//! little-endian), the header as JSON, and after an [`Item::File`] or [`Item::Part`] its `len` bytes of content as they are. Names are
//! relative to a root that both sides know; [`is_relative`] refuses all others, so no reader needs to.

use crate::bytes::ByteString;
use serde::{Deserialize, Serialize};
use std::io::{Error, ErrorKind, Read, Write};

/// Longest header. A name has at most 4096 bytes, a link's target as many, and base64 adds a third.
const HEADER_LEN_MAX: usize = 32 * 1024;

/// One entry of a tree, or something about one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Item {
    /// A directory. Parents of what is sent need none of their own.
    Directory {
        /// Its name below the root.
        path: ByteString,
        /// Permission bits.
        mode: u32,
    },
    /// A regular file; its content follows.
    File {
        /// Its name below the root.
        path: ByteString,
        /// Permission bits.
        mode: u32,
        /// When it was modified, in nanoseconds since 1970.
        modified: i64,
        /// Bytes of content.
        len: u64,
    },
    /// A symbolic link.
    Link {
        /// Its name below the root.
        path: ByteString,
        /// Where it points, never resolved by a reader.
        target: ByteString,
        /// When it was modified, in nanoseconds since 1970.
        modified: i64,
    },
    /// What is there under this name, without its content.
    Listed {
        /// Its name below the root.
        path: ByteString,
        /// What it is.
        kind: Kind,
        /// Permission bits.
        mode: u32,
        /// Bytes of content.
        len: u64,
        /// When its content, name or mode was last changed, by the guest's clock, in nanoseconds since 1970.
        changed: i64,
    },
    /// Asks for the content under this name; answered by `File`, `Link` or `Missing`.
    Want {
        /// Its name below the root.
        path: ByteString,
    },
    /// There is no file and no link under this name any more.
    Missing {
        /// Its name below the root.
        path: ByteString,
    },
    /// What is under this name now stays, whatever else becomes of the tree.
    Keep {
        /// Its name below the root.
        path: ByteString,
    },
    /// A regular file that comes in parts, up to its `Whole`. What no part covers reads as zeroes.
    Parts {
        /// Its name below the root.
        path: ByteString,
    },
    /// A piece of the file under way; its content follows.
    Part {
        /// Where it belongs.
        offset: u64,
        /// Bytes of content.
        len: u64,
    },
    /// The file or directory under way has everything, and becomes what it is to be.
    Whole {
        /// Its name below the root.
        path: ByteString,
        /// Permission bits.
        mode: u32,
        /// When it was modified, in nanoseconds since 1970.
        modified: i64,
        /// A file's length; 0 for a directory.
        len: u64,
    },
    /// Nothing more in this direction, or in this part of it.
    End,
}

/// What an entry of a tree is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Link,
    /// A device, pipe or socket.
    Special,
}

impl Item {
    /// Returns the name an item is about.
    #[must_use]
    pub fn path(&self) -> Option<&ByteString> {
        match self {
            Self::Directory { path, .. }
            | Self::File { path, .. }
            | Self::Link { path, .. }
            | Self::Listed { path, .. }
            | Self::Want { path }
            | Self::Missing { path }
            | Self::Keep { path }
            | Self::Parts { path }
            | Self::Whole { path, .. } => Some(path),
            Self::Part { .. } | Self::End => None,
        }
    }
}

/// Returns true for a name that stays below its root as long as no link is followed: no empty component, no `.`, no
/// `..`, no NUL, not absolute, and no longer than Linux takes.
#[must_use]
pub fn is_relative(path: &[u8]) -> bool {
    let sound = |part: &[u8]| !matches!(part, b"" | b"." | b"..") && part.len() <= 255;
    path.len() < 4096 && !path.contains(&0) && path.split(|&byte| byte == b'/').all(sound)
}

/// Writes items.
#[derive(Debug)]
pub struct ItemWriter<W> {
    inner: W,
}

impl<W: Write> ItemWriter<W> {
    /// Returns a writer; `inner` had better be buffered.
    pub fn new(inner: W) -> Self {
        Self { inner }
    }

    /// Writes an item without content.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn item(&mut self, item: &Item) -> std::io::Result<()> {
        let header = serde_json::to_vec(item)?;
        let len = u32::try_from(header.len()).map_err(|_| Error::from(ErrorKind::InvalidInput))?;
        self.inner.write_all(&len.to_le_bytes())?;
        self.inner.write_all(&header)
    }

    /// Writes a file's header and exactly its announced bytes out of `content`.
    ///
    /// # Errors
    /// Those of the stream, and of `content`; [`ErrorKind::UnexpectedEof`] when that is shorter. The stream is of no use
    /// any more then.
    pub fn file(&mut self, item: &Item, content: &mut impl Read) -> std::io::Result<()> {
        let Item::File { len, .. } = *item else { return Err(ErrorKind::InvalidInput.into()) };
        self.item(item)?;
        if std::io::copy(&mut content.take(len), &mut self.inner)? < len {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    /// Writes a piece of the file under way.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn part(&mut self, offset: u64, content: &[u8]) -> std::io::Result<()> {
        self.item(&Item::Part { offset, len: content.len() as u64 })?;
        self.inner.write_all(content)
    }

    /// Sends what was held back.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// Reads items.
#[derive(Debug)]
pub struct ItemReader<R> {
    inner: R,
    /// Content of the last item that was not read.
    left: u64,
}

impl<R: Read> ItemReader<R> {
    /// Returns a reader.
    pub fn new(inner: R) -> Self {
        Self { inner, left: 0 }
    }

    /// Returns the next item, skipping what was not read of the last one's content.
    ///
    /// # Errors
    /// Those of the stream; [`ErrorKind::InvalidData`] when it is no such stream.
    pub fn next_item(&mut self) -> std::io::Result<Item> {
        std::io::copy(&mut self.content(), &mut std::io::sink())?;
        if self.left > 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let mut len = [0; 4];
        self.inner.read_exact(&mut len)?;
        let len = u32::from_le_bytes(len) as usize;
        if len > HEADER_LEN_MAX {
            return Err(Error::new(ErrorKind::InvalidData, format!("an item's header of {len} bytes")));
        }
        let mut header = vec![0; len];
        self.inner.read_exact(&mut header)?;
        let item: Item = serde_json::from_slice(&header)?;
        if let Some(path) = item.path().filter(|path| !is_relative(&path.0)) {
            let shown = path.as_os_str().display().to_string();
            let text = format!("a name that leads elsewhere: `{}`", shown.escape_debug());
            return Err(Error::new(ErrorKind::InvalidData, text));
        }
        if let Item::File { len, .. } | Item::Part { len, .. } = item {
            self.left = len;
        }
        Ok(item)
    }

    /// Returns the content of the file that was read last; ends early where the stream does.
    pub fn content(&mut self) -> Content<'_, R> {
        Content { reader: self }
    }
}

/// The content of one file.
#[derive(Debug)]
pub struct Content<'a, R> {
    reader: &'a mut ItemReader<R>,
}

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let wanted = buffer.len().min(usize::try_from(self.reader.left).unwrap_or(usize::MAX));
        let len = self.reader.inner.read(&mut buffer[..wanted])?;
        self.reader.left -= len as u64;
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_stream_is_read_as_it_was_written() {
        let path = |text: &[u8]| ByteString(text.to_vec());
        let file = Item::File { path: path(b"a/\xff\n"), mode: 0o755, modified: -1, len: 5 };
        let link = Item::Link { path: path(b"l"), target: path(b"/etc/\xfe"), modified: 7 };
        let mut bytes = Vec::new();
        let mut writer = ItemWriter::new(&mut bytes);
        writer.file(&file, &mut &b"hello, more"[..]).unwrap();
        writer.file(&file, &mut &b"skipped"[..]).unwrap();
        writer.item(&link).unwrap();
        writer.item(&Item::End).unwrap();
        let short = writer.file(&file, &mut &b"hell"[..]).unwrap_err();
        assert_eq!(short.kind(), ErrorKind::UnexpectedEof);
        let mut reader = ItemReader::new(bytes.as_slice());
        assert_eq!(reader.next_item().unwrap(), file);
        let mut content = String::new();
        reader.content().read_to_string(&mut content).unwrap();
        assert_eq!(content, "hello");
        assert_eq!(
            [reader.next_item().unwrap(), reader.next_item().unwrap(), reader.next_item().unwrap()],
            [file, link, Item::End]
        );
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for (name, sound) in [
            (&b"a/b.c/..d"[..], true),
            (b"", false),
            (b"/a", false),
            (b"a//b", false),
            (b"a/", false),
            (b"./a", false),
            (b"a/..", false),
            (b"..", false),
            (b"a\0", false),
            (&[b'x'; 256], false),
        ] {
            assert_eq!(is_relative(name), sound, "{name:?}");
            let mut bytes = Vec::new();
            ItemWriter::new(&mut bytes).item(&Item::Want { path: ByteString(name.to_vec()) }).unwrap();
            assert_eq!(ItemReader::new(bytes.as_slice()).next_item().is_ok(), sound, "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut reader = ItemReader::new(bytes.as_slice());
            while reader.next_item().is_ok() {}
        }
    }
}
