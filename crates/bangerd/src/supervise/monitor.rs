//! The VMM's control socket: what is asked of it, and what it tells.

use super::api::Api;
use super::link;
use anyhow::{Context as _, bail};
use banger_vmm::api::Request;
use banger_vmm::qmp::{self, Event};
use banger_vmm::{Control, firecracker};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::pipe::Receiver;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

/// Events that wait for the supervisor; the VMM waits when there are more.
const QUEUE_LEN: usize = 16;

/// How long a VMM may take to hear of something. Nothing else is done for its vm meanwhile.
const HEAR_TIME: Duration = Duration::from_secs(1);

/// A connection to the VMM.
#[derive(Debug)]
pub(crate) struct Monitor {
    channel: Channel,
    events: mpsc::Receiver<Event>,
}

#[derive(Debug)]
enum Channel {
    Qmp(OwnedWriteHalf),
    /// It tells nothing by itself.
    Api(Api),
}

impl Monitor {
    /// Connects and says what has to be said first. `counters` is a pipe that the VMM counts into.
    pub(crate) async fn connect(control: &Control, counters: Option<Receiver>) -> anyhow::Result<Self> {
        let (tell, events) = mpsc::channel(QUEUE_LEN);
        let channel = match control {
            Control::Qmp(path) => {
                let (read, mut writer) = link::connect(path).await?.into_split();
                tokio::task::spawn_local(read_events(read, tell));
                writer.write_all(format!("{}\n", qmp::CAPABILITIES).as_bytes()).await?;
                Channel::Qmp(writer)
            }
            Control::Api { socket, first } => {
                if let Some(pipe) = counters {
                    tokio::task::spawn_local(super::counters::read(pipe, tell));
                }
                let mut api = Api::new(socket);
                for request in first {
                    api.ask(request).await?;
                }
                Channel::Api(api)
            }
        };
        Ok(Self { channel, events })
    }

    /// Returns the next event; none when the VMM has closed the connection.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Returns the next event of a VMM that has ended; none when it told no more.
    pub(crate) async fn rest(&mut self) -> Option<Event> {
        match self.channel {
            Channel::Qmp(_) => self.events.recv().await,
            // Nothing but numbers, and the end of the pipe they come from is not the VMM's alone.
            Channel::Api(_) => None,
        }
    }

    /// Has the machine saved into files that are there, and stand still. `state` is for what the VMM does not keep with the
    /// memory.
    pub(crate) async fn save(&mut self, memory: &Path, state: &Path) -> anyhow::Result<()> {
        match &mut self.channel {
            Channel::Qmp(writer) => {
                let file =
                    File::options().write(true).open(memory).context("open the file for the machine")?;
                save_by_qmp(writer, &file).await.context("ask for the machine to be saved")?;
                loop {
                    match self.events.recv().await.context("the VMM ended while the machine was saved")? {
                        Event::Saved => return Ok(()),
                        Event::Refused(why) => bail!("save the machine: {}", why.escape_debug()),
                        _ => {}
                    }
                }
            }
            Channel::Api(api) => {
                for request in &firecracker::save(memory, state) {
                    api.ask(request).await?;
                }
                Ok(())
            }
        }
    }

    /// Asks for [`Event::Counted`].
    pub(crate) async fn count(&mut self) {
        self.say(qmp::COUNT, &firecracker::count()).await;
    }

    /// Lets the machine go on.
    pub(crate) async fn resume(&mut self) {
        self.say(qmp::CONTINUE, &firecracker::resume()).await;
    }

    /// Says one or the other. A VMM that is gone is noticed by its process.
    async fn say(&mut self, line: &str, request: &Request) {
        match &mut self.channel {
            Channel::Qmp(writer) => {
                let line = format!("{line}\n");
                let _ = tokio::time::timeout(HEAR_TIME, writer.write_all(line.as_bytes())).await;
            }
            Channel::Api(api) => api.ask_within(HEAR_TIME, request).await,
        }
    }
}

/// Has the machine saved into `file`. [`Event::Saved`] or [`Event::Refused`] comes when that is done.
async fn save_by_qmp(writer: &mut OwnedWriteHalf, file: &File) -> io::Result<()> {
    let text = format!("{}\n", qmp::SAVE);
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
