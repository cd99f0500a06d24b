//! Making this guest the vm the host asked for: disk, overlay, identity, network.

use banger_sys::netif;
use banger_sys::netlink::{self, Changes, NewRoute};
use banger_wire::guest::{GuestCache, GuestConfig, GuestDrives, GuestMember, GuestNetwork, InitMode};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Mode;
use rustix::mount::{MountFlags, mount, mount_bind, mount_move};
use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::init::NEW_ROOT;
use crate::{devices, disk, shutdown};

/// Where the image is mounted before the overlay covers it.
const IMAGE: &str = "/image";
/// Where the vm's own disk is mounted.
const DISK: &str = "/disk";
/// Places that get the disk itself instead of the overlay, because what lives there stacks overlays of its own.
const DIRECT: [(&str, &str); 3] = [
    ("docker", "var/lib/docker"),
    ("containerd", "var/lib/containerd"),
    ("containers", "var/lib/containers"),
];
/// Where an image keeps its init, in the kernel's and the distributions' order.
const INITS: [&str; 4] = ["sbin/init", "usr/sbin/init", "lib/systemd/systemd", "usr/lib/systemd/systemd"];
/// Units that wait for something a vm never has. The getty is the one that matters: without udev it waits 90 s.
const MASKED_UNITS: [&str; 12] = [
    "serial-getty@ttyS0.service",
    "getty@tty1.service",
    "getty-static.service",
    "systemd-firstboot.service",
    "systemd-remount-fs.service",
    "systemd-pstore.service",
    "systemd-binfmt.service",
    "e2scrub_reap.service",
    "e2scrub_all.timer",
    "fstrim.timer",
    "dev-hugepages.mount",
    "sys-kernel-debug.mount",
];

/// How long an interface may look for its carrier; it takes some milliseconds. Less than a second.
const CARRIER_TIME: Duration = Duration::from_millis(500);

/// A step of the configuration failed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) stage: &'static str,
    pub(crate) message: String,
}

fn at<T, E: std::fmt::Display>(stage: &'static str, result: Result<T, E>) -> Result<T, Failure> {
    result.map_err(|error| Failure { stage, message: error.to_string() })
}

/// The init an image brings.
#[derive(Debug)]
pub(crate) struct Init {
    /// Its path in the new root.
    pub(crate) path: PathBuf,
    /// It reports when it has finished starting, and ends in `/run/initramfs`.
    pub(crate) is_systemd: bool,
}

/// Parts this guest from others that its memory was restored to, and brings up its devices. Comes before everything else.
fn wake(config: &GuestConfig) -> Result<(), Failure> {
    at("seed random numbers", banger_sys::random::reseed(&config.entropy.0))?;
    at("set clock", set_clock(config.unix_ns))?;
    devices::probe_all();
    Ok(())
}

/// Assembles the new root and gives this process its identity. Afterwards process 1 may take it over.
///
/// Returns the image's init, when there is one and it is wanted, and what could not be done.
pub(crate) fn configure(config: &GuestConfig) -> Result<(Option<Init>, Vec<String>), Failure> {
    wake(config)?;
    let warnings = mount_root(&config.drives, &config.init)?;
    let root = Path::new(NEW_ROOT);
    at("set hostname", rustix::system::sethostname(config.hostname.as_bytes()))?;
    if config.init != InitMode::Build {
        at("write identity", write_identity(root, config))?;
    }
    if let Some(ca) = &config.ca {
        at("add the certificate", trust(root, ca))?;
    }
    if let Some(network) = &config.network {
        at("configure network", configure_network(network))?;
    }
    let _ = netif::set_up("lo", true);
    let init = (config.init == InitMode::Auto).then(|| find_init(root)).flatten();
    for dir in ["dev", "proc", "sys"] {
        at("move kernel filesystems", mount_move(format!("/{dir}"), root.join(dir)))?;
    }
    at("prepare /run", prepare_run(root, init.as_ref()))?;
    if init.as_ref().is_some_and(|init| init.is_systemd) {
        let prepared = shutdown::prepare(Path::new("/"), root, &config.drives.written());
        at("prepare the shutdown", prepared)?;
    }
    Ok((init, warnings))
}

/// Gives a machine with an initrd of the image's own its identity, and follows process 1 to its root filesystem.
pub(crate) fn configure_handover(config: &GuestConfig) -> Result<(), Failure> {
    wake(config)?;
    at("set hostname", rustix::system::sethostname(config.hostname.as_bytes()))?;
    if let Some(network) = &config.network {
        at("configure network", configure_network(network))?;
    }
    // Before anything of the image's runs: its init takes host name and machine id from there at once.
    let prepared = crate::handover::prepare(&config.drives, |root| write_identity(root, config));
    at("follow the image's initrd", crate::handover::follow())?;
    // What the initrd had to repair first, for one.
    let written = prepared.or_else(|error| {
        crate::init::log(&format!("prepare the root filesystem: {error}, trying again"));
        write_identity(Path::new("/"), config)
    });
    if let Err(error) = written {
        crate::init::log(&format!("write identity: {error}, ignoring"));
    }
    Ok(())
}

