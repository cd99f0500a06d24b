//! `vm cp`: files and trees into a vm and out of it, or one file by stdin and stdout.
//!
//! Where something goes is decided as `cp -a` and `docker cp` do: into a directory that is there, else to the name given.
//! The reading and the writing are `banger_copy`'s, which the agent uses on the other side.

use crate::args::CopyArgs;
use crate::context::Context;
use crate::progress::Progress;
use crate::run::running;
use crate::stop::{Ended, Stop, failed, invalid};
use crate::streams;
use crate::text::escape;
use crate::transfer::transfer;
use banger_copy::Target;
use banger_wire::bytes::ByteString;
use banger_wire::channel::{ChannelReader, ChannelWriter};
use banger_wire::daemon::{Event, VmView};
use banger_wire::error::WireError;
use banger_wire::guest::SessionKind;
use banger_wire::item::ItemWriter;
use std::ffi::{OsStr, OsString};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Names of what was left out that are said; the rest is counted.
const LEFT_OUT_SHOWN: usize = 10;
/// What the thread that writes files gets to take an unfinished one away, when it is asked to end.
const CLEAN_UP_TIME: Duration = Duration::from_secs(1);

/// Where an argument leads.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Here(PathBuf),
    /// Stdin or stdout.
    Stream,
    There {
        vm: String,
        path: OsString,
    },
}

/// As `scp` has it: what has a colon before its first slash is elsewhere.
fn place(argument: &OsStr) -> Place {
    let bytes = argument.as_bytes();
    let before =
        bytes.iter().position(|byte| matches!(byte, b':' | b'/')).filter(|&at| at > 0 && bytes[at] == b':');
    match before.and_then(|at| Some((at, std::str::from_utf8(&bytes[..at]).ok()?))) {
        Some((at, vm)) => {
            Place::There { vm: vm.to_owned(), path: OsString::from_vec(bytes[at + 1..].to_vec()) }
        }
        None if bytes == b"-" => Place::Stream,
        None => Place::Here(argument.into()),
    }
}

/// The name of a source in the directory it goes to; none where its content is meant.
fn name_of(path: &OsStr) -> Option<&OsStr> {
    let bytes = path.as_bytes();
    let end = bytes.iter().rposition(|&byte| byte != b'/').map_or(0, |at| at + 1);
    let start = bytes[..end].iter().rposition(|&byte| byte == b'/').map_or(0, |at| at + 1);
    Some(&bytes[start..end]).filter(|name| !matches!(*name, b"" | b"." | b"..")).map(OsStr::from_bytes)
}

/// One copy of one source.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Job {
    In { source: Place, target: OsString },
    Out { source: OsString, target: Place },
}

/// Everything that was asked for: the vm, and what is copied, in order.
fn plan(args: &CopyArgs) -> Result<(String, Vec<Job>), WireError> {
    let refused = |text: &str, hint: &str| Err(invalid(text).hinted(hint));
    let target = place(&args.target);
    let mut vms: Vec<String> = Vec::new();
    let mut jobs = Vec::new();
    for source in args.sources.iter().map(|source| place(source)) {
        let (vm, job) = match (source, target.clone()) {
            (Place::There { vm, .. }, Place::There { vm: other, .. }) => {
                let hint = format!(
                    "copy one file with `banger vm cp {vm}:PATH - | banger vm cp - {other}:PATH`, or by way of this machine"
                );
                return refused("both sides are in vms", &hint);
            }
            (source, Place::There { vm, path }) => (vm, Job::In { source, target: path }),
            (Place::There { vm, path }, target) => (vm, Job::Out { source: path, target }),
            (_, _) => {
                return refused(
                    "neither side is in a vm",
                    "name one as `REF:PATH`, such as `web:/etc/hosts`",
                );
            }
        };
        if vms.last().is_some_and(|last| *last != vm) {
            return refused("the sources are in several vms", "copy from one vm at a time");
        }
        vms.push(vm);
        jobs.push(job);
    }
    let streams = jobs.iter().filter(|job| {
        matches!(job, Job::In { source: Place::Stream, .. } | Job::Out { target: Place::Stream, .. })
    });
    if jobs.len() > 1 && streams.count() > 0 {
        return refused("`-` is one file, and there are several sources", "copy it in a command of its own");
    }
    let vm = vms.pop().ok_or_else(|| invalid("nothing to copy"))?;
    Ok((vm, jobs))
}

