//! What a hostile guest, or an owner's own config at its wish, could have the host do; each with a payload that would
//! leave a mark. The guest here is a thread that lists and sends whatever a test likes, as a taken-over agent can.
#![allow(clippy::disallowed_methods, reason = "a test")]

use super::apply::{apply, refuse_dirty, undo};
use super::checkout::{Wanted, survey};
use super::collect::{Changes, Collecting, diff};
use super::git::Git;
use super::metadata::Branching;
use super::place::{Placement, Scratch, send};
use super::tree::path_of;
use crate::paths::StateDir;
use banger_wire::bytes::ByteString;
use banger_wire::channel;
use banger_wire::daemon::{Workspace, WorkspaceMode};
use banger_wire::item::{Item, ItemReader, ItemWriter, Kind};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;

/// Every program that an owner's config can name for git to run. Each leaves a mark under its name.
const TRAPS: &str = r#"
mkdir -p marks traps
snare() { printf '#!/bin/sh\ntouch "%s/marks/%s"\nexit 0\n' "$PWD" "$1" > traps/"$1"; chmod +x traps/"$1"; }
for hook in pre-commit post-checkout post-index-change post-merge reference-transaction update post-update pre-receive; do snare $hook; done
for name in fsmonitor clean smudge process textconv external command merge ssh pager credential askpass; do snare $name; done
here=$PWD; cd r
put() { git config "$1" "$2"; }
put core.hooksPath "$here/traps"; put core.fsmonitor "$here/traps/fsmonitor"; put core.sshCommand "$here/traps/ssh"
put filter.evil.clean "$here/traps/clean"; put filter.evil.smudge "$here/traps/smudge"; put filter.evil.required true
put filter.long.process "$here/traps/process"; put diff.evil.textconv "$here/traps/textconv"
put diff.other.command "$here/traps/command"; put diff.external "$here/traps/external"
put merge.evil.driver "$here/traps/merge %O %A %B"; put merge.default evil; put core.pager "$here/traps/pager"
put credential.helper "$here/traps/credential"; put core.askPass "$here/traps/askpass"
put submodule.recurse true; put protocol.allow always
"#;

/// An owner with a checkout, in which every trap is set once it has been placed.
pub(super) struct Owner {
    dir: tempfile::TempDir,
}

impl Owner {
    /// Makes the checkout `r` by a script that runs in it.
    pub(super) fn new(script: &str) -> Self {
        let owner = Self { dir: tempfile::tempdir().unwrap() };
        owner.sh(&format!(
            "git init -q -b main r; cd r; git config user.name A; git config user.email a@example.com; {script}"
        ));
        owner
    }

    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(super) fn top(&self) -> PathBuf {
        self.dir().join("r").canonicalize().unwrap()
    }

