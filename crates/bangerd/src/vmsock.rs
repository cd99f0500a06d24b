//! A vm's supervisor: starting one, and talking to it over the vm's socket.

use crate::plan::{DISK_FILE, END_FILE, PLAN_FILE, SOCKET_FILE, SUPERVISOR_LOG_FILE, VmPlan};
use anyhow::{Context as _, bail};
use banger_wire::BUILD;
use banger_wire::channel::{self, ChannelWriter};
use banger_wire::exec::{ExecSpec, ExitStatus, STDIN, SessionEvent, WINDOW};
use banger_wire::frame::{DATA_LEN_MAX, Frame, Kind, MESSAGE_LEN_MAX};
use banger_wire::guest::SessionKind;
use banger_wire::stream::{FrameReader, FrameWriter};
use banger_wire::vm::{VmCall, VmEnd, VmEvent, VmRequest};
use rustix::fs::{FlockOperation, Mode, OFlags};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// How long a supervisor may take until its socket is there: namespaces and mounts, on a loaded host.
const SOCKET_WAIT: Duration = Duration::from_secs(20);
/// How long a supervisor may take to be gone after the vm has ended. The kernel takes the guest's memory back meanwhile,
/// which takes seconds on a busy host.
const GONE_WAIT: Duration = Duration::from_secs(60);
/// Output of a command that is kept for an error message.
const OUTPUT_MAX: usize = 8 * 1024;

/// A connection to a supervisor.
#[derive(Debug)]
pub(crate) struct Connection {
    /// The supervisor's process id.
    pub(crate) supervisor: Option<i32>,
    reader: FrameReader<OwnedReadHalf>,
    writer: FrameWriter<OwnedWriteHalf>,
}

/// Longest file of a vm's processes that is read here: they could have made it anything.
const FILE_LEN_MAX: u64 = 4 << 20;

/// Opens a file of a vm's directory. The vm's own processes may write there, so what has the name may be a link or a pipe.
///
/// # Errors
/// When it isn't a plain file.
pub(crate) fn open_file(dir: &Path, name: &str, flags: OFlags) -> std::io::Result<File> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(dir.join(name), flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("not a plain file"));
    }
    Ok(file)
}

/// Reads a file of a vm's directory; nothing when it isn't there or isn't plain.
pub(crate) fn read_file(dir: &Path, name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Ok(file) = open_file(dir, name, OFlags::RDONLY) {
        let _ = file.take(FILE_LEN_MAX).read_to_end(&mut bytes);
    }
    bytes
}

/// Makes a file of a vm's directory anew.
fn create_file(dir: &Path, name: &str) -> std::io::Result<File> {
    let path = dir.join(name);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    File::create_new(path)
}

/// Tells whether a supervisor runs this vm: it holds the lock of the vm's disk.
pub(crate) fn is_alive(dir: &Path) -> bool {
    let Ok(disk) = open_file(dir, DISK_FILE, OFlags::RDONLY) else { return false };
    rustix::fs::flock(&disk, FlockOperation::NonBlockingLockExclusive).is_err()
}

