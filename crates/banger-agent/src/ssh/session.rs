//! A session: a command, a shell or the file server, as `sshd` would run it.

use super::fields::{Fields, Packet};
use super::forward::Listening;
use super::stream::{self, Ends, Event, Events, Grant};
use super::terminal::{Terminal, parse_size};
use super::{SFTP_ARGUMENT, SFTP_NAME};
use crate::command::{Defaults, login_shell, prepare};
use crate::session::{DRAIN_IDLE, Started, TTY_EOF, exit_status, set_size, start_prepared};
use crate::users::User;
use banger_wire::bytes::ByteString;
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::{ExecSpec, ExitStatus};
use rustix::process::{Pid, Signal, kill_process_group};
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use tokio::sync::mpsc;

const CHANNEL_EOF: u8 = 96;
const CHANNEL_REQUEST: u8 = 98;
/// Variables a client may give, and the bytes of all of them: what a kernel takes for a program is 128 KiB each.
const ENV_MAX: usize = 256;
const ENV_LEN_MAX: usize = 256 * 1024;
/// What a connection is called that has no address; OpenSSH has the same.
const NO_ADDRESS: &str = "UNKNOWN 65535 UNKNOWN 65535";
/// Names of signals (RFC 4254, section 6.10).
const SIGNALS: [(&str, Signal); 13] = [
    ("ABRT", Signal::ABORT),
    ("ALRM", Signal::ALARM),
    ("FPE", Signal::FPE),
    ("HUP", Signal::HUP),
    ("ILL", Signal::ILL),
    ("INT", Signal::INT),
    ("KILL", Signal::KILL),
    ("PIPE", Signal::PIPE),
    ("QUIT", Signal::QUIT),
    ("SEGV", Signal::SEGV),
    ("TERM", Signal::TERM),
    ("USR1", Signal::USR1),
    ("USR2", Signal::USR2),
];

/// What a session runs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Program {
    Shell,
    Command(Vec<u8>),
    Files,
}

/// A session's settings, and what runs in it.
#[derive(Debug, Default)]
pub(crate) struct Session {
    env: Vec<(ByteString, ByteString)>,
    terminal: Option<Terminal>,
    running: Option<Running>,
    /// Where its programs find the client's agent.
    pub(crate) agent: Option<(Listening, PathBuf)>,
}

#[derive(Debug)]
struct Running {
    /// None once it has ended: its number may be another's then.
    pid: Rc<Cell<Option<Pid>>>,
    terminal: Option<OwnedFd>,
}

/// What a task needs to speak for a channel.
#[derive(Debug, Clone)]
pub(crate) struct Voice {
    pub(crate) ends: Ends,
    pub(crate) grant: Rc<Grant>,
    pub(crate) events: Events,
}

impl Voice {
    async fn say(&self, packet: Packet) {
        let _ = self.events.send(Event::Send { channel: self.ends.local, packet }).await;
    }
}

impl Session {
    /// Returns true when there was a program already.
    pub(crate) fn has_begun(&self) -> bool {
        self.running.is_some()
    }

    pub(crate) fn set_env(&mut self, fields: &mut Fields<'_>) -> Option<()> {
        let (name, value) = (fields.bytes()?, fields.bytes()?);
        let len: usize = self.env.iter().map(|(name, value)| name.0.len() + value.0.len()).sum();
        let has_room = self.env.len() < ENV_MAX && len + name.len() + value.len() <= ENV_LEN_MAX;
        has_room.then(|| self.env.push((ByteString(name.to_vec()), ByteString(value.to_vec()))))
    }

    pub(crate) fn set_terminal(&mut self, fields: &mut Fields<'_>) -> Option<()> {
        self.terminal = Some(Terminal::parse(fields)?);
        Some(())
    }

    pub(crate) fn resize(&self, fields: &mut Fields<'_>) -> Option<()> {
        let size = parse_size(fields)?;
        set_size(self.running.as_ref()?.terminal.as_ref()?, size);
        Some(())
    }

    pub(crate) fn signal(&self, fields: &mut Fields<'_>) -> Option<()> {
        let name = fields.text()?;
        let (_, signal) = SIGNALS.iter().find(|(known, _)| *known == name)?;
        kill_process_group(self.running.as_ref()?.pid.get()?, *signal).ok()
    }

