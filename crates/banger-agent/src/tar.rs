//! Headers of a POSIX (PAX) tar, as image layers are made of.
//!
//! Only what a layer needs, and only writing: the caller sends [`Entry::header`], then a file's content and
//! [`padding`], and in the end [`END`]. What the old header has no room for goes into records of an extended header
//! in front of it. Names are bytes in Linux; one that is not UTF-8 is marked as such and otherwise passed on as it is.

/// Unit of everything in a tar.
pub(crate) const BLOCK_LEN: usize = 512;
/// What follows the last entry.
pub(crate) const END: [u8; 2 * BLOCK_LEN] = [0; 2 * BLOCK_LEN];
/// Largest number in the header's seven octal digits (owner, group, device numbers).
const OCTAL7_MAX: u64 = 0o777_7777;
/// Largest number in its eleven octal digits (size, time).
const OCTAL11_MAX: u64 = 0o777_7777_7777;
/// What a file with holes is called in the old header: its content there is not what the file has.
const SPARSE_NAME: &[u8] = b"GNUSparseFile.0/file";
/// Prefix of a record that carries an extended attribute.
const XATTR_RECORD: &[u8] = b"SCHILY.xattr.";

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A file and how many bytes of content follow.
    File {
        len: u64,
    },
    /// A file with holes: its length, and how many bytes follow of its map and its data together.
    Sparse {
        len: u64,
        stored: u64,
    },
    /// Another name of an earlier entry.
    HardLink {
        to: Vec<u8>,
    },
    SymbolicLink {
        to: Vec<u8>,
    },
    Directory,
    CharacterDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// One entry without its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Relative to the root, without a slash at either end.
    pub(crate) path: Vec<u8>,
    pub(crate) kind: Kind,
    /// Permission bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds and nanoseconds since the Unix epoch.
    pub(crate) mtime: (i64, u32),
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Returns how many zero bytes follow a content of `len` bytes.
pub(crate) fn padding(len: u64) -> &'static [u8] {
    let rest = (len % BLOCK_LEN as u64) as usize;
    &END[..if rest == 0 { 0 } else { BLOCK_LEN - rest }]
}

impl Entry {
    /// Returns the entry's header, with an extended one before it when it needs one.
    pub(crate) fn header(&self) -> Vec<u8> {
        let mut name = self.path.clone();
        if self.kind == Kind::Directory {
            name.push(b'/');
        }
        let records = self.records(&name);
        let mut out = Vec::new();
        if !records.is_empty() {
            let mut block = Block::new();
            block.text(0, 100, b"pax").octal(124, 12, records.len() as u64).octal(100, 8, 0o644);
            out.extend_from_slice(&block.finished(b'x'));
            out.extend_from_slice(&records);
            out.extend_from_slice(padding(records.len() as u64));
        }
        let mut block = Block::new();
        let shown = if matches!(self.kind, Kind::Sparse { .. }) { SPARSE_NAME } else { &name };
        block
            .text(0, 100, shown)
            .octal(100, 8, u64::from(self.mode & 0o7777))
            .octal(108, 8, u64::from(self.uid))
            .octal(116, 8, u64::from(self.gid))
            .octal(136, 12, u64::try_from(self.mtime.0).unwrap_or(0));
        let kind = match &self.kind {
            Kind::File { len: stored } | Kind::Sparse { stored, .. } => {
                block.octal(124, 12, *stored);
                b'0'
            }
            Kind::HardLink { to } => {
                block.text(157, 100, to);
                b'1'
            }
            Kind::SymbolicLink { to } => {
                block.text(157, 100, to);
                b'2'
            }
            Kind::CharacterDevice { major, minor } => {
                block.octal(329, 8, u64::from(*major)).octal(337, 8, u64::from(*minor));
                b'3'
            }
            Kind::BlockDevice { major, minor } => {
                block.octal(329, 8, u64::from(*major)).octal(337, 8, u64::from(*minor));
                b'4'
            }
            Kind::Directory => b'5',
            Kind::Fifo => b'6',
        };
        out.extend_from_slice(&block.finished(kind));
        out
    }

