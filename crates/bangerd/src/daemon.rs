//! What the owner's daemon decides: names, defaults, states, and when something goes.
//!
//! State of a running vm is its supervisor's; the daemon watches it and writes down what it hears. After a crash the
//! locks on the disks say which vms run, and the ordinary start-up path picks them up again.

use crate::net::NetPlan;
use crate::paths::Paths;
use crate::plan::{CONSOLE_FILE, DISK_FILE, Inputs, SOCKET_FILE};
use crate::pull::{ROOTFS_FILE, entropy};
use crate::store::{ImageRow, KernelRow, Store, VmRow};
use crate::{initramfs, plan, vmsock};
use anyhow::Context as _;
use banger_sys::tsc;
use banger_wire::daemon::{
    Event, ImageView, KernelView, NetMode, Outcome, PlanSummary, Pruned, StartedVm, VmSpec, VmState, VmView,
    VmmChoice, Wait,
};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::names::{KernelName, VmName};
use banger_wire::size::Mebibytes;
use banger_wire::vm::{EndReason, Phase, VmEnd, VmEvent, VmRequest, VmStatus};
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc::UnboundedSender;

const DEFAULT_IMAGE: &str = "debian-bookworm";
const DEFAULT_KERNEL: &str = "generic-6.12";
const DEFAULT_DISK: Mebibytes = Mebibytes(8 * 1024);
/// The least a vm can boot with.
const MEMORY_MIN: Mebibytes = Mebibytes(128);
const DISK_MIN: Mebibytes = Mebibytes(128);
const DISK_MAX: Mebibytes = Mebibytes(16 << 20);
const VCPU_MAX: u32 = 32;

