//! What the owner's daemon decides: names, defaults, states, and when something goes.
//!
//! State of a running vm is its supervisor's; the daemon watches it and writes down what it hears. After a crash the
//! locks on the disks say which vms run, and the ordinary start-up path picks them up again.

use crate::cache::no_caches;
use crate::cgroup;
use crate::choice::{self, Choice};
use crate::config::Config;
use crate::doctor::facts::{Program, user};
use crate::doctor::leftovers;
use crate::files::copy_sparse;
use crate::kvm;
use crate::load::SPOOL_PREFIX;
use crate::names;
use crate::paths::Paths;
use crate::plan::{CONSOLE_FILE, DISK_FILE, SOCKET_FILE};
use crate::programs::{self, Vmm};
use crate::pull::{IMAGE_FILE, entropy, kernel_row};
use crate::request::{self, Asked};
use crate::store::{ImageRow, KernelRow, Store, VmRow};
use crate::vmsock;
use anyhow::{Context as _, bail};
use banger_image::debian::archive::architecture;
use banger_sys::tsc;
use banger_wire::daemon::{
    Event, ImageView, KernelView, NetMode, Outcome, PlanSummary, VmSpec, VmState, VmView, VmmChoice,
    Workspace,
};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::guest::InitMode;
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
/// What a kernel's directory says about itself.
pub(crate) const KERNEL_FILE: &str = "kernel.json";
pub(crate) const DEFAULT_DISK: Mebibytes = Mebibytes(8 * 1024);
/// The least a vm can boot with.
const MEMORY_MIN: Mebibytes = Mebibytes(128);
const DISK_MIN: Mebibytes = Mebibytes(128);
const DISK_MAX: Mebibytes = Mebibytes(16 << 20);
pub(crate) const VCPU_MAX: u32 = 32;

/// What is known of KVM, within the state directory.
const KVM_FILE: &str = "kvm.json";
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
    /// One start of a vm with caches, or deletion of caches, at a time.
    pub(crate) caching: tokio::sync::Mutex<()>,
    pub(crate) kvm: Arc<kvm::Known>,
    /// How far the name server is.
    pub(crate) names: Mutex<names::State>,
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

/// Refuses processors and memory that no vm can have here.
pub(crate) fn check_size(vcpu: u32, memory: Mebibytes) -> anyhow::Result<()> {
    let ram = ram();
    if !(1..=VCPU_MAX).contains(&vcpu) {
        return Err(invalid(format!("{vcpu} virtual processors: there can be 1 to {VCPU_MAX}")));
    }
    if memory < MEMORY_MIN || memory > ram {
        return Err(invalid(format!(
            "{memory} of memory: there can be {MEMORY_MIN} to {ram} on this machine"
        )));
    }
    Ok(())
}

/// A vm that is being made and goes again when nobody waits for it.
struct Unclaimed {
    making: Option<tokio::task::JoinHandle<anyhow::Result<VmRow>>>,
    daemon: Arc<Daemon>,
}

impl Unclaimed {
    async fn claim(mut self) -> anyhow::Result<VmRow> {
        let Some(making) = &mut self.making else { bail!("the vm is claimed already") };
        let made = making.await.context("make the vm");
        self.making = None;
        made?
    }
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        let Some(making) = self.making.take() else { return };
        let daemon = Arc::clone(&self.daemon);
        tokio::spawn(async move {
            if let Ok(Ok(row)) = making.await
                && let Err(error) = daemon.remove(&row).await
            {
                tracing::error!("vm {}: {error:#}", row.name);
            }
        });
    }
}

/// Refuses disks that no vm can have.
pub(crate) fn check_disk(size: Mebibytes) -> anyhow::Result<()> {
    if !(DISK_MIN..=DISK_MAX).contains(&size) {
        return Err(invalid(format!("a disk of {size}: there can be {DISK_MIN} to {DISK_MAX}")));
    }
    Ok(())
}

/// A request with every default filled in.
struct Resolved {
    /// The request with what files say filled in.
    spec: VmSpec,
    summary: PlanSummary,
    given_name: bool,
    /// What was asked for, which each start meets anew.
    vmm: VmmChoice,
    choice: Choice,
}

