//! CLI and daemon.
//!
//! One connection is one operation: the client sends a [`Call`], the daemon sends [`Event`]s and ends with
//! `Done` or `Failed`. Closing the connection cancels the operation, and what it had made is removed.

use crate::bytes::ByteString;
use crate::doctor::{Check, SetupItem};
use crate::error::WireError;
use crate::guest::Timing;
use crate::names::{CacheName, ImageName, KernelName, NetworkName, VmId, VmName};
use crate::net::{Denial, MemberView, NetRules, NetTarget, NetView, NetworkChoice};
use crate::ports::Publish;
use crate::size::Mebibytes;
use crate::stats::VmStats;
use crate::time::AutoStop;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

pub use crate::config::{CacheMount, CacheView, ConfigSource, ConfigValue, ConfigView, ProjectFile};

/// Greeting and request in one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// The client's build; the daemon refuses another one (except `DaemonStop` and `DaemonStatus`).
    pub build: String,
    /// What is wanted.
    pub request: Request,
}

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Creates a vm and starts it; ends with `Outcome::Started`.
    VmRun(Box<VmSpec>),
    /// Creates a vm without starting it; ends with `Outcome::Created`.
    VmCreate(Box<VmSpec>),
    /// Says what `VmRun` would do; ends with `Outcome::Plan`.
    VmPlan(Box<VmSpec>),
    /// Starts an existing vm; ends with `Outcome::Started`.
    VmStart {
        /// Name, id or unique id prefix.
        vm: String,
        /// What to wait for.
        wait: Wait,
    },
    /// Stops a vm in order, by force after the grace period.
    VmStop {
        /// Name, id or unique id prefix.
        vm: String,
        /// Grace period in milliseconds.
        grace_ms: u64,
    },
    /// Ends a vm at once.
    VmKill {
        /// Name, id or unique id prefix.
        vm: String,
    },
    /// Sends a signal to a running vm; see [`HostMessage::Signal`](crate::guest::HostMessage::Signal).
    VmSignal {
        /// Name, id or unique id prefix.
        vm: String,
        /// Its number.
        signal: i32,
    },
    /// Reads what a vm uses; ends with `Outcome::Stats`.
    VmStats {
        /// Name, id or unique id prefix.
        vm: String,
    },
    /// Deletes a vm and its disk; a running one is ended first when `force`.
    VmDelete {
        /// Name, id or unique id prefix.
        vm: String,
        /// Delete a running one too.
        force: bool,
    },
    /// Changes what a vm has from its next start on. Refused while it runs, but for the networks: rules count at once, and
    /// another mode or network of vms from the next start on. Ends with `Outcome::Vm`.
    VmSet {
        /// Name, id or unique id prefix.
        vm: String,
        /// Virtual processors.
        vcpu: Option<u32>,
        /// Memory.
        memory: Option<Mebibytes>,
        /// Size of its own disk, which only grows.
        disk_size: Option<Mebibytes>,
        /// Outbound network.
        net: Option<NetMode>,
        /// All that its rules allow; what they allow already when absent.
        net_allow: Option<Vec<NetTarget>>,
        /// The network of vms that it is in, from its next start on.
        #[serde(default)]
        network: Option<NetworkChoice>,
    },
    /// Shows what a vm reaches; ends with `Outcome::Net`.
    VmNetShow {
        /// Name, id or unique id prefix.
        vm: String,
    },
    /// Changes what a vm reaches, at once and from then on; ends with `Outcome::Net`.
    VmNetChange {
        /// Name, id or unique id prefix.
        vm: String,
        /// What is allowed from now on.
        allow: Vec<NetTarget>,
        /// What is denied from now on.
        deny: Vec<NetTarget>,
    },
    /// Lists what a running vm was refused; ends with `Outcome::Denials`.
    VmNetDenials {
        /// Name, id or unique id prefix.
        vm: String,
    },
    /// Lists all vms; ends with `Outcome::Vms`.
    VmList,
    /// Shows one vm; ends with `Outcome::Vm`.
    VmShow {
        /// Name, id or unique id prefix.
        vm: String,
    },
    /// Streams the console as data on channel 1.
    VmLogs {
        /// Name, id or unique id prefix.
        vm: String,
        /// Only the last lines.
        lines: Option<usize>,
        /// Go on until the vm has ended or the client leaves.
        follow: bool,
    },
    /// Deletes every vm that is not running; ends with `Outcome::Pruned`.
    VmPrune {
        /// Only say what would go.
        dry_run: bool,
    },
    /// Pulls an image by catalog name or OCI reference; ends with `Outcome::Image`.
    ImagePull {
        /// Catalog name or reference.
        reference: String,
        /// The name in the store; made from the reference when absent.
        name: Option<ImageName>,
        /// The kernel its vms boot with, also the one that finishes an image made of packages; the default one when absent.
        kernel: Option<KernelName>,
        /// Operating system and processor, such as `linux/amd64`; this machine's when absent.
        platform: Option<String>,
    },
    /// Makes an image of files of this machine; ends with `Outcome::Image`.
    ImageRegister(Box<ImageFiles>),
    /// Writes an image as one layer. Without a directory an archive follows as data on channel 1.
    ImageExport {
        /// Its name, or the reference it was pulled by.
        image: String,
        /// The absolute path of a new directory, which gets an OCI layout.
        layout: Option<String>,
    },
    /// Makes an image of a stopped vm; ends with `Outcome::Image`.
    ImageCommit {
        /// Name, id or unique id prefix.
        vm: String,
        /// The name in the store.
        name: ImageName,
    },
    /// Compares what is in the store with what was written down about it; ends with `Outcome::Verified`.
    ImageVerify {
        /// Only this image and its kernel; everything when absent.
        image: Option<String>,
    },
    /// Removes downloads that nothing in the store was made of; ends with `Outcome::CachePruned`.
    ImageCachePrune {
        /// Only say what would go.
        dry_run: bool,
        /// Everything, also what a pull of a newer version would need again.
        all: bool,
    },
    /// Lists images that can be pulled by name; ends with `Outcome::Available`.
    ImageAvailable,
    /// Loads the images of an archive, which follows as data on channel 1; ends with `Outcome::Images`.
    ImageLoad {
        /// What the archive is called, for messages and as the source of an image without a name.
        label: String,
        /// Its length, where it has one.
        size: Option<u64>,
        /// The one image that is meant, by name or tag; all when absent.
        reference: Option<String>,
        /// The name in the store; made from the image's when absent.
        name: Option<ImageName>,
    },
    /// Lists images; ends with `Outcome::Images`.
    ImageList,
    /// Shows an image; ends with `Outcome::Image`.
    ImageShow {
        /// Its name, or the reference it was pulled by.
        image: String,
    },
    /// Deletes an image; refused while a vm uses it.
    ImageDelete {
        /// Its name, or the reference it was pulled by.
        image: String,
    },
    /// Pulls a kernel by catalog name; ends with `Outcome::Kernel`.
    KernelPull {
        /// Catalog name.
        name: KernelName,
        /// Replaces an older version of it.
        upgrade: bool,
    },
    /// Makes a kernel of files of this machine; ends with `Outcome::Kernel`.
    KernelImport(Box<KernelFiles>),
    /// Lists kernels that can be pulled; ends with `Outcome::Available`.
    KernelAvailable,
    /// Lists kernels; ends with `Outcome::Kernels`.
    KernelList,
    /// Shows a kernel; ends with `Outcome::Kernel`.
    KernelShow {
        /// Its name.
        name: KernelName,
    },
    /// Deletes a kernel; refused while a vm uses it.
    KernelDelete {
        /// Its name.
        name: KernelName,
    },
    /// Checks the machine; one `Event::Check` each, the last boots a vm. Ends with `Outcome::Done`.
    Doctor {
        /// First mends what can be mended without root.
        fix: bool,
    },
    /// Fetches what is missing and may be fetched; ends with `Outcome::Setup`.
    Setup {
        /// Only say what would be done.
        dry_run: bool,
        /// A mirror of Firecracker's releases; Firecracker is fetched then also where it can't be used.
        firecracker_url: Option<String>,
    },
    /// Every value of the config and where it comes from; ends with `Outcome::Config`.
    ConfigShow,
    /// Lists caches; ends with `Outcome::Caches`.
    CacheList,
    /// Deletes caches that no running vm has; ends with `Outcome::Caches`, those that went.
    CachePrune {
        /// Only these; all when there is none.
        names: Vec<CacheName>,
        /// Only say what would go.
        dry_run: bool,
    },
    /// What the daemon is doing; ends with `Outcome::Daemon`.
    DaemonStatus,
    /// Ends the daemon; vms go on.
    DaemonStop,
}

