//! What a VMM that has been taken over can do: a program that tries it all, started by `bangerd supervise` as a vm's VMM.
//!
//! Each layer is then left out, and what it prevents succeeds, so that every one of these tests can fail. The same program
//! is also run as an ordinary process, where it succeeds in what namespaces and private root prevent.
//!
//! Needs a C compiler. Under root the vms are an ordinary user's, and in one test root's.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout, reason = "a test")]

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
};
use rustix::process::{geteuid, getuid};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// An ordinary user without a name, and one of those a daemon of root gives to its vms.
const ORDINARY_UID: u32 = 54_322;
const VM_UID: u32 = 1_872_000_001;
/// Memory of the vm.
const MEMORY_MIB: u32 = 256;
const LAYERS: [&str; 4] = ["capabilities", "landlock", "seccomp", "limits"];

/// How often a start is timed with the layers, and without.
const COST_PAIRS: usize = 25;
/// What they may add to it, in milliseconds.
const COST_MAX_MS: f64 = 20.0;

/// A machine with things on it that no VMM should get at.
struct Host {
    dir: tempfile::TempDir,
    /// Whoever starts the vm; none is who runs the tests.
    uid: Option<u32>,
    tcp: TcpListener,
    name: String,
    _unix: UnixListener,
    /// Open in every process that is started, unless somebody closes it.
    _open: fs::File,
    neighbour: Child,
}

type Found = HashMap<String, String>;

impl Host {
    /// Makes it, for an ordinary user; or says why not.
    fn prepare(test: &str) -> Option<Self> {
        Self::with_uid(test, geteuid().is_root().then_some(ORDINARY_UID))
    }

