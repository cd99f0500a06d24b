//! The daemon's socket: one connection, one request.

use crate::config::Config;
use crate::daemon::{DEFAULT_KERNEL, Daemon};
use crate::export::Download;
use crate::load::{Load, Upload};
use crate::paths::Paths;
use crate::plan::CONSOLE_FILE;
use crate::pull::Wanted;
use crate::set::Change;
use crate::store::VmRow;
use crate::{cache, doctor, names, setup, vmsock};
use anyhow::Context as _;
use banger_image::debian::image;
use banger_image::oci::Platform;
use banger_wire::BUILD;
use banger_wire::daemon::{
    Available, Call, DaemonView, Event, ImageView, KernelView, Outcome, Request, VmState, VmView,
};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::STDOUT;
use banger_wire::frame::{DATA_LEN_MAX, Frame, Kind, MESSAGE_LEN_MAX};
use banger_wire::names::KernelName;
use banger_wire::stream::{FrameReader, FrameWriter};
use banger_wire::vm::VmRequest;
use rustix::fs::FlockOperation;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, channel, unbounded_channel};

/// How often a followed console is looked at.
const FOLLOW_EVERY: Duration = Duration::from_millis(100);
/// The wait after a connection could not be taken.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// Bytes of console in one frame.
const LOG_CHUNK: usize = 32 * 1024;

/// What the C library says of a full disk, and what can be done about the one of the owner's own directories.
const NO_SPACE: &str = "No space left on device";
const NO_SPACE_WAYS: &str = "`banger image cache prune --all`, `banger vm prune`, `banger image delete`";
/// How an error names a place that the owner chose.
const CHOSEN_PLACE: &str = "write to `";
const CHOSEN_PLACE_HINT: &str = "make room there, or name a place on another disk";
/// What is said of an image that is more than an image may be.
const LIMITS: [&str; 5] = [
    "unpacks to more than",
    "several times the",
    "to more than the",
    "layers, more than the",
    "the files are more than",
];
const LIMITS_HINT: &str = "if you trust it all the same, raise `[limits]` in the config";
/// Pieces of a file that a client sends, of at most 64 KiB, that wait for their reader.
const UPLOAD_PIECES: usize = 8;

/// Runs the daemon. What it has to say to whoever started it goes to `ready`, which is then closed.
pub(crate) fn run(ready: Option<File>) -> anyhow::Result<()> {
    let mut ready = ready;
    let served = serve(&mut ready);
    if let Err(error) = &served {
        // Whoever started it has heard of success, or hears of this.
        tell(&mut ready, &format!("error: {}\n", serde_json::to_string(&wire_error(error))?))?;
    }
    served
}

fn serve(ready: &mut Option<File>) -> anyhow::Result<()> {
    let Some((lock, daemon, listener)) = begin()? else {
        // Another daemon serves this state directory: for the caller that is as good.
        return tell(ready, "ready\n");
    };
    let runtime = runtime()?;
    runtime.block_on(async {
        let listener = UnixListener::from_std(listener)?;
        daemon.reconcile().await?;
        tell(ready, "ready\n")?;
        drop(ready.take());
        drop(tokio::spawn(names::serve(daemon.clone())));
        tracing::info!("serving, build {BUILD}");
        loop {
            tokio::select! {
                () = daemon.stop.notified() => break,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => drop(tokio::spawn(connection(daemon.clone(), stream))),
                    // For want of descriptors, for example: those there are come back.
                    Err(error) => {
                        tracing::error!("accept a connection: {error}");
                        tokio::time::sleep(ACCEPT_AGAIN).await;
                    }
                },
            }
        }
        // The answer to the one who asked is on its way.
        tokio::time::sleep(Duration::from_millis(20)).await;
        anyhow::Ok(())
    })?;
    let _ = std::fs::remove_file(daemon.paths.socket());
    // Tasks that still have the store end with the process, and nobody closes it.
    if let Err(error) = daemon.store.checkpoint() {
        // The log stays, and is the next daemon's.
        tracing::warn!("{error:#}");
    }
    runtime.shutdown_background();
    drop(lock);
    Ok(())
}

