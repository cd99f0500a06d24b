//! A guest's commits as a branch of the owner's.
//!
//! What comes out of the guest is the name of a commit and a pack; nothing of the guest's repository. The pack goes
//! into a repository of banger's own, whose git checks form, links and names of all objects, as a server does with what
//! strangers push. Then every new tree is looked through here, and every path that a commit changes. Only then does the
//! owner's repository get the pack, and the branch last; no working tree and no index is touched. Names of commits stay
//! what they are in the guest, and so do authors, dates and messages.

use super::base::Base;
use super::collect::no_workspace;
use super::command::count;
use super::git::Git;
use super::objects::{Format, Objects};
use super::place::Scratch;
use super::safety::{is_git_name, leads_out};
use super::tree::path_of;
use crate::context::Context;
use crate::stop::{Ended, Stop, failed, invalid};
use crate::text::escape;
use crate::transfer::{on_thread, transfer};
use banger_wire::bytes::ByteString;
use banger_wire::daemon::VmView;
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::ExecSpec;
use banger_wire::guest::SessionKind;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};

/// Longest pack that is taken.
const PACK_LEN_MAX: u64 = 1 << 30;
/// Bytes of all new objects, unpacked: whoever checks the branch out writes no more than that.
const UNPACKED_MAX: u64 = 4 << 30;
/// New trees and links are held in memory, so they have a limit of their own.
const LOOKED_THROUGH_MAX: u64 = 256 << 20;
/// New objects; each costs some hundred bytes here.
const OBJECTS_MAX: usize = 1_000_000;
/// The most that git takes for one object, so that an object can't claim all memory.
const ALLOCATION_MAX: &str = "512m";
/// Entries below the top tree of a commit, those of trees that are there several times counted as often: a few trees that
/// name each other stand for any number of files.
const ENTRIES_MAX: u64 = 1_000_000;
/// Directories within each other.
const DEPTH_MAX: usize = 256;
/// Names of changed paths, of all commits together.
const CHANGES_LEN_MAX: usize = 256 << 20;
/// Longest target of a link that Linux has.
const TARGET_LEN_MAX: usize = 4096;
/// What a guest's git may say that is no pack: the name of a commit, or which files it sees changed.
const ANSWER_LEN_MAX: u64 = 1 << 20;
/// What a tree may have: directory, files, link, and commits of submodules, which are looked at by path.
const MODES: [&[u8]; 5] = [b"40000", b"100644", b"100755", b"120000", b"160000"];
const LINK: &str = "120000";
const SUBMODULE: &str = "160000";

/// Takes the commits of a vm's workspace.
///
/// # Errors
/// When there are none, when one has something that must not come out of a guest, when the branch is there and has
/// commits that the guest's does not have, and those of git and the connection. Nothing has changed then.
pub(crate) async fn bring_branch(context: &mut Context, vm: &VmView, branch: String) -> Ended {
    let state = context.client.state().clone();
    let dir = state.workspaces().join(vm.id.as_str());
    let found = vm.workspace.clone().zip(Base::load(&dir)?);
    let Some((workspace, base)) = found else { return Err(no_workspace(vm).into()) };
    let Some(top) = base.repositories.first().map(path_of) else {
        return Err(invalid(format!("what is in vm `{}` is no git checkout, so it has no commits", vm.name))
            .hinted(format!("take its files with `banger vm workspace export {}`", vm.name))
            .into());
    };
    let (repository, name) = (Git::at(&top), branch.clone());
    let before = context.signals.unless(on_thread(move || Branch::find(&repository, &name))).await?;
    let scratch = Scratch::make(&state)?;
    let guest = Guest { vm, path: workspace.path.clone(), scratch: scratch.path() };
    let tip = guest.tip(context, base.format()).await?;
    let pack = scratch.path().join("guest.pack");
    guest.pack(context, &tip, base.commit.as_deref(), &pack).await?;
    let vm_name = vm.name.to_string();
    let into = scratch.path().to_owned();
    let work = move || {
        let quarantine = Quarantine::begin(&top, base.format(), &into, &pack)?;
        let new = quarantine.look_through(&tip)?;
        if new == 0 && before.tip.is_none() {
            let message = format!("no commit was made in vm `{vm_name}` since the checkout was placed");
            let hint = format!("what is in no commit comes with `banger vm workspace export {vm_name}`");
            return Err(WireError::new(ErrorCode::Failed, message).hinted(hint));
        }
        before.check(&quarantine.git, &tip)?;
        before.set(&Git::at(&top), &tip, &pack, &format!("banger: commits of vm {vm_name}"))?;
        Ok(new)
    };
    let new = context.signals.unless(on_thread(work)).await?;
    // The branch is there, so what can't be told now is no failure.
    match guest.uncommitted(context).await {
        Ok(0) => {}
        Ok(1) => warn(context, vm, "1 changed file is in no commit, and not on the branch"),
        Ok(more) => {
            warn(context, vm, &format!("{more} changed files are in no commit, and not on the branch"));
        }
        Err(Stop::Failed(_)) => warn(context, vm, "it can't be told whether there is more than the commits"),
        Err(stop) => return Err(stop),
    }
    context.ui.note(&format!("branch `{branch}` has {} of vm `{}`", count(new, "new commit"), vm.name));
    Ok(0)
}

