//! Commands on vms that are there: several at once, changes, what is used, the console.

use crate::support::{Bench, Peer, read_until, terminal, view};
use banger_wire::daemon::{Event, NetMode, Outcome, Request};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::{STDIN, STDOUT, SessionControl, TerminalSize};
use banger_wire::frame::{Frame, Kind};
use banger_wire::net::{MemberView, NetRules, NetView};
use banger_wire::size::Mebibytes;
use banger_wire::stats::VmStats;
use banger_wire::vm::{VmEvent, VmRequest};
use insta::assert_snapshot;
use std::io::Write as _;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};

#[test]
fn several_vms_are_each_reported() {
    let bench = Bench::new();
    bench.daemon(|request, peer| match request {
        Request::VmShow { vm } if vm == "gone" => {
            peer.fail(WireError::new(ErrorCode::NotFound, "no vm `gone`"));
        }
        // The first two are the same one.
        Request::VmShow { vm } if vm == "web" || vm == "0123" => {
            peer.done(Outcome::Vm(view("web", "running")))
        }
        Request::VmShow { vm } => {
            let mut other = view(&vm, "running");
            other.id = "ffffffffffff".parse().unwrap();
            peer.done(Outcome::Vm(other));
        }
        Request::VmStop { vm, grace_ms: 5000 } if vm == "0123456789ab" => peer.done(Outcome::Done),
        Request::VmStop { .. } => peer.fail(WireError::new(ErrorCode::Failed, "connection failed")),
        other => panic!("{other:?}"),
    });
    let words = ["vm", "stop", "--timeout", "5s", "web", "gone", "web", "0123", "stuck"];
    let output = bench.command(words).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "stopped web\n");
    assert_snapshot!(String::from_utf8_lossy(&output.stderr), @r"
    error: no vm `gone`
    error: could not stop vm `stuck`
      caused by: connection failed
    ");
    let stops = bench.requests().into_iter().filter(|request| matches!(request, Request::VmStop { .. }));
    assert_eq!(stops.count(), 2);
}

