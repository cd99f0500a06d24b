//! Starting the daemon: the one place of this program where a process is made, besides git's in `workspace`.
//!
//! `bangerd` must outlive the terminal, so it gets a session of its own. A process can't get that from its parent
//! without code between fork and exec, so banger starts itself once more, and that process
//! ([`detach`]) leaves the session and becomes `bangerd serve`.
//!
//! The daemon's stdout is a pipe on which it says `ready` once it listens, or what went wrong.

use crate::paths::{STATE_DIR_VARIABLE, StateDir};
use crate::stop::failed;
use crate::text::duration;
use banger_wire::error::{ErrorCode, WireError};
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tokio::io::AsyncReadExt as _;

/// Name of the daemon's program.
const PROGRAM: &str = "bangerd";
/// How long a daemon may take to listen. It reconciles all vms first, which reads a few files each.
const START_TIME_MAX: Duration = Duration::from_secs(60);
/// What a starting daemon may say: one error with its causes.
const ANSWER_LEN_MAX: usize = 64 * 1024;
/// What it says once it listens.
const READY: &[u8] = b"ready\n";

/// Longest log that a starting daemon adds to, in bytes. A longer one is kept beside it, once.
const LOG_LEN_MAX: u64 = 4 << 20;

/// Starts the daemon and returns once it listens.
///
/// # Errors
/// When there is no `bangerd`, or it says why it can't start, or nothing in time.
pub(crate) async fn start(state: &StateDir) -> Result<(), WireError> {
    let program = find_program()?;
    state.ensure()?;
    let answers = spawn(&program, state)?;
    let said = tokio::time::timeout(START_TIME_MAX, read_answers(answers)).await;
    match said {
        Ok(Ok(text)) => interpret(&text, state),
        Ok(Err(error)) => Err(failed("could not read what bangerd says", &error)),
        Err(_) => Err(did_not_start(state, &format!("nothing heard of it for {}", duration(START_TIME_MAX)))),
    }
}

/// Reads until the daemon is ready, or has nothing more to say.
async fn read_answers(pipe: OwnedFd) -> std::io::Result<String> {
    let mut pipe = tokio::net::unix::pipe::Receiver::from_owned_fd(pipe)?;
    let mut text = Vec::new();
    while text.len() < ANSWER_LEN_MAX && !text.starts_with(READY) {
        if pipe.read_buf(&mut text).await? == 0 {
            break;
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Becomes the daemon, in a session of its own.
///
/// # Errors
/// When the program can't be executed; otherwise this does not return.
pub(crate) fn detach(program: &Path) -> WireError {
    // Fails only for the leader of a process group, whose signals are its own already.
    let _ = rustix::process::setsid();
    let error = command(program).args(["serve", "--ready-fd", "1"]).exec();
    failed(format!("could not start `{}`", program.display()), &error)
}

#[allow(clippy::disallowed_methods, reason = "the daemon has to be started by somebody; see the module")]
fn command(program: &Path) -> Command {
    Command::new(program)
}

fn spawn(program: &Path, state: &StateDir) -> Result<OwnedFd, WireError> {
    let error = |error: std::io::Error| failed(format!("could not start `{}`", program.display()), &error);
    let log_error =
        |error: std::io::Error| failed(format!("could not open `{}`", state.log().display()), &error);
    rotate(&state.log());
    let log = OpenOptions::new().append(true).create(true).mode(0o600).open(state.log());
    let (answers, stdout) = std::io::pipe().map_err(error)?;
    let mut command = command(Path::new("/proc/self/exe"));
    command.args(["daemon", "detach"]).arg(program).current_dir("/");
    command.stdin(Stdio::null()).stdout(stdout).stderr(log.map_err(log_error)?);
    if std::env::var_os(STATE_DIR_VARIABLE).is_some() {
        // What the user gave may be relative to a directory the daemon is not in.
        command.env(STATE_DIR_VARIABLE, state.path());
    }
    command.spawn().map_err(error)?;
    Ok(answers.into())
}

/// Puts a log that has become long aside, where it takes the place of the one before.
fn rotate(log: &Path) {
    if std::fs::metadata(log).is_ok_and(|log| log.len() > LOG_LEN_MAX) {
        // One that can't be put aside goes on.
        let _ = std::fs::rename(log, log.with_extension("log.1"));
    }
}

fn find_program() -> Result<PathBuf, WireError> {
    let beside = std::env::current_exe().ok().map(|exe| exe.with_file_name(PROGRAM));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let searched = std::env::split_paths(&path).filter(|dir| dir.is_absolute()).map(|dir| dir.join(PROGRAM));
    beside.into_iter().chain(searched).find(|file| is_program(file)).ok_or_else(|| {
        WireError::new(ErrorCode::Failed, "could not find `bangerd`, banger's daemon")
            .hinted("install it beside `banger`, or in a directory of `PATH`")
    })
}

fn is_program(file: &Path) -> bool {
    std::fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn interpret(answers: &str, state: &StateDir) -> Result<(), WireError> {
    for line in answers.lines() {
        if line == "ready" {
            return Ok(());
        }
        let json = line.strip_prefix("error:").unwrap_or(line).trim_start();
        if let Ok(error) = serde_json::from_str::<WireError>(json) {
            return Err(error);
        }
    }
    let said = answers.lines().next_back().unwrap_or("it ended without saying why");
    Err(did_not_start(state, said))
}

fn did_not_start(state: &StateDir, cause: &str) -> WireError {
    let mut error = WireError::new(ErrorCode::Failed, "bangerd did not start");
    error.causes.push(cause.to_owned());
    error.hinted(format!("its log is `{}`", state.log().display()))
}

#[cfg(test)]
mod tests {
    use super::{LOG_LEN_MAX, rotate};

    #[test]
    fn a_long_log_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let (log, aside) = (dir.path().join("bangerd.log"), dir.path().join("bangerd.log.1"));
        rotate(&log);
        for (len, remains) in [(LOG_LEN_MAX, true), (LOG_LEN_MAX + 1, false)] {
            let file = std::fs::File::create(&log).unwrap();
            file.set_len(len).unwrap();
            rotate(&log);
            assert_eq!((log.exists(), aside.exists()), (remains, !remains));
        }
    }
}
