//! What the owner's daemon decides: names, defaults, states, and when something goes.
//!
//! State of a running vm is its supervisor's; the daemon watches it and writes down what it hears. After a crash the
//! locks on the disks say which vms run, and the ordinary start-up path picks them up again.

use crate::config::Config;
use crate::doctor::leftovers;
use crate::lifecycle::lost;
use crate::load::SPOOL_PREFIX;
use crate::paths::Paths;
use crate::plan::{DISK_FILE, SOCKET_FILE};
use crate::programs::{self, Vmm};
use crate::pull::{ROOTFS_FILE, entropy};
use crate::store::{ImageRow, KernelRow, Store, VmRow};
use crate::vmsock;
use anyhow::Context as _;
use banger_sys::tsc;
use banger_wire::daemon::{
    Event, ImageView, KernelView, NetMode, Outcome, PlanSummary, VmSpec, VmState, VmView, VmmChoice,
    Workspace,
};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::names::{KernelName, VmName};
use banger_wire::size::Mebibytes;
use banger_wire::vm::VmStatus;
use std::collections::{HashMap, HashSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc::UnboundedSender;

pub(crate) const DEFAULT_IMAGE: &str = "debian-bookworm";
pub(crate) const DEFAULT_KERNEL: &str = "generic-6.12";
const DEFAULT_DISK: Mebibytes = Mebibytes(8 * 1024);
/// The least a vm can boot with.
const MEMORY_MIN: Mebibytes = Mebibytes(128);
const DISK_MIN: Mebibytes = Mebibytes(128);
const DISK_MAX: Mebibytes = Mebibytes(16 << 20);
const VCPU_MAX: u32 = 32;

/// How often a made-up name may turn out to be taken: each time another request was quicker.
const NAME_TRIES_MAX: u32 = 8;

/// The daemon's state, shared by all connections.
#[derive(Debug)]
pub(crate) struct Daemon {
    pub(crate) paths: Paths,
    pub(crate) store: Store,
    /// One pull at a time, so that two requests for one image do the work once.
    pub(crate) pulling: tokio::sync::Mutex<()>,
    /// What the supervisors of running vms said last.
    pub(crate) running: Mutex<HashMap<String, VmStatus>>,
    pub(crate) started: i64,
    pub(crate) stop: tokio::sync::Notify,
    /// One start, stop or removal of a vm at a time.
    pub(crate) busy: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// One template at a time is made; these can't be used.
    pub(crate) templates: tokio::sync::Mutex<HashSet<String>>,
    tsc: Option<tsc::Reading>,
}

/// Seconds since 1970.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

fn invalid(message: impl Into<String>) -> anyhow::Error {
    WireError::new(ErrorCode::Invalid, message).into()
}

/// A request with every default filled in.
struct Resolved {
    summary: PlanSummary,
    given_name: bool,
}

impl Daemon {
    /// Finds the state and brings it up to what the locks on the disks say.
    pub(crate) fn open(paths: Paths) -> anyhow::Result<Arc<Self>> {
        let store = Store::open(&paths.state.join("banger.db"))?;
        Ok(Arc::new(Self {
            paths,
            store,
            pulling: tokio::sync::Mutex::default(),
            running: Mutex::default(),
            started: now(),
            stop: tokio::sync::Notify::new(),
            busy: Mutex::default(),
            templates: tokio::sync::Mutex::default(),
            tsc: tsc::Reading::now(),
        }))
    }

    /// Recovers what a crash left: vms that still run are watched again, the rest is written down as ended.
    pub(crate) async fn reconcile(self: &Arc<Self>) -> anyhow::Result<()> {
        for leftover in leftovers::of_store(self)? {
            leftovers::remove(&leftover).await?;
        }
        let rows = self.store.vms()?;
        // Archives that were being loaded; in the cache is nothing that anybody would miss.
        for entry in std::fs::read_dir(&self.paths.cache)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(SPOOL_PREFIX) {
                std::fs::remove_dir_all(entry.path()).context("remove what a crash left")?;
            }
        }
        for row in rows {
            let dir = self.paths.vm(row.id.as_str());
            if vmsock::is_alive(&dir) {
                self.watch(row);
            } else if matches!(row.state, VmState::Starting | VmState::Running | VmState::Stopping) || row.rm
            {
                let end = vmsock::load_end(&dir).unwrap_or_else(lost);
                self.settle(&row, &end).await?;
            }
        }
        Ok(())
    }

    /// Looks the VMM up.
    pub(crate) fn qemu(&self) -> anyhow::Result<PathBuf> {
        programs::find(Vmm::Qemu, &Config::load()?)
    }

    /// Returns the rate of the time stamp counter, known since some milliseconds after the daemon's start.
    pub(crate) async fn tsc_khz(&self) -> Option<u64> {
        let reading = self.tsc?;
        tokio::time::sleep(tsc::DISTANCE_MIN.saturating_sub(reading.age())).await;
        reading.khz()
    }

    fn resolve(&self, spec: &VmSpec) -> anyhow::Result<Resolved> {
        if spec.vmm == Some(VmmChoice::Firecracker) {
            return Err(WireError::new(ErrorCode::Invalid, "Firecracker is not supported yet")
                .hinted("leave `--vmm` out, or use `--vmm qemu`")
                .into());
        }
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        let vcpu = spec.vcpu.unwrap_or((cpus / 4).clamp(1, 4));
        if !(1..=VCPU_MAX).contains(&vcpu) {
            return Err(invalid(format!("{vcpu} virtual processors: there can be 1 to {VCPU_MAX}")));
        }
        let ram = Mebibytes(rustix::system::sysinfo().totalram >> 20);
        let memory = spec.memory.unwrap_or(Mebibytes((ram.0 / 8).clamp(512, 8 * 1024)));
        if memory < MEMORY_MIN || memory > ram {
            return Err(invalid(format!(
                "{memory} of memory: there can be {MEMORY_MIN} to {ram} on this machine"
            )));
        }
        let disk_size = spec.disk_size.unwrap_or(DEFAULT_DISK);
        if !(DISK_MIN..=DISK_MAX).contains(&disk_size) {
            return Err(invalid(format!("a disk of {disk_size}: there can be {DISK_MIN} to {DISK_MAX}")));
        }
        let vms = self.store.vms()?;
        let name = match &spec.name {
            Some(name) if vms.iter().any(|row| row.name == *name) => {
                return Err(WireError::new(
                    ErrorCode::Invalid,
                    format!("a vm named `{name}` exists already"),
                )
                .hinted(format!("choose another name, or delete it with `banger vm delete {name}`"))
                .into());
            }
            Some(name) => name.clone(),
            None => made_up_name(&vms)?,
        };
        let image = match &spec.image {
            Some(image) => image.clone(),
            None => Config::load()?.default_image.unwrap_or_else(|| DEFAULT_IMAGE.to_owned()),
        };
        let kernel: KernelName = match &spec.kernel {
            Some(kernel) => kernel.clone(),
            None => DEFAULT_KERNEL.parse()?,
        };
        let summary = PlanSummary {
            name,
            vcpu,
            memory,
            disk_size,
            pull_image: self.find_image(&image)?.is_none(),
            pull_kernel: self.store.kernels()?.iter().all(|row| row.name != kernel.as_str()),
            image,
            kernel,
            vmm: "qemu".to_owned(),
            net: net_mode(spec),
            emulated: true,
        };
        Ok(Resolved { summary, given_name: spec.name.is_some() })
    }

    /// Says what a request would do.
    pub(crate) fn plan(&self, spec: &VmSpec) -> anyhow::Result<Outcome> {
        Ok(Outcome::Plan(self.resolve(spec)?.summary))
    }

    /// Makes a vm in the given state: pulls what is missing, reserves the name, formats its disk. Returns its row.
    pub(crate) async fn create(
        &self,
        spec: &VmSpec,
        state: VmState,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<VmRow> {
        let Resolved { mut summary, given_name } = self.resolve(spec)?;
        self.qemu()?;
        let _ = events.send(Event::Planned(summary.clone()));
        let kernel = self.ensure_kernel(summary.kernel.as_str(), events).await?;
        let image = self.ensure_image(&summary.image, &kernel, events).await?;
        let as_root = rustix::process::getuid().is_root();
        let mut row = VmRow {
            id: self.new_id()?,
            name: summary.name.clone(),
            state,
            error: None,
            image: image.name,
            kernel: kernel.name,
            vcpu: summary.vcpu,
            memory: summary.memory,
            disk_size: summary.disk_size,
            created: now(),
            rm: spec.rm,
            run_as: None,
            spec: serde_json::to_string(spec)?,
        };
        let mut tries = 0;
        while !self.store.insert_vm(&mut row, as_root)? {
            // Somebody took the name meanwhile.
            tries += 1;
            if given_name || tries > NAME_TRIES_MAX {
                return Err(invalid(format!("a vm named `{}` exists already", row.name)));
            }
            summary.name = made_up_name(&self.store.vms()?)?;
            row.name = summary.name.clone();
        }
        if let Err(error) = self.make_files(&row) {
            self.remove(&row).await?;
            return Err(error);
        }
        Ok(row)
    }

    fn make_files(&self, row: &VmRow) -> anyhow::Result<()> {
        use std::os::unix::fs::DirBuilderExt as _;
        let dir = self.paths.vm(row.id.as_str());
        std::fs::DirBuilder::new().mode(0o700).create(&dir).context("make the vm's directory")?;
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&entropy()?[..16]);
        banger_image::ext4::format_empty(&dir.join(DISK_FILE), row.disk_size.bytes(), uuid)
            .context("make the vm's disk")
    }

    pub(crate) fn running(&self) -> std::sync::MutexGuard<'_, HashMap<String, VmStatus>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds a vm by name, id or unique prefix of an id.
    pub(crate) fn row(&self, reference: &str) -> anyhow::Result<VmRow> {
        let rows = self.store.vms()?;
        if let Some(row) =
            rows.iter().find(|row| row.name.as_str() == reference || row.id.as_str() == reference)
        {
            return Ok(row.clone());
        }
        let shown = reference.escape_debug();
        let mut found: Vec<VmRow> = rows
            .into_iter()
            .filter(|row| !reference.is_empty() && row.id.as_str().starts_with(reference))
            .collect();
        match (found.pop(), found.is_empty()) {
            (Some(row), true) => Ok(row),
            (None, _) => Err(WireError::new(ErrorCode::NotFound, format!("no vm `{shown}`"))
                .hinted("`banger vm list` shows those there are")
                .into()),
            (Some(row), false) => {
                let names: Vec<String> =
                    found.iter().chain([&row]).map(|row| format!("`{}` ({})", row.name, row.id)).collect();
                Err(invalid(format!("`{shown}` is the beginning of several ids: {}", names.join(", "))))
            }
        }
    }

    pub(crate) fn view(&self, row: &VmRow) -> VmView {
        let dir = self.paths.vm(row.id.as_str());
        let status = self.running().get(row.id.as_str()).cloned();
        // What is in force: without a way out that is nothing, whatever was asked for.
        let cut_off = status.as_ref().is_some_and(|status| status.network_warning.is_some());
        let asked = serde_json::from_str(&row.spec).map_or(NetMode::None, |spec| net_mode(&spec));
        let net = if cut_off { NetMode::None } else { asked };
        let disk = std::fs::metadata(dir.join(DISK_FILE)).map_or(0, |metadata| metadata.blocks() * 512);
        VmView {
            id: row.id.clone(),
            name: row.name.clone(),
            state: row.state,
            error: status.as_ref().and_then(|status| status.paused.clone()).or_else(|| row.error.clone()),
            image: row.image.clone(),
            kernel: row.kernel.clone(),
            vcpu: row.vcpu,
            memory: row.memory,
            disk_size: row.disk_size,
            disk_used_bytes: disk,
            net,
            vmm: "qemu".to_owned(),
            vmm_pid: status.as_ref().and_then(|status| status.vmm_pid),
            boot_id: status.as_ref().and_then(|status| status.boot_id.clone()),
            created: row.created,
            rm: row.rm,
            socket: dir.join(SOCKET_FILE).display().to_string(),
            dir: dir.display().to_string(),
            cmdline: None,
            watchdog_restarts: status.map_or(0, |status| status.watchdog_restarts),
            workspace: Workspace::load(&self.paths.workspace(row.id.as_str())),
        }
    }

    pub(crate) fn images(&self) -> anyhow::Result<Vec<ImageView>> {
        let vms = self.store.vms()?;
        let view = |row: ImageRow| -> anyhow::Result<ImageView> {
            let file = self.paths.image(&row.name).join(ROOTFS_FILE);
            Ok(ImageView {
                name: row.name.parse()?,
                source: row.source,
                digest: row.digest,
                arch: row.arch,
                created: row.created,
                size_bytes: row.size_bytes,
                disk_bytes: std::fs::metadata(file).map_or(0, |metadata| metadata.blocks() * 512),
                init: row.init,
                used_by: vms.iter().filter(|vm| vm.image == row.name).map(|vm| vm.name.clone()).collect(),
            })
        };
        self.store.images()?.into_iter().map(view).collect()
    }

    pub(crate) fn kernels(&self) -> anyhow::Result<Vec<KernelView>> {
        let vms = self.store.vms()?;
        let view = |row: KernelRow| -> anyhow::Result<KernelView> {
            let entries = std::fs::read_dir(self.paths.kernel(&row.name)).into_iter().flatten().flatten();
            Ok(KernelView {
                name: row.name.parse()?,
                release: row.release,
                version: row.version,
                arch: row.arch,
                created: row.created,
                disk_bytes: entries.filter_map(|e| e.metadata().ok()).map(|m| m.blocks() * 512).sum(),
                used_by: vms.iter().filter(|vm| vm.kernel == row.name).map(|vm| vm.name.clone()).collect(),
            })
        };
        self.store.kernels()?.into_iter().map(view).collect()
    }

    /// Deletes an image or a kernel, when no vm uses it.
    pub(crate) fn delete_part(
        &self,
        kind: &str,
        name: &str,
        used_by: &[VmName],
        dir: &Path,
    ) -> anyhow::Result<Outcome> {
        if !used_by.is_empty() {
            let names: Vec<String> = used_by.iter().map(|name| format!("`{name}`")).collect();
            let text = format!("{kind} `{name}` is used by {}", names.join(", "));
            return Err(WireError::new(ErrorCode::Invalid, text)
                .hinted("delete those vms first with `banger vm delete`")
                .into());
        }
        // CRASH: after the row is gone the files are replaced by the next pull of that name.
        if kind == "image" {
            self.store.delete_image(name)?
        } else {
            self.store.delete_kernel(name)?
        }
        std::fs::remove_dir_all(dir).with_context(|| format!("remove `{}`", dir.display()))?;
        Ok(Outcome::Done)
    }
}

