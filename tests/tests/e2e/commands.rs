//! Commands on vms that are there: several at once, signals, changes, what is used, the console.

use crate::support::{IMAGE, Owner, run, show, wait_for};
use std::io::{Read as _, Write as _};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

fn error(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn state(owner: &Owner, vm: &str) -> String {
    owner.json(&["vm", "show", "--json", vm])["state"].as_str().unwrap().to_owned()
}

fn sh(owner: &Owner, vm: &str, script: &str) -> String {
    owner.ok(["vm", "exec", vm, "--", "sh", "-c", script])
}

#[test]
fn several_vms_are_done_at_once_and_each_is_reported() {
    let owner = Owner::with_store();
    let create = |name: &str| owner.ok(["vm", "create", "--no-start", "--name", name, "--image", IMAGE]);
    create("one");
    create("two");
    let output = owner.banger(["vm", "start", "one", "nobody", "two"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", show(&output));
    let mut lines: Vec<_> = std::str::from_utf8(&output.stdout).unwrap().lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["started one", "started two"]);
    assert_eq!(error(&output), "error: no vm `nobody`\nhint: `banger vm list` shows those there are\n");
    let id = owner.json(&["vm", "show", "--json", "one"])["id"].as_str().unwrap().to_owned();
    // A name, an id and the beginning of one: all the same vm.
    let said = owner.ok(["vm", "stop", "one", &id, &id[..10], "one"]);
    assert_eq!(said, "stopped one\n");
    assert_eq!((state(&owner, "one"), state(&owner, "two")), ("stopped".to_owned(), "running".to_owned()));
    // Seventeen ids can't all begin differently.
    let (mut firsts, mut number) = (vec![id.chars().next().unwrap()], 0);
    let (first, ids) = loop {
        let name = format!("more{number}");
        create(&name);
        let vms = owner.json(&["vm", "list", "--json"]);
        let vm = vms.as_array().unwrap().iter().find(|vm| vm["name"] == name.as_str()).unwrap();
        let first = vm["id"].as_str().unwrap().chars().next().unwrap();
        if firsts.contains(&first) {
            let same = |vm: &&serde_json::Value| vm["id"].as_str().unwrap().starts_with(first);
            let vms = vms.as_array().unwrap().clone();
            break (first.to_string(), vms.iter().filter(same).cloned().collect::<Vec<_>>());
        }
        firsts.push(first);
        number += 1;
    };
    let output = owner.banger(["vm", "kill", "two", &first]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", show(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "killed two\n");
    let said = error(&output);
    assert!(said.starts_with(&format!("error: `{first}` is the beginning of several ids: `")), "{said}");
    for vm in ids {
        let listed = format!("`{}` ({})", vm["name"].as_str().unwrap(), vm["id"].as_str().unwrap());
        assert!(said.contains(&listed), "{said}");
    }
    owner.ok(["vm", "prune", "-f"]);
    owner.assert_nothing_left();
}

#[test]
fn a_signal_reaches_the_machine() {
    let owner = Owner::with_store();
    owner.ok(["vm", "create", "--name", "sig", "--image", IMAGE, "--wait", "boot"]);
    sh(&owner, "sig", "echo kept > /root/file");
    // systemd reads its units again.
    let before = sh(&owner, "sig", "systemctl show -p UnitsLoadTimestampMonotonic");
    assert_eq!(owner.ok(["vm", "kill", "--signal", "HUP", "sig"]), "signalled sig\n");
    wait_for("systemd has got the signal", || {
        let now = sh(&owner, "sig", "systemctl show -p UnitsLoadTimestampMonotonic");
        if now == before { Err(now) } else { Ok(()) }
    });
    assert_eq!(owner.ok(["vm", "kill", "-s", "sigterm", "sig"]), "signalled sig\n");
    wait_for("the vm has powered off", || {
        if state(&owner, "sig") == "stopped" { Ok(()) } else { Err(owner.logs()) }
    });
    let output = owner.banger(["vm", "kill", "-s", "TERM", "sig"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(error(&output), "error: vm `sig` is not running\nhint: start it with `banger vm start sig`\n");
    let output = owner.banger(["vm", "kill", "-s", "TERMINATE", "sig"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        error(&output).contains("`TERMINATE` is no signal: use a name such as TERM"),
        "{}",
        show(&output)
    );
    owner.ok(["vm", "start", "sig"]);
    assert_eq!(sh(&owner, "sig", "cat /root/file"), "kept\n");
    owner.ok(["vm", "kill", "sig"]);
    assert_eq!(state(&owner, "sig"), "stopped");
    owner.ok(["vm", "delete", "sig"]);
    owner.assert_nothing_left();
}

/// Gigabytes of the filesystem that has the vm's changes, rounded.
fn disk_gib(owner: &Owner, vm: &str) -> f64 {
    let kib = sh(owner, vm, "df -k / | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2");
    let kib: f64 = kib.trim().parse().unwrap();
    (kib / f64::from(1 << 20)).round()
}

#[test]
fn a_disk_grows_and_keeps_what_is_on_it() {
    let owner = Owner::with_store();
    let disk = |vm: &str| owner.json(&["vm", "show", "--json", vm])["disk"].as_str().unwrap().to_owned();
    owner.ok(["vm", "create", "--name", "grows", "--image", IMAGE, "--wait", "agent"]);
    let fill = "cd /root; head -c 20000000 /dev/urandom > data; sha256sum data > sums; mkdir many; \
                i=0; while [ $i -lt 300 ]; do echo $i > many/$i; i=$((i+1)); done; \
                sha256sum many/* >> sums";
    sh(&owner, "grows", fill);
    assert_eq!(disk_gib(&owner, "grows").round(), 8.0);
    let output = owner.banger(["vm", "set", "--disk-size", "16G", "grows"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        error(&output),
        "error: vm `grows` is running, and has what it was started with until it stops\n\
         hint: stop it with `banger vm stop grows` first\n"
    );
    owner.ok(["vm", "stop", "grows"]);
    let output = owner.banger(["vm", "set", "--disk-size", "4G", "grows"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        error(&output),
        "error: the disk of vm `grows` is 8 GiB and can't become smaller: its filesystem only grows\n\
         hint: make a new vm with `--disk-size`, and copy what you need\n"
    );
    // Twice, the second time to a length that is no whole number of groups, and that begins more descriptors.
    for (size, gib) in [("16G", 16.0), ("40300M", 39.0)] {
        let said = owner.ok(["vm", "set", "--disk-size", size, "--net", "none", "grows"]);
        assert!(said.contains(" disk and network none from its next start\n"), "{said}");
        owner.ok(["vm", "start", "grows"]);
        assert_eq!(disk_gib(&owner, "grows"), gib);
        assert_eq!(sh(&owner, "grows", "cd /root && sha256sum --quiet -c sums && ls /sys/class/net"), "lo\n");
        sh(
            &owner,
            "grows",
            "head -c 10000000 /dev/urandom > /root/more && sha256sum /root/more >> /root/sums",
        );
        owner.ok(["vm", "stop", "grows"]);
        let checked = owner.program("e2fsck").args(["-fn", &disk("grows")]).output().unwrap();
        assert!(checked.status.success(), "{}", show(&checked));
    }
    let vm = owner.json(&["vm", "show", "--json", "grows"]);
    assert!(vm["disk_used_bytes"].as_u64().unwrap() < 300 << 20, "what is not used takes no room: {vm}");
    owner.ok(["vm", "set", "--net", "internet", "grows"]);
    owner.ok(["vm", "start", "grows"]);
    assert_eq!(sh(&owner, "grows", "ls /sys/class/net"), "eth0\nlo\n");
    owner.ok(["vm", "delete", "-f", "grows"]);

    // A disk of the kind that earlier builds made.
    owner.ok(["vm", "create", "--no-start", "--name", "old", "--image", IMAGE, "--disk-size", "1G"]);
    let old = disk("old");
    run(owner.program("mke2fs").args(["-q", "-F", "-t", "ext4", "-O", "sparse_super2,^resize_inode", &old]));
    owner.ok(["vm", "set", "--disk-size", "2G", "old"]);
    let output = owner.banger(["vm", "start", "old"]).output().unwrap();
    assert!(output.status.success(), "{}", show(&output));
    assert_eq!(
        error(&output),
        "warning: the disk stays as it is, 1024 MiB: it was made by an earlier banger, whose disks do \
         not grow; a new vm has one that does\n"
    );
    assert_eq!(disk_gib(&owner, "old"), 1.0);
    owner.ok(["vm", "delete", "-f", "old"]);
    owner.assert_nothing_left();
}

#[test]
fn what_vms_use_is_told_by_guest_and_host() {
    let owner = Owner::with_store();
    owner.ok(["vm", "create", "--no-start", "--name", "idle", "--image", IMAGE]);
    owner.ok(["vm", "create", "--name", "busy", "--image", IMAGE, "--memory", "256M", "--wait", "agent"]);
    // Without a network, and with something to do.
    sh(&owner, "busy", "ip address flush dev eth0");
    sh(
        &owner,
        "busy",
        "(while :; do :; done) > /dev/null 2>&1 & head -c 3000000 /dev/zero > /root/file; sync",
    );
    let all = owner.json(&["vm", "stats", "--json", "busy", "idle"]);
    let (busy, idle) = (&all[0], &all[1]);
    assert_eq!((busy["name"].as_str(), idle["name"].as_str()), (Some("busy"), Some("idle")));
    assert!(idle["guest"].is_null() && idle["host"].is_null() && idle["disk_used_bytes"].as_u64() > Some(0));
    let (guest, host) = (&busy["guest"], &busy["host"]);
    let memory = guest["memory_bytes"].as_u64().unwrap();
    assert!((150 << 20..256 << 20).contains(&memory), "{guest}");
    assert!((1..memory).contains(&guest["memory_used_bytes"].as_u64().unwrap()), "{guest}");
    assert!(guest["disk_written_bytes"].as_u64().unwrap() > 3_000_000, "{guest}");
    assert!(guest["root_bytes"].as_u64().unwrap() > 7 << 30, "{guest}");
    assert!(guest["net_received_bytes"].is_u64() && guest["uptime_ms"].as_u64().unwrap() > 0, "{guest}");
    // How much of its time an emulated processor gets depends on what else the machine does.
    assert!(busy["guest_cpu_percent"].as_f64().unwrap() > 5.0, "{busy}");
    assert!(busy["host_cpu_percent"].as_f64().unwrap() > 5.0, "{busy}");
    assert!(host["memory_bytes"].as_u64().unwrap() > 50 << 20, "{host}");
    assert!(host["disk_read_bytes"].as_u64().unwrap() > 0, "{host}");
    let shown = owner.json(&["vm", "show", "--json", "busy"]);
    assert_eq!(host["pid"], shown["vmm_pid"]);
    // Every vm that runs.
    let table = owner.ok(["vm", "stats"]);
    let lines: Vec<_> = table.lines().collect();
    assert!(
        lines.len() == 2
            && lines[0].starts_with("NAME  STATE    CPU")
            && lines[1].starts_with("busy  running  ")
    );
    let output = owner.banger(["vm", "stats", "busy", "nobody"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(error(&output).starts_with("error: no vm `nobody`\n"), "{}", show(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("\nbusy  running"));
    // A guest whose agent stands still.
    let freeze = "(sleep 1; for p in /proc/[0-9]*; do if grep -q '^@banger-agent' $p/cmdline; then \
                  kill -STOP ${p#/proc/}; fi; done) > /dev/null 2>&1 &";
    sh(&owner, "busy", freeze);
    wait_for("the agent is silent", || {
        let silent = &owner.json(&["vm", "stats", "--json", "busy"])[0];
        assert!(silent["host"]["memory_bytes"].is_u64(), "{silent}");
        if silent["guest"].is_null() { Ok(()) } else { Err(silent.to_string()) }
    });
    let table = owner.ok(["vm", "stats", "busy"]);
    let row: Vec<_> = table.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[..7], ["busy", "running", "-", "-", "-", "-", "-"], "{table}");
    owner.ok(["vm", "delete", "-f", "busy", "idle"]);
    owner.assert_nothing_left();
}

/// Reads until a text has come.
fn read_until(from: &mut impl std::io::Read, text: &str) -> String {
    let (mut said, mut chunk) = (Vec::new(), [0; 4096]);
    let begun = Instant::now();
    while !String::from_utf8_lossy(&said).contains(text) {
        assert!(begun.elapsed() < Duration::from_secs(60), "{}", String::from_utf8_lossy(&said));
        let len = from.read(&mut chunk).unwrap();
        assert!(len > 0, "it ended: {}", String::from_utf8_lossy(&said));
        said.extend_from_slice(&chunk[..len]);
    }
    String::from_utf8_lossy(&said).into_owned()
}

#[test]
fn the_console_can_be_typed_at() {
    let owner = Owner::with_store();
    let output = {
        owner.ok(["vm", "create", "--no-start", "--name", "con", "--image", IMAGE]);
        owner.banger(["vm", "console", "con"]).output().unwrap()
    };
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        error(&output),
        "error: vm `con` is not running, it is created\nhint: start it with `banger vm start con`\n"
    );
    owner.ok(["vm", "start", "--wait", "boot", "con"]);
    sh(&owner, "con", "echo printed before > /dev/console");
    let attach = || {
        let mut command = owner.banger(["vm", "console", "con"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let (mut typist, mut other) = (attach(), attach());
    let (mut keys, mut screen) = (typist.stdin.take().unwrap(), typist.stdout.take().unwrap());
    read_until(&mut screen, "printed before");
    // What is typed is echoed as well, and has other numbers in it.
    keys.write_all(b"echo $((40 + 2))-from; tty; echo pid $$ $((1 + 1))end\n").unwrap();
    let said = read_until(&mut screen, " 2end");
    assert!(said.contains("42-from\r\n") && said.contains("/dev/ttyS0\r\n"), "{said}");
    // Somebody else sees the same.
    let mut second = other.stdout.take().unwrap();
    read_until(&mut second, "42-from");
    // The end of what is typed ends nothing.
    drop(keys);
    sh(&owner, "con", "echo still here > /dev/console");
    read_until(&mut screen, "still here");
    typist.kill().unwrap();
    typist.wait().unwrap();
    // The shell stays, and the next to come finds it.
    let mut keys = other.stdin.take().unwrap();
    keys.write_all(b"echo the same $$ $((1 + 2))end\n").unwrap();
    let again = read_until(&mut second, " 3end");
    let pid = said.split("pid ").last().unwrap().split(' ').next().unwrap();
    assert!(again.contains(&format!("the same {pid} 3end")), "{said}{again}");
    // It goes on over a reboot, with another shell.
    keys.write_all(b"systemctl reboot\n").unwrap();
    read_until(&mut second, "banger: a root shell");
    keys.write_all(b"echo after $((1 + 1))-\n").unwrap();
    read_until(&mut second, "after 2-");
    owner.ok(["vm", "stop", "con"]);
    let mut rest = String::new();
    second.read_to_string(&mut rest).unwrap();
    assert_eq!(other.wait().unwrap().code(), Some(0), "{rest}");
    // In order: the shell does not hold it up.
    assert!(owner.ok(["vm", "logs", "con"]).contains("Power down"), "{rest}");
    owner.ok(["vm", "delete", "con"]);
    owner.assert_nothing_left();
}
