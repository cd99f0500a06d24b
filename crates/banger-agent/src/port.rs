//! The byte stream to the host: a virtio-serial port, a vsock where there is none, or a Unix socket in tests.
//!
//! Polled edge-triggered in both directions. A level-triggered poll, or a write loop that polls again at once,
//! spins at 100 % CPU while the host end is closed, because the port then reports a hang-up continuously. A read
//! of zero bytes from the port means "nobody is connected now", not the end.

use banger_sys::vsock;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// One end of the stream; clones share the descriptor, one reads and one writes.
#[derive(Debug, Clone)]
pub(crate) struct Port {
    fd: Arc<AsyncFd<OwnedFd>>,
    ends: bool,
}

impl Port {
    #[allow(deprecated, reason = "an owned descriptor can't be closed behind the reactor's back")]
    /// Takes over a descriptor. `ends` says whether a read of zero bytes is the end of the stream.
    pub(crate) fn new(fd: OwnedFd, ends: bool) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { fd: Arc::new(AsyncFd::new(fd)?), ends })
    }

    /// Opens what leads to the host: the virtio-serial port of the given name, else the host's port on a vsock.
    pub(crate) fn open(name: &str, vsock_port: u32) -> io::Result<Self> {
        let Some(path) = find(Path::new("/sys/class/virtio-ports"), name)? else {
            let socket = vsock::connect(vsock::HOST, vsock_port).map_err(|error| {
                io::Error::other(format!("no virtio-serial port `{name}`, and on the vsock: {error}"))
            })?;
            return Self::new(socket, true);
        };
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
        Self::new(file.into(), false)
    }
}

impl Port {
    /// Waits until the stream has broken, as far as it can. Of a vsock whose connections the host has reset, only this
    /// tells: nothing can be read from it, not even an end, and so nobody who waits to read wakes up.
    pub(crate) async fn broken(&self) {
        if !self.ends || self.fd.ready(Interest::ERROR).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Without udev there is no `/dev/virtio-ports`, so the port is found by its name in sysfs.
fn find(class: &Path, name: &str) -> io::Result<Option<PathBuf>> {
    let entries = match std::fs::read_dir(class) {
        // No driver for such ports, so no ports.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let found = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if found.trim_end() == name {
            return Ok(Some(PathBuf::from("/dev").join(entry.file_name())));
        }
    }
    Ok(None)
}

impl AsyncRead for Port {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.fd.poll_read_ready(cx))?;
            let unfilled = buf.initialize_unfilled();
            match rustix::io::read(guard.get_inner(), unfilled) {
                Ok(0) if !self.ends => guard.clear_ready(),
                Ok(len) => {
                    buf.advance(len);
                    return Poll::Ready(Ok(()));
                }
                Err(rustix::io::Errno::AGAIN) => guard.clear_ready(),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.fd.poll_write_ready(cx))?;
            match rustix::io::write(guard.get_inner(), bytes) {
                Ok(len) => return Poll::Ready(Ok(len)),
                Err(rustix::io::Errno::AGAIN) => guard.clear_ready(),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::find;

    #[test]
    fn a_port_is_found_by_its_name_or_there_is_none() {
        let class = tempfile::tempdir().unwrap();
        for (port, name) in [("vport1p1", "org.other.0"), ("vport2p1", "banger.0")] {
            std::fs::create_dir(class.path().join(port)).unwrap();
            std::fs::write(class.path().join(port).join("name"), format!("{name}\n")).unwrap();
        }
        assert_eq!(find(class.path(), "banger.0").unwrap(), Some("/dev/vport2p1".into()));
        assert_eq!(find(class.path(), "banger.1").unwrap(), None);
        assert_eq!(find(&class.path().join("absent"), "banger.0").unwrap(), None);
    }
}
