//! The VMM's process.
//!
//! A thread of its own makes the vm's network namespace and starts the VMM there: the supervisor itself stays in the
//! host's, where listeners and the resolver belong.

use anyhow::Context as _;
use banger_sys::namespace;
use banger_vmm::Launch;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::thread::UnshareFlags;
use std::os::fd::OwnedFd;
use std::process::{ChildStdout, ExitStatus, Stdio};
use tokio::sync::oneshot;

/// A running VMM.
#[derive(Debug)]
pub(crate) struct Vmm {
    /// Its process id within the vm's pid namespace.
    pub(crate) pid: i32,
    /// What the serial console prints.
    pub(crate) console: Option<ChildStdout>,
    /// Resolves when the VMM has ended.
    pub(crate) ended: oneshot::Receiver<Option<ExitStatus>>,
    handle: OwnedFd,
}

impl Vmm {
    /// Starts the VMM in a network namespace of its own. Its messages go to the supervisor's own error stream.
    pub(crate) async fn start(launch: &Launch) -> anyhow::Result<Self> {
        let (started, receive) = oneshot::channel();
        let (program, args) = (launch.program.clone(), launch.args.clone());
        std::thread::Builder::new()
            .name("net".to_owned())
            .spawn(move || {
                let spawn = || -> anyhow::Result<std::process::Child> {
                    namespace::unshare(UnshareFlags::NEWNET).context("make a network namespace")?;
                    let mut command = banger_sys::child::command(program.as_os_str());
                    command.args(&args).env_clear().env("PATH", "/usr/bin:/bin");
                    command.stdin(Stdio::null()).stdout(Stdio::piped());
                    namespace::untrusted(&mut command, Vec::new());
                    command.spawn().with_context(|| format!("start `{}`", program.display()))
                };
                let mut child = match spawn() {
                    Ok(child) => child,
                    Err(error) => return drop(started.send(Err(error))),
                };
                let (tell, ended) = oneshot::channel();
                let begun = handle(&child, ended).map(|mut vmm| {
                    vmm.console = child.stdout.take();
                    vmm
                });
                let _ = started.send(begun);
                // Also keeps the thread, and with it the parent the VMM dies with, alive.
                let _ = tell.send(child.wait().ok());
            })
            .context("start a thread")?;
        receive.await.context("start the VMM")?
    }

    /// Ends it at once.
    pub(crate) fn kill(&self) {
        let _ = pidfd_send_signal(&self.handle, Signal::KILL);
    }
}

fn handle(child: &std::process::Child, ended: oneshot::Receiver<Option<ExitStatus>>) -> anyhow::Result<Vmm> {
    let pid = i32::try_from(child.id())?;
    let handle = pidfd_open(Pid::from_raw(pid).context("no process id")?, PidfdFlags::empty())?;
    Ok(Vmm { pid, console: None, ended, handle })
}
