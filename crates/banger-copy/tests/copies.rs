//! What is sent arrives as it was, and what a hostile end sends arrives nowhere else.
#![allow(clippy::unwrap_used, reason = "a test")]

use banger_copy::{Target, receive, receive_into, send, send_stream};
use banger_wire::item::{Item, ItemWriter, Kind};
use std::ffi::OsStr;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

type Outcome = std::io::Result<Vec<Vec<u8>>>;

/// Sends `source` and receives it at `target`; returns what was left out.
fn copy(source: &Path, target: &Path, name: Option<&str>, into: bool) -> Outcome {
    let mut stream = Vec::new();
    send(source, false, &mut ItemWriter::new(&mut stream), &mut |_| {}, &mut |_| {})?;
    arrive(&stream, target, name, into)
}

fn arrive(stream: &[u8], target: &Path, name: Option<&str>, into: bool) -> Outcome {
    let mut left_out = Vec::new();
    let target = Target::find(target, name.map(OsStr::new), into)?;
    receive(target, stream, &mut |name| left_out.push(name.to_vec()), &mut |_| {})?;
    Ok(left_out)
}

fn text(error: &std::io::Error, dir: &Path) -> String {
    error.to_string().replace(dir.to_str().unwrap(), "DIR")
}

fn mode(path: &Path) -> u32 {
    path.symlink_metadata().unwrap().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
}

/// Everything below a directory, by name.
fn listed(dir: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let own = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.symlink_metadata().unwrap().is_dir() {
            names.extend(listed(&path).into_iter().map(|name| format!("{own}/{name}")));
        }
        names.push(own);
    }
    names.sort();
    names
}

#[test]
fn a_tree_arrives_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    std::fs::create_dir_all(source.join("sub/deep")).unwrap();
    let odd = source.join(OsStr::from_bytes(b"odd \xff\n\x1b name"));
    std::fs::write(&odd, "odd").unwrap();
    std::fs::write(source.join("sub/script"), "#!/bin/sh\n").unwrap();
    std::fs::write(source.join("sub/empty"), "").unwrap();
    let large: Vec<u8> = (0..700_000_u32).map(|at| (at % 251) as u8).collect();
    std::fs::write(source.join("large"), &large).unwrap();
    symlink("/nowhere/../x", source.join("link")).unwrap();
    symlink(OsStr::from_bytes(b"\xfe"), source.join("sub/deep/link")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        source.join("sub/pipe"),
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    set_mode(&source.join("sub/script"), 0o4755);
    // Nobody could create anything in it.
    set_mode(&source.join("sub/deep"), 0o555);
    let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_500_000_000, 123_456_789);
    for name in ["large", "sub"] {
        std::fs::File::open(source.join(name)).unwrap().set_modified(time).unwrap();
    }
    let target = dir.path().join("target");
    assert_eq!(copy(&source, &target, Some("source"), false).unwrap(), [b"sub/pipe"]);
    assert_eq!(std::fs::read(target.join("large")).unwrap(), large);
    assert_eq!(std::fs::read(target.join(odd.file_name().unwrap())).unwrap(), b"odd");
    assert_eq!(std::fs::read(target.join("sub/empty")).unwrap(), b"");
    assert_eq!(target.join("link").read_link().unwrap(), Path::new("/nowhere/../x"));
    assert_eq!(target.join("sub/deep/link").read_link().unwrap().as_os_str().as_bytes(), b"\xfe");
    // Whoever gets the file must not get the rights of its owner.
    assert_eq!((mode(&target.join("sub/script")), mode(&target.join("sub/deep"))), (0o755, 0o555));
    // Deeper than there are descriptors.
    let deep = format!("deep{}", "/d".repeat(1100));
    let root = rustix::fs::open(dir.path(), rustix::fs::OFlags::PATH, 0.into()).unwrap();
    let mut path = PathBuf::new();
    for part in Path::new(&deep) {
        path.push(part);
        rustix::fs::mkdirat(&root, &path, 0o755.into()).unwrap();
    }
    copy(&dir.path().join("deep"), &dir.path().join("copied"), None, false).unwrap();
    assert!(dir.path().join(format!("copied{}", "/d".repeat(1100))).is_dir());
    for name in ["large", "sub"] {
        assert_eq!(target.join(name).metadata().unwrap().modified().unwrap(), time, "{name}");
    }
    set_mode(&source.join("sub/deep"), 0o755);
    set_mode(&target.join("sub/deep"), 0o755);
}

