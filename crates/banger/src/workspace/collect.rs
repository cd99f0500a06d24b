//! What a guest changed in its workspace since it was placed.
//!
//! Everything that arrives here was written by somebody nobody trusts. It is names, which are checked, and contents, which
//! become objects under their hashes; no file on the host gets a name of the guest's here, and of git's own files none
//! arrives. Which new files count is decided by ignore rules, the host's and those in the tree.

use super::base::{Base, BaseFile, FileKind, REPOSITORY};
use super::git::Git;
use super::objects::Objects;
use super::place::Scratch;
use super::safety::{is_git_name, leads_out};
use super::tree::{Tree, path_of};
use crate::paths::StateDir;
use crate::stop::{Stop, failed};
use crate::text::escape;
use crate::transfer::transfer;
use banger_wire::bytes::ByteString;
use banger_wire::channel::{ChannelReader, ChannelWriter};
use banger_wire::daemon::{VmView, Workspace};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::guest::SessionKind;
use banger_wire::item::{Item, ItemReader, ItemWriter, Kind};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};

/// Files a guest may list; each costs some hundred bytes here.
const LISTED_MAX: usize = 1_000_000;
/// Bytes of changed files: what a patch, which is made in memory, can reasonably hold.
const CHANGED_MAX: u64 = 1 << 30;
/// Contents asked for at once. So many names always fit the window, whatever the guest does meanwhile.
const WANTED_MAX: usize = 64;

/// One changed file or link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) path: ByteString,
    /// What was placed; none for a new one.
    pub(crate) before: Option<(FileKind, String)>,
    /// What is there now; none when it is gone.
    pub(crate) after: Option<(FileKind, String)>,
}

/// Everything that changed.
#[derive(Debug)]
pub(crate) struct Changes {
    pub(crate) workspace: Workspace,
    pub(crate) base: Base,
    pub(crate) list: Vec<Change>,
    /// What does not come back, and why.
    pub(crate) left_out: Vec<(ByteString, &'static str)>,
    /// New in the guest, and ignored.
    pub(crate) ignored: Vec<ByteString>,
    /// A repository with the contents before and after.
    pub(crate) repository: PathBuf,
    /// Its directory goes with this.
    pub(crate) scratch: Scratch,
}

/// What a guest lists.
#[derive(Debug, Clone, Copy)]
struct Listed {
    kind: Kind,
    mode: u32,
    len: u64,
    changed: i64,
}

/// Asks the guest what has changed.
///
/// # Errors
/// When nothing was placed in this vm, and those of the connection and of git.
pub(crate) async fn collect(vm: &VmView, state: &StateDir) -> Result<Changes, Stop> {
    let dir = state.workspaces().join(vm.id.as_str());
    let found = vm.workspace.clone().zip(Base::load(&dir)?);
    let Some((workspace, base)) = found else {
        return Err(no_workspace(vm).into());
    };
    let scratch = Scratch::make(state)?;
    let what = SessionKind::Collect { path: workspace.path.clone() };
    let work = move |input, output| Collecting::begin(input, output, &dir, base, scratch)?.finish(workspace);
    transfer((vm.name.as_str(), Path::new(&vm.socket)), what, work, &mut || {}).await
}

/// Returns the failure of what takes a vm with a workspace.
pub(crate) fn no_workspace(vm: &VmView) -> WireError {
    let message = format!("vm `{}` has no workspace", vm.name);
    let hint = format!("place one with `banger vm workspace prepare {} PATH`", vm.name);
    WireError::new(ErrorCode::Failed, message).hinted(hint)
}

/// A conversation with the guest about its files.
pub(super) struct Collecting {
    reader: ItemReader<ChannelReader>,
    writer: ItemWriter<ChannelWriter>,
    base: Base,
    objects: Objects,
    ignore: Git,
    listed: BTreeMap<ByteString, Listed>,
    left_out: Vec<(ByteString, &'static str)>,
    received: BTreeMap<ByteString, Option<(FileKind, String)>>,
    received_len: u64,
    repository: PathBuf,
    scratch: Scratch,
}

fn unreadable(error: &Error) -> WireError {
    failed("could not read the guest's files", error)
}

impl Collecting {
    pub(super) fn begin(
        input: ChannelReader,
        output: ChannelWriter,
        dir: &Path,
        base: Base,
        scratch: Scratch,
    ) -> Result<Self, WireError> {
        let kept = dir.join(REPOSITORY);
        let tops = base.repositories.iter().map(|top| Git::at(Path::new(top.as_os_str())).path("objects"));
        // A repository that has moved is missed when one of its objects is needed.
        let others = tops.filter_map(Result::ok).chain([kept.join("objects")]);
        let repository = scratch.path().join("export.git");
        let objects = Objects::make(&repository, base.format(), others)?;
        let empty = scratch.path().join("empty");
        let prepare = || {
            std::fs::create_dir(&empty)?;
            std::fs::create_dir(repository.join("info"))?;
            let rules = std::fs::read(kept.join("info/exclude")).unwrap_or_default();
            std::fs::write(repository.join("info/exclude"), rules)
        };
        prepare()
            .map_err(|error| failed(format!("could not write to `{}`", repository.display()), &error))?;
        let ignore = Git::own(&repository).in_tree(&repository, &empty);
        Ok(Self {
            reader: ItemReader::new(input),
            writer: ItemWriter::new(output),
            base,
            objects,
            ignore,
            listed: BTreeMap::new(),
            left_out: Vec::new(),
            received: BTreeMap::new(),
            received_len: 0,
            repository,
            scratch,
        })
    }

