//! Daemons that are absent, fail to start, or come from another build.
//!
//! Here the daemon is a process: this test's own program, which [`process`] turns into one when a script named
//! `bangerd` starts it.

use crate::support::{Bench, Peer, view};
use banger_wire::BUILD;
use banger_wire::daemon::{Call, DaemonView, Outcome, Request};
use banger_wire::error::{ErrorCode, WireError};
use insta::assert_snapshot;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Names the build that [`process`] is to be of.
const BUILD_VARIABLE: &str = "BANGER_TEST_DAEMON";

/// Is a daemon when started as one, and nothing otherwise.
#[test]
fn process() {
    let Ok(build) = std::env::var(BUILD_VARIABLE) else { return };
    let state = PathBuf::from(std::env::var_os("BANGER_STATE_DIR").unwrap());
    let socket = state.join("run/bangerd.sock");
    std::fs::create_dir_all(state.join("run")).unwrap();
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).unwrap();
    let own_session = session_of_this_process() == std::process::id();
    let mut log = std::fs::File::options().append(true).create(true).open(state.join("starts")).unwrap();
    writeln!(log, "{build}, own session: {own_session}").unwrap();
    // The harness prints to stdout, so the script has moved the pipe out of its way.
    std::fs::write("/proc/self/fd/3", "ready\n").unwrap();
    for stream in listener.incoming() {
        let mut peer = Peer::new(stream.unwrap());
        let Some(frame) = peer.next() else { continue };
        let call: Call = frame.parse().unwrap();
        match call.request {
            Request::DaemonStop => {
                peer.done(Outcome::Done);
                // Returning ends the test, the only one of its process.
                return;
            }
            Request::DaemonStatus => peer.done(Outcome::Daemon(daemon_view(&build))),
            _ if call.build != build => {
                peer.fail(WireError::new(ErrorCode::BuildMismatch, "the builds differ"));
            }
            Request::VmList => peer.done(Outcome::Vms(vec![view("web", "running")])),
            other => panic!("{other:?}"),
        }
    }
}

/// The kernel says 0 of a session whose leader is outside of the pid namespace, which a container's is.
fn session_of_this_process() -> u32 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after_name = stat.rsplit(')').next().unwrap();
    after_name.split_whitespace().nth(3).unwrap().parse().unwrap()
}

fn daemon_view(build: &str) -> DaemonView {
    DaemonView {
        pid: 4242,
        build: build.to_owned(),
        started: 1_700_000_000,
        running: 2,
        state_dir: "/state".to_owned(),
        cache_dir: "/cache".to_owned(),
        log: "/state/bangerd.log".to_owned(),
    }
}

/// Puts a copy of the program where no real `bangerd` is beside it.
fn install(bench: &Bench) -> PathBuf {
    let bin = bench.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    let program = bin.join("banger");
    copy(Path::new(env!("CARGO_BIN_EXE_banger")), &program);
    program
}

/// Copies a program in another process: a descriptor for writing that a test beside this one passes on to a child by
/// accident would keep the copy from being executed.
fn copy(from: &Path, to: &Path) {
    assert!(
        Command::new("cp").args(["-p", "--remove-destination"]).args([from, to]).status().unwrap().success()
    );
}

/// Puts a script beside the program.
fn install_daemon(program: &Path, script: &str) -> PathBuf {
    let daemon = program.with_file_name("bangerd");
    let draft = program.with_file_name("draft");
    std::fs::write(&draft, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755)).unwrap();
    copy(&draft, &daemon);
    daemon
}

/// Returns a script that becomes [`process`] of the given build.
fn script(build: &str) -> String {
    let test = std::env::current_exe().unwrap();
    format!(
        "test \"$*\" = 'serve --ready-fd 1' || exit 9\nexec 3>&1 >/dev/null\n\
         {BUILD_VARIABLE}={build} exec {} --exact daemons::process --nocapture",
        test.display()
    )
}

