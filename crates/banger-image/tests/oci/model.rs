//! Random stacks of layers against a model that says what OCI's specification says: whiteouts first, on what is below.

use std::collections::BTreeMap;

use banger_image::oci::Digest;
use proptest::prelude::*;

use crate::archive::{Archive, Header, gzip};
use crate::pull::Place;
use crate::readback;
use crate::registry::{Content, Registry};

#[derive(Debug, Clone)]
enum Op {
    File(String, u8),
    Directory(String, u32),
    Symlink(String, String),
    HardLink(String, String),
    Fifo(String),
    Whiteout(String),
    Opaque(String),
}

/// Kind, mode, content and which inode.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    kind: &'static str,
    mode: u32,
    content: String,
    inode: usize,
}

#[derive(Debug, Clone, Default)]
struct Model {
    nodes: BTreeMap<String, Node>,
    inodes: usize,
}

impl Model {
    fn put(&mut self, path: &str, kind: &'static str, mode: u32, content: String) {
        if kind != "directory" {
            self.remove_below(path);
        }
        self.inodes += 1;
        self.nodes.insert(path.to_owned(), Node { kind, mode, content, inode: self.inodes });
    }

    fn remove_below(&mut self, path: &str) {
        let prefix = format!("{path}/");
        self.nodes.retain(|name, _| !name.starts_with(&prefix));
    }

    /// Makes the parents; false when one of them is something else.
    fn parents(&mut self, path: &str) -> bool {
        let parents: Vec<&str> = path.match_indices('/').map(|(at, _)| &path[..at]).collect();
        if parents.iter().any(|parent| self.nodes.get(*parent).is_some_and(|node| node.kind != "directory")) {
            return false;
        }
        for parent in parents {
            if !self.nodes.contains_key(parent) {
                self.put(parent, "directory", 0o755, String::new());
            }
        }
        true
    }

    /// Applies what is possible; says whether it was.
    fn apply(&mut self, op: &Op, own: &[String]) -> bool {
        let path = match op {
            Op::File(path, _)
            | Op::Directory(path, _)
            | Op::Symlink(path, _)
            | Op::HardLink(path, _)
            | Op::Fifo(path) => path,
            Op::Whiteout(path) => {
                self.nodes.remove(path);
                self.remove_below(path);
                return true;
            }
            Op::Opaque(path) => {
                self.remove_below(path);
                return true;
            }
        };
        if let Op::HardLink(_, target) = op {
            let is_file = self.nodes.get(target).is_some_and(|node| node.kind != "directory");
            if !is_file || !own.contains(target) || target.starts_with(&format!("{path}/")) {
                return false;
            }
        }
        if !self.parents(path) {
            return false;
        }
        match op {
            Op::File(_, byte) => self.put(path, "regular", 0o640, Digest::of(&[*byte; 5000]).to_string()),
            Op::Directory(_, mode) => self.put(path, "directory", *mode, String::new()),
            Op::Symlink(_, target) => self.put(path, "symlink", 0o777, target.clone()),
            Op::Fifo(_) => self.put(path, "FIFO", 0o600, String::new()),
            Op::HardLink(_, target) => {
                let node = self.nodes[target].clone();
                self.remove_below(path);
                self.nodes.insert(path.clone(), node);
            }
            Op::Whiteout(_) | Op::Opaque(_) => {}
        }
        true
    }
}

fn add(archive: Archive, op: &Op) -> Archive {
    let entry = |archive: Archive, path: &str, kind: u8, mode: u32| {
        archive.add(Header { name: path.as_bytes(), kind, mode, ..Header::default() }, b"")
    };
    match op {
        Op::File(path, byte) => archive.add(
            Header { name: path.as_bytes(), mode: 0o640, size: 5000, ..Header::default() },
            &[*byte; 5000],
        ),
        Op::Directory(path, mode) => entry(archive, path, b'5', *mode),
        Op::Symlink(path, target) => archive.symlink(path, target),
        Op::HardLink(path, target) => archive.hard_link(path, target),
        Op::Fifo(path) => entry(archive, path, b'6', 0o600),
        Op::Whiteout(path) => {
            let at = path.rfind('/').map_or(0, |at| at + 1);
            archive.file(&format!("{}.wh.{}", &path[..at], &path[at..]), b"")
        }
        Op::Opaque(path) => archive.file(&format!("{path}/.wh..wh..opq"), b""),
    }
}

/// `mixed`: the same names for directories and files. Else whiteouts may come anywhere.
fn op(mixed: bool) -> impl Strategy<Value = Op> {
    let (directories, leaves) = if mixed {
        ("[ab](/[ab]){0,2}", "[ab](/[ab]){0,2}")
    } else {
        ("[de](/[de]){0,2}", "([de]/){0,2}[fg]")
    };
    let any_path = prop_oneof![directories, leaves];
    prop_oneof![
        4 => (leaves, any::<u8>()).prop_map(|(path, byte)| Op::File(path, byte | 1)),
        3 => (directories, prop_oneof![Just(0o755), Just(0o1777)]).prop_map(|(path, mode)| Op::Directory(path, mode)),
        1 => (leaves, "[xyz]{1,80}").prop_map(|(path, target)| Op::Symlink(path, target)),
        2 => (leaves, leaves).prop_map(|(path, target)| Op::HardLink(path, target)),
        1 => leaves.prop_map(Op::Fifo),
        2 => any_path.prop_map(Op::Whiteout),
        1 => directories.prop_map(Op::Opaque),
    ]
}

