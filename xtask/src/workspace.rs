//! `bench workspace`: a checkout of 10,000 files into a vm, against `tar | vm exec tar x` of the same and against git over
//! `vm ssh`; what a long history and much content add; and whether it would pay to compress what travels.

use crate::bench::spread;
use crate::programs::{Built, Profile, Store};
use anyhow::{Context as _, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

const IMAGE: &str = "debian-bookworm-slim";
const FILES: usize = 10_000;
/// Longer files are no sources.
const FILE_LEN_MAX: u64 = 64 << 10;
const COMMITS: usize = 5_000;
/// Bytes of the one large file.
const LARGE_LEN: u64 = 500 << 20;
/// Runs of each kind; the median counts.
const RUNS: usize = 3;
/// The vm of the measurements.
const VM: [&str; 10] =
    ["vm", "create", "--name", "bench", "--image", IMAGE, "--memory", "1G", "--net", "none"];

/// Measures and prints.
pub(crate) fn run(profile: Profile) -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("banger-bench-").tempdir()?;
    let checkout = dir.path().join("crates");
    let files = copy_crates(&checkout)?;
    git(
        &checkout,
        "git init -q -b main . && git config gc.auto 0 && git add -f . 2> /dev/null && git commit -qm all && git gc -q",
    )?;
    let built = Built::new(profile)?;
    let store = match std::env::var_os("BANGER_TEST_STORE") {
        Some(store) => built.store_like(Path::new(&store))?,
        None => built.store(&[IMAGE])?,
    };
    store.ok(&VM)?;
    let packed = Command::new("tar").args(["c", "-C"]).arg(&checkout).arg(".").output()?.stdout;
    println!("{files} files of crates, {} MiB with their repository", packed.len() >> 20);
    let (mut ours, mut tars, mut pushes) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        tars.push(seconds(|| tar(&store, &checkout))?);
        ours.push(seconds(|| place(&store, &checkout))?);
        pushes.push(seconds(|| push(&store, &checkout))?);
    }
    let ratios = |theirs: &[f64]| -> Vec<f64> { ours.iter().zip(theirs).map(|(a, b)| a / b).collect() };
    println!("workspace prepare            {}", spread(&ours, "s"));
    println!("tar | vm exec tar x          {}", spread(&tars, "s"));
    println!("  ratio, pair by pair        {}   budget 1.5", spread(&ratios(&tars), "x"));
    println!("git push over vm ssh, checkout  {}", spread(&pushes, "s"));
    println!("  ratio, pair by pair        {}", spread(&ratios(&pushes), "x"));
    commits(&checkout, COMMITS)?;
    println!("with {COMMITS} commits more      {}", spread(&[seconds(|| place(&store, &checkout))?], "s"));
    let large = dir.path().join("large");
    std::fs::create_dir(&large)?;
    git(&large, &format!("git init -q . && head -c {LARGE_LEN} /dev/urandom > large"))?;
    println!("one file of 500 MiB          {}", spread(&[seconds(|| place(&store, &large))?], "s"));
    compression(&store, &packed)
}

/// The same bytes to a guest that drops them: as they are, and as gzip makes them, which the guest has to undo.
fn compression(store: &Store, packed: &[u8]) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let (plain, compressed) = (dir.path().join("tar"), dir.path().join("tar.gz"));
    std::fs::write(&plain, packed)?;
    let output = Command::new("gzip").arg("-1c").arg(&plain).output()?;
    std::fs::write(&compressed, &output.stdout)?;
    let feed = |file: &Path, script: &str| {
        let mut command = store.banger(&["vm", "exec", "bench", "--", "sh", "-c", script]);
        succeed(command.stdin(std::fs::File::open(file)?))
    };
    let plain = repeat(|| feed(&plain, "cat > /dev/null"))?;
    let undone = repeat(|| feed(&compressed, "gzip -dc > /dev/null"))?;
    let percent = output.stdout.len() * 100 / packed.len().max(1);
    println!("the bytes as they are        {}", spread(&plain, "s"));
    println!("as gzip -1, {percent} % of them     {}", spread(&undone, "s"));
    Ok(())
}