/// Makes what runs the daemon's tasks: one thread, beside this one. What takes long has [threads of its
/// own](banger_image::blocking).
///
/// It panics when there is no thread or descriptor for it, which becomes an error here. Without one for a second worker it
/// would not even say so, and leave that worker's tasks to nobody.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let build = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let built = std::panic::catch_unwind(build);
    std::panic::set_hook(hook);
    let built = built.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        anyhow::anyhow!(text.unwrap_or_else(|| "no threads".to_owned()))
    });
    built.context("start the daemon's threads")?.context("start the daemon's threads")
}

fn tell(ready: &mut Option<File>, text: &str) -> anyhow::Result<()> {
    if let Some(file) = ready {
        file.write_all(text.as_bytes()).context("tell that the daemon is ready")?;
    }
    Ok(())
}

type Begun = (File, Arc<Daemon>, std::os::unix::net::UnixListener);

/// Takes the state directory; none when another daemon has it.
fn begin() -> anyhow::Result<Option<Begun>> {
    let paths = Paths::open()?;
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(paths.state.join("run/bangerd.lock"))
        .context("open the daemon's lock")?;
    if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(None);
    }
    let socket = paths.socket();
    let _ = std::fs::remove_file(&socket);
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    // A socket's name is limited to 108 bytes; that of its directory is not.
    let dir = File::open(paths.state.join("run"))?;
    let name = format!("/proc/self/fd/{}/bangerd.sock", std::os::fd::AsRawFd::as_raw_fd(&dir));
    let listener = std::os::unix::net::UnixListener::bind(name).context("listen on the daemon's socket")?;
    listener.set_nonblocking(true)?;
    let daemon = Daemon::open(paths)?;
    Ok(Some((lock, daemon, listener)))
}

/// A failure as it crosses the connection.
pub(crate) fn wire_error(error: &anyhow::Error) -> WireError {
    if let Some(known) = error.chain().find_map(|cause| cause.downcast_ref::<WireError>()) {
        let mut known = known.clone();
        // What was being done when it happened comes first.
        let before: Vec<String> =
            error.chain().map(ToString::to_string).take_while(|text| *text != known.message).collect();
        if let Some((first, rest)) = before.split_first() {
            let causes = rest.iter().cloned().chain([known.message.clone()]).chain(known.causes);
            known.causes = causes.collect();
            known.message = first.clone();
        }
        return known;
    }
    let mut wire = WireError::new(ErrorCode::Failed, error.to_string());
    wire.causes = error.chain().skip(1).map(ToString::to_string).collect();
    wire
}

async fn connection(daemon: Arc<Daemon>, stream: UnixStream) {
    let own = rustix::process::getuid().as_raw();
    let peer = stream.peer_cred().map(|cred| cred.uid());
    if !matches!(peer, Ok(uid) if uid == own || uid == 0) {
        tracing::warn!("refused a connection of another user");
        return;
    }
    let (read, write) = stream.into_split();
    let mut reader = FrameReader::new(read, MESSAGE_LEN_MAX);
    let mut writer = FrameWriter::new(write);
    let call: Call = match reader.next().await {
        Ok(Some(frame)) => match frame.parse() {
            Ok(call) => call,
            // Only another build sends what this one can't read.
            Err(_) => return drop(writer.message(0, &Event::Failed(mismatch())).await),
        },
        _ => return,
    };
    if call.build != BUILD && !matches!(call.request, Request::DaemonStop | Request::DaemonStatus) {
        return drop(writer.message(0, &Event::Failed(mismatch())).await);
    }
    if let Request::VmLogs { vm, lines, follow } = &call.request {
        let done = logs(&daemon, vm, *lines, *follow, &mut reader, &mut writer).await;
        return drop(writer.message(0, &finish(done.map(|()| Outcome::Done), &daemon.paths)).await);
    }
    operate(daemon, call.request, reader, writer).await;
}

fn mismatch() -> WireError {
    WireError::new(ErrorCode::BuildMismatch, format!("this daemon is build {BUILD}"))
}

fn finish(result: anyhow::Result<Outcome>, paths: &Paths) -> Event {
    match result {
        Ok(outcome) => Event::Done(Box::new(outcome)),
        Err(error) => {
            tracing::info!("failed: {error:#}");
            let mut wire = wire_error(&error);
            advise(&mut wire, paths);
            Event::Failed(wire)
        }
    }
}