fn stack() -> impl Strategy<Value = (bool, Vec<Vec<Op>>)> {
    any::<bool>().prop_flat_map(|mixed| {
        (Just(mixed), proptest::collection::vec(proptest::collection::vec(op(mixed), 0..14), 1..4))
    })
}

/// What the stack should make, and the archives.
fn build(mixed: bool, layers: &[Vec<Op>]) -> (Model, Vec<Archive>) {
    let mut model = Model::default();
    let mut archives = Vec::new();
    for layer in layers {
        let is_whiteout = |op: &&Op| matches!(op, Op::Whiteout(_) | Op::Opaque(_));
        for op in layer.iter().filter(is_whiteout) {
            model.apply(op, &[]);
        }
        let (mut own, mut kept) = (Vec::new(), Vec::new());
        for op in layer {
            let is_kept = is_whiteout(&op) || model.apply(op, &own);
            if let Op::File(path, _) | Op::Symlink(path, _) | Op::Fifo(path) = op
                && is_kept
            {
                own.push(path.clone());
            }
            kept.extend(is_kept.then_some(op));
        }
        if mixed {
            kept.sort_by_key(|op| !is_whiteout(op));
        }
        archives.push(kept.into_iter().fold(Archive::new(), add));
    }
    (model, archives)
}

fn pull(archives: Vec<Archive>) -> Place {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut content = Content::default();
    let layers: Vec<_> = archives.into_iter().map(|archive| gzip(archive.end())).collect();
    content.image("latest", &layers);
    let registry = Registry::start(move |request| content.answer(request));
    let place = Place::new();
    runtime.block_on(place.pull(&registry.reference("box"))).unwrap();
    place
}

/// Entries that make no sense, often: whatever they are, the result is a sound filesystem or an error and no file.
fn nonsense() -> impl Strategy<Value = Archive> {
    let name =
        || "(\\.\\./|/|\\./|l/|\\.wh\\.){0,1}[al](/([al]|\\.\\.|\\.wh\\.[al]|\\.wh\\.\\.wh\\.\\.opq)){0,3}";
    let target = || "(\\.\\./|/){0,2}[al](/[al]){0,2}";
    let key = prop_oneof![
        Just("SCHILY.xattr.user.a"),
        Just("SCHILY.xattr.system.posix_acl_default"),
        Just("SCHILY.xattr.security.capability"),
        Just("GNU.sparse.size"),
        Just("GNU.sparse.map"),
        Just("size"),
        Just("mtime"),
    ];
    let record = (key, prop_oneof!["[0-9,.]{1,12}", ".{0,60}"]);
    let entry = (name(), target(), 0..8usize, 0..3000u64, proptest::option::weighted(0.2, record));
    proptest::collection::vec(entry, 1..16).prop_map(|entries| {
        let mut archive = Archive::new();
        for (name, link, kind, size, record) in entries {
            if let Some((key, value)) = record {
                archive = archive.pax(&[(key, value.as_bytes())]);
            }
            let kind = *b"00512346".get(kind).unwrap();
            let size = if kind == b'0' { size } else { 0 };
            let header =
                Header { name: name.as_bytes(), link: link.as_bytes(), kind, size, ..Header::default() };
            archive = archive.add(header, &vec![kind; size as usize]);
        }
        archive
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nonsense_makes_a_filesystem_or_an_error(archives in proptest::collection::vec(nonsense(), 1..3)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut content = Content::default();
        content.image("latest", &archives.into_iter().map(|archive| gzip(archive.end())).collect::<Vec<_>>());
        let registry = Registry::start(move |request| content.answer(request));
        let place = Place::new();
        let made = runtime.block_on(place.pull(&registry.reference("box"))).is_ok();
        prop_assert_eq!(place.rootfs().exists(), made);
        prop_assert_eq!(std::fs::read_dir(place.dir.path()).unwrap().count(), 1 + usize::from(made));
        if made && readback::have("e2fsck") {
            readback::check(&place.rootfs());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn layers_make_what_the_model_makes((mixed, layers) in stack()) {
        if !readback::have("debugfs") || !readback::have("e2fsck") {
            return Ok(());
        }
        let (model, archives) = build(mixed, &layers);
        let place = pull(archives);
        readback::check(&place.rootfs());
        let tree = readback::read(&place.rootfs());
        let found: BTreeMap<String, (String, u32, String)> = tree
            .iter()
            .filter(|(path, _)| !path.is_empty())
            .map(|(path, f)| {
                (String::from_utf8(path[1..].to_vec()).unwrap(), (f.kind.clone(), f.mode, f.content.clone()))
            })
            .collect();
        let expected: BTreeMap<String, (String, u32, String)> = model
            .nodes
            .iter()
            .map(|(path, node)| (path.clone(), (node.kind.to_owned(), node.mode, node.content.clone())))
            .collect();
        prop_assert_eq!(found, expected);
        // Names of the same inode are names of the same inode.
        for (a, node_a) in &model.nodes {
            for (b, node_b) in &model.nodes {
                let same = tree[format!("/{a}").as_bytes()].inode == tree[format!("/{b}").as_bytes()].inode;
                prop_assert_eq!(same, node_a.inode == node_b.inode, "{} {}", a, b);
            }
        }
    }
}
