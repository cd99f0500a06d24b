//! From an [`ExecSpec`] to a command ready to start: user, environment, directory, program.

use crate::users;
use banger_wire::bytes::ByteString;
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::ExecSpec;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Tried in order when the user's entry names no shell that exists.
const SHELLS: [&str; 4] = ["/bin/bash", "/bin/sh", "/bin/ash", "/bin/busybox"];

/// What every session of this vm starts from.
#[derive(Debug, Clone, Default)]
pub(crate) struct Defaults {
    pub(crate) env: Vec<(ByteString, ByteString)>,
    pub(crate) workdir: Option<ByteString>,
    pub(crate) user: Option<String>,
    /// Whether this is a vm, and not a test of the agent outside of one.
    pub(crate) in_guest: bool,
    /// The device that holds its image, and the filesystem's type.
    pub(crate) image: Option<(String, String)>,
}

/// A command and who it runs as; the caller adds streams and starts it.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) command: Command,
    pub(crate) identity: banger_sys::child::Identity,
}

/// Decides everything about a command, looking only at files below the current root.
///
/// # Errors
/// With the code a client turns into 125, 126 or 127.
pub(crate) fn prepare(spec: &ExecSpec, defaults: &Defaults) -> Result<Prepared, WireError> {
    let failed = |message: String| WireError::new(ErrorCode::Failed, message);
    let wanted = spec.user.as_deref().or(defaults.user.as_deref()).filter(|user| !user.is_empty());
    let user = users::find(Path::new("/"), wanted.unwrap_or("root")).map_err(failed)?;
    let env = environment(spec, defaults, &user);
    let (program, argv) = if spec.argv.is_empty() {
        let shell = login_shell(&user)?;
        let name = shell.file_name().map_or_else(OsString::new, OsString::from);
        let mut argv0 = OsString::from("-");
        argv0.push(&name);
        // A multi-call binary finds the shell in it by this name.
        let argv0 = if name == "busybox" { OsString::from("-sh") } else { argv0 };
        (shell, vec![argv0])
    } else {
        let argv: Vec<OsString> = spec.argv.iter().map(|arg| OsString::from_vec(arg.0.clone())).collect();
        if argv.iter().any(|arg| arg.as_encoded_bytes().contains(&0)) {
            return Err(failed("an argument contains a NUL byte".to_owned()));
        }
        (PathBuf::new(), argv)
    };
    let workdir = workdir(spec, defaults, &user)?;
    let program = if program.as_os_str().is_empty() { look_up(&argv[0], &env, &workdir)? } else { program };
    let mut command = banger_sys::child::command(program.as_os_str());
    command.arg0(&argv[0]).args(&argv[1..]).env_clear().envs(&env).current_dir(&workdir);
    Ok(Prepared { command, identity: user.identity })
}

fn environment(spec: &ExecSpec, defaults: &Defaults, user: &users::User) -> BTreeMap<OsString, OsString> {
    let mut env: BTreeMap<OsString, OsString> = [
        ("PATH", PATH_DEFAULT),
        ("HOME", user.home.as_str()),
        ("USER", user.name.as_str()),
        ("LOGNAME", user.name.as_str()),
        ("LANG", "C.UTF-8"),
    ]
    .into_iter()
    .map(|(key, value)| (key.into(), value.into()))
    .collect();
    if !user.shell.is_empty() {
        env.insert("SHELL".into(), user.shell.clone().into());
    }
    if spec.tty.is_some() {
        env.insert("TERM".into(), spec.term.clone().unwrap_or_else(|| "xterm-256color".to_owned()).into());
    }
    for (key, value) in defaults.env.iter().chain(&spec.env) {
        let sound =
            !key.0.is_empty() && !key.0.contains(&b'=') && !key.0.contains(&0) && !value.0.contains(&0);
        if sound {
            env.insert(OsString::from_vec(key.0.clone()), OsString::from_vec(value.0.clone()));
        }
    }
    env
}

/// Returns the user's shell, or another the image has.
///
/// # Errors
/// When it has none.
pub(crate) fn login_shell(user: &users::User) -> Result<PathBuf, WireError> {
    let candidates = std::iter::once(user.shell.as_str()).chain(SHELLS);
    candidates
        .filter(|path| path.starts_with('/'))
        .map(PathBuf::from)
        .find(|path| is_executable(path) == Some(true))
        .ok_or_else(|| {
            WireError::new(ErrorCode::CommandNotFound, "this image has no shell")
                .hinted("name a program of the image after `--`")
        })
}

/// A directory that was asked for must exist; the defaults fall back to `/` when they can't be entered.
fn workdir(spec: &ExecSpec, defaults: &Defaults, user: &users::User) -> Result<PathBuf, WireError> {
    if let Some(asked) = &spec.workdir {
        let path = PathBuf::from(asked.as_os_str());
        if !path.is_dir() {
            let message =
                format!("no directory `{}` in the guest", path.display().to_string().escape_debug());
            return Err(WireError::new(ErrorCode::Failed, message));
        }
        return Ok(path);
    }
    let workspace = spec.workspace.as_ref().map(|path| PathBuf::from(path.as_os_str()));
    let image = defaults.workdir.as_ref().map(|path| PathBuf::from(path.as_os_str()));
    let usable = |path: &PathBuf| {
        path.is_absolute() && path.is_dir() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
    };
    let found = workspace.into_iter().chain(image).chain([PathBuf::from(&user.home)]).find(usable);
    Ok(found.unwrap_or_else(|| PathBuf::from("/")))
}

/// The search `execvp` makes, done here so that "not found" and "not executable" are told apart before a fork.
fn look_up(
    name: &OsString,
    env: &BTreeMap<OsString, OsString>,
    workdir: &Path,
) -> Result<PathBuf, WireError> {
    let shown = name.to_string_lossy();
    let shown = shown.escape_debug();
    let mut denied = false;
    let path = env.get(std::ffi::OsStr::new("PATH")).cloned().unwrap_or_default();
    let candidates: Vec<PathBuf> = if name.as_encoded_bytes().contains(&b'/') {
        vec![workdir.join(name)]
    } else {
        std::env::split_paths(&path).map(|dir| workdir.join(dir).join(name)).collect()
    };
    if !name.is_empty() {
        for candidate in candidates {
            match is_executable(&candidate) {
                Some(true) => return Ok(candidate),
                Some(false) => denied = true,
                None => {}
            }
        }
    }
    Err(if denied {
        WireError::new(ErrorCode::CommandNotExecutable, format!("`{shown}` is not executable in the guest"))
    } else {
        WireError::new(ErrorCode::CommandNotFound, format!("`{shown}` was not found in the guest"))
    })
}

/// None when there is nothing of that name.
fn is_executable(path: &Path) -> Option<bool> {
    use std::os::unix::fs::PermissionsExt as _;
    let metadata = std::fs::metadata(path).ok()?;
    Some(metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}
