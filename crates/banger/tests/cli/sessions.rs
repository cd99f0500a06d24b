//! Commands in the guest: statuses, arguments, streams, signals, terminals.

use crate::support::{Bench, Peer, accept, echo, plan, read_until, resize, terminal, view};
use banger_wire::bytes::ByteString;
use banger_wire::daemon::{Event, Outcome, Request};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::{ExitStatus, STDERR, STDOUT, SessionControl, SessionEvent, TerminalSize};
use banger_wire::frame::{Frame, Kind};
use banger_wire::vm::{EndReason, VmEnd, VmEvent};
use insta::assert_snapshot;
use std::ffi::OsStr;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::process::Stdio;

/// Returns the next control message of a session.
fn control(peer: &mut Peer) -> SessionControl {
    loop {
        let frame = peer.next().unwrap();
        if frame.kind == Kind::Message {
            return frame.parse().unwrap();
        }
    }
}

#[test]
fn streams_stay_apart_and_nothing_else_is_said() {
    let bench = Bench::new();
    bench.vm(|spec, lease, peer| {
        assert!(!lease && spec.tty.is_none());
        accept(peer);
        peer.send(&Frame::data(0, STDOUT, b"to stdout\n".to_vec()));
        peer.send(&Frame::data(0, STDERR, b"to stderr\n".to_vec()));
        peer.exit(42);
    });
    assert_snapshot!(bench.run(["vm", "run", "--", "sh", "-c", "exit 42"]), @r"
    status 42
    --- stdout
    to stdout
    --- stderr
    to stderr
    ");
    assert_eq!(bench.requests().len(), 1);
}

#[test]
fn verbose_shows_plan_stages_and_time() {
    let bench = Bench::new();
    bench.vm(|_, _, peer| {
        accept(peer);
        peer.exit(0);
    });
    let shown = bench.run(["-v", "run", "--", "true"]);
    let shown = shown.lines().map(|line| if line.starts_with("boot  ") { "boot  [time]" } else { line });
    assert_snapshot!(shown.collect::<Vec<_>>().join("\n"), @r"
    status 0
    --- stderr
    vm fuzzy-otter: 1 vcpu, 512 MiB, 8 GiB disk, debian-bookworm, qemu (software emulation)
    there is no `/dev/kvm`, so vms run in software emulation
    boot  [time]
      kernel     640 ms
    ready in 1.8 s
    ");
}

#[test]
fn statuses_are_the_commands_or_say_that_they_are_not() {
    let failed = |code, text: &str| SessionEvent::Failed(WireError::new(code, text));
    for (event, shown) in [
        (SessionEvent::Exited(ExitStatus::Signal(15)), "status 143\n"),
        (
            failed(ErrorCode::CommandNotFound, "could not start `nope` in the guest"),
            "status 127\n--- stderr\nerror: could not start `nope` in the guest\n",
        ),
        (
            failed(ErrorCode::CommandNotExecutable, "could not start `/etc` in the guest"),
            "status 126\n--- stderr\nerror: could not start `/etc` in the guest\n",
        ),
        (failed(ErrorCode::Failed, "no memory"), "status 125\n--- stderr\nerror: no memory\n"),
    ] {
        let bench = Bench::new();
        bench.vm(move |_, _, peer| {
            peer.say(&VmEvent::Accepted);
            peer.say(&event);
        });
        assert_eq!(bench.run(["exec", "fuzzy-otter", "prog"]), shown);
    }
}

#[test]
fn a_refused_session_and_a_vm_that_ends_are_explained() {
    let bench = Bench::new();
    bench.vm(|_, _, peer| {
        peer.say(&VmEvent::Refused(WireError::new(ErrorCode::Failed, "the guest is going down")));
    });
    assert_snapshot!(bench.run(["exec", "fuzzy-otter", "true"]), @r"
    status 125
    --- stderr
    error: the guest is going down
    ");
    let bench = Bench::new();
    bench.vm(|_, _, peer| {
        accept(peer);
        let detail = "powered off from inside".to_owned();
        peer.say(&VmEvent::Ended(VmEnd { reason: EndReason::PoweredOff, detail }));
    });
    assert_snapshot!(bench.run(["exec", "fuzzy-otter", "poweroff"]), @r"
    status 125
    --- stderr
    error: vm `fuzzy-otter` ended before the command did
      caused by: powered off from inside
    ");
}

#[test]
fn a_lost_supervisor_is_named_after_what_was_said_last() {
    let bench = Bench::new();
    bench.vm(|_, _, peer| {
        accept(peer);
        peer.send(&Frame::data(0, STDOUT, b"last words\n".to_vec()));
        // Read whatever comes, so that the connection ends and is not reset.
        while peer.next().is_some_and(|frame| frame.kind != Kind::Credit) {}
    });
    assert_snapshot!(bench.run(["exec", "fuzzy-otter", "true"]), @r"
    status 125
    --- stdout
    last words
    --- stderr
    error: lost the connection to vm `fuzzy-otter` before the command had ended
    hint: see `banger vm logs fuzzy-otter`
    ");
}

#[test]
fn arguments_and_variables_are_exact() {
    let bench = Bench::new();
    let argv: [&[u8]; 9] =
        [b"printf", b"%s|", b"a b", b"c'd", b"", b"--rm", b"\xff\xfe", b"--", "grüße\n".as_bytes()];
    bench.vm(move |spec, _, peer| {
        let bytes = |bytes: &[u8]| ByteString(bytes.to_vec());
        assert_eq!(spec.argv, argv.map(bytes));
        assert_eq!(spec.env, [(bytes(b"K"), bytes(b"\xff=1")), (bytes(b"TERM"), bytes(b"xterm"))]);
        assert_eq!(spec.workdir, Some(bytes(b"/tmp/\xff")));
        assert_eq!(spec.user.as_deref(), Some("www-data:adm"));
        accept(peer);
        peer.exit(0);
    });
    let flags: [&[u8]; 7] = [
        b"exec",
        b"--env=K=\xff=1",
        b"--env=TERM",
        b"--env=UNSET",
        b"--workdir=/tmp/\xff",
        b"--user=www-data:adm",
        b"fuzzy-otter",
    ];
    let words = flags.into_iter().chain([&b"--"[..]]).chain(argv).map(OsStr::from_bytes);
    assert_snapshot!(bench.run(words), @"status 0");
}

#[test]
fn bytes_flow_both_ways_at_once_within_the_windows() {
    const LEN: usize = 64 << 20;
    let bench = Bench::new();
    bench.vm(|_, _, peer| {
        accept(peer);
        assert_eq!(echo(peer), LEN as u64);
        peer.exit(0);
    });
    let mut command = bench.command(["run", "--", "cat"]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let block: Vec<u8> = (0..251).cycle().take(1 << 20).collect();
    let sent = block.clone();
    let feeder = std::thread::spawn(move || {
        (0..LEN / sent.len()).for_each(|_| stdin.write_all(&sent).unwrap());
    });
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(0), LEN));
    assert!(output.stdout.chunks(block.len()).all(|chunk| chunk == block), "bytes changed on the way");
}

#[test]
fn a_closed_stdout_ends_the_session() {
    let bench = Bench::new();
    let (ended, end) = std::sync::mpsc::channel();
    bench.vm(move |_, _, peer| {
        accept(peer);
        loop {
            peer.send(&Frame::data(0, STDOUT, b"y\n".to_vec()));
            if peer.next().is_none() {
                break;
            }
        }
        ended.send(()).unwrap();
    });
    let mut child = bench.command(["exec", "fuzzy-otter", "yes"]).spawn().unwrap();
    drop(child.stdout.take());
    assert_snapshot!(bench.show(&child.wait_with_output().unwrap()), @"status 141");
    end.recv().unwrap();
}

#[test]
fn signals_reach_the_command() {
    let bench = Bench::new();
    let (ready, begin) = std::sync::mpsc::channel();
    bench.vm(move |_, _, peer| {
        accept(peer);
        // Credit for its output proves that the session is being served.
        peer.send(&Frame::data(0, STDOUT, b"x".to_vec()));
        while peer.next().unwrap().kind != Kind::Credit {}
        ready.send(()).unwrap();
        assert_eq!(control(peer), SessionControl::Signal(15));
        peer.say(&SessionEvent::Exited(ExitStatus::Signal(15)));
    });
    let child = bench.command(["exec", "fuzzy-otter", "sleep", "9"]).spawn().unwrap();
    begin.recv().unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(143));
}

#[test]
fn an_overdue_command_is_ended() {
    let bench = Bench::new();
    bench.vm(|_, _, peer| {
        accept(peer);
        assert_eq!(control(peer), SessionControl::Signal(15));
        peer.say(&SessionEvent::Exited(ExitStatus::Signal(15)));
    });
    assert_snapshot!(bench.run(["exec", "--timeout", "150ms", "fuzzy-otter", "sleep", "9"]), @r"
    status 124
    --- stderr
    error: the command was ended after 150 ms (`--timeout`)
    ");
}

#[test]
fn a_lease_is_held_and_nothing_is_left() {
    let bench = Bench::new();
    bench.vm(|_, lease, peer| {
        assert!(lease);
        accept(peer);
        peer.exit(3);
        while peer.next().is_some() {}
    });
    assert_snapshot!(bench.run(["run", "--rm", "--", "false"]), @"status 3");
    let deleted = Request::VmDelete { vm: "0123456789ab".to_owned(), force: true };
    assert_eq!(bench.requests()[1..], [deleted]);
}

#[test]
fn a_vm_that_was_never_reached_is_kept_and_says_so() {
    let bench = Bench::new();
    bench.daemon(|_, peer| {
        peer.say(&Event::Planned(plan()));
        peer.say(&Event::Warning { text: "no way out to the network".to_owned() });
        peer.fail(WireError::new(ErrorCode::Unreachable, "guest agent silent for 90 s"));
    });
    assert_snapshot!(bench.run(["run", "--rm", "--", "true"]), @r"
    status 125
    --- stderr
    warning: no way out to the network
    error: guest agent silent for 90 s
    hint: the vm was kept: see `banger vm logs fuzzy-otter` and `banger vm show fuzzy-otter`, then `banger vm delete --force fuzzy-otter`
    ");
    assert_eq!(bench.requests().len(), 1);
}

#[test]
fn detached_and_created_vms_are_named_on_stdout() {
    let bench = Bench::new();
    bench.vm(|_, _, _| panic!("no session was asked for"));
    assert_snapshot!(bench.run(["run", "-d"]), @r"
    status 0
    --- stdout
    fuzzy-otter
    ");
    assert_snapshot!(bench.run(["vm", "create"]), @r"
    status 0
    --- stdout
    fuzzy-otter
    ");
}

#[test]
fn only_running_vms_take_commands() {
    let bench = Bench::new();
    bench.daemon(|_, peer| peer.done(Outcome::Vm(view("web", "stopped"))));
    assert_snapshot!(bench.run(["exec", "web", "true"]), @r"
    status 125
    --- stderr
    error: vm `web` is not running, it is stopped
    hint: start it with `banger vm start web`
    ");
}

#[test]
fn a_shell_gets_the_terminal_and_gives_it_back() {
    let (first, second) = (TerminalSize { rows: 40, cols: 100 }, TerminalSize { rows: 10, cols: 90 });
    let bench = Bench::new();
    bench.vm(move |spec, _, peer| {
        assert!(spec.argv.is_empty());
        assert_eq!((spec.tty, spec.term.as_deref()), (Some(first), Some("xterm")));
        accept(peer);
        assert_eq!(control(peer), SessionControl::Resize(first));
        peer.send(&Frame::data(0, STDOUT, b"# ".to_vec()));
        // Raw: control characters are bytes, and nothing waits for the end of a line.
        let mut typed = Vec::new();
        while typed.len() < 2 {
            let frame = peer.next().unwrap();
            if frame.kind == Kind::Data {
                typed.extend_from_slice(&frame.payload);
            }
        }
        assert_eq!(typed, b"q\x03");
        peer.send(&Frame::data(0, STDOUT, b"got it".to_vec()));
        assert_eq!(control(peer), SessionControl::Resize(second));
        peer.exit(0);
    });
    let (mut master, slave) = terminal(first);
    let local_modes = || rustix::termios::tcgetattr(&slave).unwrap().local_modes;
    let before = local_modes();
    let mut command = bench.command(["run"]);
    command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap());
    let mut child = command.stderr(slave.try_clone().unwrap()).spawn().unwrap();
    let shown = read_until(&mut master, "# ");
    assert_ne!(local_modes(), before);
    master.write_all(b"q\x03").unwrap();
    read_until(&mut master, "got it");
    resize(&master, second);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::WINCH).unwrap();
    let rest = read_until(&mut master, "\r\n");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(local_modes(), before);
    assert_eq!(
        shown.replace("\r\x1b[K", "[clear]"),
        "vm fuzzy-otter: 1 vcpu, 512 MiB, 8 GiB disk, debian-bookworm, qemu (software emulation)\r\n\
         there is no `/dev/kvm`, so vms run in software emulation\r\n\
         [clear]boot[clear]ready in 1.8 s\r\n# "
    );
    assert_eq!(rest, "vm `fuzzy-otter` keeps running; stop it with `banger vm stop fuzzy-otter`\r\n");
}