fn warn(context: &Context, vm: &VmView, what: &str) {
    context.ui.warning(&format!("vm `{}`: {what}", vm.name));
}

/// Asks the guest's git. What it answers is anything at all.
struct Guest<'a> {
    vm: &'a VmView,
    path: ByteString,
    /// Where its answers are put.
    scratch: &'a Path,
}

impl Guest<'_> {
    async fn run(
        &self,
        context: &mut Context,
        args: &[&str],
        input: String,
        to: PathBuf,
        len_max: u64,
    ) -> Result<(), Stop> {
        let mut argv = vec!["git".into(), "--no-replace-objects".into(), "-C".into(), self.path.clone()];
        argv.extend(args.iter().map(|arg| ByteString::from(*arg)));
        let env = vec![("GIT_OPTIONAL_LOCKS".into(), "0".into())];
        let exec = ExecSpec { argv, env, user: Some("0".to_owned()), ..ExecSpec::default() };
        let work = move |answer, mut output: banger_wire::channel::ChannelWriter| {
            let copy = || {
                output.write_all(input.as_bytes())?;
                output.flush()?;
                drop(output);
                let mut file = File::options().write(true).create_new(true).open(&to)?;
                std::io::copy(&mut Read::take(answer, len_max + 1), &mut file)
            };
            match copy() {
                Ok(len) if len > len_max => Err(WireError::new(
                    ErrorCode::Failed,
                    format!("the commits are more than {} MiB", len_max >> 20),
                )),
                Ok(_) => Ok(()),
                Err(error) => Err(failed("could not read the guest's commits", &error)),
            }
        };
        let vm = (self.vm.name.as_str(), Path::new(&self.vm.socket));
        let mut tick = || {};
        let ran = transfer(vm, SessionKind::Exec(Box::new(exec)), work, &mut tick);
        context.signals.unless(ran).await.map_err(|stop| match stop {
            Stop::Failed(error) => {
                let message = format!("could not read the commits of vm `{}`", self.vm.name);
                let mut failed = WireError::new(error.code, message);
                failed.causes = [vec![error.message], error.causes].concat();
                failed.into()
            }
            stop => stop,
        })
    }

    async fn answer(&self, context: &mut Context, args: &[&str]) -> Result<Vec<u8>, Stop> {
        let path = self.scratch.join("answer");
        let _ = std::fs::remove_file(&path);
        self.run(context, args, String::new(), path.clone(), ANSWER_LEN_MAX).await?;
        Ok(std::fs::read(&path).map_err(|error| failed("could not read the guest's answer", &error))?)
    }

    async fn tip(&self, context: &mut Context, format: Format) -> Result<String, Stop> {
        let answer = self.answer(context, &["rev-parse", "--verify", "HEAD^{commit}"]).await?;
        let name = String::from_utf8_lossy(&answer).trim_end().to_owned();
        if is_object_name(&name, format) {
            return Ok(name);
        }
        let message = format!("git in vm `{}` did not name a commit: `{}`", self.vm.name, escape(&name));
        Err(WireError::new(ErrorCode::Failed, message).into())
    }

    async fn pack(
        &self,
        context: &mut Context,
        tip: &str,
        base: Option<&str>,
        to: &Path,
    ) -> Result<(), Stop> {
        let input: String =
            std::iter::once(format!("{tip}\n")).chain(base.map(|base| format!("^{base}\n"))).collect();
        // Deltas that there are, are used; to look for more takes the guest longer than to send them.
        let args = ["pack-objects", "--revs", "--stdout", "-q", "--delta-base-offset", "--window=0"];
        self.run(context, &args, input, to.to_owned(), PACK_LEN_MAX).await
    }

    /// Returns how many files are in no commit, by the guest's own word.
    async fn uncommitted(&self, context: &mut Context) -> Result<usize, Stop> {
        let status = self.answer(context, &["status", "--porcelain", "-z", "--no-renames"]).await?;
        Ok(status.iter().filter(|&&byte| byte == 0).count())
    }
}

