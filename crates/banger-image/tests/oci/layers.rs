//! Layers: what arrives, and what is refused.

use banger_image::oci::{Digest, Limits};

use crate::archive::{Archive, Header, gzip};
use crate::pull::{Place, chain};
use crate::readback::{self, Tree};
use crate::registry::{Content, Registry};

/// Serves layers as an image and pulls it.
async fn pull(place: &Place, layers: Vec<(Vec<u8>, Vec<u8>)>) -> Result<(), String> {
    let mut content = Content::default();
    content.image("latest", &layers);
    let registry = Registry::start(move |request| content.answer(request));
    place.pull(&registry.reference("box")).await.map(drop).map_err(|error| chain(&error))
}

/// Pulls and reads back; none when the tools are missing.
async fn tree_of(archives: Vec<Archive>) -> Option<Tree> {
    let place = Place::new();
    pull(&place, archives.into_iter().map(|archive| gzip(archive.end())).collect()).await.unwrap();
    if !readback::have("debugfs") || !readback::have("e2fsck") {
        return None;
    }
    readback::check(&place.rootfs());
    Some(readback::read(&place.rootfs()))
}

fn paths(tree: &Tree) -> Vec<String> {
    tree.keys().filter(|path| !path.is_empty()).map(|path| path.escape_ascii().to_string()).collect()
}

#[tokio::test]
async fn everything_a_layer_says_arrives() {
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(255));
    let acl =
        [&2u32.to_le_bytes()[..], &[1, 0, 7, 0, 0xff, 0xff, 0xff, 0xff, 2, 0, 4, 0, 0x39, 5, 0, 0]].concat();
    let archive = Archive::new()
        .add(
            Header { name: b"./", kind: b'5', mode: 0o1777, owner: (3, 4), mtime: 7, ..Header::default() },
            b"",
        )
        .add(Header { name: b"su", mode: 0o6755, owner: (0, 4_300_000), size: 2, ..Header::default() }, b"su")
        .hard_link("su2", "/su")
        .symlink("short", "su")
        .symlink("long", &"t/".repeat(100))
        .add(Header { name: b"null", kind: b'3', mode: 0o666, device: (1, 3), ..Header::default() }, b"")
        .add(
            Header { name: b"disk", kind: b'4', mode: 0o600, device: (259, 70_000), ..Header::default() },
            b"",
        )
        .add(Header { name: b"pipe", kind: b'6', mode: 0o600, ..Header::default() }, b"")
        .add(Header { name: long.as_bytes(), size: 1, ..Header::default() }, b"x")
        .add(Header { name: b"caf\xe9", ..Header::default() }, b"")
        .directory("empty")
        .pax(&[
            ("mtime", b"1700000000.123456789"),
            ("SCHILY.xattr.security.capability", b"\x01\0\0\x02\n\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
            ("SCHILY.xattr.user.big", &[b'v'; 1500]),
            ("SCHILY.xattr.com.apple.provenance", b"x"),
            ("LIBARCHIVE.xattr.user.lib", b"AQI"),
            ("SCHILY.xattr.system.posix_acl_access", &acl),
        ])
        .file("ping", b"p")
        .pax(&[("GNU.sparse.size", b"1099511627776"), ("GNU.sparse.map", b"4095,2,549755813888,1")])
        .file("sparse", b"abc")
        .file("/absolute", b"");
    let Some(tree) = tree_of(vec![archive]).await else { return };
    let get = |path: &str| &tree[path.as_bytes()];
    assert_eq!((get("").mode, get("").owner, get("").mtime), (0o1777, (3, 4), (7, 0)));
    assert_eq!((get("/su").mode, get("/su").owner, get("/su").links), (0o6755, (0, 4_300_000), 2));
    assert_eq!(get("/su").inode, get("/su2").inode);
    assert_eq!((&get("/short").content[..], &get("/long").content[..]), ("su", &"t/".repeat(100)[..]));
    assert_eq!((&get("/null").content[..], &get("/disk").content[..]), ("01:03", "259:70000"));
    assert_eq!(
        (&get("/null").kind[..], &get("/disk").kind[..], &get("/pipe").kind[..]),
        ("character", "block", "FIFO")
    );
    assert_eq!(get(&format!("/{long}")).size, 1);
    assert!(tree.contains_key(&b"/caf\xe9"[..]) && tree.contains_key(&b"/absolute"[..]));
    let ping = get("/ping");
    assert_eq!(ping.mtime, (1_700_000_000, 123_456_789));
    let names: Vec<&str> = ping.xattrs.keys().map(String::as_str).collect();
    assert_eq!(names, ["security.capability", "system.posix_acl_access", "user.big", "user.lib"]);
    assert_eq!(ping.xattrs["security.capability"], "010000020a040000000000000000000000000000");
    assert_eq!(ping.xattrs["user.lib"], "0102");
    assert_eq!(get("/sparse").size, 1 << 40);
}