#[test]
fn it_goes_where_cp_would_put_it() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir_all(at("tree/sub")).unwrap();
    std::fs::write(at("tree/sub/f"), "new").unwrap();
    std::fs::write(at("file"), "file").unwrap();
    std::fs::create_dir_all(at("there/tree/sub")).unwrap();
    std::fs::write(at("there/tree/sub/f"), "old").unwrap();
    std::fs::write(at("there/tree/sub/other"), "stays").unwrap();
    set_mode(&at("there/tree"), 0o711);
    // Into what is there, where directories become one, and keep their rights.
    copy(&at("tree"), &at("there"), Some("tree"), false).unwrap();
    copy(&at("file"), &at("there"), Some("file"), true).unwrap();
    assert_eq!(
        listed(&at("there")),
        ["file", "tree", "tree/sub", "tree/sub/f", "tree/sub/other"].map(str::to_owned)
    );
    assert_eq!(
        (std::fs::read_to_string(at("there/tree/sub/f")).unwrap().as_str(), mode(&at("there/tree"))),
        ("new", 0o711)
    );
    // The content alone.
    std::fs::create_dir(at("content")).unwrap();
    set_mode(&at("content"), 0o1777);
    copy(&at("tree"), &at("content"), None, false).unwrap();
    assert_eq!(
        (listed(&at("content")), mode(&at("content"))),
        (vec!["sub".to_owned(), "sub/f".to_owned()], 0o1777)
    );
    // Under a new name, with or without a slash for a directory.
    copy(&at("tree"), &at("named/"), Some("tree"), false).unwrap();
    copy(&at("tree"), &at("made"), None, false).unwrap();
    copy(&at("file"), &at("made/other"), Some("file"), false).unwrap();
    assert_eq!(listed(&at("made")), ["other", "sub", "sub/f"].map(str::to_owned));
    // A link that the caller names leads on.
    symlink("made", at("to-dir")).unwrap();
    symlink("made/other", at("to-file")).unwrap();
    copy(&at("file"), &at("to-dir"), Some("through"), false).unwrap();
    std::fs::write(at("file"), "changed").unwrap();
    copy(&at("file"), &at("to-file"), Some("file"), false).unwrap();
    assert!(at("made/through").exists() && at("to-file").symlink_metadata().unwrap().is_symlink());
    assert_eq!(std::fs::read_to_string(at("made/other")).unwrap(), "changed");
    let refused: Vec<String> = [
        copy(&at("file"), &at("none/"), Some("file"), false),
        copy(&at("file"), &at("none/x"), Some("file"), false),
        copy(&at("file"), &at("none"), Some("file"), true),
        copy(&at("file"), &at("made/sub/f"), Some("file"), true),
        copy(&at("tree"), &at("file"), Some("tree"), false),
        copy(&at("tree"), &at("file"), None, false),
        copy(&at("file"), &at("made"), Some("sub"), false),
        copy(&at("file"), &at("made"), None, false),
        copy(&at("file"), Path::new("/dev/null"), Some("file"), false),
        copy(Path::new("/dev/null"), &at("made"), Some("null"), false),
        copy(&at("gone"), &at("made"), Some("gone"), false),
    ]
    .map(|refused| text(&refused.unwrap_err(), dir.path()))
    .into();
    assert_eq!(
        refused,
        [
            "`DIR/none/`: there is no such directory",
            "`DIR/none`: No such file or directory (os error 2)",
            "`DIR/none`: there is no such directory",
            "`DIR/made/sub/f`: is no directory",
            "`DIR/file`: there is a file or link, which a directory does not replace",
            "`DIR/file`: is no directory",
            "`DIR/made/sub`: there is a directory, which a file does not replace",
            "`DIR/made`: is a directory, and what arrives is none",
            "`/dev/null`: there is a device, pipe or socket, which is not replaced",
            "`/dev/null`: is a device or socket, no file or directory",
            "`DIR/gone`: No such file or directory (os error 2)",
        ]
    );
    assert!(Path::new("/dev/null").metadata().unwrap().file_type().is_char_device());
}

