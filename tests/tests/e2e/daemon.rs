//! The daemon: comes by itself, goes without harm, and talks to its owner only.

use crate::support::{IMAGE, Owner, is_root, programs, run, show, skip, wait_for};
use std::process::Command;

fn daemon_pid(owner: &Owner) -> String {
    owner.json(&["daemon", "status", "--json"])["pid"].to_string()
}

#[test]
fn vms_outlive_a_killed_daemon() {
    let owner = Owner::with_store();
    owner.ok(["vm", "run", "-d", "--name", "on", "--image", IMAGE]);
    let boot_id = || owner.ok(["exec", "on", "--", "cat", "/proc/sys/kernel/random/boot_id"]);
    let (boot, before) = (boot_id(), owner.json(&["vm", "show", "--json", "on"]));
    let pid = daemon_pid(&owner);
    run(Command::new("kill").args(["-9", &pid]));
    wait_for("the daemon is gone", || {
        let gone = !std::path::Path::new("/proc").join(&pid).exists();
        if gone { Ok(()) } else { Err("it is there".to_owned()) }
    });
    assert_eq!(boot_id(), boot, "the same boot");
    let after = owner.json(&["vm", "show", "--json", "on"]);
    assert_eq!(after["state"], "running");
    assert!(before["vmm_pid"].is_number() && after["vmm_pid"] == before["vmm_pid"], "{before} {after}");
    assert_ne!(daemon_pid(&owner), pid);
    owner.ok(["vm", "stop", "on"]);
    assert_eq!(owner.json(&["vm", "show", "--json", "on"])["state"], "stopped");
}

/// Copies the programs into a directory, as another build: the name in them is another.
fn other_build(owner: &Owner, dir: &std::path::Path) -> String {
    let view = owner.json(&["daemon", "status", "--json"]);
    let build = view["build"].as_str().unwrap().to_owned();
    let last = if build.ends_with('0') { '1' } else { '0' };
    let other = format!("{}{last}", &build[..build.len() - 1]);
    for name in ["banger", "bangerd"] {
        let mut bytes = std::fs::read(programs().join(name)).unwrap();
        let places: Vec<usize> = (0..bytes.len() - build.len())
            .filter(|at| bytes[*at] == build.as_bytes()[0] && bytes[*at..].starts_with(build.as_bytes()))
            .collect();
        assert!(!places.is_empty(), "{name} does not have the name of its build");
        for at in places {
            bytes[at..at + other.len()].copy_from_slice(other.as_bytes());
        }
        std::fs::write(dir.join(name), bytes).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.join(name), mode).unwrap();
    }
    other
}

#[test]
fn vms_go_on_under_the_next_build() {
    let owner = Owner::with_store();
    owner.ok(["vm", "run", "-d", "--name", "on", "--image", IMAGE]);
    let before = owner.json(&["vm", "show", "--json", "on"]);
    let dir = tempfile::tempdir_in(programs()).unwrap();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let other = other_build(&owner, dir.path());
    let next = |args: &[&str]| run(owner.program(dir.path().join("banger")).args(args));
    assert_eq!(next(&["exec", "on", "--", "echo", "here"]), "here\n");
    assert!(next(&["daemon", "status", "--json"]).contains(&other), "the daemon is of the next build");
    let after: serde_json::Value = serde_json::from_str(&next(&["vm", "show", "--json", "on"])).unwrap();
    assert_eq!(after["state"], "running");
    assert_eq!((&after["vmm_pid"], &after["boot_id"]), (&before["vmm_pid"], &before["boot_id"]));
    next(&["vm", "restart", "on"]);
    assert_eq!(next(&["exec", "on", "--", "echo", "there"]), "there\n");
    next(&["vm", "delete", "--force", "on"]);
    next(&["daemon", "stop"]);
    owner.assert_nothing_left();
}

#[test]
fn a_run_under_way_outlives_its_daemon_and_nothing_is_left() {
    let owner = Owner::with_store();
    let mut child = owner
        .banger([
            "vm",
            "run",
            "--rm",
            "--image",
            IMAGE,
            "--",
            "sh",
            "-c",
            "echo up; sleep 3; echo still here",
        ])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 3];
    let mut stdout = child.stdout.take().unwrap();
    std::io::Read::read_exact(&mut stdout, &mut line).unwrap();
    run(Command::new("kill").args(["-9", &daemon_pid(&owner)]));
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut stdout, &mut rest).unwrap();
    assert_eq!(rest, "still here\n");
    assert!(child.wait().unwrap().success());
    owner.assert_nothing_left();
}

#[test]
fn another_user_is_refused_everywhere() {
    if !is_root() {
        return skip("another user at the sockets: only root can be two users");
    }
    let owner = Owner::with_store();
    owner.ok(["vm", "run", "-d", "--name", "mine", "--image", IMAGE]);
    let stranger = Owner::new();
    let sockets = run(Command::new("find").arg(owner.state()).args(["-type", "s"]));
    let sockets: Vec<&str> = sockets.lines().collect();
    assert!(sockets.len() >= 2, "the daemon's and the vm's: {sockets:?}");
    let script = "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ntry:\n s.connect(sys.argv[1])\nexcept PermissionError:\n sys.exit(7)\ns.settimeout(10)\nsys.exit(0 if s.recv(1) else 8)";
    for socket in &sockets {
        // Directories keep strangers out ...
        let tried = stranger.program("python3").args(["-c", script, socket]).output().unwrap();
        assert_eq!(tried.status.code(), Some(7), "{socket}: {}", show(&tried));
    }
    // ... and when they don't, the peer's uid does.
    let mut dirs = vec![owner.home().to_path_buf()];
    dirs.extend([".local", ".local/state", ".local/state/banger"].map(|dir| owner.home().join(dir)));
    dirs.extend(sockets.iter().map(|socket| std::path::Path::new(socket).parent().unwrap().to_path_buf()));
    dirs.push(owner.state().join("vms"));
    for dir in &dirs {
        run(Command::new("chmod").arg("755").arg(dir));
    }
    for socket in &sockets {
        run(Command::new("chmod").arg("666").arg(socket));
        let tried = stranger.program("python3").args(["-c", script, socket]).output().unwrap();
        assert_eq!(tried.status.code(), Some(8), "connected, then hung up on: {socket}: {}", show(&tried));
    }
    for dir in &dirs {
        run(Command::new("chmod").arg("700").arg(dir));
    }
}

#[test]
fn one_daemon_is_enough() {
    let owner = Owner::new();
    owner.ok(["vm", "list"]);
    let pid = daemon_pid(&owner);
    let second = owner.program("bangerd").args(["serve", "--ready-fd", "1"]).output().unwrap();
    assert!(second.status.success(), "{}", show(&second));
    assert_eq!(second.stdout, b"ready\n", "the one that runs is as good");
    assert_eq!(daemon_pid(&owner), pid);
    owner.ok(["daemon", "stop"]);
    let status = owner.banger(["daemon", "status"]).output().unwrap();
    assert_eq!(status.status.code(), Some(1), "{}", show(&status));
}
