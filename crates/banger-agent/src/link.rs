//! The conversation with the host: greeting, control messages, and the dispatch of session frames.

use crate::command::Defaults;
use crate::export;
use crate::{connect, copy, listeners, session, stats, workspace};
use banger_wire::channel::ChannelWriter;
use banger_wire::frame::{DATA_LEN_MAX, Decoder, Frame, FrameError, HEADER_LEN, Kind, MESSAGE_LEN_MAX};
use banger_wire::guest::{GuestMessage, HostMessage, SessionKind, TreeKind};
use banger_wire::stream::FrameWriter;
use std::collections::HashMap;
use std::io::Write as _;
use std::path::Path;
use tokio::io::AsyncReadExt as _;
use tokio::sync::mpsc;

use crate::port::Port;

/// Frames that wait to be written. With data frames of 64 KiB, 1 MiB at most.
const OUT_QUEUE_LEN: usize = 16;
/// Sessions at once; more are refused. Far above what a person or a build opens, and above what the supervisor does.
const SESSIONS_MAX: usize = 512;

/// The reading half: frames, resynchronised when the stream starts in the middle of older ones.
#[derive(Debug)]
pub(crate) struct Incoming {
    port: Port,
    decoder: Decoder,
    chunk: Vec<u8>,
}

impl Incoming {
    /// The stream that is read.
    pub(crate) fn port(&self) -> Port {
        self.port.clone()
    }

    /// Returns the next frame, or none at the end of the stream.
    pub(crate) async fn next(&mut self) -> std::io::Result<Option<Frame>> {
        loop {
            match self.decoder.next_frame() {
                Ok(Some(frame)) => return Ok(Some(frame)),
                Ok(None) => {}
                Err(FrameError::Damaged | FrameError::UnknownKind { .. } | FrameError::TooLong { .. }) => {
                    self.decoder.resync();
                    continue;
                }
                Err(error) => return Err(std::io::Error::other(error)),
            }
            let len = self.port.read(&mut self.chunk).await?;
            if len == 0 {
                return Ok(None);
            }
            self.decoder.push(&self.chunk[..len]);
        }
    }
}

/// Splits the port into its reading half and a queue that a task writes out.
pub(crate) fn open(port: Port) -> (Incoming, mpsc::Sender<Frame>) {
    let (out, mut queue) = mpsc::channel::<Frame>(OUT_QUEUE_LEN);
    let mut writer = FrameWriter::new(port.clone());
    tokio::task::spawn_local(async move {
        while let Some(frame) = queue.recv().await {
            // SYNC goes before every control message, so that a host that connects late finds its place.
            if frame.session == 0 && writer.sync().await.is_err() {
                return;
            }
            if writer.write(&frame).await.is_err() {
                return;
            }
        }
    });
    let incoming = Incoming {
        port,
        decoder: Decoder::resyncing(MESSAGE_LEN_MAX),
        chunk: vec![0; DATA_LEN_MAX + HEADER_LEN],
    };
    (incoming, out)
}

/// Sends a control message.
pub(crate) async fn send(out: &mpsc::Sender<Frame>, message: &GuestMessage) {
    if let Ok(frame) = Frame::message(0, message) {
        let _ = out.send(frame).await;
    }
}

/// What the serving loop leaves to its caller.
pub(crate) trait Control {
    /// Handles a control message that is not about sessions.
    fn control(&mut self, message: HostMessage, out: &mpsc::Sender<Frame>);
}