/// Steps the clock to the host's time.
pub(crate) fn set_clock(unix_ns: u64) -> io::Result<()> {
    let to = rustix::time::Timespec {
        tv_sec: i64::try_from(unix_ns / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(unix_ns % 1_000_000_000).unwrap_or(0),
    };
    Ok(rustix::time::clock_settime(rustix::time::ClockId::Realtime, to)?)
}

fn mount_root(drives: &GuestDrives, init: &InitMode) -> Result<Vec<String>, Failure> {
    for dir in [IMAGE, DISK, NEW_ROOT] {
        at("make mount points", make_dir(Path::new(dir)))?;
    }
    if *init == InitMode::Build {
        let flags = MountFlags::NOATIME;
        at("mount image", mount(&drives.image, NEW_ROOT, &drives.image_fs, flags, None))?;
        return at("prepare root", make_root_dirs(Path::new(NEW_ROOT))).map(|()| Vec::new());
    }
    // A journal is never replayed onto the shared image.
    let options = if drives.image_fs == "ext4" { Some(c"noload") } else { None };
    at("mount image", mount(&drives.image, IMAGE, &drives.image_fs, MountFlags::RDONLY, options))?;
    at("mount disk", mount(&drives.disk, DISK, "ext4", MountFlags::NOATIME, None))?;
    let grown = disk::grow(Path::new(&drives.disk), Path::new(DISK));
    let warnings = grown.err().iter().map(disk::Stays::text).collect();
    for dir in ["upper", "work", "docker", "containerd", "containers"] {
        at("prepare disk", make_dir(&Path::new(DISK).join(dir)))?;
    }
    at("prepare disk", same_attributes(Path::new(IMAGE), &Path::new(DISK).join("upper")))?;
    // With Debian's default of `off`, renaming a directory of the image fails and breaks npm and cargo. Without an
    // init the changes are exported as a layer, which has no way to say "renamed".
    let features = match init {
        InitMode::Auto => c"redirect_dir=on,index=on,xino=on",
        _ => c"redirect_dir=off,index=off,metacopy=off",
    };
    let options =
        format!("lowerdir={IMAGE},upperdir={DISK}/upper,workdir={DISK}/work,{}", features.to_string_lossy());
    let options = at("mount overlay", std::ffi::CString::new(options))?;
    at(
        "mount overlay",
        mount("overlay", NEW_ROOT, "overlay", MountFlags::empty(), Some(options.as_c_str())),
    )?;
    let root = Path::new(NEW_ROOT);
    at("prepare root", make_root_dirs(root))?;
    for (from, to) in DIRECT {
        // Only where the image has the place or its parent as a real directory; a link could lead anywhere.
        let target = root.join(to);
        if is_real_dir(root, to) || (is_real_dir(root, "var/lib") && make_dir(&target).is_ok()) {
            at("mount container storage", mount_bind(Path::new(DISK).join(from), &target))?;
        }
    }
    if let Some(modules) = &drives.modules {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let lib = if is_real_dir(root, "usr/lib") { "usr/lib" } else { "lib" };
        let target = root.join(lib).join("modules").join(release);
        at("mount modules", std::fs::create_dir_all(&target))?;
        at("mount modules", mount(modules, &target, "ext4", MountFlags::RDONLY, Some(c"noload")))?;
    }
    for cache in &drives.caches {
        at("mount cache", mount_cache(root, cache))?;
    }
    Ok(warnings)
}

/// Mounts a cache at a directory of the new root, which is made where it is missing. Links on the way lead where they
/// would lead inside.
fn mount_cache(root: &Path, cache: &GuestCache) -> io::Result<()> {
    let place = make_dirs_inside(root, &cache.path)?;
    let place = format!("/proc/self/fd/{}", place.as_raw_fd());
    let flags = MountFlags::NOATIME | MountFlags::NODEV;
    mount(&cache.device, place, "ext4", flags, None)
        .map_err(|error| io::Error::other(format!("`{}`: {error}", cache.path.escape_debug())))
}

/// Opens a directory as it is called inside the new root, and makes what is missing of it.
fn make_dirs_inside(root: &Path, path: &str) -> io::Result<OwnedFd> {
    use rustix::fs::{OFlags, ResolveFlags};
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = rustix::fs::open(root, flags, Mode::empty())?;
    let open = |path: &Path| rustix::fs::openat2(&top, path, flags, Mode::empty(), ResolveFlags::IN_ROOT);
    let mut at = PathBuf::from("/");
    let mut dir = open(&at)?;
    for part in path.split('/').filter(|part| !part.is_empty()) {
        at.push(part);
        dir = match open(&at) {
            Err(rustix::io::Errno::NOENT) => {
                rustix::fs::mkdirat(&dir, part, Mode::from_raw_mode(0o755))?;
                open(&at)?
            }
            opened => opened?,
        };
    }
    Ok(dir)
}

/// Where distributions keep the certificates their programs trust, in one file.
const BUNDLES: [&str; 4] = [
    "etc/ssl/certs/ca-certificates.crt",
    "etc/pki/tls/certs/ca-bundle.crt",
    "etc/ssl/ca-bundle.pem",
    "etc/ssl/cert.pem",
];
/// Where Debian's and Alpine's `update-ca-certificates` look for more.
const OWN_CERTIFICATES: &str = "usr/local/share/ca-certificates";
/// Longest bundle that is read: that of a distribution has 250 KiB.
const BUNDLE_LEN_MAX: u64 = 4 << 20;

/// Adds a certificate to those the image's programs trust. A later start with the same one changes nothing.
fn trust(root: &Path, ca: &str) -> io::Result<()> {
    use std::io::Read as _;
    let mut found = false;
    for bundle in BUNDLES {
        let Some((dir, name)) = bundle.rsplit_once('/').filter(|(dir, _)| is_real_dir(root, dir)) else {
            continue;
        };
        let path = root.join(dir).join(name);
        // A link, often to another of these files; that one has its turn.
        if !std::fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_file()) {
            continue;
        }
        found = true;
        let mut text = Vec::new();
        std::fs::File::open(&path)?.take(BUNDLE_LEN_MAX).read_to_end(&mut text)?;
        if !text.windows(ca.len()).any(|part| part == ca.as_bytes()) {
            let mut file = std::fs::OpenOptions::new().append(true).open(&path)?;
            file.write_all(format!("\n{}\n", ca.trim_end()).as_bytes())?;
        }
    }
    if !found {
        drop(make_dirs_inside(root, "etc/ssl/certs")?);
        replace(root, BUNDLES[0], ca, 0o644)?;
    }
    if is_real_dir(root, "usr/local/share") {
        make_dir(&root.join(OWN_CERTIFICATES))?;
        replace(root, &format!("{OWN_CERTIFICATES}/banger.crt"), ca, 0o644)?;
    }
    Ok(())
}