/// Runs `banger vm cp`.
pub(crate) async fn copy(context: &mut Context, args: CopyArgs) -> Ended {
    let (vm, jobs) = plan(&args)?;
    let vm = running(context, vm).await?;
    let into = jobs.len() > 1;
    for job in jobs {
        run(context, &vm, job, into, args.follow_link).await?;
    }
    Ok(0)
}

/// What a copy tells while it goes on, from its thread.
#[derive(Debug, Default)]
struct Told {
    bytes: AtomicU64,
    left_out: AtomicU64,
    /// The first of them.
    names: Mutex<Vec<String>>,
    /// Nobody reads stdout any more.
    output_closed: AtomicBool,
}

impl Told {
    fn leave_out(&self, name: &[u8]) {
        self.left_out.fetch_add(1, Ordering::Relaxed);
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if names.len() < LEFT_OUT_SHOWN {
            names.push(String::from_utf8_lossy(name).into_owned());
        }
    }
}

async fn run(context: &mut Context, vm: &VmView, job: Job, into: bool, follow: bool) -> Result<(), Stop> {
    let told = Arc::new(Told::default());
    let theirs = Arc::clone(&told);
    // Tells when the thread has ended, however it was asked to.
    let (alive, ended) = oneshot::channel::<()>();
    let (label, what, total) = describe(&job, into, follow);
    let work = move |input: ChannelReader, output: ChannelWriter| {
        let _alive = alive;
        carry_out(job, into, follow, input, output, &theirs)
    };
    let Context { ui, signals, .. } = context;
    let mut progress = Progress::new(ui);
    progress.observe(&Event::Step { label });
    let mut tick = || progress.observe(&Event::Progress { done: told.bytes.load(Ordering::Relaxed), total });
    let (name, socket) = (vm.name.to_string(), PathBuf::from(&vm.socket));
    let result = signals.unless(transfer((&name, &socket), what, work, &mut tick)).await;
    if result.is_err() {
        let _ = tokio::time::timeout(CLEAN_UP_TIME, ended).await;
    }
    tick();
    progress.finish();
    if told.output_closed.load(Ordering::Relaxed) {
        return Err(Stop::OutputClosed);
    }
    let names = told.names.lock().unwrap_or_else(PoisonError::into_inner);
    for name in names.iter() {
        ui.warning(&format!("`{}` was left out: it is a device, pipe or socket", escape(name)));
    }
    let more = told.left_out.load(Ordering::Relaxed).saturating_sub(names.len() as u64);
    if more > 0 {
        ui.warning(&format!("{more} more devices, pipes and sockets were left out"));
    }
    result
}

/// What the line of progress says, what is asked of the guest, and how many bytes there are, if that is known.
fn describe(job: &Job, into: bool, follow: bool) -> (String, SessionKind, Option<u64>) {
    match job {
        Job::In { source, target } => {
            let (shown, name, total) = match source {
                Place::Here(path) => {
                    let found = path.metadata().ok().filter(std::fs::Metadata::is_file);
                    (path.display().to_string(), name_of(path.as_os_str()), found.map(|found| found.len()))
                }
                _ => ("stdin".to_owned(), None, None),
            };
            let name = name.map(|name| ByteString::from(name.to_owned()));
            let what = SessionKind::CopyIn { path: ByteString::from(target.clone()), name, into };
            (format!("copy {}", escape(&shown)), what, total)
        }
        Job::Out { source, target } => {
            let follow = follow || *target == Place::Stream;
            let what = SessionKind::CopyOut { path: ByteString::from(source.clone()), follow };
            (format!("copy {}", escape(&source.display().to_string())), what, None)
        }
    }
}

