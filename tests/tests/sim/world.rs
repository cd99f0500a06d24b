//! An owner for the simulation: state that is as prepared before each attempt, and what must hold after it.

use crate::scenario::Scenario;
use crate::support::{self, Owner, is_root, run, show, wait_for};
use crate::tracer::{ARMED, Fault, Kind, Role, Trace, trace};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::path::Path;
use std::process::{Command, Output};

/// What the programs say when they break instead of failing.
const PANICKED: &str = "panicked at";

/// An owner and an operation.
pub(crate) struct World {
    owner: Owner,
    scenario: &'static Scenario,
    /// The VMM is one.
    real: bool,
}

impl World {
    /// Prepares what is there before the operation.
    pub(crate) fn new(scenario: &'static Scenario, real: bool) -> Self {
        let owner = if scenario.stocked { Owner::with_store() } else { Owner::new() };
        if !real {
            configure(&owner);
        }
        let world = Self { owner, scenario, real };
        if !scenario.stocked {
            layout(&world.owner.home().join("layout"));
            world.shell("mkdir -p -m 700 .local/state/banger", &[]);
        }
        let warm = if scenario.stocked {
            // Makes what is made once, such as the initramfs.
            "banger vm run --rm --image debian-bookworm-slim -- true"
        } else {
            ""
        };
        let before = format!(
            "set -e\n{warm}\n{}\nbanger daemon stop; mv .local/state/banger prepared",
            scenario.before
        );
        let output = world.script(&before, false).output().unwrap();
        assert!(output.status.success(), "{}: {}", scenario.name, show(&output));
        world
    }

    /// Does the operation and breaks it; returns what was seen and what should not have been.
    pub(crate) fn attempt(&self, fault: Option<Fault>) -> (Trace, Vec<String>) {
        self.reset();
        let about = match &fault {
            Some(Fault { step, nth, kind }) => {
                format!("{}: {kind:?} at {:?} `{}` {nth}", self.scenario.name, step.role, step.what)
            }
            None => self.scenario.name.to_owned(),
        };
        let is_error = fault.as_ref().is_some_and(|fault| fault.kind == Kind::Error);
        let script = format!("{}\ntouch {ARMED}\nexec {}", self.scenario.running, self.scenario.does);
        let mut command = self.script(&script, true);
        let at = |name: &str| File::create(self.owner.home().join(name)).unwrap();
        command.stdout(at("said")).stderr(at("complained"));
        let is_down = fault.as_ref().is_some_and(|fault| fault.kind == Kind::Down);
        // One that was up when the operation said so, and was killed then.
        let was_killed = fault.as_ref().is_some_and(|fault| {
            fault.kind == Kind::Crash && matches!(fault.step.role, Role::Supervisor | Role::Vmm)
        });
        let trace = trace(command, self.owner.home(), fault, self.real);
        if is_down && trace.hit {
            // Nobody comes back to a host before everything on it has gone.
            self.end_all();
        }
        let mut problems = Vec::new();
        let mut check = |what: &str, result: Result<(), String>| {
            problems.extend(result.err().map(|why| format!("{about}\n    {what}: {why}")));
        };
        let complained = std::fs::read_to_string(self.owner.home().join("complained")).unwrap();
        let complained = complained.trim();
        check("it ended", if trace.hung { Err("it hangs".to_owned()) } else { Ok(()) });
        let in_order = trace.code == Some(0) || complained.contains("error: ") || !is_error;
        check(
            "it says what failed",
            if in_order { Ok(()) } else { Err(format!("{:?} {complained}", trace.code)) },
        );
        let kept = || (self.scenario.promise)(self);
        let promised = match trace.code {
            Some(0) if was_killed => self.expect_now("stopped").or_else(|_| kept()),
            Some(0) => kept(),
            _ => Ok(()),
        };
        check("its promise", promised.map_err(|why| format!("{why}; it said: {complained}")));
        check("afterwards", self.afterwards());
        let panics = self.panics(complained);
        check("no panic", if panics.is_empty() { Ok(()) } else { Err(panics) });
        if !problems.is_empty() {
            problems.push(format!("    {complained}\n{}", indent(&self.owner.logs())));
        }
        (trace, problems)
    }

