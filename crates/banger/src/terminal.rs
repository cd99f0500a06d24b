//! The user's terminal: its size, and raw mode while a session has it.

use banger_wire::exec::TerminalSize;
use rustix::stdio::{stderr, stdin, stdout};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use std::sync::Mutex;

/// What a session gets when no descriptor is a terminal, and when one does not know its size.
const SIZE_DEFAULT: TerminalSize = TerminalSize { rows: 24, cols: 80 };

/// The settings to go back to while raw mode is on. Static because a panic's hook has to find them.
static COOKED: Mutex<Option<Termios>> = Mutex::new(None);

/// Returns true when stdin is a terminal.
pub(crate) fn stdin_is_terminal() -> bool {
    isatty(stdin())
}

/// Returns true when stdout is a terminal.
pub(crate) fn stdout_is_terminal() -> bool {
    isatty(stdout())
}

/// Returns the size of the first standard stream that is a terminal.
pub(crate) fn size() -> TerminalSize {
    [stdout(), stdin(), stderr()]
        .into_iter()
        .find_map(|fd| tcgetwinsize(fd).ok())
        .filter(|size| size.ws_row > 0 && size.ws_col > 0)
        .map_or(SIZE_DEFAULT, |size| TerminalSize { rows: size.ws_row, cols: size.ws_col })
}

/// Raw mode of the terminal on stdin, until dropped.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl RawMode {
    /// Turns raw mode on; none when stdin is no terminal.
    pub(crate) fn enter() -> Option<Self> {
        let cooked = tcgetattr(stdin()).ok()?;
        let mut raw = cooked.clone();
        raw.make_raw();
        if let Ok(mut saved) = COOKED.lock() {
            *saved = Some(cooked);
        }
        tcsetattr(stdin(), OptionalActions::Drain, &raw).ok()?;
        Some(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Goes back to the settings from before raw mode, if it is on.
pub(crate) fn restore() {
    if let Ok(mut saved) = COOKED.try_lock()
        && let Some(cooked) = saved.take()
    {
        let _ = tcsetattr(stdin(), OptionalActions::Drain, &cooked);
    }
}
