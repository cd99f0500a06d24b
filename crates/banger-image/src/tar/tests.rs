//! The reader against archives made by hand.

use super::*;
use proptest::prelude::*;

/// Builds an entry's bytes for tests, with a correct checksum.
pub(crate) fn entry(path: &str, kind: u8, mode: u32, link: &str, data: &[u8]) -> Vec<u8> {
    let mut header = [0u8; BLOCK];
    header[..path.len()].copy_from_slice(path.as_bytes());
    header[100..107].copy_from_slice(format!("{mode:07o}").as_bytes());
    header[124..135].copy_from_slice(format!("{:011o}", data.len()).as_bytes());
    header[136..147].copy_from_slice(b"00000000052");
    header[156] = kind;
    header[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header[257..265].copy_from_slice(b"ustar  \0");
    seal(&mut header);
    let mut out = header.to_vec();
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(BLOCK), 0);
    out
}

fn seal(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header[..BLOCK].iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Ends an archive.
pub(crate) fn end(mut tar: Vec<u8>) -> Vec<u8> {
    tar.resize(tar.len() + 2 * BLOCK, 0);
    tar
}

fn read_all(tar: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
    let mut reader = TarReader::new(tar);
    let mut out = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        let data = reader.read_data(1 << 20)?;
        out.push((entry, data));
    }
    Ok(out)
}

#[test]
fn reads_what_packages_contain() {
    let long = format!("./usr/share/{}", "x".repeat(200));
    let tar = [
        entry("./", b'5', 0o755, "", b""),
        entry("./usr/bin/x", b'0', 0o4755, "", b"hello"),
        entry("./usr/bin/y", b'2', 0o777, "x", b""),
        entry("./usr/bin/z", b'1', 0o644, "./usr/bin/x", b""),
        entry("././@LongLink", b'L', 0, "", format!("{long}\0").as_bytes()),
        entry("short", b'0', 0o644, "", b"long"),
        entry("pax", b'x', 0, "", b"16 path=a/b/c/d\n20 mtime=1700000000.5\n"[..38].into()),
    ]
    .concat();
    // The second record's length is wrong on purpose: it must be an error, not a guess.
    assert!(read_all(&end(tar.clone())).is_err());
    let pax = b"16 path=a/b/c/d\n22 mtime=1700000000.5\n";
    let tar =
        [&tar[..tar.len() - 2 * BLOCK], &entry("pax", b'x', 0, "", pax), &entry("q", b'0', 0o600, "", b"")]
            .concat();
    let found = read_all(&end(tar)).unwrap();
    assert_eq!(found[0].0.path, b"");
    assert_eq!(found[1].0.path, b"usr/bin/x");
    assert_eq!((found[1].0.mode, found[1].0.mtime, &found[1].1[..]), (0o4755, 42, &b"hello"[..]));
    assert_eq!((found[2].0.kind, &found[2].0.link[..]), (Kind::Symlink, &b"x"[..]));
    assert_eq!(found[3].0.kind, Kind::HardLink);
    assert_eq!(found[4].0.path, &long.as_bytes()[2..]);
    assert_eq!((&found[5].0.path[..], found[5].0.mtime), (&b"a/b/c/d"[..], 1_700_000_000));
}

#[test]
fn zeroes_at_the_very_end_are_not_missed() {
    let tar = [entry("a", b'0', 0o644, "", b""), entry("b", b'0', 0o644, "", b"data")].concat();
    let bare = &tar[..3 * BLOCK - 508];
    assert_eq!(read_all(bare).unwrap(), read_all(&end(tar.clone())).unwrap());
    assert!(read_all(&bare[..bare.len() - 1]).is_err(), "but data is");
}

#[test]
fn refuses_damage() {
    let good = end(entry("a", b'0', 0o644, "", b"data"));
    assert!(read_all(&good).is_ok());
    let mut flipped = good.clone();
    flipped[0] ^= 1;
    assert!(read_all(&flipped).is_err());
    for cut in [1, 511, 513, 515] {
        assert!(read_all(&good[..cut]).is_err(), "{cut}");
    }
    for path in ["../x", "a/../../b", "/.."] {
        assert!(read_all(&end(entry(path, b'0', 0o644, "", b""))).is_err(), "{path}");
    }
    assert!(read_all(&end(entry("a", b'Z', 0o644, "", b""))).is_err());
    let mut huge = entry("a", b'0', 0o644, "", b"");
    huge[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    seal(&mut huge);
    assert!(read_all(&end(huge)).is_err());
}

/// A PAX record with its length.
pub(crate) fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let mut length = body + 1;
    while length != body + length.to_string().len() {
        length = body + length.to_string().len();
    }
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}

fn one(tar: Vec<u8>) -> (Entry, Vec<u8>) {
    read_all(&end(tar)).unwrap().remove(0)
}

#[test]
fn pax_values_may_contain_anything() {
    let pax = [
        record("SCHILY.xattr.security.capability", b"\x01\0\0\x02\n9 path=x\n"),
        record("LIBARCHIVE.xattr.user.a%3Db", b"aGVsbG8"),
        record("SCHILY.xattr.user.c=d", b""),
        record("path", b"caf\xe9\n"),
        record("mtime", b"-1.25"),
        record("uid", b"70000"),
    ]
    .concat();
    let (entry, _) = one([entry("pax", b'x', 0, "", &pax), entry("q", b'0', 0o600, "", b"")].concat());
    assert_eq!(entry.path, b"caf\xe9\n");
    assert_eq!((entry.mtime, entry.mtime_nanos, entry.uid), (-2, 750_000_000, 70_000));
    let xattrs: Vec<(&[u8], &[u8])> = entry.xattrs.iter().map(|(n, v)| (&n[..], &v[..])).collect();
    assert_eq!(
        xattrs,
        [
            (&b"security.capability"[..], &b"\x01\0\0\x02\n9 path=x\n"[..]),
            (b"user.a=b", b"hello"),
            (b"user.c", b"d="),
        ]
    );
}

