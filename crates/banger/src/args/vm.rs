//! The grammar of commands on vms that are there.

use super::{NetArg, WaitArg};
use crate::signal_name::parse_signal;
use crate::text::parse_duration;
use banger_wire::net::NetworkChoice;
use banger_wire::size::Mebibytes;
use clap::Args;
use std::time::Duration;

/// `banger vm start`.
#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    #[command(flatten)]
    pub(crate) refs: RefsArgs,
    /// What started means.
    #[arg(long, value_name = "STATE", default_value = "agent")]
    pub(crate) wait: WaitArg,
}

/// `banger vm stop`.
#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    #[command(flatten)]
    pub(crate) refs: RefsArgs,
    /// Use force after this time.
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "30s")]
    pub(crate) timeout: Duration,
}

/// `banger vm restart`.
#[derive(Debug, Args)]
pub(crate) struct RestartArgs {
    #[command(flatten)]
    pub(crate) stop: StopArgs,
    /// What started means.
    #[arg(long, value_name = "STATE", default_value = "agent")]
    pub(crate) wait: WaitArg,
}

/// `banger vm set`.
#[derive(Debug, Args)]
pub(crate) struct SetArgs {
    /// Name, id or the beginning of an id.
    #[arg(value_name = "REF")]
    pub(crate) vm: String,
    /// Virtual processors.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) vcpu: Option<u32>,
    /// Memory, such as `512M` or `2G`.
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<Mebibytes>,
    /// Size of its disk, such as `16G`; it only grows.
    #[arg(long, value_name = "SIZE")]
    pub(crate) disk_size: Option<Mebibytes>,
    /// What it may reach: `internet`, `none`, `full`, `allow=HOST[:PORT],…`, or `allow` (what `banger vm net allow` names).
    #[arg(long, value_name = "NET")]
    pub(crate) net: Option<NetArg>,
    /// The network of vms it is in from its next start on: a name, or `none`.
    #[arg(long, value_name = "NAME")]
    pub(crate) network: Option<NetworkChoice>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `banger vm delete`.
#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    #[command(flatten)]
    pub(crate) refs: RefsArgs,
    /// Delete running ones too.
    #[arg(short, long)]
    pub(crate) force: bool,
}

/// One or more vms.
#[derive(Debug, Args)]
pub(crate) struct RefsArgs {
    /// Name, id or the beginning of an id.
    #[arg(value_name = "REF", required = true)]
    pub(crate) vms: Vec<String>,
}

/// `banger vm kill`.
#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    #[command(flatten)]
    pub(crate) refs: RefsArgs,
    /// The signal: `KILL` ends the vm at once; `TERM`, `INT`, `QUIT` and `PWR` ask it to power off; any other goes to the
    /// guest's first process.
    #[arg(short, long, value_name = "SIGNAL", default_value = "KILL", value_parser = parse_signal)]
    pub(crate) signal: i32,
}

/// `banger vm stats`.
#[derive(Debug, Args)]
pub(crate) struct StatsArgs {
    /// Name, id or the beginning of an id; every vm that runs when absent.
    #[arg(value_name = "REF")]
    pub(crate) vms: Vec<String>,
    /// Print once and end, as where stdout is no terminal.
    #[arg(long)]
    pub(crate) no_stream: bool,
    /// Print JSON, once.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `banger vm console`.
#[derive(Debug, Args)]
pub(crate) struct ConsoleArgs {
    /// Name, id or the beginning of an id.
    #[arg(value_name = "REF")]
    pub(crate) vm: String,
}
