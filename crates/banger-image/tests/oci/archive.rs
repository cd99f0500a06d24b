//! Layers made by hand, byte by byte, so that they can be wrong.

use std::io::Write as _;

/// A tar archive under construction.
#[derive(Debug, Clone, Default)]
pub(crate) struct Archive(pub(crate) Vec<u8>);

/// One entry's header fields.
#[derive(Debug, Clone)]
pub(crate) struct Header<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) kind: u8,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: u64,
    pub(crate) link: &'a [u8],
    pub(crate) device: (u32, u32),
    pub(crate) size: u64,
}

impl Default for Header<'_> {
    fn default() -> Self {
        Self {
            name: b"x",
            kind: b'0',
            mode: 0o644,
            owner: (0, 0),
            mtime: 42,
            link: b"",
            device: (0, 0),
            size: 0,
        }
    }
}

impl Archive {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn file(self, name: &str, data: &[u8]) -> Self {
        self.add(Header { name: name.as_bytes(), size: data.len() as u64, ..Header::default() }, data)
    }

    pub(crate) fn directory(self, name: &str) -> Self {
        self.add(Header { name: name.as_bytes(), kind: b'5', mode: 0o755, ..Header::default() }, b"")
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.add(
            Header {
                name: name.as_bytes(),
                kind: b'2',
                link: target.as_bytes(),
                mode: 0o777,
                ..Header::default()
            },
            b"",
        )
    }

    pub(crate) fn hard_link(self, name: &str, target: &str) -> Self {
        self.add(
            Header { name: name.as_bytes(), kind: b'1', link: target.as_bytes(), ..Header::default() },
            b"",
        )
    }

    /// Records for the next entry.
    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut body = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            body.extend_from_slice(format!("{length} {key}=").as_bytes());
            body.extend_from_slice(value);
            body.push(b'\n');
        }
        self.add(Header { name: b"pax", kind: b'x', size: body.len() as u64, ..Header::default() }, &body)
    }

    pub(crate) fn add(mut self, header: Header<'_>, data: &[u8]) -> Self {
        let long =
            [(header.name, b'L'), (header.link, b'K')].into_iter().filter(|(text, _)| text.len() > 100);
        for (text, kind) in long {
            let text = [text, b"\0"].concat();
            self = self.add(
                Header { name: b"././@LongLink", kind, size: text.len() as u64, ..Header::default() },
                &text,
            );
        }
        let mut block = [0; 512];
        let mut put = |at: usize, text: &[u8]| block[at..at + text.len()].copy_from_slice(text);
        put(0, &header.name[..header.name.len().min(100)]);
        put(100, format!("{:07o}", header.mode).as_bytes());
        put(108, &owner(header.owner.0));
        put(116, &owner(header.owner.1));
        put(124, format!("{:011o}", header.size).as_bytes());
        put(136, format!("{:011o}", header.mtime).as_bytes());
        put(148, b"        ");
        put(156, &[header.kind]);
        put(157, &header.link[..header.link.len().min(100)]);
        put(257, b"ustar  \0");
        put(329, format!("{:07o}", header.device.0).as_bytes());
        put(337, format!("{:07o}", header.device.1).as_bytes());
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&block);
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

fn owner(id: u32) -> [u8; 8] {
    let mut field = [0; 8];
    if id < 1 << 21 {
        field[..7].copy_from_slice(format!("{id:07o}").as_bytes());
    } else {
        field[0] = 0x80;
        field[4..].copy_from_slice(&id.to_be_bytes());
    }
    field
}

/// The archive and its compressed form.
pub(crate) fn gzip(tar: Vec<u8>) -> (Vec<u8>, Vec<u8>) {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&tar).unwrap();
    let stored = encoder.finish().unwrap();
    (tar, stored)
}
