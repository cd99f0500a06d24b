//! The `.git` a checkout has in a guest, made on the host from the owner's repository.
//!
//! It holds what `git status`, `log`, `diff` and `commit` need: the last commits or all, the index as it is, the ignore
//! rules, who commits, and where origin is. It has no hook, no filter and no credential, whatever the host's has: its
//! config is written anew, from a list of keys that only change what is shown.

use super::checkout::Repository;
use super::git::Git;
use crate::stop::{failed, invalid};
use banger_wire::daemon::WorkspaceMode;
use banger_wire::error::WireError;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::Path;

/// Commits of the default mode, from each tip.
const COMMITS: &str = "--max-count=50";
/// Commits that one side of a branch and its upstream may be ahead, for their counts to be right in the guest.
const APART: &str = "--max-count=1000";
/// Keys that change what git shows or compares, and start no program.
const KEYS: [&str; 18] = [
    "core.abbrev",
    "core.autocrlf",
    "core.eol",
    "core.filemode",
    "core.ignorecase",
    "core.precomposeunicode",
    "core.quotepath",
    "core.safecrlf",
    "core.sparsecheckout",
    "core.sparsecheckoutcone",
    "core.symlinks",
    "core.whitespace",
    "diff.ignoresubmodules",
    "diff.renames",
    "status.relativepaths",
    "status.renames",
    "status.showuntrackedfiles",
    "user.name",
];
/// Files of a merge or the like under way; each names commits.
const UNDER_WAY: [&str; 4] = ["MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD", "MERGE_MSG"];

/// What can be asked of the metadata.
#[derive(Debug, Clone, Default)]
pub(crate) struct Branching {
    /// A branch to begin in the guest.
    pub(crate) branch: Option<String>,
    /// The commit it begins at; none for the one that is checked out.
    pub(crate) from: Option<String>,
}

/// What a repository is at.
struct Head {
    /// The reference it is at; none when it is detached.
    reference: Option<String>,
    /// The commit; none before the first one.
    commit: Option<String>,
    /// What the reference follows: reference, commit.
    upstream: Option<(String, String)>,
}

/// Makes the `.git` of a repository's checkout in `dest`, which must not be there. Returns the commit checked out here.
///
/// # Errors
/// When git can't read the repository, or `dest` can't be written.
pub(crate) fn build(
    repository: &Repository,
    mode: WorkspaceMode,
    branching: &Branching,
    dest: &Path,
) -> Result<Option<String>, WireError> {
    let git = &repository.git;
    let unwritable = |error| failed(format!("could not write to `{}`", dest.display()), &error);
    let write = |name: &str, content: &[u8]| std::fs::write(dest.join(name), content).map_err(unwritable);
    for dir in ["objects/pack", "objects/info", "refs/heads", "refs/tags", "info"] {
        std::fs::create_dir_all(dest.join(dir)).map_err(unwritable)?;
    }
    let mut head = find_head(git)?;
    let config = read_config(git)?;
    let following = head.reference.clone();
    if let Some(branch) = &branching.branch {
        let reference = format!("refs/heads/{branch}");
        if git.ask(&["check-ref-format", &reference])?.is_none() {
            return Err(invalid(format!("`{}` can't be the name of a branch", branch.escape_debug())));
        }
        head.reference = Some(reference);
    }
    let checked_out = head.commit.clone();
    if let Some(commit) = &branching.from {
        (head.commit, head.upstream) = (Some(commit.clone()), None);
    }
    let mut under_way = Vec::new();
    for name in UNDER_WAY.into_iter().filter(|_| branching.from.is_none()) {
        if let Ok(content) = std::fs::read(git.path(name)?) {
            write(name, &content)?;
            under_way.extend(commits_in(&content).filter(|_| name != "MERGE_MSG"));
        }
    }
    let (objects, shallow, mut refs) = match mode {
        WorkspaceMode::ShallowOverlay => recent(git, &head, &under_way)?,
        WorkspaceMode::FullCopy => all(git, &head)?,
    };
    pack(repository, objects, dest)?;
    if !shallow.is_empty() {
        let lines: String = shallow.iter().map(|commit| format!("{commit}\n")).collect();
        write("shallow", lines.as_bytes())?;
    }
    match (&head.reference, &head.commit) {
        (Some(reference), commit) => {
            write("HEAD", format!("ref: {reference}\n").as_bytes())?;
            refs.extend(commit.clone().map(|commit| (reference.clone(), commit)));
        }
        (None, Some(commit)) => write("HEAD", format!("{commit}\n").as_bytes())?,
        (None, None) => return Err(invalid("the checkout has no branch and no commit")),
    }
    let lines: String = refs.iter().map(|(name, commit)| format!("{commit} {name}\n")).collect();
    write("packed-refs", lines.as_bytes())?;
    write("config", &guest_config(&config, git.is_sha256()?, following.as_deref()))?;
    write("info/exclude", &ignore_rules(git)?)?;
    if let Ok(rules) = std::fs::read(git.path("info/sparse-checkout")?) {
        write("info/sparse-checkout", &rules)?;
    }
    copy_index(git, &config, &dest.join("index"))?;
    Ok(checked_out)
}

