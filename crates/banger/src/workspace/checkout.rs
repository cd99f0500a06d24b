//! What of a checkout travels into a vm. Only looks; git is asked for names and facts.

use super::git::Git;
use crate::stop::{failed, invalid};
use crate::text::escape;
use banger_wire::daemon::WorkspaceMode;
use banger_wire::error::WireError;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Untracked files with these names are taken for secrets.
const SECRET_NAMES: [&str; 6] = ["id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", ".netrc", ".env"];
/// Endings of `.env.*` that are meant to be shared.
const SHARED_ENDINGS: [&str; 3] = [".example", ".sample", ".template"];
/// Mode of a submodule in an index.
const SUBMODULE: &str = "160000";

/// What is asked for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    pub(crate) mode: WorkspaceMode,
    pub(crate) tracked_only: bool,
    pub(crate) include_secrets: bool,
    /// A commit whose files are meant instead of the working tree's.
    pub(crate) from: Option<String>,
}

/// What travels and what stays behind.
#[derive(Debug)]
pub(crate) struct Survey {
    /// Top of the checkout, or a directory without git.
    pub(crate) root: PathBuf,
    /// Where below it the given path was.
    pub(crate) below: PathBuf,
    pub(crate) mode: WorkspaceMode,
    /// The commit whose files travel; none where the working tree's do.
    pub(crate) from: Option<String>,
    /// The checkout, then its submodules; none for a directory without git.
    pub(crate) repositories: Vec<Repository>,
    pub(crate) entries: Vec<Entry>,
    /// Untracked files that look like secrets.
    pub(crate) held_back: Vec<OsString>,
    /// Untracked directories that are repositories of their own.
    pub(crate) nested: Vec<OsString>,
}

/// One file, link or directory that travels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its name below the root.
    pub(crate) path: OsString,
    /// Type and permission bits.
    pub(crate) mode: u32,
    /// Bytes of content.
    pub(crate) len: u64,
    /// When it was modified, in nanoseconds since 1970.
    pub(crate) modified: i64,
}

/// A repository whose checkout travels.
#[derive(Debug)]
pub(crate) struct Repository {
    /// Its checkout below the root; empty for the root itself.
    pub(crate) prefix: PathBuf,
    pub(crate) git: Git,
    /// What its index has, by the name below the repository's top: object name of every stage, submodules excepted.
    pub(crate) index: HashMap<OsString, Vec<String>>,
}

impl Survey {
    /// Bytes of all files.
    pub(crate) fn len(&self) -> u64 {
        self.entries.iter().map(|entry| entry.len).sum()
    }
}

/// Looks at the checkout that contains `path`.
///
/// # Errors
/// When git is missing, or `path` is in no checkout, or what is in it can't travel.
pub(crate) fn survey(path: &Path, wanted: &Wanted) -> Result<Survey, WireError> {
    let shown = escape(&path.display().to_string());
    let full = path.canonicalize().map_err(|error| match error.kind() {
        ErrorKind::NotFound => invalid(format!("there is no directory `{shown}`")),
        _ => failed(format!("could not find `{shown}`"), &error),
    })?;
    if !full.is_dir() {
        return Err(invalid(format!("`{shown}` is not a directory")));
    }
    let git = Git::at(&full);
    let root = match git.run(&["rev-parse", "--show-toplevel"]) {
        Ok(mut top) => {
            top.pop();
            PathBuf::from(OsString::from_vec(top))
        }
        Err(error) => return without_checkout(&git, &full, &shown, wanted, error),
    };
    let mut survey = Survey {
        below: full.strip_prefix(&root).map(Path::to_owned).unwrap_or_default(),
        mode: wanted.mode,
        from: None,
        repositories: Vec::new(),
        entries: Vec::new(),
        held_back: Vec::new(),
        nested: Vec::new(),
        root,
    };
    match &wanted.from {
        Some(name) => survey.add_commit(name)?,
        None => survey.add_repository(PathBuf::new(), wanted)?,
    }
    Ok(survey)
}

