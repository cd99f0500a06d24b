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

/// Puts `--` behind the vm of a `vm ssh`, so that what follows is nobody's but `ssh`'s, also `-v` and another `--`.
pub(crate) fn words_apart(mut words: Vec<OsString>) -> Vec<OsString> {
    let mut places = words
        .iter()
        .enumerate()
        .skip(1)
        .filter(|(_, word)| !word.as_encoded_bytes().starts_with(b"-"))
        .map(|(at, word)| (at, word.to_str().unwrap_or_default()));
    let verb = match places.next() {
        Some((_, "vm")) => places.next(),
        verb => verb,
    };
    if let (Some((_, "ssh")), Some((vm, _))) = (verb, places.next()) {
        words.insert(vm + 1, "--".into());
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command, VmCommand};
    use clap::Parser as _;

    #[test]
    fn flags_after_the_vm_are_sshs() {
        for (line, words, verbose) in [
            ("banger ssh web -v -L 1:a:2 -- uname -a", "-v -L 1:a:2 -- uname -a", false),
            ("banger vm ssh web -- uname -v", "-- uname -v", false),
            ("banger ssh web uname -v", "uname -v", false),
            ("banger ssh web --help", "--help", false),
            ("banger -v vm -v ssh -v web -- -x", "-- -x", true),
            ("banger ssh web", "", false),
        ] {
            let line: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            let cli = Cli::try_parse_from(words_apart(line.clone())).unwrap();
            let (Command::Ssh(args) | Command::Vm(VmCommand::Ssh(args))) = cli.command else {
                panic!("{line:?}")
            };
            let words: Vec<OsString> = words.split_terminator(' ').map(OsString::from).collect();
            assert_eq!((args.args, args.vm.as_str(), cli.verbose), (words, "web", verbose), "{line:?}");
        }
        for other in
            ["banger", "banger ssh", "banger ssh -v", "banger vm exec web ssh x", "banger run -- ssh web x"]
        {
            let line: Vec<OsString> = other.split(' ').map(OsString::from).collect();
            assert_eq!(words_apart(line.clone()), line, "{other}");
        }
    }
}
