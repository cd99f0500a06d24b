//! The config, and what it and a checkout's own file make of vms.

use crate::support::{IMAGE, Owner, is_root, run, show, skip, wait_for};
use insta::assert_snapshot;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Writes the owner's config.
fn configure(owner: &Owner, text: &str) -> PathBuf {
    write(owner, ".config/banger/config.toml", text)
}

/// Writes a file below the owner's home, as the owner.
fn write(owner: &Owner, name: &str, text: &str) -> PathBuf {
    let path = owner.home().join(name);
    run(owner.program("mkdir").arg("-p").arg(path.parent().unwrap()));
    let mut command = owner.program("sh");
    command.args(["-c", "cat > \"$1\"", "sh"]).arg(&path).stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    path
}

/// Status and everything that was said, without what differs from run to run.
fn told(owner: &Owner, output: &Output) -> String {
    show(output).replace(owner.home().to_str().unwrap(), "~")
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", show(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn every_value_says_where_it_comes_from() {
    let owner = Owner::new();
    let path = owner.ok(["config", "path"]);
    assert_eq!(path.trim(), owner.home().join(".config/banger/config.toml").to_str().unwrap());
    configure(&owner, "vmm = \"qemu\"\n\n[vm_defaults]\nmemory = \"600M\"\n");
    let view = owner.json(&["config", "show", "--json"]);
    let of = |key: &str| {
        view["values"].as_array().unwrap().iter().find(|value| value["key"] == key).unwrap().clone()
    };
    assert_eq!((&of("vmm")["source"], &of("vmm")["line"]), (&"file".into(), &1.into()));
    assert_eq!(
        (&of("vm_defaults.memory")["value"], &of("vm_defaults.memory")["line"]),
        (&"600M".into(), &4.into())
    );
    assert_eq!(of("default_image")["source"], "default");
    let table = owner.ok(["config", "show"]);
    let line = table.lines().find(|line| line.starts_with("vm_defaults.memory ")).unwrap();
    assert!(line.contains("\"600M\"") && line.ends_with("config.toml:4"), "{line}");
    // The daemon's environment.
    owner.ok(["daemon", "stop"]);
    let output = owner.banger(["config", "show"]).env("BANGER_LOG", "debug").output().unwrap();
    assert!(text(&output).contains("environment, BANGER_LOG"), "{}", show(&output));

    // Client and daemon find each other where it says.
    owner.ok(["daemon", "stop"]);
    configure(&owner, "state_dir = \"~/elsewhere\"\n");
    owner.ok(["vm", "list"]);
    let dir = owner.json(&["daemon", "status", "--json"])["state_dir"].as_str().unwrap().to_owned();
    assert_eq!(Path::new(&dir), owner.home().join("elsewhere"));
    assert!(owner.home().join("elsewhere/run/bangerd.sock").exists(), "and not only in words");
    owner.ok(["daemon", "stop"]);

    configure(
        &owner,
        "default_imag = 'x'\nvcpu = 2\nauto_stop_after = 'soon'\n[vm_default]\n[[cache]]\npath = 5\n",
    );
    let output = owner.banger(["config", "show"]).output().unwrap();
    let run = owner.vm_run(["--", "true"]);
    assert_snapshot!(format!("{}\n{}", told(&owner, &output), told(&owner, &run)));
    owner.assert_nothing_left();
}

#[test]
fn the_config_says_what_vms_are() {
    let owner = Owner::with_store();
    let ca =
        write(&owner, "ca.pem", "-----BEGIN CERTIFICATE-----\nbWFkZSB1cA==\n-----END CERTIFICATE-----\n");
    let config = format!(
        "default_image = '{IMAGE}'\npass_proxy = true\nca_file = '{}'\n[vm_defaults]\nmemory = '600M'\n\
         disk_size = '1G'\nnet = 'none'\n",
        ca.display()
    );
    configure(&owner, &config);
    let plan = owner.json(&["vm", "run", "--dry-run", "--json"]);
    assert_eq!(
        (&plan["memory"], &plan["disk_size"], &plan["net"]),
        (&600.into(), &1024.into(), &"none".into())
    );
    let plan = owner.json(&["vm", "run", "--dry-run", "--json", "--memory", "700M", "--net", "full"]);
    assert_eq!((&plan["memory"], &plan["net"]), (&700.into(), &"full".into()));
    let script = "echo $http_proxy $NO_PROXY; ls /sys/class/net; grep -c bWFkZSB1cA /etc/ssl/certs/ca-certificates.crt";
    let mut command = owner.banger(["run", "--rm", "--env", "NO_PROXY=mine", "--", "sh", "-c", script]);
    let output = command.env("http_proxy", "http://proxy.example:1").env("NO_PROXY", "b").output().unwrap();
    assert_eq!(text(&output), "http://proxy.example:1 mine\nlo\n1\n");
    // A broken one is said before anything is made.
    write(&owner, "ca.pem", "nothing of the kind");
    let output = owner.banger(["run", "--rm", "--", "true"]).output().unwrap();
    assert_snapshot!(told(&owner, &output));
    owner.assert_nothing_left();
}

