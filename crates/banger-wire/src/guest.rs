//! Supervisor and guest agent.
//!
//! Session 0 carries [`HostMessage`] and [`GuestMessage`]. The host opens every other session with
//! [`HostMessage::Open`]; ids are the host's to choose and are not reused within a connection. After that the
//! session's own messages ([`SessionControl`](crate::exec::SessionControl),
//! [`SessionEvent`](crate::exec::SessionEvent)) and data travel with its id until one side sends `Close`.
//!
//! Order of a boot: the agent sends `SYNC` and `Hello` until it is answered; the host sends `SYNC` and
//! `Configure`; the agent mounts the vm's disk and the overlay, configures, starts the image's init, and sends
//! `Configured`. Nothing of the vm's identity is known to the guest before `Configure`.

use crate::bytes::ByteString;
use crate::exec::{ExecSpec, TerminalSize};
use crate::ssh::SshSpec;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

/// Raised when the meaning of a message changes; a vm keeps the agent it was born with.
pub const GENERATION: u32 = 1;
/// Name of the virtio-serial port, found in `/sys/class/virtio-ports/*/name`.
pub const PORT_NAME: &str = "banger.0";
/// Port of the host's address on a vsock (2) at which the agent is listened for, where there is no virtio-serial port.
pub const VSOCK_PORT: u32 = 1024;
/// Time between two `Heartbeat`s of the host. The agent steps its clock when it is off by more than a second.
pub const HEARTBEAT_MS: u64 = 10_000;

/// Agent to host, session 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestMessage {
    /// The agent is up; repeated until `Configure` arrives, and said at once when a `Ping` does. Nothing in it is this
    /// vm's own: its memory may have been saved when it said so.
    Hello(Hello),
    /// The root filesystem is in place, the network is up, sessions may be opened; init is being started.
    Configured {
        /// The guest kernel's boot id.
        boot_id: String,
        /// What took how long.
        timings: Vec<Timing>,
        /// What could not be done, without which the guest goes on.
        #[serde(default)]
        warnings: Vec<String>,
    },
    /// A step of the configuration failed; the agent stays reachable.
    ConfigureFailed {
        /// The step, such as `mount disk`.
        stage: String,
        /// Why.
        message: String,
    },
    /// The image's init reported that start-up is finished (systemd's `READY=1`).
    InitReady,
    /// The guest goes down on its own or as asked; written data is on the disk.
    GoingDown {
        /// True when the guest asked for a reboot.
        reboot: bool,
    },
    /// Answers a host `Ping` with its number.
    Pong {
        /// The number.
        seq: u64,
    },
    /// Answers `Sync`: everything written before is on the disk.
    Synced,
}

/// The first thing an agent says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The agent's protocol generation.
    pub generation: u32,
    /// The guest kernel's release.
    pub kernel: String,
    /// Milliseconds since the kernel started.
    pub uptime_ms: u64,
    /// What took how long before this.
    pub timings: Vec<Timing>,
}

/// One measured step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// The step.
    pub stage: String,
    /// How long it took, in milliseconds.
    pub ms: u64,
}

/// Host to agent, session 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostMessage {
    /// Everything that makes this guest this vm.
    Configure(Box<GuestConfig>),
    /// Opens a session.
    Open {
        /// Its id.
        session: u32,
        /// What it is.
        what: SessionKind,
    },
    /// The host's time; sent regularly.
    Heartbeat {
        /// Nanoseconds since the Unix epoch.
        unix_ns: u64,
    },
    /// Asks for a `Pong`, and before `Configure` for a `Hello`.
    Ping {
        /// Echoed.
        seq: u64,
    },
    /// Asks that everything written is put on the disk; answered by `Synced`.
    Sync,
    /// Asks for an orderly shutdown: sync, then the init's own way, then power off.
    Shutdown {
        /// Reboot the vm instead of ending it.
        reboot: bool,
    },
    /// A signal for the machine. Those that ask a program to end (`INT`, `QUIT`, `TERM`, and `PWR`) ask for an orderly
    /// shutdown; every other one is sent to process 1.
    Signal {
        /// Its number.
        number: i32,
    },
    /// Somebody sits at the serial console, in front of a terminal of this size: starts a root shell there, unless one
    /// is running.
    Console {
        /// The terminal's size.
        size: TerminalSize,
    },
}

