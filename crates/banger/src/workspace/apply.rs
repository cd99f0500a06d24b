//! A guest's changes in the owner's checkout, and how the last ones are taken back.
//!
//! Files are written by this program, not by git: no filter, hook or attribute has a part in it. What the owner changed
//! meanwhile is merged; where that can't be done nothing is written at all. The index is left alone, so the changes show
//! up as ones that are not staged.

use super::base::FileKind;
use super::collect::{Change, Changes};
use super::git::Git;
use super::objects::Format;
use super::tree::{Found, Tree, path_of};
use crate::paths::StateDir;
use crate::stop::{failed, invalid};
use crate::text::{escape, now};
use banger_wire::bytes::ByteString;
use banger_wire::error::{ErrorCode, WireError};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

/// Names listed in a message; the rest is counted.
const NAMED_MAX: usize = 5;
/// Name of the list of what was applied.
const RECORD: &str = "applied.json";

/// What one apply did; its earlier contents are in numbered files beside it.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    root: ByteString,
    applied: i64,
    sha256: bool,
    files: Vec<Applied>,
}

/// One file of it.
#[derive(Debug, Serialize, Deserialize)]
struct Applied {
    path: ByteString,
    /// What was there: kind, permission bits, name of its content.
    before: Option<(FileKind, u32, String)>,
    /// What is there since.
    after: Option<(FileKind, String)>,
}

/// One step that was decided.
struct Step {
    path: ByteString,
    before: Option<Found>,
    after: Option<(FileKind, Vec<u8>)>,
}

fn listing<'a>(names: impl ExactSizeIterator<Item = &'a ByteString>) -> String {
    let more = names.len().saturating_sub(NAMED_MAX);
    let mut list: Vec<String> = names
        .take(NAMED_MAX)
        .map(|name| format!("`{}`", escape(&name.as_os_str().to_string_lossy())))
        .collect();
    if more > 0 {
        list.push(format!("{more} more"));
    }
    list.join(", ")
}

/// Refuses a checkout with changes that are in no commit.
///
/// # Errors
/// When there are any, or git can't tell.
pub(crate) fn refuse_dirty(root: &Path, tops: &[ByteString]) -> Result<(), WireError> {
    for top in tops {
        let top = path_of(top);
        let prefix = top.strip_prefix(root).unwrap_or(Path::new(""));
        let git = Git::at(&top).without_filters()?;
        let args = [
            "status",
            "--porcelain",
            "-z",
            "--untracked-files=no",
            "--ignore-submodules=dirty",
            "--no-renames",
        ];
        let status = git.run(&args)?;
        let names: Vec<ByteString> = { status.split(|&byte| byte == 0) }
            .filter(|line| line.len() > 3)
            .map(|line| prefix.join(OsStr::from_bytes(&line[3..])).into_os_string().into())
            .collect();
        if !names.is_empty() {
            let shown = escape(&root.display().to_string());
            let message = format!("`{shown}` has changes that are not committed: {}", listing(names.iter()));
            return Err(invalid(message).hinted(
                "commit or stash them first, or take the changes of the vm as a patch with `--output FILE`",
            ));
        }
    }
    Ok(())
}

/// Applies everything or nothing. Returns how many files were written.
///
/// # Errors
/// When the owner's files and the guest's can't be joined, and those of reading and writing.
pub(crate) fn apply(changes: &Changes, state: &StateDir) -> Result<usize, WireError> {
    let root = PathBuf::from(changes.workspace.source.as_os_str());
    let shown = escape(&root.display().to_string());
    let tree = Tree::open(&root).map_err(|error| failed(format!("could not open `{shown}`"), &error))?;
    let steps = decide(changes, &tree)?;
    if steps.is_empty() {
        return Ok(0);
    }
    keep_for_undo(&root, changes.base.format(), &steps, state)?;
    // What is removed may be in the way of what is written.
    for step in
        steps.iter().filter(|step| step.after.is_none()).chain(steps.iter().filter(|s| s.after.is_some()))
    {
        carry_out(&tree, &step.path, step.before.as_ref().map(|found| found.mode), step.after.as_ref())?;
    }
    Ok(steps.len())
}

