//! Conversations with the daemon.
//!
//! One operation, one connection. A daemon that is not there is started; one of another build is asked to end and
//! replaced, once, which vms do not notice.

use crate::launch;
use crate::paths::StateDir;
use crate::stop::{failed, unexpected_answer};
use crate::text::duration;
use crate::upload::Archive;
use banger_wire::BUILD;
use banger_wire::daemon::{Call, Event, Outcome, Request};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::frame::{Frame, Kind, MESSAGE_LEN_MAX};
use banger_wire::stream::{FrameReader, FrameWriter};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use std::io::ErrorKind;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::oneshot;

/// Name of the daemon's socket in its directory.
const SOCKET: &str = "bangerd.sock";
/// How long a daemon may take to end when asked to: it finishes its answers, vms are not its to stop.
const STOP_TIME_MAX: Duration = Duration::from_secs(20);
/// Longest path that fits a socket address, with its final zero.
const SOCKET_PATH_MAX: usize = 107;

/// Speaks to the owner's daemon.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    state: StateDir,
}

impl Client {
    /// Returns a client; nothing is opened yet.
    ///
    /// # Errors
    /// When the environment names no state directory.
    pub(crate) fn new() -> Result<Self, WireError> {
        Ok(Self { state: StateDir::from_environment()? })
    }

    /// Returns the owner's state directory.
    pub(crate) fn state(&self) -> &StateDir {
        &self.state
    }

    /// Sends a request, starting or replacing the daemon where needed.
    ///
    /// # Errors
    /// When no daemon of this build can be reached.
    pub(crate) async fn call(&self, request: Request) -> Result<Operation, WireError> {
        let call = Call { build: BUILD.to_owned(), request };
        let mut operation = self.open(&call).await?;
        if operation.other_build().await?.is_some() {
            let pid = operation.peer;
            drop(operation);
            self.replace(pid).await?;
            operation = self.open(&call).await?;
            // Replaced by its like: the program that is started is not of this build.
            if let Some(said) = operation.other_build().await? {
                let text = format!("`bangerd` and `banger` are not of one build: this `banger` is {BUILD}");
                let mut error = WireError::new(ErrorCode::BuildMismatch, text)
                    .hinted("install both programs of one build, side by side");
                error.causes.push(said.message);
                return Err(error);
            }
        }
        Ok(operation)
    }

    /// Sends a request to the daemon that runs, if one does, whatever its build.
    ///
    /// # Errors
    /// When the connection fails.
    pub(crate) async fn call_running(&self, request: Request) -> Result<Option<Operation>, WireError> {
        match self.connect().await? {
            Some(stream) => {
                let call = Call { build: BUILD.to_owned(), request };
                Ok(Some(Operation::begin(stream, &call).await?))
            }
            None => Ok(None),
        }
    }

    /// Sends a request and returns what it ends with; what happens meanwhile goes to `observe`.
    ///
    /// # Errors
    /// The daemon's own, and those of the connection.
    pub(crate) async fn ask(
        &self,
        request: Request,
        observe: &mut (dyn FnMut(&Event) + Send),
    ) -> Result<Outcome, WireError> {
        self.call(request).await?.outcome(observe).await
    }

    /// Like [`Client::ask`], with a file that follows the request.
    ///
    /// # Errors
    /// The daemon's own, those of the connection, and those of reading the file.
    pub(crate) async fn send(
        &self,
        request: Request,
        file: Archive,
        observe: &mut (dyn FnMut(&Event) + Send),
    ) -> Result<Outcome, WireError> {
        self.call(request).await?.upload(file, observe).await
    }

    /// Ends the daemon and returns once its process has gone; false when none ran.
    ///
    /// # Errors
    /// When it refuses, or is still there after a while.
    pub(crate) async fn stop_daemon(&self) -> Result<bool, WireError> {
        match self.connect().await? {
            Some(stream) => stop(stream).await.map(|()| true),
            None => Ok(false),
        }
    }

    /// Ends the daemon that has this process id, and no other: somebody else may have replaced it already.
    async fn replace(&self, pid: Option<i32>) -> Result<(), WireError> {
        match self.connect().await? {
            Some(stream) if peer_pid(&stream) == pid => stop(stream).await,
            _ => Ok(()),
        }
    }

    async fn open(&self, call: &Call) -> Result<Operation, WireError> {
        let stream = match self.connect().await? {
            Some(stream) => stream,
            None => {
                launch::start(&self.state).await?;
                self.connect().await?.ok_or_else(|| {
                    WireError::new(ErrorCode::Failed, "bangerd started, but nothing listens on its socket")
                        .hinted(format!("its log is `{}`", self.state.log().display()))
                })?
            }
        };
        Operation::begin(stream, call).await
    }