/// Files that become an image. Paths are absolute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFiles {
    /// The name in the store.
    pub name: ImageName,
    /// An ext4, erofs or squashfs filesystem.
    pub rootfs: String,
    /// A kernel of the store or the catalog; the default one when this and `kernel` are absent.
    pub kernel_ref: Option<KernelName>,
    /// A vmlinux or bzImage.
    pub kernel: Option<String>,
    /// What the image boots with by itself.
    pub initrd: Option<String>,
    /// Modules of `kernel`.
    pub modules: Option<String>,
}

/// Files that become a kernel. Paths are absolute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelFiles {
    /// The name in the store.
    pub name: KernelName,
    /// A directory with a kernel in it, such as `/boot`.
    pub from: Option<String>,
    /// Which of several kernels in it.
    pub release: Option<String>,
    /// A vmlinux or bzImage.
    pub vmlinux: Option<String>,
    /// Its modules; looked for beside `from` when absent.
    pub modules: Option<String>,
}

/// What a user asked a vm to be. Absent values take the defaults.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VmSpec {
    /// Its name; made up when absent.
    pub name: Option<VmName>,
    /// Image name or OCI reference.
    pub image: Option<String>,
    /// Kernel name.
    pub kernel: Option<KernelName>,
    /// Virtual processors.
    pub vcpu: Option<u32>,
    /// Memory.
    pub memory: Option<Mebibytes>,
    /// Size of the vm's own disk.
    pub disk_size: Option<Mebibytes>,
    /// Outbound network.
    pub net: Option<NetMode>,
    /// What is allowed and denied besides.
    #[serde(default)]
    pub net_rules: NetRules,
    /// The network of vms that it joins.
    #[serde(default)]
    pub network: Option<NetworkName>,
    /// Which VMM.
    pub vmm: Option<VmmChoice>,
    /// Deleted once the command or session has ended.
    pub rm: bool,
    /// Environment of every session of this vm.
    pub env: Vec<(ByteString, ByteString)>,
    /// What to wait for.
    pub wait: Wait,
    /// How long it runs without a session; the config says so when absent.
    #[serde(default)]
    pub auto_stop_after: Option<AutoStop>,
    /// Ports that are open on the host as long as it runs.
    #[serde(default)]
    pub publish: Vec<Publish>,
    /// Filesystems that outlive it, besides the config's.
    #[serde(default)]
    pub caches: Vec<CacheMount>,
    /// The client's proxy variables, for when the config says that they are passed on.
    #[serde(default)]
    pub proxy: Vec<(ByteString, ByteString)>,
    /// What the checkout has to say.
    #[serde(default)]
    pub project: Option<ProjectFile>,
}

