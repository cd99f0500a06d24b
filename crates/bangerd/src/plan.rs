//! The complete plan of a vm: every path, argument, address and drive, decided before anything is made.
//!
//! The daemon writes it into the vm's directory; the supervisor executes it and needs nothing else, so a daemon
//! that dies between the two changes nothing.

use crate::choice::Choice;
use crate::net::NetPlan;
use crate::ports::PortsPlan;
use crate::store::VmRow;
use banger_image::oci::ImageConfig;
use banger_vmm::{Drive, Driver, MachinePlan};
use banger_wire::bytes::ByteString;
use banger_wire::daemon::VmSpec;
use banger_wire::guest::{GuestConfig, GuestDrives, InitMode};
use banger_wire::names::{VmId, VmName};
use banger_wire::size::Mebibytes;
use banger_wire::time::millis;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// Where `~` is in a guest.
pub(crate) const GUEST_HOME: &str = "/root";
/// Name of the plan within the vm's directory.
pub(crate) const PLAN_FILE: &str = "plan.json";
/// The vm's own disk; its supervisor holds an exclusive `flock` on it for as long as it lives.
pub(crate) const DISK_FILE: &str = "disk.raw";
/// The supervisor's socket.
pub(crate) const SOCKET_FILE: &str = "vm.sock";
/// The modules within a kernel's directory, where it has any.
pub(crate) const MODULES_FILE: &str = "modules.ext4";
/// The serial console, bounded.
pub(crate) const CONSOLE_FILE: &str = "console.log";
/// What the supervisor itself has to say.
pub(crate) const SUPERVISOR_LOG_FILE: &str = "supervisor.log";
/// Written by the supervisor as its last act: how the vm ended, a [`banger_wire::vm::VmEnd`].
pub(crate) const END_FILE: &str = "end.json";

/// Everything a supervisor needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VmPlan {
    /// The vm.
    pub(crate) id: VmId,
    /// Its name.
    pub(crate) name: VmName,
    /// Its directory on the host; inside the supervisor's root it is `/vm`.
    pub(crate) dir: PathBuf,
    /// The uid (and gid) everything of this vm runs as when the daemon is root; the owner's own otherwise.
    pub(crate) run_as: Option<u32>,
    /// The control group the vm's processes are in, on the host.
    #[serde(default)]
    pub(crate) cgroup: Option<PathBuf>,
    /// Files and directories the supervisor's private root shows, besides `/vm` and the system's programs.
    pub(crate) binds: Vec<Bind>,
    /// Files the private root shows writable: the image, for a vm that finishes one.
    #[serde(default)]
    pub(crate) writable: Vec<Bind>,
    /// The machine, with paths as inside the supervisor's root.
    pub(crate) machine: MachinePlan,
    /// What the guest becomes.
    pub(crate) guest: GuestConfig,
    /// Outbound network.
    pub(crate) net: NetPlan,
    /// The vm ends when the connection that holds its lease ends.
    pub(crate) lease: bool,
    /// Its place on the host; none for a vm that nobody works in.
    #[serde(default)]
    pub(crate) ports: Option<PortsPlan>,
    /// How long it runs without a session, in milliseconds; none is until somebody ends it.
    #[serde(default)]
    pub(crate) auto_stop_ms: Option<u64>,
    /// Files on the host that are in one vm at a time; the supervisor and the VMM hold an exclusive `flock` on each.
    #[serde(default)]
    pub(crate) caches: Vec<PathBuf>,
    /// How long the agent may stay silent before the boot counts as failed, in milliseconds.
    pub(crate) boot_timeout_ms: u64,
    /// How the machine comes to life.
    #[serde(default)]
    pub(crate) start: Start,
    /// What does not confine the vm's processes. The daemon leaves nothing out; tests do, to see what a layer is good for.
    #[serde(default)]
    pub(crate) without: Vec<Layer>,
}

