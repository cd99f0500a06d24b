//! The grammar of `banger dns`.

use clap::{Args, Subcommand, ValueEnum};
use std::net::{Ipv4Addr, SocketAddr};

/// `banger dns`.
#[derive(Debug, Subcommand)]
pub(crate) enum DnsCommand {
    /// Show or install what has this machine's resolver ask banger for names of vms.
    Setup(DnsSetupArgs),
}

/// `banger dns setup`.
#[derive(Debug, Args)]
pub(crate) struct DnsSetupArgs {
    /// Write the files; takes root's rights.
    #[arg(long, conflicts_with = "uninstall")]
    pub(crate) install: bool,
    /// Remove the files that `--install` has written.
    #[arg(long)]
    pub(crate) uninstall: bool,
    /// The machine's resolver; found out when absent.
    #[arg(long, value_name = "NAME")]
    pub(crate) resolver: Option<ResolverArg>,
    /// Where banger answers; the config's `dns_listen`, if that was changed.
    #[arg(long, value_name = "ADDR:PORT", default_value_t = default_listen(), value_parser = parse_listen)]
    pub(crate) listen: SocketAddr,
}

fn default_listen() -> SocketAddr {
    SocketAddr::new(Ipv4Addr::LOCALHOST.into(), banger_wire::ports::CLAIM_PORT)
}

fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let at =
        text.parse().ok().filter(|at: &SocketAddr| at.ip().is_loopback() && at.is_ipv4() && at.port() != 0);
    at.ok_or_else(|| {
        "expected an IPv4 address of the loopback and a port, such as `127.0.0.1:42069`".to_owned()
    })
}

/// What resolves names on a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ResolverArg {
    /// systemd-resolved.
    SystemdResolved,
    /// dnsmasq, as a service of its own.
    Dnsmasq,
    /// The dnsmasq that NetworkManager runs.
    NetworkManager,
}