fn is_object_name(name: &str, format: Format) -> bool {
    let len = if format == Format::Sha256 { 64 } else { 40 };
    name.len() == len && name.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'a'..=b'f'))
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A branch of the owner's.
struct Branch {
    reference: String,
    shown: String,
    tip: Option<String>,
}

impl Branch {
    fn find(git: &Git, name: &str) -> Result<Self, WireError> {
        let (reference, shown) = (format!("refs/heads/{name}"), escape(name));
        let is_name = git.ask(&["check-ref-format", &reference])?.is_some();
        if !is_name || name == "HEAD" || name.starts_with('-') {
            return Err(invalid(format!("`{shown}` can't be the name of a branch")));
        }
        let tip = git.line(&["rev-parse", "-q", "--verify", &format!("{reference}^{{commit}}")])?;
        let listed = text(git.run(&["worktree", "list", "--porcelain"])?);
        let line = format!("branch {reference}");
        let is_checked_out = listed.lines().any(|listed| listed == line);
        if is_checked_out {
            return Err(invalid(format!("branch `{shown}` is checked out, so it can't be moved"))
                .hinted("name another branch, and merge it"));
        }
        Ok(Self { reference, shown, tip: tip.and_then(|tip| tip.into_string().ok()) })
    }

    /// Refuses to lose commits.
    fn check(&self, git: &Git, tip: &str) -> Result<(), WireError> {
        let Some(old) = &self.tip else { return Ok(()) };
        if git.ask(&["merge-base", "--is-ancestor", old, tip])?.is_some() {
            return Ok(());
        }
        let message = format!("branch `{}` has commits that the vm's branch does not have", self.shown);
        Err(invalid(message).hinted("name another branch"))
    }

    /// Adds the pack to the owner's repository and has the branch name the commit.
    fn set(&self, git: &Git, tip: &str, pack: &Path, why: &str) -> Result<(), WireError> {
        let pack = File::open(pack).map_err(|error| failed("could not read the commits", &error))?;
        git.feed_file(&["index-pack", "--stdin"], pack)?;
        // CRASH: objects that no branch leads to are removed by git itself, in time. None of that name may have been
        // made meanwhile, nor moved.
        let old = self.tip.clone().unwrap_or_else(|| "0".repeat(tip.len()));
        git.run(&["update-ref", "-m", why, "--create-reflog", &self.reference, tip, &old]).map(drop)
    }
}

/// One entry of a tree.
struct TreeEntry {
    mode: Vec<u8>,
    name: Vec<u8>,
    object: String,
}

/// The guest's objects, where nothing of the owner's reads them yet.
struct Quarantine {
    git: Git,
    owner: Git,
    /// New objects, and what they are.
    new: HashMap<String, (String, u64)>,
}

impl Quarantine {
    fn begin(top: &Path, format: Format, scratch: &Path, pack: &Path) -> Result<Self, WireError> {
        let owner = Git::at(top);
        let repository = scratch.join("commits.git");
        Objects::make(&repository, format, [owner.path("objects")?])?;
        // Where the owner's history is cut off, it ends here as well.
        if let Ok(cut) = std::fs::read(owner.path("shallow")?) {
            std::fs::write(repository.join("shallow"), cut)
                .map_err(|error| failed("could not write to the state directory", &error))?;
        }
        let git = Git::own(&repository)
            .with_env("GIT_ALLOC_LIMIT", ALLOCATION_MAX)
            .with_config("core.bigFileThreshold", "16m");
        let pack = File::open(pack).map_err(|error| failed("could not read the commits", &error))?;
        let limit = format!("--max-input-size={PACK_LEN_MAX}");
        git.feed_file(&["index-pack", "--stdin", "--strict", &limit], pack).map_err(|error| {
            let mut refused = WireError::new(ErrorCode::Failed, "the guest's commits are refused");
            refused.causes.extend(error.causes);
            refused
        })?;
        let mut quarantine = Self { git, owner, new: HashMap::new() };
        quarantine.find_new(&repository)?;
        Ok(quarantine)
    }

