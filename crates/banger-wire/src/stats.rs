//! What a vm uses, seen from inside and from the host.
//!
//! Counters run since the guest's boot, or the VMM's start; a reader takes two readings and their distance. Only
//! numbers cross from the guest, so nothing in them can steer a terminal; that they are true is another matter.

use crate::daemon::VmState;
use crate::names::{VmId, VmName};
use crate::size::Mebibytes;
use serde::{Deserialize, Serialize};

/// Longest answer of a guest, in bytes: several times what the numbers take.
pub const GUEST_STATS_LEN_MAX: usize = 8 * 1024;

/// One reading of a vm; also the shape of `--json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStats {
    /// Id.
    pub id: VmId,
    /// Name.
    pub name: VmName,
    /// State.
    pub state: VmState,
    /// Virtual processors.
    pub vcpu: u32,
    /// Milliseconds since some moment, the same for all readings of one daemon.
    pub taken_ms: u64,
    /// What the guest says; none while it is silent.
    pub guest: Option<GuestStats>,
    /// What its VMM takes; none while there is none.
    pub host: Option<HostStats>,
    /// Bytes its own disk uses on the host.
    pub disk_used_bytes: u64,
    /// Limit of its own disk.
    pub disk_size: Mebibytes,
}

/// What a guest uses, as its kernel counts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStats {
    /// Time since its boot, in milliseconds.
    pub uptime_ms: u64,
    /// Time its processors have worked since then, together, in milliseconds.
    pub cpu_ms: u64,
    /// Processes that ran or wanted to on average, in hundredths: over 1, 5 and 15 minutes.
    pub load_hundredths: [u32; 3],
    /// Memory it has.
    pub memory_bytes: u64,
    /// What of that could not be had by another program.
    pub memory_used_bytes: u64,
    /// Bytes read from all its drives.
    pub disk_read_bytes: u64,
    /// Bytes written to them.
    pub disk_written_bytes: u64,
    /// Size of its root filesystem.
    pub root_bytes: u64,
    /// What of that is in use.
    pub root_used_bytes: u64,
    /// Bytes received over its network.
    pub net_received_bytes: u64,
    /// Bytes sent.
    pub net_sent_bytes: u64,
}

/// What a vm takes of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStats {
    /// The VMM's process id.
    pub pid: i32,
    /// Processor time it has used, in milliseconds.
    pub cpu_ms: u64,
    /// Memory it has in the host's, in bytes.
    pub memory_bytes: u64,
    /// Bytes it has read from the vm's drives; none where it can't be asked.
    #[serde(default)]
    pub disk_read_bytes: Option<u64>,
    /// Bytes written to them.
    #[serde(default)]
    pub disk_written_bytes: Option<u64>,
    /// Bytes that came from the guest through its link; none without one.
    pub net_from_guest_bytes: Option<u64>,
    /// Bytes that went to it.
    pub net_to_guest_bytes: Option<u64>,
}