#[tokio::test]
async fn a_directory_may_have_a_hundred_thousand_entries() {
    const ENTRIES: usize = 100_000;
    let mut archive = Archive::new().directory("wide");
    for number in 0..ENTRIES {
        archive = archive.file(&format!("wide/entry-{number}"), b"");
    }
    let (place, tar) = (Place::new(), archive.end());
    // Compressed, so many headers would be more than any real layer unpacks to.
    pull(&place, vec![(tar.clone(), tar)]).await.unwrap();
    if !readback::have("debugfs") || !readback::have("e2fsck") {
        return;
    }
    readback::check(&place.rootfs());
    let mut debugfs = std::process::Command::new("debugfs");
    let listed = debugfs.args(["-R", "ls -p /wide"]).arg(place.rootfs()).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let names: std::collections::HashSet<&str> =
        listed.lines().filter_map(|line| line.split('/').nth(5)).collect();
    assert_eq!(names.iter().filter(|name| name.starts_with("entry-")).count(), ENTRIES);
}

#[tokio::test]
async fn whiteouts_hide_lower_layers_in_any_order() {
    let lower = || {
        Archive::new()
            .directory("a")
            .file("a/old", b"1")
            .directory("a/deep")
            .file("a/deep/old", b"1")
            .file("b", b"1")
            .directory("c")
            .file("c/old", b"1")
            .symlink("link", "c")
    };
    let entries: [fn(Archive) -> Archive; 4] = [
        |archive| archive.file("a/.wh..wh..opq", b""),
        |archive| archive.file("a/deep/new", b"2"),
        |archive| archive.file(".wh.c", b"").file(".wh.b", b"").file(".wh.absent", b"").file("x/.wh.y", b""),
        |archive| archive.file("c/new", b"2"),
    ];
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1]] {
        let upper = order.iter().fold(Archive::new(), |archive, at| entries[*at](archive));
        let Some(tree) = tree_of(vec![lower(), upper]).await else { return };
        let expected = ["/a", "/a/deep", "/a/deep/new", "/c", "/c/new", "/link"];
        assert_eq!(paths(&tree), expected, "{order:?}");
    }
    // Through a link of a lower layer, as a runtime would.
    let Some(tree) = tree_of(vec![lower(), Archive::new().file("link/.wh.old", b"")]).await else { return };
    assert!(!tree.contains_key(&b"/c/old"[..]) && tree.contains_key(&b"/link"[..]));
    // And what a driver of docker left is nobody's.
    let plnk =
        Archive::new().directory(".wh..wh.plnk").file(".wh..wh.plnk/1.2", b"").file(".wh..wh.aufs", b"");
    assert_eq!(paths(&tree_of(vec![plnk]).await.unwrap()), [""; 0]);
}

#[tokio::test]
async fn kinds_replace_each_other() {
    let file = || Archive::new().file("x", b"1");
    let directory = || Archive::new().directory("x").file("x/y", b"1");
    let link = || Archive::new().symlink("x", "z").directory("z");
    for (layers, expected) in [
        (vec![file(), directory()], vec!["/x", "/x/y"]),
        (vec![directory(), file()], vec!["/x"]),
        (vec![file(), directory(), file()], vec!["/x"]),
        (vec![directory(), link()], vec!["/x", "/z"]),
        // A directory takes the link's place; a file below it goes through the link.
        (vec![link(), directory()], vec!["/x", "/x/y", "/z"]),
        (vec![link(), Archive::new().file("x/y", b"")], vec!["/x", "/z", "/z/y"]),
        (vec![file(), Archive::new().hard_link("h", "x"), Archive::new().file(".wh.x", b"")], vec!["/h"]),
        (vec![Archive::new().file("x", b"1").file("x", b"2").directory("x").file("x", b"3")], vec!["/x"]),
        (vec![Archive::new().hard_link("a/b", "c").0].into_iter().map(|_| file()).collect(), vec!["/x"]),
    ] {
        let Some(tree) = tree_of(layers).await else { return };
        assert_eq!(paths(&tree), expected);
    }
}

