//! Caches: filesystems that outlive the vms they are mounted in, each in one running vm at a time.
//!
//! One is a sparse file like a vm's own disk, and a drive more of the machine. Its supervisor and VMM hold an exclusive
//! `flock` on it for as long as they live, so it can't be in two vms, and a crash leaves no lock. What is in it is the
//! guests' affair: the host makes it empty and never reads it.

use crate::daemon::Daemon;
use crate::plan::{Bind, GUEST_HOME, VmPlan};
use crate::pull::{entropy, put, staging};
use crate::vmsock;
use anyhow::Context as _;
use banger_vmm::Drive;
use banger_wire::daemon::{CacheMount, CacheView, Event, Outcome, VmSpec};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::guest::GuestCache;
use banger_wire::names::CacheName;
use rustix::fs::{FlockOperation, Mode, OFlags};
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use tokio::sync::mpsc::UnboundedSender;

/// The filesystem within a cache's directory.
const FILE: &str = "cache.ext4";
/// What one may hold; what it does not hold takes no room.
const LEN: u64 = 16 << 30;
/// How many one vm may have: drives have one letter, and the first three are taken.
const MAX: usize = 16;
/// Places that the guest makes anew at each start, or that are no files.
const NOT_FILES: [&str; 6] = ["/", "/dev", "/proc", "/run", "/sys", "/tmp"];

/// A cache that a vm is started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attached {
    file: PathBuf,
    path: String,
}

impl Daemon {
    /// Refuses what a vm can't be made with.
    ///
    /// # Errors
    /// When a place is none, is named twice, or a cache is in another vm.
    pub(crate) fn check_caches(&self, caches: &[CacheMount]) -> anyhow::Result<()> {
        check(caches)?;
        for cache in caches {
            if is_busy(&self.cache_file(&cache.name)) {
                return Err(self.busy(&cache.name).into());
            }
        }
        Ok(())
    }

    /// Finds the caches a vm is started with, and makes those there are none of yet. Those it was asked for have to be
    /// free; of the config's it gets those that are. Nobody else may start a vm or delete a cache meanwhile.
    pub(crate) fn find_caches(
        &self,
        spec: &VmSpec,
        configured: &[CacheMount],
        may_have: bool,
        run_as: Option<u32>,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<Vec<Attached>> {
        let warn = |text: String| {
            let _ = events.send(Event::Warning { text });
        };
        let mut caches = spec.caches.clone();
        self.check_caches(&caches)?;
        for cache in configured {
            let with = [caches.clone(), vec![cache.clone()]].concat();
            if spec
                .caches
                .iter()
                .any(|asked| asked.name == cache.name || same_place(&asked.path, &cache.path))
            {
                // What was asked for is stronger.
            } else if let Err(error) = check(&with) {
                return Err(error.hinted("correct `[[cache]]` in the config").into());
            } else if is_busy(&self.cache_file(&cache.name)) {
                let holder = self.holder(&cache.name).unwrap_or_else(|| "another vm".to_owned());
                warn(format!("cache `{}` is in {holder}; going on without it", cache.name));
            } else if !may_have {
                warn(format!("an image with an initrd of its own has no cache `{}`", cache.name));
            } else {
                caches = with;
            }
        }
        if !may_have && !caches.is_empty() {
            return Err(no_caches().into());
        }
        caches.into_iter().map(|cache| self.attach_file(cache, run_as)).collect()
    }

    fn attach_file(&self, cache: CacheMount, run_as: Option<u32>) -> anyhow::Result<Attached> {
        let file = self.cache_file(&cache.name);
        self.make_cache(&cache.name).with_context(|| format!("make the cache `{}`", cache.name))?;
        let opened = open(&file).with_context(|| format!("open the cache `{}`", cache.name))?;
        if let Some(id) = run_as {
            std::os::unix::fs::fchown(&opened, Some(id), Some(id)).context("give the vm its cache")?;
        }
        // The time of its last use.
        let _ = opened.set_modified(std::time::SystemTime::now());
        Ok(Attached { file, path: cache.path })
    }

    fn cache_file(&self, name: &CacheName) -> PathBuf {
        self.paths.caches().join(name.as_str()).join(FILE)
    }

    fn make_cache(&self, name: &CacheName) -> anyhow::Result<()> {
        let parent = self.paths.caches();
        if parent.join(name.as_str()).exists() {
            return Ok(());
        }
        let staging = staging(&parent)?;
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&entropy()?[..16]);
        let file = staging.path().join(FILE);
        banger_image::ext4::format_empty(&file, LEN, uuid)?;
        File::open(&file)?.sync_all()?;
        // CRASH: an unfinished directory is left, and the daemon's next start removes it.
        put(staging, &parent.join(name.as_str())).context("publish it")
    }