/// What "ready" means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wait {
    /// Commands can be run.
    #[default]
    Agent,
    /// The image's init has finished starting.
    Boot,
}

/// Outbound network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetMode {
    /// The public internet and DNS, nothing private.
    Internet,
    /// Nothing.
    None,
    /// Everything the host reaches.
    Full,
    /// What the vm's rules allow, and nothing else.
    Allow,
}

/// Which VMM to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmChoice {
    /// Firecracker where KVM works, else QEMU.
    Auto,
    /// Firecracker.
    Firecracker,
    /// QEMU.
    Qemu,
}

/// What the daemon tells while it works.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// The vm that will be made, before anything slow begins.
    Planned(PlanSummary),
    /// A step began.
    Step {
        /// A short phrase, such as `pull debian-bookworm`.
        label: String,
    },
    /// The current step moved on.
    Progress {
        /// Bytes done.
        done: u64,
        /// Bytes in all, where known.
        total: Option<u64>,
    },
    /// One line the user should see; the operation goes on.
    Warning {
        /// The line.
        text: String,
    },
    /// One finished check of `Doctor`.
    Check(Check),
    /// The operation succeeded.
    Done(Box<Outcome>),
    /// The operation failed.
    Failed(WireError),
}

/// The line before the progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanSummary {
    /// The vm's name.
    pub name: VmName,
    /// Virtual processors.
    pub vcpu: u32,
    /// Memory.
    pub memory: Mebibytes,
    /// Size of its own disk.
    pub disk_size: Mebibytes,
    /// Image as the store calls it.
    pub image: String,
    /// Kernel as the store calls it.
    pub kernel: KernelName,
    /// `qemu` or `firecracker`.
    pub vmm: String,
    /// Outbound network.
    pub net: NetMode,
    /// The network of vms it joins.
    #[serde(default)]
    pub network: Option<NetworkName>,
    /// True when the processor is emulated in software.
    pub emulated: bool,
    /// Why that is, and what helps.
    pub note: Option<String>,
    /// True when the image has to be pulled first.
    pub pull_image: bool,
    /// True when the kernel has to be pulled first.
    pub pull_kernel: bool,
    /// Which of this the checkout's own file chose, such as `image`.
    #[serde(default)]
    pub project: Vec<String>,
}