/// Waits until no supervisor holds the disk any more, for a while.
pub(crate) async fn wait_gone(dir: &Path) {
    let deadline = tokio::time::Instant::now() + GONE_WAIT;
    while is_alive(dir) && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Ends a vm at once, whatever it is doing, and returns when it is gone.
///
/// # Errors
/// When it can't be reached, or does not end. Its files must stay then: without them nobody finds it again.
pub(crate) async fn end(dir: &Path) -> anyhow::Result<()> {
    if !is_alive(dir) {
        return Ok(());
    }
    match connect_new(dir).await {
        Ok(mut connection) => connection.request(VmRequest::Kill).await?,
        Err(_) if !is_alive(dir) => return Ok(()),
        Err(error) => return Err(error),
    }
    wait_gone(dir).await;
    if is_alive(dir) { bail!("the vm in `{}` has not ended", dir.display()) } else { Ok(()) }
}

/// Returns how the vm's last run ended, if it said so.
pub(crate) fn load_end(dir: &Path) -> Option<VmEnd> {
    serde_json::from_slice(&read_file(dir, END_FILE)).ok()
}

/// Returns the plan of the vm's last start, if there was one.
pub(crate) fn load_plan(dir: &Path) -> Option<VmPlan> {
    serde_json::from_slice(&read_file(dir, PLAN_FILE)).ok()
}

/// Starts the supervisor of a planned vm, which nobody else does now, and connects to it.
///
/// # Errors
/// When it can't start; its own words are then the cause.
pub(crate) async fn start(plan: &VmPlan) -> anyhow::Result<Connection> {
    let dir = &plan.dir;
    for old in [END_FILE, SOCKET_FILE] {
        let _ = std::fs::remove_file(dir.join(old));
    }
    let written =
        create_file(dir, PLAN_FILE).and_then(|mut file| file.write_all(&serde_json::to_vec_pretty(plan)?));
    written.context("write the vm's plan")?;
    let log = create_file(dir, SUPERVISOR_LOG_FILE).context("write the supervisor's log")?;
    if let Some(id) = plan.run_as {
        let disk = open_file(dir, DISK_FILE, OFlags::RDWR).context("open the vm's disk")?;
        std::os::unix::fs::fchown(disk, Some(id), Some(id)).context("give the vm its disk")?;
        std::os::unix::fs::lchown(dir, Some(id), Some(id)).context("give the vm its directory")?;
    }
    let own = std::env::current_exe().context("find this program")?;
    // Its file may have been replaced by another build's meanwhile; the name is for whoever lists processes.
    let mut command = banger_sys::child::command("/proc/self/exe".as_ref());
    command.arg0(own);
    command.arg("supervise").arg("--dir").arg(dir).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    banger_sys::child::new_session(&mut command, None, None);
    let mut child = command.spawn().context("start the supervisor")?;
    // It splits within milliseconds; what was started here ends then.
    let status = banger_image::blocking::start(move || child.wait()).await??;
    if !status.success() {
        bail!("the supervisor did not start: {}", last_words(dir));
    }
    connect_new(dir).await
}

/// The end of what the supervisor and the VMM said on their error stream.
fn last_words(dir: &Path) -> String {
    let text = read_file(dir, SUPERVISOR_LOG_FILE);
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
    line.trim_start_matches("error: ").escape_debug().take(500).collect()
}

/// Connects to a supervisor that is there or comes.
pub(crate) async fn connect_new(dir: &Path) -> anyhow::Result<Connection> {
    let deadline = tokio::time::Instant::now() + SOCKET_WAIT;
    loop {
        match connect(dir).await {
            Ok(connection) => return Ok(connection),
            Err(_) if !is_alive(dir) => {
                let end = load_end(dir).map_or_else(|| last_words(dir), |end| end.detail);
                bail!("the supervisor ended at once: {end}");
            }
            Err(error) if tokio::time::Instant::now() > deadline => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
        }
    }
}

/// Connects to the supervisor of a vm.
///
/// # Errors
/// When nothing listens.
pub(crate) async fn connect(dir: &Path) -> anyhow::Result<Connection> {
    // The name of a socket is limited to 108 bytes, that of a directory is not.
    let open = rustix::fs::open(dir, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let path = format!("/proc/self/fd/{}/{SOCKET_FILE}", open.as_raw_fd());
    let stream = UnixStream::connect(path).await.context("connect to the vm's supervisor")?;
    let supervisor = stream.peer_cred().ok().and_then(|peer| peer.pid());
    let (read, write) = stream.into_split();
    Ok(Connection {
        supervisor,
        reader: FrameReader::new(read, MESSAGE_LEN_MAX),
        writer: FrameWriter::new(write),
    })
}

impl Connection {
    /// Asks for something.
    pub(crate) async fn request(&mut self, request: VmRequest) -> anyhow::Result<()> {
        Ok(self.writer.message(0, &VmCall { build: BUILD.to_owned(), request }).await?)
    }

    /// Returns what the supervisor tells next; none when it is gone.
    pub(crate) async fn event(&mut self) -> anyhow::Result<Option<VmEvent>> {
        match self.reader.next().await? {
            None => Ok(None),
            Some(frame) => Ok(Some(frame.parse()?)),
        }
    }
}

/// Returns the id a child of the supervisor has out here, from the one it has in the vm's pid namespace.
pub(crate) fn outside_pid(supervisor: i32, inside: i32) -> Option<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{supervisor}/task")).ok()?.flatten();
    let children = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let children: String = children.collect();
    children.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()).find(|pid| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
        ids.split_whitespace().next_back().is_some_and(|id| id.parse() == Ok(inside))
    })
}

