//! Images out of the store, and stopped vms into it.
//!
//! Both begin with a vm that boots no further than the agent, which sends a tree as a tar: the host never parses a
//! filesystem that a guest wrote. What arrives is a layer like any other and treated as one.

use crate::choice::Choice;
use crate::config::Config;
use crate::daemon::{DEFAULT_KERNEL, Daemon};
use crate::initramfs::INITRD_FILE;
use crate::load::SPOOL_PREFIX;
use crate::net::NetPlan;
use crate::plan::{Boot, DISK_FILE, Inputs, MODULES_FILE, VmPlan, plan};
use crate::pull::{Build, Wanted, entropy, put, sink, staging};
use crate::state::{self, Wish};
use crate::store::{ImageRow, KernelRow, RUN_AS_BUILD, VmRow};
use crate::{initramfs, vmsock};
use anyhow::{Context as _, bail};
use banger_image::ext4::Room;
use banger_image::oci::{ExportMeta, LocalImage, Platform, Reference, write_archive, write_layout};
use banger_image::progress::Progress;
use banger_wire::daemon::{Event, VmSpec, VmState, VmmChoice};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::guest::{SessionKind, TreeKind};
use banger_wire::names::ImageName;
use banger_wire::size::Mebibytes;
use banger_wire::vm::{Phase, VmEvent, VmRequest};
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;

/// Memory of the vm that reads an image.
const READER_MEMORY: Mebibytes = Mebibytes(256);
/// Its disk, which nothing is written to.
const READER_DISK: u64 = 128 << 20;
/// How long it may take to shut down.
const READER_GRACE_MS: u64 = 20_000;
/// How often progress is reported.
const TICK: Duration = Duration::from_millis(100);
/// The tree within the spool, and the archive.
const TREE_FILE: &str = "tree.tar";
const ARCHIVE_FILE: &str = "image.tar";

/// A file that is sent to a client once everything else is said.
#[derive(Debug)]
pub(crate) struct Download {
    pub(crate) file: File,
    /// Removed when it is sent.
    pub(crate) _dir: tempfile::TempDir,
}

