//! The ext4 writer against the reference implementation's checker and reader.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    missing_docs,
    reason = "a test"
)]

use banger_image::debian::tree::{Attributes, Special, Tree as _};
use banger_image::ext4::{Meta, Node, Room, Writer, disk_len, format_empty};
use banger_image::rootfs::RootfsBuilder;
use std::io::{Cursor, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

const UUID: [u8; 16] = *b"0123456789abcdef";

fn have(tool: &str) -> bool {
    let found = Command::new(tool).arg("-V").output().is_ok();
    if !found {
        println!("skipped: {tool} is not installed");
    }
    found
}

#[track_caller]
fn check(path: &Path) {
    let output = Command::new("e2fsck").args(["-fn"]).arg(path).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
}

fn debugfs(path: &Path, request: &str) -> String {
    let output = Command::new("debugfs").args(["-R", request]).arg(path).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn attributes(mode: u32) -> Attributes {
    Attributes { mode, uid: 70_000, gid: 12, mtime: 1_700_000_000 }
}

#[test]
fn an_empty_disk_is_clean_and_small() {
    if !have("e2fsck") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // Groups have 128 MiB, and every 64th begins a new set of descriptors with copies.
    let sizes = [128, 129, 256, 1000, 8192, 8192 + 128, 8192 + 300, 16 * 1024 - 128, 100 * 1024];
    for (name, mib) in sizes.map(|mib| (mib.to_string(), mib)) {
        let path = dir.path().join(&name);
        format_empty(&path, mib << 20, UUID).unwrap();
        check(&path);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), disk_len(mib << 20), "{name}");
        use std::os::unix::fs::MetadataExt as _;
        let used = std::fs::metadata(&path).unwrap().blocks() * 512;
        assert!(used <= 1 << 20, "{name}: {used} bytes in use");
    }
}

#[test]
fn a_disk_has_copies_of_what_is_lost_first() {
    if !have("e2fsck") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for copy in [1, 25] {
        let path = dir.path().join(format!("disk{copy}"));
        format_empty(&path, 4 << 30, UUID).unwrap();
        let disk = std::fs::File::options().write(true).open(&path).unwrap();
        disk.write_all_at(&[0; 8192], 0).unwrap();
        let mut repair = Command::new("e2fsck");
        repair.args(["-fy", "-B", "4096", "-b", &(copy * 32768).to_string()]).arg(&path);
        // Something was repaired, and nothing is left to be.
        assert_eq!(repair.output().unwrap().status.code(), Some(1), "from group {copy}");
        check(&path);
    }
}

#[test]
fn every_kind_of_entry_arrives() {
    if !have("e2fsck") || !have("debugfs") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut tree = RootfsBuilder::create(&path).unwrap();
    tree.directory(b"bin", &attributes(0o1755)).unwrap();
    tree.file(b"bin/tool", &attributes(0o4755), 5, &mut Cursor::new(b"hello")).unwrap();
    tree.hard_link(b"bin/alias", b"bin/tool").unwrap();
    tree.symlink(b"sbin", b"bin", &attributes(0o777)).unwrap();
    tree.symlink(b"long", &[b'x'; 200], &attributes(0o777)).unwrap();
    tree.file(b"sbin/init", &attributes(0o755), 4, &mut Cursor::new(b"init")).unwrap();
    tree.special(b"dev/null", Special::Char(1, 3), &attributes(0o666)).unwrap();
    tree.special(b"dev/big", Special::Block(259, 70_000), &attributes(0o600)).unwrap();
    tree.special(b"dev/pipe", Special::Fifo, &attributes(0o600)).unwrap();
    tree.file(b"caf\xe9", &attributes(0o644), 0, &mut Cursor::new(b"")).unwrap();
    let summary = tree.finish("test", Room::Spare(0)).unwrap();
    assert_eq!(summary.init.as_deref(), Some("/sbin/init"));
    assert_eq!(summary.size_bytes, std::fs::metadata(&path).unwrap().len());
    check(&path);
    let tool = debugfs(&path, "stat /bin/tool");
    for expected in ["Mode:  04755", "User: 70000", "Group:    12", "Links: 2", "Size: 5", "0x6553f100"] {
        assert!(tool.contains(expected), "no `{expected}` in {tool}");
    }
    assert_eq!(debugfs(&path, "cat /bin/alias"), "hello");
    assert_eq!(debugfs(&path, "cat /bin/init"), "init");
    assert!(debugfs(&path, "stat /sbin").contains("Fast link dest: \"bin\""));
    assert!(debugfs(&path, "stat /long").contains("Size: 200"));
    assert!(debugfs(&path, "stat /dev/null").contains("01:03"));
    assert!(debugfs(&path, "stat /dev/big").contains("259:70000"));
    assert!(debugfs(&path, "stat /dev/pipe").contains("Type: FIFO"));
    assert!(debugfs(&path, "ls -p /").contains("caf"));
}

