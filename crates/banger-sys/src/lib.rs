//! Safe wrappers of the Linux calls banger needs. The only crate with `unsafe`.
//!
//! What rustix already offers safely is not repeated here.
#![allow(unsafe_code, reason = "this crate is where it lives; each block says what makes it sound")]

pub mod child;
pub mod confine;
pub mod filesystem;
pub mod kvm;
pub mod namespace;
pub mod netif;
pub mod netlink;
pub mod process;
pub mod random;
pub mod sock_diag;
pub mod tsc;
pub mod vsock;