    /// What holds after whatever has happened: the truth is told, everything can go, nothing stays, and it works again.
    fn afterwards(&self) -> Result<(), String> {
        for vm in self.vms()? {
            let name = vm["name"].as_str().unwrap_or_default();
            // A vm whose supervisor has just been killed is one that runs until somebody has noticed.
            let told = || {
                let vms = self.vms()?;
                let Some(vm) = vms.iter().find(|vm| vm["name"] == name) else { return Ok(()) };
                let state = vm["state"].as_str().unwrap_or_default();
                match state {
                    "running" => self.ok(&["vm", "exec", name, "--", "true"]).map(drop),
                    "created" | "stopped" | "error" => Ok(()),
                    other => Err(format!("vm {name} is {other}")),
                }
            };
            eventually(told)?;
        }
        let mut all: Vec<String> = Vec::new();
        for vm in self.vms()? {
            all.push(vm["name"].as_str().unwrap_or_default().to_owned());
        }
        for name in &all {
            let gone = |text: &str| text.contains("no vm");
            // One made with `--rm` may go by itself.
            if let Err(why) = self.ok(&["vm", "delete", "--force", name])
                && !gone(&why)
            {
                return Err(why);
            }
        }
        eventually(|| self.nothing_left())?;
        if self.scenario.stocked {
            self.ok(&["vm", "run", "--rm", "--image", support::IMAGE, "--", "sh", "-c", "exit 7"])
                .map_or_else(
                    |why| if why.starts_with("exit status: 7") { Ok(()) } else { Err(why) },
                    |_| Err("7 is 0".to_owned()),
                )?;
        } else {
            // What an error of the host left, a new daemon removes.
            self.ok(&["daemon", "stop"])?;
            self.ok(&["image", "verify"])?;
            let again = self.script(self.scenario.does, false).output().unwrap();
            let done =
                String::from_utf8_lossy(&again.stderr).contains("no image `tiny`") || again.status.success();
            if !done {
                return Err(format!("again: {}", show(&again)));
            }
            self.ok(&["image", "verify"])?;
            self.ok(&["image", "cache", "prune"])?;
        }
        eventually(|| self.nothing_left())
    }

    fn nothing_left(&self) -> Result<(), String> {
        let processes = self.owner.processes();
        let others: Vec<&String> = processes.iter().filter(|line| !line.contains("bangerd serve")).collect();
        if !others.is_empty() {
            return Err(format!("processes are left: {others:#?}"));
        }
        for dir in ["vms", "images", "kernels", "workspaces", "networks", "templates"] {
            for entry in std::fs::read_dir(self.owner.state().join(dir)).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let is_of_vm = ["vms", "workspaces", "networks"].contains(&dir);
                if is_of_vm || name.starts_with(".new-") {
                    return Err(format!("`{dir}/{name}` is left"));
                }
            }
        }
        Ok(())
    }

    fn panics(&self, complained: &str) -> String {
        let all = format!("{}\n{complained}", self.owner.logs());
        all.lines().filter(|line| line.contains(PANICKED)).collect::<Vec<_>>().join("; ")
    }

    /// Expects one vm, in this state.
    pub(crate) fn expect(&self, state: &str) -> Result<(), String> {
        // Of a store that can't be written the state is late.
        eventually(|| self.expect_now(state))
    }

    fn expect_now(&self, state: &str) -> Result<(), String> {
        let vms = self.vms()?;
        let found: Vec<_> = vms.iter().map(|vm| vm["state"].as_str().unwrap_or_default()).collect();
        if found == [state] { Ok(()) } else { Err(format!("the vms are {found:?}")) }
    }

    /// Expects no vm, before long.
    pub(crate) fn expect_none(&self) -> Result<(), String> {
        eventually(|| if self.vms()?.is_empty() { Ok(()) } else { Err("the vm is still there".to_owned()) })
    }

    pub(crate) fn expect_image(&self, name: &str) -> Result<(), String> {
        let images: Value = serde_json::from_str(&self.ok(&["image", "list", "--json"])?).unwrap();
        if images[0]["name"] == name { Ok(()) } else { Err(format!("{images}")) }
    }

    pub(crate) fn expect_no_image(&self) -> Result<(), String> {
        let images: Value = serde_json::from_str(&self.ok(&["image", "list", "--json"])?).unwrap();
        if images == json!([]) { Ok(()) } else { Err(format!("{images}")) }
    }

    fn vms(&self) -> Result<Vec<Value>, String> {
        let vms: Value =
            serde_json::from_str(&self.ok(&["vm", "list", "--json"])?).map_err(|why| why.to_string())?;
        Ok(vms.as_array().cloned().unwrap_or_default())
    }

    /// Runs `banger`; what it printed, or everything it said.
    fn ok(&self, args: &[&str]) -> Result<String, String> {
        let mut command = self.owner.program("timeout");
        let output = command.args(["60", "banger"]).args(args).output().unwrap();
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(format!("{}\n(banger {})", show(&output), args.join(" ")))
        }
    }

    fn shell(&self, script: &str, args: &[&str]) -> Output {
        let output = self.owner.program("sh").arg("-c").arg(script).arg("sh").args(args).output().unwrap();
        assert!(output.status.success(), "{script}: {}", show(&output));
        output
    }

    /// Ends what is left of the attempt before, and puts the prepared state in place.
    fn reset(&self) {
        self.end_all();
        // Files of the store may be links to another's, which only root may link to again.
        let script = format!(
            "set -e
             rm -rf .local/state/banger .local/state/new .cache/banger {ARMED}
             mkdir .local/state/new; chmod 700 .local/state/new
             for file in $(ls -A prepared); do file=prepared/$file
                 case $file in
                     */images | */kernels) cp -al $file .local/state/new ;;
                     *) cp -a $file .local/state/new ;;
                 esac
             done
             chown --reference=prepared .local/state/new
             mv .local/state/new .local/state/banger"
        );
        run(Command::new("sh").args(["-c", &script]).current_dir(self.owner.home()));
    }

    fn end_all(&self) {
        wait_for("everything of the owner has ended", || {
            let processes = self.owner.processes();
            for line in &processes {
                let pid = line.split(' ').next().unwrap_or_default();
                let _ = Command::new("kill").args(["-9", pid]).output();
            }
            if processes.is_empty() { Ok(()) } else { Err(format!("{processes:#?}")) }
        });
    }

    /// Shell commands of the owner; they stop themselves first if asked to.
    fn script(&self, script: &str, stopped: bool) -> Command {
        let mut command = self.owner.program("sh");
        let stop = if stopped { "kill -STOP $$\n" } else { "" };
        command.args(["-c", &format!("{stop}{script}")]);
        command
    }
}

