//! Everything that is printed.
//!
//! Stdout is data, stderr is everything else. Colour only on a terminal and without `NO_COLOR`; every text that
//! came over a connection is escaped here or in [`crate::table`].

use crate::stop::{Stop, failed};
use crate::text::{escape, escape_json, escape_lines};
use banger_wire::doctor::{Check, SetupItem, SetupState, Verdict};
use banger_wire::error::WireError;
use std::io::{ErrorKind, IsTerminal as _, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};

const RED: &str = "31;1";
const YELLOW: &str = "33";
const GREEN: &str = "32";
const BOLD: &str = "1";
/// Columns assumed when the terminal does not say.
const COLUMNS_DEFAULT: usize = 80;

/// Where text goes and how it looks there.
#[derive(Debug)]
pub(crate) struct Ui {
    verbose: bool,
    stderr_terminal: bool,
    colour_out: bool,
    colour_err: bool,
    /// True while a progress line stands on stderr without its line break.
    line_open: AtomicBool,
}

impl Ui {
    /// Returns the printer for this process.
    pub(crate) fn new(verbose: bool) -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let colour = !dumb && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let stderr_terminal = std::io::stderr().is_terminal();
        Self {
            verbose,
            stderr_terminal: stderr_terminal && !dumb,
            colour_out: colour && std::io::stdout().is_terminal(),
            colour_err: colour && stderr_terminal,
            line_open: AtomicBool::new(false),
        }
    }

    /// Returns true when `-v` was given.
    pub(crate) fn is_verbose(&self) -> bool {
        self.verbose
    }

    /// Returns true when stderr is a terminal on which a line can be rewritten.
    pub(crate) fn is_live(&self) -> bool {
        self.stderr_terminal
    }

    /// Returns true when somebody wants to know more than failures.
    pub(crate) fn is_talkative(&self) -> bool {
        self.verbose || self.stderr_terminal
    }

    /// Prints data.
    ///
    /// # Errors
    /// When nobody reads it any more, or it can't be written.
    pub(crate) fn data(&self, text: &str) -> Result<(), Stop> {
        self.bytes(text.as_bytes())
    }

    /// Prints bytes that came out of a guest: as they are, but on a terminal as text without control characters.
    ///
    /// # Errors
    /// Those of [`Self::data`].
    pub(crate) fn foreign_data(&self, bytes: &[u8]) -> Result<(), Stop> {
        if !std::io::stdout().is_terminal() {
            return self.bytes(bytes);
        }
        let text = escape_lines(&String::from_utf8_lossy(bytes), "");
        self.bytes(if text.is_empty() { text } else { text + "\n" }.as_bytes())
    }

    fn bytes(&self, bytes: &[u8]) -> Result<(), Stop> {
        let mut stdout = std::io::stdout().lock();
        match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(Stop::OutputClosed),
            Err(error) => Err(failed("could not write to stdout", &error).into()),
        }
    }

    /// Prints a value as JSON.
    ///
    /// # Errors
    /// Those of [`Self::data`].
    pub(crate) fn json<T: serde::Serialize>(&self, value: &T) -> Result<(), Stop> {
        let json = serde_json::to_string_pretty(value)
            .map_err(|error| failed("could not write the answer as JSON", &error))?;
        self.data(&format!("{}\n", escape_json(&json)))
    }

    /// Prints one finished check of `doctor`.
    ///
    /// # Errors
    /// Those of [`Self::data`].
    pub(crate) fn check(&self, check: &Check) -> Result<(), Stop> {
        let (word, colour) = match check.verdict {
            Verdict::Pass => ("pass", GREEN),
            Verdict::Warn => ("warn", YELLOW),
            Verdict::Fail => ("FAIL", RED),
        };
        self.finding((word, colour), &check.name, &check.detail, check.hint.as_deref())
    }

    /// Prints what became of one thing that `setup` looked after.
    ///
    /// # Errors
    /// Those of [`Self::data`].
    pub(crate) fn setup_item(&self, item: &SetupItem) -> Result<(), Stop> {
        let (word, colour) = match item.state {
            SetupState::Present => ("there", GREEN),
            SetupState::Fetched => ("fetched", GREEN),
            SetupState::WouldFetch => ("would fetch", YELLOW),
            SetupState::NotNeeded => ("not needed", GREEN),
            SetupState::ByHand => ("BY HAND", YELLOW),
            SetupState::Failed => ("FAILED", RED),
        };
        self.finding((word, colour), &item.name, &item.detail, item.hint.as_deref())
    }

    fn finding(
        &self,
        (word, colour): (&str, &str),
        name: &str,
        detail: &str,
        hint: Option<&str>,
    ) -> Result<(), Stop> {
        let indent = "      ";
        let word = paint(self.colour_out, colour, word);
        let mut text = format!("{word}  {}: {}\n", escape(name), escape_lines(detail, indent));
        if let Some(hint) = hint {
            text.push_str(&format!("{indent}hint: {}\n", escape_lines(hint, indent)));
        }
        self.data(&text)
    }

    /// Prints commands that take root's rights.
    ///
    /// # Errors
    /// Those of [`Self::data`].
    pub(crate) fn root_commands(&self, commands: &[&str]) -> Result<(), Stop> {
        if commands.is_empty() {
            return Ok(());
        }
        let mut text = "\nleft to do, with root's rights:\n".to_owned();
        for command in commands {
            text.push_str(&format!("  {}\n", escape_lines(command, "  ")));
        }
        self.data(&text)
    }

    /// Ends the line that a guest may have left the cursor in.
    pub(crate) fn end_foreign_line(&self) {
        self.stderr("\n");
    }

    /// Prints a failure: what, why, what to do, and where the log has more.
    pub(crate) fn error(&self, error: &WireError) {
        self.stderr(&render_error(error, self.colour_err));
    }

    /// Prints a line the user should see although the operation goes on.
    pub(crate) fn warning(&self, text: &str) {
        let label = paint(self.colour_err, YELLOW, "warning:");
        self.stderr(&format!("{label} {}\n", escape_lines(text, "  ")));
    }

    /// Prints a line of news, to those who want any.
    pub(crate) fn note(&self, text: &str) {
        if self.is_talkative() {
            self.stderr(&format!("{}\n", escape(text)));
        }
    }

    /// Prints a question without a line break.
    pub(crate) fn question(&self, text: &str) {
        self.stderr(&format!("{} ", escape(text)));
    }

    /// Prints text for stderr as it is: tables, which are escaped already.
    pub(crate) fn aside(&self, text: &str) {
        self.stderr(text);
    }

    /// Replaces the line of progress. Only on a terminal.
    pub(crate) fn progress(&self, text: &str) {
        if self.stderr_terminal {
            let line: String = escape(text).chars().take(self.columns() - 1).collect();
            write_stderr(&format!("\r\x1b[K{line}"));
            self.line_open.store(true, Ordering::Relaxed);
        }
    }

    /// Removes the line of progress, if there is one.
    pub(crate) fn clear_progress(&self) {
        if self.line_open.swap(false, Ordering::Relaxed) {
            write_stderr("\r\x1b[K");
        }
    }

    fn columns(&self) -> usize {
        rustix::termios::tcgetwinsize(rustix::stdio::stderr())
            .map(|size| usize::from(size.ws_col))
            .ok()
            .filter(|&columns| columns > 1)
            .unwrap_or(COLUMNS_DEFAULT)
    }

    fn stderr(&self, text: &str) {
        self.clear_progress();
        write_stderr(text);
    }

    /// Prints what the parser has to say: help and versions to stdout, mistakes to stderr.
    pub(crate) fn parser(error: &clap::Error) {
        let _ = error.print();
    }
}