#[test]
fn sparse_files_in_every_form() {
    let expected = vec![Segment { offset: 512, len: 3 }, Segment { offset: 4096, len: 2 }];
    let mut forms = Vec::new();
    let sparse = |records: &[(&str, &str)], data: &[u8]| {
        let pax: Vec<u8> = records.iter().flat_map(|(k, v)| record(k, v.as_bytes())).collect();
        [entry("pax", b'x', 0, "", &pax), entry("GNUSparseFile.0/f", b'0', 0o644, "", data)].concat()
    };
    let common = [("GNU.sparse.name", "f"), ("path", "GNUSparseFile.0/f")];
    let v00 = [
        ("GNU.sparse.size", "8192"),
        ("GNU.sparse.offset", "512"),
        ("GNU.sparse.numbytes", "3"),
        ("GNU.sparse.offset", "4096"),
        ("GNU.sparse.numbytes", "2"),
    ];
    forms.push(sparse(&[&common[..], &v00].concat(), b"abcde"));
    let v01 = [("GNU.sparse.size", "8192"), ("GNU.sparse.map", "512,3,4096,2")];
    forms.push(sparse(&[&common[..], &v01].concat(), b"abcde"));
    let v10 = [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "8192")];
    let mut data = b"2\n512\n3\n4096\n2\n".to_vec();
    data.resize(512, 0);
    data.extend_from_slice(b"abcde");
    forms.push(sparse(&[&common[..], &v10].concat(), &data));
    let mut old = entry("f", b'S', 0o644, "", b"abcde");
    for (at, number) in [(386, 512), (398, 3), (410, 4096), (422, 2), (483, 8192)] {
        old[at..at + 11].copy_from_slice(format!("{number:011o}").as_bytes());
    }
    seal(&mut old);
    forms.push(old.clone());
    for form in forms {
        let (entry, data) = one(form);
        assert_eq!((&entry.path[..], entry.kind, entry.size), (&b"f"[..], Kind::SparseFile, 8192));
        assert_eq!((&entry.segments, &data[..]), (&expected, &b"abcde"[..]));
    }
    // A map that continues in another block.
    old[482] = 1;
    seal(&mut old);
    let mut block = [0; BLOCK];
    block[..11].copy_from_slice(b"00000020000");
    block[12..23].copy_from_slice(b"00000000000");
    old.splice(BLOCK..BLOCK, block);
    assert_eq!(one(old).0.segments, expected);
    for lie in ["512,3,513,2", "512,3,8191,2", "512,3,4096,1", "512,3,4096", "18446744073709551615,5"] {
        let v01 = [("GNU.sparse.size", "8192"), ("GNU.sparse.map", lie)];
        assert!(read_all(&end(sparse(&v01, b"abcde"))).is_err(), "{lie}");
    }
}

#[test]
fn odd_numbers() {
    let mut tar = entry("a", b'0', 0o644, "", b"");
    // -1 in base 256, and an owner above two million.
    tar[136..148].fill(0xff);
    tar[108..116].copy_from_slice(&[0x80, 0, 0, 0, 0, 0x41, 0x9c, 0xe0]);
    seal(&mut tar);
    let (found, _) = one(tar);
    assert_eq!((found.mtime, found.uid), (-1, 4_300_000));
    // No closing zeroes; the data is whole all the same.
    assert_eq!(read_all(&entry("a", b'0', 0o644, "", b"data")).unwrap().len(), 1);
    // An old directory.
    assert_eq!(one(entry("d/", 0, 0o755, "", b"")).0.kind, Kind::Directory);
    let extended: Vec<u8> = (0..20).flat_map(|_| entry("pax", b'x', 0, "", &record("uid", b"1"))).collect();
    assert!(read_all(&extended).is_err());
}

proptest! {
    /// Headers that are right in themselves reach deeper than random bytes.
    #[test]
    fn random_headers_never_panic(
        parts in proptest::collection::vec((any::<u8>(), proptest::collection::vec(any::<u8>(), 124), 0..2048u64), 0..6),
        body in proptest::collection::vec(any::<u8>(), 0..4096),
    ) {
        let mut tar = Vec::new();
        for (kind, noise, size) in parts {
            let mut block = entry("name", *b"0125LKxgS7".get(usize::from(kind) % 10).unwrap(), 0o644, "", b"");
            block[386..386 + 124].copy_from_slice(&noise);
            block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
            seal(&mut block);
            tar.extend(block);
            tar.extend(body.iter().take(size as usize));
            tar.resize(tar.len().next_multiple_of(BLOCK), 0);
        }
        let _ = read_all(&tar);
    }

    #[test]
    fn random_records_never_panic(keys in proptest::collection::vec((0..12usize, "[0-9.,\\n-]{0,12}"), 0..8)) {
        const KEYS: [&str; 12] = [
            "path", "linkpath", "size", "mtime", "uid", "GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.map",
            "GNU.sparse.realsize", "GNU.sparse.offset", "GNU.sparse.numbytes", "LIBARCHIVE.xattr.user.%4",
        ];
        let pax: Vec<u8> = keys.iter().flat_map(|(key, value)| record(KEYS[*key], value.as_bytes())).collect();
        let _ = read_all(&[entry("pax", b'x', 0, "", &pax), entry("f", b'0', 0o644, "", b"1\n0\n5\nabcde")].concat());
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        let _ = read_all(&bytes);
    }

    #[test]
    fn random_pax_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Overrides::default().parse(&bytes);
    }
}
