//! The crash simulation: every step of every operation fails once, and is where everything ends once.
//!
//! ```text
//! state as prepared ──> operation, traced, one step broken ──> whoever is left, and a new daemon ──> what must hold
//! ```
//!
//! Programs, store, files, namespaces and network are the real ones; only the VMM is [one that is
//! none](../../src/bin/banger-fake-vmm.rs), put over QEMU's program in a mount namespace of the test's own. Which steps
//! there are is seen, not listed: see [`tracer`].
//!
//! As a rule each step crashes once and fails once, the first time it is done; of operations that are made of others, one
//! of the two, chosen by a seed (`BANGER_SIM_SEED`). With `BANGER_SIM=full` always both, also the last time, and the host
//! goes down at each. `BANGER_SIM_ONLY` picks operations, and `BANGER_SIM_STEP` steps, by a part of their name.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout, reason = "a test")]

#[path = "../e2e/support.rs"]
#[allow(dead_code, reason = "the end-to-end tests need more of it")]
mod support;

mod scenario;
mod soak;
mod tracer;
mod trouble;
mod world;

use scenario::{SCENARIOS, Scenario};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Mutex;
use tracer::{Fault, Kind, Role, Step};
use world::World;

/// Operations at the same time; each has an owner of its own.
const WORKERS: usize = 2;
/// How many steps of which operations are broken with real vms.
const REAL: [(&str, usize); 4] = [("start", 12), ("run", 8), ("stop", 5), ("delete", 5)];

#[test]
fn nothing_is_lost_or_left_whatever_fails() {
    if world::is_missing() || !world::is_inside("nothing_is_lost_or_left_whatever_fails") {
        return;
    }
    let only = std::env::var("BANGER_SIM_ONLY").unwrap_or_default();
    let scenarios = SCENARIOS.iter().filter(|scenario| scenario.name.contains(&only));
    let queue = Mutex::new(scenarios.collect::<VecDeque<_>>());
    let problems = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                loop {
                    let Some(scenario) = queue.lock().unwrap().pop_front() else { return };
                    let found = run(scenario);
                    problems.lock().unwrap().extend(found);
                }
            });
        }
    });
    let problems = problems.into_inner().unwrap();
    assert!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n"));
}

/// Some of it again with vms that are some. `BANGER_SIM_SEED` repeats a choice.
#[test]
fn thirty_steps_of_real_vms() {
    if world::is_missing() {
        return;
    }
    let seed = seed();
    let mut random = soak::Random(seed);
    let mut problems = Vec::new();
    for (name, count) in REAL {
        let scenario = SCENARIOS.iter().find(|scenario| scenario.name == name).unwrap();
        let world = World::new(scenario, true);
        let (trace, found) = world.attempt(None);
        problems.extend(found);
        let mut all: Vec<Fault> =
            trace.steps.iter().flat_map(|(step, count)| faults(step, *count, None)).collect();
        let mut hits = 0;
        for _ in 0..count {
            let fault = all.swap_remove(random.below(all.len() as u64) as usize);
            let (trace, found) = world.attempt(Some(fault));
            hits += u32::from(trace.hit);
            problems.extend(found);
        }
        println!("{name}, real vms: {count} ways, {hits} of them reached, seed {seed}");
    }
    assert!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n"));
}

/// What choices are made of: given, or another each time.
fn seed() -> u64 {
    let now =
        std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap().as_secs();
    std::env::var("BANGER_SIM_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(now)
}

/// Breaks each step of an operation; returns what should not have happened.
fn run(scenario: &'static Scenario) -> Vec<String> {
    let started = std::time::Instant::now();
    let world = World::new(scenario, false);
    let mut problems = Vec::new();
    // Which of two threads comes first differs from run to run, and with it the steps.
    let mut steps: BTreeMap<Step, u32> = BTreeMap::new();
    for _ in 0..2 {
        let (trace, mut found) = world.attempt(None);
        if trace.code != Some(0) {
            found.push(format!("{}: does not work at all", scenario.name));
        }
        problems.extend(found);
        for (step, count) in trace.steps {
            let known = steps.entry(step).or_default();
            *known = count.max(*known);
        }
    }
    if !problems.is_empty() {
        return problems;
    }
    let only = std::env::var("BANGER_SIM_STEP").unwrap_or_default();
    let seed = seed();
    let mut random = soak::Random(seed);
    let (mut runs, mut missed, mut never) = (0, 0, BTreeSet::new());
    let points = steps.len();
    let chosen = steps.into_iter().filter(|(step, _)| format!("{step:?}").contains(&only));
    for (step, count) in chosen {
        let mut reached = false;
        let one_of = scenario.is_made_of_others.then_some(&mut random);
        for fault in faults(&step, count, one_of) {
            runs += 1;
            let (trace, found) = world.attempt(Some(fault));
            if trace.hit {
                reached = true
            } else {
                missed += 1
            }
            // Each is told when it is found: a full run takes long.
            found.iter().for_each(|problem| println!("{problem}"));
            problems.extend(found);
        }
        if !reached {
            never.insert(step);
        }
    }
    println!(
        "{}: {points} steps, broken in {runs} ways, {missed} not reached, {} problems, {:.0} s, seed {seed}",
        scenario.name,
        problems.len(),
        started.elapsed().as_secs_f64()
    );
    if !never.is_empty() {
        println!("{}: steps that only some runs have: {never:?}", scenario.name);
    }
    problems
}

/// The ways a step is broken.
fn faults(step: &Step, count: u32, one_of: Option<&mut soak::Random>) -> Vec<Fault> {
    let full = std::env::var("BANGER_SIM").is_ok_and(|value| value == "full");
    let kinds: &[Kind] = match step.role {
        Role::Daemon | Role::Supervisor | Role::Nft if full => &[Kind::Crash, Kind::Error, Kind::Down],
        Role::Daemon | Role::Supervisor | Role::Nft => &[Kind::Crash, Kind::Error],
        Role::Client | Role::Vmm | Role::Pasta => &[Kind::Crash],
        Role::Other => &[],
    };
    let times = BTreeSet::from([1, if full { count } else { 1 }]);
    let fault = |(nth, kind)| Fault { step: step.clone(), nth, kind };
    let mut all: Vec<Fault> =
        times.into_iter().flat_map(|nth| kinds.iter().map(move |kind| (nth, *kind))).map(fault).collect();
    if let Some(random) = one_of.filter(|_| !full && !all.is_empty()) {
        let chosen = random.below(all.len() as u64) as usize;
        all = vec![all.swap_remove(chosen)];
    }
    all
}