/// Writes the files of a commit into `files`, and the index that belongs to them in place of the one in `made`.
///
/// # Errors
/// When git can't read the commit, or they can't be written.
pub(crate) fn check_out(git: &Git, commit: &str, files: &Path, made: &Path) -> Result<(), WireError> {
    std::fs::create_dir(files)
        .map_err(|error| failed(format!("could not make `{}`", files.display()), &error))?;
    let repository = git.run(&["rev-parse", "--absolute-git-dir"])?;
    let repository = OsString::from_vec(repository[..repository.len().saturating_sub(1)].to_vec());
    let index = made.join("index");
    let _ = std::fs::remove_file(&index);
    // What a filter would do to them is left out.
    let git = git.without_filters()?.in_tree(Path::new(&repository), files).with_env("GIT_INDEX_FILE", index);
    git.run(&["read-tree", commit])?;
    git.run(&["-c", "core.sparseCheckout=false", "checkout-index", "-a", "-u", "-q"]).map(drop)
}

fn text(line: Option<OsString>) -> Option<String> {
    line.and_then(|line| line.into_string().ok())
}

fn find_head(git: &Git) -> Result<Head, WireError> {
    let reference = text(git.line(&["symbolic-ref", "-q", "HEAD"])?);
    let commit = text(git.line(&["rev-parse", "-q", "--verify", "HEAD^{commit}"])?);
    let mut upstream = None;
    if let Some(reference) = &reference {
        let name = text(git.line(&["for-each-ref", "--format=%(upstream)", reference])?)
            .filter(|name| !name.is_empty());
        if let Some(name) = name
            && let Some(commit) =
                text(git.line(&["rev-parse", "-q", "--verify", &format!("{name}^{{commit}}")])?)
        {
            upstream = Some((name, commit));
        }
    }
    Ok(Head { reference, commit, upstream })
}

/// Lines that are names of objects.
fn commits_in(content: &[u8]) -> impl Iterator<Item = String> {
    let text = String::from_utf8_lossy(content).into_owned();
    let is_name =
        |line: &&str| matches!(line.len(), 40 | 64) && line.bytes().all(|byte| byte.is_ascii_hexdigit());
    text.lines().filter(is_name).map(str::to_owned).collect::<Vec<_>>().into_iter()
}

type Refs = BTreeMap<String, String>;