    /// Notes which objects of the pack the owner does not have.
    fn find_new(&mut self, repository: &Path) -> Result<(), WireError> {
        let unreadable = |error: std::io::Error| failed("could not read the commits", &error);
        let mut names = String::new();
        for found in std::fs::read_dir(repository.join("objects/pack")).map_err(unreadable)? {
            let path = found.map_err(unreadable)?.path();
            if path.extension().is_some_and(|end| end == "idx") {
                let listed = self.git.feed_file(&["show-index"], File::open(path).map_err(unreadable)?)?;
                names.extend(
                    text(listed)
                        .lines()
                        .filter_map(|line| line.split(' ').nth(1))
                        .flat_map(|name| [name, "\n"]),
                );
            }
        }
        let known = text(self.owner.feed(&["cat-file", "--batch-check"], names.as_bytes())?);
        let missing: String = { known.lines() }
            .filter_map(|line| line.strip_suffix(" missing"))
            .flat_map(|name| [name, "\n"])
            .collect();
        let new = text(self.git.feed(&["cat-file", "--batch-check"], missing.as_bytes())?);
        for line in new.lines() {
            let mut fields = line.split(' ').map(str::to_owned);
            if let (Some(name), Some(kind), Some(len)) = (fields.next(), fields.next(), fields.next()) {
                let len = len.parse().unwrap_or(u64::MAX);
                self.new.insert(name, (kind, len));
            }
        }
        let unpacked = self.new.values().fold(0_u64, |sum, (_, len)| sum.saturating_add(*len));
        if self.new.len() > OBJECTS_MAX || unpacked > UNPACKED_MAX {
            return Err(refused(format!(
                "they have {} objects of {} MiB in all",
                self.new.len(),
                unpacked >> 20
            )));
        }
        Ok(())
    }

    /// Looks at everything new that leads to `tip`. Returns how many commits are new.
    fn look_through(&self, tip: &str) -> Result<usize, WireError> {
        let trees = self.trees()?;
        self.measure(&trees)?;
        let owned = text(self.owner.run(&["for-each-ref", "--format=%(objectname)"])?);
        let head = self.owner.line(&["rev-parse", "-q", "--verify", "HEAD"])?;
        let head = head.and_then(|head| head.into_string().ok());
        let mut ends: String =
            owned.lines().chain(head.as_deref()).map(|name| format!("^{name}\n")).collect();
        ends.insert_str(0, &format!("{tip}\n"));
        // Everything that leads to what the owner has must be there.
        let connected = ["rev-list", "--objects", "--quiet", "--stdin"];
        self.git.feed(&connected, ends.as_bytes())?;
        let listed = self.git.feed(&["rev-list", "--parents", "--stdin"], ends.as_bytes())?;
        let (mut pairs, mut commits) = (String::new(), 0);
        for line in text(listed).lines() {
            let mut names = line.split(' ');
            let Some(commit) = names.next().filter(|name| self.new.contains_key(*name)) else { continue };
            commits += 1;
            // What a commit has as its first parent has it was looked at there, or is the owner's.
            pairs.push_str(commit);
            pairs.extend(names.next().into_iter().flat_map(|parent| [" ", parent]));
            pairs.push('\n');
        }
        self.look_at_changes(&pairs)?;
        Ok(commits)
    }

    fn of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = (&'a str, u64)> {
        self.new.iter().filter(move |(_, (of, _))| of == kind).map(|(name, (_, len))| (name.as_str(), *len))
    }

    /// Reads every new tree, and refuses names and modes that must not come out.
    fn trees(&self) -> Result<HashMap<String, Vec<TreeEntry>>, WireError> {
        let len = self.of_kind("tree").fold(0_u64, |sum, (_, len)| sum.saturating_add(len));
        if len > LOOKED_THROUGH_MAX {
            return Err(refused(format!("they have {} MiB of names", len >> 20)));
        }
        let mut trees = HashMap::new();
        for (name, (_, content)) in self.git.objects(self.of_kind("tree").map(|(name, _)| name))? {
            let entries =
                parse(&content, name.len() / 2).ok_or_else(|| refused(format!("tree {name} is damaged")))?;
            for entry in &entries {
                let shown = escape(&String::from_utf8_lossy(&entry.name));
                if is_git_name(&entry.name) {
                    return Err(refused(format!("`{shown}` has a name that git keeps for itself")));
                }
                let is_name = banger_wire::item::is_relative(&entry.name) && !entry.name.contains(&b'/');
                if !is_name {
                    return Err(refused(format!("`{shown}` is no name of a file")));
                }
                if !MODES.contains(&entry.mode.as_slice()) {
                    let mode = escape(&String::from_utf8_lossy(&entry.mode));
                    return Err(refused(format!("`{shown}` has mode {mode}")));
                }
            }
            trees.insert(name, entries);
        }
        if trees.len() != self.of_kind("tree").count() {
            return Err(refused("a tree can't be read".to_owned()));
        }
        Ok(trees)
    }

