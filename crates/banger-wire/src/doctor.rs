//! What `doctor` and `setup` found.

use serde::{Deserialize, Serialize};

/// One check of `doctor`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it is.
    pub verdict: Verdict,
    /// What was found.
    pub detail: String,
    /// The command that mends it.
    pub hint: Option<String>,
}

/// Outcome of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Good.
    Pass,
    /// Works, but less well than it could.
    Warn,
    /// Must be mended.
    Fail,
}

/// One thing `setup` looked after; also the shape of `--json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetupItem {
    /// What it is.
    pub name: String,
    /// What became of it.
    pub state: SetupState,
    /// What was found or done.
    pub detail: String,
    /// The command that is left to do.
    pub hint: Option<String>,
}

/// What became of a thing that is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SetupState {
    /// It was there.
    Present,
    /// It is there now.
    Fetched,
    /// It would be fetched.
    WouldFetch,
    /// This machine has no use for it.
    NotNeeded,
    /// It takes root's rights, which banger does not have.
    ByHand,
    /// It could not be fetched.
    Failed,
}