/// The part of one copy that is done here, on a thread.
fn carry_out(
    job: Job,
    into: bool,
    follow: bool,
    input: ChannelReader,
    output: ChannelWriter,
    told: &Told,
) -> Result<(), WireError> {
    let mut progress = |bytes| told.bytes.store(bytes, Ordering::Relaxed);
    let mut left_out = |name: &[u8]| told.leave_out(name);
    let mut writer = ItemWriter::new(output);
    match job {
        Job::In { source: Place::Here(path), .. } => {
            let sent = banger_copy::send(&path, follow, &mut writer, &mut left_out, &mut progress);
            sent.map_err(|error| failed(format!("could not copy `{}`", shown(path.as_os_str())), &error))
        }
        Job::In { .. } => {
            let sent = Stdin::start()
                .and_then(|mut stdin| banger_copy::send_stream(&mut stdin, &mut writer, &mut progress));
            sent.map_err(|error| failed("could not copy what comes on stdin", &error))
        }
        Job::Out { source, target: Place::Here(target) } => {
            let cannot = |error| failed(format!("could not copy to `{}`", shown(target.as_os_str())), &error);
            let target = Target::find(&target, name_of(&source), into).map_err(cannot)?;
            banger_copy::receive(target, input, &mut left_out, &mut progress).map_err(cannot)?;
            // The guest's stream ends with this one.
            drop(writer);
            Ok(())
        }
        Job::Out { .. } => {
            let received = banger_copy::receive_into(&mut Stdout, input, &mut progress);
            received.map_err(|error| {
                told.output_closed.store(error.kind() == ErrorKind::BrokenPipe, Ordering::Relaxed);
                failed("could not copy to stdout", &error)
            })
        }
    }
}

fn shown(path: &OsStr) -> String {
    escape(&Path::new(path).display().to_string())
}

/// Stdin, which may be a terminal or a pipe that is shared with other programs.
struct Stdin {
    chunks: mpsc::Receiver<Vec<u8>>,
    chunk: Vec<u8>,
    start: usize,
}

impl Stdin {
    fn start() -> std::io::Result<Self> {
        Ok(Self { chunks: streams::start_reader()?, chunk: Vec::new(), start: 0 })
    }
}

impl Read for Stdin {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.start == self.chunk.len() {
            let Some(chunk) = self.chunks.blocking_recv() else { return Ok(0) };
            (self.chunk, self.start) = (chunk, 0);
        }
        let len = buffer.len().min(self.chunk.len() - self.start);
        buffer[..len].copy_from_slice(&self.chunk[self.start..self.start + len]);
        self.start += len;
        Ok(len)
    }
}

/// Stdout, of the same kind.
struct Stdout;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        streams::write_all(rustix::stdio::stdout(), bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_lead_here_or_there() {
        let there = |vm: &str, path: &str| Place::There { vm: vm.to_owned(), path: path.into() };
        let here = |path: &str| Place::Here(path.into());
        for (argument, expected) in [
            ("web:/etc", there("web", "/etc")),
            ("web:", there("web", "")),
            ("web:a:b", there("web", "a:b")),
            ("./web:/etc", here("./web:/etc")),
            ("/a:b", here("/a:b")),
            (":x", here(":x")),
            ("-", Place::Stream),
            ("./-", here("./-")),
        ] {
            assert_eq!(place(OsStr::new(argument)), expected, "{argument}");
        }
    }

    #[test]
    fn sources_have_a_name_or_mean_their_content() {
        for (path, name) in [
            ("a", Some("a")),
            ("/x/a", Some("a")),
            ("x/a//", Some("a")),
            ("x/.", None),
            (".", None),
            ("x/..", None),
            ("/", None),
            ("", None),
            ("x/.hidden", Some(".hidden")),
        ] {
            assert_eq!(name_of(OsStr::new(path)), name.map(OsStr::new), "{path}");
        }
    }

    #[test]
    fn what_can_not_be_copied_is_said() {
        let said = |arguments: &[&str]| {
            let (target, sources) = arguments.split_last().unwrap();
            let sources = sources.iter().map(OsString::from).collect();
            let args = CopyArgs { follow_link: false, sources, target: target.into() };
            match plan(&args) {
                Ok((vm, jobs)) => format!("{vm}: {} jobs", jobs.len()),
                Err(error) => format!("{}; {}", error.message, error.hint.unwrap_or_default()),
            }
        };
        let all = [
            said(&["a", "b", "web:/x"]),
            said(&["web:/a", "web:/b", "."]),
            said(&["a", "b"]),
            said(&["web:/a", "db:/b"]),
            said(&["web:/a", "db:/b", "."]),
            said(&["-", "a", "web:/x"]),
        ];
        insta::assert_snapshot!(all.join("\n"), @r"
        web: 2 jobs
        web: 2 jobs
        neither side is in a vm; name one as `REF:PATH`, such as `web:/etc/hosts`
        both sides are in vms; copy one file with `banger vm cp web:PATH - | banger vm cp - db:PATH`, or by way of this machine
        the sources are in several vms; copy from one vm at a time
        `-` is one file, and there are several sources; copy it in a command of its own
        ");
    }
}
