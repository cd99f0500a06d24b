//! Many vms, one after the other, while somebody kills things at random.
//!
//! `BANGER_SOAK` is how many, 40 as a rule; `BANGER_SOAK_SEED` repeats a run; `BANGER_SOAK_VMM=real` has real vms.

use crate::support::{IMAGE, Owner, show};
use crate::world::{self, is_missing};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

/// Who is killed.
const VICTIMS: [&str; 5] = ["bangerd serve", "bangerd supervise", "qemu-system-", "pasta", "banger vm"];
/// What a daemon's memory may grow by from the tenth vm on, in KiB.
const GROWTH_KIB_MAX: u64 = 8 << 10;

/// Numbers of a linear congruential generator (Knuth's MMIX); nothing depends on how good they are.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

#[test]
fn nothing_is_left_of_many_vms_and_many_killings() {
    let real = std::env::var("BANGER_SOAK_VMM").is_ok_and(|value| value == "real");
    if is_missing() || !(real || world::is_inside("soak::nothing_is_left_of_many_vms_and_many_killings")) {
        return;
    }
    let var = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let cycles = var("BANGER_SOAK").unwrap_or(40);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let seed = var("BANGER_SOAK_SEED").unwrap_or(now);
    let mut random = Random(seed);
    let owner = Owner::with_store();
    if !real {
        world::configure(&owner);
    }
    // What is made once is made first.
    owner.ok(["vm", "run", "--rm", "--image", IMAGE, "--", "true"]);
    let longest = if real { 3000 } else { 400 };
    let (mut killed, mut whole) = (0, 0);
    for cycle in 0..cycles {
        let name = format!("soak-{cycle}");
        let mut command = owner.banger(["vm", "run", "--name", &name, "--image", IMAGE]);
        match random.below(2) {
            0 => drop(command.args(["--rm", "--", "true"])),
            _ => drop(command.arg("-d")),
        }
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(random.below(longest)));
        let victim = VICTIMS[random.below(VICTIMS.len() as u64) as usize];
        if random.below(4) > 0 && kill(&owner, victim) {
            killed += 1;
        }
        let status = child.wait().unwrap();
        if status.success() {
            whole += 1;
        }
        // Whatever has happened: it is there and goes, or has gone.
        let output = owner.banger(["vm", "delete", "--force", &name]).output().unwrap();
        let gone = String::from_utf8_lossy(&output.stderr).contains("no vm");
        assert!(
            output.status.success() || gone,
            "seed {seed}, {cycle}, {victim}: {}{}",
            show(&output),
            owner.logs()
        );
    }
    println!("soak: {cycles} vms, {whole} of them whole, {killed} killings, seed {seed}");
    owner.assert_nothing_left();
    flat(&owner, cycles);
    owner.assert_nothing_left();
}

/// Shows that the daemon's memory does not grow with the vms it has had.
fn flat(owner: &Owner, cycles: u64) {
    let mut first = 0;
    for cycle in 0..cycles {
        owner.ok(["vm", "run", "--rm", "--image", IMAGE, "--", "true"]);
        if cycle == 9 {
            first = memory(owner);
        }
    }
    let last = memory(owner);
    println!("soak: the daemon's memory, after 10 vms {first} KiB, after {cycles} {last} KiB");
    assert!(last < first + GROWTH_KIB_MAX, "{first} KiB became {last} KiB");
}

fn memory(owner: &Owner) -> u64 {
    let processes = owner.processes();
    let line = processes.iter().find(|line| line.contains("bangerd serve")).unwrap();
    let status =
        std::fs::read_to_string(format!("/proc/{}/status", line.split(' ').next().unwrap())).unwrap();
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    rss.trim().split(' ').next().unwrap().parse().unwrap()
}

/// Kills one of the owner's processes, if there is one of this kind.
fn kill(owner: &Owner, victim: &str) -> bool {
    let processes = owner.processes();
    let Some(line) = processes.iter().find(|line| line.contains(victim)) else { return false };
    let pid = line.split(' ').next().unwrap();
    Command::new("kill").args(["-9", pid]).output().unwrap().status.success()
}