/// What an operation ended with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Nothing to tell.
    Done,
    /// A vm is up.
    Started(StartedVm),
    /// A vm exists.
    Created(VmView),
    /// What would be done.
    Plan(PlanSummary),
    /// One vm.
    Vm(VmView),
    /// All vms.
    Vms(Vec<VmView>),
    /// What a vm uses.
    Stats(Box<VmStats>),
    /// What a vm reaches.
    Net(NetView),
    /// What a vm was refused.
    Denials(Vec<Denial>),
    /// What was, or would be, pruned.
    Pruned(Pruned),
    /// One image.
    Image(ImageView),
    /// All images.
    Images(Vec<ImageView>),
    /// One kernel.
    Kernel(KernelView),
    /// All kernels.
    Kernels(Vec<KernelView>),
    /// What could be pulled.
    Available(Vec<Available>),
    /// What was looked at in the store.
    Verified(Vec<Check>),
    /// What was, or would be, removed of the cache.
    CachePruned(CachePruned),
    /// The daemon.
    Daemon(DaemonView),
    /// The config.
    Config(ConfigView),
    /// Caches.
    Caches(Vec<CacheView>),
    /// What there is and what was fetched.
    Setup(Vec<SetupItem>),
}

/// Something that can be pulled by name; also the shape of `--json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Available {
    /// Its name.
    pub name: String,
    /// What it is.
    pub what: String,
    /// Whether the store has it.
    pub present: bool,
}

/// What `image cache prune` did; also the shape of `--json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CachePruned {
    /// Files removed.
    pub files: u64,
    /// Bytes given back.
    pub freed_bytes: u64,
    /// Bytes that stay.
    pub kept_bytes: u64,
}

/// A vm that is up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartedVm {
    /// The vm.
    pub vm: VmView,
    /// Its supervisor's socket.
    pub socket: String,
    /// What took how long, host and guest.
    pub timings: Vec<Timing>,
    /// From the request to now, without pulls, in milliseconds.
    pub ready_ms: u64,
    /// What the image's maker wants to be run in it: entrypoint and command, where the image has no init.
    pub command: Vec<String>,
}

/// A vm as the daemon knows it; also the shape of `--json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmView {
    /// Id.
    pub id: VmId,
    /// Name.
    pub name: VmName,
    /// State.
    pub state: VmState,
    /// Why the state is `error`.
    pub error: Option<String>,
    /// Image name.
    pub image: String,
    /// Kernel name.
    pub kernel: String,
    /// Virtual processors.
    pub vcpu: u32,
    /// Memory in MiB.
    pub memory: Mebibytes,
    /// Limit of its own disk in MiB.
    pub disk_size: Mebibytes,
    /// Bytes its own disk uses on the host.
    pub disk_used_bytes: u64,
    /// Outbound network.
    pub net: NetMode,
    /// `qemu` or `firecracker`.
    pub vmm: String,
    /// True when the processor is emulated in software.
    pub emulated: bool,
    /// The VMM's process id.
    pub vmm_pid: Option<i32>,
    /// The guest kernel's boot id, while running.
    pub boot_id: Option<String>,
    /// Unix time of creation, seconds.
    pub created: i64,
    /// Deleted once its command or session has ended.
    pub rm: bool,
    /// The vm's directory: disk, console log, socket.
    pub dir: String,
    /// The supervisor's socket.
    pub socket: String,
    /// The guest kernel's command line.
    pub cmdline: Option<String>,
    /// How often the last boot was restarted because nothing was heard of it.
    pub watchdog_restarts: u32,
    /// The host's files that were placed in it.
    #[serde(default)]
    pub workspace: Option<Workspace>,
    /// Unix time in seconds at which it stops by itself, unless a session is opened before.
    #[serde(default)]
    pub auto_stop_at: Option<i64>,
    /// Filesystems that outlive it, as it was started with them last.
    #[serde(default)]
    pub caches: Vec<CacheMount>,
    /// Why the network is none although another was asked for.
    #[serde(default)]
    pub network_warning: Option<String>,
    /// The file that is its own disk.
    #[serde(default)]
    pub disk: Option<String>,
    /// The file with the last of its serial console.
    #[serde(default)]
    pub console: Option<String>,
    /// Its own address on the host, where its ports open, while it runs.
    #[serde(default)]
    pub address: Option<Ipv4Addr>,
    /// The network of vms that it joins.
    #[serde(default)]
    pub network: Option<MemberView>,
    /// The network of vms that it is in from its next start on, where that is another.
    #[serde(default)]
    pub next_network: Option<NetworkChoice>,
}

