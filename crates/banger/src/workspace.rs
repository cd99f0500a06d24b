//! Which files of a git checkout travel into a vm, for `vm run PATH --dry-run`. Nothing is copied yet.
//!
//! Git is asked for names only, so no filter, hook or diff program has a reason to run; fsmonitor, which would, is off.

use crate::stop::{failed, invalid};
use banger_wire::error::WireError;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

/// Untracked files with these names are taken for secrets.
const SECRET_NAMES: [&str; 6] = ["id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", ".netrc", ".env"];
/// Endings of `.env.*` that are meant to be shared.
const SHARED_ENDINGS: [&str; 3] = [".example", ".sample", ".template"];

/// What travels and what stays behind.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct WorkspacePlan {
    /// Mode, length and name below the checkout's top.
    pub(crate) files: Vec<(u32, u64, OsString)>,
    /// Untracked files that look like secrets.
    pub(crate) held_back: Vec<OsString>,
}

/// Looks at the checkout that contains `path`.
///
/// # Errors
/// When git is missing, or `path` is in no checkout, or what is in it can't travel yet.
pub(crate) fn plan(path: &Path) -> Result<WorkspacePlan, WireError> {
    let mut top = git(path, &["rev-parse", "--show-toplevel"])?;
    top.pop();
    let top = Path::new(OsStr::from_bytes(&top)).to_owned();
    let staged = git(&top, &["ls-files", "-z", "--stage"])?;
    if staged.split(|&byte| byte == 0).any(|entry| entry.starts_with(b"160000 ")) {
        return Err(invalid("a checkout with submodules can't be placed in a vm yet"));
    }
    let mut plan = WorkspacePlan::default();
    let lists: [(bool, &[&str]); 2] = [
        (true, &["ls-files", "-z", "--cached"]),
        (false, &["ls-files", "-z", "--others", "--exclude-standard"]),
    ];
    for (tracked, args) in lists {
        for name in git(&top, args)?.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
            let name = OsStr::from_bytes(name);
            // Deleted in the working tree, or a directory or a link where a file or a directory is tracked.
            let Ok(found) = std::fs::symlink_metadata(top.join(name)) else { continue };
            if found.is_dir() || is_behind_link(&top, Path::new(name)) {
                continue;
            }
            if !tracked && is_secret(&top, name) {
                plan.held_back.push(name.to_owned());
            } else {
                plan.files.push((found.permissions().mode(), found.len(), name.to_owned()));
            }
        }
    }
    // An unmerged file is listed once for each stage.
    plan.files.dedup();
    Ok(plan)
}

/// To git, a name that leads through a symbolic link is one that is not there; what it shows is not the checkout's.
fn is_behind_link(top: &Path, name: &Path) -> bool {
    let parents = name.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty());
    { parents }.any(|parent| top.join(parent).is_symlink())
}

fn is_secret(top: &Path, name: &OsStr) -> bool {
    let base = Path::new(name).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let shared = SHARED_ENDINGS.iter().any(|ending| base.ends_with(ending));
    if SECRET_NAMES.contains(&base.as_str()) || (base.starts_with(".env.") && !shared) {
        return true;
    }
    let keyed = base.ends_with(".pem") || base.ends_with(".key");
    // One that can't be read may be a key as well. A link carries no key, and may lead to what never ends.
    keyed
        && !top.join(name).is_symlink()
        && std::fs::read(top.join(name))
            .map_or(true, |bytes| bytes.windows(11).any(|window| window == b"PRIVATE KEY"))
}

/// Runs git in the host's own repository, with nothing of the environment's that points it elsewhere.
#[expect(
    clippy::disallowed_methods,
    reason = "git's own answers about the checkout; no other program is started here"
)]
fn git(dir: &Path, args: &[&str]) -> Result<Vec<u8>, WireError> {
    let mut command = Command::new("git");
    for (key, _) in std::env::vars_os().filter(|(key, _)| key.as_bytes().starts_with(b"GIT_")) {
        command.env_remove(key);
    }
    command.env("GIT_OPTIONAL_LOCKS", "0").env("GIT_TERMINAL_PROMPT", "0").env("GIT_NO_LAZY_FETCH", "1");
    command.args(["--no-pager", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-C"]);
    let output =
        command.arg(dir).args(args).output().map_err(|error| failed("could not run `git`", &error))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let mut error = invalid(format!("git can't read a checkout at `{}`", dir.display()));
    error.causes.push(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    Err(error)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods, reason = "a test")]
    use super::plan;

    #[test]
    fn tracked_and_untracked_files_travel_and_secrets_stay() {
        let dir = tempfile::tempdir().unwrap();
        let script = "git init -q . && echo ignored > .gitignore && echo a > kept && echo b > gone && \
            git add . && rm gone && touch ignored new .env .env.example && echo 'PRIVATE KEY' > a.pem && \
            mkdir d && echo x > d/tracked && git add d && rm -r d && \
            mkdir real && echo x > real/tracked && ln -s real d && \
            echo public > b.pem && ln -s kept link && \
            git config core.fsmonitor \"touch $PWD/marker; false\"";
        let made = std::process::Command::new("sh").args(["-ec", script]).current_dir(dir.path()).status();
        assert!(made.unwrap().success());
        let plan = plan(dir.path()).unwrap();
        let mut names: Vec<_> = plan.files.iter().map(|file| file.2.to_str().unwrap()).collect();
        names.sort_unstable();
        assert_eq!(
            names,
            [".env.example", ".gitignore", "b.pem", "d", "kept", "link", "new", "real/tracked"]
        );
        assert_eq!(plan.held_back, [".env", "a.pem"]);
        assert!(!dir.path().join("marker").exists(), "fsmonitor ran");
    }
}