    fn with_uid(test: &str, uid: Option<u32>) -> Option<Self> {
        let dir = tempfile::Builder::new().prefix("banger-test-").tempdir().unwrap();
        let mut cc = Command::new("cc");
        cc.args(["-O1", "-pthread", "-o"]).arg(dir.path().join("hostile"));
        cc.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/confinement/hostile.c"));
        if !cc.status().is_ok_and(|status| status.success()) {
            println!("skipped: {test}: no C compiler");
            return None;
        }
        // A name of its own for each test, since all are in one network namespace.
        let name = format!("{}-abstract", dir.path().file_name().unwrap().to_str().unwrap());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let mut neighbour = Command::new("sleep");
        neighbour.arg("600");
        become_user(&mut neighbour, uid);
        let open = fs::File::open(dir.path()).unwrap();
        rustix::io::fcntl_setfd(&open, rustix::io::FdFlags::empty()).unwrap();
        let host = Self {
            _open: open,
            uid,
            tcp: TcpListener::bind("127.0.0.1:0").unwrap(),
            name,
            _unix: UnixListener::bind_addr(&address).unwrap(),
            neighbour: neighbour.spawn().unwrap(),
            dir,
        };
        host.own("", true);
        for dir in ["home", "state", "state/other"] {
            fs::create_dir(host.path(dir)).unwrap();
            host.own(dir, true);
        }
        for file in ["home/secret", "state/other/disk.raw"] {
            fs::write(host.path(file), "secret").unwrap();
            host.own(file, false);
        }
        Some(host)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn own(&self, name: &str, closed: bool) {
        let path = self.path(name);
        chown(&path, self.uid, self.uid).unwrap();
        if closed {
            fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
        }
    }

    /// What the program needs to know, as words of a kernel's command line.
    fn words(&self) -> Vec<String> {
        vec![
            format!("home={}", self.path("home/secret").display()),
            format!("state={}", self.path("state").display()),
            format!("other={}", self.path("state/other/disk.raw").display()),
            format!("pid={}", self.neighbour.id()),
            format!("port={}", self.tcp.local_addr().unwrap().port()),
            format!("abstract={}", self.name),
        ]
    }

    /// Runs the program as an ordinary process of the vm's user.
    fn directly(&self, words: &[String]) -> Found {
        let mut command = Command::new(self.path("hostile"));
        command.args(["-append", &words.join(" ")]);
        become_user(&mut command, self.uid);
        results(&String::from_utf8(command.output().unwrap().stdout).unwrap())
    }

    /// Runs the program as the VMM of a vm, without some of the layers; returns what it found and how the vm ended.
    fn supervised(&self, without: &[&str], words: &[String]) -> Found {
        self.supervised_as("qemu", without, words)
    }

    /// The same, in the place of one of the VMMs.
    fn supervised_as(&self, driver: &str, without: &[&str], words: &[String]) -> Found {
        let dir = self.make_vm(without, words, None);
        let mut plan: Value = serde_json::from_slice(&fs::read(dir.join("plan.json")).unwrap()).unwrap();
        plan["machine"]["driver"] = driver.into();
        fs::write(dir.join("plan.json"), plan.to_string()).unwrap();
        self.supervise(&dir);
        results(&fs::read_to_string(dir.join("console.log")).unwrap())
    }

    /// A vm's directory as the daemon makes it.
    fn make_vm(&self, without: &[&str], words: &[String], run_as: Option<u32>) -> PathBuf {
        let dir = tempfile::Builder::new().prefix("vm-").tempdir_in(self.path("state")).unwrap().keep();
        let disk = fs::File::create(dir.join("disk.raw")).unwrap();
        disk.set_len(1 << 20).unwrap();
        let plan = json!({
            "id": "0123456789ab", "name": "hostile", "dir": dir, "run_as": run_as, "writable": [], "lease": false,
            "binds": [{ "host": self.path("hostile"), "inside": "/boot/vmm" }],
            "machine": {
                "program": "/boot/vmm", "kvm": false, "vcpu": 1, "memory": MEMORY_MIB, "kernel": "/boot/vmlinux",
                "initrd": "/boot/initramfs", "tsc_khz": null, "cmdline": words, "net": null, "run_dir": "/run",
                "drives": [{ "path": "/vm/disk.raw", "read_only": false }],
            },
            "guest": {
                "hostname": "hostile", "machine_id": "0", "unix_ns": 0, "entropy": "", "network": null,
                "init": "auto", "env": [], "workdir": null, "user": null,
                "drives": { "image": "/dev/vda", "image_fs": "ext4", "disk": "/dev/vdb", "modules": null },
            },
            "net": { "mode": "none", "nft": null, "pasta": null },
            "boot_timeout_ms": 60_000, "without": without,
        });
        fs::write(dir.join("plan.json"), plan.to_string()).unwrap();
        let user = run_as.or(self.uid);
        // As after an earlier boot, so that the program finds it however fast it starts.
        fs::write(dir.join("console.log"), "").unwrap();
        for path in [&dir, &dir.join("disk.raw"), &dir.join("console.log")] {
            chown(path, user, user).unwrap();
        }
        if run_as.is_none() {
            chown(dir.join("plan.json"), user, user).unwrap();
        }
        dir
    }

    /// Starts a vm; its first process has split off when this returns.
    fn start(&self, dir: &Path) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bangerd"));
        command.arg("supervise").arg("--dir").arg(dir).stdin(Stdio::null());
        become_user(&mut command, self.uid);
        // Not a pipe, whose end would only come with that of the vm.
        let log = dir.join("supervisor.log");
        command.stdout(Stdio::null()).stderr(fs::File::create(&log).unwrap());
        assert!(command.status().unwrap().success(), "{}", fs::read_to_string(&log).unwrap());
    }

    /// Runs a vm to its end.
    fn supervise(&self, dir: &Path) {
        self.start(dir);
        wait_for("the vm to end", || dir.join("end.json").exists());
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.neighbour.kill();
        let _ = self.neighbour.wait();
    }
}

fn wait_for(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The processes that were started for a vm, besides its VMM.
fn supervisors(dir: &Path) -> Vec<u32> {
    let pids =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let is_one = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).split('\0').any(|word| Path::new(word) == dir)
    };
    pids.filter(is_one).collect()
}