    pub(super) fn finish(mut self, workspace: Workspace) -> Result<Changes, WireError> {
        self.read_list().map_err(|error| unreadable(&error))?;
        let changed: BTreeSet<ByteString> = { self.base.files.iter() }
            .filter(|(path, file)| self.listed.get(path).is_some_and(|listed| !is_same(file, listed)))
            .map(|(path, _)| path.clone())
            .collect();
        let new: BTreeSet<ByteString> =
            { self.listed.keys() }.filter(|path| !self.base.files.contains_key(path)).cloned().collect();
        let mut counted = self.without_ignored(&new)?;
        // Rules that the guest has written count as well, but only for leaving files out.
        let is_rules = |path: &&ByteString| path.0 == b".gitignore" || path.0.ends_with(b"/.gitignore");
        let rules: Vec<ByteString> = counted.iter().chain(&changed).filter(is_rules).cloned().collect();
        if !rules.is_empty() {
            self.fetch(&rules)?;
            counted = self.without_ignored(&counted)?;
        }
        let ignored = new.difference(&counted).cloned().collect();
        let wanted: Vec<ByteString> = { changed.union(&counted) }
            .filter(|path| !self.received.contains_key(path))
            .filter(|path| self.listed.get(path).is_some_and(|listed| listed.kind != Kind::Special))
            .cloned()
            .collect();
        self.fetch(&wanted)?;
        let end = |writer: &mut ItemWriter<_>| {
            writer.item(&Item::End)?;
            writer.flush()
        };
        end(&mut self.writer).map_err(|error| unreadable(&error))?;
        let special =
            changed.union(&counted).filter(|path| self.listed[*path].kind == Kind::Special).cloned();
        self.left_out.extend(special.map(|path| (path, "is a device, a pipe or a socket")));
        Ok(self.conclude(workspace, ignored))
    }

    fn read_list(&mut self) -> std::io::Result<()> {
        loop {
            match self.reader.next_item()? {
                Item::Listed { kind: Kind::Directory, .. } => {}
                Item::Listed { path, kind, mode, len, changed } => {
                    if self.listed.len() == LISTED_MAX {
                        return Err(Error::other(format!("more than {LISTED_MAX} files")));
                    }
                    if path.0.split(|&byte| byte == b'/').any(is_git_name) {
                        self.left_out.push((path, "has a name that git keeps for itself"));
                    } else {
                        self.listed.insert(path, Listed { kind, mode, len, changed });
                    }
                }
                Item::End => return Ok(()),
                _ => return Err(ErrorKind::InvalidData.into()),
            }
        }
    }

    /// Returns the paths that no rule ignores. The rules of the tree are read out of an index: no file is written for
    /// them, and git looks at no directory but an empty one.
    fn without_ignored(&self, paths: &BTreeSet<ByteString>) -> Result<BTreeSet<ByteString>, WireError> {
        if self.base.repositories.is_empty() || paths.is_empty() {
            return Ok(paths.clone());
        }
        let is_rules = |path: &ByteString| path.0 == b".gitignore" || path.0.ends_with(b"/.gitignore");
        let mut rules: BTreeMap<&ByteString, &str> = { self.base.files.iter() }
            .filter(|(path, file)| is_rules(path) && file.kind != FileKind::Link)
            .map(|(path, file)| (path, file.object.as_str()))
            .collect();
        for (path, found) in self.received.iter().filter(|(path, _)| is_rules(path)) {
            match found {
                Some((FileKind::Plain | FileKind::Executable, object)) => rules.insert(path, object),
                _ => rules.remove(path),
            };
        }
        let (mut entries, mut names) = (Vec::new(), Vec::new());
        for (path, object) in rules {
            entry(&mut entries, FileKind::Plain, object, path);
            names.extend_from_slice(&path.0);
            names.push(0);
        }
        let index = self.scratch.path().join("rules");
        let _ = std::fs::remove_file(&index);
        let git = self.ignore.clone().with_env("GIT_INDEX_FILE", &index);
        git.feed(&["update-index", "-z", "--index-info"], &entries)?;
        git.feed(&["update-index", "-z", "--skip-worktree", "--stdin"], &names)?;
        // A name that begins with a colon would be a pattern.
        let mut asked = Vec::new();
        for path in paths {
            asked.extend_from_slice(b"./");
            asked.extend_from_slice(&path.0);
            asked.push(0);
        }
        // Nothing ignored is a failure to git.
        let ignored = git.feed_any(&["check-ignore", "-z", "--stdin"], &asked, &[0, 1])?;
        let ignored: BTreeSet<&[u8]> =
            ignored.split(|&byte| byte == 0).filter_map(|path| path.strip_prefix(b"./")).collect();
        Ok(paths.iter().filter(|path| !ignored.contains(path.0.as_slice())).cloned().collect())
    }

