//! Bad input and broken machines: the whole text of each error, and nothing left behind.

use crate::support::{IMAGE, Owner, run};
use insta::assert_snapshot;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use std::process::{Command, Output};

/// The status and what was said, with what differs from run to run replaced.
fn told(owner: &Owner, output: &Output) -> String {
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    let text = String::from_utf8_lossy(&output.stderr).replace(owner.home().to_str().unwrap(), "~");
    format!("status {}\n{text}", output.status.code().unwrap())
}

/// Runs `banger`, which has to fail, and returns what was asked and what was said.
fn fail(owner: &Owner, args: &[&str]) -> String {
    let output = owner.banger(args).output().unwrap();
    assert!(!output.status.success(), "{args:?}");
    format!("$ banger {}\n{}\n", args.join(" "), told(owner, &output))
}

#[test]
fn requests_that_can_not_be_met() {
    let owner = Owner::with_store();
    owner.ok(["vm", "create", "--no-start", "--name", "idle", "--image", IMAGE]);
    let run = |args: &[&str]| fail(&owner, &[&["vm", "run", "--rm", "--image"][..], args].concat());
    let said = [
        run(&["Not//An Image", "--", "true"]),
        // Nobody listens on port 1.
        run(&["localhost:1/debian:test", "--", "true"]),
        run(&[IMAGE, "--memory", "1M", "--", "true"]),
        run(&[IMAGE, "--vcpu", "500", "--", "true"]),
        run(&[IMAGE, "--name", "No_Good", "--", "true"]),
        run(&[IMAGE, "--name", "idle", "--", "true"]),
        run(&[IMAGE, "-d"]),
        run(&[IMAGE, "--kernel-ref", "generic-1.0", "--", "true"]),
        fail(&owner, &["kernel", "pull", "generic-1.0"]),
        fail(&owner, &["image", "delete", "nothing"]),
        fail(&owner, &["image", "delete", IMAGE]),
        fail(&owner, &["vm", "show", "nobody"]),
        fail(&owner, &["vm", "exec", "nobody", "--", "true"]),
        fail(&owner, &["vm", "exec", "idle", "--", "true"]),
    ];
    let said = said.concat();
    let memory = said.split_once(" MiB to ").unwrap().1.split_once(" on this").unwrap().0.to_owned();
    assert_snapshot!(said.replace(&memory, "[all memory]"));
    owner.ok(["vm", "delete", "idle"]);
    owner.assert_nothing_left();
}

#[test]
fn a_disk_without_room() {
    let owner = Owner::new();
    run(owner.program("mkdir").args(["-p", "-m", "700"]).arg(owner.state()));
    let archive = owner.home().join("large.tar");
    docker_archive(&archive, 24 << 20);
    // A small disk that is there for these commands only.
    let script = format!(
        "mount -t tmpfs -o size=16m,mode=700 none {state} && banger image load -i {archive}; echo $?
        ls -A {state}/images {state}/templates; banger image list; banger daemon stop",
        state = owner.state().display(),
        archive = archive.display()
    );
    let mut command = owner.program("unshare");
    let command = command.args(["-Um", "--map-current-user", "--keep-caps", "sh", "-c", &script]);
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    assert_snapshot!(String::from_utf8_lossy(&text).replace(owner.home().to_str().unwrap(), "~"));
}

/// An image of one file, as `docker save` writes it.
pub(crate) fn docker_archive(path: &std::path::Path, len: usize) {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    // Nothing that a filesystem could leave out.
    std::fs::write(at("file"), (0..len).map(|i| (i * 31 / 7) as u8 | 1).collect::<Vec<_>>()).unwrap();
    let tar = |archive: &std::path::Path, names: &[&str]| {
        run(Command::new("tar")
            .args(["--mtime=@0", "--owner=0", "--group=0", "--mode=0644", "-cf"])
            .arg(archive)
            .arg("-C")
            .arg(dir.path())
            .args(names));
    };
    tar(&at("layer.tar"), &["file"]);
    let layer = std::fs::read(at("layer.tar")).unwrap();
    let digest: String = Sha256::digest(&layer).iter().map(|byte| format!("{byte:02x}")).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]}
    });
    std::fs::write(at("config.json"), config.to_string()).unwrap();
    let manifest = json!([{"Config": "config.json", "RepoTags": ["large:1"], "Layers": ["layer.tar"]}]);
    std::fs::write(at("manifest.json"), manifest.to_string()).unwrap();
    tar(path, &["manifest.json", "config.json", "layer.tar"]);
}

#[test]
fn machines_that_are_not_ready() {
    let owner = Owner::with_store();
    // A path with banger's own programs and none of the system's. The full name of `env` is what still finds it.
    let bin = run(owner.program("sh").args(["-c", "dirname $(command -v banger)"]));
    let mut command = owner.program("/usr/bin/env");
    command.arg(format!("PATH={}", bin.trim())).args(["banger", "vm", "run", "--rm", "--image", IMAGE]);
    let output = command.args(["--", "true"]).output().unwrap();
    let mut said = format!("no vmm: {}\n", told(&owner, &output));
    owner.ok(["daemon", "stop"]);

    run(Command::new("chmod").arg("755").arg(owner.state()));
    said += &format!("a state directory open to others: {}", fail(&owner, &["vm", "list"]));
    run(Command::new("chmod").arg("700").arg(owner.state()));

    let output = owner.banger(["vm", "list"]).env("BANGER_STATE_DIR", "/proc/nowhere").output().unwrap();
    said += &format!("no place for a state directory: {}\n", told(&owner, &output));

    let script = "import sqlite3, sys\nsqlite3.connect(sys.argv[1]).execute('pragma user_version = 99')";
    run(owner.program("python3").args(["-c", script]).arg(owner.state().join("banger.db")));
    said += &format!("a store of the future: {}", fail(&owner, &["vm", "list"]));
    assert_snapshot!(said);
}
