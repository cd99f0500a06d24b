//! Bad input and broken machines: the whole text of each error, and nothing left behind.

use crate::support::{IMAGE, Owner, run};
use insta::assert_snapshot;
use std::process::{Command, Output};

/// The status and what was said, with what differs from run to run replaced.
fn told(owner: &Owner, output: &Output) -> String {
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    let text = String::from_utf8_lossy(&output.stderr).replace(owner.home().to_str().unwrap(), "~");
    format!("status {}\n{text}", output.status.code().unwrap())
}

fn fail(owner: &Owner, args: &[&str]) -> String {
    told(owner, &owner.banger(args).output().unwrap())
}

#[test]
fn requests_that_can_not_be_met() {
    let owner = Owner::with_store();
    assert_snapshot!(fail(&owner, &["vm", "run", "--image", "Not//An Image", "--", "true"]));
    assert_snapshot!(fail(&owner, &["vm", "run", "--name", "No_Good", "--", "true"]));
    assert_snapshot!(fail(&owner, &["vm", "run", "--image", IMAGE, "--memory", "1M", "--rm", "--", "true"]));
    assert_snapshot!(fail(&owner, &["vm", "run", "--image", IMAGE, "--vcpu", "500", "--rm", "--", "true"]));
    assert_snapshot!(fail(&owner, &["vm", "run", "-d", "--rm"]));
    assert_snapshot!(fail(&owner, &["kernel", "pull", "generic-1.0"]));
    assert_snapshot!(fail(&owner, &["vm", "exec", "nobody", "--", "true"]));
    assert_snapshot!(fail(&owner, &["image", "delete", "nothing"]));
    // Nobody listens on port 1.
    assert_snapshot!(fail(&owner, &["vm", "run", "--image", "localhost:1/debian:test", "--", "true"]));
    owner.ok(["vm", "create", "--no-start", "--name", "user", "--image", IMAGE]);
    assert_snapshot!(fail(&owner, &["image", "delete", IMAGE]));
    assert_snapshot!(fail(&owner, &["vm", "create", "--no-start", "--name", "user", "--image", IMAGE]));
    assert_snapshot!(fail(&owner, &["vm", "exec", "user", "--", "true"]));
    owner.ok(["vm", "delete", "user"]);
    owner.assert_nothing_left();
}

#[test]
fn machines_that_are_not_ready() {
    let owner = Owner::with_store();
    let path = format!("{}/empty", owner.home().display());
    run(owner.program("mkdir").arg(&path));
    // Programs of banger's own, none of the system's.
    for name in ["banger", "bangerd"] {
        let from = run(owner.program("sh").args(["-c", "command -v \"$1\"", "-", name]));
        run(owner.program("ln").args(["-s", from.trim(), &format!("{path}/{name}")]));
    }
    let output =
        owner.banger(["vm", "run", "--rm", "--image", IMAGE, "--", "true"]).env("PATH", &path).output();
    assert_snapshot!("no_vmm", told(&owner, &output.unwrap()));
    owner.ok(["daemon", "stop"]);

    run(Command::new("chmod").arg("755").arg(owner.state()));
    assert_snapshot!("open_state_directory", fail(&owner, &["vm", "list"]));
    run(Command::new("chmod").arg("700").arg(owner.state()));

    let output = owner.banger(["vm", "list"]).env("BANGER_STATE_DIR", "/proc/nowhere").output().unwrap();
    assert_snapshot!("no_state_directory", told(&owner, &output));

    let store = owner.state().join("banger.db");
    run(owner
        .program("python3")
        .arg("-c")
        .arg("import sqlite3, sys\nsqlite3.connect(sys.argv[1]).execute('pragma user_version = 99')")
        .arg(&store));
    assert_snapshot!("store_of_the_future", fail(&owner, &["vm", "list"]));
}