    fn fetch(&mut self, paths: &[ByteString]) -> Result<(), WireError> {
        for some in paths.chunks(WANTED_MAX) {
            let ask = |writer: &mut ItemWriter<_>| {
                for path in some {
                    writer.item(&Item::Want { path: path.clone() })?;
                }
                writer.flush()
            };
            ask(&mut self.writer).map_err(|error| unreadable(&error))?;
            for path in some {
                let found = self.receive(path).map_err(|error| {
                    failed(
                        format!(
                            "could not read `{}` in the guest",
                            escape(&path.as_os_str().to_string_lossy())
                        ),
                        &error,
                    )
                })?;
                self.received.insert(path.clone(), found);
            }
        }
        Ok(())
    }

    fn receive(&mut self, asked: &ByteString) -> std::io::Result<Option<(FileKind, String)>> {
        let item = self.reader.next_item()?;
        if item.path() != Some(asked) {
            return Err(ErrorKind::InvalidData.into());
        }
        let (kind, len) = match &item {
            Item::File { mode, len, .. } => (FileKind::of_mode(*mode), *len),
            Item::Link { target, .. } => (FileKind::Link, target.0.len() as u64),
            Item::Missing { .. } => return Ok(None),
            _ => return Err(ErrorKind::InvalidData.into()),
        };
        self.received_len = self.received_len.saturating_add(len);
        if self.received_len > CHANGED_MAX {
            return Err(Error::other(format!("more than {} MiB have changed", CHANGED_MAX >> 20)));
        }
        let known = self.base.files.get(asked).map(|file| file.object.clone());
        if let Item::Link { target, .. } = &item {
            if leads_out(&asked.0, &target.0) {
                self.left_out.push((asked.clone(), "is a link that leads out of the workspace"));
                // As it was, if it was anything.
                return Ok(self.base.files.get(asked).map(|file| (file.kind, file.object.clone())));
            }
            let object = self.objects.keep(len, &mut target.0.as_slice(), known.as_slice(), |_| Ok(()))?;
            return Ok(Some((kind, object)));
        }
        let pass = |content: &mut dyn std::io::Read| std::io::copy(content, &mut std::io::sink()).map(drop);
        let object = self.objects.keep(len, &mut self.reader.content(), known.as_slice(), pass)?;
        Ok(Some((kind, object)))
    }