#[test]
fn holes_stay_holes() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    let file = std::fs::File::create(&source).unwrap();
    let len = 5 << 30;
    file.set_len(len).unwrap();
    file.write_all_at(b"in the middle", 3 << 30).unwrap();
    let mut stream = Vec::new();
    send(&source, false, &mut ItemWriter::new(&mut stream), &mut |_| {}, &mut |_| {}).unwrap();
    assert!(stream.len() < 1 << 20, "{} bytes for a few of data", stream.len());
    arrive(&stream, &target, None, false).unwrap();
    let found = target.metadata().unwrap();
    assert!(found.len() == len && found.blocks() < 1024, "{found:?}");
    let mut middle = [0; 15];
    std::fs::File::open(&target).unwrap().read_exact_at(&mut middle, (3 << 30) - 1).unwrap();
    assert_eq!(&middle, b"\0in the middle\0");
}

#[test]
fn a_stream_is_a_file_and_a_file_is_a_stream() {
    let dir = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..1_000_000_u32).map(|at| (at % 253) as u8).collect();
    let (mut stream, mut sent) = (Vec::new(), 0);
    send_stream(&mut bytes.as_slice(), &mut ItemWriter::new(&mut stream), &mut |bytes| sent = bytes).unwrap();
    arrive(&stream, &dir.path().join("file"), None, false).unwrap();
    assert_eq!((std::fs::read(dir.path().join("file")).unwrap(), sent), (bytes.clone(), 1_000_000));
    let mut back = Vec::new();
    receive_into(&mut back, stream.as_slice(), &mut |_| {}).unwrap();
    assert_eq!(back, bytes);
    let sparse = std::fs::File::create(dir.path().join("sparse")).unwrap();
    sparse.write_all_at(b"x", 100_000).unwrap();
    sparse.set_len(300_000).unwrap();
    let (mut stream, mut back) = (Vec::new(), Vec::new());
    send(&dir.path().join("sparse"), true, &mut ItemWriter::new(&mut stream), &mut |_| {}, &mut |_| {})
        .unwrap();
    receive_into(&mut back, stream.as_slice(), &mut |_| {}).unwrap();
    assert_eq!(back, std::fs::read(dir.path().join("sparse")).unwrap());
    // The kernel's own files have no length.
    let (mut stream, mut back) = (Vec::new(), Vec::new());
    send(Path::new("/proc/version"), true, &mut ItemWriter::new(&mut stream), &mut |_| {}, &mut |_| {})
        .unwrap();
    receive_into(&mut back, stream.as_slice(), &mut |_| {}).unwrap();
    assert_eq!(back, std::fs::read("/proc/version").unwrap());
    let mut tree = Vec::new();
    send(dir.path(), false, &mut ItemWriter::new(&mut tree), &mut |_| {}, &mut |_| {}).unwrap();
    assert_eq!(
        receive_into(&mut Vec::new(), tree.as_slice(), &mut |_| {}).unwrap_err().kind(),
        ErrorKind::IsADirectory
    );
}