impl VmPlan {
    /// Keeps each drive, and each direction of the network, to a size in a second; 0 is no limit.
    pub(crate) fn limit(&mut self, disk: Option<Mebibytes>, net: Option<Mebibytes>) {
        let rate = |size: Option<Mebibytes>| size.map(Mebibytes::bytes).filter(|rate| *rate > 0);
        self.machine.drives.iter_mut().for_each(|drive| drive.rate = rate(disk));
        self.net.rate = rate(net);
    }
}

/// How a machine comes to life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Start {
    /// The kernel boots.
    #[default]
    Boot,
    /// The kernel boots, and once the agent speaks the machine is saved as [`SAVED_FILE`] and [`STATE_FILE`] in the vm's
    /// directory, and ends.
    Save,
    /// The machine goes on from [`SAVED_INSIDE`]; it boots when that can't be done, or comes to nothing.
    Restore,
}

/// Something that confines the VMM, and to a lesser extent the supervisor, besides namespaces and the private root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Layer {
    /// It has none, and no program it starts can get any.
    Capabilities,
    /// It reaches the files of its machine only, and no process or abstract socket outside.
    Landlock,
    /// It can't make certain system calls.
    Seccomp,
    /// Memory, descriptors, processes, lengths of files.
    Limits,
}

/// A saved machine, or its memory.
pub(crate) const SAVED_FILE: &str = "memory";
/// The rest of a saved machine, where the VMM keeps it by itself; empty otherwise.
pub(crate) const STATE_FILE: &str = "state";
/// Where the supervisor finds the one its vm goes on from.
pub(crate) const SAVED_INSIDE: &str = "/boot/memory";
/// And its rest.
pub(crate) const STATE_INSIDE: &str = "/boot/state";

/// A bind mount into the supervisor's root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bind {
    /// On the host.
    pub(crate) host: PathBuf,
    /// In the supervisor's root.
    pub(crate) inside: PathBuf,
}

/// How long an emulated boot may take until the agent speaks, with a loaded host.
pub(crate) const BOOT_TIMEOUT: Duration = Duration::from_secs(180);
/// What the guest calls the first drive.
const FIRST_DRIVE: &str = "/dev/vda";
/// Kernel files inside the supervisor's root.
const INSIDE: &str = "/boot";

/// What a plan is made of: everything that had to be looked up.
#[derive(Debug)]
pub(crate) struct Inputs<'a> {
    pub(crate) row: &'a VmRow,
    pub(crate) spec: &'a VmSpec,
    /// What the image's maker decided about programs in it.
    pub(crate) config: &'a ImageConfig,
    pub(crate) dir: PathBuf,
    pub(crate) image: PathBuf,
    /// Type of the image's filesystem.
    pub(crate) filesystem: String,
    pub(crate) kernel: PathBuf,
    /// The kernel has a filesystem of modules.
    pub(crate) modules: bool,
    pub(crate) initramfs: PathBuf,
    pub(crate) choice: Choice,
    pub(crate) entropy: Vec<u8>,
    pub(crate) tsc_khz: Option<u64>,
    pub(crate) net: NetPlan,
    /// Limits of the whole vm, where the system lets us have any.
    pub(crate) cgroup: Option<PathBuf>,
    pub(crate) boot: Boot,
}

/// How far a vm boots, and on what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Boot {
    /// Overlay of image and disk, and the image's init.
    Image,
    /// Image and disk as well, but no further than the agent.
    AgentOnly,
    /// It writes the image itself and boots no further than the agent.
    Build,
    /// The same on a disk that began as a copy of the image.
    Disk,
    /// The image's own initrd and init, on a disk that began as a copy of the image.
    Handover,
}

/// The image's variables; one without a `=` says nothing.
fn image_env(config: &ImageConfig) -> impl Iterator<Item = (ByteString, ByteString)> + '_ {
    let pair = |text: &String| text.split_once('=').map(|(name, value)| (name.into(), value.into()));
    config.env.iter().filter_map(pair)
}