#[tokio::test]
async fn every_compression_makes_the_same_bytes() {
    let tar = Archive::new().file("a/b", &[7; 10_000]).directory("c").end();
    let mut images = Vec::new();
    let zstd = zstd::encode_all(&tar[..], 3).unwrap();
    // Skippable frames, as seekable layers have them; gzip of several members, as parallel compressors write.
    let chunked = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3][..], &zstd].concat();
    let members = [gzip(tar[..700].to_vec()).1, gzip(tar[700..].to_vec()).1].concat();
    for stored in [tar.clone(), gzip(tar.clone()).1, members, zstd, chunked] {
        let place = Place::new();
        pull(&place, vec![(tar.clone(), stored)]).await.unwrap();
        images.push(std::fs::read(place.rootfs()).unwrap());
    }
    assert!(images.windows(2).all(|pair| pair[0] == pair[1]));
}

/// The entry that is wrong, and a word of the message.
type Bad = (Archive, &'static str, &'static str);

fn hostile() -> Vec<Bad> {
    let new = Archive::new;
    let named = |name: &'static [u8]| new().add(Header { name, ..Header::default() }, b"");
    let huge = [b'n'; 256];
    let looping = || new().symlink("l", "m").symlink("m", "l");
    let mut cut = new().file("whole", b"1").file("cut", &[1; 4000]);
    cut.0.truncate(cut.0.len() - 2048);
    vec![
        (named(b"../evil"), "../evil", "`..`"),
        (named(b"a/../../evil"), "a/../../evil", "`..`"),
        (named(b"a/.."), "a/..", "`..`"),
        (named(b""), "", "not a path"),
        (named(b"."), "", "not a path"),
        (new().pax(&[("path", b"a\0b")]).file("x", b""), "a\\x00b", "zero byte"),
        (new().add(Header { name: &huge, ..Header::default() }, b""), "nnnn", "not a path"),
        (new().pax(&[("path", &[b'a'; 5000])]).file("x", b""), "aaaa", "too long"),
        (looping().file("l/x", b""), "l/x", "links"),
        (new().file("f", b"").file("f/x", b""), "f/x", "no directories"),
        (new().hard_link("h", "../../etc/passwd"), "h", "leads out"),
        (new().hard_link("h", "absent"), "h", "not a file of the image"),
        (new().directory("d").hard_link("h", "d"), "h", "not a file of the image"),
        (new().symlink("s", ""), "s", "symbolic link"),
        (new().file(".wh.", b""), ".wh.", "reserved"),
        (new().file("d/.wh...", b""), "d/.wh...", "reserved"),
        (new().file(".wh.x/y", b""), ".wh.x/y", "reserved"),
        (new().add(Header { name: b"k", kind: b'M', ..Header::default() }, b""), "k", "unknown type"),
        (
            new().add(Header { name: b"d", kind: b'3', device: (4096, 0), ..Header::default() }, b""),
            "d",
            "device",
        ),
        (new().pax(&[("SCHILY.xattr.user.x", &[0; 5000])]).file("f", b""), "f", "`user.x` is too large"),
        (
            new().pax(&[("SCHILY.xattr.system.posix_acl_access", b"?")]).file("f", b""),
            "f",
            "posix_acl_access",
        ),
        (new().pax(&[("SCHILY.xattr.user.", b"?")]).file("f", b""), "f", "`user.`"),
        (new().pax(&[("size", b"9223372036854775807")]).file("f", b""), "f", "too large"),
        (new().pax(&[("size", b"100000")]).file("f", b""), "f", "truncated"),
        (
            new()
                .pax(&[("GNU.sparse.size", b"9223372036854775807"), ("GNU.sparse.map", b"0,1")])
                .file("f", b"x"),
            "f",
            "16 TiB",
        ),
        (
            new().pax(&[("GNU.sparse.size", b"10"), ("GNU.sparse.map", b"0,1,0,1")]).file("f", b"xy"),
            "f",
            "overlaps",
        ),
        (cut, "cut", "truncated"),
    ]
}

#[tokio::test]
async fn hostile_entries_are_named_and_leave_nothing() {
    let mut said = String::new();
    for (archive, entry, reason) in hostile() {
        let place = Place::new();
        // Without the closing zeroes, so that a cut one ends where it was cut.
        let layer = gzip(archive.0);
        let digest = Digest::of(&layer.1).to_string();
        let error = pull(&place, vec![layer]).await.expect_err(entry);
        assert!(error.contains(&digest), "{error}");
        assert!(error.contains(entry) && error.contains(reason), "`{entry}`, `{reason}`: {error}");
        said.push_str(&format!("{}\n", plain(&error, &digest)));
        let left: Vec<_> =
            std::fs::read_dir(place.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["cache"], "{entry}");
    }
    insta::assert_snapshot!(said);
}