/// Nothing can be told when stderr is gone, so a failure to write there is no failure.
fn write_stderr(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

fn paint(colour: bool, code: &str, text: &str) -> String {
    if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

fn render_error(error: &WireError, colour: bool) -> String {
    let message = escape_lines(&error.message, "  ");
    let mut out = format!("{} {message}\n", paint(colour, RED, "error:"));
    for cause in &error.causes {
        out.push_str(&format!("  caused by: {}\n", escape_lines(cause, "    ")));
    }
    if let Some(hint) = &error.hint {
        out.push_str(&format!("{} {}\n", paint(colour, BOLD, "hint:"), escape_lines(hint, "  ")));
    }
    if let Some(op) = &error.op {
        out.push_str(&format!("(op {})\n", escape(op)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use banger_wire::error::ErrorCode;

    #[test]
    fn an_error_is_rendered_whole_and_harmless() {
        let mut error = WireError::new(ErrorCode::Failed, "could not start vm `web`")
            .hinted("remove it with `ip link delete bgr-7f3a`, or see `banger doctor`");
        error.causes.push("create tap: \u{1b}[2J\nerror: fake".to_owned());
        error.op = Some("5f3c91".to_owned());
        insta::assert_snapshot!(render_error(&error, false), @r"
        error: could not start vm `web`
          caused by: create tap: \x1b[2J
            error: fake
        hint: remove it with `ip link delete bgr-7f3a`, or see `banger doctor`
        (op 5f3c91)
        ");
        assert!(render_error(&error, true).starts_with("\u{1b}[31;1merror:\u{1b}[0m could"));
    }
}