    pub(super) fn sh(&self, script: &str) -> String {
        let mut command = std::process::Command::new("sh");
        command.args(["-ec", script]).current_dir(self.dir()).env("GIT_CONFIG_GLOBAL", "/dev/null");
        command.env("GIT_CONFIG_NOSYSTEM", "1").stdin(std::process::Stdio::null());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    pub(super) fn set_traps(&self) {
        self.sh(TRAPS);
    }

    /// What has run that should not have.
    pub(super) fn marks(&self) -> Vec<String> {
        let found = std::fs::read_dir(self.dir().join("marks")).into_iter().flatten();
        found.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }

    fn state(&self) -> StateDir {
        StateDir::at(&self.dir().join("state"))
    }

    fn place(&self) -> Placement {
        let survey = survey(&self.top(), &Wanted::default()).unwrap();
        let mut placement = Placement::make(survey, &self.state(), &Branching::default()).unwrap();
        send(&mut placement, std::io::sink(), Vec::new(), &AtomicU64::new(0)).unwrap();
        placement
    }

    /// Collects from a guest that has these entries, and the placed ones as they were unless named.
    fn collect(&self, placement: &Placement, entries: &[Entry]) -> Changes {
        let (input, to_host) = channel::reader();
        let (output, mut from_host) = channel::writer();
        let mut listed = Vec::new();
        let mut writer = ItemWriter::new(&mut listed);
        for entry in entries {
            writer.item(&entry.listed()).unwrap();
        }
        writer.item(&Item::End).unwrap();
        let entries = entries.to_vec();
        let guest = std::thread::spawn(move || {
            let _ = to_host.pieces.send(listed);
            let asked = std::iter::from_fn(move || from_host.blocking_recv());
            let mut reader = ItemReader::new(Pieces { pieces: asked, rest: Vec::new() });
            while let Ok(Item::Want { path }) = reader.next_item() {
                let entry = entries.iter().find(|entry| entry.path.as_bytes() == path.0).unwrap();
                let _ = to_host.pieces.send(entry.sent());
            }
        });
        let workspace = Workspace {
            source: ByteString::from(self.top().into_os_string()),
            path: "/root/repo".into(),
            below: "".into(),
            mode: WorkspaceMode::default(),
            head: None,
            placed: 0,
            asked: banger_wire::daemon::WorkspaceAsked::default(),
        };
        let scratch = Scratch::make(&self.state()).unwrap();
        let base = placement.base.clone();
        let collecting = Collecting::begin(input, output, placement.scratch.path(), base, scratch).unwrap();
        let changes = collecting.finish(workspace).unwrap();
        guest.join().unwrap();
        changes
    }

    /// Everything the host does with a checkout and with what came out of it.
    fn everything(&self, entries: &[Entry]) -> Changes {
        let placement = self.place();
        let changes = self.collect(&placement, entries);
        changes.patch(None).unwrap();
        let trees = changes.trees().unwrap();
        for change in &changes.list {
            changes.diff_of(&trees, &change.path).unwrap();
        }
        changes.changed_on_host().unwrap();
        refuse_dirty(&self.top(), &changes.base.repositories).unwrap();
        apply(&changes, &self.state()).unwrap();
        survey(&self.top(), &Wanted::default()).unwrap();
        changes
    }
}

struct Pieces<I> {
    pieces: I,
    rest: Vec<u8>,
}

impl<I: Iterator<Item = Vec<u8>>> Read for Pieces<I> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.rest.is_empty() {
            self.rest = self.pieces.next().unwrap_or_default();
        }
        let len = buffer.len().min(self.rest.len());
        buffer[..len].copy_from_slice(&self.rest[..len]);
        self.rest.drain(..len);
        Ok(len)
    }
}

/// Something in a guest's tree.
#[derive(Debug, Clone)]
struct Entry {
    path: String,
    kind: Kind,
    mode: u32,
    content: String,
}

fn file(path: &str, content: &str) -> Entry {
    Entry { path: path.to_owned(), kind: Kind::File, mode: 0o644, content: content.to_owned() }
}

fn link(path: &str, target: &str) -> Entry {
    Entry { kind: Kind::Link, mode: 0o777, ..file(path, target) }
}

impl Entry {
    fn listed(&self) -> Item {
        let (path, len) = (ByteString::from(self.path.as_str()), self.content.len() as u64);
        Item::Listed { path, kind: self.kind, mode: self.mode, len, changed: 1 }
    }

    fn sent(&self) -> Vec<u8> {
        let path = ByteString::from(self.path.as_str());
        let mut bytes = Vec::new();
        let mut writer = ItemWriter::new(&mut bytes);
        if self.kind == Kind::Link {
            let target = ByteString::from(self.content.as_str());
            writer.item(&Item::Link { path, target, modified: 0 }).unwrap();
        } else {
            let len = self.content.len() as u64;
            let item = Item::File { path, mode: self.mode, modified: 0, len };
            writer.file(&item, &mut self.content.as_bytes()).unwrap();
        }
        bytes
    }
}

const NOTHING: [&str; 0] = [];