/// What was placed in a vm, and where it came from. The client that places it writes this down; see [`Workspace::FILE`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workspace {
    /// The directory on the host: the top of a checkout, or a plain one.
    pub source: ByteString,
    /// The directory in the guest.
    pub path: ByteString,
    /// Where below both the directory is that was named, and commands begin; empty for the directories themselves.
    #[serde(default)]
    pub below: ByteString,
    /// How it was placed.
    pub mode: WorkspaceMode,
    /// The commit that was checked out on the host.
    pub head: Option<String>,
    /// Unix time it was placed, seconds.
    pub placed: i64,
    /// What was asked for besides, so that it can be placed in the same way again.
    pub asked: WorkspaceAsked,
}

/// How a workspace was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WorkspaceAsked {
    /// Without untracked files.
    pub tracked_only: bool,
    /// With those that look like secrets.
    pub include_secrets: bool,
    /// Not to be changed in the guest.
    pub readonly: bool,
    /// A branch that begins in the guest.
    pub branch: Option<String>,
    /// The name of a commit whose files are meant.
    pub from: Option<String>,
}

impl Workspace {
    /// The directory on the host that was named.
    #[must_use]
    pub fn named(&self) -> std::path::PathBuf {
        joined(&self.source, &self.below)
    }

    /// The directory in the guest that commands begin in.
    #[must_use]
    pub fn begin(&self) -> std::path::PathBuf {
        joined(&self.path, &self.below)
    }

    /// Its name in the directory that the state directory has for each vm with a workspace.
    pub const FILE: &'static str = "workspace.json";

    /// Reads it from such a directory; none where there is none.
    #[must_use]
    pub fn load(dir: &std::path::Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(dir.join(Self::FILE)).ok()?).ok()
    }
}

/// A plain join: with nothing below, `Path::join` would add a slash.
fn joined(top: &ByteString, below: &ByteString) -> std::path::PathBuf {
    let top = std::path::PathBuf::from(top.as_os_str());
    if below.0.is_empty() { top } else { top.join(below.as_os_str()) }
}

/// How a workspace is placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkspaceMode {
    /// The working tree as it is, with the last commits.
    #[default]
    ShallowOverlay,
    /// The working tree as it is, with every commit, submodules included; or a directory without git.
    FullCopy,
}

/// State of a vm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// Made, never started.
    Created,
    /// On its way up.
    Starting,
    /// Up.
    Running,
    /// On its way down.
    Stopping,
    /// Down.
    Stopped,
    /// A boot failed.
    Error,
}

/// What `prune` did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pruned {
    /// The vms.
    pub vms: Vec<VmView>,
    /// Bytes given back.
    pub freed_bytes: u64,
}

/// An image as the store knows it; also the shape of `--json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageView {
    /// Name.
    pub name: ImageName,
    /// Where it came from.
    pub source: String,
    /// Digest of the manifest or of the package set.
    pub digest: String,
    /// Architecture.
    pub arch: String,
    /// Unix time, seconds.
    pub created: i64,
    /// Size of the filesystem.
    pub size_bytes: u64,
    /// Bytes it uses on the host.
    pub disk_bytes: u64,
    /// The init the image brings, if any.
    pub init: Option<String>,
    /// Type of the filesystem.
    pub filesystem: String,
    /// The kernel its vms boot with; none is the default one.
    pub kernel: Option<String>,
    /// It boots with an initrd of its own.
    pub initrd: bool,
    /// Digest of the filesystem, where it was written down.
    pub sha256: Option<String>,
    /// Variables of its commands, as `NAME=value`.
    pub env: Vec<String>,
    /// Directory its commands start in.
    pub workdir: Option<String>,
    /// User its commands run as.
    pub user: Option<String>,
    /// What runs when no command is given and there is no init: this,
    pub entrypoint: Vec<String>,
    /// and these arguments.
    pub cmd: Vec<String>,
    /// Vms that use it.
    pub used_by: Vec<VmName>,
}

/// A kernel as the store knows it; also the shape of `--json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelView {
    /// Name.
    pub name: KernelName,
    /// Release, as `uname -r` prints it.
    pub release: String,
    /// Package version or source.
    pub version: String,
    /// Architecture.
    pub arch: String,
    /// Unix time, seconds.
    pub created: i64,
    /// Bytes it uses on the host.
    pub disk_bytes: u64,
    /// Vms that use it.
    pub used_by: Vec<VmName>,
    /// Images that boot with it.
    pub images: Vec<ImageName>,
}

/// The daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonView {
    /// Process id.
    pub pid: u32,
    /// Build.
    pub build: String,
    /// Unix time of its start, seconds.
    pub started: i64,
    /// Vms that run.
    pub running: usize,
    /// The state directory.
    pub state_dir: String,
    /// The cache directory.
    pub cache_dir: String,
    /// Its log file.
    pub log: String,
}
