//! A root shell on the serial console, for whoever sits there.
//!
//! The agent starts it itself and not the image's init: it is there in an image without one, and while an init is stuck.
//! There is no password, since who gets to the console can run anything in here anyway. It stays when its owner leaves,
//! as on any serial line; the next one to come finds it, or a new one when it has ended.

use crate::command::{Defaults, Prepared, prepare};
use crate::init::log;
use crate::session::spawned;
use banger_wire::exec::{ExecSpec, TerminalSize};
use rustix::fs::OFlags;
use rustix::termios::{ControlModes, InputModes, LocalModes, OptionalActions, OutputModes};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use tokio::task::JoinHandle;

/// Where the kernel names its consoles, the last of which is `/dev/console`.
const ACTIVE: &str = "/sys/class/tty/console/active";
const GREETING: &str = "banger: a root shell; it stays when you leave";

/// The console's shell.
#[derive(Debug)]
pub(crate) struct Console {
    defaults: Defaults,
    shell: Option<JoinHandle<()>>,
    /// While nobody has it open, the kernel drops what arrives.
    _open: Option<OwnedFd>,
}

impl Console {
    /// Returns a console without a shell yet. What is typed waits for it.
    pub(crate) fn new(defaults: Defaults, in_guest: bool) -> Self {
        Self { defaults, shell: None, _open: if in_guest { open().ok() } else { None } }
    }

    /// Starts the shell unless there is one, and tells it how large its terminal is.
    pub(crate) fn attach(&mut self, size: TerminalSize) {
        let is_running = self.shell.as_ref().is_some_and(|shell| !shell.is_finished());
        let attached = open().and_then(|terminal| {
            crate::session::set_size(&terminal, size);
            if !is_running {
                let mut shell = start(terminal, size, &self.defaults)?;
                // An init that shuts down waits for everything to end, and what nobody asks about has not.
                self.shell = Some(tokio::task::spawn_local(async move { drop(shell.wait().await) }));
            }
            Ok(())
        });
        if let Err(error) = attached {
            log(&format!("start a shell on the console: {error}"));
        }
    }
}

fn open() -> io::Result<OwnedFd> {
    let active = std::fs::read_to_string(ACTIVE)?;
    let name = active.split_whitespace().last().ok_or_else(|| io::Error::other("there is none"))?;
    // Blocking from the start, the open could wait for a carrier.
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let terminal = rustix::fs::open(format!("/dev/{name}"), flags, rustix::fs::Mode::empty())?;
    rustix::fs::fcntl_setfl(&terminal, OFlags::RDWR)?;
    Ok(terminal)
}

/// A terminal as a login has it, whatever was done to it before.
fn make_sane(terminal: &OwnedFd) -> io::Result<()> {
    let mut modes = rustix::termios::tcgetattr(terminal)?;
    modes.input_modes = InputModes::ICRNL | InputModes::IXON | InputModes::IUTF8;
    modes.output_modes = OutputModes::OPOST | OutputModes::ONLCR;
    modes.local_modes |= LocalModes::ISIG | LocalModes::ICANON | LocalModes::IEXTEN;
    modes.local_modes |= LocalModes::ECHO | LocalModes::ECHOE | LocalModes::ECHOK | LocalModes::ECHOCTL;
    modes.control_modes |= ControlModes::CREAD | ControlModes::CLOCAL;
    Ok(rustix::termios::tcsetattr(terminal, OptionalActions::Now, &modes)?)
}

fn start(terminal: OwnedFd, size: TerminalSize, defaults: &Defaults) -> io::Result<tokio::process::Child> {
    make_sane(&terminal)?;
    let spec = ExecSpec { user: Some("root".to_owned()), tty: Some(size), ..ExecSpec::default() };
    let prepared = prepare(&spec, defaults);
    let line = match &prepared {
        Ok(_) => GREETING,
        Err(error) => &format!("banger: {}", error.message.escape_debug()),
    };
    let mut tell = std::fs::File::from(terminal.try_clone()?);
    writeln!(tell, "\n{line}")?;
    let Prepared { mut command, identity } = prepared.map_err(|error| io::Error::other(error.message))?;
    command.stdin(terminal.try_clone()?).stdout(terminal.try_clone()?).stderr(terminal.try_clone()?);
    banger_sys::child::new_session(&mut command, Some(identity), Some(terminal));
    Ok(spawned(command)?.0)
}