    /// Refuses trees that stand for more files than anybody wants.
    fn measure(&self, trees: &HashMap<String, Vec<TreeEntry>>) -> Result<(), WireError> {
        fn size(
            trees: &HashMap<String, Vec<TreeEntry>>,
            known: &mut HashMap<String, (u64, usize)>,
            name: &str,
            depth: usize,
        ) -> Option<(u64, usize)> {
            if let Some(&found) = known.get(name) {
                return Some(found);
            }
            // One that the owner has.
            let Some(entries) = trees.get(name) else { return Some((1, 1)) };
            let (mut count, mut height) = (0_u64, 1);
            for entry in entries {
                let (within, levels) = match entry.mode.as_slice() {
                    b"40000" if depth < DEPTH_MAX => size(trees, known, &entry.object, depth + 1)?,
                    b"40000" => return None,
                    _ => (0, 0),
                };
                count = count.saturating_add(within).saturating_add(1);
                height = height.max(levels + 1);
            }
            let found = (count <= ENTRIES_MAX && height <= DEPTH_MAX).then_some((count, height))?;
            known.insert(name.to_owned(), found);
            Some(found)
        }
        let mut known = HashMap::new();
        for name in trees.keys() {
            if size(trees, &mut known, name, 0).is_none() {
                return Err(refused(format!(
                    "a tree has more than {ENTRIES_MAX} entries, or directories more than {DEPTH_MAX} deep"
                )));
            }
        }
        Ok(())
    }

    /// Looks at every path that is another than in the commit before.
    fn look_at_changes(&self, pairs: &str) -> Result<(), WireError> {
        let args = ["diff-tree", "--stdin", "--root", "-r", "-z", "--raw", "--no-abbrev", "--no-renames"];
        let calm = ["--no-ext-diff", "--no-textconv"];
        let listed = self.git.feed_up_to(&[&args[..], &calm].concat(), pairs.as_bytes(), CHANGES_LEN_MAX)?;
        let Some(listed) = listed else {
            return Err(refused("they change too many files".to_owned()));
        };
        let mut links = BTreeMap::<&str, BTreeSet<&[u8]>>::new();
        let listed: Vec<&[u8]> = listed.split(|&byte| byte == 0).collect();
        let mut fields = listed.iter();
        while let Some(field) = fields.next() {
            // Else the name of the commit that what follows is of.
            let Some(raw) = field.strip_prefix(b":") else { continue };
            let raw = std::str::from_utf8(raw).unwrap_or_default();
            let raw: Vec<&str> = raw.split(' ').collect();
            let (&[_, mode, _, object, _], Some(path)) = (raw.as_slice(), fields.next()) else {
                return Err(refused("git lists them in a way that is not known here".to_owned()));
            };
            match mode {
                SUBMODULE => {
                    let shown = escape(&String::from_utf8_lossy(path));
                    return Err(refused(format!("`{shown}` is a submodule that was changed"))
                        .hinted("take what changed in it as a patch: `banger vm workspace export`"));
                }
                LINK => _ = links.entry(object).or_default().insert(path),
                _ => {}
            }
        }
        let targets =
            self.git.feed_up_to(&["cat-file", "--batch-check"], &lines(links.keys()), CHANGES_LEN_MAX)?;
        let is_long = |line: &str| {
            line.rsplit(' ')
                .next()
                .and_then(|len| len.parse().ok())
                .is_none_or(|len: usize| len > TARGET_LEN_MAX)
        };
        if text(targets.unwrap_or_default()).lines().any(is_long) {
            return Err(refused("a link in them leads to no name".to_owned()));
        }
        let targets = self.git.objects(links.keys().copied())?;
        for (object, paths) in &links {
            let target = targets.get(*object).map(|(_, target)| target.as_slice());
            for path in paths {
                if target.is_none_or(|target| leads_out(path, target)) {
                    let shown = escape(&String::from_utf8_lossy(path));
                    return Err(refused(format!("`{shown}` is a link that leads out of the workspace")));
                }
            }
        }
        Ok(())
    }
}