    fn busy(&self, name: &CacheName) -> WireError {
        let text = |holder: &str| format!("cache `{name}` is in {holder}, and can be in one vm at a time");
        match self.holder(name) {
            Some(vm) => WireError::new(ErrorCode::Invalid, text(&vm)).hinted(
                "wait until that vm has ended or stop it, name another cache, or leave `--cache` out",
            ),
            None => WireError::new(ErrorCode::Invalid, text("another vm"))
                .hinted("try again in a moment; `banger cache list` shows who has it"),
        }
    }

    /// The running vm that has a cache, as a word of a sentence.
    fn holder(&self, name: &CacheName) -> Option<String> {
        self.holder_name(name).map(|vm| format!("vm `{vm}`"))
    }

    fn holder_name(&self, name: &CacheName) -> Option<String> {
        let file = self.cache_file(name);
        let has = |dir: &Path| {
            vmsock::is_alive(dir) && vmsock::load_plan(dir).is_some_and(|plan| plan.caches.contains(&file))
        };
        let rows = self.store.vms().unwrap_or_default();
        rows.into_iter().find(|row| has(&self.paths.vm(row.id.as_str()))).map(|row| row.name.to_string())
    }

    fn cache_names(&self) -> anyhow::Result<Vec<CacheName>> {
        let entries = match std::fs::read_dir(self.paths.caches()) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.context("look for caches")?,
        };
        let mut names: Vec<CacheName> =
            entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        names.sort();
        Ok(names)
    }

    fn cache_view(&self, name: CacheName) -> anyhow::Result<CacheView> {
        let found =
            std::fs::metadata(self.cache_file(&name)).with_context(|| format!("look at cache `{name}`"))?;
        Ok(CacheView {
            disk_bytes: found.blocks() * 512,
            size_bytes: found.len(),
            used: found.mtime(),
            used_by: self.holder_name(&name),
            name,
        })
    }

    /// Lists caches.
    pub(crate) fn list_caches(&self) -> anyhow::Result<Outcome> {
        let names = self.cache_names()?.into_iter();
        Ok(Outcome::Caches(names.map(|name| self.cache_view(name)).collect::<Result<_, _>>()?))
    }

    /// Deletes caches that no vm has.
    pub(crate) async fn prune_caches(&self, names: Vec<CacheName>, dry_run: bool) -> anyhow::Result<Outcome> {
        let _alone = self.caching.lock().await;
        let all = self.cache_names()?;
        if let Some(missing) = names.iter().find(|name| !all.contains(name)) {
            let error = WireError::new(ErrorCode::NotFound, format!("no cache `{missing}`"));
            return Err(error.hinted("`banger cache list` shows those there are").into());
        }
        if let Some(busy) = names.iter().find(|name| is_busy(&self.cache_file(name))) {
            return Err(self.busy(busy).hinted("wait until that vm has ended, or stop it").into());
        }
        let mut gone = Vec::new();
        for name in all.into_iter().filter(|name| names.is_empty() || names.contains(name)) {
            if is_busy(&self.cache_file(&name)) {
                continue;
            }
            gone.push(self.cache_view(name.clone())?);
            if !dry_run {
                let dir = self.paths.caches().join(name.as_str());
                // CRASH: what is left of it has no name any more, and the daemon's next start removes it.
                let aside = staging(&self.paths.caches())?;
                std::fs::rename(&dir, aside.path().join("gone"))
                    .and_then(|()| aside.close())
                    .with_context(|| format!("remove cache `{name}`"))?;
            }
        }
        Ok(Outcome::Caches(gone))
    }
}

/// What is left of caches that were being made or deleted.
pub(crate) fn unfinished(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(".new-"))
        .map(|entry| entry.path())
        .collect()
}

/// The refusal of caches where the image's own initrd finds the root filesystem.
pub(crate) fn no_caches() -> WireError {
    WireError::new(ErrorCode::Invalid, "a vm of an image with an initrd of its own can't have caches")
        .hinted("leave `--cache` out")
}