    async fn connect(&self) -> Result<Option<UnixStream>, WireError> {
        let path = self.state.run().join(SOCKET);
        let stream = match connect(&path).await {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(error) => return Err(failed(format!("could not connect to `{}`", path.display()), &error)),
        };
        let peer =
            stream.peer_cred().map_err(|error| failed("could not tell whose daemon this is", &error))?;
        let own = rustix::process::getuid().as_raw();
        if peer.uid() != own {
            return Err(WireError::new(
                ErrorCode::Failed,
                format!("what listens on `{}` belongs to uid {}, not to you", path.display(), peer.uid()),
            ));
        }
        Ok(Some(stream))
    }
}

fn peer_pid(stream: &UnixStream) -> Option<i32> {
    stream.peer_cred().ok().and_then(|peer| peer.pid())
}

async fn stop(stream: UnixStream) -> Result<(), WireError> {
    let process = peer_pid(&stream).and_then(watch_process);
    let call = Call { build: BUILD.to_owned(), request: Request::DaemonStop };
    let mut operation = Operation::begin(stream, &call).await?;
    loop {
        match operation.next().await {
            Ok(Part::Event(Event::Failed(error))) => return Err(error),
            // A daemon that hurries may end before its answer has been read.
            Ok(Part::Event(Event::Done(_))) | Err(_) => break,
            Ok(_) => {}
        }
    }
    let ended = async move {
        match process {
            Some(end) => {
                drop(operation);
                let _ = end.await;
            }
            // Its process is not ours to see; the end of the connection is the next best sign.
            None => {
                let _ = operation.next().await;
            }
        }
    };
    tokio::time::timeout(STOP_TIME_MAX, ended).await.map_err(|_| {
        let message = format!("bangerd has not ended for {}", duration(STOP_TIME_MAX));
        WireError::new(ErrorCode::Failed, message).hinted("see `banger daemon logs`")
    })
}

/// Returns the end of a process, as far as this process can see it.
fn watch_process(pid: i32) -> Option<oneshot::Receiver<()>> {
    let pid = rustix::process::Pid::from_raw(pid)?;
    let process = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()?;
    let (ended, end) = oneshot::channel();
    // Registering a foreign descriptor with the runtime takes `unsafe`; a thread does not.
    let wait = move || {
        let mut polled = [PollFd::new(&process, PollFlags::IN)];
        while poll(&mut polled, None) == Err(rustix::io::Errno::INTR) {}
        let _ = ended.send(());
    };
    std::thread::Builder::new().name("daemon's end".to_owned()).spawn(wait).ok()?;
    Some(end)
}

/// Connects to a socket whatever the length of its path.
///
/// # Errors
/// Those of `connect`.
pub(crate) async fn connect(path: &Path) -> std::io::Result<UnixStream> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(ErrorKind::InvalidInput.into());
    };
    if path.as_os_str().len() <= SOCKET_PATH_MAX {
        return UnixStream::connect(path).await;
    }
    let dir = rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let short = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name);
    UnixStream::connect(short).await
}

/// What the daemon sends.
#[derive(Debug)]
pub(crate) enum Part {
    /// It tells something.
    Event(Event),
    /// Bytes of a stream.
    Data(Vec<u8>),
    /// The stream has ended.
    Eof,
}

/// An operation under way. Dropping it closes the connection, which cancels it.
#[derive(Debug)]
pub(crate) struct Operation {
    reader: FrameReader<OwnedReadHalf>,
    writer: FrameWriter<OwnedWriteHalf>,
    /// The daemon's process id.
    peer: Option<i32>,
    /// Looked at already, not yet taken.
    first: Option<Frame>,
}

impl Operation {
    async fn begin(stream: UnixStream, call: &Call) -> Result<Self, WireError> {
        let peer = peer_pid(&stream);
        let (reader, writer) = stream.into_split();
        let mut operation = Self {
            peer,
            reader: FrameReader::new(reader, MESSAGE_LEN_MAX),
            writer: FrameWriter::new(writer),
            first: None,
        };
        let sent = operation.writer.message(0, call).await;
        // A daemon that refuses before it has read everything has still said why.
        if let Err(error) = sent {
            operation.first = operation.reader.next().await.ok().flatten();
            if operation.first.is_none() {
                return Err(failed("could not send the request to bangerd", &error));
            }
        }
        Ok(operation)
    }