    /// The client is gone, or has closed the session: hangs up, as a terminal would. What was started to outlive that
    /// does so.
    pub(crate) fn end(&mut self) {
        if let Some(pid) = self.running.take().and_then(|running| running.pid.get()) {
            let _ = kill_process_group(pid, Signal::HUP);
            let _ = kill_process_group(pid, Signal::CONT);
        }
        self.agent = None;
    }

    /// Starts the program; its streams are the channel's from then on. One that can't be started is explained there.
    pub(crate) fn start(
        &mut self,
        program: &Program,
        (user, defaults): (&User, &Defaults),
        input: mpsc::UnboundedReceiver<Vec<u8>>,
        voice: Voice,
    ) -> tokio::task::AbortHandle {
        let task = match self.try_start(program, user, defaults) {
            Ok(started) => {
                let terminal = started.terminal.as_ref().and_then(|terminal| terminal.try_clone().ok());
                let pid = Rc::new(Cell::new(Some(started.pid)));
                self.running = Some(Running { pid: Rc::clone(&pid), terminal });
                tokio::task::spawn_local(follow(started, pid, input, voice))
            }
            Err(error) => tokio::task::spawn_local(explain(error, voice)),
        };
        task.abort_handle()
    }

    fn try_start(&self, program: &Program, user: &User, defaults: &Defaults) -> Result<Started, WireError> {
        let terminal = self.terminal.as_ref().filter(|_| *program != Program::Files);
        let home = ByteString(user.home.clone().into_bytes());
        let spec = ExecSpec {
            argv: argv(program, user)?,
            env: self.environment(terminal.is_some()),
            workdir: Some(home).filter(|home| Path::new(home.as_os_str()).is_dir()),
            user: Some(user.name.clone()),
            tty: terminal.map(|terminal| terminal.size),
            term: terminal.map(|terminal| terminal.name.clone()),
            ..ExecSpec::default()
        };
        let mut prepared = prepare(&spec, defaults)?;
        // Who this process is, its programs are.
        prepared.identity = user.identity.clone();
        if *program == Program::Files {
            prepared.command.arg0(SFTP_NAME);
        }
        let started = start_prepared(prepared, spec.tty)?;
        if let (Some(terminal), Some(fd)) = (terminal, &started.terminal) {
            terminal.apply(fd);
        }
        Ok(started)
    }

    fn environment(&self, has_terminal: bool) -> Vec<(ByteString, ByteString)> {
        let mut env = self.env.clone();
        env.push(("SSH_CONNECTION".into(), NO_ADDRESS.into()));
        env.push(("SSH_CLIENT".into(), "UNKNOWN 65535 65535".into()));
        if has_terminal {
            // Which one it is, only the program itself can say; that there is one is what matters to programs.
            env.push(("SSH_TTY".into(), "/dev/tty".into()));
        }
        if let Some((_, path)) = &self.agent {
            env.push(("SSH_AUTH_SOCK".into(), path.as_os_str().to_owned().into()));
        }
        env
    }
}

/// The words of a program. Commands are the shell's to understand; without one, plain words are words.
fn argv(program: &Program, user: &User) -> Result<Vec<ByteString>, WireError> {
    let command = match program {
        Program::Shell => return Ok(Vec::new()),
        Program::Files => return Ok(vec!["/proc/self/exe".into(), SFTP_ARGUMENT.into()]),
        Program::Command(command) => command,
    };
    match login_shell(user) {
        Ok(shell) => {
            let is_multi = shell.file_name().is_some_and(|name| name == "busybox");
            let mut argv = vec![ByteString::from(shell.into_os_string())];
            argv.extend(is_multi.then(|| "sh".into()));
            argv.extend(["-c".into(), ByteString(command.clone())]);
            Ok(argv)
        }
        Err(error) => plain_words(command).ok_or_else(|| {
            WireError {
                code: error.code,
                ..WireError::new(error.code, "this image has no shell to understand the command")
            }
            .hinted("without one, only plain words work, such as `/program --flag value`")
        }),
    }
}

/// Splits a command as a shell would that finds nothing special in it; none when it would.
fn plain_words(command: &[u8]) -> Option<Vec<ByteString>> {
    let is_plain =
        |byte: &u8| byte.is_ascii_alphanumeric() || b" _-./:=,+@%^".contains(byte) || *byte >= 0x80;
    let words: Vec<ByteString> = command
        .split(|&byte| byte == b' ')
        .filter(|word| !word.is_empty())
        .map(|word| ByteString(word.to_vec()))
        .collect();
    // A first word with `=` would be a variable.
    let is_program = words.first().is_some_and(|first| !first.0.contains(&b'='));
    (is_program && command.iter().all(is_plain)).then_some(words)
}

