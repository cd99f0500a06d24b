//! What a vm may reach.

use super::{JsonArgs, ShowArgs};
use banger_wire::daemon::NetMode;
use banger_wire::net::NetTarget;
use clap::{Args, Subcommand};
use std::str::FromStr;

/// `--net`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NetArg {
    pub(crate) mode: NetMode,
    /// The list of `allow=`.
    pub(crate) allow: Option<Vec<NetTarget>>,
}

impl FromStr for NetArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(list) = text.strip_prefix("allow=") {
            let targets = list.split(',').filter(|target| !target.is_empty());
            let allow: Result<Vec<NetTarget>, _> = targets.map(str::parse).collect();
            return Ok(Self { mode: NetMode::Allow, allow: Some(allow.map_err(|error| error.to_string())?) });
        }
        Ok(Self { mode: parse_mode(text)?, allow: None })
    }
}

/// Parses what a vm may reach, without a list.
fn parse_mode(text: &str) -> Result<NetMode, String> {
    match text {
        "internet" => Ok(NetMode::Internet),
        "none" => Ok(NetMode::None),
        "full" => Ok(NetMode::Full),
        "allow" => Ok(NetMode::Allow),
        _ => Err("use `internet`, `none`, `full`, or `allow=HOST[:PORT],…`".to_owned()),
    }
}

/// `banger vm net`.
#[derive(Debug, Subcommand)]
pub(crate) enum NetCommand {
    /// Show what a vm may reach.
    Show(ShowArgs),
    /// Let a vm reach names, addresses or networks, at once.
    Allow(NetChangeArgs),
    /// Keep a vm from names (with all names below them), addresses or networks, at once.
    Deny(NetChangeArgs),
    /// List what a running vm was refused in the last hour.
    Denials(ShowArgs),
}

/// `banger vm net allow` and `deny`.
#[derive(Debug, Args)]
pub(crate) struct NetChangeArgs {
    /// Name, id or the beginning of an id.
    #[arg(value_name = "REF")]
    pub(crate) vm: String,
    /// Such as `example.com`, `example.com:443`, `10.1.0.0/16` or `[2001:db8::1]:443`.
    #[arg(value_name = "HOST[:PORT]", required = true)]
    pub(crate) targets: Vec<NetTarget>,
    #[command(flatten)]
    pub(crate) json: JsonArgs,
}

#[cfg(test)]
mod tests {
    use super::NetArg;
    use banger_wire::daemon::NetMode;

    #[test]
    fn a_list_is_read_with_its_mode() {
        let arg: NetArg = "allow=example.com:443,10.0.0.0/8".parse().unwrap();
        assert_eq!((arg.mode, arg.allow.map(|list| list.len())), (NetMode::Allow, Some(2)));
        // None is not the same as an empty one.
        let without = |mode| Ok(NetArg { mode, allow: None });
        assert_eq!(("full".parse(), "allow".parse()), (without(NetMode::Full), without(NetMode::Allow)));
        assert_eq!("allow=".parse(), Ok(NetArg { mode: NetMode::Allow, allow: Some(Vec::new()) }));
        for text in ["", "all", "internet=a.example", "allow=a b"] {
            assert!(text.parse::<NetArg>().is_err(), "{text}");
        }
    }
}