/// Replaces advice about what was asked for where something else is wrong.
fn advise(error: &mut WireError, paths: &Paths) {
    let says = |words: &str| error.causes.iter().chain([&error.message]).any(|text| text.contains(words));
    let hint = match () {
        () if says(NO_SPACE) && says(CHOSEN_PLACE) => CHOSEN_PLACE_HINT.to_owned(),
        () if says(NO_SPACE) => {
            format!("make room on the disk of `{}`: {NO_SPACE_WAYS}", fuller(paths).display())
        }
        () if LIMITS.into_iter().any(says) => LIMITS_HINT.to_owned(),
        () => return,
    };
    error.hint = Some(hint);
}

/// The one of the owner's directories whose disk has less room.
fn fuller(paths: &Paths) -> &Path {
    let free = |dir: &Path| rustix::fs::statvfs(dir).map_or(u64::MAX, |disk| disk.f_bavail * disk.f_frsize);
    if free(&paths.cache) < free(&paths.state) { &paths.cache } else { &paths.state }
}

/// Runs a request and passes its events on; a client that leaves cancels it. One that does not read its events holds up
/// nothing: the operation may have locks that others wait for.
async fn operate(
    daemon: Arc<Daemon>,
    request: Request,
    mut reader: FrameReader<OwnedReadHalf>,
    writer: FrameWriter<OwnedWriteHalf>,
) {
    let (events, queue) = unbounded_channel();
    let writing = tokio::spawn(write_events(writer, queue));
    let made: Made = Arc::default();
    let (input, upload) = channel(UPLOAD_PIECES);
    let download: Arc<Mutex<Option<Download>>> = Arc::default();
    let slot = Slots { made: made.clone(), download: download.clone() };
    let mut operation = Box::pin(perform(daemon.clone(), request, upload, events.clone(), slot));
    // What the client sent of a file, until there is room for it; more is not read meanwhile.
    let mut waiting = None;
    let result = loop {
        tokio::select! {
            result = &mut operation => break Some(result),
            frame = reader.next(), if waiting.is_none() => match frame {
                Ok(Some(Frame { kind: Kind::Data, payload, .. })) => waiting = Some(Some(payload)),
                Ok(Some(Frame { kind: Kind::Eof, .. })) => waiting = Some(None),
                Ok(Some(_)) => {}
                _ => break None,
            },
            room = input.reserve(), if waiting.is_some() => {
                // Without a receiver nobody wants it.
                if let (Some(piece), Ok(room)) = (waiting.take(), room) {
                    room.send(piece);
                }
            }
        }
    };
    // What it holds, others wait for; so does what comes now.
    drop(operation);
    let Some(result) = result else {
        let made = made.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(row) = made
            && let Err(error) = daemon.remove(&row).await
        {
            tracing::error!("vm {}: {error:#}", row.name);
        }
        return;
    };
    let download = download.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(download) = download else {
        let _ = events.send(finish(result, &daemon.paths));
        drop(events);
        let _ = writing.await;
        return;
    };
    drop(events);
    let Ok(mut writer) = writing.await else { return };
    let sent = send_file(&download, &mut reader, &mut writer).await;
    let _ = writer.message(0, &finish(sent.and(result), &daemon.paths)).await;
}

/// Sends a file as data; a client that leaves ends it.
async fn send_file(
    download: &Download,
    reader: &mut FrameReader<OwnedReadHalf>,
    writer: &mut FrameWriter<OwnedWriteHalf>,
) -> anyhow::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let (mut at, mut piece) = (0, vec![0; DATA_LEN_MAX]);
    loop {
        let count = download.file.read_at(&mut piece, at).context("read the archive")?;
        if count == 0 {
            break;
        }
        at += count as u64;
        let frame = Frame::data(0, STDOUT, piece[..count].to_vec());
        let writing = writer.write(&frame);
        tokio::pin!(writing);
        loop {
            tokio::select! {
                written = &mut writing => break written?,
                // Credits; the socket is what holds this up.
                frame = reader.next() => if frame?.is_none() { anyhow::bail!("the client has gone") },
            }
        }
    }
    Ok(writer.write(&Frame::eof(0, STDOUT)).await?)
}

/// Sends events until there are no more, or nobody reads them.
async fn write_events(
    mut writer: FrameWriter<OwnedWriteHalf>,
    mut queue: UnboundedReceiver<Event>,
) -> FrameWriter<OwnedWriteHalf> {
    while let Some(event) = queue.recv().await {
        if writer.message(0, &event).await.is_err() {
            break;
        }
    }
    writer
}

