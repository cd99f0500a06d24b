//! From a survey to files in a guest.

use super::base::{self, Base, BaseFile, FileKind};
use super::checkout::{Entry, Survey};
use super::metadata::{self, Branching};
use super::objects::Objects;
use crate::paths::StateDir;
use crate::stop::{Stop, failed};
use crate::text::{escape, now};
use crate::transfer::transfer;
use banger_wire::bytes::ByteString;
use banger_wire::daemon::{Event, Workspace, WorkspaceAsked};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::guest::SessionKind;
use banger_wire::item::{Item, ItemReader, ItemWriter};
use rustix::fs::{CWD, FlockOperation, RenameFlags};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
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
    pub(super) survey: Survey,
    /// Where its files are.
    root: PathBuf,
    /// The commit that is checked out.
    head: Option<String>,
    /// What is placed, filled in as it is sent.
    pub(super) base: Base,
    objects: Objects,
    /// Its directory goes with this.
    pub(super) scratch: Scratch,
}

/// Where it is to be placed.
#[derive(Debug)]
pub(crate) struct Target<'a> {
    pub(crate) vm: &'a str,
    pub(crate) id: &'a str,
    pub(crate) socket: &'a Path,
    pub(crate) path: ByteString,
    pub(crate) asked: WorkspaceAsked,
    /// What is there may be replaced, but for these.
    pub(crate) replace: Option<Vec<ByteString>>,
}

/// A directory below the owner's `workspaces`, locked while it is in use; a daemon removes those that nobody locks.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
    _lock: File,
}

impl Scratch {
    /// Returns the directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes one.
    ///
    /// # Errors
    /// When the state directory can't be written.
    pub(crate) fn make(state: &StateDir) -> Result<Self, WireError> {
        state.ensure()?;
        let parent = state.workspaces();
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!(".new-{}-{}-{number}", std::process::id(), now()));
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
    pub(crate) fn make(
        mut survey: Survey,
        state: &StateDir,
        branching: &Branching,
    ) -> Result<Self, WireError> {
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
        let mut root = survey.root.clone();
        if let (Some(commit), Some(repository)) = (&survey.from, survey.repositories.first()) {
            root = scratch.path.join("files");
            metadata::check_out(&repository.git, commit, &root, &scratch.path.join("0"))?;
            survey.see_again(&root).map_err(|error| failed("could not check the commit out", &error))?;
        }
        let base = Base {
            sha256: match survey.repositories.first() {
                Some(repository) => repository.git.is_sha256()?,
                None => false,
            },
            repositories: survey.repositories.iter().map(|of| bytes(&survey.root.join(&of.prefix))).collect(),
            commit: survey.from.clone().or_else(|| head.clone()),
            files: BTreeMap::new(),
        };
        let others = survey.repositories.iter().map(|repository| repository.git.path("objects"));
        let others: Vec<PathBuf> = others.collect::<Result<_, _>>()?;
        let kept = scratch.path.join(base::REPOSITORY);
        let objects = Objects::make(&kept, base.format(), others)?;
        if let Some(repository) = survey.repositories.first() {
            let rules = metadata::ignore_rules(&repository.git)?;
            let write = || {
                std::fs::create_dir(kept.join("info"))?;
                std::fs::write(kept.join("info/exclude"), rules)
            };
            write().map_err(|error| failed(format!("could not write to `{}`", kept.display()), &error))?;
        }
        Ok(Self { survey, root, head, base, objects, scratch })
    }
}

/// Places everything in a vm, and writes down what was placed.
///
/// # Errors
/// When a file can't be read or has changed meanwhile, when the guest can't take it, and those of the connection. The
/// guest's directory is as it was then.
pub(crate) async fn place(
    mut placement: Placement,
    target: Target<'_>,
    state: &StateDir,
    observe: &mut (dyn FnMut(&Event) + Send),
) -> Result<Workspace, Stop> {
    let record = Workspace {
        source: ByteString::from(placement.survey.root.clone().into_os_string()),
        path: target.path.clone(),
        below: ByteString::from(placement.survey.below.clone().into_os_string()),
        mode: placement.survey.mode,
        head: placement.head.clone(),
        placed: now(),
        asked: target.asked.clone(),
    };
    observe(&Event::Step { label: format!("copy {} files", placement.survey.entries.len()) });
    let total = placement.survey.len();
    let sent = Arc::new(AtomicU64::new(0));
    let mut tick = || observe(&Event::Progress { done: sent.load(Ordering::Relaxed), total: Some(total) });
    let counter = Arc::clone(&sent);
    let (readonly, replace) = (target.asked.readonly, target.replace.is_some());
    let what = SessionKind::Place { path: target.path.clone(), readonly, replace };
    let kept = target.replace.unwrap_or_default();
    let work = move |input, mut output| {
        send(&mut placement, &mut output, kept, &counter)?;
        note_seen(&mut placement.base, input)
            .map_err(|error| failed("could not read the guest's list", &error))?;
        Ok(placement)
    };
    let placement = transfer((target.vm, target.socket), what, work, &mut tick).await?;
    write_down(&record, &placement, &state.workspaces().join(target.id))?;
    Ok(record)
}

