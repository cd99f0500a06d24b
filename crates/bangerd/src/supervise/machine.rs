//! The VMM's process.
//!
//! It starts on the thread that lives in the vm's network namespace; the supervisor itself stays in the host's, where
//! the resolver's own queries belong.

use super::net::{Child, NetThread};
use anyhow::Context as _;
use banger_sys::namespace;
use banger_vmm::Launch;
use std::os::fd::RawFd;
use std::process::Stdio;

/// Starts the VMM with its tap. Its messages go to the supervisor's own error stream.
pub(crate) async fn start(launch: &Launch, tap: Option<RawFd>, thread: &NetThread) -> anyhow::Result<Child> {
    let (program, args) = (launch.program.clone(), launch.args.clone());
    let spawn = move || {
        let mut command = banger_sys::child::command(program.as_os_str());
        command.args(&args).env_clear().env("PATH", "/usr/bin:/bin");
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        namespace::untrusted(&mut command, tap.into_iter().collect());
        command.spawn().with_context(|| format!("start `{}`", program.display()))
    };
    Child::new(thread.run(spawn).await??)
}