#[test]
fn a_missing_program_is_named() {
    let bench = Bench::new();
    let program = install(&bench);
    let output = bench.command_of(&program, ["vm", "list"]).output().unwrap();
    assert_snapshot!(bench.show(&output), @r"
    status 1
    --- stderr
    error: could not find `bangerd`, banger's daemon
    hint: install it beside `banger`, or in a directory of `PATH`
    ");
}

#[test]
fn a_daemon_starts_by_itself_and_stays() {
    let bench = Bench::new();
    std::fs::remove_dir_all(bench.state()).unwrap();
    let program = install(&bench);
    install_daemon(&program, &script(BUILD));
    let banger = |args: &[&str]| bench.show(&bench.command_of(&program, args).output().unwrap());
    assert_snapshot!(banger(&["version"]), @r"
    status 0
    --- stdout
    banger:  [BUILD]
    bangerd: does not run
    ");
    assert_snapshot!(banger(&["vm", "list", "-q"]), @r"
    status 0
    --- stdout
    0123456789ab
    ");
    assert_eq!(std::fs::metadata(bench.state()).unwrap().permissions().mode() & 0o777, 0o700);
    assert_snapshot!(banger(&["version"]), @r"
    status 0
    --- stdout
    banger:  [BUILD]
    bangerd: [BUILD]
    ");
    assert_snapshot!(banger(&["daemon", "stop"]), @r"
    status 0
    --- stdout
    stopped bangerd
    ");
    assert_snapshot!(banger(&["daemon", "stop"]), @r"
    status 0
    --- stdout
    bangerd does not run
    ");
    assert_snapshot!(banger(&["daemon", "status"]), @r"
    status 1
    --- stdout
    bangerd does not run; it starts by itself when needed
    ");
    let starts = std::fs::read_to_string(bench.state().join("starts")).unwrap();
    assert_eq!(starts, format!("{BUILD}, own session: true\n"));
}

#[test]
fn a_daemon_of_another_build_is_replaced() {
    let bench = Bench::new();
    let program = install(&bench);
    let old = install_daemon(&program, &script("0.0.1-old"));
    let mut old = Command::new(old)
        .args(["serve", "--ready-fd", "1"])
        .env("BANGER_STATE_DIR", bench.state())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 6];
    old.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
    install_daemon(&program, &script(BUILD));
    let output = bench.command_of(&program, ["vm", "list", "-q"]).output().unwrap();
    assert_snapshot!(bench.show(&output), @r"
    status 0
    --- stdout
    0123456789ab
    ");
    assert!(old.wait().unwrap().success());
    let starts = std::fs::read_to_string(bench.state().join("starts")).unwrap();
    assert_eq!(starts.lines().count(), 2, "{starts}");
    assert!(bench.command_of(&program, ["daemon", "stop"]).output().unwrap().status.success());
}

#[test]
fn a_daemon_beside_another_builds_client_is_named() {
    let bench = Bench::new();
    let program = install(&bench);
    install_daemon(&program, &script("0.0.1-old"));
    let output = bench.command_of(&program, ["vm", "list", "-q"]).output().unwrap();
    assert_snapshot!(bench.show(&output), @r"
    status 1
    --- stderr
    error: `bangerd` and `banger` are not of one build: this `banger` is [BUILD]
      caused by: the builds differ
    hint: install both programs of one build, side by side
    ");
    assert!(bench.command_of(&program, ["daemon", "stop"]).output().unwrap().status.success());
}

#[test]
fn a_daemon_that_can_not_start_says_why() {
    let bench = Bench::new();
    let program = install(&bench);
    let mut error = WireError::new(ErrorCode::Failed, "could not open the store").hinted("free some space");
    error.causes.push("no space left on device".to_owned());
    let json = serde_json::to_string(&error).unwrap();
    install_daemon(&program, &format!("echo 'error: {json}'; echo noise >&2"));
    let banger = |args: &[&str]| bench.show(&bench.command_of(&program, args).output().unwrap());
    assert_snapshot!(banger(&["run", "--", "true"]), @r"
    status 125
    --- stderr
    error: could not open the store
      caused by: no space left on device
    hint: free some space
    ");
    install_daemon(&program, "exit 1");
    assert_snapshot!(banger(&["doctor"]), @r"
    status 1
    --- stdout
    FAIL  daemon: bangerd did not start: it ended without saying why
          hint: its log is `[DIR]/state/bangerd.log`
    ");
    // By then the first one has ended, and what it said on stderr is in the log.
    assert_snapshot!(banger(&["daemon", "logs"]), @r"
    status 0
    --- stdout
    noise
    ");
}

#[test]
fn a_daemons_status_is_shown_whatever_its_build() {
    let bench = Bench::new();
    bench.daemon(|request, peer| {
        assert_eq!(request, Request::DaemonStatus);
        peer.done(Outcome::Daemon(daemon_view("9.9-other")));
    });
    let shown = bench.run(["daemon", "status"]);
    let without_age: Vec<&str> = shown.lines().map(|line| line.split(" (").next().unwrap()).collect();
    assert_snapshot!(without_age.join("\n"), @r"
    status 0
    --- stdout
    process:     4242
    build:       9.9-other
    started:     2023-11-14 22:13:20 +00:00
    running vms: 2
    state:       /state
    cache:       /cache
    log:         /state/bangerd.log
    ");
}