fn lines<'a>(names: impl Iterator<Item = &'a &'a str>) -> Vec<u8> {
    names.flat_map(|name| [name.as_bytes(), b"\n"].concat()).collect()
}

fn refused(why: String) -> WireError {
    let mut error = WireError::new(ErrorCode::Failed, "the guest's commits are refused");
    error.causes.push(why);
    error
}

/// Takes a tree apart: mode, name and the bytes of an object's name, again and again.
fn parse(content: &[u8], name_len: usize) -> Option<Vec<TreeEntry>> {
    let (mut entries, mut rest) = (Vec::new(), content);
    while !rest.is_empty() {
        let space = rest.iter().position(|&byte| byte == b' ')?;
        let end = rest.iter().position(|&byte| byte == 0).filter(|&end| end > space)?;
        let object = rest.get(end + 1..end + 1 + name_len)?;
        entries.push(TreeEntry {
            mode: rest[..space].to_vec(),
            name: rest[space + 1..end].to_vec(),
            object: object.iter().map(|byte| format!("{byte:02x}")).collect(),
        });
        rest = &rest[end + 1 + name_len..];
    }
    Some(entries)
}

#[cfg(test)]
mod tests {
    use super::super::hostile::Owner;
    use super::*;

    /// An owner, and a copy of the checkout in which a guest's script makes commits.
    fn guest(script: &str) -> Owner {
        let owner = Owner::new(
            "echo a > a; mkdir d; echo b > d/b; ln -s /etc d/etc; git add .; git commit -qm one; echo 2 >> a; git commit -qam two",
        );
        let copy = "cp -r r g; cd g; git config user.name G; git config user.email g@example.com; base=$(git rev-parse HEAD)";
        owner.sh(&format!(
            "{copy}; {script}\ntip=${{tip:-$(git rev-parse HEAD)}}; echo $tip > ../tip
            test -e ../pack || printf '%s\\n^%s\\n' $tip $base | git pack-objects --revs --stdout -q > ../pack"
        ));
        owner
    }

    /// What `bring_branch` does with what has arrived.
    fn import(owner: &Owner, name: &str) -> Result<usize, WireError> {
        let tip = std::fs::read_to_string(owner.dir().join("tip")).unwrap().trim().to_owned();
        let (top, pack) = (owner.top(), owner.dir().join("pack"));
        let format = if tip.len() == 64 { Format::Sha256 } else { Format::Sha1 };
        let branch = Branch::find(&Git::at(&top), name)?;
        let scratch = tempfile::tempdir_in(owner.dir()).unwrap();
        let quarantine = Quarantine::begin(&top, format, scratch.path(), &pack)?;
        let new = quarantine.look_through(&tip)?;
        branch.check(&quarantine.git, &tip)?;
        branch.set(&Git::at(&top), &tip, &pack, "test")?;
        Ok(new)
    }

    const STATE: &str = "cd r; git for-each-ref; find .git -type f | sort | xargs sha256sum";

    #[test]
    fn commits_are_the_same_on_both_sides() {
        let owner = guest(
            "echo c > c; git add c; GIT_AUTHOR_DATE='2001-02-03T04:05:06+0700' git commit -qm 'three

body' --author 'Ü <ü@example.com>'
            git mv c e; rm -r d/b; chmod +x a; git commit -qam four; git checkout -qb side HEAD~; echo s > d/s; ln -s s d/l
            git add .; git commit -qm side; git checkout -q -; git merge -q --no-edit side; mv d f; git add -A; git commit -qm moved || true
            git reset -q --hard HEAD~; git commit -q --allow-empty -m empty",
        );
        owner.set_traps();
        let before = owner.sh("cd r; git symbolic-ref HEAD; sha256sum .git/index a; ls -A");
        assert_eq!(import(&owner, "from/vm").unwrap(), 5);
        assert_eq!(owner.marks(), [""; 0]);
        let log = "log --format='%H %T %an %ae %ad %cn %cd %B' ";
        let theirs = owner.sh(&format!("cd g; git {log} HEAD"));
        assert_eq!(owner.sh(&format!("cd r; git -c core.fsmonitor= {log} from/vm")), theirs);
        assert_eq!(owner.sh("cd r; git symbolic-ref HEAD; sha256sum .git/index a; ls -A"), before);
        owner.sh("cd r; git -c core.fsmonitor= fsck --strict");
        // More commits move the branch on; it never loses any.
        owner.sh("cd g; echo more > more; git add .; git commit -qm more; git rev-parse HEAD > ../tip; git pack-objects --all --stdout -q < /dev/null > ../pack");
        assert_eq!(import(&owner, "from/vm").unwrap(), 1);
        owner.sh("cd g; git commit -q --amend -m other; git rev-parse HEAD > ../tip; git pack-objects --all --stdout -q < /dev/null > ../pack");
        let error = import(&owner, "from/vm").unwrap_err();
        assert_eq!(error.message, "branch `from/vm` has commits that the vm's branch does not have");
        assert_eq!(import(&owner, "again").unwrap(), 1);
        for (name, why) in [
            ("main", "branch `main` is checked out, so it can't be moved"),
            ("a..b", "`a..b` can't be the name of a branch"),
            ("-f", "`-f` can't be the name of a branch"),
            ("HEAD", "`HEAD` can't be the name of a branch"),
            ("a\u{1b}", "`a\\x1b` can't be the name of a branch"),
            ("../../x", "`../../x` can't be the name of a branch"),
        ] {
            assert_eq!(import(&owner, name).unwrap_err().message, why);
        }
    }

