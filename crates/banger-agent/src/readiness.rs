//! When the image's init has finished starting: systemd says so on a datagram socket, as any service would to it.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The socket's abstract name, without the leading NUL.
const NAME: &str = "banger-ready";
/// What `NOTIFY_SOCKET` is for an init; `@` stands for the NUL.
pub(crate) const ADDRESS: &str = "@banger-ready";
/// Longest message looked at; systemd's are a few lines.
const MESSAGE_LEN_MAX: usize = 4096;

/// Where an init reports.
#[derive(Debug)]
pub(crate) struct Readiness {
    socket: tokio::net::UnixDatagram,
}

impl Readiness {
    /// Begins to listen; to be called before the init is started.
    pub(crate) fn listen() -> io::Result<Self> {
        Self::listen_as(NAME)
    }

    fn listen_as(name: &str) -> io::Result<Self> {
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket: tokio::net::UnixDatagram::from_std(socket)? })
    }

    /// Returns once the init has said that it is ready.
    pub(crate) async fn ready(&self) -> io::Result<()> {
        let mut message = vec![0; MESSAGE_LEN_MAX];
        loop {
            let len = self.socket.recv(&mut message).await?;
            if message[..len].split(|byte| *byte == b'\n').any(|line| line == b"READY=1") {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Readiness;
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr, UnixDatagram};

    #[test]
    fn ready_is_one_line_among_others() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let name = format!("banger-ready-{}", std::process::id());
            let readiness = Readiness::listen_as(&name).unwrap();
            let peer = UnixDatagram::unbound().unwrap();
            let address = SocketAddr::from_abstract_name(&name).unwrap();
            for message in ["STATUS=Starting READY=1", "X_SYSTEMD_UNIT_ACTIVE=a\nREADY=1\nSTATUS=done"] {
                peer.send_to_addr(message.as_bytes(), &address).unwrap();
            }
            readiness.ready().await.unwrap();
            // The first was no message of that kind, so nothing is left to read.
            let again = tokio::time::timeout(std::time::Duration::from_millis(20), readiness.ready());
            assert!(again.await.is_err());
        });
    }
}
