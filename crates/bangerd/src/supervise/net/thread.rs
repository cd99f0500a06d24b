//! The thread that lives in the vm's network namespace, and the processes started from it.

use anyhow::Context as _;
use banger_sys::namespace;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::thread::UnshareFlags;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::ExitStatus;
use std::sync::mpsc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

type Job = Box<dyn FnOnce() + Send>;

/// The thread. The rest of the supervisor stays in the host's namespace, where listeners and upstream queries belong.
///
/// It also is the parent that processes started on it die with, so it lives as long as the vm.
pub(crate) struct NetThread {
    jobs: mpsc::Sender<Job>,
}

impl NetThread {
    /// Starts it in a new network namespace.
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        std::thread::Builder::new()
            .name("net".to_owned())
            .spawn(move || queue.into_iter().for_each(|job| job()))
            .context("start a thread")?;
        let thread = Self { jobs };
        thread.run(|| namespace::unshare(UnshareFlags::NEWNET)).await?.context("make a network namespace")?;
        Ok(thread)
    }

    /// Runs a function there and returns what it returned.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> anyhow::Result<T> {
        let (tell, done) = oneshot::channel();
        let job = Box::new(move || drop(tell.send(job())));
        self.jobs.send(job).ok().context("the thread of the vm's network has ended")?;
        done.await.context("the thread of the vm's network has ended")
    }
}

/// Registers a descriptor whose owner keeps it open and unchanged; `AsFd` is that promise.
#[allow(deprecated, reason = "what replaces it is unsafe, because it takes types that don't promise it")]
pub(crate) fn readable<T: AsFd + AsRawFd>(inner: T) -> std::io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(inner, Interest::READABLE)
}

/// A process whose end can be waited for beside other things.
///
/// One that nobody holds any more is ended.
#[derive(Debug)]
pub(crate) struct Child {
    process: std::process::Child,
    handle: AsyncFd<OwnedFd>,
}

impl Child {
    /// Takes over a process that was just started.
    pub(crate) fn new(process: std::process::Child) -> anyhow::Result<Self> {
        let pid = Pid::from_raw(i32::try_from(process.id())?).context("no process id")?;
        let handle = pidfd_open(pid, PidfdFlags::NONBLOCK).context("watch a process")?;
        Ok(Self { process, handle: readable(handle)? })
    }

    /// Its id within the vm's pid namespace.
    pub(crate) fn pid(&self) -> i32 {
        self.process.id().cast_signed()
    }

    /// Ends it at once.
    pub(crate) fn kill(&self) {
        let _ = pidfd_send_signal(self.handle.get_ref(), Signal::KILL);
    }

    /// Returns when it has ended; again and again after that.
    pub(crate) async fn ended(&mut self) -> Option<ExitStatus> {
        // A pidfd is readable from the end of its process on, so readiness is never cleared.
        self.handle.readable().await.ok()?.retain_ready();
        self.process.wait().ok()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}