#[test]
fn a_vm_that_nobody_uses_stops_by_itself() {
    let owner = Owner::with_store();
    configure(&owner, "auto_stop_after = '1h'\n");
    let state = |name: &str| owner.json(&["vm", "show", "--json", name]);
    owner.ok(["vm", "create", "--image", IMAGE, "--name", "never", "--auto-stop-after", "never"]);
    owner.ok(["vm", "create", "--image", IMAGE, "--name", "later"]);
    assert!(state("never")["auto_stop_at"].is_null());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!(state("later")["auto_stop_at"].as_u64().unwrap() > now + 3000);
    // Longer than its time, but used.
    let script = "echo kept > /root/file; sleep 8; echo done";
    let args = [
        "vm",
        "run",
        "--image",
        IMAGE,
        "--name",
        "soon",
        "--auto-stop-after",
        "5s",
        "--",
        "sh",
        "-c",
        script,
    ];
    assert_eq!(owner.ok(args), "done\n");
    assert!(owner.ok(["vm", "show", "soon"]).contains("stops by itself"), "it is not used any more");
    // The daemon is not what keeps the time.
    owner.ok(["daemon", "stop"]);
    std::thread::sleep(std::time::Duration::from_secs(6));
    wait_for("the vm has stopped", || {
        let state = state("soon")["state"].as_str().unwrap().to_owned();
        if state == "stopped" { Ok(()) } else { Err(state) }
    });
    assert_eq!(state("later")["state"], "running");
    owner.ok(["vm", "start", "soon"]);
    assert_eq!(owner.ok(["exec", "soon", "--", "cat", "/root/file"]), "kept\n", "it was stopped in order");
    // With `--rm` the lease is what ends it.
    let output = owner.vm_run(["--auto-stop-after", "1s", "--", "sleep", "3"]);
    assert!(output.status.success(), "{}", show(&output));
    owner.ok(["vm", "delete", "-f", "never", "later", "soon"]);
    owner.assert_nothing_left();
}

#[test]
fn files_of_the_owner_are_there_at_each_start() {
    let owner = Owner::with_store();
    let config = "[[file_sync]]\nhost = '~/.gitconfig'\n[[file_sync]]\nhost = '~/dots'\nguest = '/etc/dots/'\n\
                  mode = '600'\n[[file_sync]]\nhost = '~/outside'\n[[file_sync]]\nhost = '~/missing'\n";
    configure(&owner, config);
    write(&owner, ".gitconfig", "first");
    write(&owner, "dots/sub/file", "in a directory");
    run(owner.program("chmod").arg("640").arg(owner.home().join(".gitconfig")));
    run(owner.program("ln").args(["-s", "/etc/hostname"]).arg(owner.home().join("outside")));
    let output = owner.banger(["vm", "run", "-d", "--image", IMAGE, "--name", "synced"]).output().unwrap();
    assert_snapshot!(told(&owner, &output));
    let look = "stat -c '%a %u %n' /root/.gitconfig /etc/dots/sub/file; cat /root/.gitconfig; ! ls -A /root | grep banger";
    assert_eq!(
        owner.ok(["exec", "synced", "--", "sh", "-c", look]),
        "640 0 /root/.gitconfig\n600 0 /etc/dots/sub/file\nfirst"
    );
    // What the guest made of it counts for nothing at its next start, and its links lead nowhere on the host.
    let attack = "echo other > /root/target; ln -sf /root/target /root/.gitconfig; sync";
    owner.ok(["exec", "synced", "--", "sh", "-c", attack]);
    write(&owner, ".gitconfig", "second");
    owner.ok(["vm", "restart", "synced"]);
    let look = "cat /root/.gitconfig /root/target; test -L /root/.gitconfig || echo plain";
    assert_eq!(owner.ok(["exec", "synced", "--", "sh", "-c", look]), "secondother\nplain\n");
    owner.ok(["vm", "delete", "-f", "synced"]);
    owner.assert_nothing_left();
}

