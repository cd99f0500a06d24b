//! A client (CLI or daemon) and a vm's supervisor, over the vm's own socket.
//!
//! One connection is one request. The client sends [`VmRequest`] as a message of session 0; the supervisor
//! answers with [`VmEvent`]s. After `Accepted` to an `Open` the connection is the session: its frames carry
//! session 0 in both directions, with [`SessionControl`](crate::exec::SessionControl) and
//! [`SessionEvent`](crate::exec::SessionEvent) as messages, until `Close` or the end of the connection.

use crate::guest::{Hello, SessionKind, Timing};
use crate::net::{NetReport, NetRules};
use crate::ports::VmPorts;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// Greeting and request in one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmCall {
    /// The client's build; a supervisor of an older build adapts where it can and says so where it can't.
    pub build: String,
    /// What is wanted.
    pub request: VmRequest,
}

/// What a client asks of a supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmRequest {
    /// Opens a session with the agent. Waits for `Configured` when the guest is still booting.
    Open {
        /// What it is.
        what: SessionKind,
        /// Whether this connection keeps the vm alive: when it ends, the supervisor ends the vm.
        lease: bool,
    },
    /// Sends `State` now and at every change, until the vm has ended.
    Watch,
    /// The same, and this connection keeps the vm alive, as one with a `lease` does: for a client that opens several
    /// sessions.
    Hold,
    /// Ends the vm in order; force after the grace period. Answered by `Ended`.
    Stop {
        /// Grace period in milliseconds.
        grace_ms: u64,
    },
    /// Ends the VMM at once. Answered by `Ended`.
    Kill,
    /// Asks for what the machine has used so far. Answered by `Used`.
    Use,
    /// Asks what listens in the guest and where that is reached. Answered by `Ports`.
    Ports,
    /// Asks for what is open by name, and what was refused. Answered by `Net`, or `Refused` without a network.
    Net,
    /// Puts other network rules in force. Answered by `Accepted` once they are, or `Refused`.
    SetNet(NetRules),
    /// Passes a signal on to the guest. Answered by `Accepted`, or `Refused` where there is nobody to pass it on to.
    Signal {
        /// Its number.
        number: i32,
    },
    /// Attaches to the serial console. After `Accepted` the console's output is data on the
    /// [`STDOUT`](crate::exec::STDOUT) channel, beginning with the last lines of what was printed before, and its input
    /// on [`STDIN`](crate::exec::STDIN), both with windows and credits as a command has them. A client that does not
    /// return credit misses output. [`Resize`](crate::exec::SessionControl::Resize) says that somebody sits there: the
    /// guest gives them a shell.
    Console,
}

/// What a supervisor tells a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmEvent {
    /// The session is open; its frames follow.
    Accepted,
    /// The request was refused or failed; the connection ends.
    Refused(crate::error::WireError),
    /// Where the vm is now.
    State(VmStatus),
    /// The vm has ended.
    Ended(VmEnd),
    /// What the machine has used.
    Used(VmUse),
    /// What listens, and where that is reached.
    Ports(Box<VmPorts>),
    /// What is known of the network.
    Net(NetReport),
}

/// What a machine has used of the host since its VMM began, in bytes. What its VMM does not tell is missing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmUse {
    /// Read from its drives.
    pub read: Option<u64>,
    /// Written to its drives.
    pub written: Option<u64>,
    /// Sent by the guest.
    pub sent: Option<u64>,
    /// Received by the guest.
    pub received: Option<u64>,
    /// Memory that the VMM has now; files that it maps, which vms share, are not counted.
    pub memory: Option<u64>,
}

/// What the supervisor knows about its vm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    /// How far the boot is.
    pub phase: Phase,
    /// The VMM's process id in the vm's pid namespace; none before it was started.
    pub vmm_pid: Option<i32>,
    /// What the agent said first.
    pub hello: Option<Hello>,
    /// The guest kernel's boot id, from when the guest is configured.
    #[serde(default)]
    pub boot_id: Option<String>,
    /// What took how long since the supervisor was spawned.
    pub timings: Vec<Timing>,
    /// How often the boot was started again because nothing was heard of it, or its kernel gave up before its agent spoke.
    pub watchdog_restarts: u32,
    /// Why there is no way out to the network, when there should be one.
    pub network_warning: Option<String>,
    /// Why other vms of its network are not reached, when it is to be in one.
    #[serde(default)]
    pub member_warning: Option<String>,
    /// What the guest could not do although it goes on, printable.
    #[serde(default)]
    pub guest_warnings: Vec<String>,
    /// Why the machine stands still, while it does.
    #[serde(default)]
    pub paused: Option<String>,
    /// True once a lease was taken and while it is held.
    pub leased: bool,
    /// Unix time in seconds at which it stops by itself, unless a session is opened before.
    #[serde(default)]
    pub auto_stop_at: Option<i64>,
    /// The vm's own address on the host, where its ports open.
    #[serde(default)]
    pub address: Option<Ipv4Addr>,
}

/// How far a boot is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Namespaces, network, VMM are being made.
    Preparing,
    /// The VMM runs, the agent has not been heard of.
    Booting,
    /// The agent has said hello and is being configured.
    Configuring,
    /// Sessions can be opened.
    Ready,
    /// The image's init reported that it is done, or there is none.
    InitReady,
    /// The boot failed; the VMM may still run, for inspection.
    Failed {
        /// The stage, such as `agent silent`.
        stage: String,
        /// What happened.
        cause: String,
    },
    /// On its way down.
    Stopping,
}

/// How a vm ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmEnd {
    /// Why.
    pub reason: EndReason,
    /// A sentence for a person.
    pub detail: String,
}

/// Why a vm ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndReason {
    /// Asked to stop, and did.
    Stopped,
    /// Asked to stop and had to be forced, or was killed.
    Killed,
    /// Powered off from inside.
    PoweredOff,
    /// The lease ended.
    LeaseEnded,
    /// The VMM or the boot failed.
    Failed,
}