/// What a session is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SessionKind {
    /// Runs a command; see [`crate::exec`].
    Exec(Box<ExecSpec>),
    /// Serves one ssh connection, whose bytes travel on the [`STDIN`](crate::exec::STDIN) and
    /// [`STDOUT`](crate::exec::STDOUT) channels, with credits as for a command. Ends like `ExportTree`.
    Ssh(Box<SshSpec>),
    /// Sends a [`GuestStats`](crate::stats::GuestStats) as JSON on the [`STDOUT`](crate::exec::STDOUT) channel. Ends like
    /// `ExportTree`.
    Stats,
    /// Sends a whole tree as one uncompressed OCI layer, with an entry for its root: a POSIX tar on the
    /// [`STDOUT`](crate::exec::STDOUT) channel, with credits as for a command. Ends with
    /// [`Exited`](crate::exec::SessionEvent::Exited) of code 0, or [`Failed`](crate::exec::SessionEvent::Failed) and
    /// a tar that is to be thrown away. Only of a vm without an init, where nothing else writes to it.
    ExportTree(TreeKind),
    /// Replaces a directory by what arrives: [items](crate::item) on the [`STDIN`](crate::exec::STDIN) channel, up to
    /// the first `End`. Until that has arrived, whatever happens, the directory is as it was. Then lists it, as `Collect`
    /// does. Ends like `ExportTree`.
    Place {
        /// The directory, absolute; its parents are made.
        path: ByteString,
        /// Nobody can write to it afterwards, until the guest's next start.
        readonly: bool,
        /// It may be there already and have something in it.
        replace: bool,
    },
    /// Writes what arrives: [items](crate::item) on the [`STDIN`](crate::exec::STDIN) channel, up to an `End`, with names
    /// below `/`. Each file replaces what has its name, whole; parents are made. All of it is root's. Ends like
    /// `ExportTree`.
    Write,
    /// Copies what arrives, one file or tree as [items](crate::item) on the [`STDIN`](crate::exec::STDIN) channel up to an
    /// `End`. All of it is root's. Ends like `ExportTree`.
    CopyIn {
        /// Where to; what is not absolute is below root's home.
        path: ByteString,
        /// Its name in a directory that is there; none where it is to be that directory's content.
        name: Option<ByteString>,
        /// There has to be a directory.
        into: bool,
    },
    /// Sends one file or tree as [items](crate::item) on the [`STDOUT`](crate::exec::STDOUT) channel, up to an `End`. Ends
    /// like `ExportTree`.
    CopyOut {
        /// What; what is not absolute is below root's home.
        path: ByteString,
        /// A link of that name is followed.
        follow: bool,
    },
    /// Says what listens in the guest, now and after every change: messages that are [`Listeners`](crate::ports::Listeners).
    /// Goes on until it is closed.
    Listeners,
    /// Connects to a port of the guest's by TCP: [`STDIN`](crate::exec::STDIN) is what goes there,
    /// [`STDOUT`](crate::exec::STDOUT) what comes from there, and the end of each is its `Eof`. Ends with
    /// [`Failed`](crate::exec::SessionEvent::Failed) when nobody listens or the connection breaks, and like `ExportTree`
    /// after both ends.
    Connect {
        /// Where to, as the guest sees it.
        address: SocketAddr,
    },
    /// Lists a directory as [items](crate::item) on the [`STDOUT`](crate::exec::STDOUT) channel, up to an `End`, then
    /// answers each `Want` from the `STDIN` channel until an `End` there. Names `.git` are left out, at every depth.
    /// Nothing in the guest is changed. Ends like `ExportTree`.
    Collect {
        /// The directory, absolute.
        path: ByteString,
    },
}

/// Which tree is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TreeKind {
    /// The image's, as it is on its drive.
    Image,
    /// What the vm shows: image and changes. Leaves out what is not the image's: mounts, and the host name, hosts,
    /// resolver and machine id files the agent wrote.
    Merged,
    /// The root filesystem of a vm in [`InitMode::Build`]. Leaves out the files that make a vm this one.
    Root,
}