impl Daemon {
    /// Writes an image as an OCI layout into a new directory, or as an archive for the client.
    pub(crate) async fn export(
        &self,
        image: &ImageRow,
        layout: Option<PathBuf>,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<Option<Download>> {
        if let Some(layout) = &layout {
            check_target(layout)?;
        }
        let kernel_name = image.kernel.as_deref().unwrap_or(DEFAULT_KERNEL);
        let kernel = self.ensure_kernel(kernel_name, events).await?;
        let spool = self.spool()?;
        let tree = spool.path().join(TREE_FILE);
        self.read_image(image, &kernel, &tree, events).await?;
        let meta = ExportMeta {
            name: exported_name(image),
            config: image.config.clone(),
            platform: image.arch.parse::<Platform>()?,
        };
        let _ = events.send(Event::Step { label: "compress".to_owned() });
        match layout {
            Some(layout) => {
                let beside = layout.parent().unwrap_or(Path::new("/")).to_owned();
                let staging = tempfile::Builder::new().prefix(".new-").tempdir_in(&beside);
                let staging = staging.with_context(|| format!("write to `{}`", beside.display()))?;
                let place = staging.path().to_owned();
                banger_image::blocking::start(move || write_layout(&place, &tree, &meta, true))
                    .await?
                    .with_context(|| format!("write to `{}`", layout.display()))?;
                put(staging, &layout).with_context(|| format!("write to `{}`", layout.display()))?;
                Ok(None)
            }
            None => {
                let dir = spool.path().to_owned();
                let write = move || -> std::io::Result<File> {
                    let place = dir.join("layout");
                    std::fs::create_dir(&place)?;
                    write_layout(&place, &tree, &meta, true)?;
                    std::fs::remove_file(&tree)?;
                    let mut file = File::create_new(dir.join(ARCHIVE_FILE))?;
                    write_archive(&place, &mut file)?;
                    std::fs::remove_dir_all(place)?;
                    File::open(dir.join(ARCHIVE_FILE))
                };
                let file = banger_image::blocking::start(write).await?.context("write the archive")?;
                Ok(Some(Download { file, _dir: spool }))
            }
        }
    }

    /// Makes an image of a stopped vm: of what its image and its changes show together.
    pub(crate) async fn commit(
        &self,
        reference: &str,
        name: &ImageName,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<ImageRow> {
        let row = self.row(reference)?;
        // Nobody starts or deletes it meanwhile.
        let _alone = self.alone(&row).await;
        let row = self.row(row.id.as_str())?;
        let dir = self.paths.vm(row.id.as_str());
        if !state::allows(Wish::Commit, row.state, vmsock::is_alive(&dir)) {
            let text = format!("vm `{}` is running", row.name);
            return Err(WireError::new(ErrorCode::Invalid, text)
                .hinted(format!("stop it with `banger vm stop {}` first", row.name))
                .into());
        }
        let image = self.find_image(&row.image)?.context("the vm's image is gone")?;
        let taken = self.store.images()?.iter().any(|row| row.name == name.as_str());
        if taken {
            return Err(WireError::new(ErrorCode::Invalid, format!("there is an image `{name}` already"))
                .hinted(format!("choose another name, or delete it with `banger image delete {name}`"))
                .into());
        }
        let spool = self.spool()?;
        let (tree, layout) = (spool.path().join(TREE_FILE), spool.path().join("layout"));
        // Nobody's lease: it ends when it has been read.
        let reader = VmRow { rm: false, ..row.clone() };
        let choice = self.choose_reader().await?;
        // With an initrd of its own the vm has everything on its disk, else only what it changed.
        let (boot, tree_kind) =
            if image.initrd { (Boot::Disk, TreeKind::Root) } else { (Boot::AgentOnly, TreeKind::Merged) };
        let kernel = self.paths.kernel(&row.kernel);
        let plan = self.reader_plan(&reader, &image, dir, kernel, choice, boot).await?;
        // CRASH: the vm goes on; the next start finds that it went no further than the agent, and ends it.
        let reader = EndOnDrop(plan.dir.clone());
        self.stream_tree(&plan, tree_kind, &tree, events).await?;
        drop(reader);
        let meta = ExportMeta {
            name: format!("localhost/{name}:latest"),
            config: image.config,
            platform: image.arch.parse::<Platform>()?,
        };
        let _ = events.send(Event::Step { label: format!("write {name}") });
        let (limits, platform) = (Config::load()?.limits(), meta.platform.clone());
        let write = move || {
            std::fs::create_dir(&layout).and_then(|()| write_layout(&layout, &tree, &meta, false))?;
            std::fs::remove_file(tree)?;
            anyhow::Ok(LocalImage::in_layout(&layout, None, &platform, &limits)?)
        };
        let mut local = banger_image::blocking::start(write).await?.context("use the vm's files")?;
        let mut initrd = None;
        if image.initrd {
            local = local.with_room(Room::Disk(row.disk_size.bytes()));
            initrd = Some(self.paths.image(&image.name).join(INITRD_FILE));
        }
        let kernel = Some(row.kernel).filter(|kernel| kernel != DEFAULT_KERNEL);
        let wanted = Wanted { name: Some(name.clone()), kernel, initrd, ..Wanted::default() };
        let _one = self.pulling.lock().await;
        let source = format!("vm {}", row.name);
        Ok(self.store_local(&local, &source, &wanted, events).await??)
    }

    fn spool(&self) -> anyhow::Result<tempfile::TempDir> {
        // CRASH: what is left of it is removed at the next start.
        let spool = tempfile::Builder::new().prefix(SPOOL_PREFIX).tempdir_in(&self.paths.cache);
        spool.context("make a directory in the cache")
    }

    /// Boots a vm of an image that is nobody's, and has it send the image's files.
    async fn read_image(
        &self,
        image: &ImageRow,
        kernel: &KernelRow,
        to: &Path,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<()> {
        let staging = staging(&self.paths.state.join("images"))?;
        let dir = staging.path().join("build");
        std::fs::create_dir(&dir)?;
        banger_image::ext4::format_empty(&dir.join(DISK_FILE), READER_DISK, [0; 16])
            .context("make a disk")?;
        let choice = self.choose_reader().await?;
        let row = VmRow {
            id: self.new_id()?,
            name: "export".parse()?,
            state: VmState::Created,
            error: None,
            image: image.name.clone(),
            kernel: kernel.name.clone(),
            vcpu: 1,
            memory: READER_MEMORY,
            disk_size: Mebibytes(READER_DISK >> 20),
            created: 0,
            rm: false,
            run_as: rustix::process::getuid().is_root().then_some(RUN_AS_BUILD),
            spec: String::new(),
            vmm: choice.vmm,
            kvm: choice.kvm,
        };
        let kernel = self.paths.kernel(&kernel.name);
        let plan = self.reader_plan(&row, image, dir, kernel, choice, Boot::AgentOnly).await?;
        // Ends the vm before its files go, also when this is cancelled.
        let _build = Build::new(staging);
        self.stream_tree(&plan, TreeKind::Image, to, events).await
    }

    async fn choose_reader(&self) -> anyhow::Result<Choice> {
        self.choose(Config::load()?.vmm.unwrap_or(VmmChoice::Auto)).await
    }

    async fn reader_plan(
        &self,
        row: &VmRow,
        image: &ImageRow,
        dir: PathBuf,
        kernel: PathBuf,
        choice: Choice,
        boot: Boot,
    ) -> anyhow::Result<VmPlan> {
        Ok(plan(Inputs {
            row,
            spec: &VmSpec::default(),
            config: &image.config,
            dir,
            image: self.paths.image(&image.name).join(image.rootfs_file()),
            filesystem: image.filesystem.clone(),
            modules: kernel.join(MODULES_FILE).exists(),
            initramfs: initramfs::ensure(&kernel, choice.vmm.driver(), &image.filesystem)?,
            kernel,
            choice,
            entropy: entropy()?,
            tsc_khz: self.tsc_khz().await,
            net: NetPlan::none(),
            cgroup: None,
            boot,
        }))
    }

    /// Runs a vm for as long as it takes to send a tree into a new file.
    async fn stream_tree(
        &self,
        plan: &VmPlan,
        what: TreeKind,
        to: &Path,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<()> {
        let _ = events.send(Event::Step { label: "read the files in a vm".to_owned() });
        let limit = Config::load()?.limits().unpacked_bytes;
        let mut connection = vmsock::start(plan).await?;
        connection.request(VmRequest::Watch).await?;
        loop {
            match connection.event().await?.context("the vm has ended")? {
                VmEvent::State(status) => match status.phase {
                    Phase::Ready | Phase::InitReady => break,
                    Phase::Failed { stage, cause } => bail!("{stage}: {cause}"),
                    _ => {}
                },
                VmEvent::Ended(end) => bail!("{}", end.detail),
                _ => {}
            }
        }
        let mut file = std::io::BufWriter::with_capacity(1 << 20, File::create_new(to)?);
        let (mut done, mut told, sink) = (0, Instant::now(), sink(events));
        let take = |bytes: &[u8]| {
            done += bytes.len() as u64;
            if done > limit {
                bail!(
                    "the files are more than the {limit} bytes allowed; `limits.unpacked` in the config changes that"
                );
            }
            if told.elapsed() >= TICK {
                told = Instant::now();
                sink(Progress::Bytes { done, total: None });
            }
            // A slow disk holds up one of the daemon's threads, and with it the guest.
            file.write_all(bytes).context("write what the vm sends")
        };
        let read = vmsock::stream(&plan.dir, SessionKind::ExportTree(what), take).await;
        read.context("read the files")?;
        file.flush().context("write what the vm sends")?;
        let mut stopping = vmsock::connect(&plan.dir).await?;
        stopping.request(VmRequest::Stop { grace_ms: READER_GRACE_MS }).await?;
        while let Ok(Some(event)) = stopping.event().await {
            if matches!(event, VmEvent::Ended(_)) {
                break;
            }
        }
        vmsock::wait_gone(&plan.dir).await;
        Ok(())
    }
}

/// Ends a vm that reads its own disk when that fails or is cancelled.
struct EndOnDrop(PathBuf);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        if vmsock::is_alive(&self.0)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let dir = self.0.clone();
            runtime.spawn(async move {
                if let Err(error) = vmsock::end(&dir).await {
                    tracing::error!("end what read `{}`: {error:#}", dir.display());
                }
            });
        }
    }
}

/// Refuses a directory that something would be overwritten in.
fn check_target(layout: &Path) -> anyhow::Result<()> {
    let shown = layout.display();
    if !layout.is_absolute() {
        return Err(WireError::new(ErrorCode::Invalid, format!("`{shown}` is not an absolute path")).into());
    }
    if std::fs::read_dir(layout).is_ok_and(|mut entries| entries.next().is_none()) {
        return Ok(());
    }
    if layout.symlink_metadata().is_ok() {
        return Err(WireError::new(ErrorCode::Invalid, format!("`{shown}` is there already"))
            .hinted("name a directory that is new or empty")
            .into());
    }
    Ok(())
}

/// The reference an image was pulled by, or one made of its name.
fn exported_name(image: &ImageRow) -> String {
    let pulled = image.source.parse::<Reference>().ok().map(|reference| reference.to_string());
    let tagged = pulled.filter(|name| !name.contains('@'));
    tagged.unwrap_or_else(|| format!("localhost/{}:latest", image.name))
}
