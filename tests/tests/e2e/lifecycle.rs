//! Making, stopping, starting and removing vms.

use crate::support::{IMAGE, Owner, has, is_root, run, show, skip, wait_for};

#[test]
fn what_was_written_is_there_after_a_stop() {
    let owner = Owner::with_store();
    owner.ok(["vm", "create", "--name", "keep", "--image", IMAGE, "--wait", "agent"]);
    owner.ok(["vm", "exec", "keep", "--", "sh", "-c", "echo kept > /root/file; mkdir /srv/dir"]);
    owner.ok(["vm", "stop", "keep"]);
    let vm = owner.json(&["vm", "show", "--json", "keep"]);
    assert_eq!(vm["state"], "stopped");
    let disk = format!("{}/disk.raw", vm["dir"].as_str().unwrap());
    let checked = owner.program("e2fsck").args(["-fn", &disk]).output().unwrap();
    assert!(checked.status.success(), "{}", show(&checked));
    let features = run(owner.program("dumpe2fs").args(["-h", &disk]));
    assert!(!features.contains("needs_recovery"), "{features}");
    owner.ok(["vm", "start", "keep"]);
    assert_eq!(owner.ok(["vm", "exec", "keep", "--", "cat", "/root/file"]), "kept\n");
    owner.ok(["vm", "kill", "keep"]);
    assert_eq!(owner.json(&["vm", "show", "--json", "keep"])["state"], "stopped");
    owner.ok(["vm", "delete", "keep"]);
    owner.assert_nothing_left();
}

#[test]
fn a_host_that_goes_down_ends_vms_in_order() {
    let owner = Owner::with_store();
    owner.ok(["vm", "create", "--name", "keep", "--image", IMAGE, "--wait", "agent"]);
    owner.ok(["vm", "exec", "keep", "--", "sh", "-c", "echo kept >/root/file"]);
    // What a service manager does at the end: every process of the user hears it at once.
    for line in owner.processes() {
        let pid = line.split(' ').next().unwrap();
        // Some have gone with others.
        let _ = std::process::Command::new("kill").args(["-TERM", pid]).output().unwrap();
    }
    wait_for("everything has ended", || {
        let processes = owner.processes();
        if processes.is_empty() { Ok(()) } else { Err(format!("{processes:#?}")) }
    });
    let vm = owner.json(&["vm", "show", "--json", "keep"]);
    assert_eq!(vm["state"], "stopped", "{vm}");
    let disk = format!("{}/disk.raw", vm["dir"].as_str().unwrap());
    let features = run(owner.program("dumpe2fs").args(["-h", &disk]));
    assert!(!features.contains("needs_recovery"), "{features}");
    owner.ok(["vm", "start", "keep"]);
    assert_eq!(owner.ok(["vm", "exec", "keep", "--", "cat", "/root/file"]), "kept\n");
    owner.ok(["vm", "delete", "--force", "keep"]);
    owner.assert_nothing_left();
}

#[test]
fn systemd_comes_up_whole() {
    let owner = Owner::with_store();
    owner.ok(["vm", "create", "--name", "sys", "--image", IMAGE, "--wait", "boot"]);
    assert_eq!(owner.ok(["vm", "exec", "sys", "--", "systemctl", "is-system-running"]), "running\n");
    let failed = owner.ok(["vm", "exec", "sys", "--", "systemctl", "--failed", "--no-legend"]);
    assert_eq!(failed, "");
    let name = owner.ok(["vm", "exec", "sys", "--", "hostname"]);
    assert_eq!(name, "sys\n");
    let before = owner.ok(["vm", "exec", "sys", "--", "cat", "/etc/machine-id"]);
    owner.ok(["vm", "stop", "sys"]);
    let console = owner.ok(["vm", "logs", "sys"]);
    assert!(console.contains("Power down"), "{console}");
    owner.ok(["vm", "start", "sys"]);
    assert_eq!(
        owner.ok(["vm", "exec", "sys", "--", "cat", "/etc/machine-id"]),
        before,
        "it is the same machine"
    );
}