/// Says that this process is in its own mount namespace, where QEMU's program is the simulation's VMM.
const INSIDE: &str = "BANGER_SIM_INSIDE";

/// Says so when there is nothing the simulation's VMM could be put over.
pub(crate) fn is_missing() -> bool {
    let missing = !support::has("qemu-system-x86_64");
    if missing {
        support::skip("the simulation: its VMM is put over qemu-system-x86_64, which is not on the path");
    }
    missing
}

/// Has every vm boot: the simulation's VMM has no memory that could be saved.
pub(crate) fn configure(owner: &Owner) {
    let script = "mkdir -p .config/banger; printf 'restore = false\\nboot_timeout = \"20s\"\\n' >.config/banger/config.toml";
    run(owner.program("sh").args(["-c", script]));
}

/// Runs a test of this name again where the machine is none, and returns false; returns true there.
pub(crate) fn is_inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let mut private = Command::new("unshare");
    let drop = if is_root() {
        private.arg("--mount");
        ""
    } else {
        private.args(["--user", "--map-current-user", "--keep-caps", "--mount"]);
        "setpriv --ambient-caps=-all --inh-caps=-all --"
    };
    let script = format!("mount --bind \"$0\" \"$(command -v qemu-system-x86_64)\" && exec {drop} \"$@\"");
    private.args(["--", "sh", "-c", &script, env!("CARGO_BIN_EXE_banger-fake-vmm")]);
    private.arg(std::env::current_exe().unwrap()).args(["--exact", test, "--nocapture", "--test-threads=1"]);
    let status = private.env(INSIDE, "1").status().unwrap();
    assert!(status.success(), "the test has failed in there");
    false
}

/// Tries until it holds; what comes by itself comes within seconds.
fn eventually(mut check: impl FnMut() -> Result<(), String>) -> Result<(), String> {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        match check() {
            Err(_) if std::time::Instant::now() < deadline => {
                std::thread::sleep(std::time::Duration::from_millis(20))
            }
            result => return result,
        }
    }
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("        {line}\n")).collect()
}

/// Makes an OCI image of one small layer, called `it`.
fn layout(dir: &Path) {
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let add = |kind: &str, bytes: Vec<u8>| {
        let digest: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        std::fs::write(blobs.join(&digest), &bytes).unwrap();
        let media = format!("application/vnd.oci.image.{kind}");
        json!({ "mediaType": media, "digest": format!("sha256:{digest}"), "size": bytes.len() })
    };
    let tree = tempfile::tempdir().unwrap();
    std::fs::create_dir(tree.path().join("etc")).unwrap();
    std::fs::write(tree.path().join("etc/passwd"), "root:x:0:0::/:/bin/sh\n").unwrap();
    run(Command::new("tar").arg("-C").arg(tree.path()).arg("-cf").arg(dir.join("layer")).arg("etc"));
    let bytes = std::fs::read(dir.join("layer")).unwrap();
    let layer = add("layer.v1.tar", bytes);
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
    });
    let config = add("config.v1+json", config.to_string().into_bytes());
    let manifest = json!({ "schemaVersion": 2, "config": config, "layers": [layer] });
    let mut manifest = add("manifest.v1+json", manifest.to_string().into_bytes());
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": "it" });
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    std::fs::write(dir.join("index.json"), index.to_string()).unwrap();
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}
