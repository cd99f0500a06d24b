//! Images from registries, against a registry of our own and the reference implementation's reader.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    missing_docs,
    reason = "a test"
)]

mod archive;
mod compare;
mod layers;
mod local;
mod model;
mod pull;
mod readback;
mod registry;
mod tls;
mod umoci;
