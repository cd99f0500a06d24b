//! Images and kernels into the store: made beside their place, visible by rename when they are whole.

use crate::daemon::{Daemon, now};
use crate::plan::{DISK_FILE, Inputs};
use crate::store::{ImageRow, KernelRow, VmRow};
use crate::{initramfs, plan, vmsock};
use anyhow::{Context as _, bail};
use banger_image::debian::archive::{ArchiveConfig, architecture};
use banger_image::debian::image::{self, PackageSet, Recipe};
use banger_image::kernel::KernelPull;
use banger_image::progress::{Progress, Sink};
use banger_image::rootfs::RootfsBuilder;
use banger_wire::daemon::{Event, VmSpec, VmState};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::{ExecSpec, ExitStatus};
use banger_wire::names::VmId;
use banger_wire::size::Mebibytes;
use banger_wire::vm::{Phase, VmEvent, VmRequest};
use std::path::Path;
use tokio::sync::mpsc::UnboundedSender;

/// The filesystem within an image's directory.
pub(crate) const ROOTFS_FILE: &str = "rootfs.ext4";
/// Room, in blocks of 4 KiB and as many inodes, for what configuring the packages writes: 512 MiB.
const BUILD_SPARE: u64 = 128 * 1024;
/// Memory of the vm that configures packages.
const BUILD_MEMORY: Mebibytes = Mebibytes(1024);
/// How long it may take to shut down.
const BUILD_GRACE_MS: u64 = 20_000;

/// Passes progress on as events.
fn sink(events: &UnboundedSender<Event>) -> impl Fn(Progress) + Send + Sync + use<> {
    let events = events.clone();
    move |progress| {
        let _ = events.send(match progress {
            Progress::Step { label } => Event::Step { label },
            Progress::Bytes { done, total } => Event::Progress { done, total },
        });
    }
}

impl Daemon {
    fn archive(&self) -> ArchiveConfig {
        ArchiveConfig {
            root: "/".into(),
            mirror: std::env::var("BANGER_DEBIAN_MIRROR").ok().filter(|mirror| !mirror.is_empty()),
            cache_dir: self.paths.cache.join("debian"),
            state_dir: self.paths.state.join("archive"),
        }
    }

    /// Pulls a kernel that is not in the store.
    pub(crate) async fn ensure_kernel(
        &self,
        name: &str,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<KernelRow> {
        let _one = self.pulling.lock().await;
        if let Some(row) = self.store.kernels()?.into_iter().find(|row| row.name == name) {
            return Ok(row);
        }
        let _ = events.send(Event::Step { label: format!("pull kernel {name}") });
        let sink = sink(events);
        let pull = KernelPull::resolve(&self.archive(), name, &sink).await?;
        let staging = staging(&self.paths.state.join("kernels"))?;
        let meta = pull.write_to(staging.path(), &sink).await?;
        open_to_vms(staging.path())?;
        publish(staging, &self.paths.kernel(name))?;
        let row = KernelRow {
            name: meta.name,
            release: meta.release,
            version: format!("{} {}", meta.package, meta.package_version),
            arch: meta.arch,
            created: now(),
        };
        self.store.insert_kernel(&row)?;
        Ok(row)
    }

    /// Pulls an image that is not in the store.
    pub(crate) async fn ensure_image(
        &self,
        name: &str,
        kernel: &KernelRow,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<ImageRow> {
        let _one = self.pulling.lock().await;
        if let Some(row) = self.store.images()?.into_iter().find(|row| row.name == name) {
            return Ok(row);
        }
        let recipe = recipe(name)?;
        let _ = events.send(Event::Step { label: format!("pull image {name}") });
        let sink = sink(events);
        let set = PackageSet::fetch(&self.archive(), &recipe, &sink).await?;
        let staging = staging(&self.paths.state.join("images"))?;
        let rootfs = staging.path().join(ROOTFS_FILE);
        let (digest, summary) = {
            let (path, sink, name) = (rootfs.clone(), sink_clone(events), name.to_owned());
            let written = tokio::task::spawn_blocking(move || write_rootfs(&set, &path, &name, &sink));
            written.await.context("unpack the packages")??
        };
        self.configure(staging.path(), &rootfs, kernel, events)
            .await
            .context("configure the packages in a vm")?;
        open_to_vms(staging.path())?;
        publish(staging, &self.paths.image(name))?;
        let row = ImageRow {
            name: name.to_owned(),
            source: "Debian packages".to_owned(),
            digest: format!("sha256:{digest}"),
            arch: architecture().to_owned(),
            created: now(),
            size_bytes: summary.size_bytes,
            init: summary.init,
        };
        self.store.insert_image(&row)?;
        Ok(row)
    }

    /// Boots a vm whose root is the new image and runs the packages' own scripts there, never on the host.
    async fn configure(
        &self,
        staging: &Path,
        rootfs: &Path,
        kernel: &KernelRow,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<()> {
        let _ = events.send(Event::Step { label: "configure the packages in a vm".to_owned() });
        let dir = staging.join("build");
        std::fs::create_dir(&dir)?;
        std::fs::File::create(dir.join(DISK_FILE))?;
        let as_root = rustix::process::getuid().is_root();
        let row = VmRow {
            id: self.new_id()?,
            name: "build".parse()?,
            state: VmState::Created,
            error: None,
            image: String::new(),
            kernel: kernel.name.clone(),
            vcpu: std::thread::available_parallelism().map_or(1, |n| n.get() as u32).min(4),
            memory: BUILD_MEMORY,
            disk_size: Mebibytes(0),
            created: now(),
            rm: false,
            run_as: as_root.then_some(crate::store::RUN_AS_BUILD),
            spec: String::new(),
        };
        if let Some(id) = row.run_as {
            std::os::unix::fs::chown(rootfs, Some(id), Some(id))?;
        }
        let kernel_dir = self.paths.kernel(&kernel.name);
        let plan = plan::plan(Inputs {
            row: &row,
            spec: &VmSpec::default(),
            dir: dir.clone(),
            image: rootfs.to_owned(),
            initramfs: initramfs::ensure(&kernel_dir)?,
            kernel: kernel_dir,
            program: self.qemu()?,
            entropy: entropy()?,
            net: crate::net::NetPlan::none(),
            build: true,
        });
        let guard = KillOnDrop { dir: dir.clone() };
        let mut connection = vmsock::start(&plan).await?;
        connection.request(VmRequest::Watch).await?;
        loop {
            match connection.event().await?.context("the vm ended while it booted")? {
                VmEvent::State(status) => match status.phase {
                    Phase::Ready | Phase::InitReady => break,
                    Phase::Failed { stage, cause } => bail!("{stage}: {cause}"),
                    _ => {}
                },
                VmEvent::Ended(end) => bail!("{}", end.detail),
                _ => {}
            }
        }
        let argv = ["/bin/sh", "-c", image::configure_script()].map(Into::into).to_vec();
        let (status, output) = vmsock::exec(&dir, ExecSpec { argv, ..ExecSpec::default() }).await?;
        if status != ExitStatus::Code(0) {
            let tail: Vec<&str> = output.lines().rev().take(5).collect();
            let tail: Vec<String> =
                tail.into_iter().rev().map(|line| line.escape_debug().to_string()).collect();
            bail!("the packages' scripts ended with status {}: {}", status.shell_code(), tail.join(" | "));
        }
        let mut stopping = vmsock::connect(&dir).await?;
        stopping.request(VmRequest::Stop { grace_ms: BUILD_GRACE_MS }).await?;
        while let Ok(Some(event)) = stopping.event().await {
            if matches!(event, VmEvent::Ended(_)) {
                break;
            }
        }
        drop(guard);
        self.wait_gone(&dir).await;
        if let Some(end) = vmsock::load_end(&dir)
            && end.reason != banger_wire::vm::EndReason::Stopped
        {
            bail!("the vm did not shut down in order: {}", end.detail);
        }
        Ok(std::fs::remove_dir_all(dir)?)
    }

    /// Returns an id no vm has.
    pub(crate) fn new_id(&self) -> anyhow::Result<VmId> {
        let mut bits = [0; 8];
        bits.copy_from_slice(&entropy()?[..8]);
        Ok(VmId::from_bits(u64::from_le_bytes(bits)))
    }
}

/// Ends the build vm when the pull is cancelled or fails.
struct KillOnDrop {
    dir: std::path::PathBuf,
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let dir = self.dir.clone();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Ok(mut connection) = vmsock::connect(&dir).await {
                    let _ = connection.request(VmRequest::Kill).await;
                    let _ = connection.event().await;
                }
            });
        }
    }
}