/// The last commits, those between the branch and its upstream, and where history is cut off.
fn recent(
    git: &Git,
    head: &Head,
    under_way: &[String],
) -> Result<(Vec<u8>, BTreeSet<String>, Refs), WireError> {
    let (mut parents, mut refs) = (BTreeMap::<String, Vec<String>>::new(), Refs::new());
    let mut add = |lines: Vec<u8>| {
        for line in String::from_utf8_lossy(&lines).lines() {
            let mut names = line.trim_start_matches('-').split(' ').map(str::to_owned);
            if let Some(commit) = names.next() {
                parents.insert(commit, names.collect());
            }
        }
    };
    for tip in head.commit.iter().chain(under_way) {
        add(git.run(&["rev-list", "--parents", COMMITS, tip])?);
    }
    if let (Some((name, upstream)), Some(commit)) = (&head.upstream, &head.commit) {
        refs.insert(name.clone(), upstream.clone());
        add(git.run(&["rev-list", "--parents", "--max-count=1", upstream])?);
        add(git.run(&["rev-list", "--parents", "--boundary", APART, &format!("{commit}...{upstream}")])?);
    }
    let cut_on_host = std::fs::read(git.path("shallow")?).unwrap_or_default();
    let mut shallow: BTreeSet<String> =
        commits_in(&cut_on_host).filter(|commit| parents.contains_key(commit)).collect();
    let cut = parents.iter().filter(|(_, of)| of.iter().any(|parent| !parents.contains_key(parent)));
    shallow.extend(cut.map(|(commit, _)| commit.clone()));
    let commits: String = parents.keys().map(|commit| format!("{commit}\n")).collect();
    let args = [
        "rev-list",
        "--objects",
        "--no-object-names",
        "--no-walk=unsorted",
        "--missing=allow-any",
        "--stdin",
    ];
    let objects = if commits.is_empty() { Vec::new() } else { git.feed(&args, commits.as_bytes())? };
    Ok((objects, shallow, refs))
}

/// Everything that a branch or a tag leads to.
fn all(git: &Git, head: &Head) -> Result<(Vec<u8>, BTreeSet<String>, Refs), WireError> {
    let format = "--format=%(objectname) %(refname)";
    let listed = git.run(&["for-each-ref", format, "refs/heads", "refs/tags", "refs/remotes"])?;
    let listed = String::from_utf8_lossy(&listed).into_owned();
    let refs: Refs = { listed.lines() }
        .filter_map(|line| line.split_once(' '))
        .map(|(object, name)| (name.to_owned(), object.to_owned()))
        .collect();
    let tips: String = refs.values().chain(&head.commit).map(|object| format!("{object}\n")).collect();
    let args = ["rev-list", "--objects", "--no-object-names", "--missing=allow-any", "--stdin"];
    let objects = if tips.is_empty() { Vec::new() } else { git.feed(&args, tips.as_bytes())? };
    let shallow = commits_in(&std::fs::read(git.path("shallow")?).unwrap_or_default()).collect();
    Ok((objects, shallow, refs))
}

/// Packs the objects and what the index has besides.
fn pack(repository: &Repository, mut objects: Vec<u8>, dest: &Path) -> Result<(), WireError> {
    let staged: BTreeSet<&String> = repository.index.values().flatten().collect();
    let mut staged: Vec<u8> =
        staged.into_iter().flat_map(|object| [object.as_bytes(), b"\n"].concat()).collect();
    let is_partial = ["config", "--get-regexp", r"^remote\..*\.promisor$"];
    if repository.git.line(&is_partial)?.is_some() {
        // What was never fetched stays where it is; nothing is fetched for a vm.
        let found = repository.git.feed(&["cat-file", "--batch-check=%(objectname)"], &staged)?;
        staged = { found.split_inclusive(|&byte| byte == b'\n') }
            .filter(|line| !line.ends_with(b" missing\n"))
            .flatten()
            .copied()
            .collect();
    }
    objects.extend(staged);
    if objects.is_empty() {
        return Ok(());
    }
    // Deltas that there are, are used; to look for more takes longer than to send them.
    let base = dest.join("objects/pack/pack");
    let args = [
        "-c".as_ref(),
        "pack.writeReverseIndex=false".as_ref(),
        "pack-objects".as_ref(),
        "-q".as_ref(),
        "--window=0".as_ref(),
        "--delta-base-offset".as_ref(),
        base.as_os_str(),
    ];
    repository.git.feed(&args, &objects).map(|_| ())
}

