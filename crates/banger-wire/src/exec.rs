//! A command in the guest: what to run, and how its streams travel.
//!
//! The same messages travel between CLI and supervisor and between supervisor and agent, so the supervisor only
//! renumbers sessions. Stdin, stdout and stderr are data channels of the session. A sender may have at most
//! [`WINDOW`] unacknowledged bytes on a channel; the consumer returns them with `Credit` frames once it has
//! passed them on. End of stream is an `Eof` frame on the channel, never a half-close of the transport.

use crate::bytes::ByteString;
use serde::{Deserialize, Serialize};

/// Channel of the command's standard input, host to guest.
pub const STDIN: u8 = 0;
/// Channel of standard output, or of everything when there is a terminal; guest to host.
pub const STDOUT: u8 = 1;
/// Channel of standard error, guest to host.
pub const STDERR: u8 = 2;

/// Bytes a sender may have in flight on one channel. At 100 MB/s and 4 ms of latency (virtio-serial under
/// emulation, 99th percentile) 400 KiB are in flight.
pub const WINDOW: u32 = 512 * 1024;

/// A terminal's size in character cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ExecSpec {
    /// Program and arguments as they reach `execve`; empty means the user's login shell.
    pub argv: Vec<ByteString>,
    /// Variables added to the session's environment, after the image's own.
    #[serde(default)]
    pub env: Vec<(ByteString, ByteString)>,
    /// Working directory; the user's home when absent.
    #[serde(default)]
    pub workdir: Option<ByteString>,
    /// Where to work instead, if there is no `workdir` and this can be entered.
    #[serde(default)]
    pub workspace: Option<ByteString>,
    /// User name or number, optionally `user:group`; root when absent.
    #[serde(default)]
    pub user: Option<String>,
    /// A terminal of this size; stderr then travels on the stdout channel.
    #[serde(default)]
    pub tty: Option<TerminalSize>,
    /// The client's `TERM`, for a terminal.
    #[serde(default)]
    pub term: Option<String>,
    /// The command reaches the client's ssh agent; see [`ssh_agent`](crate::ssh_agent).
    #[serde(default)]
    pub forward_agent: bool,
}

/// Host to guest, after the session was opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SessionControl {
    /// The client's terminal changed its size.
    Resize(TerminalSize),
    /// Sends a signal to the command's process group.
    Signal(i32),
}

/// Guest to host, as messages of the session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SessionEvent {
    /// The program was executed.
    Started {
        /// Process id in the guest.
        pid: u32,
    },
    /// The program ended, and all of its output was sent before this.
    Exited(ExitStatus),
    /// The program could not be started.
    Failed(crate::error::WireError),
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitStatus {
    /// It exited with this status.
    Code(u8),
    /// It died of this signal.
    Signal(i32),
}

impl ExitStatus {
    /// Returns the status a shell would report: the code, or 128 plus the signal's number.
    #[must_use]
    pub fn shell_code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => u8::try_from(128 + signal.clamp(0, 127)).unwrap_or(255),
        }
    }
}
