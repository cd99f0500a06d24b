//! From a survey to files in a guest.

use super::checkout::{Entry, Survey};
use super::metadata::{self, Branching};
use crate::paths::StateDir;
use crate::stop::{Stop, failed};
use crate::text::{escape, now};
use crate::transfer::transfer;
use banger_wire::bytes::ByteString;
use banger_wire::daemon::{Event, Workspace};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::guest::SessionKind;
use banger_wire::item::{Item, ItemWriter};
use rustix::fs::FlockOperation;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Type bits of a mode, and two of its values.
const TYPE: u32 = 0o170_000;
const LINK: u32 = 0o120_000;
const DIRECTORY: u32 = 0o040_000;
const PERMISSIONS: u32 = 0o777;

/// Everything that is to be placed, ready on the host.
#[derive(Debug)]
pub(crate) struct Placement {
    survey: Survey,
    /// The commit that is checked out.
    head: Option<String>,
    /// Its directory goes with this.
    scratch: Scratch,
}

/// Where it is to be placed.
#[derive(Debug)]
pub(crate) struct Target<'a> {
    pub(crate) vm: &'a str,
    pub(crate) id: &'a str,
    pub(crate) socket: &'a Path,
    pub(crate) path: ByteString,
    pub(crate) readonly: bool,
}

/// A directory below the owner's `workspaces`, locked while it is in use; a daemon removes those that nobody locks.
#[derive(Debug)]
struct Scratch {
    path: PathBuf,
    _lock: File,
}

impl Scratch {
    fn make(state: &StateDir) -> Result<Self, WireError> {
        state.ensure()?;
        let parent = state.workspaces();
        let path = parent.join(format!(".new-{}-{}", std::process::id(), now()));
        let make = || {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&parent)?;
            std::fs::DirBuilder::new().mode(0o700).create(&path)?;
            let lock = File::open(&path)?;
            rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
            Ok(lock)
        };
        let lock = make().map_err(|error: std::io::Error| {
            failed(format!("could not make `{}`", path.display()), &error)
        })?;
        Ok(Self { path, _lock: lock })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // CRASH: the lock goes with the process, and the daemon's next start removes the directory.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

impl Placement {
    /// Makes on the host what the guest needs besides the files themselves. Blocks.
    ///
    /// # Errors
    /// When the repository can't be read, or the state directory not be written.
    pub(crate) fn make(survey: Survey, state: &StateDir, branching: &Branching) -> Result<Self, WireError> {
        let scratch = Scratch::make(state)?;
        let mut head = None;
        for (number, repository) in survey.repositories.iter().enumerate() {
            let of_top = if number == 0 { branching } else { &Branching::default() };
            let commit =
                metadata::build(repository, survey.mode, of_top, &scratch.path.join(number.to_string()))?;
            if number == 0 {
                head = commit;
            }
        }
        Ok(Self { survey, head, scratch })
    }
}

/// Places everything in a vm, and writes down what was placed.
///
/// # Errors
/// When a file can't be read or has changed meanwhile, when the guest can't take it, and those of the connection. The
/// guest's directory is as it was then.
pub(crate) async fn place(
    placement: Placement,
    target: Target<'_>,
    state: &StateDir,
    observe: &mut (dyn FnMut(&Event) + Send),
) -> Result<Workspace, Stop> {
    let record = Workspace {
        source: ByteString::from(placement.survey.root.clone().into_os_string()),
        path: target.path.clone(),
        mode: placement.survey.mode,
        head: placement.head.clone(),
        placed: now(),
    };
    observe(&Event::Step { label: format!("copy {} files", placement.survey.entries.len()) });
    let total = placement.survey.len();
    let sent = Arc::new(AtomicU64::new(0));
    let mut tick = || observe(&Event::Progress { done: sent.load(Ordering::Relaxed), total: Some(total) });
    let counter = Arc::clone(&sent);
    let what = SessionKind::Place { path: target.path.clone(), readonly: target.readonly };
    let work = move |_, output| send(&placement, output, &counter).map(|()| placement);
    let placement = transfer((target.vm, target.socket), what, work, &mut tick).await?;
    write_down(&record, &placement.scratch.path, &state.workspaces().join(target.id))?;
    Ok(record)
}

/// Makes the record visible as a whole, in place of an earlier one.
fn write_down(record: &Workspace, scratch: &Path, dir: &Path) -> Result<(), WireError> {
    let write = || {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let file = scratch.join(Workspace::FILE);
        std::fs::write(&file, serde_json::to_vec(record)?)?;
        std::fs::rename(file, dir.join(Workspace::FILE))
    };
    write().map_err(|error| failed(format!("could not write to `{}`", dir.display()), &error))
}

fn send(placement: &Placement, output: impl Write, counter: &AtomicU64) -> Result<(), WireError> {
    let mut writer = ItemWriter::new(output);
    for (number, repository) in placement.survey.repositories.iter().enumerate() {
        let made = placement.scratch.path.join(number.to_string());
        send_tree(&mut writer, &made, &repository.prefix.join(".git"))
            .map_err(|error| failed("could not send the repository", &error))?;
    }
    for entry in &placement.survey.entries {
        send_entry(&mut writer, &placement.survey.root, entry)?;
        counter.fetch_add(entry.len, Ordering::Relaxed);
    }
    let end = |writer: &mut ItemWriter<_>| {
        writer.item(&Item::End)?;
        writer.flush()
    };
    end(&mut writer).map_err(|error| failed("could not send the files", &error))
}

/// Sends a directory that this process has made.
fn send_tree(writer: &mut ItemWriter<impl Write>, from: &Path, to: &Path) -> std::io::Result<()> {
    let path = bytes(to);
    writer.item(&Item::Directory { path, mode: 0o755 })?;
    for found in std::fs::read_dir(from)? {
        let found = found?;
        let (from, to) = (found.path(), to.join(found.file_name()));
        let metadata = found.metadata()?;
        if metadata.is_dir() {
            send_tree(writer, &from, &to)?;
        } else {
            let item = Item::File {
                path: bytes(&to),
                mode: 0o644,
                modified: modified(&metadata),
                len: metadata.len(),
            };
            writer.file(&item, &mut File::open(from)?)?;
        }
    }
    Ok(())
}

fn bytes(path: &Path) -> ByteString {
    ByteString(path.as_os_str().as_bytes().to_vec())
}

fn modified(metadata: &std::fs::Metadata) -> i64 {
    metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec())
}