/// Copies files of the crates that cargo has unpacked.
fn copy_crates(to: &Path) -> anyhow::Result<usize> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cargo")));
    let sources = home.context("no home")?.join("registry/src");
    let mut crates = Vec::new();
    for registry in std::fs::read_dir(&sources).context("no crates are unpacked: build something first")? {
        for found in std::fs::read_dir(registry?.path())? {
            crates.push(found?.path());
        }
    }
    crates.sort();
    let (mut count, mut waiting) = (0, crates.clone());
    waiting.reverse();
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            let mut inside = std::fs::read_dir(&path)?
                .map(|found| Ok(found?.path()))
                .collect::<std::io::Result<Vec<_>>>()?;
            inside.sort();
            waiting.extend(inside.into_iter().rev());
        } else if path.is_file() && path.metadata()?.len() <= FILE_LEN_MAX && count < FILES {
            let parent = crates.first().and_then(|first| first.parent()).context("no crates")?;
            let target = to.join(path.strip_prefix(parent).unwrap_or(Path::new("other")));
            std::fs::create_dir_all(target.parent().unwrap_or(to))?;
            std::fs::copy(&path, target)?;
            count += 1;
        }
    }
    if count < FILES {
        bail!("only {count} files in `{}`", sources.display());
    }
    Ok(count)
}

/// Adds commits, each of one small change.
fn commits(checkout: &Path, count: usize) -> anyhow::Result<()> {
    let script = format!(
        "for i in $(seq {count}); do echo commit refs/heads/main; echo 'committer A <a@example.com>' $i +0000; \
         echo data 2; echo x; [ $i = 1 ] && echo from refs/heads/main^0; \
         echo M 644 inline history; echo data ${{#i}}; printf $i; echo; done | git fast-import --quiet; git reset -q --hard"
    );
    git(checkout, &script)
}

fn git(dir: &Path, script: &str) -> anyhow::Result<()> {
    let mut command = Command::new("sh");
    for who in ["GIT_AUTHOR", "GIT_COMMITTER"] {
        command.env(format!("{who}_NAME"), "A").env(format!("{who}_EMAIL"), "a@example.com");
    }
    succeed(command.args(["-ec", script]).current_dir(dir))
}

fn place(store: &Store, checkout: &Path) -> anyhow::Result<()> {
    let mut command = store.banger(&["vm", "workspace", "prepare", "--force", "--no-bootstrap", "bench"]);
    succeed(command.arg(checkout).stdout(Stdio::null()))
}

fn tar(store: &Store, checkout: &Path) -> anyhow::Result<()> {
    let mut tar =
        Command::new("tar").args(["c", "-C"]).arg(checkout).arg(".").stdout(Stdio::piped()).spawn()?;
    let script = "rm -rf /root/tar; mkdir /root/tar; tar x -C /root/tar; sync -f /root/tar";
    let mut command = store.banger(&["vm", "exec", "bench", "--", "sh", "-c", script]);
    succeed(command.stdin(tar.stdout.take().context("no pipe")?))?;
    if tar.wait()?.success() { Ok(()) } else { bail!("tar failed") }
}

/// What a clone from the host would be, if the guest could reach it: the repository pushed, and checked out there.
fn push(store: &Store, checkout: &Path) -> anyhow::Result<()> {
    let guest = |script: &str| store.ok(&["vm", "exec", "bench", "--", "sh", "-ec", script]).map(drop);
    guest("rm -rf /root/clone; git init -q -b other /root/clone")?;
    // Git starts ssh with the variables that say which store this is.
    let ssh = format!("{} vm ssh", store.banger(&[]).get_program().display());
    let mut command = store.program("git");
    command.args(["push", "-q", "ssh://bench/root/clone", "HEAD:refs/heads/main"]).current_dir(checkout);
    succeed(command.env("GIT_SSH_COMMAND", ssh).env("GIT_SSH_VARIANT", "simple"))?;
    guest("cd /root/clone; git checkout -q main; sync -f .")
}

fn succeed(command: &mut Command) -> anyhow::Result<()> {
    let output = command.stderr(Stdio::piped()).output()?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

fn repeat(work: impl Fn() -> anyhow::Result<()>) -> anyhow::Result<Vec<f64>> {
    (0..RUNS).map(|_| seconds(&work)).collect()
}

fn seconds(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed().as_secs_f64())
}