/// How long an image's init may take to finish starting, with a service that waits for something.
const INIT_WAIT: Duration = Duration::from_secs(120);

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
            tsc: tsc::Reading::now(),
        }))
    }

    /// Recovers what a crash left: vms that still run are watched again, the rest is written down as ended.
    pub(crate) async fn reconcile(self: &Arc<Self>) -> anyhow::Result<()> {
        let rows = self.store.vms()?;
        for parent in ["images", "kernels", "vms"] {
            for entry in std::fs::read_dir(self.paths.state.join(parent))? {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                let orphan = parent == "vms" && rows.iter().all(|row| row.id.as_str() != name);
                if name.starts_with(".new-") || orphan {
                    vmsock::end(&entry.path().join("build")).await;
                    std::fs::remove_dir_all(entry.path()).context("remove what a crash left")?;
                }
            }
        }
        for row in rows {
            let dir = self.paths.vm(row.id.as_str());
            if vmsock::is_alive(&dir) {
                match vmsock::connect(&dir).await {
                    Ok(connection) => self.clone().watch(row, connection),
                    Err(error) => tracing::warn!("vm {}: {error:#}", row.name),
                }
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
        let name = format!("qemu-system-{}", std::env::consts::ARCH);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&path).map(|dir| dir.join(&name)).find(|path| path.is_file());
        found.ok_or_else(|| {
            WireError::new(ErrorCode::Failed, format!("`{name}` is not installed"))
                .hinted("install it with `sudo apt-get install qemu-system-x86`, or see `banger doctor`")
                .into()
        })
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
        let image = spec.image.clone().unwrap_or_else(|| DEFAULT_IMAGE.to_owned());
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

    /// Makes a vm: pulls what is missing, reserves the name, formats its disk. Returns its row.
    pub(crate) async fn create(
        &self,
        spec: &VmSpec,
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
            state: VmState::Created,
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
        while let Err(error) = self.store.insert_vm(&mut row, as_root) {
            // Somebody took the made-up name meanwhile.
            if given_name {
                return Err(error);
            }
            summary.name = made_up_name(&self.store.vms()?)?;
            row.name = summary.name.clone();
        }
        if let Err(error) = self.make_files(&row) {
            self.release(&row).await?;
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

    /// Boots a vm and returns once sessions can be opened.
    pub(crate) async fn start(
        self: &Arc<Self>,
        row: &VmRow,
        wait: Wait,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<StartedVm> {
        let begun = Instant::now();
        let _ = events.send(Event::Step { label: format!("boot {}", row.name) });
        let dir = self.paths.vm(row.id.as_str());
        let kernel = self.paths.kernel(&row.kernel);
        let spec: VmSpec = serde_json::from_str(&row.spec).context("understand the stored request")?;
        let image = self.find_image(&row.image)?.context("the vm's image is gone")?;
        let plan = plan::plan(Inputs {
            row,
            spec: &spec,
            config: &image.config,
            dir: dir.clone(),
            image: self.paths.image(&row.image).join(ROOTFS_FILE),
            initramfs: initramfs::ensure(&kernel)?,
            kernel,
            program: self.qemu()?,
            entropy: entropy()?,
            tsc_khz: self.tsc_khz().await,
            net: NetPlan::find(net_mode(&spec)),
            build: false,
        });
        self.store.set_state(&row.id, VmState::Starting, None)?;
        let mut connection = match vmsock::start(&plan).await {
            Ok(connection) => connection,
            Err(error) => {
                self.store.set_state(&row.id, VmState::Error, Some(&format!("{error:#}")))?;
                return Err(error);
            }
        };
        connection.request(VmRequest::Watch).await?;
        let (tell, mut phases) = tokio::sync::watch::channel(None);
        self.clone().watch_and_tell(row.clone(), connection, tell);
        let settled = phases.wait_for(|status: &Option<VmStatus>| {
            let phase = status.as_ref().map(|status| &status.phase);
            matches!(phase, Some(Phase::Ready | Phase::InitReady | Phase::Failed { .. }))
        });
        let status = match settled.await {
            Ok(status) => status.clone(),
            Err(_) => None,
        };
        match status.as_ref().map(|status| &status.phase) {
            Some(Phase::Ready | Phase::InitReady) => {}
            Some(Phase::Failed { stage, cause }) => {
                self.store.set_state(&row.id, VmState::Error, Some(&format!("{stage}: {cause}")))?;
                return Err(unreachable(row, &format!("{stage}: {cause}")));
            }
            _ => {
                vmsock::wait_gone(&dir).await;
                let end = vmsock::load_end(&dir).unwrap_or_else(lost);
                return Err(unreachable(row, &end.detail));
            }
        }
        self.store.set_state(&row.id, VmState::Running, None)?;
        let mut status = status;
        if wait == Wait::Boot {
            let done = phases.wait_for(|status: &Option<VmStatus>| {
                !matches!(status.as_ref().map(|status| &status.phase), Some(Phase::Ready))
            });
            match tokio::time::timeout(INIT_WAIT, done).await {
                Ok(Ok(last)) => status = last.clone(),
                Ok(Err(_)) => {
                    let end = vmsock::load_end(&dir).unwrap_or_else(lost);
                    return Err(unreachable(row, &end.detail));
                }
                Err(_) => {
                    let text = format!(
                        "the image's init has not finished starting for {} s; going on without it",
                        INIT_WAIT.as_secs()
                    );
                    let _ = events.send(Event::Warning { text });
                }
            }
        }
        if let Some(text) = status.as_ref().and_then(|status| status.network_warning.clone()) {
            let _ = events.send(Event::Warning { text });
        }
        let view = self.view(&self.row(row.id.as_str())?);
        Ok(StartedVm {
            socket: view.socket.clone(),
            vm: view,
            timings: status.map(|status| status.timings).unwrap_or_default(),
            ready_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        })
    }

    /// Follows a vm found running.
    fn watch(self: Arc<Self>, row: VmRow, mut connection: vmsock::Connection) {
        tokio::spawn(async move {
            if connection.request(VmRequest::Watch).await.is_ok() {
                self.watch_and_tell(row, connection, tokio::sync::watch::channel(None).0);
            }
        });
    }

    fn watch_and_tell(
        self: Arc<Self>,
        row: VmRow,
        mut connection: vmsock::Connection,
        tell: tokio::sync::watch::Sender<Option<VmStatus>>,
    ) {
        tokio::spawn(async move {
            let mut end = None;
            while let Ok(Some(event)) = connection.event().await {
                match event {
                    VmEvent::State(mut status) => {
                        let inside = status.vmm_pid.zip(connection.supervisor);
                        status.vmm_pid = inside.and_then(|(pid, parent)| vmsock::outside_pid(parent, pid));
                        self.running().insert(row.id.to_string(), status.clone());
                        tell.send_replace(Some(status));
                    }
                    VmEvent::Ended(how) => end = Some(how),
                    _ => {}
                }
            }
            let dir = self.paths.vm(row.id.as_str());
            vmsock::wait_gone(&dir).await;
            self.running().remove(row.id.as_str());
            let end = end.or_else(|| vmsock::load_end(&dir)).unwrap_or_else(lost);
            // Whoever waits for the boot reads the end from the disk, so the vm's files stay until then.
            if let Err(error) = self.settle(&row, &end).await {
                tracing::error!("vm {}: {error:#}", row.name);
            }
            drop(tell);
        });
    }

    fn running(&self) -> std::sync::MutexGuard<'_, HashMap<String, VmStatus>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes down how a vm ended; one made with `--rm` goes, unless it never came up.
    async fn settle(&self, row: &VmRow, end: &VmEnd) -> anyhow::Result<()> {
        tracing::info!("vm {}: {}", row.name, end.detail);
        if row.rm && end.reason != EndReason::Failed {
            return self.release(row).await;
        }
        let failed = end.reason == EndReason::Failed;
        let state = if failed { VmState::Error } else { VmState::Stopped };
        self.store.set_state(&row.id, state, failed.then_some(end.detail.as_str()))
    }

    /// The one way a vm goes: ended if it runs, its files, its row. Can be repeated.
    pub(crate) async fn release(&self, row: &VmRow) -> anyhow::Result<()> {
        let dir = self.paths.vm(row.id.as_str());
        self.end(row, VmRequest::Kill).await?;
        // CRASH: files without a row are removed at the next start; a row is only ever deleted after its files.
        match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove `{}`", dir.display()));
            }
            _ => {}
        }
        self.store.delete_vm(&row.id)
    }

    /// Ends a vm by the given request and returns when it is gone.
    pub(crate) async fn end(&self, row: &VmRow, request: VmRequest) -> anyhow::Result<()> {
        let dir = self.paths.vm(row.id.as_str());
        if vmsock::is_alive(&dir)
            && let Ok(mut connection) = vmsock::connect(&dir).await
        {
            connection.request(request).await?;
            while let Ok(Some(event)) = connection.event().await {
                if matches!(event, VmEvent::Ended(_)) {
                    break;
                }
            }
            vmsock::wait_gone(&dir).await;
        }
        Ok(())
    }

    /// Ends a vm; its state says so when this returns.
    pub(crate) async fn stop(&self, reference: &str, request: VmRequest) -> anyhow::Result<Outcome> {
        let row = self.row(reference)?;
        if !vmsock::is_alive(&self.paths.vm(row.id.as_str())) {
            return Ok(Outcome::Vm(self.view(&row)));
        }
        self.end(&row, request).await?;
        if self.row(row.id.as_str()).is_ok() {
            self.store.set_state(&row.id, VmState::Stopped, None)?;
        }
        Ok(Outcome::Done)
    }

    pub(crate) async fn delete(&self, reference: &str, force: bool) -> anyhow::Result<Outcome> {
        let row = self.row(reference)?;
        if !force && vmsock::is_alive(&self.paths.vm(row.id.as_str())) {
            return Err(WireError::new(ErrorCode::Invalid, format!("vm `{}` is running", row.name))
                .hinted(format!("stop it with `banger vm stop {}` first", row.name))
                .into());
        }
        self.release(&row).await?;
        Ok(Outcome::Done)
    }

    pub(crate) async fn prune(&self, dry_run: bool) -> anyhow::Result<Outcome> {
        let rows = self.store.vms()?;
        let idle = |row: &&VmRow| match row.state {
            VmState::Running | VmState::Starting | VmState::Stopping => false,
            VmState::Created | VmState::Stopped | VmState::Error => true,
        };
        let doomed: Vec<&VmRow> = rows.iter().filter(idle).collect();
        let vms: Vec<VmView> = doomed.iter().map(|row| self.view(row)).collect();
        let freed_bytes = vms.iter().map(|vm| vm.disk_used_bytes).sum();
        if !dry_run {
            for row in doomed {
                self.release(row).await?;
            }
        }
        Ok(Outcome::Pruned(Pruned { vms, freed_bytes }))
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
            boot_id: status.as_ref().and_then(|status| Some(status.hello.as_ref()?.boot_id.clone())),
            created: row.created,
            rm: row.rm,
            socket: dir.join(SOCKET_FILE).display().to_string(),
            dir: dir.display().to_string(),
            cmdline: None,
            watchdog_restarts: status.map_or(0, |status| status.watchdog_restarts),
        }
    }

    pub(crate) fn console(&self, reference: &str) -> anyhow::Result<(VmRow, PathBuf)> {
        let row = self.row(reference)?;
        let path = self.paths.vm(row.id.as_str()).join(CONSOLE_FILE);
        Ok((row, path))
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
fn net_mode(spec: &VmSpec) -> NetMode {
    spec.net.unwrap_or(NetMode::Internet)
}

fn lost() -> VmEnd {
    VmEnd {
        reason: EndReason::Killed,
        detail: "its supervisor was killed, or the machine went down".to_owned(),
    }
}

fn unreachable(row: &VmRow, cause: &str) -> anyhow::Error {
    let mut error = WireError::new(ErrorCode::Unreachable, format!("could not start vm `{}`", row.name));
    error.causes.push(cause.to_owned());
    let name = &row.name;
    error
        .hinted(format!(
            "it was kept: `banger vm logs {name}`, `banger vm show {name}`, `banger vm delete {name}`"
        ))
        .into()
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