#[test]
fn a_copy_that_breaks_off_leaves_no_half_file() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir_all(at("source/sub")).unwrap();
    std::fs::write(at("source/sub/file"), vec![7; 600_000]).unwrap();
    std::fs::write(at("source/sub/zz"), "after").unwrap();
    let mut stream = Vec::new();
    send(&at("source"), false, &mut ItemWriter::new(&mut stream), &mut |_| {}, &mut |_| {}).unwrap();
    for end in (0..stream.len()).step_by(9973).chain([stream.len() - 1]) {
        let target = at(&format!("target-{end}"));
        let error = arrive(&stream[..end], &target, Some("source"), false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{end}: {error}");
        if target.exists() {
            for name in listed(&target) {
                let whole = match name.as_str() {
                    "sub" => continue,
                    "sub/file" => 600_000,
                    "sub/zz" => 5,
                    other => panic!("{end}: {other}"),
                };
                assert_eq!(target.join(&name).metadata().unwrap().len(), whole, "{end}: {name}");
            }
        }
    }
    arrive(&stream, &at("target"), Some("source"), false).unwrap();
}

/// Items of a hostile end, as a stream.
fn hostile(items: &[Item], content: &[u8]) -> Vec<u8> {
    let mut stream = Vec::new();
    let mut writer = ItemWriter::new(&mut stream);
    for item in items {
        match item {
            Item::Part { offset, .. } => writer.part(*offset, content).unwrap(),
            item => writer.item(item).unwrap(),
        }
    }
    writer.item(&Item::End).unwrap();
    stream
}

fn directory(path: &str) -> Item {
    Item::Directory { path: path.into(), mode: 0o7777 }
}

fn link(path: &str, target: &str) -> Item {
    Item::Link { path: path.into(), target: target.into(), modified: 0 }
}

fn file(path: &str) -> [Item; 3] {
    let whole = Item::Whole { path: path.into(), mode: 0o7777, modified: 0, len: 5 };
    [Item::Parts { path: path.into() }, Item::Part { offset: 0, len: 5 }, whole]
}

fn whole(path: &str) -> Item {
    Item::Whole { path: path.into(), mode: 0o6777, modified: 0, len: 0 }
}

/// What a guest may send whose agent is not ours any more. `victim` is beside where the copy goes.
fn attacks(victim: &str) -> Vec<(&'static str, Vec<Item>)> {
    let inside = |middle: Vec<Item>| [vec![directory("top")], middle, vec![whole("top")]].concat();
    let under = |first: Item, rest: &[Item]| inside([vec![first], rest.to_vec()].concat());
    vec![
        ("parent", file("top/../victim/pwned").to_vec()),
        ("absolute", file(&format!("{victim}/pwned")).to_vec()),
        ("another name", file("victim").to_vec()),
        ("another name below", file("victim/pwned").to_vec()),
        ("dot", inside(file("top/./pwned").to_vec())),
        ("empty part", inside(file("top//pwned").to_vec())),
        ("through a link", under(link("top/l", victim), &file("top/l/pwned"))),
        ("through a relative link", under(link("top/l", "../../victim"), &file("top/l/pwned"))),
        ("directory in a link's place", under(link("top/l", victim), &[directory("top/l"), whole("top/l")])),
        ("top as a link", [vec![link("top", victim)], file("top/pwned").to_vec()].concat()),
        ("top as a link, then a directory", vec![link("top", victim), directory("top"), whole("top")]),
        ("link, then its content", under(link("top/l", &format!("{victim}/kept")), &file("top/l")[1..])),
        (
            "left directory",
            inside([vec![directory("top/d"), whole("top/d")], file("top/d/late").to_vec()].concat()),
        ),
        ("no directory", file("top/d/pwned").to_vec()),
        ("twice", [file("top"), file("top")].concat()),
        ("part of nothing", inside(vec![Item::Part { offset: 0, len: 5 }])),
        ("two at once", inside([&file("top/a")[..2], &file("top/b")[..]].concat())),
        ("unfinished file", vec![directory("top"), file("top/a")[0].clone()]),
        ("unfinished directory", vec![directory("top")]),
        ("nothing", vec![]),
        ("far away", inside(vec![file("top/a")[0].clone(), Item::Part { offset: u64::MAX - 2, len: 5 }])),
        (
            "endless file",
            inside(vec![
                file("top/a")[0].clone(),
                Item::Whole { path: "top/a".into(), mode: 0, modified: 0, len: u64::MAX },
            ]),
        ),
        ("other items", inside(vec![Item::File { path: "top/f".into(), mode: 0o644, modified: 0, len: 0 }])),
        ("requests", inside(vec![Item::Want { path: "top/f".into() }])),
    ]
}