#[test]
fn a_warning_of_one_of_several_names_it() {
    let bench = Bench::new();
    bench.daemon(|request, peer| match request {
        Request::VmShow { vm } => {
            let mut shown = view(&vm, "stopped");
            shown.id = if vm == "one" { "000000000001" } else { "000000000002" }.parse().unwrap();
            peer.done(Outcome::Vm(shown));
        }
        Request::VmDelete { vm, force: false } => {
            if vm == "000000000001" {
                peer.say(&Event::Warning { text: "odd \u{1b}[31m".to_owned() });
            }
            peer.done(Outcome::Done);
        }
        other => panic!("{other:?}"),
    });
    let output = bench.command(["vm", "delete", "one", "two"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "warning: one: odd \\x1b[31m\n");
}

#[test]
fn killing_is_at_once_or_by_signal() {
    let bench = Bench::new();
    bench.daemon(|_, peer| peer.done(Outcome::Done));
    assert_snapshot!(bench.run(["vm", "kill", "web"]), @r"
    status 0
    --- stdout
    killed web
    ");
    assert_snapshot!(bench.run(["vm", "kill", "--signal", "SIGUSR1", "web"]), @r"
    status 0
    --- stdout
    signalled web
    ");
    assert_snapshot!(bench.run(["vm", "kill", "-s", "RTMIN", "web"]), @r"
    status 2
    --- stderr
    error: invalid value 'RTMIN' for '--signal <SIGNAL>': `RTMIN` is no signal: use a name such as TERM, or a number from 1 to 31

    For more information, try '--help'.
    ");
    let vm = || "web".to_owned();
    assert_eq!(bench.requests(), [Request::VmKill { vm: vm() }, Request::VmSignal { vm: vm(), signal: 10 }]);
}

#[test]
fn what_is_set_is_said() {
    let bench = Bench::new();
    bench.daemon(|request, peer| {
        let asked = Request::VmSet {
            vm: "web".to_owned(),
            vcpu: None,
            memory: None,
            disk_size: Some(Mebibytes(16 << 10)),
            net: Some(NetMode::None),
            net_allow: None,
            network: None,
        };
        assert_eq!(request, asked);
        let mut vm = view("web", "stopped");
        (vm.disk_size, vm.net) = (Mebibytes(16 << 10), NetMode::None);
        peer.done(Outcome::Vm(vm));
    });
    assert_snapshot!(bench.run(["vm", "set", "--disk-size", "16G", "--net", "none", "web"]), @r"
    status 0
    --- stdout
    web has 1 vcpu, 512 MiB memory, 16 GiB disk and network none from its next start
    ");
    assert_snapshot!(bench.run(["vm", "set", "web"]), @r"
    status 2
    --- stderr
    error: there is nothing to change
    hint: use `--vcpu`, `--memory`, `--disk-size`, `--net` or `--network`
    ");
}

#[test]
fn the_network_of_a_running_vm_is_said_to_be_what_it_is_and_will_be() {
    let bench = Bench::new();
    bench.daemon(|request, peer| match request {
        Request::VmSet { vcpu: None, memory: None, disk_size: None, net, net_allow, .. } => {
            let expected = (net == Some(NetMode::Allow)).then(|| vec!["a.example:443".parse().unwrap()]);
            assert_eq!(net_allow, expected);
            let mut vm = view("web", "running");
            vm.net = net.unwrap();
            peer.done(Outcome::Vm(vm));
        }
        Request::VmNetShow { .. } => {
            let (next_mode, rules) = (Some(NetMode::Full), NetRules::default());
            let open = Vec::new();
            peer.done(Outcome::Net(NetView { mode: NetMode::Allow, next_mode, rules, live: true, open }));
        }
        other => panic!("{other:?}"),
    });
    assert_snapshot!(bench.run(["vm", "set", "--net", "full", "web"]), @r"
    status 0
    --- stdout
    web has network full from its next start, and allow until then
    ");
    let json =
        bench.command(["vm", "set", "--json", "--net", "allow=a.example:443", "web"]).output().unwrap();
    let vm: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(vm["net"], "allow");
    assert_snapshot!(bench.run(["vm", "set", "--net", "lan", "web"]), @r"
    status 2
    --- stderr
    error: invalid value 'lan' for '--net <NET>': use `internet`, `none`, `full`, or `allow=HOST[:PORT],…`

    For more information, try '--help'.
    ");
}

#[test]
fn the_network_of_vms_is_said_to_be_what_it_is_and_will_be() {
    let bench = Bench::new();
    bench.daemon(|request, peer| match request {
        Request::VmSet {
            vm: name, vcpu: None, memory: None, disk_size: None, net: None, network, ..
        } => {
            let mut vm = view(&name, if name == "web" { "running" } else { "stopped" });
            let member = |name: &str| MemberView {
                name: name.parse().unwrap(),
                address: Some([10, 231, 128, 7].into()),
                warning: None,
            };
            match (name.as_str(), network.unwrap()) {
                ("web", network) if network.to_string() == "shop" => vm.network = Some(member("shop")),
                ("web", network) => (vm.network, vm.next_network) = (Some(member("shop")), Some(network)),
                ("new", network) => vm.next_network = Some(network),
                (_, network) => vm.network = network.name().map(|name| member(name.as_str())),
            }
            peer.done(Outcome::Vm(vm));
        }
        other => panic!("{other:?}"),
    });
    let set = |vm, network| {
        let output = bench.command(["vm", "set", "--network", network, vm]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(
        set("web", "lab"),
        "web is in network lab from its next start, and in network shop until then\n"
    );
    assert_eq!(
        set("web", "none"),
        "web is in no network of vms from its next start, and in network shop until then\n"
    );
    assert_eq!(set("web", "shop"), "web is in network shop\n");
    assert_eq!(
        set("new", "lab"),
        "new is in network lab from its next start, and in no network of vms until then\n"
    );
    assert_eq!(set("db", "lab"), "db is in network lab from its next start\n");
    assert_eq!(set("db", "none"), "db is in no network of vms from its next start\n");
    assert_snapshot!(bench.run(["vm", "set", "--network", "Lab", "web"]), @r"
    status 2
    --- stderr
    error: invalid value 'Lab' for '--network <NAME>': `Lab` is not a valid network name: use 1 to 63 lower-case letters, digits and hyphens, starting and ending with a letter or digit

    For more information, try '--help'.
    ");
}

/// The `number`th reading of a vm that is half busy.
fn reading(vm: &str, number: u64) -> VmStats {
    serde_json::from_value(serde_json::json!({
        "id": if vm == "idle" { "000000000000" } else { "0123456789ab" }, "name": vm,
        "state": if vm == "idle" { "stopped" } else { "running" }, "vcpu": 1,
        "taken_ms": 1000 * number,
        "guest": (vm != "idle").then(|| serde_json::json!({
            "uptime_ms": 1000 * number, "cpu_ms": 500 * number, "load_hundredths": [52, 10, 5],
            "memory_bytes": 512 << 20, "memory_used_bytes": 100 << 20, "disk_read_bytes": 3 << 20,
            "disk_written_bytes": 2048, "root_bytes": 8_u64 << 30, "root_used_bytes": 1 << 20,
            "net_received_bytes": 10, "net_sent_bytes": 20
        })),
        "host": (vm != "idle").then(|| serde_json::json!({
            "pid": 42, "cpu_ms": 750 * number, "memory_bytes": 300 << 20,
            "disk_read_bytes": null,
            "disk_written_bytes": null,
            "net_from_guest_bytes": 20, "net_to_guest_bytes": null
        })),
        "disk_used_bytes": 5 << 20, "disk_size": 8192
    }))
    .unwrap()
}

fn serve_stats(bench: &Bench) {
    let number = AtomicU64::new(0);
    bench.daemon(move |request, peer| match request {
        Request::VmList => peer.done(Outcome::Vms(vec![view("web", "running"), view("idle", "stopped")])),
        Request::VmStats { vm } if vm == "gone" => {
            peer.fail(WireError::new(ErrorCode::NotFound, "no vm `gone`"));
        }
        Request::VmStats { vm } => {
            let name = if vm == "0123456789ab" { "web" } else { &vm };
            peer.done(Outcome::Stats(Box::new(reading(name, number.fetch_add(1, Ordering::Relaxed)))));
        }
        other => panic!("{other:?}"),
    });
}

#[test]
fn what_is_used_is_a_table_or_json() {
    let bench = Bench::new();
    serve_stats(&bench);
    assert_snapshot!(bench.run(["vm", "stats", "web", "idle", "gone"]), @r"
    status 1
    --- stdout
    NAME  STATE    CPU    LOAD  MEM                  READ/WRITTEN     IN/OUT     DISK           VMM CPU  VMM MEM
    idle  stopped  -      -     -                    -                -          5.0 MiB/8 GiB  -        -
    web   running  50.0%  0.52  100.0 MiB/512.0 MiB  3.0 MiB/2.0 KiB  10 B/20 B  5.0 MiB/8 GiB  75.0%    300.0 MiB
    --- stderr
    error: no vm `gone`
    ");
    // Those that run.
    assert_snapshot!(bench.run(["vm", "stats", "--json"]), @r#"
    status 0
    --- stdout
    [
      {
        "id": "0123456789ab",
        "name": "web",
        "state": "running",
        "vcpu": 1,
        "taken_ms": 5000,
        "guest": {
          "uptime_ms": 5000,
          "cpu_ms": 2500,
          "load_hundredths": [
            52,
            10,
            5
          ],
          "memory_bytes": 536870912,
          "memory_used_bytes": 104857600,
          "disk_read_bytes": 3145728,
          "disk_written_bytes": 2048,
          "root_bytes": 8589934592,
          "root_used_bytes": 1048576,
          "net_received_bytes": 10,
          "net_sent_bytes": 20
        },
        "host": {
          "pid": 42,
          "cpu_ms": 3750,
          "memory_bytes": 314572800,
          "disk_read_bytes": null,
          "disk_written_bytes": null,
          "net_from_guest_bytes": 20,
          "net_to_guest_bytes": null
        },
        "disk_used_bytes": 5242880,
        "disk_size": 8192,
        "guest_cpu_percent": 50.0,
        "host_cpu_percent": 75.0
      }
    ]
    "#);
    assert_eq!(bench.run(["vm", "stats", "gone"]), "status 1\n--- stderr\nerror: no vm `gone`\n");
}

#[test]
fn on_a_terminal_what_is_used_is_shown_again_and_again() {
    let bench = Bench::new();
    serve_stats(&bench);
    let (mut master, slave) = terminal(TerminalSize { rows: 24, cols: 28 });
    let mut child = bench.command(["vm", "stats", "web"]).stdout(slave).spawn().unwrap();
    let first = read_until(&mut master, "LOAD  \r\nweb   running  50.0%  0.52  \r\n");
    assert!(!first.contains('\u{1b}'), "{first:?}");
    // Over the picture before, of two lines, none of them longer than the terminal is wide.
    let second = read_until(&mut master, "LOAD  \r\nweb   running  50.0%  0.52  \r\n");
    assert!(second.starts_with("\u{1b}[2A\r\u{1b}[JNAME"), "{second:?}");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// Lets a daemon have one vm, in the given state, whose console is `script`.
fn console(bench: &Bench, state: &'static str, script: impl Fn(&mut Peer) + Send + Sync + 'static) {
    let socket = bench.supervisor(move |request, peer| {
        assert_eq!(request, VmRequest::Console);
        peer.say(&VmEvent::Accepted);
        script(peer);
    });
    bench.daemon(move |request, peer| {
        assert!(matches!(request, Request::VmShow { .. }), "{request:?}");
        let mut vm = view("web", state);
        vm.socket.clone_from(&socket);
        peer.done(Outcome::Vm(vm));
    });
}

/// Takes what is typed, up to the end of a text, and says whether somebody sat there before that.
fn typed(peer: &mut Peer, end: &str) -> (String, Option<TerminalSize>) {
    let (mut text, mut size) = (String::new(), None);
    while !text.ends_with(end) {
        let frame = peer.next().unwrap();
        match (frame.kind, frame.channel) {
            (Kind::Data, STDIN) => text.push_str(std::str::from_utf8(&frame.payload).unwrap()),
            (Kind::Message, _) => match frame.parse().unwrap() {
                SessionControl::Resize(now) => size = Some(now),
                other => panic!("{other:?}"),
            },
            (Kind::Credit, STDOUT) => {}
            _ => panic!("{frame:?}"),
        }
    }
    (text, size)
}

#[test]
fn every_key_is_the_consoles_but_one() {
    let bench = Bench::new();
    console(&bench, "error", |peer| {
        peer.send(&Frame::data(0, STDOUT, b"panic \x1b[1m\r\n".to_vec()));
        let (text, size) = typed(peer, "x");
        assert_eq!((text.as_str(), size), ("\u{3}\u{4}x", Some(TerminalSize { rows: 30, cols: 90 })));
        peer.send(&Frame::data(0, STDOUT, b"got it".to_vec()));
        // Nothing of what comes after the key, and the end.
        assert_eq!(typed(peer, "y").0, "y");
        while let Some(frame) = peer.next() {
            assert_ne!(frame.kind, Kind::Data);
        }
    });
    let (mut master, slave) = terminal(TerminalSize { rows: 30, cols: 90 });
    let mut command = bench.command(["vm", "console", "web"]);
    command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(slave);
    let mut child = command.spawn().unwrap();
    drop(command);
    let shown = read_until(&mut master, "panic \u{1b}[1m\r\n");
    assert_eq!(shown, "attached to the console of `web`; ctrl-] leaves it\r\npanic \u{1b}[1m\r\n");
    // Ctrl-C and Ctrl-D are keys like others.
    master.write_all(b"\x03\x04x").unwrap();
    read_until(&mut master, "got it");
    master.write_all(b"y\x1dz").unwrap();
    assert_eq!(read_until(&mut master, "on\r\n"), "\r\nleft the console of `web`, which goes on\r\n");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_console_without_a_terminal_is_copied() {
    let bench = Bench::new();
    console(&bench, "running", |peer| {
        peer.send(&Frame::data(0, STDOUT, b"\x1b[1mold\r\n".to_vec()));
        let (text, size) = typed(peer, "\n");
        assert_eq!((text.as_str(), size.is_some()), ("reboot\x1d\n", true));
        // The end of what is typed is not the console's.
        peer.send(&Frame::data(0, STDOUT, b"new\r\n".to_vec()));
        peer.exit(0);
    });
    let mut command = bench.command(["vm", "console", "web"]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"reboot\x1d\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(
        (output.stdout.as_slice(), output.stderr.as_slice()),
        (&b"\x1b[1mold\r\nnew\r\n"[..], &b""[..])
    );
}

#[test]
fn whoever_only_looks_at_a_console_gets_text_and_no_shell() {
    let bench = Bench::new();
    console(&bench, "running", |peer| {
        peer.send(&Frame::data(0, STDOUT, b"\x1b[2Jlog\r\n".to_vec()));
        let frame = peer.next().unwrap();
        assert_eq!((frame.kind, frame.parse_credit().unwrap()), (Kind::Credit, 9));
        peer.exit(0);
    });
    let (mut master, slave) = terminal(TerminalSize { rows: 30, cols: 90 });
    let mut child = bench.command(["vm", "console", "web"]).stdout(slave).spawn().unwrap();
    assert_eq!(read_until(&mut master, "log\r\n"), "\\x1b[2Jlog\r\n");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_vm_that_is_down_has_no_console() {
    let bench = Bench::new();
    console(&bench, "stopped", |_| {});
    assert_snapshot!(bench.run(["vm", "console", "web"]), @r"
    status 1
    --- stderr
    error: vm `web` is not running, it is stopped
    hint: start it with `banger vm start web`
    ");
}

#[test]
fn a_vm_of_an_earlier_build_has_no_console() {
    let bench = Bench::new();
    let socket = bench.supervisor(|_, _| {});
    bench.daemon(move |_, peer| {
        let mut vm = view("web", "running");
        vm.socket.clone_from(&socket);
        peer.done(Outcome::Vm(vm));
    });
    assert_snapshot!(bench.run(["vm", "console", "web"]), @r"
    status 1
    --- stderr
    error: vm `web` was started by an earlier banger, which had no console to attach to
    hint: see `banger vm logs web`, or restart it with `banger vm restart web`
    ");
}