#[test]
fn pruning_spares_what_runs() {
    let owner = Owner::with_store();
    owner.ok(["vm", "run", "-d", "--name", "runs", "--image", IMAGE]);
    owner.ok(["vm", "create", "--no-start", "--name", "idle", "--image", IMAGE]);
    let output = owner.banger(["vm", "delete", "runs"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "a running vm is not deleted unasked: {}", show(&output));
    owner.ok(["vm", "prune", "-f"]);
    let left = owner.json(&["vm", "list", "--json"]);
    assert_eq!(left.as_array().unwrap().len(), 1);
    assert_eq!(left[0]["name"], "runs");
    owner.ok(["exec", "runs", "--", "true"]);
    owner.ok(["vm", "delete", "-f", "runs"]);
    owner.assert_nothing_left();
}

#[test]
fn a_reboot_inside_boots_again() {
    let owner = Owner::with_store();
    owner.ok(["vm", "create", "--name", "again", "--image", IMAGE, "--wait", "boot"]);
    let boot_id = || {
        let output = owner.banger(["exec", "again", "--", "cat", "/proc/sys/kernel/random/boot_id"]).output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    let before = boot_id();
    owner.ok(["exec", "again", "--", "systemctl", "reboot", "--no-block"]);
    crate::support::wait_for("the vm has booted again", || {
        let now = boot_id();
        if now.is_empty() || now == before { Err(owner.logs()) } else { Ok(()) }
    });
    // Not by `/proc/sysrq-trigger`: kernels since 6.12 take the drives from under an init that goes on, which may panic.
    // An init that is only just starting can't be asked yet.
    let script = "until systemctl poweroff --no-block 2>/dev/null; do sleep 0.2; done; sleep 60";
    let output = owner.banger(["exec", "again", "--", "sh", "-c", script]).output().unwrap();
    // Whether the init ends the command or the vm goes away under it, the client does not stay.
    assert!(matches!(output.status.code(), Some(125 | 143)), "{}", show(&output));
    crate::support::wait_for("powered off is stopped", || {
        let vm = owner.json(&["vm", "show", "--json", "again"]);
        if vm["state"] == "stopped" { Ok(()) } else { Err(vm.to_string()) }
    });
}

#[test]
fn a_restart_is_another_boot_with_what_was_set() {
    let owner = Owner::with_store();
    let sized = ["--memory", "256M", "--image", IMAGE];
    owner.ok([&["vm", "create", "--name", "one"][..], &sized].concat());
    owner.ok([&["vm", "create", "--no-start", "--name", "two"][..], &sized].concat());
    let script = "cat /proc/sys/kernel/random/boot_id; nproc; free -m | awk '/Mem/ { print ($2 > 300) }'";
    let inside = |name| owner.ok(["vm", "exec", name, "--", "sh", "-c", script]);
    let before = inside("one");
    assert!(before.ends_with("\n1\n0\n"), "{before}");
    let output = owner.banger(["vm", "set", "--vcpu", "2", "one"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "error: vm `one` is running, and has what it was started with until it stops\n\
         hint: stop it with `banger vm stop one` first\n"
    );
    owner.ok(["vm", "stop", "one"]);
    let said = owner.ok(["vm", "set", "--vcpu", "2", "--memory", "512M", "one"]);
    assert_eq!(said, "one has 2 vcpu, 512 MiB memory, 8 GiB disk and network internet from its next start\n");
    let output = owner.banger(["vm", "set", "--memory", "1M", "one"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", show(&output));
    // One that does not run is started.
    let restarted = owner.ok(["vm", "restart", "one", "two"]);
    assert!(restarted.contains("restarted one\n") && restarted.contains("restarted two\n"), "{restarted}");
    assert!(inside("one").ends_with("\n2\n1\n"), "{}", inside("one"));
    let before = inside("two");
    owner.ok(["vm", "exec", "two", "--", "sh", "-c", "echo kept > /root/file"]);
    owner.ok(["vm", "restart", "two"]);
    assert_ne!(inside("two"), before, "another boot");
    assert_eq!(owner.ok(["vm", "exec", "two", "--", "cat", "/root/file"]), "kept\n");
    owner.ok(["vm", "delete", "-f", "one", "two"]);
    owner.assert_nothing_left();
}

#[test]
fn root_is_nobody_in_its_vms() {
    if !is_root() {
        return skip("vms of root: the tests do not run as root");
    }
    let owner = Owner::root();
    owner.copy_store();
    owner.ok(["vm", "run", "-d", "--name", "r", "--image", IMAGE]);
    let home = owner.home().to_str().unwrap();
    let mut seen = 0;
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let root = std::fs::read_link(entry.path().join("root")).unwrap_or_default();
        // The supervisor names the vm's directory; the VMM lives in a root of its own.
        let supervisor = line.contains("supervise") && line.contains(home);
        let vmm = line.contains("qemu-system") && root.as_os_str() == "/";
        if !supervisor && !vmm {
            continue;
        }
        let status = std::fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        if let Some(uid) = status.lines().find_map(|line| line.strip_prefix("Uid:\t")) {
            seen += usize::from(supervisor);
            assert!(!uid.split('\t').any(|uid| uid == "0"), "{line} has uids {uid}");
        }
    }
    // Where there is a pasta, the process that starts it is the second.
    assert_eq!(seen, if has("pasta") { 2 } else { 1 }, "supervisors");
    owner.ok(["exec", "r", "--", "true"]);
    owner.ok(["vm", "delete", "-f", "r"]);
    owner.assert_nothing_left();
}