/// The vm a request has made so far; it goes when the request is cancelled.
type Made = Arc<Mutex<Option<VmRow>>>;

/// What a request leaves besides its outcome.
struct Slots {
    made: Made,
    /// What is sent to the client after everything else.
    download: Arc<Mutex<Option<Download>>>,
}

async fn perform(
    daemon: Arc<Daemon>,
    request: Request,
    upload: Upload,
    events: UnboundedSender<Event>,
    slots: Slots,
) -> anyhow::Result<Outcome> {
    let note = |row: Option<VmRow>| *slots.made.lock().unwrap_or_else(PoisonError::into_inner) = row;
    match request {
        Request::VmRun(spec) => {
            let row = daemon.create(&spec, VmState::Starting, &events).await?;
            note(Some(row.clone()));
            let started = daemon.start(&row, spec.wait, &events).await;
            note(None);
            if let Err(error) = &started
                && wire_error(error).code == ErrorCode::Invalid
                && !vmsock::is_alive(&daemon.paths.vm(row.id.as_str()))
            {
                // What is refused leaves nothing.
                daemon.remove(&row).await?;
            }
            Ok(Outcome::Started(started?))
        }
        Request::VmCreate(spec) => {
            let row = daemon.create(&spec, VmState::Created, &events).await?;
            Ok(Outcome::Created(daemon.view(&row)))
        }
        Request::VmPlan(spec) => daemon.plan(&spec).await,
        Request::VmStart { vm, wait } => {
            let row = daemon.row(&vm)?;
            Ok(Outcome::Started(daemon.start(&row, wait, &events).await?))
        }
        Request::VmStop { vm, grace_ms } => daemon.stop(&vm, VmRequest::Stop { grace_ms }, &events).await,
        Request::VmKill { vm } => daemon.stop(&vm, VmRequest::Kill, &events).await,
        Request::VmDelete { vm, force } => daemon.delete(&vm, force).await,
        Request::VmSignal { vm, signal } => daemon.signal(&vm, signal).await,
        Request::VmStats { vm } => daemon.stats(&vm).await,
        Request::VmSet { vm, vcpu, memory, disk_size, net, net_allow, network } => {
            daemon.set(&vm, Change { vcpu, memory, disk_size, net, net_allow, network }).await
        }
        Request::VmNetShow { vm } => daemon.net_show(&vm).await,
        Request::VmNetChange { vm, allow, deny } => daemon.net_change(&vm, &allow, &deny).await,
        Request::VmNetDenials { vm } => daemon.net_denials(&vm).await,
        Request::VmList => Ok(Outcome::Vms(daemon.store.vms()?.iter().map(|row| daemon.view(row)).collect())),
        Request::VmShow { vm } => {
            let row = daemon.row(&vm)?;
            let plan = vmsock::load_plan(&daemon.paths.vm(row.id.as_str()));
            let cmdline = plan.as_ref().map(|plan| banger_vmm::launch(&plan.machine).cmdline);
            let caches = plan.as_ref().map(cache::of_plan).unwrap_or_default();
            Ok(Outcome::Vm(VmView { cmdline, caches, ..daemon.view(&row) }))
        }
        Request::VmPrune { dry_run } => daemon.prune(dry_run).await,
        Request::Doctor { fix } => doctor::run(&daemon, fix, &events, &|row| note(Some(row))).await,
        Request::Setup { dry_run, firecracker_url } => {
            setup::run(&daemon, dry_run, firecracker_url.as_deref(), &events).await
        }
        Request::ConfigShow => Ok(Outcome::Config(Config::show()?)),
        Request::CacheList => daemon.list_caches(),
        Request::CachePrune { names, dry_run } => daemon.prune_caches(names, dry_run).await,
        Request::DaemonStatus => Ok(Outcome::Daemon(DaemonView {
            pid: std::process::id(),
            build: BUILD.to_owned(),
            started: daemon.started,
            running: daemon.store.vms()?.iter().filter(|row| row.state == VmState::Running).count(),
            state_dir: daemon.paths.state.display().to_string(),
            cache_dir: daemon.paths.cache.display().to_string(),
            log: daemon.paths.state.join("bangerd.log").display().to_string(),
        })),
        Request::DaemonStop => {
            daemon.stop.notify_one();
            Ok(Outcome::Done)
        }
        Request::ImageLoad { label, size, reference, name } => {
            let load = Load { label, size, wanted: reference, name };
            let rows = daemon.load(load, upload, &events).await?;
            let views = rows.iter().map(|row| find_image(&daemon, &row.name));
            Ok(Outcome::Images(views.collect::<Result<_, _>>()?))
        }
        Request::ImageExport { image, layout } => {
            let row = daemon.find_image(&image)?.ok_or_else(|| no("image", &image))?;
            let file = daemon.export(&row, layout.map(Into::into), &events).await?;
            *slots.download.lock().unwrap_or_else(PoisonError::into_inner) = file;
            Ok(Outcome::Done)
        }
        parts => perform_parts(&daemon, parts, &events).await,
    }
}