#[test]
fn a_disk_to_live_on_has_a_journal_and_room() {
    if !have("e2fsck") || !have("dumpe2fs") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let made = |mib: u64| {
        let path = dir.path().join(mib.to_string());
        let mut tree = RootfsBuilder::create(&path).unwrap();
        tree.file(b"etc/data", &attributes(0o644), 40 << 20, &mut std::io::repeat(7).take(40 << 20)).unwrap();
        let size = tree.finish("test", Room::Disk(mib << 20)).unwrap().size_bytes;
        check(&path);
        let shown = Command::new("dumpe2fs").arg("-h").arg(&path).output().unwrap();
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        assert!(shown.contains("has_journal") && shown.contains("Total journal blocks:     4096"), "{shown}");
        let number = |key: &str| -> u64 {
            let line = shown.lines().find_map(|line| line.strip_prefix(key));
            line.unwrap().trim().parse().unwrap()
        };
        (size, number("Free blocks:") * 4096, number("Free inodes:"))
    };
    let (size, free, inodes) = made(8192);
    assert_eq!(size, 8192 << 20);
    assert!(free > 7900 << 20 && inodes >= 8192 * 64, "{free} {inodes}");
    let (size, free, inodes) = made(1);
    assert!(size < 140 << 20 && free >= 64 << 20 && inodes >= 64, "{size} {free} {inodes}");
}

#[test]
fn what_is_replaced_is_gone_and_its_space_free() {
    if !have("e2fsck") || !have("debugfs") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut tree = RootfsBuilder::create(&path).unwrap();
    let data = vec![7; 3 << 20];
    tree.file(b"a/b/c", &attributes(0o644), data.len() as u64, &mut Cursor::new(&data)).unwrap();
    tree.file(b"a", &attributes(0o644), 3, &mut Cursor::new(b"now")).unwrap();
    tree.finish("test", Room::Spare(16)).unwrap();
    check(&path);
    assert_eq!(debugfs(&path, "cat /a"), "now");
    use std::os::unix::fs::MetadataExt as _;
    assert!(std::fs::metadata(&path).unwrap().blocks() * 512 < 1 << 20);
}

