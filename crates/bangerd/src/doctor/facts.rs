//! What is known of the machine: gathered here, judged in [`super::checks`].
//!
//! A fact that could not be had is a text in the place of the fact, so gathering never fails and every judgement is a
//! function of plain values.

use super::distribution::{self, Distribution};
use super::{leftovers, namespaces};
use crate::cgroup::{self, Base};
use crate::config::{self, Config};
use crate::daemon::{DEFAULT_IMAGE, DEFAULT_KERNEL, Daemon, default_memory, ram};
use crate::kvm::Kvm;
use crate::names;
use crate::net::pasta::PastaPlan;
use crate::net::{self, host, nft};
use crate::programs::{self, Vmm};
use crate::supervise::confine;
use banger_wire::size::Mebibytes;
use rustix::fs::StatVfsMountFlags;
use rustix::process::{Resource, getrlimit};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

/// The device taps are made with.
pub(crate) const TUN: &str = "/dev/net/tun";
/// There when systemd runs the machine.
const SYSTEMD: &str = "/run/systemd/system";
/// There when that kind of KVM is.
const KVM_PVM: &str = "/sys/module/kvm_pvm";
/// Limits of namespaces that a vm counts against, below `/proc/sys/user`.
const NAMESPACE_LIMITS: [&str; 6] = [
    "max_user_namespaces",
    "max_mnt_namespaces",
    "max_pid_namespaces",
    "max_ipc_namespaces",
    "max_uts_namespaces",
    "max_net_namespaces",
];

/// Everything the checks look at.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) arch: String,
    pub(crate) system: String,
    pub(crate) kernel_release: String,
    pub(crate) distribution: Distribution,
    pub(crate) user: String,
    /// This program, for commands that name it.
    pub(crate) program: PathBuf,
    /// Where the config is, when there is one; or what is wrong with it.
    pub(crate) config: Result<Option<PathBuf>, String>,
    pub(crate) kvm: Kvm,
    /// Whether KVM is the kind that runs modified kernels only.
    pub(crate) is_paravirtual: bool,
    pub(crate) namespaces: Result<(), String>,
    /// Why the system forbids them, where it says so.
    pub(crate) restriction: Restriction,
    pub(crate) namespace_limits: BTreeMap<String, u64>,
    /// Whether this kernel confines as much as banger can ask for, and what of it there is.
    pub(crate) confinement: (bool, String),
    /// Where vms have limits as a whole; or why they have none.
    pub(crate) cgroup: Result<Base, String>,
    pub(crate) memory: Memory,
    pub(crate) neighbours: Neighbours,
    pub(crate) tun: Device,
    pub(crate) pasta: Option<Pasta>,
    pub(crate) nft: Option<Result<PathBuf, String>>,
    pub(crate) route: Result<Route, String>,
    pub(crate) resolvers: Result<Vec<String>, String>,
    pub(crate) qemu: Result<Program, String>,
    pub(crate) firecracker: Result<Program, String>,
    pub(crate) default_kernel: String,
    pub(crate) kernels: Vec<String>,
    pub(crate) default_image: String,
    pub(crate) images: Vec<String>,
    pub(crate) disk: Result<Disk, String>,
    /// Open files: soft and hard.
    pub(crate) open_files: (u64, u64),
    /// Whether systemd runs this machine.
    pub(crate) is_systemd: bool,
    /// Processes: soft.
    pub(crate) processes: u64,
    /// Whether the system ends a user's processes at logout.
    pub(crate) ends_at_logout: bool,
    pub(crate) leftovers: Result<Vec<PathBuf>, String>,
    /// Whether names of vms are answered.
    pub(crate) names: names::State,
}

/// What keeps ordinary users from making namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Restriction {
    None,
    /// `kernel.apparmor_restrict_unprivileged_userns`.
    AppArmor,
    /// `kernel.unprivileged_userns_clone`, on older Debian kernels.
    Sysctl,
}

/// A device file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Device {
    Usable,
    Absent,
    Denied(String),
    Broken(String),
}

/// Memory of the machine and of a vm.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memory {
    /// What programs can still have; none when the kernel does not say.
    pub(crate) available: Option<Mebibytes>,
    /// What a vm gets when nothing is asked for.
    pub(crate) of_vm: Mebibytes,
}

/// How vms could learn of each other, and of the host, besides what they may.
#[derive(Debug, Clone, Default)]
pub(crate) struct Neighbours {
    /// Flaws of the processor that nothing is done about, by the kernel's names.
    pub(crate) flaws: Vec<String>,
    /// Equal pages of different vms become one, which can be told by the time a write takes.
    pub(crate) merges_pages: bool,
    /// Two of them may run on one core at a time.
    pub(crate) shares_cores: bool,
    /// What is in their memory may come to be on a disk.
    pub(crate) swaps: bool,
}

/// An installed VMM.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    pub(crate) path: PathBuf,
    /// None when it does not say.
    pub(crate) version: Option<String>,
}