fn without_checkout(
    git: &Git,
    full: &Path,
    shown: &str,
    wanted: &Wanted,
    error: WireError,
) -> Result<Survey, WireError> {
    let bare = git.line(&["rev-parse", "--is-bare-repository"])?.is_some_and(|answer| answer == "true");
    if bare || error.causes.iter().any(|cause| cause.contains("bare repository")) {
        return Err(invalid(format!("`{shown}` is a bare repository, which has no files to place in a vm"))
            .hinted("clone it, and name the clone"));
    }
    let unknown = error.causes.iter().any(|cause| cause.contains("not a git repository"));
    if !unknown {
        return Err(error);
    }
    if wanted.mode != WorkspaceMode::FullCopy || wanted.tracked_only {
        return Err(invalid(format!("`{shown}` is not in a git checkout"))
            .hinted("to copy all that is in the directory, use `--mode full_copy`"));
    }
    let mut survey = Survey {
        root: full.to_owned(),
        below: PathBuf::new(),
        mode: wanted.mode,
        from: None,
        repositories: Vec::new(),
        entries: Vec::new(),
        held_back: Vec::new(),
        nested: Vec::new(),
    };
    survey.add_directory(PathBuf::new(), wanted)?;
    Ok(survey)
}

impl Survey {
    /// Adds the files of a commit.
    fn add_commit(&mut self, name: &str) -> Result<(), WireError> {
        let git = Git::at(&self.root);
        let commit = format!("{name}^{{commit}}");
        let found = git.line(&["rev-parse", "-q", "--verify", "--end-of-options", &commit])?;
        let Some(commit) = found.and_then(|name| name.into_string().ok()) else {
            return Err(invalid(format!("there is no commit `{}` in the checkout", escape(name))));
        };
        let mut index = HashMap::<_, Vec<_>>::new();
        let listed = git.run(&["ls-tree", "-r", "-z", "-l", "--full-tree", &commit])?;
        for record in listed.split(|&byte| byte == 0).filter(|record| !record.is_empty()) {
            let Some(tab) = record.iter().position(|&byte| byte == b'\t') else { continue };
            let head = String::from_utf8_lossy(&record[..tab]);
            let fields: Vec<&str> = head.split_whitespace().collect();
            let [mode, _, object, len] = fields[..] else { continue };
            let path = OsStr::from_bytes(&record[tab + 1..]).to_owned();
            if mode == SUBMODULE {
                let shown = escape(&path.to_string_lossy());
                return Err(invalid(format!(
                    "that commit has submodules (`{shown}`), which can't be taken along"
                ))
                .hinted("check it out, and leave `--from` out"));
            }
            index.insert(path.clone(), vec![object.to_owned()]);
            let mode = u32::from_str_radix(mode, 8).unwrap_or_default();
            self.entries.push(Entry { path, mode, len: len.parse().unwrap_or_default(), modified: 0 });
        }
        self.from = Some(commit);
        self.repositories.push(Repository { prefix: PathBuf::new(), git, index });
        Ok(())
    }

    /// Sees the entries again, whose files are in another place.
    ///
    /// # Errors
    /// When one is not there.
    pub(crate) fn see_again(&mut self, root: &Path) -> std::io::Result<()> {
        for seen in &mut self.entries {
            *seen = entry(PathBuf::from(&seen.path), &root.join(&seen.path).symlink_metadata()?);
        }
        Ok(())
    }

