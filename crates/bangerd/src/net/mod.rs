//! The outbound network of a vm: what is decided before it starts.
//!
//! ```text
//! guest 10.231.7.2 ── tap0 10.231.7.1 ── forward, policy, masquerade ── out0 10.231.7.5 ── pasta ── host's sockets
//!                        └ resolver, port 53                     the vm's network namespace │ the host's
//! ```
//!
//! IPv6, where the host has it, is the same beside it: [`GUEST6`] and so on, private addresses, so that programs in the
//! guest go on preferring IPv4 as long as a destination has both.
//!
//! Names and addresses are the same in every vm, each in a namespace of its own: nothing has to be allocated, two vms
//! can't meet, and a vm's memory fits every namespace. [`policy`] is what packets may do, [`pasta`] the process that
//! turns them into the host's own connections. Carrying it out is the supervisor's part.

pub(crate) mod host;
pub(crate) mod member;
pub(crate) mod nft;
pub(crate) mod pasta;
pub(crate) mod policy;
mod special;

use banger_wire::daemon::NetMode;
use banger_wire::guest::{GuestNetwork, GuestNetwork6};
use banger_wire::net::NetRules;
use member::MemberPlan;
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

/// The vm's link, seen from the host.
pub(crate) const TAP: &str = "tap0";
/// The interface that pasta makes and serves.
pub(crate) const OUT: &str = "out0";
/// The guest's address.
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 231, 7, 2);
/// The guest's way out and its resolver: the address of [`TAP`].
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 231, 7, 1);
/// The address of [`OUT`]; what leaves the vm has it as its source until pasta gives it the host's.
pub(crate) const OUTER: Ipv4Addr = Ipv4Addr::new(10, 231, 7, 5);
/// Where [`OUT`] sends everything; nobody has this address.
pub(crate) const OUTER_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 231, 7, 6);
/// Prefix length of both links.
pub(crate) const PREFIX_LEN: u8 = 30;
/// The guest's IPv6 address.
pub(crate) const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfd32, 0x5b0e, 0xe7, 1, 0, 0, 0, 2);
/// What the guest's kernel makes of [`GUEST_MAC`] by itself; it finds its neighbour from there.
pub(crate) const GUEST6_LINK: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x5054, 0xff, 0xfee7, 0x702);
/// The guest's way out: the IPv6 address of [`TAP`].
pub(crate) const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd32, 0x5b0e, 0xe7, 1, 0, 0, 0, 1);
/// The IPv6 address of [`OUT`], in a network of its own: pasta makes it one of 64 bits.
pub(crate) const OUTER6: Ipv6Addr = Ipv6Addr::new(0xfd32, 0x5b0e, 0xe7, 2, 0, 0, 0, 5);
/// Where [`OUT`] sends everything of IPv6.
pub(crate) const OUTER_GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd32, 0x5b0e, 0xe7, 2, 0, 0, 0, 6);
/// Prefix length of the guest's link.
pub(crate) const PREFIX_LEN6: u8 = 64;
/// The guest's hardware address.
pub(crate) const GUEST_MAC: &str = "52:54:00:e7:07:02";
/// The hardware address of [`TAP`]: fixed, so that a guest restored from memory finds its neighbour.
pub(crate) const GATEWAY_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0xe7, 0x07, 0x01];

/// Outbound network, decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NetPlan {
    /// What the guest may reach.
    pub(crate) mode: NetMode,
    /// What it may and may not besides.
    #[serde(default)]
    pub(crate) rules: NetRules,
    /// `nft`; none when it is not installed, and the vm has no way out then.
    pub(crate) nft: Option<PathBuf>,
    /// What makes connections for the guest; none when it is not installed.
    pub(crate) pasta: Option<pasta::PastaPlan>,
    /// Bytes that may go in a second each way; none is no limit.
    #[serde(default)]
    pub(crate) rate: Option<u64>,
    /// Its place among the vms of a network.
    #[serde(default)]
    pub(crate) member: Option<MemberPlan>,
}

impl NetPlan {
    /// No interface at all.
    pub(crate) fn none() -> Self {
        let rules = NetRules::default();
        Self { mode: NetMode::None, rules, nft: None, pasta: None, rate: None, member: None }
    }

    /// Finds what the mode and the network need on this machine.
    pub(crate) fn find(mode: NetMode, rules: NetRules, member: Option<MemberPlan>) -> Self {
        let plan = Self { mode, rules, member, ..Self::none() };
        let pasta = || program("pasta").map(pasta::PastaPlan::probe);
        Self {
            nft: program("nft").filter(|_| plan.has_link()),
            pasta: if plan.leads_out() { pasta() } else { None },
            ..plan
        }
    }

    /// Whether the guest has an interface.
    pub(crate) fn has_link(&self) -> bool {
        self.leads_out() || self.member.is_some()
    }

    /// Whether there is to be a way out of the vm and its network.
    pub(crate) fn leads_out(&self) -> bool {
        self.mode != NetMode::None
    }

    /// What the guest is told; none when it has no interface. IPv6 is left out where the host has none when the vm
    /// starts.
    pub(crate) fn guest(&self) -> Option<GuestNetwork> {
        let ipv6 = GuestNetwork6 { address: GUEST6, prefix_len: PREFIX_LEN6, gateway: GATEWAY6 };
        self.has_link().then(|| GuestNetwork {
            mac: GUEST_MAC.to_owned(),
            address: GUEST,
            prefix_len: PREFIX_LEN,
            gateway: GATEWAY,
            closed: !self.leads_out(),
            member: self.member.as_ref().map(MemberPlan::guest),
            ipv6: Some(ipv6),
            resolver: GATEWAY,
            hosts: std::collections::BTreeMap::default(),
        })
    }
}

/// Finds a program of the system. Users' paths often lack the directories of system programs.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from);
    // Only what the vm's private root shows can be run there, and that is the system's directories.
    let shown = |path: &PathBuf| path.starts_with("/usr") || system.iter().any(|dir| path.starts_with(dir));
    let found = std::env::split_paths(&path).chain(system.clone()).map(|dir| dir.join(name));
    found.filter(shown).find(|path| path.is_file())
}