/// Sends one entry as the survey saw it.
fn send_entry(writer: &mut ItemWriter<impl Write>, root: &Path, entry: &Entry) -> Result<(), WireError> {
    let full = root.join(&entry.path);
    let shown = escape(&entry.path.to_string_lossy());
    let path = ByteString::from(entry.path.clone());
    let sent = match entry.mode & TYPE {
        DIRECTORY => writer.item(&Item::Directory { path, mode: entry.mode & PERMISSIONS }),
        LINK => std::fs::read_link(&full).and_then(|target| {
            let target = ByteString::from(target.into_os_string());
            writer.item(&Item::Link { path, target, modified: entry.modified })
        }),
        _ => send_file(writer, &full, path, entry),
    };
    sent.map_err(|error| match error.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::NotFound => {
            WireError::new(ErrorCode::Failed, format!("`{shown}` changed while it was copied"))
                .hinted("try again when nothing writes to the checkout")
        }
        _ => failed(format!("could not copy `{shown}`"), &error),
    })
}

fn send_file(
    writer: &mut ItemWriter<impl Write>,
    full: &Path,
    path: ByteString,
    entry: &Entry,
) -> std::io::Result<()> {
    // It may have become a link or a pipe since it was looked at; neither is followed or waited for.
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let mut file = File::options().read(true).custom_flags(flags.bits().cast_signed()).open(full)?;
    let found = file.metadata()?;
    if !found.is_file() || found.len() != entry.len || modified(&found) != entry.modified {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    let item = Item::File { path, mode: entry.mode & PERMISSIONS, modified: entry.modified, len: entry.len };
    writer.file(&item, &mut file)
}