#[test]
fn hooks_and_fsmonitor_of_the_owner_stay_quiet() {
    let owner = Owner::new("echo a > a; git add .; git commit -qm one");
    owner.set_traps();
    owner.everything(&[file("a", "b\n")]);
    // The one command that has a hook to run.
    Git::at(&owner.top()).run(&["update-ref", "refs/heads/new", "HEAD"]).unwrap();
    assert_eq!(owner.marks(), NOTHING);
    // The traps are none of wood: what a person does sets them off.
    owner.sh("cd r; git status -s; git commit -qam two || true");
    let marks = owner.marks();
    assert!(
        ["fsmonitor", "pre-commit", "reference-transaction"].map(|mark| marks.contains(&mark.to_owned()))
            == [true; 3]
    );
}

#[test]
fn filters_that_attributes_ask_for_stay_quiet() {
    let owner = Owner::new(
        "printf '*.e filter=evil\\n*.l filter=long\\n' > .gitattributes; echo 1 > x.e; echo 2 > x.l; git add .; git commit -qm one",
    );
    owner.set_traps();
    // Files that git has to read to know whether they have changed: of the same length, of another time.
    owner.sh("cd r; touch -d '2001-01-01' x.e x.l");
    let said = refuse_dirty(&owner.top(), &[ByteString::from(owner.top().into_os_string())]);
    said.unwrap();
    let survey_of =
        survey(&owner.top(), &Wanted { from: Some("HEAD".to_owned()), ..Wanted::default() }).unwrap();
    Placement::make(survey_of, &owner.state(), &Branching::default()).unwrap();
    owner.everything(&[
        file(".gitattributes", "* filter=evil diff=evil merge=evil\n*.l filter=long\n"),
        file("x.e", "5\n"),
        file("x.l", "6\n"),
        file("new.e", "7\n"),
    ]);
    assert_eq!(owner.marks(), NOTHING);
    owner.sh("cd r; git status -s || true; git add x.e x.l || true");
    assert!(owner.marks().contains(&"clean".to_owned()));
}

#[test]
fn merge_drivers_stay_quiet() {
    let lines = "for i in 1 2 3 4 5 6 7 8 9; do echo $i; done";
    let owner = Owner::new(&format!(
        "echo '* merge=evil' > .gitattributes; ({lines}) > text; git add .; git commit -qm one"
    ));
    let placement = owner.place();
    owner.sh("cd r; sed -i s/9/nine/ text; git commit -qam two");
    owner.set_traps();
    let rules = std::fs::read_to_string(owner.top().join(".gitattributes")).unwrap();
    let changes = owner.collect(
        &placement,
        &[file(".gitattributes", &rules), file("text", "one\n2\n3\n4\n5\n6\n7\n8\n9\n")],
    );
    apply(&changes, &owner.state()).unwrap();
    let joined = std::fs::read_to_string(owner.top().join("text")).unwrap();
    assert!(joined.starts_with("one\n") && joined.ends_with("nine\n"), "{joined}");
    assert_eq!(owner.marks(), NOTHING);
}

#[test]
fn neither_external_diffs_nor_textconv_run_whatever_the_config_says() {
    let owner = Owner::new(
        "printf '* diff=evil\\n*.o diff=other\\n' > .gitattributes; echo 1 > a; echo 1 > a.o; git add .; git commit -qm one",
    );
    owner.set_traps();
    owner.sh("cd r; echo 2 > a; echo 2 > a.o; git -c core.hooksPath=/dev/null -c core.fsmonitor= commit -qam two; cp .gitattributes .git/info/attributes; rm -rf ../marks/*");
    // In the owner's repository, with all of the owner's config: the flags alone have to do.
    let shown = diff(&Git::at(&owner.top()), &["HEAD^", "HEAD"]).unwrap();
    assert!(String::from_utf8_lossy(&shown).contains("\n-1\n+2\n"));
    assert_eq!(owner.marks(), NOTHING);
    // And in a repository of banger's own nothing of the config is seen at all.
    let home = owner.dir().join("home");
    std::fs::create_dir(&home).unwrap();
    std::fs::copy(owner.top().join(".git/config"), home.join(".gitconfig")).unwrap();
    let placement = owner.place();
    let own = placement.scratch.path().join(super::base::REPOSITORY);
    for key in ["diff.external", "diff.evil.textconv", "filter.evil.clean", "core.sshCommand"] {
        let seen = |git: Git| git.with_env("HOME", &home).line(&["config", "--get", key]).unwrap();
        assert_eq!(seen(Git::own(&own)), None, "{key}");
        assert!(seen(Git::at(&own).with_env("GIT_DIR", ".")).is_some(), "{key}");
    }
    let git = || Git::at(&owner.top()).run(&["diff-tree", "-p", "--ext-diff", "--textconv", "HEAD^", "HEAD"]);
    let _ = git();
    let marks = owner.marks();
    assert!(["command", "textconv"].map(|mark| marks.contains(&mark.to_owned())) == [true; 2], "{marks:?}");
}

