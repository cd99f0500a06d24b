//! What a machine is, fully decided, and what starts it.

use banger_wire::size::Mebibytes;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::path::PathBuf;

/// A machine with every decision made. Paths are as the VMM's process will see them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachinePlan {
    /// The VMM's program.
    pub program: PathBuf,
    /// Use hardware virtualisation (KVM); software emulation otherwise.
    pub kvm: bool,
    /// Virtual processors.
    pub vcpu: u32,
    /// Memory.
    pub memory: Mebibytes,
    /// Uncompressed kernel with a PVH entry.
    pub kernel: PathBuf,
    /// Initramfs.
    pub initrd: PathBuf,
    /// Rate of the host's time stamp counter in kHz, which an emulated machine's is too; none when not known.
    pub tsc_khz: Option<u64>,
    /// Kernel command line words the owner of the plan adds; the driver adds what its machine needs.
    pub cmdline: Vec<String>,
    /// Drives in the order the guest numbers them: vda, vdb, …
    pub drives: Vec<Drive>,
    /// The network device, if any.
    pub net: Option<NetDevice>,
    /// Directory for the VMM's sockets: agent and control.
    pub run_dir: PathBuf,
    /// Descriptor number at which the VMM's process finds a saved machine to go on with, instead of booting. Everything
    /// else has to be as it was for that machine, but for what is in drives and behind the network device.
    #[serde(default)]
    pub saved_fd: Option<i32>,
}

/// A block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drive {
    /// The raw file.
    pub path: PathBuf,
    /// Never written.
    pub read_only: bool,
}

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetDevice {
    /// Hardware address, `52:54:00:…`.
    pub mac: String,
    /// Descriptor number at which the VMM's process finds the open tap; none for a device that is connected to nothing.
    pub tap_fd: Option<i32>,
}

/// How to start a VMM and where its ends are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Program.
    pub program: PathBuf,
    /// Arguments after the program's name.
    pub args: Vec<OsString>,
    /// The kernel's whole command line, also within `args`.
    pub cmdline: String,
    /// Unix socket that carries the agent's byte stream; the VMM listens.
    pub agent_socket: PathBuf,
    /// Unix socket that controls the VMM; the VMM listens.
    pub control_socket: PathBuf,
}