/// Carries the streams to the program's end, and says how it ended.
async fn follow(
    mut started: Started,
    pid: Rc<Cell<Option<Pid>>>,
    input: mpsc::UnboundedReceiver<Vec<u8>>,
    voice: Voice,
) {
    let mut pumps = tokio::task::JoinSet::new();
    for (channel, reader) in std::mem::take(&mut started.outputs) {
        let kind = (channel == banger_wire::exec::STDERR).then_some(stream::STDERR);
        let (grant, events) = (Rc::clone(&voice.grant), voice.events.clone());
        pumps.spawn_local(stream::pump(reader, voice.ends, kind, grant, events));
    }
    let last = if started.terminal.is_some() { TTY_EOF } else { &[] };
    let mut feeder = tokio::task::JoinSet::new();
    feeder.spawn_local(stream::feed(started.stdin, input, voice.ends.local, voice.events.clone(), last));
    let status = started.child.wait().await;
    pid.set(None);
    drain(&mut pumps, &voice.grant).await;
    let packet = match status.map(exit_status) {
        Ok(ExitStatus::Signal(number)) => died(voice.ends.remote, number),
        Ok(ExitStatus::Code(code)) => exited(voice.ends.remote, code.into()),
        Err(_) => exited(voice.ends.remote, u32::from(u8::MAX)),
    };
    voice.say(packet).await;
    end(&voice).await;
}

/// Waits until all output was sent. A process left in the background that keeps the pipes open is waited for only while
/// it still writes.
async fn drain(pumps: &mut tokio::task::JoinSet<()>, grant: &Grant) {
    let mut before = grant.progress().0;
    let mut idle = tokio::time::interval_at(tokio::time::Instant::now() + DRAIN_IDLE, DRAIN_IDLE);
    loop {
        tokio::select! {
            ended = pumps.join_next() => if ended.is_none() { return },
            _ = idle.tick() => {
                let (now, is_waiting) = grant.progress();
                if now == before && !is_waiting {
                    pumps.abort_all();
                }
                before = now;
            }
        }
    }
}

async fn end(voice: &Voice) {
    voice.say(Packet::new(CHANNEL_EOF).number(voice.ends.remote)).await;
    let _ = voice.events.send(Event::Ended { channel: voice.ends.local }).await;
}

/// Says on standard error why there is no program.
async fn explain(error: WireError, voice: Voice) {
    let status = match error.code {
        ErrorCode::CommandNotFound => 127,
        ErrorCode::CommandNotExecutable => 126,
        _ => 125,
    };
    let mut text = format!("banger: {}\n", error.message);
    error.causes.iter().for_each(|cause| text.push_str(&format!("  caused by: {cause}\n")));
    error.hint.iter().for_each(|hint| text.push_str(&format!("hint: {hint}\n")));
    stream::send(text.as_bytes(), voice.ends, Some(stream::STDERR), &voice.grant, &voice.events).await;
    voice.say(exited(voice.ends.remote, status)).await;
    end(&voice).await;
}

fn exited(remote: u32, status: u32) -> Packet {
    Packet::new(CHANNEL_REQUEST).number(remote).bytes("exit-status").flag(false).number(status)
}

fn died(remote: u32, number: i32) -> Packet {
    let known = SIGNALS.iter().find(|(_, signal)| signal.as_raw() == number);
    let name = known.map_or_else(|| format!("{number}@banger"), |(name, _)| (*name).to_owned());
    Packet::new(CHANNEL_REQUEST)
        .number(remote)
        .bytes("exit-signal")
        .flag(false)
        .bytes(name)
        .flag(false)
        .bytes("")
        .bytes("")
}

#[cfg(test)]
mod tests {
    use super::plain_words;

    #[test]
    fn only_what_a_shell_would_not_touch_is_words() {
        let words = |command: &str| plain_words(command.as_bytes()).map(|words| words.len());
        assert_eq!(words("/hello --a=b  1.5"), Some(3));
        assert_eq!(words("/naïve"), Some(1));
        for special in [
            "", "  ", "a; b", "a 'b c'", "$HOME", "a > b", "~/x", "a*", "a\nb", "a\tb", "a\\b", "a # b",
            "a {1,2}", "A=1 b",
        ] {
            assert_eq!(words(special), None, "{special}");
        }
    }
}