/// Serves sessions until the stream ends.
pub(crate) async fn serve(
    incoming: &mut Incoming,
    out: &mpsc::Sender<Frame>,
    defaults: &Defaults,
    control: &mut impl Control,
) -> std::io::Result<()> {
    let mut sessions: HashMap<u32, mpsc::UnboundedSender<Frame>> = HashMap::new();
    while let Some(frame) = incoming.next().await? {
        if frame.session != 0 {
            let closing = frame.kind == Kind::Close;
            let id = frame.session;
            // A session that ended meanwhile no longer listens; its late frames are ignored.
            let ended = sessions.get(&id).is_some_and(|inbox| inbox.send(frame).is_err());
            if closing || ended {
                sessions.remove(&id);
            }
            continue;
        }
        if frame.kind != Kind::Message {
            continue;
        }
        match frame.parse::<HostMessage>() {
            Ok(HostMessage::Open { session, what }) => {
                sessions.retain(|_, inbox| !inbox.is_closed());
                if session == 0 || sessions.len() >= SESSIONS_MAX || sessions.contains_key(&session) {
                    let _ = out.send(Frame::close(session)).await;
                    continue;
                }
                let (inbox, queue) = mpsc::unbounded_channel();
                sessions.insert(session, inbox);
                open_session(session, what, defaults, queue, out);
            }
            Ok(message) => control.control(message, out),
            // A host of a later generation may know messages this agent does not.
            Err(_) => {}
        }
    }
    Ok(())
}

fn open_session(
    session: u32,
    what: SessionKind,
    defaults: &Defaults,
    queue: mpsc::UnboundedReceiver<Frame>,
    out: &mpsc::Sender<Frame>,
) {
    match what {
        SessionKind::Exec(spec) => {
            tokio::task::spawn_local(session::run(session, *spec, defaults.clone(), queue, out.clone()));
        }
        SessionKind::Ssh(spec) => {
            tokio::task::spawn_local(session::serve_ssh(
                session,
                *spec,
                defaults.clone(),
                queue,
                out.clone(),
            ));
        }
        SessionKind::Stats => {
            let work = |_, mut output: ChannelWriter| {
                output.write_all(&stats::read()?)?;
                output.flush()
            };
            let what = "read what is used";
            tokio::task::spawn_local(session::exchange_items(session, what, work, queue, out.clone()));
        }
        SessionKind::ExportTree(TreeKind::Merged) => {
            let walk = defaults.in_guest.then_some(export::export_merged);
            tokio::task::spawn_local(session::export(session, walk, queue, out.clone()));
        }
        SessionKind::ExportTree(TreeKind::Root) => {
            let walk = defaults.in_guest.then_some(export::export_root);
            tokio::task::spawn_local(session::export(session, walk, queue, out.clone()));
        }
        SessionKind::ExportTree(TreeKind::Image) => {
            let walk = defaults
                .image
                .clone()
                .map(|(device, kind)| move |out| export::export_image(&device, &kind, out));
            tokio::task::spawn_local(session::export(session, walk, queue, out.clone()));
        }
        SessionKind::Place { path, readonly, replace } => {
            let how = workspace::How { readonly, replace };
            let work = move |input, output| workspace::place(path.as_os_str().as_ref(), how, input, output);
            tokio::task::spawn_local(session::exchange_items(
                session,
                "place the files",
                work,
                queue,
                out.clone(),
            ));
        }
        SessionKind::Write => {
            let work = |input, _output| workspace::write(Path::new("/"), input);
            tokio::task::spawn_local(session::exchange_items(
                session,
                "write the files",
                work,
                queue,
                out.clone(),
            ));
        }
        SessionKind::CopyIn { path, name, into } => {
            let work = move |input, _output| copy::copy_in(&path, name.as_ref(), into, input);
            let what = "copy the files";
            tokio::task::spawn_local(session::exchange_items(session, what, work, queue, out.clone()));
        }
        SessionKind::CopyOut { path, follow } => {
            let work = move |_input, output| copy::copy_out(&path, follow, output);
            let what = "read the files";
            tokio::task::spawn_local(session::exchange_items(session, what, work, queue, out.clone()));
        }
        SessionKind::Listeners => {
            tokio::task::spawn_local(listeners::watch(session, queue, out.clone()));
        }
        SessionKind::Connect { address } => {
            tokio::task::spawn_local(connect::run(session, address, queue, out.clone()));
        }
        SessionKind::Collect { path } => {
            let work = move |input, output| workspace::collect(path.as_os_str().as_ref(), input, output);
            tokio::task::spawn_local(session::exchange_items(
                session,
                "read the files",
                work,
                queue,
                out.clone(),
            ));
        }
    }
}
