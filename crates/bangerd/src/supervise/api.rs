//! A connection to Firecracker's API.
//!
//! Made when it is first needed: most vms are never asked anything.

use super::link;
use anyhow::{Context as _, bail};
use banger_vmm::api::{Request, parse};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

/// What a read takes at once; answers have a few hundred bytes.
const CHUNK_LEN: usize = 4096;

/// The API of one VMM.
#[derive(Debug)]
pub(crate) struct Api {
    socket: PathBuf,
    stream: Option<UnixStream>,
}

impl Api {
    /// The API that will be at a socket.
    pub(crate) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), stream: None }
    }

    /// Asks for something and waits until it is done. Requests come one after another.
    ///
    /// # Errors
    /// When the VMM can't be reached, or refuses; with its reason then.
    pub(crate) async fn ask(&mut self, request: &Request) -> anyhow::Result<()> {
        if self.stream.is_none() {
            self.stream = Some(link::connect(&self.socket).await.context("reach the VMM's API")?);
        }
        let stream = self.stream.as_mut().context("reach the VMM's API")?;
        stream.write_all(&request.bytes()).await.context("ask the VMM's API")?;
        let mut bytes = Vec::new();
        loop {
            let mut chunk = [0; CHUNK_LEN];
            let len = stream.read(&mut chunk).await.context("hear the VMM's API")?;
            bytes.extend_from_slice(&chunk[..len]);
            match parse(&bytes)? {
                Some(answer) if answer.is_success => return Ok(()),
                Some(answer) => {
                    let fault: String = answer.fault().escape_debug().take(300).collect();
                    bail!("the VMM refuses `{} {}`: {fault}", request.method, request.path);
                }
                None if len == 0 => bail!("the VMM's API ended its connection"),
                None => {}
            }
        }
    }

    /// Asks for something that can be done without, and waits no longer than `time`: a VMM may be stuck, or be an
    /// attacker's, and its vm has to be ended all the same.
    pub(crate) async fn ask_within(&mut self, time: Duration, request: &Request) {
        if !matches!(tokio::time::timeout(time, self.ask(request)).await, Ok(Ok(()))) {
            // An answer that comes late must not be taken for that to the next request.
            self.stream = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Api;
    use banger_vmm::firecracker;
    use std::time::{Duration, Instant};
    use tokio::io::AsyncReadExt as _;
    use tokio::net::UnixListener;

    #[tokio::test]
    async fn a_vmm_that_does_not_answer_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut api = Api::new(&socket);
        for _ in 0..2 {
            let began = Instant::now();
            api.ask_within(Duration::from_millis(50), &firecracker::count()).await;
            assert!(began.elapsed() < Duration::from_secs(10));
            // Each time by a connection of its own.
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut bytes = [0; 4];
            stream.read_exact(&mut bytes).await.unwrap();
            assert_eq!(&bytes, b"PUT ");
        }
    }
}