/// Copies the index with its time of modification, by which git knows which entries to trust.
fn copy_index(git: &Git, config: &Config, dest: &Path) -> Result<(), WireError> {
    let source = git.path("index")?;
    let unreadable = |error| failed(format!("could not copy `{}`", source.display()), &error);
    let modified = match std::fs::metadata(&source) {
        // Nothing was ever added.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        found => found.and_then(|found| found.modified()).map_err(unreadable)?,
    };
    std::fs::copy(&source, dest).map_err(unreadable)?;
    let file = std::fs::OpenOptions::new().write(true).open(dest).map_err(unreadable)?;
    file.set_modified(modified).map_err(unreadable)?;
    let is_split = git.line(&["rev-parse", "--shared-index-path"])?.is_some();
    let is_sparse = config.last("index.sparse").is_some_and(|value| value == b"true");
    if is_split || is_sparse {
        // Part of it is in another file, or whole directories are one entry.
        let git = git.clone().with_env("GIT_INDEX_FILE", dest);
        let args = ["-c", "index.sparse=false", "update-index", "--no-split-index", "--force-write-index"];
        git.run(&args)?;
        file.set_modified(modified).map_err(unreadable)?;
    }
    Ok(())
}

/// The owner's ignore rules outside the checkout, in the order in which they override each other.
///
/// # Errors
/// When git is missing.
pub(crate) fn ignore_rules(git: &Git) -> Result<Vec<u8>, WireError> {
    let own = git.line(&["config", "--type=path", "--get", "core.excludesFile"])?;
    let xdg = std::env::var_os("XDG_CONFIG_HOME").filter(|dir| !dir.is_empty());
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".config"));
    let default = || Some(xdg.map(Into::into).or_else(home)?.join("git/ignore").into_os_string());
    let mut rules = Vec::new();
    for file in [own.or_else(default), Some(git.path("info/exclude")?.into_os_string())].into_iter().flatten()
    {
        rules.extend(std::fs::read(file).unwrap_or_default());
        if rules.last().is_some_and(|&byte| byte != b'\n') {
            rules.push(b'\n');
        }
    }
    Ok(rules)
}

/// The owner's config, in the order of its files.
struct Config(Vec<(String, Vec<u8>)>);

impl Config {
    fn last(&self, key: &str) -> Option<&[u8]> {
        self.0.iter().rev().find(|(known, _)| known == key).map(|(_, value)| value.as_slice())
    }
}

fn read_config(git: &Git) -> Result<Config, WireError> {
    let listed = git.run(&["config", "-z", "--list"])?;
    let entry = |record: &[u8]| {
        let (key, value) = match record.iter().position(|&byte| byte == b'\n') {
            Some(at) => (&record[..at], &record[at + 1..]),
            // A key alone is one that is true.
            None => (record, &b"true"[..]),
        };
        (String::from_utf8_lossy(key).into_owned(), value.to_vec())
    };
    Ok(Config(listed.split(|&byte| byte == 0).filter(|record| !record.is_empty()).map(entry).collect()))
}

