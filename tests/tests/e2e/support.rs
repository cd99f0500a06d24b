//! Owners: people with a home, a state directory and a daemon of their own, as the tests need them.
//!
//! Under root every owner is an ordinary user without an entry in `/etc/passwd`, so that nothing works by root's
//! rights by accident, and so that what is left over can be told by its uid. Otherwise the owner is who runs the tests.
//!
//! One store is filled once, with a real kernel and a real image; each owner gets a copy.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The image the tests use.
pub(crate) const IMAGE: &str = "debian-bookworm-slim";
/// Uids of owners: nobody's on an ordinary machine. Each run of the tests has a hundred of its own.
const UID_FIRST: u32 = 1_800_000_000;
const UIDS: u32 = 100;
static NEXT_UID: AtomicU32 = AtomicU32::new(0);

/// The programs, where every user can execute them.
pub(crate) fn programs() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let built = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--package", "banger", "--package", "bangerd"])
            .current_dir(root)
            .status()
            .unwrap();
        assert!(built.success(), "build banger and bangerd");
        let target = std::env::current_exe().unwrap();
        let target = target.ancestors().nth(2).unwrap();
        let dir = scratch().join("bin");
        std::fs::create_dir(&dir).unwrap();
        for name in ["banger", "bangerd"] {
            run(Command::new("cp").arg(target.join(name)).arg(dir.join(name)));
        }
        open(&dir);
        dir
    })
}

/// A directory for the whole run, below the temporary one, which whoever runs all checks removes afterwards.
fn scratch() -> &'static Path {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = tempfile::Builder::new().prefix("banger-e2e-").tempdir().unwrap();
        open(dir.path());
        dir
    })
    .path()
}

fn open(dir: &Path) {
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
}

pub(crate) fn is_root() -> bool {
    rustix::process::getuid().is_root()
}

