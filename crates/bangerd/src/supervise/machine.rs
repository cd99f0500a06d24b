//! The VMM's process.
//!
//! It starts on the thread that lives in the vm's network namespace; the supervisor itself stays in the host's, where
//! the resolver's own queries belong.

use super::net::{Child, NetThread};
use anyhow::Context as _;
use banger_sys::namespace;
use banger_vmm::Launch;
use std::os::fd::{OwnedFd, RawFd};
use std::process::Stdio;

/// Starts the VMM with the descriptors it keeps. The console and the VMM's own messages come out of the returned pipe, in one stream that
/// is kept within bounds: a guest can make a VMM complain without end.
pub(crate) async fn start(
    launch: &Launch,
    keep: Vec<RawFd>,
    thread: &NetThread,
) -> anyhow::Result<(Child, OwnedFd)> {
    let (program, args) = (launch.program.clone(), launch.args.clone());
    let (output, input) = std::io::pipe().context("make a pipe for the console")?;
    let spawn = move || {
        let mut command = banger_sys::child::command(program.as_os_str());
        command.args(&args).env_clear().env("PATH", "/usr/bin:/bin");
        command.stdin(Stdio::null()).stdout(input.try_clone()?).stderr(input);
        namespace::untrusted(&mut command, keep);
        command.spawn().with_context(|| format!("start `{}`", program.display()))
    };
    Ok((Child::new(thread.run(spawn).await??)?, output.into()))
}
