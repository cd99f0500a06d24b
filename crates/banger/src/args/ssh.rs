//! The grammar of ssh.

use clap::Args;
use std::ffi::OsString;

/// `banger vm ssh`.
#[derive(Debug, Args)]
pub(crate) struct SshArgs {
    /// Name, id or the beginning of an id.
    #[arg(value_name = "REF")]
    pub(crate) vm: String,
    /// Options of `ssh`, then what to run, after `--` or not.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    pub(crate) args: Vec<OsString>,
}

/// `banger vm ssh-proxy`.
#[derive(Debug, Args)]
pub(crate) struct SshProxyArgs {
    /// The vm, as `NAME.vm` or as elsewhere.
    pub(crate) host: String,
}

/// `banger ssh-config`.
#[derive(Debug, Args)]
pub(crate) struct SshConfigArgs {
    /// Have `~/.ssh/config` include it.
    #[arg(long, conflicts_with = "uninstall")]
    pub(crate) install: bool,
    /// Take that out again.
    #[arg(long)]
    pub(crate) uninstall: bool,
}