fn carry_out(
    tree: &Tree,
    name: &ByteString,
    mode: Option<u32>,
    after: Option<&(FileKind, Vec<u8>)>,
) -> Result<(), WireError> {
    let path = path_of(name);
    let done = match after {
        None => tree.remove(&path),
        Some((kind, content)) => {
            let full = if *kind == FileKind::Executable { 0o777 } else { 0o666 };
            tree.write(&path, *kind, full, content).and_then(|()| match mode {
                // Who may read and write it stays as it was.
                Some(mode) if *kind != FileKind::Link => {
                    let execute = (mode & 0o444) >> 2;
                    let mode = if *kind == FileKind::Executable { mode | execute } else { mode & !0o111 };
                    tree.set_mode(&path, mode)
                }
                _ => Ok(()),
            })
        }
    };
    done.map_err(|error| {
        failed(format!("could not write `{}`", escape(&path.display().to_string())), &error)
            .hinted("take back what was written with `banger vm workspace undo`")
    })
}

/// Decides what becomes of each file.
fn decide(changes: &Changes, tree: &Tree) -> Result<Vec<Step>, WireError> {
    let contents = contents(changes)?;
    let format = changes.base.format();
    let (mut steps, mut conflicts) = (Vec::new(), Vec::new());
    for change in &changes.list {
        let path = path_of(&change.path);
        let unreadable = |error: std::io::Error| {
            failed(format!("could not read `{}`", escape(&path.display().to_string())), &error)
        };
        let here = tree.read(&path).map_err(unreadable)?;
        let name = here.as_ref().map(|found| found.name(format)).transpose().map_err(unreadable)?;
        if here.is_none()
            && change.after.is_some()
            && is_in_the_way(changes, tree, &path).map_err(unreadable)?
        {
            conflicts.push(&change.path);
            continue;
        }
        if name == change.after {
            continue;
        }
        let content = |(kind, object): &(FileKind, String)| {
            contents.get(object).map(|content| (*kind, content.clone())).ok_or_else(|| {
                WireError::new(
                    ErrorCode::Failed,
                    format!("the content of `{}` is missing", escape(&path.display().to_string())),
                )
            })
        };
        if name == change.before {
            let after = change.after.as_ref().map(content).transpose()?;
            steps.push(Step { path: change.path.clone(), before: here, after });
            continue;
        }
        match merge(changes, change, here.as_ref(), &contents)? {
            Some(after) => steps.push(Step { path: change.path.clone(), before: here, after: Some(after) }),
            None => conflicts.push(&change.path),
        }
    }
    if conflicts.is_empty() {
        return Ok(steps);
    }
    let names = listing(conflicts.iter().copied());
    Err(WireError::new(ErrorCode::Failed, format!("both sides changed {names}; nothing was applied"))
        .hinted("write a patch with `--output FILE`, and apply it by hand with `git apply --3way FILE`"))
}

/// A directory, say, that does not go with the files that are removed.
fn is_in_the_way(changes: &Changes, tree: &Tree, path: &Path) -> std::io::Result<bool> {
    let goes = |change: &Change| change.after.is_none() && path_of(&change.path).starts_with(path);
    Ok(tree.is_taken(path)? && !changes.list.iter().any(goes))
}

/// Joins a text that both sides changed; none when that can't be done.
fn merge(
    changes: &Changes,
    change: &Change,
    here: Option<&Found>,
    contents: &HashMap<String, Vec<u8>>,
) -> Result<Option<(FileKind, Vec<u8>)>, WireError> {
    let (Some(here), Some((kind_before, before)), Some((kind, after))) =
        (here, &change.before, &change.after)
    else {
        return Ok(None);
    };
    let (Some(before), Some(after)) = (contents.get(before), contents.get(after)) else { return Ok(None) };
    if [here.kind, *kind_before, *kind].contains(&FileKind::Link) {
        return Ok(None);
    }
    let scratch = changes.scratch.path();
    let names = ["ours", "base", "theirs"].map(|name| scratch.join(name));
    for (name, content) in names.iter().zip([&here.content, before, after]) {
        std::fs::write(name, content)
            .map_err(|error| failed("could not write to the state directory", &error))?;
    }
    let mut args = vec!["merge-file".as_ref(), "-p".as_ref(), "-q".as_ref()];
    args.extend(names.iter().map(|name| name.as_os_str()));
    let merged = Git::own(&changes.repository).ask(&args)?;
    let kind = if here.kind == *kind_before { *kind } else { here.kind };
    Ok(merged.map(|content| (kind, content)))
}

/// Reads every content that may be needed, with one git.
fn contents(changes: &Changes) -> Result<HashMap<String, Vec<u8>>, WireError> {
    let sides = changes.list.iter().flat_map(|change| change.before.iter().chain(&change.after));
    let names: std::collections::BTreeSet<&str> = sides.map(|(_, object)| object.as_str()).collect();
    let found = Git::own(&changes.repository).objects(names)?;
    Ok(found.into_iter().map(|(name, (_, content))| (name, content)).collect())
}

