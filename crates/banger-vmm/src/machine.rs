//! What a machine is, fully decided, and what starts it.

use crate::api::Request;
use banger_wire::size::Mebibytes;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::path::PathBuf;

/// What runs a machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Driver {
    /// QEMU, emulating or with KVM.
    #[default]
    Qemu,
    /// Firecracker, which needs KVM.
    Firecracker,
}

impl Driver {
    /// Returns its name: the VMM's, in lower case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
        }
    }
}

/// A machine with every decision made. Paths are as the VMM's process will see them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachinePlan {
    /// The VMM.
    #[serde(default)]
    pub driver: Driver,
    /// The VMM's program.
    pub program: PathBuf,
    /// Use hardware virtualisation (KVM); software emulation otherwise.
    pub kvm: bool,
    /// Devices are on a PCI bus. QEMU's always are; Firecracker's on pages of memory otherwise.
    #[serde(default = "pci")]
    pub pci: bool,
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
    /// Memory that the guest frees goes back to the host; not every version of a VMM can do that.
    #[serde(default)]
    pub gives_memory_back: bool,
    /// The machine is to be saved: the VMM keeps account of the memory it uses, where saving takes that.
    #[serde(default)]
    pub to_be_saved: bool,
    /// A saved machine to go on with, instead of booting. Everything else has to be as it was for that machine, but for
    /// what is in drives and behind the network device.
    #[serde(default)]
    pub saved: Option<Saved>,
}

/// Where the VMM finds a saved machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Saved {
    /// Open, under this descriptor number: QEMU's.
    Open(i32),
    /// In two files: Firecracker's.
    Files {
        /// Its memory, which is mapped and must not change.
        memory: PathBuf,
        /// Everything else.
        state: PathBuf,
    },
}

fn pci() -> bool {
    true
}

/// A block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drive {
    /// The raw file.
    pub path: PathBuf,
    /// Never written.
    pub read_only: bool,
    /// Bytes that may be read and written in a second; none is no limit.
    #[serde(default)]
    pub rate: Option<u64>,
}

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetDevice {
    /// Hardware address, `52:54:00:…`.
    pub mac: String,
    /// What it is connected to.
    pub link: NetLink,
}

/// What a network device is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetLink {
    /// A tap that the VMM's process finds open under this descriptor number.
    Open(i32),
    /// A tap of this name that the VMM opens, and that nobody else has open.
    Named(String),
    /// Nothing.
    Loose,
}

/// How to start a VMM and where its ends are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Program.
    pub program: PathBuf,
    /// Arguments after the program's name.
    pub args: Vec<OsString>,
    /// Files the VMM reads, which have to be written before it starts.
    pub files: Vec<(PathBuf, Vec<u8>)>,
    /// Sockets the VMM makes, and makes only where nothing is. Those of an earlier boot have to go before it starts.
    pub sockets: Vec<PathBuf>,
    /// A pipe with a name that has to be there before: the VMM writes its counters into it, a line of JSON at a time.
    pub counters: Option<PathBuf>,
    /// The kernel's command line, also within arguments or files. The VMM may add to it.
    pub cmdline: String,
    /// What carries the agent's byte stream.
    pub agent: AgentSocket,
    /// What controls the running VMM.
    pub control: Control,
}

/// The Unix socket that controls a VMM. The VMM listens, from some moment after its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// QEMU's protocol, QMP.
    Qmp(PathBuf),
    /// Firecracker's API.
    Api {
        /// The socket.
        socket: PathBuf,
        /// What has to be asked of it for the machine to run, in this order.
        first: Vec<Request>,
    },
}

/// What a VMM has counted: bytes of all drives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Read by the guest.
    pub read: u64,
    /// Written by the guest.
    pub written: u64,
}

/// The Unix socket of the agent's byte stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentSocket {
    /// The VMM listens, from some moment after its start.
    Dial(PathBuf),
    /// The VMM connects when the guest does. Whoever starts it has to listen before.
    Listen(PathBuf),
}

/// Says how to start a machine. The console goes to the VMM's standard output.
#[must_use]
pub fn launch(plan: &MachinePlan) -> Launch {
    match plan.driver {
        Driver::Qemu => crate::qemu::launch(plan),
        Driver::Firecracker => crate::firecracker::launch(plan),
    }
}