fn sink_clone(events: &UnboundedSender<Event>) -> impl Fn(Progress) + Send + Sync + use<> {
    sink(events)
}

fn write_rootfs(
    set: &PackageSet,
    path: &Path,
    name: &str,
    sink: Sink<'_>,
) -> anyhow::Result<(String, banger_image::rootfs::RootfsSummary)> {
    let mut tree = RootfsBuilder::create(path)?;
    set.write_unconfigured(&mut tree, sink)?;
    let digest = set.digest();
    let summary = tree.finish(&format!("{name} {digest}"), BUILD_SPARE)?;
    Ok((digest, summary))
}

fn recipe(name: &str) -> anyhow::Result<Recipe> {
    image::recipe(name).ok_or_else(|| {
        let known: Vec<String> = image::RECIPES.iter().map(|recipe| format!("`{}`", recipe.name)).collect();
        WireError::new(ErrorCode::NotFound, format!("no image `{}`", name.escape_debug()))
            .hinted(format!("`banger image list` shows what is here; {} can be pulled", known.join(", ")))
            .into()
    })
}

/// A directory beside the final ones; its name can't be one of theirs.
fn staging(parent: &Path) -> anyhow::Result<tempfile::TempDir> {
    tempfile::Builder::new().prefix(".new-").tempdir_in(parent).context("make a directory in the store")
}

/// Vms started by root read these files as another user; directories above keep others out.
fn open_to_vms(dir: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            std::fs::set_permissions(entry.path(), PermissionsExt::from_mode(0o644))?;
            if rustix::process::getuid().is_root() {
                std::os::unix::fs::chown(entry.path(), Some(0), Some(0))?;
            }
        }
    }
    Ok(())
}

/// Makes a finished directory visible under its name.
fn publish(staging: tempfile::TempDir, place: &Path) -> anyhow::Result<()> {
    // CRASH: before the rename a `.new-` directory is left, which the next start removes; after it the files are there
    // without a row, and the next pull replaces them.
    if place.exists() {
        std::fs::remove_dir_all(place)?;
    }
    for entry in std::fs::read_dir(staging.path())? {
        std::fs::File::open(entry?.path())?.sync_all()?;
    }
    std::fs::rename(staging.keep(), place).context("publish in the store")?;
    let parent = place.parent().unwrap_or(place);
    Ok(std::fs::File::open(parent)?.sync_all()?)
}

/// Random bytes from the kernel.
pub(crate) fn entropy() -> anyhow::Result<Vec<u8>> {
    let mut bytes = vec![0; 64];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes)
}