/// Refuses places that no filesystem can be mounted at.
fn check(caches: &[CacheMount]) -> Result<(), WireError> {
    let invalid = |text: String| WireError::new(ErrorCode::Invalid, text);
    if caches.len() > MAX {
        return Err(invalid(format!("{} caches: a vm can have {MAX}", caches.len())));
    }
    for (index, cache) in caches.iter().enumerate() {
        let shown = cache.path.escape_debug();
        let whole = cache.path.trim_end_matches('/');
        let parts = whole.split('/').skip(1);
        let sound = cache.path.starts_with('/')
            && cache.path.len() < 1024
            && !cache.path.contains('\0')
            && parts.clone().all(|part| !part.is_empty() && part != "." && part != ".." && part.len() <= 255);
        let is_file = NOT_FILES.iter().all(|top| {
            let below = whole.strip_prefix(top).is_some_and(|rest| *top != "/" && rest.starts_with('/'));
            !below && whole != top.trim_end_matches('/')
        });
        if !sound || !is_file {
            return Err(invalid(format!("cache `{}` can't be mounted at `{shown}`", cache.name))
                .hinted("name a directory of the guest, such as `/root/.cargo`"));
        }
        if let Some(other) = caches[..index].iter().find(|other| other.name == cache.name) {
            return Err(invalid(format!("cache `{}` is named twice", other.name)));
        }
        if let Some(other) = caches[..index].iter().find(|other| same_place(&other.path, &cache.path)) {
            return Err(invalid(format!(
                "caches `{}` and `{}` have one place, `{shown}`",
                other.name, cache.name
            )));
        }
    }
    Ok(())
}

fn same_place(a: &str, b: &str) -> bool {
    a.trim_end_matches('/') == b.trim_end_matches('/')
}

fn open(file: &Path) -> std::io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::open(file, flags, Mode::empty())?))
}

/// Understands a place below the guest's home.
pub(crate) fn settle_places(caches: &mut [CacheMount]) {
    for cache in caches {
        if let Some(below) = cache.path.strip_prefix("~/") {
            cache.path = format!("{GUEST_HOME}/{below}");
        }
    }
}

/// Tells whether a vm has it. Shared, so that two who ask do not take each other for one.
fn is_busy(file: &Path) -> bool {
    let Ok(file) = open(file) else { return false };
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_err()
}

/// Gives a planned vm its caches, as its last drives.
pub(crate) fn attach(plan: &mut VmPlan, caches: &[Attached]) {
    for cache in caches {
        let number = plan.machine.drives.len();
        let inside = PathBuf::from(format!("/boot/cache-{number}"));
        let letter = char::from(b'a' + u8::try_from(number).unwrap_or(u8::MAX - b'a'));
        plan.machine.drives.push(Drive { path: inside.clone(), read_only: false, rate: None });
        plan.writable.push(Bind { host: cache.file.clone(), inside });
        plan.guest
            .drives
            .caches
            .push(GuestCache { device: format!("/dev/vd{letter}"), path: cache.path.clone() });
        plan.caches.push(cache.file.clone());
    }
}

/// Returns the caches of a plan.
pub(crate) fn of_plan(plan: &VmPlan) -> Vec<CacheMount> {
    let name = |file: &PathBuf| file.parent()?.file_name()?.to_str()?.parse().ok();
    let pairs = plan.caches.iter().zip(&plan.guest.drives.caches);
    pairs.filter_map(|(file, at)| Some(CacheMount { name: name(file)?, path: at.path.clone() })).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(pairs: &[(&str, &str)]) -> Vec<CacheMount> {
        let mount = |(name, path): &(&str, &str)| CacheMount {
            name: name.parse().unwrap(),
            path: (*path).to_owned(),
        };
        pairs.iter().map(mount).collect()
    }

    #[test]
    fn places_are_directories_of_the_guests_files() {
        for good in ["/root/.cargo", "/var/cache/apt/", "/a", "/devices", "/tmpfiles/x"] {
            assert!(check(&mounts(&[("c", good)])).is_ok(), "{good}");
        }
        for bad in [
            "", "/", "//", "a", "~/x", "/a/../b", "/a//b", "/./a", "/proc", "/proc/x", "/tmp/x", "/dev/",
            "/a\0",
        ] {
            assert!(check(&mounts(&[("c", bad)])).is_err(), "{bad:?}");
        }
        let mut below_home = mounts(&[("c", "~/.cargo")]);
        settle_places(&mut below_home);
        assert_eq!(below_home, mounts(&[("c", "/root/.cargo")]));
        assert!(check(&mounts(&[("a", "/a"), ("b", "/b")])).is_ok());
        assert!(check(&mounts(&[("a", "/a"), ("a", "/b")])).is_err());
        assert!(check(&mounts(&[("a", "/a"), ("b", "/a/")])).is_err());
        let many: Vec<String> = (0..=MAX).map(|number| format!("/{number}")).collect();
        let many: Vec<(&str, &str)> = many.iter().map(|path| (&path[1..], path.as_str())).collect();
        assert!(check(&mounts(&many[..MAX])).is_ok() && check(&mounts(&many)).is_err());
    }

    #[test]
    fn a_locked_one_is_busy() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(!is_busy(file.path()) && !is_busy(Path::new("/nowhere")));
        rustix::fs::flock(&file, FlockOperation::LockExclusive).unwrap();
        assert!(is_busy(file.path()));
    }
}
