//! Whether `ssh-config --install` still does what it did: `doctor`'s check of it, which only a client can make.

use super::config::{block, find, our_file, read, render, take_out};
use super::keys::{Keys, check_chosen};
use super::{DOMAIN, chosen_key, options};
use crate::context::Context;
use crate::paths::StateDir;
use crate::stop::Stop;
use banger_wire::doctor::{Check, Verdict};
use banger_wire::error::WireError;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

const INSTALL: &str = "banger ssh-config --install";
/// Rights with which OpenSSH takes a file of settings for somebody else's.
const WRITABLE: u32 = 0o022;

/// Checks what the owner's `~/.ssh/config` has of banger's.
///
/// # Errors
/// Those of a signal; everything else is the check's own.
pub(crate) async fn check(context: &mut Context) -> Result<Check, Stop> {
    let state = context.client.state().clone();
    let home = std::env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    let installed = match home.as_deref().map(installed).transpose() {
        Ok(installed) => installed.flatten(),
        Err(error) => return Ok(told(Err(Problem::of(&error, "banger ssh-config --help")))),
    };
    let Some(installed) = installed else { return Ok(told(Ok(None))) };
    let chosen = match chosen_key(context).await {
        Ok(chosen) => chosen,
        Err(Stop::Failed(error)) => return Ok(told(Err(Problem::of(&error, "banger config show")))),
        Err(stop) => return Err(stop),
    };
    Ok(told(judge(&installed, &state, chosen).map(|()| Some(installed.file))))
}

/// Why names of vms are no hosts for `ssh`, although that was asked for, and what mends it.
#[derive(Debug)]
struct Problem {
    what: String,
    hint: String,
}

impl Problem {
    fn new(what: String, hint: impl Into<String>) -> Self {
        Self { what, hint: hint.into() }
    }

    /// The same of an error, with a hint where that has none.
    fn of(error: &WireError, hint: &str) -> Self {
        let causes = std::iter::once(&error.message).chain(&error.causes).cloned().collect::<Vec<_>>();
        Self::new(causes.join(": "), error.hint.as_deref().unwrap_or(hint))
    }
}

fn told(judged: Result<Option<PathBuf>, Problem>) -> Check {
    let (verdict, detail, hint) = match judged {
        Ok(Some(file)) => (Verdict::Pass, format!("`{}` makes `NAME{DOMAIN}` a host", file.display()), None),
        Ok(None) => (Verdict::Pass, format!("not installed; `{INSTALL}` makes `NAME{DOMAIN}` a host"), None),
        Err(Problem { what, hint }) => {
            (Verdict::Warn, format!("`NAME{DOMAIN}` may be no host for `ssh`: {what}"), Some(hint))
        }
    };
    Check { name: "ssh include".to_owned(), verdict, detail, hint }
}

/// A file of the owner's that has banger's lines in it.
#[derive(Debug)]
struct Installed {
    file: PathBuf,
    bytes: Vec<u8>,
    made: &'static str,
}

/// Looks for banger's lines; none where they were never put in, or taken out again.
fn installed(home: &Path) -> Result<Option<Installed>, WireError> {
    let file = find(&home.join(".ssh/config"))?;
    let Some(bytes) = read(&file)? else { return Ok(None) };
    let (made, _) = take_out(&bytes, &file)?;
    Ok(made.map(|made| Installed { file, bytes, made }))
}

fn judge(installed: &Installed, state: &StateDir, chosen: Option<PathBuf>) -> Result<(), Problem> {
    let Installed { file, bytes, made } = installed;
    let ours = our_file(state);
    let failed = |error: WireError| Problem::of(&error, INSTALL);
    accepted(file)?;
    let block = block(made, state).map_err(failed)?;
    let block = block.trim_end().as_bytes();
    let Some(begin) = bytes.windows(block.len()).position(|part| part == block) else {
        let what = format!("banger's lines in `{}` do not include `{}`", file.display(), ours.display());
        return Err(Problem::new(what, INSTALL));
    };
    if bytes[..begin].split(|&byte| byte == b'\n').any(begins_section) {
        let what = format!(
            "banger's lines in `{}` stand below a `Host` or `Match`, which they are part of",
            file.display()
        );
        return Err(Problem::new(what, INSTALL));
    }
    if let Some(chosen) = &chosen {
        check_chosen(chosen).map_err(failed)?;
    }
    let now = match std::fs::read(&ours) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(Problem::new(
                format!("`{}`, which is included, is not there", ours.display()),
                INSTALL,
            ));
        }
        read => read.map_err(|error| Problem::new(format!("`{}`: {error}", ours.display()), INSTALL))?,
    };
    accepted(&ours)?;
    let wanted = render(&options::pinned(&Keys::named(state, chosen), state, "%h").map_err(failed)?);
    if now != wanted.as_bytes() {
        let what = format!("`{}` is of another banger, or of other settings", ours.display());
        return Err(Problem::new(what, INSTALL));
    }
    Ok(())
}