    #[test]
    fn a_link_that_the_owner_has_may_stay_and_no_other() {
        let owner = guest("echo more >> d/b; git commit -qam more");
        assert_eq!(import(&owner, "b").unwrap(), 1);
        let owner = guest("git mv d/etc d/other; git commit -qam moved");
        assert!(why(&import(&owner, "b").unwrap_err()).contains("`d/other` is a link that leads out"));
    }

    fn why(error: &WireError) -> String {
        format!("{}; {}", error.message, error.causes.join("; "))
    }

    #[test]
    fn what_a_hostile_guest_commits_is_refused_and_leaves_nothing() {
        // `tree MODE NAME OBJECT` makes a commit of a tree with one more entry.
        let make = r#"
            blob=$(echo payload | git hash-object -w --stdin)
            sub=$(printf '100644 blob %s\tconfig\n' $blob | git mktree)
            commit() { tip=$(git commit-tree -p $base -m x "$1"); }
            entry() { commit $( (git ls-tree HEAD; printf '%s %s %s\t%s\n' "$1" "$2" "$3" "$4") | git mktree --missing); }
            raw() { commit $( (git cat-file tree HEAD^{tree}; printf "$1"; printf %s $blob | sed 's/../\\x&/g' | xargs -0 printf) | git hash-object -t tree -w --literally --stdin); }"#;
        let zwnj = "\u{200c}";
        let cases: Vec<(String, &str)> = vec![
            ("entry 040000 tree $sub .git".into(), "contains '.git'"),
            ("entry 040000 tree $sub .GIT".into(), "contains '.git'"),
            ("entry 040000 tree $sub git~1".into(), "contains '.git'"),
            (format!("entry 040000 tree $sub .g{zwnj}it"), "contains '.git'"),
            ("entry 040000 tree $sub '.git '".into(), "git"),
            ("entry 040000 tree $sub '.git::$INDEX_ALLOCATION'".into(), "git"),
            ("inner=$(printf '040000 tree %s\\t.Git\\n' $sub | git mktree); entry 040000 tree $inner z".into(), "contains '.git'"),
            ("raw '100644 ..\\0'".into(), "contains '..'"),
            ("raw '100644 z/../../x\\0'".into(), "full pathnames"),
            ("raw '104755 z\\0'".into(), "`z` has mode 104755"),
            ("raw '060000 z\\0'".into(), "mode"),
            ("entry 120000 blob $(printf /etc/passwd | git hash-object -w --stdin) z".into(), "`z` is a link that leads out"),
            ("entry 120000 blob $(printf ../x | git hash-object -w --stdin) z".into(), "`z` is a link that leads out"),
            ("entry 120000 blob $(printf .git/hooks | git hash-object -w --stdin) z".into(), "`z` is a link that leads out"),
            ("in=$(printf '120000 blob %s\\tl\\n' $(printf ../../x | git hash-object -w --stdin) | git mktree); entry 040000 tree $in z".into(), "`z/l` is a link that leads out"),
            ("entry 120000 blob $(head -c 9000 /dev/zero | tr '\\0' x | git hash-object -w --stdin) z".into(), "leads to no name"),
            ("entry 160000 commit $base z".into(), "`z` is a submodule that was changed"),
            ("entry 100644 blob $(printf '[submodule \"z\"]\\n\\tpath = z\\n\\turl = -u./payload\\n' | git hash-object -w --stdin) .gitmodules".into(), "gitmodulesUrl"),
            ("entry 100644 blob $(printf '[submodule \"../../x\"]\\n\\tpath = z\\n\\turl = x\\n' | git hash-object -w --stdin) .gitmodules".into(), "gitmodulesName"),
            // A first commit that is taken back again is looked at all the same.
            ("entry 120000 blob $(printf /etc | git hash-object -w --stdin) z; tip=$(git commit-tree -p $tip -m y HEAD^{tree})".into(), "`z` is a link that leads out"),
            // Commits without what they name, a name that is nowhere, no pack, one that is damaged.
            ("commit $(git write-tree --prefix=d); tip=$(git commit-tree -m x $sub); echo $tip | git pack-objects --stdout -q > ../pack".into(), "fatal"),
            ("tip=$(echo x | git hash-object --stdin | tr a-f 0-5)".into(), "bad object"),
            ("echo not a pack > ../pack".into(), "fatal"),
            ("echo x > x; git add .; git commit -qm x; printf '%s\\n^%s\\n' $(git rev-parse HEAD) $base | git pack-objects --revs --stdout -q > ../pack; (head -c -4 ../pack; echo bad) > ../bad; mv ../bad ../pack".into(), "fatal"),
            ("echo x > x; git add .; git commit -qm x; printf '%s\\n^%s\\n' $(git rev-parse HEAD) $base | git pack-objects --revs --stdout -q | head -c 100 > ../pack".into(), "fatal"),
            // Few trees, many files.
            ("t=$(git mktree < /dev/null); for i in $(seq 12); do t=$(for n in 0 1 2 3 4 5 6 7; do printf '040000 tree %s\\t%s\\n' $t $n; done | git mktree); done; commit $t".into(), "more than 1000000 entries"),
            ("t=$sub; for i in $(seq 300); do t=$(printf '040000 tree %s\\td\\n' $t | git mktree); done; commit $t".into(), "more than 256 deep"),
        ];
        for (script, expected) in cases {
            // `pack-objects` of a guest does what a guest likes; git's own would refuse some of this.
            let list = "test -e ../pack || git rev-list --objects $tip ^$base 2> /dev/null | cut -d' ' -f1 | git pack-objects --stdout -q > ../pack 2> /dev/null || true";
            let owner = guest(&format!("{make}\n{script}\n{list}"));
            owner.sh("cp pack kept");
            owner.set_traps();
            let before = owner.sh(STATE);
            owner.sh("rm -f marks/*");
            let error = import(&owner, "from-vm").expect_err(&script);
            assert!(why(&error).contains(expected), "{script}: {}", why(&error));
            assert_eq!(owner.marks(), [""; 0], "{script}");
            assert_eq!(owner.sh(STATE), before, "{script}");
        }
    }

