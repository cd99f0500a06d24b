//! Images made by buildah, umoci, skopeo and by hand, pushed to Debian's registry, pulled, and compared entry by entry
//! with what `umoci unpack` makes of them as root.
//!
//! Each fixture lists what is special about it. Taking any one of that away makes the comparison fail, so the list is
//! also what the comparison is known to see.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, XattrFlags, mknodat};

use crate::archive::gzip;
use crate::pull::Place;
use crate::readback::{self, Found, Tree};
use crate::registry::Content;
use crate::umoci::{layers, walk, write_layout};

/// A value of `security.capability`: `cap_net_raw`, effective and permitted, of version 2.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// A list that lets user 1337 read.
const ACL: [u8; 44] = [
    2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 57, 5, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255, 16,
    0, 4, 0, 255, 255, 255, 255, 32, 0, 4, 0, 255, 255, 255, 255,
];

/// Something that an image has and a careless reader loses.
#[derive(Debug, Clone, Copy)]
enum Feature {
    Entry(&'static [u8]),
    /// What lower layers had under the name is not there.
    Hidden(&'static [u8]),
    Kind(&'static [u8], &'static str),
    Mode(&'static [u8], u32),
    Owner(&'static [u8]),
    Content(&'static [u8]),
    Size(&'static [u8], u64),
    Seconds(&'static [u8]),
    Nanoseconds(&'static [u8]),
    Xattr(&'static [u8], &'static str),
    /// Both are names of one file.
    HardLink(&'static [u8], &'static [u8]),
}

impl Feature {
    /// Takes it away. Panics when the image doesn't have it.
    fn drop_from(self, tree: &mut Tree) {
        let at = |path: &[u8]| format!("{self:?}: no {}", path.escape_ascii());
        match self {
            Self::Entry(path) => drop(tree.remove(path).unwrap_or_else(|| panic!("{}", at(path)))),
            Self::Hidden(path) => {
                let other = tree.values().next().unwrap().clone();
                assert!(tree.insert(path.to_vec(), other).is_none(), "{self:?} is there");
            }
            Self::HardLink(a, b) => {
                assert_eq!(tree[a].inode, tree[b].inode, "{self:?}");
                tree.get_mut(b).unwrap_or_else(|| panic!("{}", at(b))).inode = u32::MAX;
            }
            Self::Kind(path, kind) => {
                let found = entry(tree, path);
                assert_eq!(found.kind, kind, "{self:?}");
                found.kind = "regular or whatever".to_owned();
            }
            Self::Mode(path, mode) => {
                let found = entry(tree, path);
                assert_eq!(found.mode, mode, "{self:?}");
                found.mode &= 0o666;
            }
            Self::Owner(path) => {
                let found = entry(tree, path);
                assert_ne!(found.owner, (0, 0), "{self:?}");
                found.owner = (0, 0);
            }
            Self::Content(path) => {
                let found = entry(tree, path);
                assert!(!found.content.is_empty(), "{self:?}");
                found.content.pop();
            }
            Self::Size(path, size) => {
                let found = entry(tree, path);
                assert_eq!(found.size, size, "{self:?}");
                found.size = 0;
            }
            Self::Seconds(path) => entry(tree, path).mtime.0 -= 1,
            Self::Nanoseconds(path) => {
                let found = entry(tree, path);
                assert_ne!(found.mtime.1, 0, "{self:?}");
                found.mtime.1 = 0;
            }
            Self::Xattr(path, name) => {
                assert!(entry(tree, path).xattrs.remove(name).is_some(), "{self:?}");
            }
        }
    }
}

fn entry<'a>(tree: &'a mut Tree, path: &[u8]) -> &'a mut Found {
    tree.get_mut(path).unwrap_or_else(|| panic!("no {}", path.escape_ascii()))
}

/// Makes what can differ between two filesystems of the same content equal: inode numbers become the number of the
/// inode's first name, and what directories are long.
fn normalised(mut tree: Tree) -> Tree {
    let mut first = BTreeMap::new();
    for (number, found) in (0..).zip(tree.values_mut()) {
        found.inode = *first.entry(found.inode).or_insert(number);
        if found.kind == "directory" {
            (found.size, found.links) = (0, 0);
        }
    }
    tree
}

fn differences(ours: &Tree, theirs: &Tree) -> Vec<String> {
    let paths: std::collections::BTreeSet<_> = ours.keys().chain(theirs.keys()).collect();
    paths
        .into_iter()
        .filter(|path| ours.get(*path) != theirs.get(*path))
        .map(|path| format!("{}: {:?} {:?}", path.escape_ascii(), ours.get(path), theirs.get(path)))
        .collect()
}

/// Debian's registry on the loopback interface.
struct DockerRegistry {
    process: Child,
    port: u16,
    dir: tempfile::TempDir,
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl DockerRegistry {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = {
            let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            free.local_addr().unwrap().port()
        };
        let config = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}/data\nhttp:\n  addr: 127.0.0.1:{port}\n",
            dir.path().display()
        );
        let file = dir.path().join("config.yml");
        std::fs::write(&file, config).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&file).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().unwrap();
        let registry = Self { process, port, dir };
        let deadline = Instant::now() + Duration::from_secs(30);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "the registry does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }

    fn reference(&self, name: &str) -> String {
        format!("127.0.0.1:{}/{name}:1", self.port)
    }

    fn dir(&self, name: &str) -> PathBuf {
        let dir = self.dir.path().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// Pushes an image of a layout with skopeo.
    fn push(&self, layout: &Path, tag: &str, name: &str, options: &[&str]) {
        let from = format!("oci:{}:{tag}", layout.display());
        let to = format!("docker://{}", self.reference(name));
        run(skopeo().args(["--dest-tls-verify=false"]).args(options).args([from, to]));
    }

    /// Unpacks an image with umoci.
    fn expected(&self, name: &str) -> Tree {
        let dir = tempfile::tempdir().unwrap();
        let (layout, bundle) = (dir.path().join("layout"), dir.path().join("bundle"));
        let image = format!("{}:it", layout.display());
        let from = format!("docker://{}", self.reference(name));
        run(skopeo().args(["--src-tls-verify=false", &from, &format!("oci:{image}")]));
        run(Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle));
        walk(&bundle.join("rootfs"))
    }

    /// Pulls an image and compares it; `undescribed` are directories that no layer has an entry of, to which umoci gives
    /// the time of the unpacking.
    async fn check(&self, name: &str, features: &[Feature], undescribed: &[&[u8]]) {
        self.check_with(name, self.expected(name), features, undescribed).await;
    }

    async fn check_with(&self, name: &str, theirs: Tree, features: &[Feature], undescribed: &[&[u8]]) {
        let mut theirs = normalised(theirs);
        let place = Place::new();
        place.pull(&self.reference(name)).await.unwrap();
        readback::check(&place.rootfs());
        let ours = normalised(readback::read(&place.rootfs()));
        // umoci gives the root the time of the unpacking too, described or not.
        for path in undescribed.iter().chain(&[&b""[..]]) {
            entry(&mut theirs, path).mtime = ours[*path].mtime;
        }
        let found = differences(&ours, &theirs);
        assert!(found.is_empty(), "{name}: ours and umoci's: {found:#?}");
        println!("{name}: {} entries, {} features", ours.len(), features.len());
        for feature in features {
            let mut without = ours.clone();
            feature.drop_from(&mut without);
            assert!(!differences(&without, &theirs).is_empty(), "{name}: nobody misses {feature:?}");
        }
    }
}

fn skopeo() -> Command {
    let mut command = Command::new("skopeo");
    command.args(["copy", "-q", "--insecure-policy"]);
    command
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Whether this test can run; says why when not.
fn can_run(programs: &[&str]) -> bool {
    if !rustix::process::getuid().is_root() {
        println!("skipped: comparison with umoci: needs root to make devices");
        return false;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let missing = |program: &&&str| !std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
    let needed = ["docker-registry", "skopeo", "umoci", "debugfs", "e2fsck"];
    if let Some(missing) = needed.iter().chain(programs).find(missing) {
        println!("skipped: comparison with umoci: `{missing}` is not installed");
        return false;
    }
    true
}

fn own(path: &Path, uid: u32, gid: u32, mode: u32) {
    std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn node(path: &Path, kind: FileType, mode: u32, device: (u32, u32)) {
    mknodat(CWD, path, kind, Mode::from_raw_mode(mode), rustix::fs::makedev(device.0, device.1)).unwrap();
}

fn attribute(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

/// A first layer of everything that tools write, in a directory.
fn fill(root: &Path) {
    use std::io::{Seek as _, Write as _};
    use std::os::unix::ffi::OsStrExt as _;
    for dir in ["usr/lib", "usr/bin", "tmp", "srv/app", "empty", "opaque", "to-file"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    own(&root.join("tmp"), 0, 0, 0o1777);
    own(&root.join("srv/app"), 1000, 1001, 0o2750);
    std::os::unix::fs::symlink("usr/lib", root.join("lib")).unwrap();
    std::fs::write(root.join("usr/bin/su"), vec![7; 70_000]).unwrap();
    own(&root.join("usr/bin/su"), 0, 42, 0o4755);
    std::fs::hard_link(root.join("usr/bin/su"), root.join("usr/bin/su-too")).unwrap();
    std::fs::write(root.join("usr/bin/ping"), b"ping").unwrap();
    own(&root.join("usr/bin/ping"), 0, 0, 0o755);
    attribute(&root.join("usr/bin/ping"), "security.capability", &CAPABILITY);
    std::fs::write(root.join("srv/app/acl"), b"acl").unwrap();
    own(&root.join("srv/app/acl"), 70_000, 4_000_000, 0o640);
    attribute(&root.join("srv/app/acl"), "system.posix_acl_access", &ACL);
    attribute(&root.join("srv/app/acl"), "user.note", b"kept\0as it is");
    node(&root.join("null"), FileType::CharacterDevice, 0o666, (1, 3));
    node(&root.join("disk"), FileType::BlockDevice, 0o660, (259, 70_000));
    node(&root.join("pipe"), FileType::Fifo, 0o600, (0, 0));
    let mut sparse = std::fs::File::create(root.join("sparse")).unwrap();
    sparse.seek(std::io::SeekFrom::Start(5_000_000)).unwrap();
    sparse.write_all(b"end").unwrap();
    std::fs::write(root.join(std::ffi::OsStr::from_bytes(b"caf\xe9")), b"latin").unwrap();
    std::fs::write(root.join("n".repeat(250)), b"long").unwrap();
    std::fs::write(root.join("opaque/old"), b"old").unwrap();
    std::fs::write(root.join("gone"), b"gone").unwrap();
    std::fs::write(root.join("to-dir"), b"file").unwrap();
    let time = std::time::UNIX_EPOCH + Duration::new(1_234_567_890, 123_456_789);
    std::fs::File::open(root.join("usr/bin/ping")).unwrap().set_modified(time).unwrap();
}

/// What a second layer changes.
fn change(root: &Path) {
    std::fs::remove_file(root.join("gone")).unwrap();
    std::fs::remove_dir_all(root.join("opaque")).unwrap();
    std::fs::create_dir(root.join("opaque")).unwrap();
    std::fs::write(root.join("opaque/new"), b"new").unwrap();
    std::fs::remove_file(root.join("to-dir")).unwrap();
    std::fs::create_dir(root.join("to-dir")).unwrap();
    std::fs::write(root.join("to-dir/inside"), b"inside").unwrap();
    std::fs::remove_dir(root.join("to-file")).unwrap();
    std::fs::write(root.join("to-file"), b"file").unwrap();
    std::fs::write(root.join("usr/lib/added"), b"added").unwrap();
}

/// What every image of [`fill`] and [`change`] has, whichever tool made its layers.
const TREE_FEATURES: [Feature; 25] = [
    Feature::Mode(b"/tmp", 0o1777),
    Feature::Mode(b"/srv/app", 0o2750),
    Feature::Mode(b"/usr/bin/su", 0o4755),
    Feature::Owner(b"/usr/bin/su"),
    Feature::Owner(b"/srv/app"),
    Feature::Owner(b"/srv/app/acl"),
    Feature::HardLink(b"/usr/bin/su", b"/usr/bin/su-too"),
    Feature::Xattr(b"/usr/bin/ping", "security.capability"),
    Feature::Xattr(b"/srv/app/acl", "system.posix_acl_access"),
    Feature::Xattr(b"/srv/app/acl", "user.note"),
    Feature::Content(b"/lib"),
    Feature::Kind(b"/null", "character"),
    Feature::Content(b"/null"),
    Feature::Kind(b"/disk", "block"),
    Feature::Content(b"/disk"),
    Feature::Kind(b"/pipe", "FIFO"),
    Feature::Size(b"/sparse", 5_000_003),
    Feature::Entry(b"/caf\xe9"),
    Feature::Entry(b"/empty"),
    Feature::Content(b"/usr/bin/su"),
    Feature::Seconds(b"/usr/bin/ping"),
    Feature::Hidden(b"/gone"),
    Feature::Hidden(b"/opaque/old"),
    Feature::Kind(b"/to-dir", "directory"),
    Feature::Kind(b"/to-file", "regular"),
];

#[tokio::test]
async fn an_image_of_buildah_is_what_umoci_unpacks() {
    if !can_run(&["buildah"]) {
        return;
    }
    let registry = DockerRegistry::start();
    let (store, state) = (registry.dir("store"), registry.dir("state"));
    let buildah = |args: &[&str]| {
        let mut command = Command::new("buildah");
        command.arg("--root").arg(&store).arg("--runroot").arg(&state).args(["--storage-driver", "vfs"]);
        run(command.args(args))
    };
    let lower = buildah(&["from", "scratch"]);
    fill(Path::new(&buildah(&["mount", &lower])));
    buildah(&["commit", "-q", &lower, "lower"]);
    let upper = buildah(&["from", "localhost/lower"]);
    change(Path::new(&buildah(&["mount", &upper])));
    buildah(&["commit", "-q", "--format", "docker", &upper, "both"]);
    let to = format!("docker://{}", registry.reference("buildah"));
    buildah(&["push", "-q", "--tls-verify=false", "localhost/both", &to]);
    for container in [&lower, &upper] {
        buildah(&["umount", container]);
        buildah(&["rm", container]);
    }
    // buildah writes no access control lists.
    let mut features = TREE_FEATURES.to_vec();
    features.retain(|feature| !matches!(feature, Feature::Xattr(_, "system.posix_acl_access")));
    registry.check("buildah", &features, &[]).await;
}

#[tokio::test]
async fn an_image_of_umoci_is_what_umoci_unpacks() {
    if !can_run(&[]) {
        return;
    }
    let registry = DockerRegistry::start();
    let (layout, bundle) = (registry.dir.path().join("layout"), registry.dir.path().join("bundle"));
    run(Command::new("umoci").args(["init", "--layout"]).arg(&layout));
    let image = format!("{}:it", layout.display());
    run(Command::new("umoci").args(["new", "--image", &image]));
    for edit in [fill, change] {
        run(Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle));
        edit(&bundle.join("rootfs"));
        run(Command::new("umoci").args(["repack", "--image", &image]).arg(&bundle));
        std::fs::remove_dir_all(&bundle).unwrap();
    }
    registry.push(&layout, "it", "umoci", &[]);
    registry.check("umoci", &TREE_FEATURES, &[]).await;
}

/// What the layers written by hand have.
const HAND_FEATURES: [Feature; 18] = [
    Feature::Nanoseconds(b"/usr/lib/ping"),
    Feature::Seconds(b"/usr/lib/ping"),
    Feature::Xattr(b"/usr/lib/ping", "security.capability"),
    Feature::Mode(b"/usr/lib/ping", 0o4755),
    Feature::Content(b"/usr/lib/ping"),
    Feature::HardLink(b"/usr/lib/ping", b"/usr/lib/ping2"),
    Feature::HardLink(b"/again", b"/usr/lib/ping2"),
    Feature::Mode(b"/tmp", 0o1777),
    Feature::Owner(b"/tmp"),
    Feature::Kind(b"/null", "character"),
    Feature::Content(b"/disk"),
    Feature::Kind(b"/pipe", "FIFO"),
    Feature::Entry(b"/caf\xe9"),
    Feature::Content(b"/far"),
    Feature::Hidden(b"/gone"),
    Feature::Hidden(b"/opaque/old"),
    Feature::Kind(b"/note", "symlink"),
    Feature::Kind(b"/empty", "directory"),
];

/// Pushes layers written by hand in every form that skopeo has.
#[tokio::test]
async fn layers_by_hand_in_every_form_of_skopeo_are_what_umoci_unpacks() {
    if !can_run(&[]) {
        return;
    }
    let registry = DockerRegistry::start();
    let (packed, plain) = (registry.dir.path().join("packed"), registry.dir.path().join("plain"));
    for (layout, pack) in [(&packed, true), (&plain, false)] {
        let layer = |tar: Vec<u8>| if pack { gzip(tar) } else { (tar.clone(), tar) };
        let mut content = Content::default();
        content
            .image("latest", &layers().into_iter().map(|archive| layer(archive.end())).collect::<Vec<_>>());
        write_layout(&content, layout);
    }
    // The root has an entry; the directories of the long name have none.
    let made: Vec<String> = (1..40).map(|depth| "/long".repeat(depth)).collect();
    let undescribed: Vec<&[u8]> = made.iter().map(String::as_bytes).collect();
    // skopeo leaves what is compressed as it is.
    for (name, layout, options, media_type) in [
        ("oci-gzip", &packed, &["--format", "oci"][..], "oci.image.layer.v1.tar+gzip"),
        (
            "oci-zstd",
            &plain,
            &["--format", "oci", "--dest-compress-format", "zstd"],
            "oci.image.layer.v1.tar+zstd",
        ),
        ("schema2", &packed, &["--format", "v2s2"], "docker.image.rootfs.diff.tar.gzip"),
    ] {
        registry.push(layout, "latest", name, options);
        let reference = format!("docker://{}", registry.reference(name));
        let manifest =
            run(Command::new("skopeo").args(["inspect", "--raw", "--tls-verify=false", &reference]));
        assert!(manifest.contains(media_type), "{manifest}");
        // This umoci can't read zstd; the layers are the same.
        let theirs = registry.expected(if name == "oci-zstd" { "oci-gzip" } else { name });
        registry.check_with(name, theirs, &HAND_FEATURES, &undescribed).await;
    }
}
