//! Running `nft`, which changes the packet filter of its own network namespace.

use super::host::Host;
use super::policy::Policy;
use anyhow::{Context as _, bail};
use banger_sys::namespace::{self, Capability};
use banger_wire::daemon::NetMode;
use banger_wire::net::NetRules;
use std::path::Path;
use std::process::{Command, Stdio};

/// Has `nft` carry out a script in the caller's namespace: all of it or nothing.
pub(crate) fn apply(program: &Path, script: &str) -> anyhow::Result<()> {
    let mut command = command(program, &["-f", "-"]);
    namespace::helper(&mut command, &[Capability::NetAdmin]);
    run(command, script).map(drop)
}

/// What the table has now, as `nft` writes it in JSON.
pub(crate) fn read(program: &Path) -> anyhow::Result<Vec<u8>> {
    let mut command = command(program, &["-j", "list", "table", "inet", "banger"]);
    namespace::helper(&mut command, &[Capability::NetAdmin]);
    run(command, "")
}

/// Tries the default policy in namespaces of its own: `nft` may be there and the kernel lack what it asks for.
pub(crate) fn try_out(program: &Path) -> anyhow::Result<()> {
    let mut command = command(program, &["-f", "-"]);
    namespace::isolated(&mut command);
    namespace::helper(&mut command, &[Capability::NetAdmin]);
    let policy = Policy::new(NetMode::Internet, NetRules::default(), Host::default());
    run(command, &policy.render()).map(drop)
}

fn command(program: &Path, args: &[&str]) -> Command {
    let mut command = banger_sys::child::command(program.as_os_str());
    command.args(args).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(mut command: Command, script: &str) -> anyhow::Result<Vec<u8>> {
    use std::io::Write as _;
    let mut child = command.spawn().context("start `nft`")?;
    if let Some(mut input) = child.stdin.take() {
        // When it fails here `nft` has ended, and says why.
        let _ = input.write_all(script.as_bytes());
    }
    let output = child.wait_with_output().context("wait for `nft`")?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let line: String =
            text.lines().next().unwrap_or("it said nothing").escape_debug().take(200).collect();
        bail!("`nft` refused the policy: {line}");
    }
    Ok(output.stdout)
}