fn undo_dir(root: &Path, state: &StateDir) -> PathBuf {
    use sha2::Digest as _;
    let hash = sha2::Sha256::digest(root.as_os_str().as_bytes());
    let name: String = hash.iter().take(12).map(|byte| format!("{byte:02x}")).collect();
    state.path().join("undo").join(name)
}

fn keep_for_undo(root: &Path, format: Format, steps: &[Step], state: &StateDir) -> Result<(), WireError> {
    let dir = undo_dir(root, state);
    let parent = state.path().join("undo");
    let new = parent.join(format!(".new-{}", std::process::id()));
    let keep = || -> std::io::Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&parent)?;
        let _ = std::fs::remove_dir_all(&new);
        std::fs::DirBuilder::new().mode(0o700).create(&new)?;
        let mut files = Vec::new();
        for (number, step) in steps.iter().enumerate() {
            let before = match &step.before {
                Some(found) => {
                    std::fs::write(new.join(number.to_string()), &found.content)?;
                    Some((found.kind, found.mode, found.name(format)?.1))
                }
                None => None,
            };
            let after = match &step.after {
                Some((kind, content)) => {
                    Some(Found { kind: *kind, mode: 0, content: content.clone() }.name(format)?)
                }
                None => None,
            };
            files.push(Applied { path: step.path.clone(), before, after });
        }
        let root = ByteString(root.as_os_str().as_bytes().to_vec());
        let record = Record { root, applied: now(), sha256: format == Format::Sha256, files };
        let mut file = std::fs::File::create(new.join(RECORD))?;
        file.write_all(&serde_json::to_vec(&record)?)?;
        rustix::fs::syncfs(&file)?;
        // CRASH: between the two there is nothing to take back, and nothing has been applied yet.
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::rename(&new, &dir)
    };
    keep().map_err(|error| failed("could not keep what the changes replace", &error))
}

/// Takes the last apply to a checkout back. Returns how many files were restored.
///
/// # Errors
/// When there is none, or a file has been changed since.
pub(crate) fn undo(root: &Path, state: &StateDir) -> Result<usize, WireError> {
    let dir = undo_dir(root, state);
    let shown = escape(&root.display().to_string());
    let Ok(bytes) = std::fs::read(dir.join(RECORD)) else {
        return Err(WireError::new(
            ErrorCode::NotFound,
            format!("nothing was applied to `{shown}` that could be taken back"),
        ));
    };
    let unreadable = |error: &(dyn std::error::Error + 'static)| {
        failed(format!("could not take back what was applied to `{shown}`"), error)
    };
    let record: Record = serde_json::from_slice(&bytes).map_err(|error| unreadable(&error))?;
    let format = if record.sha256 { Format::Sha256 } else { Format::Sha1 };
    let tree = Tree::open(root).map_err(|error| unreadable(&error))?;
    let mut changed = Vec::new();
    for file in &record.files {
        let here = tree.read(&path_of(&file.path)).map_err(|error| unreadable(&error))?;
        let name = here.map(|found| found.name(format)).transpose().map_err(|error| unreadable(&error))?;
        let before = file.before.as_ref().map(|(kind, _, object)| (*kind, object.clone()));
        // One that is as before already was restored by an undo that was broken off.
        if name != file.after && name != before {
            changed.push(&file.path);
        }
    }
    if !changed.is_empty() {
        let names = listing(changed.iter().copied());
        return Err(invalid(format!("{names} changed after that; nothing was taken back"))
            .hinted("commit or remove what changed, or take it back by hand"));
    }
    let is_new = |file: &&(usize, &Applied)| file.1.before.is_none();
    let files: Vec<(usize, &Applied)> = record.files.iter().enumerate().collect();
    for (number, file) in files.iter().filter(is_new).chain(files.iter().filter(|file| !is_new(file))) {
        let before = match &file.before {
            Some((kind, _, _)) => Some((
                *kind,
                std::fs::read(dir.join(number.to_string())).map_err(|error| unreadable(&error))?,
            )),
            None => None,
        };
        carry_out(&tree, &file.path, file.before.as_ref().map(|(_, mode, _)| *mode), before.as_ref())?;
    }
    std::fs::remove_dir_all(&dir).map_err(|error| unreadable(&error))?;
    Ok(record.files.len())
}