    /// What git refuses by itself is refused here as well, should another git be more lenient.
    #[test]
    fn names_are_looked_at_here_too() {
        let owner = guest(
            "sub=$(printf '100644 blob %s\tconfig\n' $(echo x | git hash-object -w --stdin) | git mktree)
            tip=$(git commit-tree -p $base -m x $(printf '040000 tree %s\t.Git\n' $sub | git mktree))",
        );
        let repository = owner.dir().join("q.git");
        let known = Git::at(&owner.top());
        Objects::make(&repository, Format::Sha1, [known.path("objects").unwrap()]).unwrap();
        let git = Git::own(&repository);
        git.feed_file(&["index-pack", "--stdin"], File::open(owner.dir().join("pack")).unwrap()).unwrap();
        let mut quarantine = Quarantine { git, owner: known, new: HashMap::new() };
        quarantine.find_new(&repository).unwrap();
        let tip = owner.sh("cat tip");
        let error = quarantine.look_through(tip.trim()).unwrap_err();
        assert_eq!(error.causes, ["`.Git` has a name that git keeps for itself"]);
    }

    #[test]
    fn any_bytes_are_a_tree_or_none() {
        assert!(parse(b"", 20).unwrap().is_empty());
        for damaged in [&b"100644"[..], b"100644 a", b"100644 a\0short", b"\0 a", b"100644\0a b"] {
            assert!(parse(damaged, 20).is_none());
        }
        let tree = [&b"100644 a b\0"[..], &[0xab; 20]].concat();
        let entries = parse(&tree, 20).unwrap();
        assert_eq!(
            (entries[0].name.as_slice(), entries[0].object.as_str()),
            (&b"a b"[..], "ab".repeat(20).as_str())
        );
    }
}