/// One line of `status` for each thread of a process, sorted.
fn threads(pid: u32, field: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let status = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let value = |text: String| {
        let line = text.lines().find(|line| line.starts_with(field)).unwrap().to_owned();
        line.split('\t').next_back().unwrap().to_owned()
    };
    let mut values: Vec<String> = status.map(value).collect();
    values.sort();
    values
}

fn become_user(command: &mut Command, uid: Option<u32>) {
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
}

fn results(text: &str) -> Found {
    let pairs = text.lines().filter_map(|line| line.trim().split_once('='));
    let found: Found = pairs.map(|(what, result)| (what.to_owned(), result.to_owned())).collect();
    assert_eq!(found.get("done").map(String::as_str), Some("ok"), "the program got to its end: {text}");
    found
}

/// Asserts that each of these was tried with this result.
fn expect(found: &Found, result: &str, tries: &[&str]) {
    let other: Vec<_> =
        tries.iter().filter(|what| found[**what] != result).map(|what| (what, &found[*what])).collect();
    assert!(other.is_empty(), "not `{result}`: {other:?}");
}

/// Asserts that none of these succeeded.
fn refuse(found: &Found, tries: &[&str]) {
    let done: Vec<_> = tries.iter().filter(|what| found[**what] == "ok").collect();
    assert!(done.is_empty(), "succeeded: {done:?}");
}

fn number(found: &Found, what: &str) -> u32 {
    found[what].parse().unwrap()
}

/// What the private root and the namespaces keep out.
const OUTSIDE: [&str; 8] =
    ["home", "state", "other-vm", "host-process", "kill-host", "ptrace-host", "loopback", "abstract"];
/// Files that are in the private root and not the VMM's.
const NOT_ITS_FILES: [&str; 7] =
    ["plan", "plan-write", "console", "new-file", "tun", "supervisor-memory", "processes"];
/// Calls that fail for an ordinary process too, but differently.
const REFUSED: [&str; 18] = [
    "mount",
    "unshare-user",
    "clone-user",
    "module",
    "module-file",
    "kexec",
    "bpf",
    "io_uring",
    "keyctl",
    "perf",
    "userfaultfd",
    "handles",
    "setns",
    "memfd",
    "shared-memory",
    "chmod",
    "read-supervisor",
    "trace-me",
];

#[test]
fn a_vmm_gets_to_what_is_its_own_and_nothing_else() {
    let Some(host) = Host::prepare("a_vmm_gets_to_what_is_its_own_and_nothing_else") else { return };
    let found = host.supervised(&[], &host.words());
    expect(&found, "ok", &["own-disk", "library", "unix", "own-memory"]);
    refuse(&found, &OUTSIDE);
    refuse(&found, &["shadow", "root-write", "usr-write", "kill-supervisor", "ptrace-supervisor"]);
    expect(&found, "EACCES", &NOT_ITS_FILES);
    expect(&found, "EPERM", &REFUSED);
    expect(
        &found,
        "EPERM",
        &["supervisor-socket", "supervisor-listens", "inet", "inet6", "netlink", "vsock"],
    );
    expect(&found, "ENOSYS", &["clone3"]);
    expect(&found, "EFBIG", &["grow-disk"]);
    expect(&found, "ENOMEM", &["memory"]);
    expect(&found, "0", &["capabilities", "bounding", "forks", "core", "locked"]);
    expect(&found, "1", &["no-new-privileges"]);
    // The lock on its disk, and no other descriptor.
    expect(&found, "1", &["inherited"]);
    assert!(number(&found, "threads") < 600 && number(&found, "descriptors") < 1024, "{found:?}");
}

