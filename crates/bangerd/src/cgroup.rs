//! A control group for each vm: its memory, processes and share of the processors, where the system lets us make one.
//!
//! ```text
//! base: what is mounted (root), or the daemon's own group, given to its user (delegated)
//!   banger-daemon    the daemon, where its own group is the base: one with limits for children has no processes
//!   banger-VMID      supervisor, VMM, pasta; the supervisor moves in first of all
//! ```
//!
//! Version 2 only. Groups of systemd's are not asked for, they come with how the daemon was started. Without a base vms
//! run without these limits, and `doctor` says so.

use crate::vmsock;
use banger_wire::size::Mebibytes;
use rustix::fs::Access;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Memory of a vm besides its guest's: translated code, the VMM's own, the supervisor, pasta. A QEMU that emulates has
/// been seen with 0.4 GiB. What files have cached counts too, but gives way.
const OVERHEAD: Mebibytes = Mebibytes(1024);
/// Threads and processes besides one for each processor: 64 of a VMM's disks, supervisor and pasta, and as many again.
const PROCESSES: u64 = 256;
/// Half of what other groups of its parent have: the machine stays usable under busy vms.
const CPU_WEIGHT: u64 = 50;
/// What a base must have.
const NEEDED: [&str; 2] = ["memory", "pids"];
/// Where the daemon goes when its own group is the base.
const DAEMON: &str = "banger-daemon";
/// The kernel's number for a filesystem of control groups.
const CGROUP2_MAGIC: u64 = 0x6367_7270;
/// How often and at what distance a group is removed: its last process may be on its way out.
const REMOVE_TRIES: u32 = 200;
const REMOVE_PAUSE: Duration = Duration::from_millis(5);

/// Where groups of vms can be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Base {
    pub(crate) dir: PathBuf,
    /// Whether it shares out processors as well.
    pub(crate) cpu: bool,
}

/// Finds the base and makes it ready: its children have limits from now on.
///
/// # Errors
/// Why there is none; a sentence for `doctor`.
pub(crate) fn prepare() -> Result<Base, String> {
    let Some(places) = find() else {
        return Err("control groups of version 2 are not mounted".to_owned());
    };
    // An ordinary user may own what is mounted in a container only, where it is the daemon's own group anyway.
    let root = rustix::process::getuid().is_root();
    let candidates = if root { vec![places.top, places.own] } else { vec![places.own] };
    let mut reasons = Vec::new();
    for dir in candidates {
        match make_ready(&dir) {
            Ok(base) => return Ok(base),
            Err(reason) if !reasons.contains(&reason) => reasons.push(reason),
            Err(_) => {}
        }
    }
    Err(reasons.join("; "))
}

fn find() -> Option<Places> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    places(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"))
}

fn make_ready(dir: &Path) -> Result<Base, String> {
    let shown = dir.display();
    for name in ["", "cgroup.procs", "cgroup.subtree_control"] {
        let path = if name.is_empty() { dir.to_owned() } else { dir.join(name) };
        if rustix::fs::access(path, Access::WRITE_OK).is_err() {
            return Err(format!("`{shown}` is not this user's"));
        }
    }
    let words = |name: &str| {
        let text = std::fs::read_to_string(dir.join(name)).unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let offered = words("cgroup.controllers");
    if let Some(missing) = NEEDED.iter().find(|name| !offered.iter().any(|word| word == *name)) {
        return Err(format!("`{shown}` has no `{missing}` controller"));
    }
    let wanted: Vec<&str> =
        NEEDED.into_iter().chain(["cpu"]).filter(|name| offered.iter().any(|word| word == name)).collect();
    let cpu = wanted.contains(&"cpu");
    let enabled = words("cgroup.subtree_control");
    let line: Vec<String> = wanted
        .iter()
        .filter(|name| !enabled.iter().any(|word| word == *name))
        .map(|name| format!("+{name}"))
        .collect();
    if !line.is_empty() {
        enable(dir, &line.join(" ")).map_err(|error| match error.raw_os_error() {
            Some(number) if number == rustix::io::Errno::BUSY.raw_os_error() => {
                format!("`{shown}` has processes besides the daemon")
            }
            _ => format!("`{shown}` can't have limits for its children: {error}"),
        })?;
    }
    Ok(Base { dir: dir.to_owned(), cpu })
}

/// A group with processes in it, other than the topmost, has no limits for children: the daemon makes way.
fn enable(dir: &Path, line: &str) -> io::Result<()> {
    let control = dir.join("cgroup.subtree_control");
    match std::fs::write(&control, line) {
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => {}
        written => return written,
    }
    let own = dir.join(DAEMON);
    make_dir(&own)?;
    join(&own)?;
    std::fs::write(&control, line)
}

fn make_dir(dir: &Path) -> io::Result<()> {
    match std::fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Moves this process, with all its threads, into a group.
pub(crate) fn join(dir: &Path) -> io::Result<()> {
    std::fs::write(dir.join("cgroup.procs"), "0")
}

/// Makes the group of a vm. Nobody is in it yet.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn make(base: &Base, id: &str, memory: Mebibytes, vcpu: u32) -> io::Result<PathBuf> {
    let dir = base.dir.join(name(id));
    make_dir(&dir)?;
    for (file, value) in limits(base, memory, vcpu) {
        std::fs::write(dir.join(file), value)?;
    }
    Ok(dir)
}

fn name(id: &str) -> String {
    format!("banger-{id}")
}

fn limits(base: &Base, memory: Mebibytes, vcpu: u32) -> Vec<(&'static str, String)> {
    let bytes = Mebibytes(memory.0 + OVERHEAD.0).bytes();
    let mut limits = vec![
        ("memory.max", bytes.to_string()),
        // All of a vm or nothing of it.
        ("memory.oom.group", "1".to_owned()),
        ("pids.max", (PROCESSES + u64::from(vcpu)).to_string()),
    ];
    if base.cpu {
        limits.push(("cpu.weight", CPU_WEIGHT.to_string()));
    }
    limits
}

/// Removes the group of a vm that has ended, if it had one; its plan says where. Can be repeated.
pub(crate) async fn remove_of(vm: &Path) {
    let Some(name) = vm.file_name().map(|id| name(&id.to_string_lossy())) else { return };
    // The vm's processes may have written this, so it could be any directory.
    let planned = vmsock::load_plan(vm).and_then(|plan| plan.cgroup);
    let planned = planned.filter(|dir| dir.file_name().is_some_and(|last| *last == *name));
    // A daemon that died between making the group and writing the plan was at one of these.
    let others = find().map(|places| [places.top.join(&name), places.own.join(&name)]);
    for dir in planned.into_iter().chain(others.into_iter().flatten()) {
        if rustix::fs::statfs(&dir).is_ok_and(|fs| fs.f_type as u64 == CGROUP2_MAGIC) {
            remove(&dir).await;
        }
    }
}

async fn remove(dir: &Path) {
    for _ in 0..REMOVE_TRIES {
        match std::fs::remove_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
            _ => return,
        }
        tokio::time::sleep(REMOVE_PAUSE).await;
    }
    tracing::warn!("the control group `{}` is still in use, ignoring", dir.display());
}

