//! The Debian archive client against an archive of our own: what an honest one gives, and what a dishonest one doesn't.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    missing_docs,
    reason = "a test"
)]

mod deb;
mod files;
mod fixture;
mod releases;
mod server;
mod signatures;
