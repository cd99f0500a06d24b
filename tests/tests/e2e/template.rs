//! Vms that go on from a saved machine instead of booting.

use crate::support::{IMAGE, Owner, show};
use std::collections::HashSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

/// How a vm's start shows in its timings.
const RESTORED: &str = "restore to agent";
const BOOTED: &str = "boot to agent";

fn templates(owner: &Owner) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(owner.state().join("templates")).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// Runs a script in a vm that starts as `how`, and returns what it printed.
fn run(owner: &Owner, how: &str, script: &str) -> String {
    let output = owner
        .banger(["vm", "run", "--rm", "-v", "--memory", "256M", "--image", IMAGE, "--", "sh", "-c", script])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains(how), "not `{how}`: {}{}", show(&output), owner.logs());
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn restored_vms_have_nothing_random_in_common() {
    let owner = Owner::with_store();
    // Addresses of the stack come from the numbers the kernel makes in advance.
    let script = "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid /etc/machine-id; hostname;
        od -An -N16 -tx8 /dev/urandom; grep stack /proc/self/maps";
    let printed: Vec<String> = (0..3).map(|_| run(&owner, RESTORED, script)).collect();
    let lines: Vec<&str> = printed.iter().flat_map(|text| text.lines()).collect();
    assert_eq!(lines.len(), 18, "{printed:#?}");
    assert_eq!(lines.iter().collect::<HashSet<_>>().len(), lines.len(), "{printed:#?}");
    // One was made for all of them, and none of their processes could write it.
    let [template] = &templates(&owner)[..] else { panic!("one template: {:?}", templates(&owner)) };
    let mode = std::fs::metadata(template.join("memory")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o444);
    assert_eq!(std::fs::read_dir(template).unwrap().count(), 2, "memory, and the rest");
    owner.assert_nothing_left();
}

#[test]
fn a_restored_clock_is_right() {
    let owner = Owner::with_store();
    run(&owner, RESTORED, "true");
    std::thread::sleep(std::time::Duration::from_secs(3));
    let before = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    let inside: f64 = run(&owner, RESTORED, "date +%s.%N").trim().parse().unwrap();
    let after = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    assert!(before < inside && inside < after, "{before} {inside} {after}");
    owner.assert_nothing_left();
}

#[test]
fn a_spoilt_template_costs_a_boot_and_no_more() {
    let owner = Owner::with_store();
    run(&owner, RESTORED, "true");
    let memory = templates(&owner)[0].join("memory");
    let whole = std::fs::read(&memory).unwrap();
    std::fs::remove_file(&memory).unwrap();
    std::fs::write(&memory, &whole[..whole.len() / 2]).unwrap();
    std::fs::set_permissions(&memory, std::fs::Permissions::from_mode(0o444)).unwrap();
    assert_eq!(run(&owner, BOOTED, "echo yes"), "yes\n");
    assert_eq!(templates(&owner), Vec::<PathBuf>::new(), "it is not tried again");
    run(&owner, BOOTED, "true");
    // Another daemon makes another one.
    owner.ok(["daemon", "stop"]);
    run(&owner, RESTORED, "true");
    owner.assert_nothing_left();
}

#[test]
fn vms_can_be_made_to_boot() {
    let owner = Owner::with_store();
    let config = owner.home().join(".config/banger");
    std::fs::create_dir_all(&config).unwrap();
    std::fs::write(config.join("config.toml"), "restore = false\n").unwrap();
    run(&owner, BOOTED, "true");
    assert_eq!(templates(&owner), Vec::<PathBuf>::new());
    owner.assert_nothing_left();
}
