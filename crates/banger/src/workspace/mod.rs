//! Files of the host in a vm, and what became of them.
//!
//! ```text
//! survey ──> what travels ─┐
//! metadata ──> a `.git` ───┴─> place: one stream to the agent
//! ```

mod checkout;
pub(crate) mod command;
mod git;
mod metadata;
mod place;