/// An error without what differs from run to run, and with at most 300 characters of it.
fn plain(error: &str, digest: &str) -> String {
    let error = error.replace(digest, "LAYER");
    let host = "127.0.0.1:";
    let port = error.split_once(host).map_or("", |(_, rest)| rest.split('/').next().unwrap_or(""));
    let error = error.replace(&format!("{host}{port}"), "REGISTRY");
    error.chars().take(300).collect()
}

#[tokio::test]
async fn links_that_climb_stay_inside() {
    let archive = Archive::new()
        .symlink("up", "../../../../etc")
        .file("up/passwd", b"")
        .symlink("abs", "/up")
        .file("abs/x", b"");
    let Some(tree) = tree_of(vec![archive]).await else { return };
    assert_eq!(paths(&tree), ["/abs", "/etc", "/etc/passwd", "/etc/x", "/up"]);
}

#[tokio::test]
async fn damaged_streams_are_errors() {
    let (tar, stored) = gzip(Archive::new().file("a", &[1; 100_000]).end());
    let other = gzip(Archive::new().file("b", b"").end());
    let zstd = zstd::encode_all(&tar[..], 3).unwrap();
    let mut said = String::new();
    for (layer, reason) in [
        ((tar.clone(), stored[..stored.len() - 9].to_vec()), "decompress"),
        ((tar.clone(), zstd[..zstd.len() - 3].to_vec()), "decompress"),
        ((tar.clone(), [&stored[..], b"garbage"].concat()), "decompress"),
        ((tar.clone(), b"neither".to_vec()), "truncated"),
        ((tar.clone(), vec![b'x'; 1024]), "number"),
        ((tar.clone(), other.1.clone()), "configuration says"),
        ((tar.clone(), Vec::new()), "configuration says"),
        ((tar.clone(), tar[..512].to_vec()), "truncated"),
    ] {
        let digest = Digest::of(&layer.1).to_string();
        let error = pull(&Place::new(), vec![layer]).await.unwrap_err();
        assert!(error.contains(reason), "`{reason}`: {error}");
        said.push_str(&format!("{}\n", plain(&error, &digest)));
    }
    insta::assert_snapshot!(said);
}

/// A sparse file of single bytes, each of which takes a block.
fn slivers() -> (Vec<u8>, Vec<u8>) {
    let map: Vec<String> = (0..2000).map(|n| format!("{},1", n * 4096)).collect();
    let map = map.join(",");
    let records = [("GNU.sparse.size", &b"8192000"[..]), ("GNU.sparse.map", map.as_bytes())];
    gzip(Archive::new().pax(&records).file("slivers", &[1; 2000]).end())
}

#[tokio::test]
async fn bombs_are_stopped() {
    let zeroes = || gzip(Archive::new().file("zeroes", &vec![0; 4 << 20]).end());
    let mut said = String::new();
    let many = gzip((0..200).fold(Archive::new(), |archive, n| archive.file(&n.to_string(), b"")).end());
    for (limits, layer, reason) in [
        (Limits { unpacked_bytes: 1 << 20, ..Limits::default() }, zeroes(), "more than the 1048576 bytes"),
        (
            Limits { ratio: 20, ratio_free_bytes: 1 << 20, ..Limits::default() },
            zeroes(),
            "more than 20 times",
        ),
        (Limits { entries: 100, ..Limits::default() }, many, "more than the 100 entries"),
        (
            Limits { unpacked_bytes: 1 << 20, ..Limits::default() },
            slivers(),
            "to several times the 1048576 bytes",
        ),
        (Limits { layers: 0, ..Limits::default() }, zeroes(), "more than the 0"),
    ] {
        let mut place = Place::new();
        place.config.limits = limits;
        let digest = Digest::of(&layer.1).to_string();
        let error = pull(&place, vec![layer]).await.unwrap_err();
        assert!(error.contains(reason), "`{reason}`: {error}");
        said.push_str(&format!("{}\n", plain(&error, &digest)));
    }
    insta::assert_snapshot!(said);
}

/// Each of many whiteouts would walk the whole tree, were it not remembered what is empty already.
#[tokio::test]
async fn many_opaque_directories_cost_no_more_than_one() {
    let mut archive = Archive::new();
    let mut path = String::new();
    for depth in 0..400 {
        path.push_str("d/");
        archive = archive.file(&format!("{path}f{depth}"), b"");
    }
    let upper = (1..=400).rev().chain(1..=400).fold(Archive::new(), |archive, depth| {
        archive
            .file(&format!("{}.wh..wh..opq", "d/".repeat(depth)), b"")
            .file(&format!("{}g", "d/".repeat(depth)), b"")
    });
    let Some(tree) = tree_of(vec![archive, upper]).await else { return };
    assert_eq!(tree.len(), 1 + 800);
}
