//! Many vms: at once, and in the store.

use crate::bench::spread;
use crate::programs::{Built, Profile, Store};
use anyhow::{Context as _, bail};
use std::sync::Mutex;
use std::time::Instant;

const IMAGE: &str = "debian-bookworm-slim";
/// Starts at the same time.
const PARALLEL: usize = 8;
/// Vms in the store that do not run.
const STORED: usize = 1000;
/// Times that `vm list` is measured.
const LISTS: usize = 11;

/// Runs `count` small vms at once and uses each, then fills the store with a thousand more.
pub(crate) fn run(profile: Profile, count: usize) -> anyhow::Result<()> {
    let store = Built::new(profile)?.store(&[IMAGE])?;
    let small = ["--image", IMAGE, "--memory", "128M", "--vcpu", "1", "--net", "none"];
    store.ok(&[&["vm", "run", "--rm"][..], &small, &["--", "true"]].concat())?;
    let before = available_mib()?;
    let started = Instant::now();
    each(count, |number| {
        let name = format!("crowd-{number}");
        store.ok(&[&["vm", "run", "-d", "--name", &name][..], &small].concat()).map(drop)
    })?;
    println!("{count} vms up, {PARALLEL} at a time   {:.1} s", started.elapsed().as_secs_f64());
    let started = Instant::now();
    each(count, |number| store.ok(&["vm", "exec", &format!("crowd-{number}"), "--", "true"]).map(drop))?;
    println!("a command in each         {:.1} s", started.elapsed().as_secs_f64());
    println!("memory of the host in use {} MiB a vm", before.saturating_sub(available_mib()?) / count as u64);
    println!("vm list                   {}", lists(&store)?);
    let started = Instant::now();
    each(count, |number| store.ok(&["vm", "delete", "-f", &format!("crowd-{number}")]).map(drop))?;
    println!("all deleted               {:.1} s", started.elapsed().as_secs_f64());
    let started = Instant::now();
    each(STORED, |number| {
        let name = format!("stored-{number}");
        store.ok(&[&["vm", "create", "--no-start", "--name", &name][..], &small].concat()).map(drop)
    })?;
    let each_ms = started.elapsed().as_secs_f64() * 1000.0 * PARALLEL as f64 / STORED as f64;
    println!("{STORED} vms created         {each_ms:.0} ms each, {PARALLEL} at a time");
    println!("vm list                   {}   budget 20 ms", lists(&store)?);
    let started = Instant::now();
    store.ok(&["vm", "prune", "-f"])?;
    println!("all pruned                {:.1} s", started.elapsed().as_secs_f64());
    let left = std::fs::read_dir(store.path().join("vms"))?.count();
    if left > 0 { bail!("{left} directories are left") } else { Ok(()) }
}

/// Does something for each number, some at a time.
fn each(count: usize, work: impl Fn(usize) -> anyhow::Result<()> + Sync) -> anyhow::Result<()> {
    let (next, failed) = (Mutex::new(0), Mutex::new(Vec::new()));
    let take = || {
        let mut next = next.lock().ok()?;
        let number = Some(*next).filter(|number| *number < count)?;
        *next += 1;
        Some(number)
    };
    std::thread::scope(|scope| {
        for _ in 0..PARALLEL {
            scope.spawn(|| {
                while let Some(number) = take() {
                    if let Err(error) = work(number)
                        && let Ok(mut failed) = failed.lock()
                    {
                        failed.push(format!("{error:#}"));
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_default();
    if failed.is_empty() { Ok(()) } else { bail!("{} failed:\n{}", failed.len(), failed.join("\n")) }
}

fn lists(store: &Store) -> anyhow::Result<String> {
    let mut times = Vec::new();
    for _ in 0..LISTS {
        let started = Instant::now();
        store.ok(&["vm", "list"])?;
        times.push(started.elapsed().as_secs_f64() * 1000.0);
    }
    Ok(spread(&times, "ms"))
}

/// What the kernel says could be had for new programs.
fn available_mib() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).context("no MemAvailable")?;
    Ok(line.trim().split(' ').next().unwrap_or_default().parse::<u64>()? / 1024)
}
