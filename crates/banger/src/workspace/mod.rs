//! Files of the host in a vm, and what became of them.
//!
//! ```text
//! survey ──> what travels ─┐
//! metadata ──> a `.git` ───┴─> place: one stream to the agent
//!                                └──> base: what was placed ─┐
//! collect: what is there now ────────────────────────────────┴─> changes ──> patch, or apply
//! ```

mod apply;
mod base;
pub(crate) mod bootstrap;
pub(crate) mod checkout;
mod collect;
pub(crate) mod command;
mod commits;
mod git;
#[cfg(test)]
mod hostile;
pub(crate) mod listing;
mod metadata;
mod objects;
mod place;
pub(crate) mod reuse;
mod review;
mod safety;
mod tree;