/// What becomes of the image's init.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InitMode {
    /// Run the image's init when there is one (the path is looked up by the agent), else stay the first process.
    Auto,
    /// Never run it: the agent stays the first process.
    AgentOnly,
    /// Like `AgentOnly`, and the root is the image itself, writable: this vm finishes an image, or is read whose
    /// disk began as a copy of one. It has no other disk, and nothing of its identity is written.
    Build,
    /// The machine booted with an initrd of the image's own, whose `/init` finds the root filesystem and its init. The
    /// agent follows process 1 there. The image's drive is the vm's own copy.
    Handover,
}

/// Everything that makes a guest this vm and not another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// Host name, also written to `/etc/hostname` and `/etc/hosts`.
    pub hostname: String,
    /// Thirty-two hexadecimal digits.
    pub machine_id: String,
    /// The host's time, nanoseconds since the Unix epoch.
    pub unix_ns: u64,
    /// Random bytes for the guest's pool.
    pub entropy: ByteString,
    /// The network, or none for a guest without one (only loopback is up then).
    #[serde(default)]
    pub network: Option<GuestNetwork>,
    /// What becomes of init.
    pub init: InitMode,
    /// The image's environment, the base of every session's.
    #[serde(default)]
    pub env: Vec<(ByteString, ByteString)>,
    /// The image's working directory, for commands without one of their own.
    #[serde(default)]
    pub workdir: Option<ByteString>,
    /// The image's user, for commands without one of their own.
    #[serde(default)]
    pub user: Option<String>,
    /// Which drive is which, by virtio serial number.
    pub drives: GuestDrives,
    /// A certificate (PEM) that programs are to trust besides those the image has.
    #[serde(default)]
    pub ca: Option<String>,
}

/// The guest finds its drives by their position: `/dev/vda`, `/dev/vdb`, `/dev/vdc`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestDrives {
    /// The image, read-only.
    pub image: String,
    /// Filesystem type of the image.
    pub image_fs: String,
    /// The vm's own disk.
    pub disk: String,
    /// The kernel's module tree, read-only.
    #[serde(default)]
    pub modules: Option<String>,
    /// Filesystems that outlive this vm, mounted before init starts.
    #[serde(default)]
    pub caches: Vec<GuestCache>,
}

impl GuestDrives {
    /// Returns the drives a vm's own guest writes to.
    #[must_use]
    pub fn written(&self) -> Vec<String> {
        std::iter::once(&self.disk).chain(self.caches.iter().map(|cache| &cache.device)).cloned().collect()
    }
}

/// A filesystem that outlives the vm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestCache {
    /// Its drive.
    pub device: String,
    /// The directory it is mounted at, absolute; made where it is missing.
    pub path: String,
}

/// The guest's network. The same for every vm, which is why a vm's memory can be restored many times.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNetwork {
    /// Hardware address of the interface to configure, as `52:54:…`.
    pub mac: String,
    /// The guest's address.
    pub address: Ipv4Addr,
    /// Its prefix length.
    pub prefix_len: u8,
    /// The other end of the link: the way out, also the resolver.
    pub gateway: Ipv4Addr,
    /// There is no way out, so that no route leads there.
    #[serde(default)]
    pub closed: bool,
    /// The network of vms that it is in.
    #[serde(default)]
    pub member: Option<GuestMember>,
    /// The same for IPv6, where the host has it.
    #[serde(default)]
    pub ipv6: Option<GuestNetwork6>,
    /// Search domains and other resolver lines are not passed on; only the resolver's address is.
    pub resolver: Ipv4Addr,
    /// Names that resolve without asking anybody.
    #[serde(default)]
    pub hosts: BTreeMap<String, Ipv4Addr>,
}

/// A guest's place among the vms of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMember {
    /// Its address there, a second one of its interface.
    pub address: Ipv4Addr,
    /// Where the others are.
    pub network: Ipv4Addr,
    /// Prefix length of that.
    pub prefix_len: u8,
}

/// IPv6 part of [`GuestNetwork`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNetwork6 {
    /// The guest's address.
    pub address: Ipv6Addr,
    /// Its prefix length.
    pub prefix_len: u8,
    /// The way out.
    pub gateway: Ipv6Addr,
}
