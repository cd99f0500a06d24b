//! What is printed, where, and the status.

use crate::support::{Bench, plan, read_until, terminal, view};
use banger_wire::daemon::{
    Available, CachePruned, ConfigView, Event, NetMode, Outcome, Pruned, Request, Workspace, WorkspaceAsked,
    WorkspaceMode,
};
use banger_wire::doctor::{Check, SetupItem, SetupState, Verdict};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::TerminalSize;
use banger_wire::frame::{DATA_LEN_MAX, Frame};
use insta::assert_snapshot;
use std::io::{BufRead as _, BufReader, Write as _};

fn now() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(now.as_secs()).unwrap()
}

#[test]
fn help_leads_with_the_usual_case() {
    let bench = Bench::new();
    let help = bench.run(["--help"]);
    let head: String = help.lines().take(3).map(|line| format!("{line}\n")).collect();
    assert_snapshot!(head, @r"
    status 0
    --- stdout
    banger run                     a shell in a new vm
    ");
    assert!(bench.run(["vm", "run", "--help"]).contains("banger vm run --rm -- make test"));
    assert!(!bench.run(["daemon", "--help"]).contains("detach"));
}

#[test]
fn an_error_tells_what_why_and_what_next() {
    let bench = Bench::new();
    bench.daemon(|_, peer| {
        let mut error = WireError::new(ErrorCode::Failed, "could not start vm `web`")
            .hinted("remove it with `ip link delete bgr-7f3a`, or see `banger doctor`");
        error.causes = vec!["create tap `bgr-7f3a`: an interface of that name exists".to_owned()];
        error.causes.push("said \u{1b}[31mguest\nerror: not ours".to_owned());
        error.op = Some("5f3c91".to_owned());
        peer.fail(error);
    });
    assert_snapshot!(bench.run(["vm", "start", "web"]), @r"
    status 1
    --- stderr
    error: could not start vm `web`
      caused by: create tap `bgr-7f3a`: an interface of that name exists
      caused by: said \x1b[31mguest
        error: not ours
    hint: remove it with `ip link delete bgr-7f3a`, or see `banger doctor`
    (op 5f3c91)
    ");
}

#[test]
fn what_is_damaged_and_what_is_not_needed() {
    let bench = Bench::new();
    bench.daemon(|request, peer| match request {
        Request::ImageVerify { image: None } => {
            let check = |name: &str, verdict, detail: &str, hint: Option<&str>| Check {
                name: name.to_owned(),
                verdict,
                detail: detail.to_owned(),
                hint: hint.map(str::to_owned),
            };
            peer.done(Outcome::Verified(vec![
                check("image a", Verdict::Pass, "ext4, sha256 00", None),
                check("image \u{1b}b", Verdict::Fail, "its sha256 is 01", Some("delete it")),
            ]));
        }
        Request::ImageCachePrune { dry_run, all } => {
            assert!(!all);
            let (files, freed_bytes) = if dry_run { (2, 3 << 20) } else { (1, 1 << 20) };
            peer.done(Outcome::CachePruned(CachePruned { files, freed_bytes, kept_bytes: 0 }));
        }
        Request::KernelAvailable => peer.done(Outcome::Available(vec![Available {
            name: "generic-6.12".to_owned(),
            what: "Debian's cloud kernel".to_owned(),
            present: true,
        }])),
        other => panic!("{other:?}"),
    });
    assert_snapshot!(bench.run(["image", "verify"]), @r"
    status 1
    --- stdout
    ok   image a: ext4, sha256 00
    FAIL image \x1bb: its sha256 is 01
         delete it
    ");
    assert_snapshot!(bench.run(["image", "cache", "prune", "--dry-run"]), @r"
    status 0
    --- stdout
    would remove 2 files and free 3.0 MiB; 0 B stay
    ");
    assert_snapshot!(bench.run(["image", "cache", "prune"]), @r"
    status 0
    --- stdout
    removed 1 file, freed 1.0 MiB; 0 B stay
    ");
    assert_snapshot!(bench.run(["kernel", "list", "--available"]), @r"
    status 0
    --- stdout
    NAME          WHAT                   HERE
    generic-6.12  Debian's cloud kernel  yes
    ");
    for args in [
        &["image", "register", "--name", "a", "--rootfs", "r", "--modules", "m"][..],
        &["image", "register", "--name", "a", "--rootfs", "r", "--kernel-ref", "k", "--kernel", "f"],
        &["kernel", "import", "a"],
        &["kernel", "import", "a", "--from", "d", "--vmlinux", "f"],
    ] {
        assert!(bench.run(args).starts_with("status 2\n"), "{args:?}");
    }
}

#[test]
fn what_contradicts_itself_is_refused_before_anything_is_asked() {
    let bench = Bench::new();
    bench.daemon(|request, _| panic!("{request:?}"));
    assert_snapshot!(bench.run(["vm", "run", "-d", "--rm"]), @r"
    status 2
    --- stderr
    error: `-d` and `--rm` contradict each other: nothing would ever end the vm
    hint: leave one of them out
    ");
    assert_snapshot!(bench.run(["run", "-d", "--", "true"]), @r"
    status 125
    --- stderr
    error: `-d` makes a vm and returns, so it takes no command
    hint: start it with `banger vm run -d`, then use `banger vm exec`
    ");
    assert_snapshot!(bench.run(["run", "uname"]), @r"
    status 125
    --- stderr
    error: there is no directory `uname`
    hint: to run a command, put it after `--`: `banger vm run -- uname`
    ");
    assert_snapshot!(bench.run(["vm", "create", "/"]), @r"
    status 2
    --- stderr
    error: `/` is not in a git checkout
    hint: to copy all that is in the directory, use `--mode full_copy`
    ");
    assert!(bench.requests().is_empty());
}

#[test]
fn usage_errors_have_a_status_of_their_own_beside_a_commands() {
    let bench = Bench::new();
    for (status, args) in [
        (125, &["vm", "run", "--bogus", "--", "true"][..]),
        (125, &["exec"]),
        (125, &["run", "--name", "Not-A-Name"]),
        (2, &["vm", "list", "--bogus"]),
        (2, &["run", "-d", "--memory", "much"]),
        (2, &["frobnicate"]),
    ] {
        let output = bench.command(args).output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{args:?}");
        assert!(output.stderr.starts_with(b"error: "), "{args:?}: {output:?}");
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}

#[test]
fn vms_are_listed() {
    let bench = Bench::new();
    bench.daemon(|request, peer| {
        assert_eq!(request, Request::VmList);
        let mut hostile = view("web", "running");
        hostile.image = "i\u{1b}]0;owned\u{7}".to_owned();
        hostile.created = now() - 200;
        hostile.address = Some("127.77.1.2".parse().unwrap());
        hostile.workspace = Some(Workspace {
            source: "/src/\u{1b}[1m".into(),
            path: "/root/repo".into(),
            below: "".into(),
            mode: WorkspaceMode::default(),
            head: None,
            placed: 0,
            asked: WorkspaceAsked::default(),
        });
        let mut stopped = view("fuzzy-otter", "stopped");
        stopped.created = now() - 400_000;
        peer.done(Outcome::Vms(vec![hostile, stopped]));
    });
    assert_snapshot!(bench.run(["ps"]), @r"
    status 0
    --- stdout
    ID            NAME         STATE    IMAGE              ADDRESS     VCPU  MEM      DISK           WORKSPACE     CREATED
    0123456789ab  web          running  i\x1b]0;owned\x07  127.77.1.2  1     512 MiB  5.0 MiB/8 GiB  /src/\x1b[1m  3 min ago
    0123456789ab  fuzzy-otter  stopped  debian-bookworm    -           1     512 MiB  5.0 MiB/8 GiB  -             4 days ago
    ");
    assert_snapshot!(bench.run(["vm", "list", "-q"]), @r"
    status 0
    --- stdout
    0123456789ab
    0123456789ab
    ");
    let json = bench.command(["vm", "list", "--json"]).output().unwrap().stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json[0]["image"], "i\u{1b}]0;owned\u{7}");
    assert_eq!(json[1]["memory"], 512);
}

#[test]
fn a_vm_is_shown_whole() {
    let bench = Bench::new();
    bench.daemon(|_, peer| {
        let mut vm = view("web", "running");
        vm.vmm_pid = Some(42);
        vm.cmdline = Some("console=ttyS0 quiet".to_owned());
        vm.net = NetMode::None;
        vm.network_warning = Some("there is no `pasta`".to_owned());
        vm.disk = Some("/state/vms/0123456789ab/disk.raw".to_owned());
        vm.console = Some("/state/vms/0123456789ab/console.log".to_owned());
        peer.done(Outcome::Vm(vm));
    });
    let shown = bench.run(["vm", "show", "web"]);
    let without_age: Vec<&str> = shown.lines().map(|line| line.split(" (").next().unwrap()).collect();
    assert_snapshot!(without_age.join("\n"), @r"
    status 0
    --- stdout
    id:           0123456789ab
    name:         web
    state:        running
    image:        debian-bookworm
    kernel:       generic-6.12
    vcpu:         1
    memory:       512 MiB
    disk:         5.0 MiB of 8 GiB
    network:      none: there is no `pasta`
    vmm:          qemu, software emulation, process 42
    created:      2023-11-14 22:13:20 +00:00
    directory:    /state/vms/0123456789ab
    socket:       /state/vms/0123456789ab/vm.sock
    disk file:    /state/vms/0123456789ab/disk.raw
    console log:  /state/vms/0123456789ab/console.log
    command line: console=ttyS0 quiet
    ");
}

#[test]
fn pruning_is_not_done_unasked() {
    let bench = Bench::new();
    bench.daemon(|request, peer| {
        assert_eq!(request, Request::VmPrune { dry_run: false });
        peer.done(Outcome::Pruned(Pruned { vms: vec![view("web", "stopped")], freed_bytes: 3 << 30 }));
    });
    assert_snapshot!(bench.run(["vm", "prune"]), @r"
    status 2
    --- stderr
    error: pruning deletes disks, and nobody can be asked here
    hint: use `banger vm prune --force`
    ");
    assert!(bench.requests().is_empty());
    assert_snapshot!(bench.run(["vm", "prune", "-f"]), @r"
    status 0
    --- stdout
    deleted web
    freed 3.0 GiB
    ");
}

#[test]
fn pruning_asks_and_takes_no_for_an_answer() {
    let bench = Bench::new();
    bench.daemon(|request, peer| {
        assert!(matches!(request, Request::VmPrune { .. }));
        peer.done(Outcome::Pruned(Pruned { vms: vec![view("web", "stopped")], freed_bytes: 3 << 30 }));
    });
    for (answer, status, requests) in [("\n", 1, 1), ("y\n", 0, 3)] {
        let (mut master, slave) = terminal(TerminalSize { rows: 24, cols: 200 });
        let mut command = bench.command(["vm", "prune"]);
        command.stdin(slave.try_clone().unwrap()).stderr(slave);
        let child = command.spawn().unwrap();
        let asked = read_until(&mut master, "[y/N] ");
        assert!(asked.contains("web") && asked.contains("delete this vm and free 3.0 GiB?"), "{asked}");
        master.write_all(answer.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{answer:?}");
        assert_eq!(output.stdout.is_empty(), status == 1);
        assert_eq!(bench.requests().len(), requests);
    }
}

#[test]
fn console_bytes_are_harmless_unless_raw() {
    let bench = Bench::new();
    bench.daemon(|_, peer| {
        for part in [&b"boot\r\n\t\x1b[32mok gr\xc3"[..], b"\xbc\xc3\x9fe\xff\r", b"\nlogin: "] {
            peer.send(&Frame::data(0, 1, part.to_vec()));
        }
        peer.send(&Frame::eof(0, 1));
        peer.done(Outcome::Done);
    });
    let escaped = bench.command(["vm", "logs", "web"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&escaped.stdout), "boot\n\t\\x1b[32mok grüße\\xff\nlogin: ");
    let raw = bench.command(["vm", "logs", "--raw", "-n", "9", "web"]).output().unwrap();
    assert_eq!(raw.stdout, b"boot\r\n\t\x1b[32mok gr\xc3\xbc\xc3\x9fe\xff\r\nlogin: ");
    let asked = Request::VmLogs { vm: "web".to_owned(), lines: Some(9), follow: false };
    assert_eq!(bench.requests()[1], asked);
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let bench = Bench::new();
    bench.daemon(|_, peer| {
        loop {
            peer.send(&Frame::data(0, 1, vec![b'\n'; DATA_LEN_MAX]));
            if peer.next().is_none() {
                break;
            }
        }
    });
    let mut child = bench.command(["vm", "logs", "-f", "web"]).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(141), &b""[..]));
}

#[test]
fn a_dry_run_shows_the_plan() {
    let bench = Bench::new();
    bench.daemon(|request, peer| {
        assert!(matches!(request, Request::VmPlan(_)));
        peer.done(Outcome::Plan(plan()));
    });
    assert_snapshot!(bench.run(["run", "--dry-run"]), @r"
    status 0
    --- stdout
    vm fuzzy-otter: 1 vcpu, 512 MiB, 8 GiB disk, debian-bookworm, qemu (software emulation)
    there is no `/dev/kvm`, so vms run in software emulation
    would pull image debian-bookworm
    ");
}

#[test]
fn doctor_prints_each_check_and_fails_with_one() {
    let bench = Bench::new();
    bench.daemon(|_, peer| {
        for (name, verdict, hint) in [
            ("qemu", Verdict::Pass, None),
            ("kvm", Verdict::Warn, None),
            ("pasta", Verdict::Fail, Some("sudo apt install passt")),
        ] {
            peer.say(&Event::Check(Check {
                name: name.to_owned(),
                verdict,
                detail: "what was found".to_owned(),
                hint: hint.map(str::to_owned),
            }));
        }
        peer.done(Outcome::Done);
    });
    assert_snapshot!(bench.run(["doctor"]), @r"
    status 1
    --- stdout
    pass  daemon: build [BUILD], as `banger`
    pass  ssh include: not installed; `banger ssh-config --install` makes `NAME.vm` a host
    pass  qemu: what was found
    warn  kvm: what was found
    FAIL  pasta: what was found
          hint: sudo apt install passt
    ");
    let json = bench.command(["doctor", "--json"]).output().unwrap();
    let checks: Vec<Check> = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!((json.status.code(), checks.len()), (Some(1), 5));
}

#[test]
fn doctor_says_when_names_of_vms_are_no_hosts_any_more() {
    let bench = Bench::new();
    bench.daemon(|request, peer| match request {
        Request::ConfigShow => {
            let config = ConfigView { path: None, exists: false, values: Vec::new() };
            peer.done(Outcome::Config(config));
        }
        _ => peer.done(Outcome::Done),
    });
    std::fs::create_dir(bench.path().join(".ssh")).unwrap();
    let lines = "# >>> banger >>>\nInclude \"/elsewhere/ssh/config\"\n# <<< banger <<<\n";
    std::fs::write(bench.path().join(".ssh/config"), lines).unwrap();
    assert_snapshot!(bench.run(["doctor"]), @r"
    status 0
    --- stdout
    pass  daemon: build [BUILD], as `banger`
    warn  ssh include: `NAME.vm` may be no host for `ssh`: banger's lines in `[DIR]/.ssh/config` do not include `[DIR]/state/ssh/config`
          hint: banger ssh-config --install
    ");
    let json = bench.command(["doctor", "--json"]).output().unwrap();
    let checks: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(checks[1]["name"], "ssh include");
    assert_eq!(
        (&checks[1]["verdict"], &checks[1]["hint"]),
        (&"warn".into(), &"banger ssh-config --install".into())
    );
}

#[test]
fn doctor_lists_what_is_left_for_root_after_mending() {
    let bench = Bench::new();
    bench.daemon(|request, peer| {
        if request == (Request::Doctor { fix: true }) {
            for hint in ["sudo modprobe tun", "banger setup", "sudo modprobe tun"] {
                peer.say(&Event::Check(Check {
                    name: "check".to_owned(),
                    verdict: Verdict::Warn,
                    detail: "what was found".to_owned(),
                    hint: Some(hint.to_owned()),
                }));
            }
        }
        peer.done(Outcome::Done);
    });
    let said = bench.run(["doctor", "--fix"]);
    let end = said.split_once("left to do").unwrap().1;
    assert_snapshot!(end, @r"
    , with root's rights:
      sudo modprobe tun
    ");
}

#[test]
fn setup_says_what_became_of_each_thing() {
    let bench = Bench::new();
    bench.daemon(|request, peer| {
        let url = Some("http://mirror.example".to_owned());
        assert_eq!(request, Request::Setup { dry_run: true, firecracker_url: url });
        let item = |name: &str, state, hint: Option<&str>| SetupItem {
            name: name.to_owned(),
            state,
            detail: "detail".to_owned(),
            hint: hint.map(str::to_owned),
        };
        peer.done(Outcome::Setup(vec![
            item("qemu", SetupState::ByHand, Some("sudo apt-get install qemu-system-x86")),
            item("firecracker", SetupState::WouldFetch, None),
            item("kernel", SetupState::Present, None),
        ]));
    });
    assert_snapshot!(bench.run(["setup", "--dry-run", "--firecracker-url", "http://mirror.example"]), @r"
    status 1
    --- stdout
    BY HAND  qemu: detail
          hint: sudo apt-get install qemu-system-x86
    would fetch  firecracker: detail
    there  kernel: detail
    ");
}

#[test]
fn a_daemon_that_hangs_up_is_reported() {
    let bench = Bench::new();
    bench.daemon(|_, peer| peer.say(&Event::Step { label: "boot".to_owned() }));
    assert_snapshot!(bench.run(["image", "pull", "debian-bookworm"]), @r"
    status 1
    --- stderr
    error: bangerd closed the connection before it was done
    hint: see `banger daemon logs`
    ");
}

#[test]
fn a_signal_cancels_what_the_daemon_does() {
    let bench = Bench::new();
    let (began, begin) = std::sync::mpsc::channel();
    let (ended, end) = std::sync::mpsc::channel();
    bench.daemon(move |_, peer| {
        began.send(()).unwrap();
        assert!(peer.next().is_none());
        ended.send(()).unwrap();
    });
    let child = bench.command(["run", "--", "true"]).spawn().unwrap();
    begin.recv().unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_snapshot!(bench.show(&child.wait_with_output().unwrap()), @"status 130");
    end.recv().unwrap();
}