impl Daemon {
    /// Finds the state and brings it up to what the locks on the disks say.
    pub(crate) fn open(paths: Paths) -> anyhow::Result<Arc<Self>> {
        let store = Store::open(&paths.state.join("banger.db"))?;
        Ok(Arc::new(Self {
            kvm: Arc::new(kvm::Known::new(paths.state.join(KVM_FILE))),
            paths,
            store,
            pulling: tokio::sync::Mutex::default(),
            running: Mutex::default(),
            started: now(),
            stop: tokio::sync::Notify::new(),
            busy: Mutex::default(),
            templates: tokio::sync::Mutex::default(),
            caching: tokio::sync::Mutex::default(),
            names: Mutex::default(),
            tsc: tsc::Reading::now(),
        }))
    }

    /// Recovers what a crash left: vms that still run are watched again, the rest is written down as ended.
    pub(crate) async fn reconcile(self: &Arc<Self>) -> anyhow::Result<()> {
        for leftover in leftovers::of_store(self)? {
            leftovers::remove(&leftover).await?;
        }
        self.adopt_published()?;
        self.remove_lone_kernels()?;
        let rows = self.store.vms()?;
        // Archives that were being loaded; in the cache is nothing that anybody would miss.
        for entry in std::fs::read_dir(&self.paths.cache)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(SPOOL_PREFIX) {
                std::fs::remove_dir_all(entry.path()).context("remove what a crash left")?;
            }
        }
        for row in rows {
            let dir = self.paths.vm(row.id.as_str());
            let is_read = || {
                let mode = vmsock::load_plan(&dir).map(|plan| plan.guest.init);
                matches!(mode, Some(InitMode::AgentOnly | InitMode::Build))
            };
            if vmsock::is_alive(&dir) && is_read() {
                // It was to become an image; for its owner it is stopped.
                vmsock::end(&dir).await?;
            }
            if vmsock::is_alive(&dir) {
                self.watch(row);
            } else if matches!(row.state, VmState::Starting | VmState::Running | VmState::Stopping) || row.rm
            {
                cgroup::remove_of(&dir).await;
                self.settle(&row, vmsock::load_end(&dir).as_ref()).await?;
            }
        }
        Ok(())
    }

    /// Takes the rows of images and kernels from their files, where a crash came between the two.
    fn adopt_published(&self) -> anyhow::Result<()> {
        for row in self.store.images()? {
            let text = std::fs::read(self.paths.image(&row.name).join(IMAGE_FILE)).unwrap_or_default();
            let written = serde_json::from_slice::<ImageRow>(&text).ok();
            if let Some(written) = written.filter(|written| written.name == row.name && *written != row) {
                self.store.insert_image(&written)?;
            }
        }
        for row in self.store.kernels()? {
            let text = std::fs::read(self.paths.kernel(&row.name).join(KERNEL_FILE)).unwrap_or_default();
            let written = serde_json::from_slice(&text).ok().map(kernel_row);
            let other = |written: &KernelRow| written.name == row.name && written.release != row.release;
            if let Some(written) = written.filter(other) {
                self.store.insert_kernel(&written)?;
            }
        }
        Ok(())
    }

    /// Removes kernels that were registered with an image which did not come to be.
    pub(crate) fn remove_lone_kernels(&self) -> anyhow::Result<()> {
        let images = self.store.images()?;
        for kernel in self.kernels()? {
            let name = kernel.name.as_str();
            let is_alone = kernel.version == own_kernel_version(name)
                && images.iter().all(|image| image.name != name)
                && kernel.used_by.is_empty()
                && kernel.images.is_empty();
            if is_alone {
                self.delete_kernel(&kernel)?;
            }
        }
        Ok(())
    }

    /// Chooses what runs a vm for which this was asked for.
    pub(crate) async fn choose(&self, asked: VmmChoice) -> anyhow::Result<Choice> {
        let config = Config::load()?;
        let known = Arc::clone(&self.kvm);
        // Programs may be asked for their versions, and KVM be tried out.
        let gathered = banger_image::blocking::start(move || choice::Facts {
            asked,
            kvm: known.find(),
            qemu: programs::find(Vmm::Qemu, &config),
            firecracker: programs::find(Vmm::Firecracker, &config)
                .map(|path| Program { version: programs::version_of(&path), path }),
            user: user(),
        });
        Ok(choice::choose(gathered.await?)?)
    }

    /// Returns the rate of the time stamp counter, known since some milliseconds after the daemon's start.
    pub(crate) async fn tsc_khz(&self) -> Option<u64> {
        let reading = self.tsc?;
        tokio::time::sleep(tsc::DISTANCE_MIN.saturating_sub(reading.age())).await;
        reading.khz()
    }

    async fn resolve(&self, spec: &VmSpec) -> anyhow::Result<Resolved> {
        let Asked { spec, project } = request::fill_in(spec, &Config::load()?)?;
        self.check_caches(&spec.caches)?;
        let vmm = spec.vmm.unwrap_or(VmmChoice::Auto);
        let vcpu = spec.vcpu.unwrap_or_else(default_vcpu);
        let memory = spec.memory.unwrap_or_else(|| default_memory(ram()));
        check_size(vcpu, memory)?;
        let disk_size = spec.disk_size.unwrap_or(DEFAULT_DISK);
        check_disk(disk_size)?;
        crate::outbound::check(&spec.net_rules)?;
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
        let stored = self.find_image(&image)?;
        let own_kernel = stored.as_ref().and_then(|image| image.kernel.clone());
        let kernel: KernelName = match &spec.kernel {
            Some(kernel) => kernel.clone(),
            None => own_kernel.as_deref().unwrap_or(DEFAULT_KERNEL).parse()?,
        };
        if let Some(image) = stored.as_ref().filter(|image| image.arch != architecture()) {
            let text =
                format!("image `{}` is for {}, this machine is {}", image.name, image.arch, architecture());
            return Err(WireError::new(ErrorCode::Invalid, text)
                .hinted("pull it without `--platform`, under another name with `--name`")
                .into());
        }
        let choice = self.choose(vmm).await?;
        let summary = PlanSummary {
            name,
            vcpu,
            memory,
            disk_size,
            pull_image: stored.is_none(),
            pull_kernel: self.store.kernels()?.iter().all(|row| row.name != kernel.as_str()),
            image,
            kernel,
            vmm: choice.vmm.name().to_owned(),
            net: net_mode(&spec),
            network: spec.network.clone(),
            emulated: !choice.kvm,
            note: choice.note.clone(),
            project,
        };
        Ok(Resolved { given_name: spec.name.is_some(), spec, summary, vmm, choice })
    }

    /// Says what a request would do.
    pub(crate) async fn plan(&self, spec: &VmSpec) -> anyhow::Result<Outcome> {
        Ok(Outcome::Plan(self.resolve(spec).await?.summary))
    }

    /// Makes a vm in the given state: pulls what is missing, reserves the name, formats its disk. Returns its row.
    pub(crate) async fn create(
        self: &Arc<Self>,
        spec: &VmSpec,
        state: VmState,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<VmRow> {
        let Resolved { spec, mut summary, given_name, vmm, choice } = self.resolve(spec).await?;
        let _ = events.send(Event::Planned(summary.clone()));
        if summary.pull_image && summary.project.iter().any(|name| name == "image") {
            // Said to everybody, before anything is fetched that a stranger named.
            let image = summary.image.escape_debug();
            let text =
                format!("the image `{image}` is the choice of the checkout's own file, and is pulled now");
            let _ = events.send(Event::Warning { text });
        }
        let kernel = self.ensure_kernel(summary.kernel.as_str(), events).await?;
        let image = self.ensure_image(&summary.image, &kernel, events).await?;
        let as_root = rustix::process::getuid().is_root();
        if image.initrd && !spec.caches.is_empty() {
            return Err(no_caches().into());
        }
        let copied = image.initrd.then(|| self.paths.image(&image.name).join(image.rootfs_file()));
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
            spec: serde_json::to_string(&VmSpec { vmm: Some(vmm), ..spec })?,
            vmm: choice.vmm,
            kvm: choice.kvm,
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
        // Made to the end, or removed, also when whoever asked for it leaves.
        let daemon = Arc::clone(self);
        let making = async move {
            let made = match daemon.join(&row) {
                Ok(_) => daemon.make_files(&row, copied).await,
                Err(error) => Err(error),
            };
            match made {
                Ok(()) => Ok(row),
                Err(error) => {
                    daemon.remove(&row).await?;
                    Err(error)
                }
            }
        };
        Unclaimed { making: Some(tokio::spawn(making)), daemon: Arc::clone(self) }.claim().await
    }

    /// Makes the vm's directory and disk: an empty one, or a copy of a filesystem.
    async fn make_files(&self, row: &VmRow, copied: Option<PathBuf>) -> anyhow::Result<()> {
        use std::os::unix::fs::DirBuilderExt as _;
        let dir = self.paths.vm(row.id.as_str());
        std::fs::DirBuilder::new().mode(0o700).create(&dir).context("make the vm's directory")?;
        if let Some(from) = copied {
            let (disk, size) = (dir.join(DISK_FILE), row.disk_size.bytes());
            let copying = move || {
                let file = copy_sparse(&from, &disk)?;
                // The agent grows the filesystem to it.
                file.set_len(size.max(file.metadata()?.len()))
            };
            return banger_image::blocking::start(copying).await?.context("copy the image to the vm's disk");
        }
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
        let spec: Option<VmSpec> = serde_json::from_str(&row.spec).ok();
        let asked = spec.as_ref().map_or(NetMode::None, net_mode);
        let net = if cut_off { NetMode::None } else { asked };
        let disk = std::fs::metadata(dir.join(DISK_FILE)).map_or(0, |metadata| metadata.blocks() * 512);
        let (network, next_network) =
            self.member_view(row, spec.and_then(|spec| spec.network), status.as_ref());
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
            vmm: row.vmm.name().to_owned(),
            emulated: !row.kvm,
            vmm_pid: status.as_ref().and_then(|status| status.vmm_pid),
            boot_id: status.as_ref().and_then(|status| status.boot_id.clone()),
            created: row.created,
            rm: row.rm,
            socket: dir.join(SOCKET_FILE).display().to_string(),
            dir: dir.display().to_string(),
            cmdline: None,
            auto_stop_at: status.as_ref().and_then(|status| status.auto_stop_at),
            caches: Vec::new(),
            network_warning: status.as_ref().and_then(|status| status.network_warning.clone()),
            disk: Some(dir.join(DISK_FILE).display().to_string()),
            console: Some(dir.join(CONSOLE_FILE).display().to_string()),
            address: status.as_ref().and_then(|status| status.address),
            network,
            next_network,
            watchdog_restarts: status.map_or(0, |status| status.watchdog_restarts),
            workspace: Workspace::load(&self.paths.workspace(row.id.as_str())),
        }
    }

    pub(crate) fn images(&self) -> anyhow::Result<Vec<ImageView>> {
        let vms = self.store.vms()?;
        let view = |row: ImageRow| -> anyhow::Result<ImageView> {
            let file = self.paths.image(&row.name).join(row.rootfs_file());
            Ok(ImageView {
                name: row.name.parse()?,
                source: row.source,
                digest: row.digest,
                arch: row.arch,
                created: row.created,
                size_bytes: row.size_bytes,
                disk_bytes: std::fs::metadata(file).map_or(0, |metadata| metadata.blocks() * 512),
                init: row.init,
                filesystem: row.filesystem,
                kernel: row.kernel,
                initrd: row.initrd,
                sha256: Some(row.sha256).filter(|sha256| !sha256.is_empty()),
                env: row.config.env,
                workdir: row.config.workdir,
                user: row.config.user,
                entrypoint: row.config.entrypoint,
                cmd: row.config.cmd,
                used_by: vms.iter().filter(|vm| vm.image == row.name).map(|vm| vm.name.clone()).collect(),
            })
        };
        self.store.images()?.into_iter().map(view).collect()
    }

    pub(crate) fn kernels(&self) -> anyhow::Result<Vec<KernelView>> {
        let (vms, images) = (self.store.vms()?, self.store.images()?);
        let boots_with = |image: &&ImageRow, row: &KernelRow| image.kernel.as_ref() == Some(&row.name);
        let view = |row: KernelRow| -> anyhow::Result<KernelView> {
            let entries = std::fs::read_dir(self.paths.kernel(&row.name)).into_iter().flatten().flatten();
            let users = images.iter().filter(|image| boots_with(image, &row));
            Ok(KernelView {
                images: users.map(|image| image.name.parse()).collect::<Result<_, _>>()?,
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

    /// Deletes an image that no vm uses, and the kernel that was registered with it.
    pub(crate) fn delete_image(&self, image: &ImageView) -> anyhow::Result<Outcome> {
        refuse_used("image", image.name.as_str(), &image.used_by, "vm")?;
        let name = image.name.as_str();
        // CRASH: files without a row are removed at the next start.
        self.store.delete_image(name)?;
        remove_dir(&self.paths.image(name))?;
        let own = self
            .kernels()?
            .into_iter()
            .find(|kernel| kernel.name.as_str() == name && kernel.version == own_kernel_version(name));
        // A vm of another image may have been told to boot with it.
        if let Some(own) = own.filter(|own| own.used_by.is_empty() && own.images.is_empty()) {
            self.delete_kernel(&own)?;
        }
        Ok(Outcome::Done)
    }

    /// Deletes a kernel that no vm and no image uses.
    pub(crate) fn delete_kernel(&self, kernel: &KernelView) -> anyhow::Result<Outcome> {
        let name = kernel.name.as_str();
        refuse_used("kernel", name, &kernel.used_by, "vm")?;
        refuse_used("kernel", name, &kernel.images, "image")?;
        // CRASH: files without a row are removed at the next start.
        self.store.delete_kernel(name)?;
        remove_dir(&self.paths.kernel(name))?;
        Ok(Outcome::Done)
    }
}

/// What the store says of the version of a kernel that came with an image, and goes with it.
pub(crate) fn own_kernel_version(image: &str) -> String {
    format!("of image {image}")
}

fn refuse_used(kind: &str, name: &str, users: &[impl std::fmt::Display], what: &str) -> anyhow::Result<()> {
    if users.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = users.iter().map(|user| format!("`{user}`")).collect();
    let text = format!("{kind} `{name}` is used by {}", names.join(", "));
    Err(WireError::new(ErrorCode::Invalid, text)
        .hinted(format!("delete those {what}s first with `banger {what} delete`"))
        .into())
}

fn remove_dir(dir: &Path) -> anyhow::Result<()> {
    match std::fs::remove_dir_all(dir) {
        // What is deleted may be damaged.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed.with_context(|| format!("remove `{}`", dir.display())),
    }
}

/// Memory of this machine.
pub(crate) fn ram() -> Mebibytes {
    Mebibytes(rustix::system::sysinfo().totalram >> 20)
}

/// Processors of a vm for which no number was asked for.
pub(crate) fn default_vcpu() -> u32 {
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    (cpus / 4).clamp(1, 4)
}

/// Memory of a vm for which none was asked for.
pub(crate) fn default_memory(ram: Mebibytes) -> Mebibytes {
    Mebibytes((ram.0 / 8).clamp(512, 8 * 1024))
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

#[cfg(test)]
mod tests {
    use super::{Daemon, own_kernel_version};
    use crate::paths::Paths;
    use crate::pull::{Wanted, oci_row};
    use crate::store::KernelRow;
    use banger_image::oci::{ImageConfig, OciImage};

    #[test]
    fn a_kernel_goes_when_the_image_it_came_with_never_came() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths { state: dir.path().join("state"), cache: dir.path().join("cache") };
        std::fs::create_dir_all(&paths.state).unwrap();
        let daemon = Daemon::open(paths).unwrap();
        let kernel = |name: &str, version: String| {
            let row = KernelRow {
                name: name.to_owned(),
                release: String::new(),
                version,
                arch: String::new(),
                created: 0,
            };
            daemon.store.insert_kernel(&row).unwrap();
            std::fs::create_dir_all(daemon.paths.kernel(name)).unwrap();
        };
        kernel("imported", "linux 1".to_owned());
        for name in ["alone", "whole", "shared"] {
            kernel(name, own_kernel_version(name));
        }
        for (name, kernel) in [("whole", "whole"), ("other", "shared")] {
            let image = OciImage {
                digest: banger_image::oci::Digest::of(b""),
                size_bytes: 0,
                init: None,
                config: ImageConfig::default(),
                blobs: Vec::new(),
            };
            let wanted = Wanted { kernel: Some(kernel.to_owned()), ..Wanted::default() };
            let row = oci_row(name.to_owned(), String::new(), image, &wanted);
            daemon.store.insert_image(&row).unwrap();
        }
        daemon.remove_lone_kernels().unwrap();
        let left: Vec<String> = daemon.store.kernels().unwrap().into_iter().map(|row| row.name).collect();
        assert_eq!(left, ["imported", "shared", "whole"]);
        assert!(!daemon.paths.kernel("alone").exists() && daemon.paths.kernel("shared").exists());
    }
}