/// Makes record and base visible as a whole, in place of earlier ones.
fn write_down(record: &Workspace, placement: &Placement, dir: &Path) -> Result<(), WireError> {
    let scratch = &placement.scratch.path;
    let write = || {
        let made = scratch.join("made");
        std::fs::DirBuilder::new().mode(0o700).create(&made)?;
        std::fs::rename(scratch.join(base::REPOSITORY), made.join(base::REPOSITORY))?;
        std::fs::write(made.join(base::LIST), placement.base.to_json()?)?;
        std::fs::write(made.join(Workspace::FILE), serde_json::to_vec(record)?)?;
        match rustix::fs::renameat_with(CWD, &made, CWD, dir, RenameFlags::EXCHANGE) {
            Err(rustix::io::Errno::NOENT) => std::fs::rename(&made, dir),
            exchanged => exchanged.map_err(std::io::Error::from),
        }
    };
    write().map_err(|error| failed(format!("could not write to `{}`", dir.display()), &error))
}

/// Notes how the guest sees what it was sent, so that what has changed can be told later without reading it.
fn note_seen(base: &mut Base, input: impl Read) -> std::io::Result<()> {
    let mut reader = ItemReader::new(input);
    loop {
        match reader.next_item()? {
            Item::Listed { path, mode, changed, .. } => {
                if let Some(file) = base.files.get_mut(&path) {
                    file.seen = Some((mode, changed));
                }
            }
            Item::End => return Ok(()),
            _ => return Err(ErrorKind::InvalidData.into()),
        }
    }
}

pub(super) fn send(
    placement: &mut Placement,
    output: impl Write,
    kept: Vec<ByteString>,
    counter: &AtomicU64,
) -> Result<(), WireError> {
    let mut writer = ItemWriter::new(output);
    let Placement { survey, root, scratch, objects, base, .. } = placement;
    for (number, repository) in survey.repositories.iter().enumerate() {
        let made = scratch.path.join(number.to_string());
        send_tree(&mut writer, &made, &repository.prefix.join(".git"))
            .map_err(|error| failed("could not send the repository", &error))?;
    }
    for entry in &survey.entries {
        if let Some(file) = send_entry(&mut writer, (survey, root), entry, objects)? {
            base.files.insert(ByteString::from(entry.path.clone()), file);
        }
        counter.fetch_add(entry.len, Ordering::Relaxed);
    }
    let end = |writer: &mut ItemWriter<_>| {
        for path in kept {
            writer.item(&Item::Keep { path })?;
        }
        writer.item(&Item::End)?;
        writer.flush()
    };
    end(&mut writer).map_err(|error| failed("could not send the files", &error))
}

/// Names of the contents that the owner's repositories have for this file.
fn known<'a>(survey: &'a Survey, path: &Path) -> &'a [String] {
    let mut inside = survey.repositories.iter().filter_map(|repository| {
        let name = path.strip_prefix(&repository.prefix).ok()?;
        Some(repository.index.get(name.as_os_str())?.as_slice())
    });
    inside.next_back().unwrap_or_default()
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

/// Sends one entry as the survey saw it; returns what it was, unless it is a directory.
fn send_entry(
    writer: &mut ItemWriter<impl Write>,
    (survey, root): (&Survey, &Path),
    entry: &Entry,
    objects: &mut Objects,
) -> Result<Option<BaseFile>, WireError> {
    let full = root.join(&entry.path);
    let shown = escape(&entry.path.to_string_lossy());
    let path = ByteString::from(entry.path.clone());
    let known = known(survey, Path::new(&entry.path));
    let sent = match entry.mode & TYPE {
        DIRECTORY => writer.item(&Item::Directory { path, mode: entry.mode & PERMISSIONS }).map(|()| None),
        LINK => std::fs::read_link(&full).and_then(|target| {
            let target = ByteString::from(target.into_os_string());
            let len = target.0.len() as u64;
            let object = objects.keep(len, &mut target.0.as_slice(), known, |_| Ok(()))?;
            writer.item(&Item::Link { path, target, modified: entry.modified })?;
            Ok(Some(BaseFile { kind: FileKind::Link, object, len, seen: None }))
        }),
        _ => send_file(writer, &full, path, entry, objects, known).map(Some),
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
    objects: &mut Objects,
    known: &[String],
) -> std::io::Result<BaseFile> {
    // It may have become a link or a pipe since it was looked at; neither is followed or waited for.
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let mut file = File::options().read(true).custom_flags(flags.bits().cast_signed()).open(full)?;
    let found = file.metadata()?;
    if !found.is_file() || found.len() != entry.len || modified(&found) != entry.modified {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    let item = Item::File { path, mode: entry.mode & PERMISSIONS, modified: entry.modified, len: entry.len };
    let pass = |mut content: &mut dyn Read| writer.file(&item, &mut content);
    let object = objects.keep(entry.len, &mut file, known, pass)?;
    Ok(BaseFile { kind: FileKind::of_mode(entry.mode), object, len: entry.len, seen: None })
}