    fn add_repository(&mut self, prefix: PathBuf, wanted: &Wanted) -> Result<(), WireError> {
        let top = self.root.join(&prefix);
        let git = Git::at(&top);
        let staged = git.run(&["ls-files", "-z", "--stage"])?;
        let (mut tracked, mut index, mut submodules) = (Vec::new(), HashMap::<_, Vec<_>>::new(), Vec::new());
        for record in staged.split(|&byte| byte == 0).filter(|record| !record.is_empty()) {
            let Some(tab) = record.iter().position(|&byte| byte == b'\t') else { continue };
            let head = String::from_utf8_lossy(&record[..tab]);
            let mut fields = head.split(' ');
            let (mode, object) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
            let name = OsStr::from_bytes(&record[tab + 1..]).to_owned();
            if mode == SUBMODULE {
                submodules.push(name);
                continue;
            }
            // An unmerged file is listed once for each stage.
            let stages = index.entry(name.clone()).or_default();
            if stages.is_empty() {
                tracked.push(name);
            }
            stages.push(object.to_owned());
        }
        if let (Some(name), WorkspaceMode::ShallowOverlay) = (submodules.first(), self.mode) {
            let shown = escape(&name.to_string_lossy());
            let message =
                format!("the checkout has submodules (`{shown}`), which the default mode leaves out");
            return Err(invalid(message).hinted("to take them along, use `--mode full_copy`"));
        }
        self.add_files(&prefix, tracked.into_iter(), true, wanted)?;
        if !wanted.tracked_only {
            let others = git.run(&["ls-files", "-z", "--others", "--exclude-standard"])?;
            let names = others.split(|&byte| byte == 0).filter(|name| !name.is_empty());
            self.add_files(&prefix, names.map(|name| OsStr::from_bytes(name).to_owned()), false, wanted)?;
        }
        self.repositories.push(Repository { prefix: prefix.clone(), git, index });
        for name in submodules {
            // One that was never checked out is an empty directory, there and here.
            let path = prefix.join(name);
            if self.root.join(&path).join(".git").symlink_metadata().is_ok() {
                self.add_repository(path, wanted)?;
            }
        }
        Ok(())
    }

    fn add_files(
        &mut self,
        prefix: &Path,
        names: impl Iterator<Item = OsString>,
        tracked: bool,
        wanted: &Wanted,
    ) -> Result<(), WireError> {
        let top = self.root.join(prefix);
        let mut links = HashMap::new();
        for name in names {
            let path = prefix.join(&name);
            if name.as_bytes().ends_with(b"/") {
                self.nested.push(path.into_os_string());
                continue;
            }
            // Deleted in the working tree, or a directory or a link where a file or a directory is tracked.
            let Ok(found) = std::fs::symlink_metadata(top.join(&name)) else { continue };
            let travels = found.is_file() || found.is_symlink();
            if !travels || is_behind_link(&top, Path::new(&name), &mut links) {
                continue;
            }
            if !tracked && !wanted.include_secrets && is_secret(&self.root, &path) {
                self.held_back.push(path.into_os_string());
            } else {
                self.entries.push(entry(path, &found));
            }
        }
        Ok(())
    }

    /// Adds everything below a directory that knows nothing of git.
    fn add_directory(&mut self, below: PathBuf, wanted: &Wanted) -> Result<(), WireError> {
        let full = self.root.join(&below);
        let unreadable = |error| failed(format!("could not read `{}`", full.display()), &error);
        let mut names = Vec::new();
        for found in std::fs::read_dir(&full).map_err(unreadable)? {
            names.push(found.map_err(unreadable)?.file_name());
        }
        names.sort_unstable();
        for name in names {
            let path = below.join(&name);
            let found = std::fs::symlink_metadata(self.root.join(&path)).map_err(unreadable)?;
            if found.is_dir() {
                self.entries.push(entry(path.clone(), &found));
                self.add_directory(path, wanted)?;
            } else if found.is_file() || found.is_symlink() {
                if !wanted.include_secrets && is_secret(&self.root, &path) {
                    self.held_back.push(path.into_os_string());
                } else {
                    self.entries.push(entry(path, &found));
                }
            }
        }
        Ok(())
    }
}

fn entry(path: PathBuf, found: &std::fs::Metadata) -> Entry {
    let modified = found.mtime().saturating_mul(1_000_000_000).saturating_add(found.mtime_nsec());
    let len = if found.is_dir() { 0 } else { found.len() };
    Entry { path: path.into_os_string(), mode: found.mode(), len, modified }
}

/// To git, a name that leads through a symbolic link is one that is not there; what it shows is not the checkout's.
fn is_behind_link(top: &Path, name: &Path, known: &mut HashMap<PathBuf, bool>) -> bool {
    let Some(parent) = name.parent().filter(|parent| !parent.as_os_str().is_empty()) else { return false };
    if let Some(&answer) = known.get(parent) {
        return answer;
    }
    let answer = top.join(parent).is_symlink() || is_behind_link(top, parent, known);
    known.insert(parent.to_owned(), answer);
    answer
}