/// Runs a command in a vm without input, and returns its status and the end of its output.
///
/// # Errors
/// When the session can't be opened or is lost.
pub(crate) async fn exec(dir: &Path, spec: ExecSpec) -> anyhow::Result<(ExitStatus, String)> {
    let mut output: Vec<u8> = Vec::new();
    let take = |bytes: &[u8]| {
        output.extend_from_slice(bytes);
        output.drain(..output.len().saturating_sub(OUTPUT_MAX));
        Ok(())
    };
    let status = stream(dir, SessionKind::Exec(Box::new(spec)), take).await?;
    Ok((status, String::from_utf8_lossy(&output).into_owned()))
}

/// Opens a session without input and hands its output on as it arrives.
///
/// # Errors
/// When the session can't be opened or is lost, what it does fails, or `take` does.
pub(crate) async fn stream(
    dir: &Path,
    what: SessionKind,
    mut take: impl FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<ExitStatus> {
    let mut connection = open(dir, what).await?;
    let _ = connection.writer.write(&Frame::eof(0, banger_wire::exec::STDIN)).await;
    while let Some(frame) = connection.reader.next().await? {
        match frame.kind {
            Kind::Data => {
                let len = u32::try_from(frame.payload.len())?;
                take(&frame.payload)?;
                // After the last piece nobody may be there to take it; what was said before that is still read.
                let _ = connection.writer.write(&Frame::credit(0, frame.channel, len)).await;
            }
            Kind::Message => match frame.parse()? {
                SessionEvent::Exited(status) => return Ok(status),
                SessionEvent::Failed(error) => return Err(error.into()),
                SessionEvent::Started { .. } => {}
            },
            Kind::Close => break,
            _ => {}
        }
    }
    bail!("the vm ended before the command did")
}

async fn open(dir: &Path, what: SessionKind) -> anyhow::Result<Connection> {
    let mut connection = connect(dir).await?;
    connection.request(VmRequest::Open { what, lease: false }).await?;
    match connection.event().await?.context("the vm has ended")? {
        VmEvent::Accepted => Ok(connection),
        VmEvent::Refused(error) => Err(error.into()),
        _ => bail!("the supervisor gave an unexpected answer"),
    }
}

/// Opens a session that has no output, and gives it what `write` writes on a thread of its own.
///
/// # Errors
/// When the session can't be opened or is lost, and what it or `write` fails with.
pub(crate) async fn feed(
    dir: &Path,
    what: SessionKind,
    write: impl FnOnce(ChannelWriter) -> std::io::Result<()> + Send + 'static,
) -> anyhow::Result<ExitStatus> {
    let mut connection = open(dir, what).await?;
    let (output, mut pieces) = channel::writer();
    let writing = banger_image::blocking::start(move || write(output));
    tokio::pin!(writing);
    let (mut window, mut sending) = (WINDOW as usize, true);
    loop {
        tokio::select! {
            piece = pieces.recv(), if sending && window >= DATA_LEN_MAX => match piece {
                Some(piece) => {
                    window -= piece.len();
                    connection.writer.write(&Frame::data(0, STDIN, piece)).await?;
                }
                None => {
                    sending = false;
                    (&mut writing).await??;
                    connection.writer.write(&Frame::eof(0, STDIN)).await?;
                }
            },
            frame = connection.reader.next() => {
                let frame = frame?.context("the vm has ended")?;
                match (frame.kind, frame.channel) {
                    (Kind::Credit, STDIN) => {
                        window = window.saturating_add(frame.parse_credit()? as usize).min(WINDOW as usize);
                    }
                    (Kind::Message, _) => match frame.parse()? {
                        SessionEvent::Exited(status) => return Ok(status),
                        SessionEvent::Failed(error) => return Err(error.into()),
                        SessionEvent::Started { .. } => {}
                    },
                    (Kind::Close, _) => bail!("the guest gave up"),
                    _ => {}
                }
            }
        }
    }
}