/// Runs a command in a vm that goes afterwards, with a cache at `/root/c`.
fn with_cache(owner: &Owner, script: &str) -> Output {
    owner.vm_run(["--cache", "c:/root/c", "--", "sh", "-c", script])
}

#[test]
fn a_cache_outlives_its_vms() {
    let owner = Owner::with_store();
    let written =
        with_cache(&owner, "mkdir -p /root/c/a && seq 100000 > /root/c/a/b && findmnt -no FSTYPE /root/c");
    assert_eq!(text(&written), "ext4\n");
    let read = with_cache(&owner, "md5sum < /root/c/a/b; ls -A /root/c");
    let expected = run(Command::new("sh").args(["-c", "seq 100000 | md5sum"]));
    assert!(text(&read).starts_with(&expected), "{}", show(&read));

    // One vm at a time.
    owner.ok(["vm", "run", "-d", "--image", IMAGE, "--name", "holder", "--cache", "c:/root/.cache/x"]);
    let second = with_cache(&owner, "true");
    let pruned = owner.banger(["cache", "prune", "c"]).output().unwrap();
    let place = owner.vm_run(["--cache", "d:/proc/x", "--", "true"]);
    let word = owner.vm_run(["--cache", "d", "--", "true"]);
    let said: Vec<String> = [second, pruned, place, word].iter().map(|output| told(&owner, output)).collect();
    assert_snapshot!(said.join("\n"));
    assert_eq!(owner.ok(["cache", "prune", "--dry-run"]), "nothing to prune\n", "the one there is in use");
    let list = owner.json(&["cache", "list", "--json"]);
    assert_eq!((&list[0]["name"], &list[0]["used_by"]), (&"c".into(), &"holder".into()));
    assert!(owner.ok(["vm", "show", "holder"]).contains("c at /root/.cache/x"));
    assert!(owner.json(&["cache", "list", "--json"])[0]["disk_bytes"].as_u64().unwrap() > 100_000);

    // A machine that loses its power has what was synced, and the next one can use it.
    let write =
        "echo synced > /root/.cache/x/s; sync; for i in $(seq 2000); do echo $i > /root/.cache/x/n$i; done";
    owner.ok(["exec", "holder", "--", "sh", "-c", write]);
    let supervisor =
        owner.processes().into_iter().filter(|line| line.contains("supervise") || line.contains("qemu"));
    let pids: Vec<String> = supervisor.map(|line| line.split(' ').next().unwrap().to_owned()).collect();
    // Whoever goes with the first is gone by then.
    Command::new("kill").arg("-9").args(&pids).output().unwrap();
    wait_for("the cache is free", || {
        let used = owner.json(&["cache", "list", "--json"])[0]["used_by"].clone();
        if used.is_null() { Ok(()) } else { Err(used.to_string()) }
    });
    let read =
        with_cache(&owner, "cat /root/c/s; echo more >> /root/c/s; dmesg | grep -ci 'ext4-fs error' || true");
    assert_eq!(text(&read), "synced\n0\n");

    owner.ok(["vm", "delete", "-f", "holder"]);
    assert!(owner.ok(["cache", "prune", "--dry-run"]).starts_with("would delete c\nwould free "));
    assert!(owner.ok(["cache", "prune"]).starts_with("deleted c\nfreed "));
    assert_eq!(owner.ok(["cache", "list", "--json"]), "[]\n");
    assert_eq!(std::fs::read_dir(owner.state().join("caches")).unwrap().count(), 0);
    owner.assert_nothing_left();
}

#[test]
fn a_cache_goes_from_user_to_user_of_roots_vms() {
    if !is_root() {
        return skip("a_cache_goes_from_user_to_user_of_roots_vms: only root has vms of several users");
    }
    let owner = Owner::root();
    owner.copy_store();
    // Another vm at the same time, so that the next one is another user's.
    let written = with_cache(&owner, "echo kept > /root/c/file");
    assert!(written.status.success(), "{}", show(&written));
    owner.ok(["vm", "create", "--no-start", "--image", IMAGE, "--name", "between"]);
    assert_eq!(text(&with_cache(&owner, "cat /root/c/file")), "kept\n");
    owner.ok(["vm", "delete", "between"]);
    owner.assert_nothing_left();
}