fn no(kind: &str, name: &str) -> WireError {
    WireError::new(ErrorCode::NotFound, format!("no {kind} `{}`", name.escape_debug()))
        .hinted(format!("`banger {kind} list` shows what is here"))
}

fn find_image(daemon: &Daemon, text: &str) -> anyhow::Result<ImageView> {
    let row = daemon.find_image(text)?.ok_or_else(|| no("image", text))?;
    let found = daemon.images()?.into_iter().find(|image| image.name.as_str() == row.name);
    Ok(found.ok_or_else(|| no("image", text))?)
}

fn find_kernel(daemon: &Daemon, name: &KernelName) -> anyhow::Result<KernelView> {
    let found = daemon.kernels()?.into_iter().find(|kernel| kernel.name == *name);
    Ok(found.ok_or_else(|| no("kernel", name.as_str()))?)
}

/// Images and kernels.
async fn perform_parts(
    daemon: &Daemon,
    request: Request,
    events: &UnboundedSender<Event>,
) -> anyhow::Result<Outcome> {
    match request {
        Request::ImagePull { reference, name, kernel, platform } => {
            let platform = match platform {
                Some(text) => {
                    text.parse().map_err(|error| WireError::from_error(ErrorCode::Invalid, &error))?
                }
                None => Platform::host(),
            };
            let builder = kernel.as_ref().map_or(DEFAULT_KERNEL, KernelName::as_str);
            let builder = daemon.ensure_kernel(builder, events).await?;
            let wanted = Wanted { name, platform, kernel: kernel.map(String::from), initrd: None };
            let row = daemon.refresh_image(&reference, &wanted, &builder, events).await?;
            Ok(Outcome::Image(find_image(daemon, &row.name)?))
        }
        Request::ImageRegister(files) => {
            let row = daemon.register(*files, events).await?;
            Ok(Outcome::Image(find_image(daemon, &row.name)?))
        }
        Request::ImageCommit { vm, name } => {
            let row = daemon.commit(&vm, &name, events).await?;
            Ok(Outcome::Image(find_image(daemon, &row.name)?))
        }
        Request::ImageVerify { image } => {
            let image = match image {
                Some(image) => Some(daemon.find_image(&image)?.ok_or_else(|| no("image", &image))?),
                None => None,
            };
            Ok(Outcome::Verified(daemon.verify(image, events).await?))
        }
        Request::ImageCachePrune { dry_run, all } => daemon.prune_cache(dry_run, all).await,
        Request::ImageAvailable => {
            let stored = daemon.store.images()?;
            let available = image::RECIPES.iter().map(|recipe| Available {
                name: recipe.name.to_owned(),
                what: "Debian packages".to_owned(),
                present: stored.iter().any(|row| row.name == recipe.name),
            });
            Ok(Outcome::Available(available.collect()))
        }
        Request::ImageList => Ok(Outcome::Images(daemon.images()?)),
        Request::ImageShow { image } => Ok(Outcome::Image(find_image(daemon, &image)?)),
        Request::ImageDelete { image } => daemon.delete_image(&find_image(daemon, &image)?),
        Request::KernelPull { name, upgrade } => {
            daemon.pull_kernel(name.as_str(), upgrade, events).await?;
            Ok(Outcome::Kernel(find_kernel(daemon, &name)?))
        }
        Request::KernelImport(files) => {
            let name = files.name.clone();
            daemon.import_kernel(*files, events).await?;
            Ok(Outcome::Kernel(find_kernel(daemon, &name)?))
        }
        Request::KernelAvailable => {
            let stored = daemon.store.kernels()?;
            let available = banger_image::kernel::catalog().map(|name| Available {
                name: name.to_owned(),
                what: "Debian's cloud kernel".to_owned(),
                present: stored.iter().any(|row| row.name == name),
            });
            Ok(Outcome::Available(available.collect()))
        }
        Request::KernelList => Ok(Outcome::Kernels(daemon.kernels()?)),
        Request::KernelShow { name } => Ok(Outcome::Kernel(find_kernel(daemon, &name)?)),
        Request::KernelDelete { name } => daemon.delete_kernel(&find_kernel(daemon, &name)?),
        _ => Err(WireError::new(ErrorCode::Invalid, "an unknown request").into()),
    }
}

