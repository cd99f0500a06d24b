//! `bench pull`: an image whose layers are downloaded already, to the filesystem a vm boots from; against what one would
//! do without banger: `umoci unpack`, then `mke2fs -d`.

use crate::programs::{Built, Profile, Store};
use anyhow::{Context as _, bail};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What the image has, unpacked.
const UNPACKED_MIN: u64 = 512 << 20;
/// Runs of each kind; the median counts.
const RUNS: usize = 3;
/// Size of the filesystem that `mke2fs` makes.
const FILESYSTEM: &str = "2G";

/// Measures and prints. As root, since `umoci unpack` keeps owners and devices only then.
pub(crate) fn run(profile: Profile) -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("banger-bench-").tempdir()?;
    let registry = Registry::start(dir.path())?;
    let layout = make_image(dir.path())?;
    let image = format!("localhost:{}/bench:1", registry.port);
    run_program(
        Command::new("skopeo")
            .args(["copy", "-q", "--insecure-policy", "--dest-tls-verify=false"])
            .args([format!("oci:{}:it", layout.display()), format!("docker://{image}")]),
    )?;
    let store = Built::new(profile)?.store(&[])?;
    let (mut ours, mut theirs, mut peak) = (Vec::new(), Vec::new(), 0);
    // The first fills the cache of downloads, and the page cache of both sides.
    pull(&store, dir.path(), &image)?;
    for _ in 0..RUNS {
        let (time, memory) = pull(&store, dir.path(), &image)?;
        ours.push(time);
        peak = peak.max(memory);
        theirs.push(unpack(dir.path(), &layout)?);
    }
    let seconds = |times: &[Duration]| -> Vec<f64> { times.iter().map(Duration::as_secs_f64).collect() };
    let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| b.as_secs_f64() / a.as_secs_f64()).collect();
    println!("image pull, downloaded already  {}", crate::bench::spread(&seconds(&ours), "s"));
    println!("umoci unpack and mke2fs -d      {}", crate::bench::spread(&seconds(&theirs), "s"));
    println!("ratio, pair by pair             {}   budget 2", crate::bench::spread(&ratios, "x"));
    println!("peak memory of the daemon       {} MiB   budget 128", peak >> 10);
    Ok(())
}

/// Pulls the image with a fresh daemon and deletes it again; returns the time and the daemon's peak memory in KiB.
fn pull(store: &Store, dir: &Path, image: &str) -> anyhow::Result<(Duration, u64)> {
    let banger = |args: &[&str]| -> anyhow::Result<Vec<u8>> {
        let output = store.banger(args).env("XDG_CACHE_HOME", dir.join("cache")).output()?;
        if !output.status.success() {
            bail!("banger {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        Ok(output.stdout)
    };
    let _ = store.banger(&["image", "delete", "bench"]).output()?;
    let _ = store.banger(&["daemon", "stop"]).output()?;
    banger(&["image", "list"])?;
    let started = Instant::now();
    banger(&["image", "pull", image, "--name", "bench"])?;
    let time = started.elapsed();
    let status: serde_json::Value = serde_json::from_slice(&banger(&["daemon", "status", "--json"])?)?;
    let pid = status["pid"].as_u64().context("no pid of the daemon")?;
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let peak = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = peak.and_then(|line| line.trim().split(' ').next()?.parse().ok()).context("no VmHWM")?;
    Ok((time, peak))
}

/// Makes a filesystem of the layout without banger.
fn unpack(dir: &Path, layout: &Path) -> anyhow::Result<Duration> {
    let (bundle, file) = (dir.join("bundle"), dir.join("theirs.ext4"));
    let started = Instant::now();
    run_program(
        Command::new("umoci").args(["unpack", "--image", &format!("{}:it", layout.display())]).arg(&bundle),
    )?;
    run_program(
        Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-d"])
            .arg(bundle.join("rootfs"))
            .arg(&file)
            .arg(FILESYSTEM),
    )?;
    // What banger leaves is on the disk.
    std::fs::File::open(&file)?.sync_all()?;
    let time = started.elapsed();
    std::fs::remove_dir_all(bundle)?;
    std::fs::remove_file(file)?;
    Ok(time)
}

/// Makes an image of this machine's own programs and libraries, in two layers.
fn make_image(dir: &Path) -> anyhow::Result<PathBuf> {
    let layout = dir.join("layout");
    let image = format!("{}:it", layout.display());
    run_program(Command::new("umoci").args(["init", "--layout"]).arg(&layout))?;
    run_program(Command::new("umoci").args(["new", "--image", &image]))?;
    for part in ["/usr/share", "/usr/lib"] {
        let tree = dir.join("tree");
        std::fs::create_dir(&tree)?;
        if copy_some(Path::new(part), &tree, UNPACKED_MIN / 2)? > 0 {
            bail!("this machine has too little in `{part}` for half of {} MiB", UNPACKED_MIN >> 20);
        }
        run_program(Command::new("umoci").args(["insert", "--image", &image]).arg(&tree).arg(part))?;
        std::fs::remove_dir_all(tree)?;
    }
    Ok(layout)
}

/// Copies files until there are so many bytes; returns how many were missing.
fn copy_some(from: &Path, to: &Path, bytes: u64) -> anyhow::Result<u64> {
    let mut left = bytes;
    let mut todo = vec![(from.to_owned(), to.to_owned())];
    while let Some((from, to)) = todo.pop() {
        let mut entries: Vec<_> = std::fs::read_dir(&from)?.collect::<Result<_, _>>()?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let (source, target) = (entry.path(), to.join(entry.file_name()));
            let kind = entry.file_type()?;
            if left == 0 {
                return Ok(0);
            } else if kind.is_dir() {
                std::fs::create_dir(&target)?;
                todo.push((source, target));
            } else if kind.is_symlink() {
                std::os::unix::fs::symlink(std::fs::read_link(source)?, target)?;
            } else if kind.is_file() {
                left = left.saturating_sub(std::fs::copy(source, target)?);
            }
        }
    }
    Ok(left)
}

fn run_program(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Debian's registry.
struct Registry {
    process: Child,
    port: u16,
}

impl Registry {
    fn start(dir: &Path) -> anyhow::Result<Self> {
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let config = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}/registry\nhttp:\n  addr: 127.0.0.1:{port}\n",
            dir.display()
        );
        let file = dir.join("registry.yml");
        std::fs::write(&file, config)?;
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&file).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().context("start docker-registry")?;
        let registry = Self { process, port };
        let deadline = Instant::now() + Duration::from_secs(30);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            if Instant::now() > deadline {
                bail!("docker-registry does not listen");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(registry)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
