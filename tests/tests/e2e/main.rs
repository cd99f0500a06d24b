//! The installed programs, with real vms. Each test ends by showing that nothing is left.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout, reason = "a test")]

mod bring;
mod cgroup;
mod commands;
mod config;
mod copy;
mod crash;
mod daemon;
mod editors;
mod errors;
mod files;
mod forwarded;
mod images;
mod initrd;
mod kvm;
mod lifecycle;
mod nested;
mod nested_network;
mod network;
mod ports;
mod resources;
mod run;
mod ssh;
mod support;
mod template;
mod workspace;
