//! Benchmarks: ratios within one run, because absolute times say more about a machine than about banger.

use crate::bare::Floor;
use crate::programs::{Built, Profile, Store};
use anyhow::{Context as _, bail};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const IMAGE: &str = "debian-bookworm-slim";
/// Runs of each kind; the median counts.
const RUNS: usize = 11;
/// Runs of what takes long.
const STOPS: usize = 5;
/// How long an emulated guest may be busy after its boot.
const REST: Duration = Duration::from_secs(10);
/// The config of a store whose vms boot.
const NO_RESTORE: &str = "restore = false\n";
/// The machine both sides get.
const VCPU: u32 = 1;
const MEMORY_MIB: u64 = 512;

/// `vm run --rm -- true` against the same VMM and kernel with a bare `/init` that powers off, `vm exec`, and
/// `vm stop`.
pub(crate) fn run() -> anyhow::Result<()> {
    let built = Built::new(Profile::Release)?;
    let store = built.store(&[IMAGE])?;
    let memory = format!("{MEMORY_MIB}M");
    let vcpu = VCPU.to_string();
    let vm = ["--image", IMAGE, "--memory", &memory, "--vcpu", &vcpu];
    let warm = [&["vm", "run", "--rm"][..], &vm, &["--", "true"]].concat();
    let floor = Floor::new(&store, VCPU, MEMORY_MIB)?;
    // Warm: kernel and image in the page cache, the daemon runs, no vm does.
    store.ok(&warm)?;
    timed(|| floor.boot())?;
    let (mut ours, mut bare, mut booted) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        bare.push(timed(|| floor.boot())?);
        ours.push(timed(|| store.ok(&warm).map(drop))?);
        store.configure(NO_RESTORE)?;
        booted.push(timed(|| store.ok(&warm).map(drop))?);
        store.configure("")?;
    }
    let exec = exec_times(&store, &vm)?;
    let stop = stop_times(&store, &vm)?;
    let ratios = |times: &[Duration]| -> Vec<f64> {
        times.iter().zip(&bare).map(|(a, b)| a.as_secs_f64() / b.as_secs_f64()).collect()
    };
    println!("bare /init that powers off   {}", spread(&seconds(&bare), "s"));
    println!("vm run --rm -- true          {}", spread(&seconds(&ours), "s"));
    println!("  ratio, pair by pair        {}   budget 1.25", spread(&ratios(&ours), "x"));
    println!("the same, booting            {}", spread(&seconds(&booted), "s"));
    println!("  ratio, pair by pair        {}", spread(&ratios(&booted), "x"));
    println!("vm exec -- true              {}", spread(&milliseconds(&exec.0), "ms"));
    println!("  fork and exec in the guest {}", spread(&milliseconds(&exec.1), "ms"));
    println!("vm stop, with systemd        {}   budget 2 s", spread(&seconds(&stop), "s"));
    Ok(())
}

/// Boots many vms with all processors busy and counts those that had to be started again. None goes on from a saved
/// machine.
pub(crate) fn boots(count: usize) -> anyhow::Result<()> {
    let store = Built::new(Profile::Release)?.store(&[IMAGE])?;
    store.configure(NO_RESTORE)?;
    let done = Arc::new(AtomicBool::new(false));
    let processors = std::thread::available_parallelism().map_or(2, |n| n.get());
    let load: Vec<_> = (0..processors)
        .map(|_| {
            std::thread::spawn({
                let done = Arc::clone(&done);
                move || {
                    while !done.load(Ordering::Relaxed) {
                        std::hint::spin_loop()
                    }
                }
            })
        })
        .collect();
    let (mut times, mut restarts, mut failed) = (Vec::new(), 0, Vec::new());
    for number in 1..=count {
        let started = Instant::now();
        let name = format!("boot-{number}");
        let args = [
            "vm", "create", "--json", "--wait", "agent", "--memory", "256M", "--name", &name, "--image",
            IMAGE,
        ];
        match store.ok(&args) {
            Ok(output) => {
                let vm: serde_json::Value = serde_json::from_slice(&output.stdout)?;
                restarts += vm["watchdog_restarts"].as_u64().context("no `watchdog_restarts`")?;
                times.push(started.elapsed());
            }
            Err(error) => failed.push(format!("{name}: {error:#}")),
        }
        store.ok(&["vm", "delete", "-f", &name])?;
        if number % 20 == 0 {
            println!("{number} boots, {} failed, {restarts} watchdog restarts", failed.len());
        }
    }
    done.store(true, Ordering::Relaxed);
    load.into_iter().for_each(|thread| drop(thread.join()));
    println!("boots under load             {}", spread(&seconds(&times), "s"));
    println!(
        "{} of {count} boots, {restarts} watchdog restarts (at most {})",
        times.len(),
        count.div_ceil(100)
    );
    if failed.is_empty() { Ok(()) } else { bail!("failed:\n{}", failed.join("\n")) }
}

/// Times `vm exec -- true`, and what starting a program costs within the guest.
fn exec_times(store: &Store, vm: &[&str]) -> anyhow::Result<(Vec<Duration>, Vec<Duration>)> {
    let create = [&["vm", "create", "--name", "bench", "--wait", "boot"][..], vm].concat();
    store.ok(&create)?;
    let exec = ["vm", "exec", "bench", "--", "true"];
    store.ok(&exec)?;
    let outside = (0..RUNS).map(|_| timed(|| store.ok(&exec).map(drop))).collect::<Result<_, _>>()?;
    // bash reads a clock without starting anything.
    let script = "for i in 1 2 3 4 5 6 7 8 9 10 11; do a=${EPOCHREALTIME/./}; /bin/true; b=${EPOCHREALTIME/./}; echo $((b-a)); done";
    let output = store.ok(&["vm", "exec", "bench", "--", "bash", "-c", script])?;
    let inside = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| line.parse().map(Duration::from_micros))
        .collect::<Result<_, _>>()?;
    store.ok(&["vm", "delete", "-f", "bench"])?;
    Ok((outside, inside))
}

/// Times `vm stop` of a guest that has come to rest after its boot.
fn stop_times(store: &Store, vm: &[&str]) -> anyhow::Result<Vec<Duration>> {
    store.ok(&[&["vm", "create", "--name", "stop", "--no-start"][..], vm].concat())?;
    let mut times = Vec::new();
    for _ in 0..STOPS {
        store.ok(&["vm", "start", "--wait", "boot", "stop"])?;
        std::thread::sleep(REST);
        times.push(timed(|| store.ok(&["vm", "stop", "stop"]).map(drop))?);
    }
    store.ok(&["vm", "delete", "stop"])?;
    Ok(times)
}

fn timed(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Duration> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed())
}

fn seconds(times: &[Duration]) -> Vec<f64> {
    times.iter().map(Duration::as_secs_f64).collect()
}

fn milliseconds(times: &[Duration]) -> Vec<f64> {
    times.iter().map(|time| time.as_secs_f64() * 1000.0).collect()
}

/// Minimum, median and maximum.
pub(crate) fn spread(values: &[f64], unit: &str) -> String {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.first(), sorted.get(sorted.len() / 2), sorted.last()) {
        (Some(least), Some(median), Some(most)) => {
            format!("median {median:.2} {unit} ({least:.2} to {most:.2}, {} runs)", sorted.len())
        }
        _ => "no runs".to_owned(),
    }
}
