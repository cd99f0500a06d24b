//! What crashes left in the owner's directories and nothing refers to any more.

use crate::daemon::Daemon;
use crate::{cache, cgroup, members, programs, template, vmsock};
use anyhow::Context as _;
use rustix::fs::FlockOperation;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Downloads broken off are continued by the next try; after this long there won't be one.
const PARTIAL_AGE_MIN: Duration = Duration::from_secs(7 * 24 * 3600);
/// Temporary files of a minute ago may be in use.
const TEMPORARY_AGE_MIN: Duration = Duration::from_secs(60);

/// Directories of vms, images and kernels that no row names, what networks have of vms that are not in them, and templates
/// of no use, unfinished ones among them. Nobody may be making any.
pub(crate) fn of_store(daemon: &Daemon) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = template::old(&daemon.paths.templates())?;
    for parent in ["images", "kernels", "vms", "workspaces"] {
        // Before the rows: a vm that is made meanwhile has its row before its directory.
        let entries: Vec<_> =
            std::fs::read_dir(daemon.paths.state.join(parent))?.collect::<Result<_, _>>()?;
        let names: Vec<String> = match parent {
            "images" => daemon.store.images()?.into_iter().map(|row| row.name).collect(),
            "kernels" => daemon.store.kernels()?.into_iter().map(|row| row.name).collect(),
            _ => daemon.store.vms()?.iter().map(|row| row.id.to_string()).collect(),
        };
        let is_known = |name: std::ffi::OsString| names.iter().any(|known| *name == **known);
        let unknown = entries.iter().filter(|entry| !is_known(entry.file_name())).map(|entry| entry.path());
        // A client that makes a workspace locks it; it may be the one that has just started this daemon.
        found.extend(unknown.filter(|path| parent != "workspaces" || !is_locked(path)));
    }
    found.extend(cache::unfinished(&daemon.paths.caches()));
    found.extend(members::unknown(daemon)?);
    found.sort();
    Ok(found)
}

/// Everything that is left over while the daemon runs; what may be in use is not.
pub(crate) fn find(daemon: &Daemon) -> anyhow::Result<Vec<PathBuf>> {
    // A pull's files are there before its row.
    let alone = daemon.pulling.try_lock().is_ok() && daemon.templates.try_lock().is_ok();
    list(daemon, alone && daemon.caching.try_lock().is_ok())
}

/// Removes everything that is left over; returns how many files and directories that were.
pub(crate) async fn mend(daemon: &Daemon) -> anyhow::Result<usize> {
    let alone = (daemon.pulling.try_lock(), daemon.templates.try_lock(), daemon.caching.try_lock());
    let found = list(daemon, alone.0.is_ok() && alone.1.is_ok() && alone.2.is_ok())?;
    for path in &found {
        remove(path).await?;
    }
    Ok(found.len())
}

fn list(daemon: &Daemon, is_nobody_pulling: bool) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = if is_nobody_pulling { of_store(daemon)? } else { Vec::new() };
    let temporary = |name: &str| name.starts_with(".tmp") || name.starts_with(".new-");
    for kernel in daemon.store.kernels()? {
        found.extend(old_files(&daemon.paths.kernel(&kernel.name), TEMPORARY_AGE_MIN, temporary));
    }
    if let Some(dir) = programs::installed() {
        found.extend(old_files(&dir, TEMPORARY_AGE_MIN, temporary));
    }
    let foreign = |name: &str| !["bangerd.sock", "bangerd.lock"].contains(&name);
    found.extend(old_files(&daemon.paths.state.join("run"), TEMPORARY_AGE_MIN, foreign));
    for dir in ["debian/partial", "blobs/partial"] {
        let partial = old_files(&daemon.paths.cache.join(dir), PARTIAL_AGE_MIN, |_| true);
        found.extend(partial.into_iter().filter(|path| !is_locked(path)));
    }
    Ok(found)
}

/// Removes one of them, ending a vm that works in it. One that has gone meanwhile is no failure.
pub(crate) async fn remove(path: &Path) -> anyhow::Result<()> {
    let is_dir = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir());
    let removed = if is_dir {
        for dir in [path.to_owned(), path.join("build")] {
            vmsock::end(&dir).await.context("end what a crash left")?;
            cgroup::remove_of(&dir).await;
        }
        std::fs::remove_dir_all(path)
    } else {
        std::fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove `{}`, which a crash left", path.display()))
        }
        _ => Ok(()),
    }
}

/// Files, and whatever else is no directory, that have such a name and have not changed for a while.
fn old_files(dir: &Path, age: Duration, is_wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let now = SystemTime::now();
    let mut found: Vec<PathBuf> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| is_wanted(&entry.file_name().to_string_lossy()))
        .filter(|entry| {
            let metadata = entry.metadata().ok().filter(|metadata| !metadata.is_dir());
            let changed = metadata.and_then(|metadata| metadata.modified().ok());
            changed.and_then(|changed| now.duration_since(changed).ok()).is_some_and(|since| since >= age)
        })
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

/// Returns true when somebody holds the file's lock.
pub(crate) fn is_locked(path: &Path) -> bool {
    let Ok(file) = std::fs::File::open(path) else { return false };
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
}

#[cfg(test)]
mod tests {
    use super::{is_locked, old_files};
    use std::time::Duration;

    #[test]
    fn only_old_files_of_the_right_name_are_left_over() {
        let dir = tempfile::tempdir().unwrap();
        for (name, age) in [(".new-old", 100), (".new-fresh", 1), ("firecracker", 100)] {
            let file = std::fs::File::create(dir.path().join(name)).unwrap();
            file.set_modified(std::time::SystemTime::now() - Duration::from_secs(age)).unwrap();
        }
        std::fs::create_dir(dir.path().join(".new-dir")).unwrap();
        let found = old_files(dir.path(), Duration::from_secs(60), |name| name.starts_with(".new-"));
        assert_eq!(found, [dir.path().join(".new-old")]);
        assert!(old_files(&dir.path().join("nowhere"), Duration::ZERO, |_| true).is_empty());
    }

    #[test]
    fn a_download_that_somebody_writes_is_in_use() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(!is_locked(file.path()));
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
        assert!(is_locked(file.path()));
    }
}