/// OpenSSH stops at settings that somebody else may have written.
fn accepted(file: &Path) -> Result<(), Problem> {
    let shown = file.display();
    let metadata =
        std::fs::metadata(file).map_err(|error| Problem::new(format!("`{shown}`: {error}"), INSTALL))?;
    if ![0, rustix::process::getuid().as_raw()].contains(&metadata.uid()) {
        let what = format!("`ssh` refuses `{shown}`, which is another user's");
        return Err(Problem::new(what, format!("sudo chown \"$(id -u)\" {shown}")));
    }
    if metadata.mode() & WRITABLE != 0 {
        let what = format!(
            "`ssh` refuses `{shown}`, which others may write to: its mode is {:o}",
            metadata.mode() & 0o777
        );
        return Err(Problem::new(what, format!("chmod go-w {shown}")));
    }
    Ok(())
}

/// Returns true for a line from which on settings are for some hosts only.
fn begins_section(line: &[u8]) -> bool {
    let line = line.trim_ascii_start();
    let word = line.split(|byte| byte.is_ascii_whitespace() || *byte == b'=').next().unwrap_or_default();
    word.eq_ignore_ascii_case(b"host") || word.eq_ignore_ascii_case(b"match")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ssh::config::{install, uninstall};
    use crate::ssh::keys::dir_of;
    use std::fs::{Permissions, set_permissions};
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn what_was_installed_has_to_work_still() {
        let dir = tempfile::tempdir().unwrap();
        let (home, state) = (dir.path(), StateDir::at(&dir.path().join("state")));
        std::fs::create_dir_all(dir_of(&state)).unwrap();
        let text = || render(&options::pinned(&Keys::named(&state, None), &state, "%h").unwrap());
        let install = || install(home, &state, &text()).unwrap();
        let shown = |chosen: Option<&str>| {
            let judged = match installed(home) {
                Ok(Some(found)) => {
                    judge(&found, &state, chosen.map(PathBuf::from)).map(|()| Some(found.file))
                }
                Ok(None) => Ok(None),
                Err(error) => Err(Problem::of(&error, "banger ssh-config --help")),
            };
            let Check { name, verdict, detail, hint } = told(judged);
            let hint = hint.map(|hint| format!("\n  hint: {hint}")).unwrap_or_default();
            format!("{verdict:?} {name}: {detail}{hint}\n").replace(home.to_str().unwrap(), "~")
        };
        let mut all = shown(None);
        install();
        all += &shown(None);
        let config = home.join(".ssh/config");
        // What is not banger's does not matter, where it does not matter to the lines.
        let own = std::fs::read_to_string(&config).unwrap();
        std::fs::write(&config, format!("# Host\nUser me\n{own}Host a\n")).unwrap();
        all += &shown(None);
        std::fs::write(&config, format!("\tHOST=a\n  User me\n{own}")).unwrap();
        all += &shown(None);
        std::fs::write(&config, own.replace("/state/", "/other/")).unwrap();
        all += &shown(None);
        std::fs::write(&config, own.replace("# <<< banger <<<", "")).unwrap();
        all += &shown(None);
        std::fs::write(&config, &own).unwrap();
        set_permissions(&config, Permissions::from_mode(0o664)).unwrap();
        all += &shown(None);
        set_permissions(&config, Permissions::from_mode(0o644)).unwrap();
        set_permissions(our_file(&state), Permissions::from_mode(0o666)).unwrap();
        all += &shown(None);
        std::fs::write(our_file(&state), text().replace("Port 22", "Port 2222")).unwrap();
        set_permissions(our_file(&state), Permissions::from_mode(0o600)).unwrap();
        all += &shown(None);
        std::fs::remove_file(our_file(&state)).unwrap();
        all += &shown(None);
        all += &shown(Some("/no/such/key"));
        install();
        all += &shown(None);
        uninstall(home, &state).unwrap();
        all += &shown(None);
        insta::assert_snapshot!(all);
    }
}
