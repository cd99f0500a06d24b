//! Machines that are broken, and guests that mean harm, beside one that is well.

use crate::support::{IMAGE, Owner, show, wait_for};
use crate::world::{self, is_missing};
use serde_json::Value;

/// Memory in KiB that a supervisor may have, whatever its guest sends.
const SUPERVISOR_KIB_MAX: u64 = 48 << 10;
const DAEMON_KIB_MAX: u64 = 64 << 10;

/// What the simulation's VMM does with 301 MiB of memory, and more.
const BEHAVIOURS: [&str; 8] = ["ends", "panics", "no-root", "silent", "garbage", "flood", "deaf", "chatty"];

/// Makes a vm that behaves as its name says, and does not start it.
fn make(owner: &Owner, name: &str) {
    let memory = 301 + BEHAVIOURS.iter().position(|behaviour| *behaviour == name).unwrap();
    let memory = format!("{memory}M");
    owner.ok(["vm", "create", "--no-start", "--name", name, "--image", IMAGE, "--memory", &memory]);
}

fn start(owner: &Owner, name: &str) -> Result<(), String> {
    let output = owner.banger(["vm", "start", name]).output().unwrap();
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

fn state(owner: &Owner, name: &str) -> String {
    let vms: Value = owner.json(&["vm", "list", "--json"]);
    let vm = vms.as_array().unwrap().iter().find(|vm| vm["name"] == name).cloned();
    vm.map_or("gone".to_owned(), |vm| vm["state"].as_str().unwrap().to_owned())
}

/// Memory of this owner's processes whose command line has the word, in KiB; the largest.
fn rss(owner: &Owner, word: &str) -> u64 {
    let pids = owner.processes().into_iter().filter(|line| line.contains(word));
    let rss = |line: String| {
        let pid = line.split(' ').next()?.to_owned();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.trim().to_owned();
        line.split(' ').next()?.parse::<u64>().ok()
    };
    pids.filter_map(rss).max().unwrap_or(0)
}

#[test]
fn a_boot_that_fails_has_a_cause_and_is_kept() {
    if is_missing() || !world::is_inside("trouble::a_boot_that_fails_has_a_cause_and_is_kept") {
        return;
    }
    let owner = Owner::with_store();
    world::configure(&owner);
    let mut told = String::new();
    for (behaviour, kept) in [("ends", false), ("panics", false), ("no-root", true), ("silent", true)] {
        make(&owner, behaviour);
        let error = start(&owner, behaviour).unwrap_err();
        told.push_str(&format!("--- {behaviour}\n{error}"));
        assert_eq!(state(&owner, behaviour), "error", "{behaviour}");
        let shown = owner.json(&["vm", "show", behaviour, "--json"]).to_string();
        assert!(shown.contains("\"error\":\""), "{shown}");
        let logs = owner.ok(["vm", "logs", behaviour]);
        assert!(logs.contains("a machine that is none"), "{logs}");
        let vmm = owner.processes().iter().any(|line| line.contains("qemu-system"));
        assert_eq!(vmm, kept, "{behaviour}");
        owner.ok(["vm", "prune", "-f"]);
        assert_eq!(state(&owner, behaviour), "gone");
    }
    // The lease of a vm that never came up has not begun.
    let output =
        owner.banger(["run", "--rm", "--memory", "303M", "--name", "kept", "--image", IMAGE, "--", "true"]);
    let output = { output }.output().unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", show(&output));
    assert_eq!(state(&owner, "kept"), "error");
    owner.ok(["vm", "delete", "--force", "kept"]);
    insta::with_settings!({ snapshot_path => "snapshots", prepend_module_to_snapshot => false }, {
        insta::assert_snapshot!("boots_that_fail", told);
    });
    owner.assert_nothing_left();
}

#[test]
fn a_hostile_guest_harms_nobody_else() {
    if is_missing() || !world::is_inside("trouble::a_hostile_guest_harms_nobody_else") {
        return;
    }
    let owner = Owner::with_store();
    world::configure(&owner);
    owner.ok(["vm", "run", "-d", "--name", "well", "--image", IMAGE]);
    let daemon = daemon(&owner);
    for behaviour in ["garbage", "flood", "deaf", "chatty"] {
        make(&owner, behaviour);
        start(&owner, behaviour).unwrap_or_else(|error| panic!("{behaviour}: {error}{}", owner.logs()));
        // It has some time to do harm in.
        for _ in 0..20 {
            owner.ok(["vm", "exec", "well", "--", "true"]);
        }
        assert!(rss(&owner, "bangerd supervise") < SUPERVISOR_KIB_MAX, "{behaviour}");
        assert!(rss(&owner, "bangerd serve") < DAEMON_KIB_MAX, "{behaviour}");
        let shown = owner.json(&["vm", "show", behaviour, "--json"]).to_string();
        assert!(shown.contains("running"), "{shown}");
        for entry in std::fs::read_dir(owner.state().join("vms")).unwrap().flatten() {
            let len = std::fs::metadata(entry.path().join("console.log")).map_or(0, |file| file.len());
            assert!(len <= 1 << 20, "{behaviour}: {len} bytes of console");
        }
        if behaviour == "deaf" {
            let mut command = owner.program("timeout");
            let output = command
                .args(["-s", "KILL", "2", "banger", "vm", "exec", "deaf", "--", "true"])
                .output()
                .unwrap();
            assert!(!output.status.success(), "{}", show(&output));
        }
        if behaviour == "deaf" {
            // What can't be done in order is said.
            let output = owner.banger(["vm", "stop", "--timeout", "1s", "deaf"]).output().unwrap();
            assert_eq!(
                show(&output),
                "exit status: 0\n--- stdout\nstopped deaf\n--- stderr\nwarning: vm `deaf` did not shut down and was ended \
                 by force; it may have lost what it had not written to its disk\n"
            );
        }
        owner.ok(["vm", "delete", "--force", behaviour]);
    }
    assert_eq!(self::daemon(&owner), daemon, "the daemon is the same");
    owner.ok(["vm", "delete", "--force", "well"]);
    owner.assert_nothing_left();
}

fn daemon(owner: &Owner) -> String {
    let mut found = String::new();
    wait_for("a daemon", || {
        let processes = owner.processes();
        let line = processes.iter().find(|line| line.contains("bangerd serve")).ok_or("none")?;
        found = line.split(' ').next().unwrap().to_owned();
        Ok(())
    });
    found
}