/// Runs a command that has to succeed.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", show(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Everything a command said.
pub(crate) fn show(output: &Output) -> String {
    format!(
        "{}\n--- stdout\n{}--- stderr\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Somebody who uses banger.
pub(crate) struct Owner {
    home: tempfile::TempDir,
    /// None is whoever runs the tests.
    uid: Option<u32>,
}

impl Owner {
    /// Returns an owner with nothing in the home directory.
    pub(crate) fn new() -> Self {
        let next = || {
            let number = NEXT_UID.fetch_add(1, Ordering::Relaxed);
            assert!(number < UIDS);
            UID_FIRST + std::process::id() % 500_000 * UIDS + number
        };
        Self::with_uid(is_root().then(next))
    }

    /// Returns root, with nothing in the home directory.
    pub(crate) fn root() -> Self {
        assert!(is_root());
        Self::with_uid(None)
    }

    fn with_uid(uid: Option<u32>) -> Self {
        let home = tempfile::Builder::new().prefix("home-").tempdir_in(scratch()).unwrap();
        if let Some(uid) = uid {
            std::os::unix::fs::chown(home.path(), Some(uid), Some(uid)).unwrap();
        }
        Self { home, uid }
    }

    /// Returns an owner whose store has a kernel and [`IMAGE`].
    pub(crate) fn with_store() -> Self {
        let owner = Self::new();
        owner.copy_store();
        owner
    }

    /// Copies the common store; the large files are shared, since nothing writes to them.
    pub(crate) fn copy_store(&self) {
        let (from, to) = (store(), self.state());
        run(self.program("mkdir").args(["-p", "-m", "700"]).arg(&to));
        let link = if is_root() { "-al" } else { "-a" };
        run(Command::new("cp").arg(link).arg(from.join("images")).arg(&to));
        // An initramfs may be added to a kernel, of files that are its owner's alone.
        run(Command::new("cp").arg("-a").args([from.join("kernels"), from.join("banger.db")]).arg(&to));
        if is_root() {
            let owner = format!("{0}:{0}", self.uid.unwrap_or(0));
            let images = to.join("images");
            run(Command::new("find").arg(&images).args(["-type", "d", "-exec", "chown", &owner, "{}", "+"]));
            run(Command::new("chown").args(["-R", &owner]).args([to.join("kernels"), to.join("banger.db")]));
        }
    }

    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    /// Returns the owner's uid, where it is not that of whoever runs the tests.
    pub(crate) fn uid(&self) -> Option<u32> {
        self.uid
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.home().join(".local/state/banger")
    }

    /// Returns a program run as this owner, with an environment that has nothing of the tests' own.
    pub(crate) fn program(&self, name: impl AsRef<OsStr>) -> Command {
        let mut command = match self.uid {
            Some(uid) => {
                let mut command = Command::new("setpriv");
                command.args([format!("--reuid={uid}"), format!("--regid={uid}")]);
                command.args(["--clear-groups", "--"]).arg(name);
                command
            }
            None => Command::new(name),
        };
        let path = format!("{}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", programs().display());
        command.env_clear().env("HOME", self.home()).env("PATH", path).env("LANG", "C.UTF-8");
        if let Some(mirror) = std::env::var_os("BANGER_DEBIAN_MIRROR") {
            command.env("BANGER_DEBIAN_MIRROR", mirror);
        }
        for proxy in ["http_proxy", "https_proxy", "no_proxy"] {
            if let Some(value) = std::env::var_os(proxy) {
                command.env(proxy, value);
            }
        }
        command.current_dir(self.home()).stdin(Stdio::null());
        command
    }

    /// Returns `banger` with arguments.
    pub(crate) fn banger<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.program("banger");
        command.args(args);
        command
    }

    /// Runs `banger`, which has to succeed, and returns what it printed.
    pub(crate) fn ok<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> String {
        let mut command = self.banger(args);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}: {}{}", show(&output), self.logs());
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command in a new vm of [`IMAGE`] that goes afterwards.
    pub(crate) fn vm_run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Output {
        let mut command = self.banger(["vm", "run", "--rm", "--image", IMAGE]);
        command.args(args).output().unwrap()
    }

    pub(crate) fn json(&self, args: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.ok(args)).unwrap()
    }

    /// The daemon's log and the consoles, for a failed assertion.
    pub(crate) fn logs(&self) -> String {
        let mut text = String::new();
        let mut add = |path: &Path| {
            let content = std::fs::read(path).unwrap_or_default();
            let tail = &content[content.len().saturating_sub(3000)..];
            text.push_str(&format!("--- {}\n{}\n", path.display(), String::from_utf8_lossy(tail)));
        };
        add(&self.state().join("bangerd.log"));
        for vm in std::fs::read_dir(self.state().join("vms")).into_iter().flatten().flatten() {
            add(&vm.path().join("console.log"));
            add(&vm.path().join("supervisor.log"));
        }
        text
    }

    /// Processes of this owner that belong to banger: by uid, or by the home directory in their command line.
    pub(crate) fn processes(&self) -> Vec<String> {
        let home = self.home().to_str().unwrap().to_owned();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
            let status = std::fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let uid = status.lines().find_map(|line| line.strip_prefix("Uid:\t")).unwrap_or("");
            let own = self.uid.is_some_and(|own| uid.split('\t').next() == Some(own.to_string().as_str()));
            // Of an owner who is whoever runs the tests, the home directory tells, which the daemon is started with.
            let env = std::fs::read(entry.path().join("environ")).unwrap_or_default();
            let has_home = || line.contains(&home) || String::from_utf8_lossy(&env).contains(&home);
            if !line.is_empty() && (own || has_home()) {
                found.push(format!("{pid} {line}"));
            }
        }
        found
    }

    /// Waits until nothing but perhaps the daemon runs, and no vm has a file left.
    pub(crate) fn assert_nothing_left(&self) {
        wait_for("nothing of a vm is left", || {
            let processes = self.processes();
            let others = processes.iter().filter(|line| !line.contains("bangerd serve")).count();
            let files = std::fs::read_dir(self.state().join("vms")).map_or(0, Iterator::count);
            if others + files == 0 { Ok(()) } else { Err(format!("{files} directories, {processes:#?}")) }
        });
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let list = self.banger(["vm", "list", "-q"]).output().map(|output| output.stdout).unwrap_or_default();
        for vm in String::from_utf8_lossy(&list).lines() {
            let _ = self.banger(["vm", "delete", "-f", vm]).output();
        }
        let _ = self.banger(["daemon", "stop"]).output();
        if std::thread::panicking() {
            return;
        }
        wait_for("the owner's processes have ended", || {
            let processes = self.processes();
            if processes.is_empty() { Ok(()) } else { Err(format!("{processes:#?}")) }
        });
    }
}

/// How often what is waited for is looked at before it counts as late.
const CHECKS_MIN: u32 = 100;

/// Waits for what comes by itself; a leak never does.
pub(crate) fn wait_for(what: &str, mut check: impl FnMut() -> Result<(), String>) {
    let deadline = Instant::now() + Duration::from_secs(60);
    // Time alone passes also while the whole machine stands still.
    for checks in 1.. {
        match check() {
            Ok(()) => return,
            Err(why) if checks >= CHECKS_MIN && Instant::now() > deadline => panic!("{what}: {why}"),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// A state directory with a kernel and [`IMAGE`]: the one `BANGER_TEST_STORE` names, else pulled once in a run.
pub(crate) fn store() -> &'static Path {
    static STORE: OnceLock<PathBuf> = OnceLock::new();
    STORE.get_or_init(|| {
        // Whoever runs all tests has filled one already.
        if let Some(store) = std::env::var_os("BANGER_TEST_STORE") {
            return store.into();
        }
        let owner = Owner::new();
        let started = Instant::now();
        owner.ok(["image", "pull", IMAGE]);
        println!("pulled {IMAGE} in {:.0} s", started.elapsed().as_secs_f64());
        owner.ok(["daemon", "stop"]);
        let place = scratch().join("store");
        run(Command::new("cp").arg("-a").arg(owner.state()).arg(&place));
        place
    })
}

/// Says that a test did not run, and why.
pub(crate) fn skip(reason: &str) {
    println!("skipped: {reason}");
}

/// Returns true when a program is on the path.
pub(crate) fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}