    fn records(&self, name: &[u8]) -> Vec<u8> {
        let mut records = Vec::new();
        let link = match &self.kind {
            Kind::HardLink { to } | Kind::SymbolicLink { to } => &to[..],
            _ => b"",
        };
        let needs_record = |text: &[u8]| text.len() > 100 || !text.is_ascii();
        if [name, link].iter().any(|text| std::str::from_utf8(text).is_err()) {
            push_record(&mut records, b"hdrcharset", b"BINARY");
        }
        let is_sparse = matches!(self.kind, Kind::Sparse { .. });
        if let Kind::Sparse { len, .. } = self.kind {
            push_record(&mut records, b"GNU.sparse.major", b"1");
            push_record(&mut records, b"GNU.sparse.minor", b"0");
            push_record(&mut records, b"GNU.sparse.name", name);
            push_record(&mut records, b"GNU.sparse.realsize", len.to_string().as_bytes());
        }
        for (key, text) in [(&b"path"[..], name), (b"linkpath", link)] {
            // The name of a sparse file is above; a reader that knows nothing of it makes a file of another one.
            if needs_record(text) && !is_sparse {
                push_record(&mut records, key, text);
            }
        }
        if let Kind::File { len: stored } | Kind::Sparse { stored, .. } = self.kind
            && stored > OCTAL11_MAX
        {
            push_record(&mut records, b"size", stored.to_string().as_bytes());
        }
        for (key, id) in [(b"uid", self.uid), (b"gid", self.gid)] {
            if u64::from(id) > OCTAL7_MAX {
                push_record(&mut records, key, id.to_string().as_bytes());
            }
        }
        let (seconds, nanoseconds) = self.mtime;
        if nanoseconds != 0 || u64::try_from(seconds).map_or(true, |seconds| seconds > OCTAL11_MAX) {
            push_record(&mut records, b"mtime", decimal_time(seconds, nanoseconds).as_bytes());
        }
        for (key, value) in &self.xattrs {
            // A record ends its key with the first `=`, so such a name can't be written down.
            if !key.contains(&b'=') {
                push_record(&mut records, &[XATTR_RECORD, key].concat(), value);
            }
        }
        records
    }
}