    /// Returns what a daemon of another build says instead of an answer.
    async fn other_build(&mut self) -> Result<Option<WireError>, WireError> {
        let frame = self.next_frame().await?;
        let other = match frame.parse() {
            Ok(Event::Failed(error))
                if frame.kind == Kind::Message && error.code == ErrorCode::BuildMismatch =>
            {
                Some(error)
            }
            _ => None,
        };
        self.first = Some(frame);
        Ok(other)
    }

    async fn next_frame(&mut self) -> Result<Frame, WireError> {
        next_frame(&mut self.reader, &mut self.first).await
    }

    /// Returns what the daemon sends next.
    ///
    /// # Errors
    /// When the connection ends; an operation that failed is an event.
    pub(crate) async fn next(&mut self) -> Result<Part, WireError> {
        next_part(&mut self.reader, &mut self.first).await
    }

    /// Allows the daemon `len` more bytes of its stream.
    pub(crate) async fn grant(&mut self, channel: u8, len: usize) {
        let credit = Frame::credit(0, channel, u32::try_from(len).unwrap_or(u32::MAX));
        // An operation at its end may not listen any more; what it has sent is still to be read.
        let _ = self.writer.write(&credit).await;
    }

    /// Sends a file on channel 1 and follows the operation to its end, which may come before the file's.
    ///
    /// # Errors
    /// The daemon's own, those of the connection, and those of reading the file.
    pub(crate) async fn upload(
        &mut self,
        file: Archive,
        observe: &mut (dyn FnMut(&Event) + Send),
    ) -> Result<Outcome, WireError> {
        let unreadable = format!("could not read `{}`", file.label);
        let mut pieces = file.start()?;
        let Self { reader, writer, first, .. } = self;
        let sending = async {
            while let Some(piece) = pieces.recv().await {
                let piece = piece.map_err(|error| failed(&unreadable, &error))?;
                // Who does not take it any more has said why, or will.
                if writer.write(&Frame::data(0, 1, piece)).await.is_err() {
                    return Ok(());
                }
            }
            let _ = writer.write(&Frame::eof(0, 1)).await;
            Ok(())
        };
        tokio::pin!(sending);
        let mut sent = false;
        loop {
            let part = tokio::select! {
                result = &mut sending, if !sent => {
                    result?;
                    sent = true;
                    continue;
                }
                part = next_part(reader, first) => part?,
            };
            match part {
                Part::Event(Event::Done(outcome)) => return Ok(*outcome),
                Part::Event(Event::Failed(error)) => return Err(error),
                Part::Event(event) => observe(&event),
                Part::Data(_) | Part::Eof => return Err(unexpected_answer()),
            }
        }
    }

    /// Follows the operation to its end.
    ///
    /// # Errors
    /// The daemon's own, and those of the connection.
    pub(crate) async fn outcome(
        &mut self,
        observe: &mut (dyn FnMut(&Event) + Send),
    ) -> Result<Outcome, WireError> {
        loop {
            match self.next().await? {
                Part::Event(Event::Done(outcome)) => return Ok(*outcome),
                Part::Event(Event::Failed(error)) => return Err(error),
                Part::Event(event) => observe(&event),
                Part::Data(_) | Part::Eof => return Err(unexpected_answer()),
            }
        }
    }
}

async fn next_frame(
    reader: &mut FrameReader<OwnedReadHalf>,
    first: &mut Option<Frame>,
) -> Result<Frame, WireError> {
    if let Some(frame) = first.take() {
        return Ok(frame);
    }
    let ended = "bangerd closed the connection before it was done";
    match reader.next().await {
        Ok(Some(frame)) => Ok(frame),
        Ok(None) => Err(WireError::new(ErrorCode::Failed, ended).hinted("see `banger daemon logs`")),
        Err(error) => {
            Err(failed("lost the connection to bangerd", &error).hinted("see `banger daemon logs`"))
        }
    }
}

/// Cancel-safe.
async fn next_part(
    reader: &mut FrameReader<OwnedReadHalf>,
    first: &mut Option<Frame>,
) -> Result<Part, WireError> {
    loop {
        let frame = next_frame(reader, first).await?;
        match frame.kind {
            Kind::Message => {
                let event = frame.parse();
                return event
                    .map(Part::Event)
                    .map_err(|error| failed("could not understand bangerd", &error));
            }
            Kind::Data => return Ok(Part::Data(frame.payload)),
            Kind::Eof => return Ok(Part::Eof),
            Kind::Credit | Kind::Close => {}
        }
    }
}