fn is_secret(root: &Path, path: &Path) -> bool {
    let base = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let shared = SHARED_ENDINGS.iter().any(|ending| base.ends_with(ending));
    if SECRET_NAMES.contains(&base.as_str()) || (base.starts_with(".env.") && !shared) {
        return true;
    }
    let keyed = base.ends_with(".pem") || base.ends_with(".key");
    // One that can't be read may be a key as well. A link carries no key, and may lead to what never ends.
    keyed
        && !root.join(path).is_symlink()
        && std::fs::read(root.join(path))
            .map_or(true, |bytes| bytes.windows(11).any(|window| window == b"PRIVATE KEY"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods, reason = "a test")]
    use super::*;

    fn made(script: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let ran = std::process::Command::new("sh").args(["-ec", script]).current_dir(dir.path()).status();
        assert!(ran.unwrap().success());
        dir
    }

    fn names(survey: &Survey) -> Vec<&str> {
        let mut names: Vec<_> = survey.entries.iter().map(|entry| entry.path.to_str().unwrap()).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn tracked_and_untracked_files_travel_and_secrets_stay() {
        let dir = made(
            "git init -q . && echo ignored > .gitignore && echo a > kept && echo b > gone && \
            git add . && rm gone && touch ignored new .env .env.example && echo 'PRIVATE KEY' > a.pem && \
            mkdir d && echo x > d/tracked && git add d && rm -r d && \
            mkdir real && echo x > real/tracked && ln -s real d && \
            echo public > b.pem && ln -s kept link && mkdir own && git -C own init -q && \
            touch own/x && git config core.fsmonitor \"touch $PWD/marker; false\"",
        );
        let survey = survey(dir.path(), &Wanted::default()).unwrap();
        let expected = [".env.example", ".gitignore", "b.pem", "d", "kept", "link", "new", "real/tracked"];
        assert_eq!(names(&survey), expected);
        assert_eq!(survey.held_back, [".env", "a.pem"]);
        assert_eq!(survey.nested, ["own/"]);
        assert!(!dir.path().join("marker").exists(), "fsmonitor ran");
        let tracked = Wanted { tracked_only: true, ..Wanted::default() };
        assert_eq!(names(&super::survey(dir.path(), &tracked).unwrap()), [".gitignore", "kept"]);
        let all = Wanted { include_secrets: true, ..Wanted::default() };
        assert_eq!(super::survey(dir.path(), &all).unwrap().held_back.len(), 0);
    }

    #[test]
    fn what_can_not_travel_is_refused_by_name() {
        let dir = made(
            "git init -q --bare bare.git && mkdir -p plain/sub && echo x > plain/sub/file && \
            git init -q top && cd top && git init -q sub && \
            git -C sub -c user.name=a -c user.email=b commit -q --allow-empty -m x && git add sub 2> /dev/null",
        );
        let refused = |name: &str| {
            let error = survey(&dir.path().join(name), &Wanted::default()).unwrap_err();
            let text = format!("{}; {}", error.message, error.hint.unwrap_or_default());
            text.replace(&dir.path().display().to_string(), "DIR")
        };
        insta::assert_snapshot!(
            ["bare.git", "plain", "top", "none", "top/.git/config"].map(refused).join("\n"),
            @r"
        `DIR/bare.git` is a bare repository, which has no files to place in a vm; clone it, and name the clone
        `DIR/plain` is not in a git checkout; to copy all that is in the directory, use `--mode full_copy`
        the checkout has submodules (`sub`), which the default mode leaves out; to take them along, use `--mode full_copy`
        there is no directory `DIR/none`; 
        `DIR/top/.git/config` is not a directory; 
        "
        );
        let full = Wanted { mode: WorkspaceMode::FullCopy, ..Wanted::default() };
        let plain = survey(&dir.path().join("plain"), &full).unwrap();
        assert_eq!(names(&plain), ["sub", "sub/file"]);
        assert_eq!(survey(&dir.path().join("top"), &full).unwrap().repositories.len(), 2);
    }
}