/// A time before the epoch counts its fraction away from zero, unlike `timespec`.
fn decimal_time(seconds: i64, nanoseconds: u32) -> String {
    let all = i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    let sign = if all < 0 { "-" } else { "" };
    let all = all.unsigned_abs();
    let text = format!("{sign}{}.{:09}", all / 1_000_000_000, all % 1_000_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Appends `LEN key=value\n`, where the length counts its own digits.
fn push_record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut len = rest;
    while rest + len.to_string().len() != len {
        len = rest + len.to_string().len();
    }
    records.extend_from_slice(len.to_string().as_bytes());
    records.push(b' ');
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

struct Block([u8; BLOCK_LEN]);

impl Block {
    fn new() -> Self {
        let mut block = Self([0; BLOCK_LEN]);
        block.octal(108, 8, 0).octal(116, 8, 0).octal(124, 12, 0).octal(136, 12, 0);
        block.text(257, 8, b"ustar\x0000").octal(329, 8, 0).octal(337, 8, 0);
        block
    }

    /// What does not fit is cut here and whole in a record.
    fn text(&mut self, at: usize, room: usize, text: &[u8]) -> &mut Self {
        let len = text.len().min(room);
        self.0[at..at + len].copy_from_slice(&text[..len]);
        self
    }

    /// What does not fit is zero here and whole in a record.
    fn octal(&mut self, at: usize, room: usize, number: u64) -> &mut Self {
        let digits = room - 1;
        let number = if number >> (3 * digits).min(63) == 0 { number } else { 0 };
        self.text(at, room, format!("{number:0digits$o}\0").as_bytes())
    }

    fn finished(mut self, kind: u8) -> [u8; BLOCK_LEN] {
        self.0[156] = kind;
        // The sum is taken with its own field full of blanks.
        self.text(148, 8, b"        ");
        let sum: u32 = self.0.iter().map(|&byte| u32::from(byte)).sum();
        self.text(148, 8, format!("{sum:06o}\0 ").as_bytes());
        self.0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods, reason = "a test")]
    use super::{END, Entry, Kind, decimal_time, padding};
    use std::io::Write as _;

    fn entry(path: &[u8], kind: Kind) -> Entry {
        Entry { path: path.to_vec(), kind, mode: 0o644, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() }
    }

    fn archive(entries: &[(Entry, &[u8])]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for (entry, content) in entries {
            file.write_all(&entry.header()).unwrap();
            file.write_all(content).unwrap();
            file.write_all(padding(content.len() as u64)).unwrap();
        }
        file.write_all(&END).unwrap();
        file
    }

    fn tar(args: &[&str], archive: &tempfile::NamedTempFile) -> Vec<u8> {
        let mut command = std::process::Command::new("tar");
        let output = command.args(args).arg("-f").arg(archive.path()).env("TZ", "UTC").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    #[test]
    fn gnu_tar_lists_what_was_written() {
        let long = [b'd'; 180];
        let mut owned = entry(b"etc/owned", Kind::File { len: 5 });
        (owned.uid, owned.gid, owned.mode) = (4_000_000_000, 65534, 0o4755);
        owned.mtime = (1_600_000_000, 123_456_789);
        let mut old = entry(b"old", Kind::Directory);
        (old.mode, old.mtime) = (0o1777, (-2, 0));
        let entries: &[(Entry, &[u8])] = &[
            (owned, b"five\n"),
            (old, b""),
            (entry(&long, Kind::SymbolicLink { to: long.to_vec() }), b""),
            (entry(b"hard", Kind::HardLink { to: b"etc/owned".to_vec() }), b""),
            (entry("grün".as_bytes(), Kind::Fifo), b""),
            (entry(b"null", Kind::CharacterDevice { major: 1, minor: 3 }), b""),
            (entry(b"disk", Kind::BlockDevice { major: 259, minor: 1_048_575 }), b""),
        ];
        let listing =
            tar(&["-tv", "--numeric-owner", "--full-time", "--quoting-style=literal"], &archive(entries));
        let listing: Vec<String> = String::from_utf8(listing)
            .unwrap()
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        let long = String::from_utf8_lossy(&long);
        assert_eq!(
            listing,
            [
                "-rwsr-xr-x 4000000000/65534 5 2020-09-13 12:26:40.123456789 etc/owned".to_owned(),
                "drwxrwxrwt 0/0 0 1969-12-31 23:59:58 old/".to_owned(),
                format!("lrw-r--r-- 0/0 0 1970-01-01 00:00:00 {long} -> {long}"),
                "hrw-r--r-- 0/0 0 1970-01-01 00:00:00 hard link to etc/owned".to_owned(),
                "prw-r--r-- 0/0 0 1970-01-01 00:00:00 grün".to_owned(),
                "crw-r--r-- 0/0 1,3 1970-01-01 00:00:00 null".to_owned(),
                "brw-r--r-- 0/0 259,1048575 1970-01-01 00:00:00 disk".to_owned(),
            ]
        );
    }

    #[test]
    fn names_and_attributes_are_bytes() {
        let name = b"\xff\xfe odd\nname";
        let mut odd = entry(name, Kind::File { len: 513 });
        odd.xattrs =
            vec![(b"user.a".to_vec(), b"=\n\0\xff".to_vec()), (b"user.b=c".to_vec(), b"lost".to_vec())];
        let archive = archive(&[(odd, &[7; 513]), (entry(b"next", Kind::File { len: 0 }), b"")]);
        let listed = tar(&["-t", "--quoting-style=literal"], &archive);
        assert_eq!(listed, [&name[..], b"\nnext\n"].concat());
        let bytes = std::fs::read(archive.path()).unwrap();
        let record = b"28 SCHILY.xattr.user.a==\n\0\xff\n";
        assert_eq!(record.len(), 28);
        assert!(bytes.windows(record.len()).any(|window| window == record));
    }

    #[test]
    fn a_record_counts_its_own_length() {
        for (len, expected) in
            [(92, "98"), (93, "99"), (94, "101"), (990, "997"), (992, "999"), (993, "1001")]
        {
            let mut records = Vec::new();
            super::push_record(&mut records, b"k", &vec![b'v'; len]);
            assert_eq!(records.len().to_string(), expected, "{len}");
            assert!(records.starts_with(format!("{expected} k=").as_bytes()), "{len}");
        }
    }

    #[test]
    fn times_before_the_epoch() {
        for (time, text) in [((1, 5_000_000), "1.005"), ((-1, 0), "-1"), ((-1, 750_000_000), "-0.25")] {
            assert_eq!(decimal_time(time.0, time.1), text);
        }
    }
}