#[test]
fn what_a_vm_wrote_to_its_cache_is_there_however_it_ended() {
    let owner = Owner::with_store();
    configure(&owner, "[[cache]]\nname = 'all'\npath = '/srv/all'\n");
    // Nothing but banger syncs here: of a `--rm` vm, of one that is killed, of one that is stopped, of one that reboots.
    let first = owner.vm_run(["--", "sh", "-c", "echo 1 > /srv/all/1"]);
    assert!(first.status.success(), "{}", show(&first));
    owner.ok(["vm", "run", "-d", "--image", IMAGE, "--name", "a"]);
    let mut command = owner.banger(["vm", "run", "-d", "--image", IMAGE, "--name", "without"]);
    let without = command.output().unwrap();
    assert_snapshot!(told(&owner, &without));
    owner.ok(["vm", "delete", "-f", "without"]);
    owner.ok(["exec", "a", "--", "sh", "-c", "echo 2 > /srv/all/2"]);
    owner.ok(["vm", "kill", "a"]);
    owner.ok(["vm", "start", "a"]);
    owner.ok(["exec", "a", "--", "sh", "-c", "echo 3 > /srv/all/3"]);
    owner.ok(["vm", "stop", "a"]);
    let read = owner.vm_run(["--", "sh", "-c", "cat /srv/all/1 /srv/all/2 /srv/all/3"]);
    assert_eq!(text(&read), "1\n2\n3\n");
    owner.ok(["vm", "delete", "a"]);
    owner.assert_nothing_left();
}

/// Makes a checkout of the owner's with these files.
fn checkout(owner: &Owner, name: &str, files: &[(&str, &str)]) -> PathBuf {
    let dir = owner.home().join(name);
    for (file, content) in files {
        write(owner, &format!("{name}/{file}"), content);
    }
    let script = "git init -q . && git add -A && git -c user.name=a -c user.email=a@b commit -qm 1";
    run(owner.program("sh").args(["-c", script]).current_dir(&dir));
    dir
}

#[test]
fn a_checkout_goes_back_into_its_vm() {
    let owner = Owner::with_store();
    let repo = checkout(&owner, "repo", &[("file", "one\n"), ("sub/x", "")]);
    let again = |args: &[&str]| {
        let path = repo.to_str().unwrap();
        let line = [&["vm", "run", path, "--reuse", "--image", IMAGE][..], args].concat();
        owner.banger(line).output().unwrap()
    };
    assert_eq!(text(&again(&["--", "sh", "-c", "cat file; echo built > /root/built"])), "one\n");
    let vms = owner.json(&["vm", "list", "--json"]);
    assert_eq!(vms.as_array().unwrap().len(), 1);
    let name = vms[0]["name"].as_str().unwrap().to_owned();
    write(&owner, "repo/file", "two\n");
    let output = again(&["--", "cat", "file", "/root/built"]);
    assert_eq!(text(&output), "two\nbuilt\n");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("`--image` is for new ones"),
        "{}",
        show(&output)
    );
    // Stopped, and from a directory below.
    owner.ok(["vm", "stop", &name]);
    let sub = repo.join("sub");
    let output = owner.banger(["run", sub.to_str().unwrap(), "--reuse", "--", "pwd"]).output().unwrap();
    assert_eq!(text(&output), "/root/repo/sub\n");
    // What was changed there stays, and a warning says so.
    owner.ok(["exec", &name, "--", "sh", "-c", "echo guest > /root/repo/file"]);
    write(&owner, "repo/file", "three\n");
    let output = again(&["--", "cat", "file"]);
    assert_eq!(text(&output), "guest\n");
    assert_snapshot!(told(&owner, &output).replace(&name, "NAME"));
    assert_eq!(owner.json(&["vm", "list", "--json"]).as_array().unwrap().len(), 1);
    // Another checkout has a vm of its own.
    let other = checkout(&owner, "other", &[("file", "other\n")]);
    let other = other.to_str().unwrap();
    assert_eq!(owner.ok(["run", other, "--reuse", "--image", IMAGE, "--", "cat", "file"]), "other\n");
    assert_eq!(owner.json(&["vm", "list", "--json"]).as_array().unwrap().len(), 2);
    let without = owner.banger(["run", "--reuse", "--", "true"]).output().unwrap();
    let contradicts = owner.banger(["run", other, "--reuse", "--rm", "--", "true"]).output().unwrap();
    assert_snapshot!(format!("{}\n{}", told(&owner, &without), told(&owner, &contradicts)));
}

