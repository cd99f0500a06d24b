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

#[cfg(test)]
mod tests {
    use super::{Host, NetMode, NetRules, Policy};
    use std::io::Write as _;
    use std::process::Stdio;

    /// Sends to a server, the guest and the host's side, over both families, from within a namespace that has the vm's
    /// links; tells how each went.
    const SENDS: &str = "
        ip link set lo up && ip link add out0 type veth peer name out1 && ip link add tap0 type veth peer name tap1 || exit
        for link in out0 out1 tap0 tap1; do echo 0 >/proc/sys/net/ipv6/conf/$link/accept_dad; ip link set $link up; done
        ip addr add 10.231.7.5/30 dev out0; ip addr add fd32:5b0e:e7:2::5/64 dev out0
        ip addr add 10.231.7.1/30 dev tap0; ip addr add fd32:5b0e:e7:1::1/64 dev tap0
        ip route add default via 10.231.7.6; ip route add default via fd32:5b0e:e7:2::6
        for to in 10.231.7.6 10.231.7.2 fd32:5b0e:e7:2::6 fd32:5b0e:e7:1::2; do
            link=out0; case $to in *.2|*1::2) link=tap0;; esac
            ip neigh replace $to lladdr 52:54:00:00:00:01 dev $link
        done
        nft -f - || exit
        for to in 93.184.216.34 10.231.7.2 10.231.7.1 2606:2800:220:1::34 fd32:5b0e:e7:1::2; do
            if (exec 3<>/dev/udp/$to/53 && echo >&3) 2>/dev/null; then echo \"$to sent\"; else echo \"$to refused\"; fi
        done";

    fn sends(policy: &str) -> Option<String> {
        let mut command = banger_sys::child::command("unshare".as_ref());
        command.args(["-Urn", "bash", "-c", SENDS]).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().ok()?;
        let _ = child.stdin.take()?.write_all(policy.as_bytes());
        let output = child.wait_with_output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        if text.lines().count() != 5 {
            println!("{}", String::from_utf8_lossy(&output.stderr));
            return None;
        }
        Some(text)
    }

    #[test]
    fn what_opens_sockets_in_the_namespace_reaches_nothing() {
        let Some(open) = sends("") else {
            return println!(
                "skipped: what_opens_sockets_in_the_namespace_reaches_nothing: no namespaces, `ip` or `nft`"
            );
        };
        assert!(open.lines().all(|line| line.ends_with(" sent")), "{open}");
        for mode in [NetMode::Internet, NetMode::Full] {
            let policy = Policy::new(mode, NetRules::default(), Host::default()).limited(true, None);
            let closed = sends(&policy.render()).unwrap();
            assert!(closed.lines().all(|line| line.ends_with(" refused")), "{closed}");
        }
    }
}