/// Firecracker's filter lets it connect, since that is how its guest reaches the agent's socket, and make files in memory.
#[test]
fn in_firecrackers_place_it_connects_and_nobody_listens() {
    let name = "in_firecrackers_place_it_connects_and_nobody_listens";
    let Some(host) = Host::prepare(name) else { return };
    let found = host.supervised_as("firecracker", &[], &host.words());
    expect(&found, "ok", &["own-disk", "unix", "supervisor-socket", "memfd"]);
    expect(&found, "ECONNRESET", &["supervisor-listens"]);
    refuse(&found, &OUTSIDE);
    expect(&found, "EACCES", &NOT_ITS_FILES);
    let refused: Vec<&str> = REFUSED.into_iter().filter(|what| *what != "memfd").collect();
    expect(&found, "EPERM", &refused);
    expect(&found, "EPERM", &["inet", "inet6", "netlink", "vsock"]);
    expect(&found, "0", &["capabilities", "bounding", "forks", "core", "locked"]);
    refuse(&found, &["root-write", "usr-write", "kill-supervisor", "ptrace-supervisor"]);
    refuse(&found, &["mount-in-user-namespace"]);
    expect(&found, "EFBIG", &["grow-disk"]);
    expect(&found, "ENOMEM", &["memory"]);
    assert!(number(&found, "threads") < 600 && number(&found, "descriptors") < 1024, "{found:?}");
}

/// A network of vms on a host: the vm that is tried is its first member, and the test listens as the second.
struct Network {
    dir: PathBuf,
    peer: OwnedFd,
}

/// Where the private root of a vm shows that directory, when it is to.
const SHOWN: &str = "/boot/network";
/// The ways to the sockets of a network that the program tries.
const TO_MEMBERS: [&str; 3] = ["member", "member-own", "member-process"];