fn make_root_dirs(root: &Path) -> io::Result<()> {
    ["dev", "proc", "sys", "run", "tmp", "var", "etc"]
        .into_iter()
        .try_for_each(|dir| make_dir(&root.join(dir)))
}

pub(crate) fn make_dir(path: &Path) -> io::Result<()> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The overlay shows the upper directory's own mode and owner as the root's.
fn same_attributes(from: &Path, to: &Path) -> io::Result<()> {
    let from = std::fs::metadata(from)?;
    std::os::unix::fs::chown(to, Some(from.uid()), Some(from.gid()))?;
    std::fs::set_permissions(to, from.permissions())
}

/// True when every component of `path` below `root` is a directory and none a link.
fn is_real_dir(root: &Path, path: &str) -> bool {
    let mut at = root.to_path_buf();
    path.split('/').all(|part| {
        at.push(part);
        std::fs::symlink_metadata(&at).is_ok_and(|metadata| metadata.is_dir())
    })
}

fn find_init(root: &Path) -> Option<Init> {
    INITS.iter().find_map(|path| {
        let program = resolve_program(root, path)?;
        let is_systemd = program.file_name().is_some_and(|name| name == "systemd");
        Some(Init { path: Path::new("/").join(path), is_systemd })
    })
}

/// Follows links as they would be inside the new root, to where the program really is. Needs `/proc`.
fn resolve_program(root: &Path, path: &str) -> Option<PathBuf> {
    use rustix::fs::{OFlags, ResolveFlags};
    let dir = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).ok()?;
    let file = rustix::fs::openat2(&dir, path, OFlags::PATH, Mode::empty(), ResolveFlags::IN_ROOT).ok()?;
    let stat = rustix::fs::fstat(&file).ok()?;
    let executable = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() && stat.st_mode & 0o111 != 0;
    executable.then(|| std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok())?
}

/// Replaces a file of the new root, also where the image has a link there.
fn replace(root: &Path, path: &str, content: &str, mode: u32) -> io::Result<()> {
    let parent = Path::new(path).parent().and_then(Path::to_str).unwrap_or_default();
    if !is_real_dir(root, parent) {
        return Err(io::Error::other(format!("/{parent} of the image is not a directory")));
    }
    let target = root.join(path);
    match std::fs::remove_file(&target) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(target)?;
    file.write_all(content.as_bytes())
}

