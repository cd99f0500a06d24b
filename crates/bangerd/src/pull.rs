//! Images and kernels into the store: made beside their place, visible by rename when they are whole.

use crate::config::Config;
use crate::daemon::{Daemon, now};
use crate::load::LAYOUT_PREFIX;
use crate::plan::{Boot, DISK_FILE, Inputs};
use crate::store::{ImageRow, KernelRow, VmRow};
use crate::{initramfs, plan, vmsock};
use anyhow::{Context as _, bail};
use banger_image::debian::archive::{ArchiveConfig, architecture};
use banger_image::debian::image::{self, PackageSet, Recipe};
use banger_image::ext4::Room;
use banger_image::filesystem::Filesystem;
use banger_image::kernel::{KernelMeta, KernelPull};
use banger_image::oci::{ImageConfig, OciError, OciImage, OciPull, Platform, Reference, RegistryConfig};
use banger_image::progress::{Progress, Sink};
use banger_image::rootfs::RootfsBuilder;
use banger_wire::daemon::{Event, VmSpec, VmState, VmmChoice};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::{ExecSpec, ExitStatus};
use banger_wire::names::{ImageName, VmId};
use banger_wire::size::Mebibytes;
use banger_wire::vm::{EndReason, Phase, VmEvent, VmRequest, VmStatus};
use rustix::fs::CWD;
use sha2::{Digest as _, Sha256};
use std::path::{Path, PathBuf};
use tokio::sync::mpsc::UnboundedSender;

/// The filesystem within the directory of an image that is made here.
pub(crate) const ROOTFS_FILE: &str = "rootfs.ext4";
/// What an image's directory says about itself: its row.
pub(crate) const IMAGE_FILE: &str = "image.json";
/// What a store says is the source of an image made of packages.
const RECIPE_SOURCE: &str = "Debian packages";
/// Longest name made of a reference; the store takes 128 characters.
const NAME_LEN_MAX: usize = 100;
/// Room, in blocks of 4 KiB and as many inodes, for what configuring the packages writes: 512 MiB.
const BUILD_SPARE: u64 = 128 * 1024;
/// Memory of the vm that configures packages.
const BUILD_MEMORY: Mebibytes = Mebibytes(1024);
/// How long it may take to shut down.
const BUILD_GRACE_MS: u64 = 20_000;

/// Passes progress on as events.
pub(crate) fn sink(events: &UnboundedSender<Event>) -> impl Fn(Progress) + Send + Sync + use<> {
    let events = events.clone();
    move |progress| {
        let _ = events.send(match progress {
            Progress::Step { label } => Event::Step { label },
            Progress::Bytes { done, total } => Event::Progress { done, total },
        });
    }
}

impl Daemon {
    pub(crate) fn archive(&self) -> anyhow::Result<ArchiveConfig> {
        let variable = std::env::var("BANGER_DEBIAN_MIRROR").ok().filter(|mirror| !mirror.is_empty());
        Ok(ArchiveConfig {
            root: "/".into(),
            mirror: match variable {
                Some(mirror) => Some(mirror),
                None => Config::load()?.debian_mirror,
            },
            cache_dir: self.paths.cache.join("debian"),
            state_dir: self.paths.state.join("archive"),
        })
    }