#[test]
fn a_hostile_end_reaches_nothing_outside() {
    for (name, items) in attacks("/victim") {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        std::fs::create_dir(&victim).unwrap();
        std::fs::write(victim.join("kept"), "kept").unwrap();
        set_mode(&victim, 0o700);
        let here = victim.to_str().unwrap();
        let items =
            attacks(here).into_iter().find(|(other, _)| *other == name).map_or(items, |(_, items)| items);
        std::fs::create_dir(dir.path().join("copies")).unwrap();
        for target in ["copies/new", "copies"] {
            let refused = arrive(&hostile(&items, b"pwned"), &dir.path().join(target), Some("guest"), false);
            assert!(refused.is_err(), "{name} to {target}");
        }
        let outside: Vec<String> =
            listed(dir.path()).into_iter().filter(|found| !found.starts_with("copies/")).collect();
        assert_eq!(outside, ["copies", "victim", "victim/kept"], "{name}");
        let kept = (std::fs::read_to_string(victim.join("kept")).unwrap(), mode(&victim));
        assert_eq!(kept, ("kept".to_owned(), 0o700), "{name}");
    }
}

#[test]
fn rights_that_a_hostile_end_asks_for_are_not_given() {
    let dir = tempfile::tempdir().unwrap();
    let items = [vec![directory("top")], file("top/f").to_vec(), vec![whole("top")]].concat();
    arrive(&hostile(&items, b"pwned"), &dir.path().join("x"), None, false).unwrap();
    assert_eq!((mode(&dir.path().join("x")), mode(&dir.path().join("x/f"))), (0o777, 0o777));
    let special =
        Item::Listed { path: "top/dev".into(), kind: Kind::Special, mode: 0o666, len: 0, changed: 0 };
    let items = [directory("top"), special, whole("top")];
    assert_eq!(arrive(&hostile(&items, b""), &dir.path().join("y"), None, false).unwrap(), [b"dev"]);
    assert_eq!(listed(&dir.path().join("y")), Vec::<String>::new());
}

/// Somebody on the host who may write to the directory changes it under the copy: then a link is in the way.
#[test]
fn a_directory_that_becomes_a_link_meanwhile_is_not_followed() {
    struct Swapping<'a> {
        stream: &'a [u8],
        at: usize,
        swap_at: usize,
        dir: PathBuf,
    }
    impl std::io::Read for Swapping<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            if self.at == self.swap_at && !buffer.is_empty() {
                std::fs::rename(self.dir.join("copy/sub"), self.dir.join("moved")).unwrap();
                symlink("../victim", self.dir.join("copy/sub")).unwrap();
            }
            let end = if self.at < self.swap_at { self.swap_at } else { self.stream.len() };
            let len = buffer.len().min(end - self.at);
            buffer[..len].copy_from_slice(&self.stream[self.at..self.at + len]);
            self.at += len;
            Ok(len)
        }
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("victim")).unwrap();
    let before = hostile(&[directory("top"), directory("top/sub")], b"");
    // Without the `End`.
    let swap_at = before.len() - (4 + "\"end\"".len());
    let all = [vec![directory("top"), directory("top/sub")], file("top/sub/f").to_vec()].concat();
    let stream = hostile(&all, b"pwned");
    assert_eq!(stream[..swap_at], before[..swap_at]);
    let swapping = Swapping { stream: &stream, at: 0, swap_at, dir: dir.path().to_owned() };
    let target = Target::find(&dir.path().join("copy"), None, false).unwrap();
    let error = receive(target, swapping, &mut |_| {}, &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("symbolic links"), "{error}");
    assert_eq!(listed(&dir.path().join("victim")), Vec::<String>::new());
}
