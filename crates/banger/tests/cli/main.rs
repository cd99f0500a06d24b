//! The command line against a scripted daemon and a scripted supervisor.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "a test")]

mod agent;
mod copies;
mod daemons;
mod net;
mod output;
mod sessions;
mod support;
mod vms;