#[test]
fn holes_many_extents_large_directories_and_attributes() {
    if !have("e2fsck") || !have("debugfs") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut writer = Writer::create(&path).unwrap();
    // Every other block is a hole: 2,000 extents, two levels of tree.
    let mut data = vec![0; 4000 * 4096];
    data.chunks_mut(8192).for_each(|pair| pair[..4096].fill(0x5a));
    let file = writer.write_data(data.len() as u64, &mut Cursor::new(&data)).unwrap();
    let root = writer.root();
    let xattrs = vec![
        (b"user.small".to_vec(), b"1".to_vec()),
        (b"security.capability".to_vec(), vec![1; 20]),
        (b"user.large".to_vec(), vec![b'v'; 1500]),
    ];
    writer.add(root, b"holes", Meta { mode: 0o644, xattrs, ..Meta::default() }, file);
    let small = vec![(b"security.capability".to_vec(), vec![1; 20])];
    writer.add(root, b"ping", Meta { mode: 0o755, xattrs: small, ..Meta::default() }, Node::Fifo);
    let many = writer.add(
        root,
        b"many",
        Meta { mode: 0o755, ..Meta::default() },
        Node::Directory(Default::default()),
    );
    for number in 0..20_000 {
        let meta = Meta { mode: 0o755, mtime: (-1, 999_999_999), ..Meta::default() };
        writer.add(many, format!("entry-{number}").as_bytes(), meta, Node::Directory(Default::default()));
    }
    writer.finish(UUID, Room::Spare(100)).unwrap();
    check(&path);
    let copy = dir.path().join("copy");
    debugfs(&path, &format!("dump /holes {}", copy.display()));
    assert!(std::fs::read(&copy).unwrap() == data, "the data differs");
    let value = debugfs(&path, "ea_get /holes user.large");
    assert!(value.contains(&"v".repeat(1500)), "{value}");
    assert!(debugfs(&path, "ea_list /ping").contains("security.capability"));
}

#[test]
fn paths_stay_inside() {
    let dir = tempfile::tempdir().unwrap();
    let mut tree = RootfsBuilder::create(&dir.path().join("image")).unwrap();
    tree.symlink(b"loop", b"loop", &attributes(0o777)).unwrap();
    tree.symlink(b"up", b"../../../etc", &attributes(0o777)).unwrap();
    tree.file(b"file", &attributes(0o644), 0, &mut Cursor::new(b"")).unwrap();
    for bad in [&b"../x"[..], b"a/../../x", b"loop/x", b"file/x", b"", b"/", b"a\0b"] {
        let result = tree.file(bad, &attributes(0o644), 0, &mut Cursor::new(b""));
        assert!(result.is_err(), "{}", bad.escape_ascii());
    }
    assert!(tree.hard_link(b"y", b"nothing").is_err());
    // A link that climbs ends at the image's own root.
    tree.file(b"up/passwd", &attributes(0o644), 0, &mut Cursor::new(b"")).unwrap();
    assert!(tree.hard_link(b"z", b"etc/passwd").is_ok());
}

#[test]
fn the_same_calls_make_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str| {
        let path = dir.path().join(name);
        let mut tree = RootfsBuilder::create(&path).unwrap();
        tree.file(b"a/b", &attributes(0o644), 5000, &mut Cursor::new(vec![1; 5000])).unwrap();
        tree.finish("same", Room::Spare(0)).unwrap();
        std::fs::read(path).unwrap()
    };
    assert!(make("one") == make("two"));
}

#[test]
fn files_of_all_sizes_keep_their_bytes() {
    if !have("e2fsck") || !have("debugfs") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut tree = RootfsBuilder::create(&path).unwrap();
    // Small ones are written together, large ones at once, in every order of the two.
    let sizes = [1, 4096, 100_000, 400_000, 600_000, 10, 524_288, 524_287, 3_000_000, 300_000, 900_000, 7];
    let content = |number: usize, size: usize| -> Vec<u8> {
        (0..size)
            .map(|at| (at as u32 / 251).wrapping_mul(2_654_435_761).to_le_bytes()[at % 4] ^ number as u8)
            .collect()
    };
    for (number, size) in sizes.into_iter().enumerate() {
        let data = content(number, size);
        let name = format!("file{number}");
        tree.file(name.as_bytes(), &attributes(0o644), size as u64, &mut Cursor::new(data)).unwrap();
    }
    tree.finish("test", Room::Spare(0)).unwrap();
    check(&path);
    for (number, size) in sizes.into_iter().enumerate() {
        let copy = dir.path().join("copy");
        debugfs(&path, &format!("dump /file{number} {}", copy.display()));
        assert!(std::fs::read(copy).unwrap() == content(number, size), "file {number} of {size} bytes");
    }
}