/// Sends a vm's console, and what is added to it while it is followed.
async fn logs(
    daemon: &Daemon,
    vm: &str,
    lines: Option<usize>,
    follow: bool,
    reader: &mut FrameReader<OwnedReadHalf>,
    writer: &mut FrameWriter<OwnedWriteHalf>,
) -> anyhow::Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let row = daemon.row(vm)?;
    let dir = daemon.paths.vm(row.id.as_str());
    let path = dir.join(CONSOLE_FILE);
    let mut bytes = vmsock::read_file(&dir, CONSOLE_FILE);
    let mut seen =
        std::fs::symlink_metadata(&path).map_or((0, 0), |metadata| (metadata.ino(), bytes.len() as u64));
    if let Some(lines) = lines {
        let ends = bytes.iter().enumerate().rev().skip(1).filter(|(_, byte)| **byte == b'\n');
        let start = ends.map(|(index, _)| index + 1).nth(lines.saturating_sub(1)).unwrap_or(0);
        bytes.drain(..if lines == 0 { bytes.len() } else { start });
    }
    loop {
        for chunk in bytes.chunks(LOG_CHUNK) {
            writer.write(&Frame::data(0, 1, chunk.to_vec())).await?;
        }
        if !follow || !vmsock::is_alive(&dir) {
            break;
        }
        tokio::select! {
            () = tokio::time::sleep(FOLLOW_EVERY) => {}
            frame = reader.next() => if frame?.is_none() { return Ok(()) },
        }
        let all = vmsock::read_file(&dir, CONSOLE_FILE);
        let inode = std::fs::symlink_metadata(&path).map_or(0, |metadata| metadata.ino());
        let before = usize::try_from(seen.1).unwrap_or(0);
        let from = match inode == seen.0 {
            true if before <= all.len() => before,
            // Begun anew by another boot.
            true => 0,
            // A new file begins with what was kept of the old one; what was lost between is lost to the reader too.
            false => all.len(),
        };
        seen = (inode, all.len() as u64);
        bytes = all[from..].to_vec();
    }
    writer.write(&Frame::eof(0, 1)).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{CHOSEN_PLACE_HINT, LIMITS_HINT, NO_SPACE_WAYS, advise};
    use crate::paths::Paths;
    use banger_image::oci::{EntryError, LayerError, ManifestError};
    use banger_wire::error::{ErrorCode, WireError};

    #[test]
    fn what_a_hint_is_for_is_recognised() {
        let layer = banger_image::oci::Digest::of(b"");
        let entries = LayerError::Entries { layer: layer.clone(), limit: 5 };
        let entry = LayerError::Entry { layer, entry: b"a".to_vec(), source: EntryError::Data(5) };
        let layers = ManifestError::TooManyLayers { found: 6, limit: 5 };
        let paths = Paths { state: "/".into(), cache: "/nowhere".into() };
        let advised = |mut wire: WireError| {
            advise(&mut wire, &paths);
            wire.hint.unwrap()
        };
        let hint = |error: &(dyn std::error::Error + 'static)| {
            advised(WireError::from_error(ErrorCode::Failed, error).hinted("another"))
        };
        assert_eq!([hint(&entries), hint(&entry), hint(&layers)], [LIMITS_HINT; 3]);
        let full = std::io::Error::from_raw_os_error(28);
        assert_eq!(hint(&full), format!("make room on the disk of `/`: {NO_SPACE_WAYS}"));
        let mut wire = WireError::new(ErrorCode::Failed, "write to `/mnt/there`");
        wire.causes.push(full.to_string());
        assert_eq!(advised(wire), CHOSEN_PLACE_HINT);
        assert_eq!(hint(&ManifestError::Schema1), "another");
    }
}