/// An installed pasta.
#[derive(Debug, Clone)]
pub(crate) struct Pasta {
    pub(crate) path: PathBuf,
    pub(crate) version: String,
    /// Whether it has the options vms need.
    pub(crate) is_usable: bool,
}

/// Ways out of this machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Route {
    pub(crate) has_default: bool,
    pub(crate) nets: usize,
}

/// The filesystem of the state directory.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    pub(crate) free_bytes: u64,
    /// None where there is no limit.
    pub(crate) free_files: Option<u64>,
    pub(crate) is_read_only: bool,
}

/// Looks at everything. Blocks while programs are asked for their versions.
pub(crate) fn gather(daemon: &Daemon) -> Facts {
    let os_release = distribution::os_release();
    let loaded = Config::load();
    let config_path = || config::path().filter(|path| path.exists());
    let config = loaded.as_ref().map(|_| config_path()).map_err(super::reason);
    let loaded = loaded.unwrap_or_default();
    let uname = rustix::system::uname();
    let open_files = getrlimit(Resource::Nofile);
    Facts {
        arch: std::env::consts::ARCH.to_owned(),
        system: distribution::field(&os_release, "PRETTY_NAME").unwrap_or_else(|| "Linux".to_owned()),
        kernel_release: uname.release().to_string_lossy().into_owned(),
        distribution: Distribution::parse(&os_release),
        user: user(),
        program: std::env::current_exe().unwrap_or_else(|_| "bangerd".into()),
        config,
        kvm: daemon.kvm.find_anew(),
        is_paravirtual: Path::new(KVM_PVM).exists(),
        namespaces: namespaces::try_out(),
        restriction: restriction(),
        namespace_limits: namespace_limits(),
        confinement: confine::summary(),
        cgroup: cgroup::prepare(),
        memory: memory(),
        neighbours: neighbours(),
        tun: tun(),
        pasta: net::program("pasta").map(|program| {
            let plan = PastaPlan::probe(program);
            Pasta { version: plan.version(), is_usable: plan.args.is_some(), path: plan.program }
        }),
        nft: net::program("nft")
            .map(|path| nft::try_out(&path).map(|()| path).map_err(|error| super::reason(&error))),
        route: host::read()
            .map(|host| Route {
                has_default: host.has_default_route(),
                nets: host.own.len() + host.links.len(),
            })
            .map_err(|error| super::reason(&error)),
        resolvers: resolvers(Path::new("/etc/resolv.conf")),
        qemu: program(Vmm::Qemu, &loaded),
        firecracker: program(Vmm::Firecracker, &loaded),
        default_kernel: DEFAULT_KERNEL.to_owned(),
        kernels: daemon.store.kernels().unwrap_or_default().into_iter().map(|row| row.name).collect(),
        default_image: loaded.default_image.unwrap_or_else(|| DEFAULT_IMAGE.to_owned()),
        images: daemon.store.images().unwrap_or_default().into_iter().map(|row| row.name).collect(),
        disk: disk(&daemon.paths.state),
        open_files: (open_files.current.unwrap_or(u64::MAX), open_files.maximum.unwrap_or(u64::MAX)),
        processes: getrlimit(Resource::Nproc).current.unwrap_or(u64::MAX),
        is_systemd: Path::new(SYSTEMD).exists(),
        ends_at_logout: ends_at_logout(),
        names: daemon.names.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        leftovers: leftovers::find(daemon).map_err(|error| super::reason(&error)),
    }
}

/// Returns the user's name, or number.
pub(crate) fn user() -> String {
    let uid = rustix::process::getuid().as_raw().to_string();
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let mut lines = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let line = lines.find(|fields| fields.get(2) == Some(&uid.as_str()));
    line.map_or(uid.clone(), |fields| fields[0].to_owned())
}

fn program(vmm: Vmm, config: &Config) -> Result<Program, String> {
    let path = programs::find(vmm, config).map_err(|error| super::reason(&error.into()))?;
    Ok(Program { version: programs::version(&programs::said(&path, "--version")), path })
}

fn number(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn restriction() -> Restriction {
    let sysctl = |name: &str| number(&Path::new("/proc/sys/kernel").join(name));
    if sysctl("apparmor_restrict_unprivileged_userns") == Some(1) {
        Restriction::AppArmor
    } else if sysctl("unprivileged_userns_clone") == Some(0) {
        Restriction::Sysctl
    } else {
        Restriction::None
    }
}

fn namespace_limits() -> BTreeMap<String, u64> {
    let limit = |name: &str| Some((name.to_owned(), number(&Path::new("/proc/sys/user").join(name))?));
    NAMESPACE_LIMITS.into_iter().filter_map(limit).collect()
}

fn memory() -> Memory {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    Memory { available: meminfo(&text, "MemAvailable"), of_vm: default_memory(ram()) }
}

/// Reads a line of `meminfo`, which has KiB.
fn meminfo(text: &str, name: &str) -> Option<Mebibytes> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(Mebibytes(value.split_whitespace().next()?.parse::<u64>().ok()? / 1024))
}