fn write_identity(root: &Path, config: &GuestConfig) -> io::Result<()> {
    let name = &config.hostname;
    replace(root, "etc/hostname", &format!("{name}\n"), 0o644)?;
    let mut hosts =
        format!("127.0.0.1\tlocalhost\n127.0.1.1\t{name}\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for (host, address) in config.network.iter().flat_map(|network| &network.hosts) {
        hosts.push_str(&format!("{address}\t{host}\n"));
    }
    replace(root, "etc/hosts", &hosts, 0o644)?;
    replace(root, "etc/machine-id", &format!("{}\n", config.machine_id), 0o444)?;
    let resolver = config
        .network
        .as_ref()
        .map_or_else(String::new, |network| format!("nameserver {}\n", network.resolver));
    replace(root, "etc/resolv.conf", &resolver, 0o644)
}

fn configure_network(network: &GuestNetwork) -> io::Result<()> {
    let name = interface_by_mac(&network.mac)?;
    if name != "eth0" {
        netif::rename(&name, "eth0")?;
    }
    if network.ipv6.is_some() {
        // Nobody else is on this link, so nothing can collide and the address is usable at once.
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/eth0/accept_dad", "0");
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/eth0/accept_ra", "0");
    }
    netif::set_up("lo", true)?;
    netif::set_address("eth0", netif::Inet4 { address: network.address, prefix_len: network.prefix_len })?;
    netif::set_up("eth0", true)?;
    if !network.closed {
        netif::add_default_route(network.gateway)?;
    }
    if let Some(member) = &network.member {
        join_network(member, network.gateway)?;
    }
    if let Some(ipv6) = &network.ipv6 {
        let index = netif::index("eth0")?;
        netif::set_address6(index, ipv6.address, ipv6.prefix_len)?;
        netif::add_default_route6(index, ipv6.gateway)?;
    }
    wait_for_carrier("eth0")
}

/// Gives the interface its address among the vms of a network, which is the one that packets to them come from.
fn join_network(member: &GuestMember, gateway: Ipv4Addr) -> io::Result<()> {
    let interface = netif::index("eth0")?;
    netlink::add_address(interface, member.address)?;
    netlink::add_route(&NewRoute {
        to: member.network,
        prefix_len: member.prefix_len,
        gateway: Some(gateway),
        source: Some(member.address),
        interface,
    })
}

/// What is sent before the interface has found its carrier is lost: a name's first question would wait for seconds.
fn wait_for_carrier(name: &str) -> io::Result<()> {
    let deadline = Instant::now() + CARRIER_TIME;
    let changes = Changes::of_links()?;
    let state = format!("/sys/class/net/{name}/operstate");
    while std::fs::read_to_string(&state)?.trim() != "up" {
        changes.drain();
        let left = deadline.saturating_duration_since(Instant::now());
        let left = rustix::time::Timespec { tv_sec: 0, tv_nsec: i64::from(left.subsec_nanos()) };
        // No carrier in time is no reason not to boot.
        if poll(&mut [PollFd::new(&changes, PollFlags::IN)], Some(&left))? == 0 {
            break;
        }
    }
    Ok(())
}

fn interface_by_mac(mac: &str) -> io::Result<String> {
    for entry in std::fs::read_dir("/sys/class/net")? {
        let entry = entry?;
        let found = std::fs::read_to_string(entry.path().join("address")).unwrap_or_default();
        if found.trim().eq_ignore_ascii_case(mac) {
            return entry
                .file_name()
                .into_string()
                .map_err(|_| io::Error::other("interface name is not text"));
        }
    }
    Err(io::Error::other(format!("no network interface with address {mac}")))
}

/// A fresh `/run`, and in it what makes systemd start without waiting for devices that never come.
fn prepare_run(root: &Path, init: Option<&Init>) -> io::Result<()> {
    let run = root.join("run");
    mount("tmpfs", &run, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(c"mode=755"))?;
    if init.is_some() {
        let units = run.join("systemd/system");
        std::fs::create_dir_all(&units)?;
        for unit in MASKED_UNITS {
            std::os::unix::fs::symlink("/dev/null", units.join(unit))?;
        }
        return Ok(());
    }
    // Without an init nobody else mounts these.
    let dev = root.join("dev");
    for (name, kind, options) in
        [("pts", "devpts", c"mode=620,ptmxmode=666,gid=5"), ("shm", "tmpfs", c"mode=1777")]
    {
        make_dir(&dev.join(name))?;
        mount(kind, dev.join(name), kind, MountFlags::NOSUID | MountFlags::NOEXEC, Some(options))?;
    }
    for (name, to) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        match std::os::unix::fs::symlink(to, dev.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}