impl Network {
    fn create(host: &Host) -> Self {
        let dir = host.path("networks/x");
        fs::create_dir_all(&dir).unwrap();
        for number in ["1", "2"] {
            fs::create_dir(dir.join(number)).unwrap();
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let peer = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        bind(&peer, &SocketAddrUnix::new(dir.join("2/s")).unwrap()).unwrap();
        listen(&peer, 4096).unwrap();
        host.own("networks/x/2/s", false);
        for dir in ["networks", "networks/x", "networks/x/1", "networks/x/2"] {
            host.own(dir, true);
        }
        Self { dir, peer }
    }

    /// What the program needs to know, with where it is to look.
    fn words(&self, host: &Host, at: &Path) -> Vec<String> {
        [host.words(), vec![format!("member={}", at.display())]].concat()
    }

    /// Whether anybody has connected to the second member since this was asked last.
    fn has_heard(&self) -> bool {
        let taken = std::iter::from_fn(|| accept_with(&self.peer, SocketFlags::CLOEXEC).ok());
        taken.count() > 0
    }

    /// Runs the program as the VMM of the first member, with `nft`. `is_shown` when its private root has the directory.
    fn supervised(&self, host: &Host, nft: &Path, driver: &str, without: &[&str], is_shown: bool) -> Found {
        let at = if is_shown { Path::new(SHOWN) } else { &self.dir };
        let dir = host.make_vm(without, &self.words(host, at), None);
        let mut plan: Value = serde_json::from_slice(&fs::read(dir.join("plan.json")).unwrap()).unwrap();
        plan["machine"]["driver"] = driver.into();
        plan["net"]["nft"] = nft.to_str().into();
        plan["net"]["member"] = json!({ "network": "x", "number": 1, "dir": self.dir });
        if is_shown {
            plan["binds"].as_array_mut().unwrap().push(json!({ "host": self.dir, "inside": SHOWN }));
        }
        fs::write(dir.join("plan.json"), plan.to_string()).unwrap();
        let place = self.dir.join("1/s");
        let _ = fs::remove_file(&place);
        host.supervise(&dir);
        assert!(
            place.exists(),
            "the vm was in the network: {}",
            fs::read_to_string(dir.join("end.json")).unwrap()
        );
        results(&fs::read_to_string(dir.join("console.log")).unwrap())
    }
}

/// By which supervisors hand each other packets: whoever finds them can forge those of any vm of the network.
#[test]
fn no_vmm_finds_the_sockets_of_its_network() {
    let name = "no_vmm_finds_the_sockets_of_its_network";
    let nft = ["/usr/sbin/nft", "/usr/bin/nft"].map(Path::new).into_iter().find(|nft| nft.exists());
    let Some(nft) = nft else {
        println!("skipped: {name}: `nft` is not installed");
        return;
    };
    if fs::File::open("/dev/net/tun").is_err() {
        println!("skipped: {name}: `/dev/net/tun` can't be opened");
        return;
    }
    let Some(host) = Host::prepare(name) else { return };
    let network = Network::create(&host);
    let supervised =
        |driver, without: &[&str], is_shown| network.supervised(&host, nft, driver, without, is_shown);
    for driver in ["qemu", "firecracker"] {
        refuse(&supervised(driver, &[], false), &TO_MEMBERS);
        assert!(!network.has_heard(), "{driver}");
    }

    // An ordinary process of the same user does find them.
    expect(&host.directly(&network.words(&host, &network.dir)), "ok", &["member"]);
    assert!(network.has_heard());
    // Firecracker's filter lets it connect. So it is the private root that keeps back the way from the top ...
    let found = supervised("firecracker", &[], true);
    expect(&found, "ok", &["member"]);
    refuse(&found, &["member-process"]);
    assert!(network.has_heard());
    // ... and Landlock the one by the directory that the supervisor has open.
    let found = supervised("firecracker", &["landlock"], false);
    expect(&found, "ok", &["member-process"]);
    refuse(&found, &["member", "member-own"]);
    assert!(network.has_heard());
    // QEMU's lets it connect to nothing, whatever it sees.
    refuse(&supervised("qemu", &["landlock"], true), &TO_MEMBERS);
    assert!(!network.has_heard());
}

#[test]
fn without_namespaces_and_root_the_outside_is_there() {
    let Some(host) = Host::prepare("without_namespaces_and_root_the_outside_is_there") else { return };
    let found = host.directly(&host.words());
    expect(&found, "ok", &OUTSIDE);
    assert_ne!(found["inherited"], "0");
}

#[test]
fn without_all_layers_namespaces_and_root_still_hold() {
    let Some(host) = Host::prepare("without_all_layers_namespaces_and_root_still_hold") else { return };
    let found = host.supervised(&LAYERS, &host.words());
    refuse(&found, &OUTSIDE);
    refuse(&found, &["root-write", "usr-write", "mount"]);
    assert_eq!(found["bounding"], "1", "{found:?}");
    assert!(number(&found, "forks") > 1000 && number(&found, "threads") > 1000, "{found:?}");
}

#[test]
fn each_layer_prevents_something() {
    let Some(host) = Host::prepare("each_layer_prevents_something") else { return };
    for driver in ["qemu", "firecracker"] {
        each_layer_of_a_vmm_prevents_something(&host, driver);
    }
}

fn each_layer_of_a_vmm_prevents_something(host: &Host, driver: &str) {
    let words = host.words();
    let supervised = |without: &[&str]| host.supervised_as(driver, without, &words);
    let found = supervised(&["capabilities"]);
    expect(&found, "1", &["bounding"]);

    let found = supervised(&["landlock"]);
    expect(&found, "ok", &["plan", "plan-write", "console", "new-file", "processes"]);

    let found = supervised(&["seccomp"]);
    expect(&found, "ok", &["clone3", "keyctl", "memfd", "shared-memory", "chmod", "trace-me"]);
    expect(&found, "ok", &["supervisor-socket", "inet", "inet6", "netlink", "unshare-user", "clone-user"]);
    // The others of these a system may refuse an ordinary user by itself.
    for what in ["handles", "setns", "vsock"] {
        assert_ne!(found[what], "EPERM", "{what}");
    }
    // Landlock alone keeps these back, where Yama or a missing capability does not.
    refuse(&found, &["kill-supervisor", "ptrace-supervisor", "mount", "mount-in-user-namespace"]);
    // Processes are limited all the same.
    assert!((100..600).contains(&number(&found, "forks")), "{found:?}");

    let found = supervised(&["seccomp", "landlock"]);
    expect(&found, "ok", &["kill-supervisor", "mount-in-user-namespace"]);

    let found = supervised(&["limits"]);
    expect(&found, "ok", &["grow-disk", "memory"]);
    assert!(number(&found, "threads") > 1000, "{found:?}");
}

#[test]
fn the_supervisor_has_given_up_its_rights() {
    let Some(host) = Host::prepare("the_supervisor_has_given_up_its_rights") else { return };
    let words = [host.words(), vec!["stay=1".to_owned()]].concat();
    let run = |without: &[&str], look: &dyn Fn(u32)| {
        let dir = host.make_vm(without, &words, None);
        host.start(&dir);
        let console = || fs::read_to_string(dir.join("console.log")).unwrap_or_default();
        wait_for("the VMM's tries", || console().contains("done=ok"));
        let [pid] = supervisors(&dir)[..] else { panic!("{:?}", supervisors(&dir)) };
        look(pid);
        let process = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
        rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
        wait_for("the vm to go", || supervisors(&dir).is_empty());
    };
    // The thread in the vm's network may configure that, and nothing else.
    let (none, net) = ("0000000000000000", "0000000000001500");
    run(&[], &|pid| {
        assert_eq!(threads(pid, "CapPrm"), [none, net]);
        assert_eq!(threads(pid, "CapBnd"), [none, net]);
        assert_eq!(threads(pid, "Seccomp:"), ["2", "2"]);
        assert_eq!(threads(pid, "NoNewPrivs"), ["1", "1"]);
    });
    run(&LAYERS, &|pid| {
        assert!(threads(pid, "CapPrm").iter().all(|set| *set != none && *set != net));
        assert_eq!(threads(pid, "Seccomp:"), ["0", "0"]);
    });
}

/// What all of it adds to a vm's start: the same start with and without the layers, of a VMM that ends at once.
#[test]
fn the_layers_cost_a_start_little() {
    let Some(host) = Host::prepare("the_layers_cost_a_start_little") else { return };
    let took_ms = |without: &[&str]| {
        let dir = host.make_vm(without, &["leave=1".to_owned()], None);
        let begun = Instant::now();
        host.supervise(&dir);
        begun.elapsed().as_secs_f64() * 1000.0
    };
    let mut times: Vec<(f64, f64)> = (0..COST_PAIRS).map(|_| (took_ms(&[]), took_ms(&LAYERS))).collect();
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let added = median(times.iter().map(|(with, without)| with - without).collect());
    let with = median(times.drain(..).map(|(with, _)| with).collect());
    println!("the layers add {added:.1} ms; a vm without a VMM takes {with:.1} ms from its start to its end");
    assert!(added <= COST_MAX_MS, "{added} ms");
}

/// Not about confinement, but the program can be this VMM as well.
#[test]
fn a_kernel_that_panics_before_anything_was_written_is_started_again() {
    let name = "a_kernel_that_panics_before_anything_was_written_is_started_again";
    let Some(host) = Host::prepare(name) else { return };
    let dir = host.make_vm(&[], &["give-up=1".to_owned()], None);
    host.supervise(&dir);
    let end: serde_json::Value = serde_json::from_slice(&fs::read(dir.join("end.json")).unwrap()).unwrap();
    assert_eq!(end["reason"], "failed", "{end}");
    assert_eq!(end["detail"], "[    2.170603] Kernel panic - not syncing: start 4");
    assert_eq!(fs::read(dir.join("disk.raw")).unwrap()[0], 4, "starts");
}

#[test]
fn a_vm_of_root_is_nobodys() {
    let name = "a_vm_of_root_is_nobodys";
    if !getuid().is_root() {
        println!("skipped: {name}: needs root");
        return;
    }
    let Some(host) = Host::with_uid(name, None) else { return };
    let run = |without: &[&str]| {
        let dir = host.make_vm(without, &host.words(), Some(VM_UID));
        host.supervise(&dir);
        results(&fs::read_to_string(dir.join("console.log")).unwrap())
    };
    let found = run(&[]);
    assert_eq!(found["uid"], VM_UID.to_string());
    expect(&found, "0", &["capabilities", "bounding"]);
    refuse(&found, &OUTSIDE);
    refuse(&found, &["shadow"]);
    // Root's file in its own directory: only the uid is in the way here.
    let found = run(&["landlock"]);
    expect(&found, "ok", &["own-disk", "console"]);
    expect(&found, "EACCES", &["plan-write"]);
}