/// Where groups are mounted, and which the daemon is in.
#[derive(Debug, PartialEq, Eq)]
struct Places {
    top: PathBuf,
    own: PathBuf,
}

/// Reads `mountinfo` and `cgroup` of `/proc/self`.
fn places(mounts: &str, groups: &str) -> Option<Places> {
    let mount = mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        let (root, place) = (fields.next()?, fields.next()?);
        after.starts_with("cgroup2 ").then(|| (unescape(root), unescape(place)))
    });
    let (root, top) = mount?;
    let group = Path::new(groups.lines().find_map(|line| line.strip_prefix("0::"))?);
    // Where the daemon made way it is one further down.
    let group = if group.ends_with(DAEMON) { group.parent()? } else { group };
    // What is mounted may be a part of the tree.
    let below = group.strip_prefix(root).ok()?;
    // Without the slash that joining nothing would add.
    let own = if below == Path::new("") { top.clone() } else { top.join(below) };
    Some(Places { top, own })
}

/// In `mountinfo` a space, tab, line break or backslash is written as its number, three octal digits.
fn unescape(text: &str) -> PathBuf {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((&first, tail)) = rest.split_first() {
        let number = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let number = number.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match number.filter(|_| first == b'\\') {
            Some(number) => {
                bytes.push(number);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::{Base, Mebibytes, Places, limits, places};

    #[test]
    fn the_mounted_tree_and_the_own_group_are_found() {
        let modern = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        let hybrid = "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let part = "35 24 0:30 /docker/ab /mnt/a\\040b\\134c rw - cgroup2 cgroup rw\n";
        let found = |top: &str, own: &str| Some(Places { top: top.into(), own: own.into() });
        for (mounts, groups, expected) in [
            (
                modern,
                "0::/user.slice/a.scope\n",
                found("/sys/fs/cgroup", "/sys/fs/cgroup/user.slice/a.scope"),
            ),
            (modern, "0::/a.scope/banger-daemon\n", found("/sys/fs/cgroup", "/sys/fs/cgroup/a.scope")),
            (modern, "0::/\n", found("/sys/fs/cgroup", "/sys/fs/cgroup")),
            (hybrid, "9:name=systemd:/x\n0::/\n", found("/sys/fs/cgroup/unified", "/sys/fs/cgroup/unified")),
            (part, "0::/docker/ab/c\n", found("/mnt/a b\\c", "/mnt/a b\\c/c")),
            (part, "0::/elsewhere\n", None),
            (&hybrid[..72], "0::/\n", None),
            (modern, "", None),
            ("", "0::/\n", None),
        ] {
            // As text: as paths, one with a slash at its end is the same.
            let text = |places: Option<Places>| places.map(|places| format!("{places:?}"));
            assert_eq!(text(places(mounts, groups)), text(expected), "{mounts}{groups}");
        }
    }

    #[test]
    fn limits_follow_the_vm() {
        let base = |cpu| Base { dir: "/g".into(), cpu };
        let text = |cpu| {
            let limits = limits(&base(cpu), Mebibytes(512), 2);
            limits.iter().map(|(file, value)| format!("{file}={value}")).collect::<Vec<_>>().join(" ")
        };
        let plain = "memory.max=1610612736 memory.oom.group=1 pids.max=258";
        assert_eq!(text(false), plain);
        assert_eq!(text(true), format!("{plain} cpu.weight=50"));
    }
}