fn neighbours() -> Neighbours {
    let entries =
        std::fs::read_dir("/sys/devices/system/cpu/vulnerabilities").into_iter().flatten().flatten();
    let is_open =
        |path: &Path| std::fs::read_to_string(path).is_ok_and(|text| text.starts_with("Vulnerable"));
    let open = entries.filter(|entry| is_open(&entry.path()));
    let mut flaws: Vec<String> = open.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    flaws.sort();
    let meminfo_text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    Neighbours {
        flaws,
        merges_pages: number(Path::new("/sys/kernel/mm/ksm/run")) == Some(1),
        shares_cores: number(Path::new("/sys/devices/system/cpu/smt/active")) == Some(1),
        swaps: meminfo(&meminfo_text, "SwapTotal").is_some_and(|total| total.0 > 0),
    }
}

fn tun() -> Device {
    match std::fs::File::options().read(true).write(true).open(TUN) {
        Ok(_) => Device::Usable,
        Err(error) => match error.kind() {
            std::io::ErrorKind::NotFound => Device::Absent,
            std::io::ErrorKind::PermissionDenied => Device::Denied(error.to_string()),
            _ => Device::Broken(error.to_string()),
        },
    }
}

fn resolvers(path: &Path) -> Result<Vec<String>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        words.next().filter(|word| *word == "nameserver")?;
        words.next().map(str::to_owned)
    };
    Ok(text.lines().filter_map(server).collect())
}

fn disk(state: &Path) -> Result<Disk, String> {
    let disk = rustix::fs::statvfs(state).map_err(|error| error.to_string())?;
    Ok(Disk {
        path: state.to_owned(),
        free_bytes: disk.f_bavail.saturating_mul(disk.f_frsize),
        free_files: (disk.f_files > 0).then_some(disk.f_favail),
        is_read_only: disk.f_flag.contains(StatVfsMountFlags::RDONLY),
    })
}

/// Tells whether systemd ends what a session started when it ends. Root is excluded by default.
fn ends_at_logout() -> bool {
    if rustix::process::getuid().is_root() || !Path::new(SYSTEMD).exists() {
        return false;
    }
    let mut files = Vec::new();
    for dir in ["/usr/lib/systemd/logind.conf.d", "/etc/systemd/logind.conf.d", "/run/systemd/logind.conf.d"]
    {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        files.extend(entries.map(|entry| entry.path()));
    }
    // Drop-ins count in the order of their names, after the main file.
    files.sort_by_key(|path| path.file_name().map(ToOwned::to_owned));
    files.insert(0, "/etc/systemd/logind.conf".into());
    let texts: Vec<String> = files.iter().filter_map(|path| std::fs::read_to_string(path).ok()).collect();
    kills(&texts.concat(), &user())
}

/// Reads logind's settings, the last of which counts.
fn kills(text: &str, user: &str) -> bool {
    let setting = |name: &str| {
        let mut values = text.lines().filter_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='));
        values.next_back().map(str::trim)
    };
    let on = setting("KillUserProcesses").is_some_and(|value| ["yes", "true", "on", "1"].contains(&value));
    on && !setting("KillExcludeUsers").is_some_and(|users| users.split_whitespace().any(|name| name == user))
}

#[cfg(test)]
mod tests {
    use super::{Mebibytes, kills, meminfo, resolvers};

    #[test]
    fn memory_is_read_in_mebibytes() {
        let text = "MemTotal:       24683436 kB\nMemFree: 1 kB\nMemAvailable:   17000000 kB\n";
        assert_eq!(meminfo(text, "MemAvailable"), Some(Mebibytes(16601)));
        assert_eq!(meminfo(text, "Mem"), None);
        assert_eq!(meminfo("MemAvailable: none", "MemAvailable"), None);
    }

    #[test]
    fn resolvers_are_read_from_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(
            &file,
            "# nameserver 9.9.9.9\nsearch example\nnameserver 127.0.0.53\nnameserver\t::1\n",
        )
        .unwrap();
        assert_eq!(resolvers(file.path()).unwrap(), ["127.0.0.53", "::1"]);
        assert!(resolvers(std::path::Path::new("/nowhere")).is_err());
    }

    #[test]
    fn the_last_setting_of_logind_counts() {
        for (text, expected) in [
            ("", false),
            ("#KillUserProcesses=yes\n", false),
            ("[Login]\nKillUserProcesses=yes\n", true),
            ("KillUserProcesses=yes\nKillUserProcesses=no\n", false),
            ("KillUserProcesses=yes\nKillExcludeUsers=root someone\n", false),
            ("KillUserProcesses=yes\nKillExcludeUsers=root\n", true),
        ] {
            assert_eq!(kills(text, "someone"), expected, "{text}");
        }
    }
}