/// Decides everything about a vm.
pub(crate) fn plan(inputs: Inputs<'_>) -> VmPlan {
    let Inputs {
        row, spec, config, dir, kernel, initramfs, choice, entropy, tsc_khz, net, cgroup, boot, ..
    } = inputs;
    let inside = |name: &str| PathBuf::from(INSIDE).join(name);
    let mut binds = vec![
        Bind { host: kernel.join("vmlinux"), inside: inside("vmlinux") },
        Bind { host: initramfs, inside: inside("initramfs") },
    ];
    // It may be anywhere; QEMU, with the files it needs, is below `/usr`.
    let program = match choice.vmm.driver() {
        Driver::Qemu => choice.program,
        Driver::Firecracker => {
            binds.push(Bind { host: choice.program, inside: inside("firecracker") });
            inside("firecracker")
        }
    };
    let image = Bind { host: inputs.image, inside: inside("image") };
    let disk = Drive { path: PathBuf::from("/vm").join(DISK_FILE), read_only: false, rate: None };
    let (mut drives, mut writable, mut cmdline) = (Vec::new(), Vec::new(), Vec::new());
    let mut modules = None;
    match boot {
        Boot::Build => {
            drives.push(Drive { path: image.inside.clone(), read_only: false, rate: None });
            writable.push(image);
        }
        Boot::Disk => drives.push(disk),
        Boot::Handover => {
            drives.push(disk);
            cmdline.push(format!("rdinit={} root={FIRST_DRIVE} rw", crate::initramfs::APPENDED_INIT));
        }
        Boot::Image | Boot::AgentOnly => {
            drives.push(Drive { path: image.inside.clone(), read_only: true, rate: None });
            binds.push(image);
            drives.push(disk);
            if inputs.modules {
                binds.push(Bind { host: kernel.join(MODULES_FILE), inside: inside(MODULES_FILE) });
                drives.push(Drive { path: inside(MODULES_FILE), read_only: true, rate: None });
                modules = Some("/dev/vdc".to_owned());
            }
        }
    }
    let machine = MachinePlan {
        driver: choice.vmm.driver(),
        program,
        kvm: choice.kvm,
        pci: choice.pci,
        vcpu: row.vcpu,
        memory: row.memory,
        kernel: inside("vmlinux"),
        initrd: inside("initramfs"),
        tsc_khz,
        cmdline,
        drives,
        net: None,
        run_dir: PathBuf::from("/run"),
        gives_memory_back: choice.gives_memory_back,
        to_be_saved: false,
        saved: None,
    };
    let guest = GuestConfig {
        hostname: row.name.to_string(),
        machine_id: format!("{0}{0}{1}", row.id, &row.id.as_str()[..8]),
        unix_ns: 0,
        entropy: ByteString(entropy),
        network: net.guest(),
        init: match boot {
            Boot::Image => InitMode::Auto,
            Boot::AgentOnly => InitMode::AgentOnly,
            Boot::Build | Boot::Disk => InitMode::Build,
            Boot::Handover => InitMode::Handover,
        },
        env: image_env(config).chain(spec.env.iter().cloned()).collect(),
        workdir: config.workdir.clone().filter(|workdir| !workdir.is_empty()).map(ByteString::from),
        user: config.user.clone(),
        drives: GuestDrives {
            image: FIRST_DRIVE.to_owned(),
            image_fs: inputs.filesystem,
            disk: "/dev/vdb".to_owned(),
            modules,
            caches: Vec::new(),
        },
        ca: None,
    };
    VmPlan {
        id: row.id.clone(),
        name: row.name.clone(),
        dir,
        run_as: row.run_as,
        cgroup,
        binds,
        writable,
        machine,
        guest,
        net,
        lease: row.rm,
        ports: None,
        auto_stop_ms: None,
        caches: Vec::new(),
        boot_timeout_ms: millis(BOOT_TIMEOUT),
        start: Start::Boot,
        without: Vec::new(),
    }
}