fn guest_config(config: &Config, sha256: bool, reference: Option<&str>) -> Vec<u8> {
    let mut text = Vec::new();
    let mut section = |name: &str, entries: &[(&str, &[u8])]| {
        text.extend_from_slice(format!("[{name}]\n").as_bytes());
        for (key, value) in entries {
            text.extend_from_slice(format!("\t{key} = ").as_bytes());
            text.extend_from_slice(&quoted(value));
            text.push(b'\n');
        }
    };
    let version: &[u8] = if sha256 { b"1" } else { b"0" };
    section(
        "core",
        &[
            ("repositoryFormatVersion", version),
            ("bare", b"false"),
            ("logAllRefUpdates", b"true"),
            // The index comes from the host: inodes, owners and times of change are others here.
            ("checkStat", b"minimal"),
            ("trustCtime", b"false"),
            ("untrackedCache", b"false"),
        ],
    );
    if sha256 {
        section("extensions", &[("objectFormat", b"sha256")]);
    }
    for key in KEYS.iter().chain(&["user.email"]) {
        if let (Some(value), Some((group, name))) = (config.last(key), key.split_once('.')) {
            section(group, &[(name, value)]);
        }
    }
    if let Some(url) = config.last("remote.origin.url") {
        let url = without_credentials(url);
        section("remote \"origin\"", &[("url", &url), ("fetch", b"+refs/heads/*:refs/remotes/origin/*")]);
    }
    let branch = reference.and_then(|reference| reference.strip_prefix("refs/heads/")).unwrap_or_default();
    let of_branch = |key: &str| config.last(&format!("branch.{branch}.{key}"));
    if let (Some(remote), Some(merge)) = (of_branch("remote"), of_branch("merge")) {
        let escaped = branch.replace('\\', "\\\\").replace('"', "\\\"");
        section(&format!("branch \"{escaped}\""), &[("remote", remote), ("merge", merge)]);
    }
    for (key, value) in &config.0 {
        let name = key.strip_prefix("submodule.").and_then(|rest| rest.strip_suffix(".url"));
        if let Some(name) = name.filter(|name| !name.contains('\n')) {
            let escaped = name.replace('\\', "\\\\").replace('"', "\\\"");
            let url = without_credentials(value);
            section(&format!("submodule \"{escaped}\""), &[("active", b"true"), ("url", &url)]);
        }
    }
    text
}

/// A value as a config file has it.
fn quoted(value: &[u8]) -> Vec<u8> {
    let mut text = vec![b'"'];
    for &byte in value {
        match byte {
            b'"' | b'\\' => text.extend([b'\\', byte]),
            b'\n' => text.extend(b"\\n"),
            _ => text.push(byte),
        }
    }
    text.push(b'"');
    text
}

/// Takes user and password out of `scheme://user:password@host/…` and `user@host:path`.
fn without_credentials(url: &[u8]) -> Vec<u8> {
    let find = |bytes: &[u8], wanted: u8| bytes.iter().position(|&byte| byte == wanted);
    let start = url.windows(3).position(|window| window == b"://").map_or(0, |at| at + 3);
    let rest = &url[start..];
    let end = find(rest, b'/').unwrap_or(rest.len());
    let is_path = start == 0 && find(&rest[..end], b':').is_none();
    match rest[..end].iter().rposition(|&byte| byte == b'@').filter(|_| !is_path) {
        Some(at) => [&url[..start], &rest[at + 1..]].concat(),
        None => url.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::{quoted, without_credentials};

    #[test]
    fn credentials_of_a_url_stay_here() {
        for (url, kept) in [
            ("https://me:s3cret@host/a/b.git", "https://host/a/b.git"),
            ("https://token@host:8443/a@b", "https://host:8443/a@b"),
            ("https://me:p@ss@host/a", "https://host/a"),
            ("git@host:a/b.git", "host:a/b.git"),
            ("ssh://git@host/a", "ssh://host/a"),
            ("https://host/a", "https://host/a"),
            ("/srv/a@b", "/srv/a@b"),
            ("../a@b:c", "../a@b:c"),
            ("a@b/c", "a@b/c"),
        ] {
            assert_eq!(String::from_utf8(without_credentials(url.as_bytes())).unwrap(), kept, "{url}");
        }
    }

    #[test]
    fn values_can_not_leave_their_line() {
        assert_eq!(quoted(b"a\"b\\c\n[core]"), b"\"a\\\"b\\\\c\\n[core]\"");
    }
}