#[test]
fn a_checkout_says_what_its_vm_is_made_of_and_no_more() {
    let owner = Owner::with_store();
    let own = format!("image = '{IMAGE}'\nmemory = '600M'\nnet = 'none'\n");
    let repo = checkout(&owner, "repo", &[(".banger.toml", &own)]);
    let path = repo.to_str().unwrap();
    let output = owner.banger(["-v", "run", "--rm", path, "--", "ls", "/sys/class/net"]).output().unwrap();
    assert_eq!(text(&output), "lo\n");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let line = said.lines().find(|line| line.starts_with("vm ")).unwrap();
    assert!(line.ends_with(", no network; image, memory, net from .banger.toml"), "{line}");
    assert!(line.contains(", 600 MiB,"), "{line}");
    let output =
        owner.banger(["-v", "run", "--rm", path, "--memory", "512M", "--", "true"]).output().unwrap();
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("; image, net from .banger.toml"),
        "{}",
        show(&output)
    );
    let args = ["-v", "run", "--rm", path, "--no-project-config", "--image", IMAGE, "--", "true"];
    let output = owner.banger(args).output().unwrap();
    assert!(!String::from_utf8_lossy(&output.stderr).contains(".banger.toml"), "{}", show(&output));

    let mut said = Vec::new();
    let mut refused = |text: &str| {
        write(&owner, "repo/.banger.toml", text);
        let output = owner.banger(["run", "--rm", path, "--", "true"]).output().unwrap();
        assert_eq!(output.status.code(), Some(125));
        said.push(told(&owner, &output));
    };
    refused("net = 'full'\n");
    refused("imagee = 'x'\nvmm = 'qemu'\n[[file_sync]]\nhost = '~/.ssh/id_ed25519'\n");
    refused("image = 'oci:/home/somebody/layout'\n");
    refused("image = \"\\u001b[2J\"\n");
    // Nobody listens on port 1, so nothing is pulled; that it would be is said first.
    refused("image = 'localhost:1/a/b'\n");
    run(owner.program("ln").args(["-sf", "/etc/passwd", ".banger.toml"]).current_dir(&repo));
    let output = owner.banger(["run", "--rm", path, "--", "true"]).output().unwrap();
    said.push(told(&owner, &output));
    assert_snapshot!(said.join("\n"));
    owner.assert_nothing_left();
}

#[test]
fn stopping_all_loses_nothing() {
    let owner = Owner::with_store();
    for name in ["a", "b"] {
        owner.ok(["vm", "run", "-d", "--image", IMAGE, "--name", name]);
        owner.ok(["exec", name, "--", "sh", "-c", "echo kept > /root/file"]);
    }
    owner.ok(["vm", "create", "--no-start", "--image", IMAGE, "--name", "idle"]);
    // Also when it is the vms alone that run.
    owner.ok(["daemon", "stop"]);
    let said = owner.ok(["daemon", "stop", "--all"]);
    let mut lines: Vec<&str> = said.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["stopped a", "stopped b", "stopped bangerd"]);
    assert_eq!(owner.processes(), Vec::<String>::new());
    let log = std::fs::metadata(owner.state().join("banger.db-wal"));
    assert_eq!(log.map_or(0, |log| log.len()), 0, "the store is one file");
    for name in ["a", "b"] {
        assert_eq!(owner.json(&["vm", "show", "--json", name])["state"], "stopped");
    }
    owner.ok(["vm", "start", "a"]);
    assert_eq!(owner.ok(["exec", "a", "--", "cat", "/root/file"]), "kept\n");
    owner.ok(["vm", "delete", "-f", "a", "b", "idle"]);
    owner.assert_nothing_left();
}

#[test]
fn the_unit_is_what_it_is_said_to_be() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let unit = std::fs::read_to_string(root.join("packaging/systemd/user/bangerd.service")).unwrap();
    for line in ["KillMode=process", "Delegate=yes", "WantedBy=default.target"] {
        assert!(unit.lines().any(|found| found == line), "{line}");
    }
    assert!(unit.contains("daemon stop --all"), "{unit}");
}
