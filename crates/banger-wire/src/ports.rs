//! What listens in a guest, and where that is reached on the host.
//!
//! [`Listeners`] comes from a guest nobody trusts: it is bounded before it is used, and names of processes are escaped
//! where they are shown.

use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr};

/// Sockets of one guest that are told; a guest may have any number.
pub const LISTENERS_MAX: usize = 512;
/// Characters of a process's name that are told: as many as Linux keeps, each in its longest encoding.
pub const PROCESS_LEN_MAX: usize = 64;
/// Ports of one vm that open on the host by themselves.
pub const FORWARDS_MAX: usize = 64;
/// The port that claims an address for a vm. The name server has the same one at another address.
pub const CLAIM_PORT: u16 = 42069;

/// Everything that listens in a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listeners {
    /// The sockets, in order, each once.
    pub sockets: Vec<Listener>,
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A socket that takes connections, or a UDP socket that has no peer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Listener {
    /// Its protocol.
    pub protocol: Protocol,
    /// Its port.
    pub port: u16,
    /// The address it is bound to.
    pub address: IpAddr,
    /// The name of a process that has it, as the guest says; none where there is none to be found.
    pub process: Option<String>,
    /// That process's id in the guest.
    pub pid: Option<u32>,
}

/// A port that is open on the host for a vm, or should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// The port in the guest.
    pub guest_port: u16,
    /// The address on the host.
    pub address: IpAddr,
    /// The port there.
    pub port: u16,
    /// Asked for with `--publish`.
    pub published: bool,
    /// Why it is not open.
    #[serde(default)]
    pub problem: Option<String>,
}

/// A port that is to be open as long as the vm runs, whatever listens in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publish {
    /// The host's address.
    pub address: IpAddr,
    /// The port there.
    pub host_port: u16,
    /// The port in the guest.
    pub guest_port: u16,
}

/// What a supervisor knows of its vm's ports.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmPorts {
    /// The vm's own address on the host; none when no free one was found.
    pub address: Option<Ipv4Addr>,
    /// What listens in the guest; none as long as it has not said.
    pub listeners: Option<Vec<Listener>>,
    /// What is open on the host.
    pub forwards: Vec<Forward>,
    /// Why nothing opens by itself.
    #[serde(default)]
    pub problem: Option<String>,
}
