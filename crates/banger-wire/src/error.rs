//! The error that crosses a connection.

use serde::{Deserialize, Serialize};

/// What a client acts on. A code is added only when a client behaves differently because of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The operation failed.
    Failed,
    /// The request itself is wrong (a name, a size, a combination).
    Invalid,
    /// No vm, image or kernel of that name.
    NotFound,
    /// The program in the guest was not found (127).
    CommandNotFound,
    /// The program in the guest could not be executed (126).
    CommandNotExecutable,
    /// The two programs come from different builds of banger.
    BuildMismatch,
    /// The vm was started but never became reachable; it was kept.
    Unreachable,
}

/// A failure, ready to be rendered: what failed on what, why, and what to do next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireError {
    /// What a client acts on.
    pub code: ErrorCode,
    /// What failed, on what.
    pub message: String,
    /// The chain of causes, outermost first.
    #[serde(default)]
    pub causes: Vec<String>,
    /// The next command, or what to change.
    #[serde(default)]
    pub hint: Option<String>,
    /// The operation's id, also in the daemon's log.
    #[serde(default)]
    pub op: Option<String>,
}

impl WireError {
    /// Returns an error with a message and nothing else.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), causes: Vec::new(), hint: None, op: None }
    }

    /// Returns the error with its causes taken from the source chain of `error`.
    pub fn from_error(code: ErrorCode, error: &(dyn std::error::Error + 'static)) -> Self {
        let mut causes = Vec::new();
        let mut source = error.source();
        while let Some(cause) = source {
            causes.push(cause.to_string());
            source = cause.source();
        }
        Self { code, message: error.to_string(), causes, hint: None, op: None }
    }

    /// Returns the error with a hint.
    #[must_use]
    pub fn hinted(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl std::fmt::Display for WireError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for WireError {}
