//! The VMM's process.
//!
//! It starts on the thread that lives in the vm's network namespace; the supervisor itself stays in the host's, where
//! the resolver's own queries belong.

use super::link::remove_socket;
use super::net::{Child, NetThread};
use anyhow::Context as _;
use banger_sys::confine::Confinement;
use banger_sys::namespace;
use banger_vmm::Launch;
use std::os::fd::{OwnedFd, RawFd};

/// Heaps that the VMM's threads share.
const ARENAS: &str = "8";

/// Does what has to be done before the VMM starts: its files are there, and nothing is where it makes its sockets.
pub(crate) fn prepare(launch: &Launch) -> std::io::Result<()> {
    launch.files.iter().try_for_each(|(path, bytes)| std::fs::write(path, bytes))?;
    launch.sockets.iter().try_for_each(|path| remove_socket(path))
}

/// A VMM that was started, and the ends of its console.
pub(crate) struct Started {
    pub(crate) process: Child,
    /// The console and the VMM's own messages, in one stream.
    pub(crate) output: OwnedFd,
    /// What is written here arrives on the guest's serial port. A guest that does not read lets it fill up.
    pub(crate) input: OwnedFd,
}

/// Starts the VMM with the descriptors it keeps. What it says is kept within bounds: a guest can make a VMM complain
/// without end.
pub(crate) async fn start(
    launch: &Launch,
    keep: Vec<RawFd>,
    confinement: Confinement,
    thread: &NetThread,
) -> anyhow::Result<Started> {
    let (program, args) = (launch.program.clone(), launch.args.clone());
    let (output, output_end) = std::io::pipe().context("make a pipe for the console")?;
    let (input_end, input) = std::io::pipe().context("make a pipe for the console's input")?;
    let spawn = move || {
        let mut command = banger_sys::child::command(program.as_os_str());
        command.args(&args).env_clear().env("PATH", "/usr/bin:/bin");
        // By default the C library reserves 64 MiB for nearly every thread, which its memory limit would count.
        command.env("MALLOC_ARENA_MAX", ARENAS);
        command.stdin(input_end).stdout(output_end.try_clone()?).stderr(output_end);
        namespace::untrusted(&mut command, keep);
        // After it: a session, and the signal at its parent's end, are made with calls that may be denied afterwards.
        confinement.on_exec(&mut command);
        command.spawn().with_context(|| format!("start `{}`", program.display()))
    };
    let process = Child::new(thread.run(spawn).await??)?;
    Ok(Started { process, output: output.into(), input: input.into() })
}
