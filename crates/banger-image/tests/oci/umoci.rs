//! What umoci unpacks, and an image it can be asked to.

use std::collections::BTreeMap;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use banger_image::oci::Digest;

use crate::archive::{Archive, Header};
use crate::readback::{Found, Tree};
use crate::registry::{Content, OCI_MANIFEST};

/// Writes the content as an image layout.
pub(crate) fn write_layout(content: &Content, dir: &Path) {
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let hex = |digest: &str| digest.strip_prefix("sha256:").unwrap().to_owned();
    for (digest, bytes) in &content.blobs {
        std::fs::write(blobs.join(hex(digest)), bytes).unwrap();
    }
    let manifest = &content.manifests["latest"].1;
    let digest = Digest::of(manifest).to_string();
    std::fs::write(blobs.join(hex(&digest)), manifest).unwrap();
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
        "mediaType": OCI_MANIFEST, "digest": digest, "size": manifest.len(),
        "annotations": {"org.opencontainers.image.ref.name": "latest"},
    }]});
    std::fs::write(dir.join("index.json"), index.to_string()).unwrap();
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#).unwrap();
}

/// Reads a directory of the host like a filesystem.
pub(crate) fn walk(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let meta = path.symlink_metadata().unwrap();
        let kind = match meta.mode() & 0o170_000 {
            0o100_000 => "regular",
            0o040_000 => "directory",
            0o120_000 => "symlink",
            0o020_000 => "character",
            0o060_000 => "block",
            _ => "FIFO",
        };
        let content = match kind {
            "regular" => Digest::of(&std::fs::read(&path).unwrap()).to_string(),
            "symlink" => path.read_link().unwrap().into_os_string().into_vec().escape_ascii().to_string(),
            "character" | "block" => {
                let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
                if major < 256 && minor < 256 {
                    format!("{major:02}:{minor:02}")
                } else {
                    format!("{major}:{minor}")
                }
            }
            _ => String::new(),
        };
        if kind == "directory" {
            todo.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes();
        let name = if name.is_empty() { Vec::new() } else { [b"/", name].concat() };
        let found = Found {
            kind: kind.to_owned(),
            mode: meta.mode() & 0o7777,
            owner: (meta.uid(), meta.gid()),
            size: if kind == "directory" { 0 } else { meta.size() },
            links: if kind == "directory" { 0 } else { meta.nlink() as u32 },
            mtime: (meta.mtime(), meta.mtime_nsec() as u32),
            content,
            xattrs: xattrs(&path),
            inode: meta.ino() as u32,
        };
        tree.insert(name, found);
    }
    tree
}

fn xattrs(path: &Path) -> BTreeMap<String, String> {
    let mut names = vec![0; 4096];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    let mut found = BTreeMap::new();
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 4096];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
        let hex = value[..length].iter().map(|byte| format!("{byte:02x}")).collect();
        found.insert(String::from_utf8_lossy(name).into_owned(), hex);
    }
    found
}

/// Everything that both understand.
pub(crate) fn layers() -> Vec<Archive> {
    let capability = b"\x01\0\0\x02\n\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let lower = Archive::new()
        .add(Header { name: b"./", kind: b'5', mode: 0o755, ..Header::default() }, b"")
        .directory("usr")
        .directory("usr/lib")
        .symlink("lib", "usr/lib")
        .add(Header { name: b"tmp", kind: b'5', mode: 0o1777, owner: (5, 70_000), ..Header::default() }, b"")
        .pax(&[("mtime", b"1700000000.123456789"), ("SCHILY.xattr.security.capability", capability)])
        .add(Header { name: b"usr/lib/ping", mode: 0o4755, size: 9000, ..Header::default() }, &[3; 9000])
        .hard_link("usr/lib/ping2", "usr/lib/ping")
        .pax(&[("SCHILY.xattr.user.note", b"text")])
        .file("note", b"n")
        .add(Header { name: b"null", kind: b'3', mode: 0o666, device: (1, 3), ..Header::default() }, b"")
        .add(
            Header { name: b"disk", kind: b'4', mode: 0o660, device: (259, 70_000), ..Header::default() },
            b"",
        )
        .add(Header { name: b"pipe", kind: b'6', mode: 0o600, owner: (1, 2), ..Header::default() }, b"")
        .add(Header { name: b"caf\xe9", ..Header::default() }, b"")
        .file(&"long/".repeat(40), b"")
        .symlink("far", &"away/".repeat(30))
        .directory("empty")
        .directory("opaque")
        .file("opaque/old", b"o")
        .directory("full")
        .file("full/a", b"a")
        .file("gone", b"g");
    let upper = Archive::new()
        .directory("opaque")
        .file("opaque/.wh..wh..opq", b"")
        .file("opaque/new", b"n")
        .file(".wh.gone", b"")
        .file("full/.wh.a", b"")
        .file("lib/through", b"t")
        .hard_link("again", "usr/lib/ping2")
        .file("empty", b"now a file")
        .directory("note")
        .file("note/inside", b"i");
    let third = Archive::new().directory("empty").symlink("note", "gone").file("back", &vec![0; 100_000]);
    vec![lower, upper, third]
}