    /// Pulls a kernel that is not in the store.
    pub(crate) async fn ensure_kernel(
        &self,
        name: &str,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<KernelRow> {
        self.pull_kernel(name, false, events).await
    }

    /// Pulls a kernel that is not in the store, or with `upgrade` in another version. Vms that run keep the files of the
    /// old one until they end.
    pub(crate) async fn pull_kernel(
        &self,
        name: &str,
        upgrade: bool,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<KernelRow> {
        let stored =
            || Ok::<_, anyhow::Error>(self.store.kernels()?.into_iter().find(|row| row.name == name));
        if let Some(row) = stored()?.filter(|_| !upgrade) {
            return Ok(row);
        }
        let _one = self.pulling.lock().await;
        // Whoever had the lock may have pulled this one.
        let old = stored()?;
        if let Some(row) = old.clone().filter(|_| !upgrade) {
            return Ok(row);
        }
        let _ = events.send(Event::Step { label: format!("pull kernel {name}") });
        let sink = sink(events);
        let pull = KernelPull::resolve(&self.archive()?, name, &sink).await?;
        if let Some(old) = old.filter(|old| old.version.rsplit(' ').next() == Some(pull.version())) {
            return Ok(old);
        }
        let staging = staging(&self.paths.state.join("kernels"))?;
        let meta = pull.write_to(staging.path(), &sink).await?;
        self.publish_kernel(staging, kernel_row(meta))
    }

    pub(crate) fn publish_kernel(
        &self,
        staging: tempfile::TempDir,
        row: KernelRow,
    ) -> anyhow::Result<KernelRow> {
        open_to_vms(staging.path())?;
        publish(staging, &self.paths.kernel(&row.name))?;
        self.store.insert_kernel(&row)?;
        Ok(row)
    }

    /// Finds an image in the store by its name or the reference it was pulled by.
    pub(crate) fn find_image(&self, text: &str) -> anyhow::Result<Option<ImageRow>> {
        let mut rows = self.store.images()?;
        if let Some(at) = rows.iter().position(|row| row.name == text) {
            return Ok(Some(rows.swap_remove(at)));
        }
        let source = match text.parse::<Reference>() {
            Ok(reference) => reference.to_string(),
            Err(_) if text.starts_with(LAYOUT_PREFIX) => text.to_owned(),
            Err(_) => return Ok(None),
        };
        // An image of a recipe has a source that is no reference.
        Ok(rows.into_iter().find(|row| row.source == source))
    }

    /// Returns an image, pulled first when it is not in the store. `kernel` finishes one that is made of packages.
    pub(crate) async fn ensure_image(
        &self,
        text: &str,
        kernel: &KernelRow,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<ImageRow> {
        if let Some(row) = self.find_image(text)? {
            return Ok(row);
        }
        let _one = self.pulling.lock().await;
        match self.find_image(text)? {
            Some(row) => Ok(row),
            None => self.pull_image(text, &Wanted::default(), kernel, events).await,
        }
    }

    /// Pulls an image anew; what has not changed is left alone.
    pub(crate) async fn refresh_image(
        &self,
        text: &str,
        wanted: &Wanted,
        kernel: &KernelRow,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<ImageRow> {
        let _one = self.pulling.lock().await;
        let mut row = self.pull_image(text, wanted, kernel, events).await?;
        if wanted.kernel.is_some() && row.kernel != wanted.kernel {
            row.kernel.clone_from(&wanted.kernel);
            let dir = self.paths.image(&row.name);
            let file = tempfile::NamedTempFile::new_in(&dir).context("write what the image is")?;
            serde_json::to_writer_pretty(&file, &row)?;
            file.persist(dir.join(IMAGE_FILE)).context("write what the image is")?;
            self.store.insert_image(&row)?;
        }
        Ok(row)
    }

    async fn pull_image(
        &self,
        text: &str,
        wanted: &Wanted,
        kernel: &KernelRow,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<ImageRow> {
        let _ = events.send(Event::Step { label: format!("pull image {text}") });
        if let Some(recipe) = image::recipe(text) {
            if wanted.platform != Platform::host() {
                let text = format!("image `{text}` is made for this machine, not for {}", wanted.platform);
                return Err(WireError::new(ErrorCode::Invalid, text).hinted("leave `--platform` out").into());
            }
            let name = wanted.name.as_ref().map_or(text, ImageName::as_str);
            return self.pull_recipe(&recipe, name, kernel, wanted.kernel.clone(), events).await;
        }
        if text.starts_with(LAYOUT_PREFIX) {
            return self.pull_layout(text, wanted, events).await;
        }
        let reference: Reference = text.parse().map_err(|error| {
            WireError::from_error(ErrorCode::Invalid, &error)
                .hinted(format!("{} can be pulled by name", recipes()))
        })?;
        self.pull_reference(&reference, wanted, events).await
    }

    /// Makes an image of Debian's packages.
    async fn pull_recipe(
        &self,
        recipe: &Recipe,
        name: &str,
        kernel: &KernelRow,
        own_kernel: Option<String>,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<ImageRow> {
        let sink = sink(events);
        let set = PackageSet::fetch(&self.archive()?, recipe, &sink).await?;
        let digest = format!("sha256:{}", set.digest());
        if let Some(same) = self.unchanged(name, &digest)? {
            return Ok(same);
        }
        let staging = staging(&self.paths.state.join("images"))?;
        let rootfs = staging.path().join(ROOTFS_FILE);
        let summary = {
            let (path, sink, name) =
                (rootfs.clone(), sink_clone(events), format!("{} {digest}", recipe.name));
            let written = banger_image::blocking::start(move || write_rootfs(&set, &path, &name, &sink));
            written.await.context("unpack the packages")??
        };
        let staging = self
            .configure(staging, &rootfs, kernel, events)
            .await
            .context("configure the packages in a vm")?;
        let row = ImageRow {
            name: name.to_owned(),
            source: RECIPE_SOURCE.to_owned(),
            digest,
            arch: architecture().to_owned(),
            created: now(),
            size_bytes: summary.size_bytes,
            init: summary.init,
            config: ImageConfig::default(),
            kernel: own_kernel,
            sha256: String::new(),
            filesystem: Filesystem::Ext4.name().to_owned(),
            blobs: Vec::new(),
            initrd: false,
        };
        self.publish_image(staging, row, events).await
    }

    /// Pulls an image from a registry.
    async fn pull_reference(
        &self,
        reference: &Reference,
        wanted: &Wanted,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<ImageRow> {
        let explain = |error: OciError| {
            let hint = format!(
                "check its name and that the registry can be reached; {} come from Debian",
                recipes()
            );
            WireError::from_error(ErrorCode::Failed, &error).hinted(hint)
        };
        let settings = Config::load()?;
        let config = RegistryConfig {
            hosts: settings.hosts(),
            auth_files: auth_files(),
            cache_dir: self.paths.cache.join("blobs"),
            limits: settings.limits(),
        };
        let sink = sink(events);
        let pull = OciPull::resolve(&config, reference, &wanted.platform, &sink).await.map_err(explain)?;
        let source = reference.to_string();
        let name = match &wanted.name {
            Some(name) => name.to_string(),
            None => image_name(&source, &self.store.images()?),
        };
        let digest = pull.digest().to_string();
        if let Some(same) = self.unchanged(&name, &digest)? {
            return Ok(same);
        }
        let staging = staging(&self.paths.state.join("images"))?;
        let image = pull.write_to(&staging.path().join(ROOTFS_FILE), &sink).await.map_err(explain)?;
        let row = oci_row(name, source, image, wanted);
        self.publish_image(staging, row, events).await
    }

    /// Returns what is stored under a name when it is this very image.
    ///
    /// # Errors
    /// When it is another one and vms use it: their changes would be those of a different image.
    pub(crate) fn unchanged(&self, name: &str, digest: &str) -> anyhow::Result<Option<ImageRow>> {
        let Some(row) = self.store.images()?.into_iter().find(|row| row.name == name) else {
            return Ok(None);
        };
        if row.digest == digest {
            return Ok(Some(row));
        }
        let users: Vec<String> = self
            .store
            .vms()?
            .iter()
            .filter(|vm| vm.image == name)
            .map(|vm| format!("`{}`", vm.name))
            .collect();
        if users.is_empty() {
            return Ok(None);
        }
        let text = format!("image `{name}` has a newer version, but is used by {}", users.join(", "));
        Err(WireError::new(ErrorCode::Invalid, text)
            .hinted("pull it under another name with `banger image pull --name`, or delete those vms first")
            .into())
    }

    /// Makes a finished image visible, with the digest of its filesystem written down.
    pub(crate) async fn publish_image(
        &self,
        staging: tempfile::TempDir,
        mut row: ImageRow,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<ImageRow> {
        let _ = events.send(Event::Step { label: format!("write {}", row.name) });
        let path = staging.path().join(row.rootfs_file());
        row.size_bytes = std::fs::metadata(&path).context("look at the new image")?.len();
        let hashed = banger_image::blocking::start(move || sha256_of(&path));
        row.sha256 = hashed.await.context("read the new image")?.context("read the new image")?;
        if row.digest.is_empty() {
            row.digest = format!("sha256:{}", row.sha256);
        }
        std::fs::write(staging.path().join(IMAGE_FILE), serde_json::to_vec_pretty(&row)?)
            .context("write what the image is")?;
        open_to_vms(staging.path())?;
        publish(staging, &self.paths.image(&row.name))?;
        // CRASH: files of the new image with the row of an old one; the next start takes the row from them.
        self.store.insert_image(&row)?;
        Ok(row)
    }

    /// Boots a vm whose root is the new image and runs the packages' own scripts there, never on the host.
    async fn configure(
        &self,
        staging: tempfile::TempDir,
        rootfs: &Path,
        kernel: &KernelRow,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<tempfile::TempDir> {
        let _ = events.send(Event::Step { label: "configure the packages in a vm".to_owned() });
        let dir = staging.path().join("build");
        std::fs::create_dir(&dir)?;
        std::fs::File::create(dir.join(DISK_FILE))?;
        let as_root = rustix::process::getuid().is_root();
        let choice = self.choose(Config::load()?.vmm.unwrap_or(VmmChoice::Auto)).await?;
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
            vmm: choice.vmm,
            kvm: choice.kvm,
        };
        if let Some(id) = row.run_as {
            std::os::unix::fs::chown(rootfs, Some(id), Some(id))?;
        }
        let kernel_dir = self.paths.kernel(&kernel.name);
        let plan = plan::plan(Inputs {
            row: &row,
            spec: &VmSpec::default(),
            config: &ImageConfig::default(),
            dir: dir.clone(),
            image: rootfs.to_owned(),
            filesystem: Filesystem::Ext4.name().to_owned(),
            initramfs: initramfs::ensure(&kernel_dir, choice.vmm.driver(), Filesystem::Ext4.name())?,
            modules: false,
            kernel: kernel_dir,
            choice,
            entropy: entropy()?,
            tsc_khz: self.tsc_khz().await,
            net: crate::net::NetPlan::none(),
            cgroup: None,
            boot: Boot::Build,
        });
        let build = Build::new(staging);
        let mut connection = vmsock::start(&plan).await?;
        connection.request(VmRequest::Watch).await?;
        watch_build(&mut connection, true).await?;
        let argv = ["/bin/sh", "-c", image::configure_script()].map(Into::into).to_vec();
        let (status, output) = tokio::select! {
            ran = vmsock::exec(&dir, ExecSpec { argv, ..ExecSpec::default() }) => ran?,
            ended = watch_build(&mut connection, false) => {
                ended?;
                bail!("the vm has ended");
            }
        };
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
        vmsock::wait_gone(&dir).await;
        match vmsock::load_end(&dir) {
            Some(end) if end.reason == EndReason::Stopped => {}
            Some(end) => bail!("the vm did not shut down in order: {}", end.detail),
            None => bail!("the vm did not shut down in order"),
        }
        std::fs::remove_dir_all(dir)?;
        build.done()
    }

    /// Returns an id no vm has.
    pub(crate) fn new_id(&self) -> anyhow::Result<VmId> {
        let mut bits = [0; 8];
        bits.copy_from_slice(&entropy()?[..8]);
        Ok(VmId::from_bits(u64::from_le_bytes(bits)))
    }
}

/// Follows a vm that builds: until sessions can be opened, or for as long as nothing goes wrong.
///
/// # Errors
/// When it ends, fails to boot, or has no room.
async fn watch_build(connection: &mut vmsock::Connection, until_ready: bool) -> anyhow::Result<()> {
    loop {
        match connection.event().await?.context("the vm has ended")? {
            VmEvent::State(VmStatus { paused: Some(paused), .. }) => bail!("{paused}"),
            VmEvent::State(status) => match status.phase {
                Phase::Ready | Phase::InitReady if until_ready => return Ok(()),
                Phase::Failed { stage, cause } => bail!("{stage}: {cause}"),
                _ => {}
            },
            VmEvent::Ended(end) => bail!("{}", end.detail),
            _ => {}
        }
    }
}

/// A directory of the store that a vm in its `build` works on. When that fails or is cancelled, the vm is ended before
/// its files go: without them nobody would find it again.
pub(crate) struct Build {
    staging: Option<tempfile::TempDir>,
}

impl Build {
    pub(crate) fn new(staging: tempfile::TempDir) -> Self {
        Self { staging: Some(staging) }
    }

    /// The vm has ended.
    pub(crate) fn done(mut self) -> anyhow::Result<tempfile::TempDir> {
        self.staging.take().context("the directory is there no more")
    }
}

impl Drop for Build {
    fn drop(&mut self) {
        let Some(staging) = self.staging.take() else { return };
        // CRASH: a daemon that ends here leaves a `.new-` directory, and its next start does the same.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            // Whoever does not get to run, because the daemon ends, leaves the directory to the next start.
            let dir = staging.keep();
            runtime.spawn(async move {
                if vmsock::end(&dir.join("build")).await.is_ok() {
                    let _ = std::fs::remove_dir_all(dir);
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
) -> anyhow::Result<banger_image::rootfs::RootfsSummary> {
    let mut tree = RootfsBuilder::create(path)?;
    set.write_unconfigured(&mut tree, sink)?;
    Ok(tree.finish(name, Room::Spare(BUILD_SPARE))?)
}

/// The images that are made of packages, for a hint.
fn recipes() -> String {
    let names: Vec<String> = image::RECIPES.iter().map(|recipe| format!("`{}`", recipe.name)).collect();
    names.join(" and ")
}

/// Where podman and docker keep what their users logged in to, in podman's order.
fn auth_files() -> Vec<PathBuf> {
    let var = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = |name: &str| Some(var("HOME")?.join(name));
    let files = [
        var("REGISTRY_AUTH_FILE"),
        var("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json")),
        var("XDG_CONFIG_HOME").or_else(|| home(".config")).map(|dir| dir.join("containers/auth.json")),
        var("DOCKER_CONFIG").or_else(|| home(".docker")).map(|dir| dir.join("config.json")),
    ];
    files.into_iter().flatten().collect()
}

/// Makes a name for the store of a reference: `docker.io/library/debian:12` is `debian_12`. The underscore keeps it apart
/// from the names of recipes.
pub(crate) fn image_name(source: &str, stored: &[ImageRow]) -> String {
    let short = source.strip_prefix("docker.io/").unwrap_or(source);
    let short = short.strip_prefix("library/").unwrap_or(short);
    let (path, version) = match short.rsplit_once('@').or_else(|| short.rsplit_once(':')) {
        Some((path, version)) => (path, version.split_once(':').map_or(version, |(_, hex)| &hex[..12])),
        None => (short, "latest"),
    };
    let safe = |text: &str| -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '.' };
        text.chars().map(plain).collect::<String>().to_ascii_lowercase()
    };
    let mut name = format!("{}_{}", safe(path), safe(version));
    // Different references can look the same in fewer characters, or be too long.
    let taken = stored.iter().any(|row| row.name == name && row.source != source);
    if taken || name.len() > NAME_LEN_MAX {
        let hash: String = Sha256::digest(source)[..4].iter().map(|byte| format!("{byte:02x}")).collect();
        name.truncate(NAME_LEN_MAX - hash.len() - 1);
        name = format!("{name}-{hash}");
    }
    name
}

/// How an image is wanted in the store.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// Its name; made from the reference when absent.
    pub(crate) name: Option<ImageName>,
    /// What it is for.
    pub(crate) platform: Platform,
    /// The kernel of its vms; none is the default one.
    pub(crate) kernel: Option<String>,
    /// The initrd that its vms boot with, to be copied.
    pub(crate) initrd: Option<PathBuf>,
}

impl Default for Wanted {
    fn default() -> Self {
        Self { name: None, platform: Platform::host(), kernel: None, initrd: None }
    }
}

/// Returns the sha256 of a file's content, in hex.
pub(crate) fn sha256_of(path: &Path) -> std::io::Result<String> {
    banger_image::oci::Digest::of_file(path).map(|digest| digest.hex().to_owned())
}

/// What the store says of a kernel.
pub(crate) fn kernel_row(meta: KernelMeta) -> KernelRow {
    KernelRow {
        name: meta.name,
        release: meta.release,
        version: format!("{} {}", meta.package, meta.package_version),
        arch: meta.arch,
        created: now(),
    }
}

/// What the store says of an image whose filesystem was made of an OCI image's layers.
pub(crate) fn oci_row(name: String, source: String, image: OciImage, wanted: &Wanted) -> ImageRow {
    ImageRow {
        name,
        source,
        digest: image.digest.to_string(),
        arch: wanted.platform.architecture().to_owned(),
        created: now(),
        size_bytes: image.size_bytes,
        init: image.init,
        config: image.config,
        kernel: wanted.kernel.clone(),
        sha256: String::new(),
        filesystem: Filesystem::Ext4.name().to_owned(),
        blobs: image.blobs.iter().map(ToString::to_string).collect(),
        initrd: wanted.initrd.is_some(),
    }
}

/// A directory beside the final ones; its name can't be one of theirs.
pub(crate) fn staging(parent: &Path) -> anyhow::Result<tempfile::TempDir> {
    tempfile::Builder::new().prefix(".new-").tempdir_in(parent).context("make a directory in the store")
}

/// Gives a directory its final name; one that can't have it goes.
pub(crate) fn put(staging: tempfile::TempDir, place: &Path) -> std::io::Result<()> {
    std::fs::rename(staging.path(), place)?;
    // There is nothing under its own name to remove any more.
    let _ = staging.keep();
    Ok(())
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
    // CRASH: before the rename a `.new-` directory is left, after it files without a row, or the old ones under the other
    // name; the next start removes each.
    for entry in std::fs::read_dir(staging.path())? {
        std::fs::File::open(entry?.path())?.sync_all()?;
    }
    if place.exists() {
        // The old one is never missing, and goes with the staging directory it now is.
        let exchange = rustix::fs::RenameFlags::EXCHANGE;
        rustix::fs::renameat_with(CWD, staging.path(), CWD, place, exchange)
            .context("publish in the store")?;
    } else {
        put(staging, place).context("publish in the store")?;
    }
    let parent = place.parent().unwrap_or(place);
    Ok(std::fs::File::open(parent)?.sync_all()?)
}

/// Random bytes from the kernel.
pub(crate) fn entropy() -> anyhow::Result<Vec<u8>> {
    let mut bytes = vec![0; 64];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::{NAME_LEN_MAX, image_name};
    use crate::store::ImageRow;
    use banger_image::oci::{ImageConfig, Reference};
    use banger_wire::names::ImageName;

    fn stored(name: &str, source: &str) -> ImageRow {
        ImageRow {
            name: name.to_owned(),
            source: source.to_owned(),
            digest: String::new(),
            arch: String::new(),
            created: 0,
            size_bytes: 0,
            init: None,
            config: ImageConfig::default(),
            kernel: None,
            sha256: String::new(),
            filesystem: "ext4".to_owned(),
            blobs: Vec::new(),
            initrd: false,
        }
    }

    #[test]
    fn references_become_names() {
        let digest = format!("alpine@sha256:{}", "ab".repeat(32));
        for (text, name) in [
            ("debian:bookworm", "debian_bookworm"),
            ("ubuntu", "ubuntu_latest"),
            ("ghcr.io/owner/image:V1", "ghcr.io.owner.image_v1"),
            ("localhost:5000/debian:test", "localhost.5000.debian_test"),
            (digest.as_str(), "alpine_abababababab"),
        ] {
            let source = text.parse::<Reference>().unwrap().to_string();
            assert_eq!(image_name(&source, &[]), name);
            assert_eq!(image_name(&source, &[stored(name, &source)]), name, "the same image again");
            let other = image_name(&source, &[stored(name, "another")]);
            assert!(other.starts_with(name) && other.len() == name.len() + 9, "{other}");
        }
    }

    #[test]
    fn every_name_is_one_the_store_takes() {
        let long = format!("localhost:5000/{}/a:B_c", vec!["part"; 40].join("/"));
        let source = long.parse::<Reference>().unwrap().to_string();
        let name = image_name(&source, &[]);
        assert!(name.len() <= NAME_LEN_MAX && name.parse::<ImageName>().is_ok(), "{name}");
    }
}
