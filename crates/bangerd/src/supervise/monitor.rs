//! The VMM's control socket, where it has one.

use super::link;
use banger_vmm::qmp::{self, Event};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use std::path::Path;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

/// Events that wait for the supervisor; the VMM waits when there are more.
const QUEUE_LEN: usize = 16;

/// A connection to the VMM.
#[derive(Debug)]
pub(crate) struct Monitor {
    writer: Option<OwnedWriteHalf>,
    events: mpsc::Receiver<Event>,
}

impl Monitor {
    /// Connects and takes part in the negotiation. Without a socket there are no events.
    pub(crate) async fn connect(path: Option<&Path>) -> io::Result<Self> {
        let (tell, events) = mpsc::channel(QUEUE_LEN);
        let Some(path) = path else { return Ok(Self { writer: None, events }) };
        let (read, mut writer) = link::connect(path).await?.into_split();
        tokio::task::spawn_local(read_events(read, tell));
        writer.write_all(format!("{}\n", qmp::CAPABILITIES).as_bytes()).await?;
        Ok(Self { writer: Some(writer), events })
    }

    /// Returns the next event; none when the VMM has closed the connection.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Has the machine saved into `file`. [`Event::Saved`] or [`Event::Refused`] comes when that is done.
    pub(crate) async fn save(&mut self, file: &File) -> io::Result<()> {
        let text = format!("{}\n", qmp::SAVE);
        let writer = self.writer.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let stream: &UnixStream = writer.as_ref();
        let files = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let send = || {
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            ancillary.push(SendAncillaryMessage::ScmRights(&files));
            let text = [IoSlice::new(text.as_bytes())];
            Ok(rustix::net::sendmsg(stream, &text, &mut ancillary, SendFlags::empty())?)
        };
        let sent = stream.async_io(tokio::io::Interest::WRITABLE, send).await?;
        writer.write_all(&text.as_bytes()[sent..]).await
    }

    /// Lets the machine go on.
    pub(crate) async fn resume(&mut self) {
        // A VMM that is gone is noticed by its process.
        if let Some(writer) = &mut self.writer {
            let _ = writer.write_all(format!("{}\n", qmp::CONTINUE).as_bytes()).await;
        }
    }
}

async fn read_events(read: OwnedReadHalf, tell: mpsc::Sender<Event>) {
    let mut read = BufReader::new(read);
    let mut line = Vec::new();
    loop {
        line.clear();
        let limit = qmp::LINE_LEN_MAX as u64;
        match (&mut read).take(limit).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) if !line.ends_with(b"\n") => return,
            Ok(_) => {}
        }
        if let Some(event) = qmp::parse(&line)
            && tell.send(event).await.is_err()
        {
            return;
        }
    }
}