/// What a vm may reach when nothing else was asked for: the internet, and not the machines around it.
pub(crate) fn net_mode(spec: &VmSpec) -> NetMode {
    spec.net.unwrap_or(NetMode::Internet)
}

const ADJECTIVES: [&str; 16] = [
    "amber", "brisk", "calm", "deft", "eager", "fuzzy", "gentle", "hardy", "keen", "lucid", "merry",
    "nimble", "quiet", "sunny", "tidy", "wily",
];
const NOUNS: [&str; 16] = [
    "badger", "crane", "dingo", "egret", "ferret", "gecko", "heron", "ibis", "jackal", "lynx", "marten",
    "newt", "otter", "puffin", "raven", "stoat",
];

/// An adjective and a noun, with digits when the plain ones are taken.
fn made_up_name(taken: &[VmRow]) -> anyhow::Result<VmName> {
    let bytes = entropy()?;
    for (round, pair) in bytes.chunks_exact(4).enumerate() {
        let mut name =
            format!("{}-{}", ADJECTIVES[usize::from(pair[0] % 16)], NOUNS[usize::from(pair[1] % 16)]);
        if round >= 4 {
            name.push_str(&format!("-{}", u16::from_le_bytes([pair[2], pair[3]])));
        }
        if taken.iter().all(|row| row.name.as_str() != name) {
            return Ok(name.parse()?);
        }
    }
    Err(invalid("could not make up a free name; choose one with `--name`"))
}
