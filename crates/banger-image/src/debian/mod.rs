//! Debian's archive: finding a mirror, verifying what it serves, and unpacking packages.
//!
//! Nothing of a package is executed on the host, and no tool of the host is used. `archive` gets verified packages,
//! `deb` opens them.

pub mod archive;
mod control;
pub mod deb;
pub mod dependency;
pub mod fetch;
pub mod image;
pub mod index;
pub mod keyring;
pub mod mirror;
mod pipeline;
pub mod release;
pub mod resolve;
pub mod tree;
pub mod unpack;
pub mod version;