#[test]
fn nothing_is_fetched_over_any_transport() {
    let owner =
        Owner::new("echo a > a; git add .; git commit -qm one; echo b > b; git add b; git commit -qm two");
    owner.sh("git -C r config uploadpack.allowFilter true; mv r origin
        git clone -q --no-checkout --filter=blob:none \"file://$PWD/origin\" r; cd r; git read-tree HEAD
        git remote set-url origin ssh://host/origin");
    owner.set_traps();
    // The contents of `a` and `b` were never fetched, and everything may want them.
    let placement = owner.place();
    let git = Git::at(&owner.top());
    let object = git.line(&["rev-parse", "HEAD:a"]).unwrap().unwrap();
    assert_eq!(git.ask(&["cat-file".into(), "-p".into(), object.clone()]).unwrap(), None);
    // Were it to be tried all the same, no transport would be taken.
    assert_eq!(git.ask(&["fetch", "-q", "origin"]).unwrap(), None);
    let changes = owner.collect(&placement, &[file("a", "c\n")]);
    assert!(changes.patch(Some("HEAD")).is_err() || !changes.list.is_empty());
    assert_eq!(owner.marks(), NOTHING);
    owner.sh(&format!("cd r; git cat-file -p {} || true", object.display()));
    assert!(owner.marks().contains(&"ssh".to_owned()));
}

#[test]
fn no_file_of_a_repository_comes_out_under_any_spelling() {
    let owner = Owner::new("echo a > a; mkdir d; echo b > d/b; git add .; git commit -qm one");
    let mark = format!("touch {}/marks/guest", owner.dir().display());
    owner.sh("mkdir marks; mkdir secret; git init -q secret/other");
    let config = format!("[core]\n\tfsmonitor = {mark}\n\thooksPath = d\n[alias]\n\tst = !{mark}\n");
    let alternates = format!("{}/secret/other/.git/objects\n", owner.dir().display());
    let mut entries = vec![file("a", "changed\n"), file("d/b", "b\n")];
    for dir in [
        ".git",
        ".GIT",
        ".Git",
        "git~1",
        ".git.",
        ".git ",
        ".git::$INDEX_ALLOCATION",
        ".g\u{200c}it",
        "d/.git",
    ] {
        entries.push(file(&format!("{dir}/config"), &config));
        entries.push(file(&format!("{dir}/hooks/post-checkout"), &format!("#!/bin/sh\n{mark}\n")));
        entries.push(file(&format!("{dir}/objects/info/alternates"), &alternates));
        entries.push(file(&format!("{dir}/info/attributes"), "* filter=evil\n"));
    }
    entries.push(file("d/.git.", "gitdir: ../../secret/other/.git\n"));
    let before = owner.sh("cd r/.git; find . -type f | sort | xargs sha256sum");
    let changes = owner.everything(&entries);
    assert_eq!(changes.list.len(), 1, "{:?}", changes.list);
    assert_eq!(changes.left_out.len(), entries.len() - 2);
    assert_eq!(owner.sh("cd r/.git; find . -type f | sort | xargs sha256sum"), before);
    owner.sh("cd r; git status -s; git add .; git checkout -q .");
    assert_eq!(owner.marks(), NOTHING);
    assert_eq!(owner.sh("cd r; find . -path ./.git -prune -o -type f -print | sort"), "./a\n./d/b\n");
}

#[test]
fn a_repository_in_the_tree_is_a_directory() {
    let owner = Owner::new("echo a > a; git add .; git commit -qm one");
    let mark = format!("touch {}/marks/guest", owner.dir().display());
    owner.sh("mkdir marks");
    let config = format!("[core]\n\tbare = true\n\tfsmonitor = {mark}\n\tworktree = ..\n");
    let hook =
        Entry { mode: 0o755, ..file("inner/hooks/post-index-change", &format!("#!/bin/sh\n{mark}\n")) };
    owner.everything(&[
        file("a", "a\n"),
        file("inner/HEAD", "ref: refs/heads/main\n"),
        file("inner/config", &config),
        file("inner/objects/info/packs", "\n"),
        file("inner/refs/heads/x", &"0".repeat(40)),
        hook,
    ]);
    let inner = owner.top().join("inner");
    assert!(inner.join("config").exists());
    // Also when somebody names it, its config counts for nothing.
    let error = survey(&inner, &Wanted::default()).unwrap_err();
    assert!(error.message.contains("is a bare repository"), "{error:?}");
    assert_eq!(Git::at(&inner).ask(&["config", "--get", "core.worktree"]).unwrap(), None);
    assert_eq!(owner.marks(), NOTHING);
}

#[test]
fn links_devices_and_setuid_bits_stay_in_the_guest() {
    use std::os::unix::fs::MetadataExt as _;
    let owner =
        Owner::new("mkdir dir; echo d > dir/file; echo a > a; ln -s a link; git add .; git commit -qm one");
    owner.sh("mkdir marks outside");
    let outside = owner.dir().join("outside");
    let special = |path: &str| Entry { kind: Kind::Special, ..file(path, "") };
    let entries = [
        file("a", "a\n"),
        link("link", "a"),
        link("out", outside.to_str().unwrap()),
        link("up", "../outside"),
        link("deep/er/up", "../../../outside"),
        link("repository", ".git/config"),
        // A directory becomes a link, through which a file would be written.
        link("dir", "../outside"),
        file("dir/marks", "mark\n"),
        special("device"),
        special("pipe"),
        Entry { mode: 0o106_755, ..file("setuid", "#!/bin/sh\n") },
        link("fine", "deep/../a"),
    ];
    let placement = owner.place();
    let changes = owner.collect(&placement, &entries);
    let left: Vec<String> =
        changes.left_out.iter().map(|(path, _)| path_of(path).display().to_string()).collect();
    for name in ["out", "up", "deep/er/up", "repository", "dir", "device", "pipe"] {
        assert!(left.contains(&name.to_owned()), "{name} was not refused: {left:?}");
    }
    let patch = changes.patch(None).unwrap();
    assert!(!String::from_utf8_lossy(&patch).contains("outside"));
    let _ = apply(&changes, &owner.state());
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0, "something was written outside");
    let top = owner.top();
    for name in ["out", "up", "deep", "repository", "device", "pipe"] {
        assert!(top.join(name).symlink_metadata().is_err(), "{name} came out");
    }
    assert!(!top.join("dir").is_symlink());
    let setuid = Entry { mode: 0o106_755, ..file("setuid", "#!/bin/sh\n") };
    let rest =
        owner.collect(&placement, &[file("a", "a\n"), link("link", "a"), file("dir/file", "d\n"), setuid]);
    apply(&rest, &owner.state()).unwrap();
    let mode = top.join("setuid").metadata().unwrap().mode();
    assert_eq!((mode & 0o7000, mode & 0o100), (0, 0o100));
    undo(&top, &owner.state()).unwrap();
    assert!(!top.join("setuid").exists());
}
