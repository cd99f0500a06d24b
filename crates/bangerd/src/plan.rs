//! The complete plan of a vm: every path, argument, address and drive, decided before anything is made.
//!
//! The daemon writes it into the vm's directory; the supervisor executes it and needs nothing else, so a daemon
//! that dies between the two changes nothing.

use banger_vmm::MachinePlan;
use banger_wire::daemon::NetMode;
use banger_wire::guest::GuestConfig;
use banger_wire::names::{VmId, VmName};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Name of the plan within the vm's directory.
pub const PLAN_FILE: &str = "plan.json";
/// The vm's own disk; its supervisor holds an exclusive `flock` on it for as long as it lives.
pub const DISK_FILE: &str = "disk.raw";
/// The supervisor's socket.
pub const SOCKET_FILE: &str = "vm.sock";
/// The serial console, bounded.
pub const CONSOLE_FILE: &str = "console.log";
/// What the supervisor itself has to say.
pub const SUPERVISOR_LOG_FILE: &str = "supervisor.log";
/// Written by the supervisor as its last act: how the vm ended, a [`banger_wire::vm::VmEnd`].
pub const END_FILE: &str = "end.json";

/// Everything a supervisor needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmPlan {
    /// The vm.
    pub id: VmId,
    /// Its name.
    pub name: VmName,
    /// Its directory on the host; inside the supervisor's root it is `/vm`.
    pub dir: PathBuf,
    /// The uid (and gid) everything of this vm runs as when the daemon is root; the owner's own otherwise.
    pub run_as: Option<u32>,
    /// Files and directories the supervisor's private root shows, besides `/vm` and the system's programs.
    pub binds: Vec<Bind>,
    /// The machine, with paths as inside the supervisor's root.
    pub machine: MachinePlan,
    /// What the guest becomes.
    pub guest: GuestConfig,
    /// Outbound network.
    pub net: NetMode,
    /// The vm ends when the connection that holds its lease ends.
    pub lease: bool,
    /// How long the agent may stay silent before the boot counts as failed, in milliseconds.
    pub boot_timeout_ms: u64,
}

/// A read-only bind mount into the supervisor's root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// On the host.
    pub host: PathBuf,
    /// In the supervisor's root.
    pub inside: PathBuf,
}