    fn conclude(self, workspace: Workspace, ignored: Vec<ByteString>) -> Changes {
        let left_out: BTreeSet<&ByteString> = self.left_out.iter().map(|(path, _)| path).collect();
        let mut list = Vec::new();
        for (path, file) in &self.base.files {
            let gone = !self.listed.contains_key(path) && !left_out.contains(path);
            if gone {
                let before = Some((file.kind, file.object.clone()));
                list.push(Change { path: path.clone(), before, after: None });
            }
        }
        for (path, after) in self.received {
            let before = self.base.files.get(&path).map(|file| (file.kind, file.object.clone()));
            if before != after {
                list.push(Change { path, before, after });
            }
        }
        list.sort_by(|a, b| a.path.cmp(&b.path));
        Changes {
            workspace,
            base: self.base,
            list,
            left_out: self.left_out,
            ignored,
            repository: self.repository,
            scratch: self.scratch,
        }
    }
}

/// Compares two trees. No program of a config or of an attribute has a part in it.
pub(super) fn diff<S: AsRef<OsStr>>(git: &Git, args: &[S]) -> Result<Vec<u8>, WireError> {
    let calm = ["diff-tree", "-r", "-p", "--no-color", "--no-ext-diff", "--no-textconv"].map(OsStr::new);
    let args: Vec<&OsStr> = calm.into_iter().chain(args.iter().map(AsRef::as_ref)).collect();
    git.run(&args)
}

/// Tells whether a guest lists a file as it did when it had just got it.
fn is_same(file: &BaseFile, listed: &Listed) -> bool {
    let kind = if file.kind == FileKind::Link { Kind::Link } else { Kind::File };
    listed.kind == kind && listed.len == file.len && file.seen == Some((listed.mode, listed.changed))
}

/// Adds a line for `update-index --index-info`.
fn entry(lines: &mut Vec<u8>, kind: FileKind, object: &str, path: &ByteString) {
    lines.extend_from_slice(format!("{} {object}\t", kind.git_mode()).as_bytes());
    lines.extend_from_slice(&path.0);
    lines.push(0);
}

impl Changes {
    /// How many files changed.
    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    /// Returns what is to stay when the workspace is placed anew: what is ignored, by whole directories where nothing
    /// else was placed in them.
    pub(crate) fn kept(&self) -> Vec<ByteString> {
        let mut shared = BTreeSet::new();
        for path in self.base.files.keys() {
            let path = Path::new(path.as_os_str());
            shared.extend(path.ancestors().skip(1).map(Path::to_owned));
        }
        let top = |path: &ByteString| {
            let path = Path::new(path.as_os_str());
            let own = path.ancestors().take_while(|part| !shared.contains(*part)).last();
            ByteString::from(own.unwrap_or(path).as_os_str().to_owned())
        };
        self.ignored.iter().map(top).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Returns the placed files that are others on the host now.
    ///
    /// # Errors
    /// When the host's files can't be read.
    pub(crate) fn changed_on_host(&self) -> Result<Vec<ByteString>, WireError> {
        let source = path_of(&self.workspace.source);
        let shown = escape(&source.display().to_string());
        let open = |error| failed(format!("could not open `{shown}`"), &error);
        let tree = Tree::open(&source).map_err(open)?;
        let is_other = |(path, file): &(&ByteString, &BaseFile)| {
            let found = tree.read(&path_of(path)).ok().flatten();
            let name = found.and_then(|found| found.name(self.base.format()).ok());
            name.is_none_or(|(kind, object)| kind != file.kind || object != file.object)
        };
        Ok(self.base.files.iter().filter(is_other).map(|(path, _)| path.clone()).collect())
    }

    /// Returns one patch of everything, against what was placed or against a commit of the owner's.
    ///
    /// # Errors
    /// When there is no such commit, or a content is missing.
    pub(crate) fn patch(&self, base_commit: Option<&str>) -> Result<Vec<u8>, WireError> {
        let (mut before, after) = self.trees()?;
        if let Some(commit) = base_commit {
            before = format!("{}^{{tree}}", self.commit(commit)?);
        }
        diff(&Git::own(&self.repository), &["-M", "--binary", "--full-index", &before, &after])
    }

    /// Returns the trees before and after.
    ///
    /// # Errors
    /// When git can't write them.
    pub(crate) fn trees(&self) -> Result<(String, String), WireError> {
        let mut files: BTreeMap<&ByteString, (FileKind, &str)> =
            self.base.files.iter().map(|(path, file)| (path, (file.kind, file.object.as_str()))).collect();
        let before = self.tree(&files)?;
        for change in &self.list {
            match &change.after {
                Some((kind, object)) => files.insert(&change.path, (*kind, object)),
                None => files.remove(&change.path),
            };
        }
        Ok((before, self.tree(&files)?))
    }

    /// Returns what a person is shown of one change.
    ///
    /// # Errors
    /// When a content is missing.
    pub(crate) fn diff_of(
        &self,
        (before, after): &(String, String),
        path: &ByteString,
    ) -> Result<Vec<u8>, WireError> {
        let git = Git::own(&self.repository).with_env("GIT_LITERAL_PATHSPECS", "1");
        let args = ["--no-renames", before, after, "--"].map(OsStr::new);
        diff(&git, &[&args[..], &[path.as_os_str()]].concat())
    }

    fn commit(&self, name: &str) -> Result<String, WireError> {
        let git = Git::at(Path::new(self.workspace.source.as_os_str()));
        let found =
            git.line(&["rev-parse", "-q", "--verify", "--end-of-options", &format!("{name}^{{commit}}")])?;
        found.and_then(|name| name.into_string().ok()).ok_or_else(|| {
            crate::stop::invalid(format!("there is no commit `{}` in the checkout", escape(name)))
        })
    }

    fn tree(&self, files: &BTreeMap<&ByteString, (FileKind, &str)>) -> Result<String, WireError> {
        let mut lines = Vec::new();
        for (path, (kind, object)) in files {
            entry(&mut lines, *kind, object, path);
        }
        let index = self.scratch.path().join("tree");
        let _ = std::fs::remove_file(&index);
        let git = Git::own(&self.repository).with_env("GIT_INDEX_FILE", &index);
        git.feed(&["update-index", "-z", "--index-info"], &lines)?;
        let tree = git.line(&["write-tree", "--missing-ok"])?;
        tree.and_then(|name| name.into_string().ok())
            .ok_or_else(|| WireError::new(ErrorCode::Failed, "git could not write a tree"))
    }
}
