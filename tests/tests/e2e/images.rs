//! Images from a real registry: Debian's docker-registry, filled by skopeo.

use crate::support::{IMAGE, Owner, has, is_root, run, show, skip};
use banger_tests::{code_that_prints, static_program};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// What the tests of this file need; none when something is missing, which is said.
pub(crate) fn prerequisites(programs: &[&str]) -> Option<()> {
    match programs.iter().find(|program| !has(program)) {
        Some(missing) => {
            skip(&format!("images from a registry: `{missing}` is not installed"));
            None
        }
        None => Some(()),
    }
}

/// A registry on the loopback interface.
pub(crate) struct Registry {
    process: Child,
    port: u16,
    dir: tempfile::TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Registry {
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let config = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}/data\nhttp:\n  addr: 127.0.0.1:{port}\n",
            dir.path().display()
        );
        let file = dir.path().join("config.yml");
        std::fs::write(&file, config).unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&file)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let registry = Self { process, port, dir };
        crate::support::wait_for("the registry listens", || {
            std::net::TcpStream::connect(("127.0.0.1", port)).map(drop).map_err(|error| error.to_string())
        });
        registry
    }

    pub(crate) fn reference(&self, name: &str) -> String {
        format!("localhost:{}/{name}", self.port)
    }

    /// Makes an image of directories, one a layer, and pushes it.
    pub(crate) fn push(&self, name: &str, layers: &[(&Path, &str)], config: serde_json::Value) {
        let layout = self.dir.path().join("layout");
        let blobs = layout.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        let add = |bytes: &[u8], media: &str| {
            let digest: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
            std::fs::write(blobs.join(&digest), bytes).unwrap();
            json!({"mediaType": media, "digest": format!("sha256:{digest}"), "size": bytes.len()})
        };
        let (mut descriptors, mut diff_ids) = (Vec::new(), Vec::new());
        for (dir, compression) in layers {
            let tar = dir.with_extension("tar");
            run(Command::new("tar")
                .args(["--owner=0", "--group=0", "-cf"])
                .arg(&tar)
                .arg("-C")
                .arg(dir)
                .arg("."));
            let plain = std::fs::read(&tar).unwrap();
            let digest: String = Sha256::digest(&plain).iter().map(|byte| format!("{byte:02x}")).collect();
            diff_ids.push(format!("sha256:{digest}"));
            let packed = Command::new(compression).args(["-q", "-c"]).arg(&tar).output().unwrap();
            let media = format!("application/vnd.oci.image.layer.v1.tar+{compression}");
            descriptors.push(add(&packed.stdout, &media));
        }
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids}
        });
        let config = add(config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json");
        let media = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2, "mediaType": media, "config": config, "layers": descriptors
        });
        let mut manifest = add(manifest.to_string().as_bytes(), media);
        manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "it"});
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});
        std::fs::write(layout.join("index.json"), index.to_string()).unwrap();
        std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#).unwrap();
        let to = format!("docker://{}", self.reference(name));
        run(Command::new("skopeo")
            .args(["copy", "-q", "--insecure-policy", "--dest-tls-verify=false"])
            .args([format!("oci:{}:it", layout.display()), to]));
        std::fs::remove_dir_all(layout).unwrap();
    }

    pub(crate) fn layer(&self, name: &str) -> PathBuf {
        let dir = self.dir.path().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }
}

pub(crate) fn install(path: &Path, bytes: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn an_image_without_a_shell_and_one_without_an_init() {
    if prerequisites(&["docker-registry", "skopeo", "gzip", "zstd", "busybox"]).is_none() {
        return;
    }
    let (owner, registry) = (Owner::with_store(), Registry::start());
    let single = registry.layer("single");
    install(&single.join("hello"), &static_program(&code_that_prints("hello from nothing\n", 9)));
    registry.push("single:1", &[(&single, "gzip")], json!({}));
    let image = registry.reference("single:1");
    let output = owner.banger(["vm", "run", "--rm", "--image", &image, "--", "/hello"]).output().unwrap();
    assert_eq!(output.stdout, b"hello from nothing\n", "{}{}", show(&output), owner.logs());
    assert_eq!(output.status.code(), Some(9));
    let output = owner.banger(["vm", "run", "--rm", "--image", &image, "--", "sh"]).output().unwrap();
    assert_eq!(output.status.code(), Some(127), "{}", show(&output));
    let output = owner.banger(["vm", "run", "--rm", "-T", "--image", &image]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("this image has no shell"), "{}", show(&output));

    let (lower, upper) = (registry.layer("lower"), registry.layer("upper"));
    install(&lower.join("bin/busybox"), &std::fs::read("/bin/busybox").unwrap());
    std::fs::create_dir(lower.join("etc")).unwrap();
    std::fs::write(lower.join("etc/os-release"), "ID=below\n").unwrap();
    std::fs::write(lower.join("etc/gone"), "").unwrap();
    std::fs::create_dir_all(upper.join("etc")).unwrap();
    std::fs::create_dir_all(upper.join("bin")).unwrap();
    std::fs::create_dir_all(upper.join("srv")).unwrap();
    std::fs::write(upper.join("etc/os-release"), "ID=above\n").unwrap();
    std::fs::write(upper.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\napp:x:77:78::/srv:/bin/sh\n")
        .unwrap();
    std::fs::write(upper.join("etc/.wh.gone"), "").unwrap();
    for name in ["sh", "cat", "ls", "id", "pwd", "env"] {
        std::os::unix::fs::symlink("busybox", upper.join("bin").join(name)).unwrap();
    }
    let config = json!({"Env": ["PATH=/bin", "COLOUR=blue"], "WorkingDir": "/srv", "User": "app"});
    registry.push("two:1", &[(&lower, "gzip"), (&upper, "zstd")], config);
    let image = registry.reference("two:1");
    let script = "cat /etc/os-release; ls /etc/gone 2>&1; id -u; id -g; pwd; echo $COLOUR";
    let output =
        owner.banger(["vm", "run", "--rm", "--image", &image, "--", "sh", "-c", script]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(
        text,
        "ID=above\nls: /etc/gone: No such file or directory\n77\n78\n/srv\nblue\n",
        "{}{}",
        show(&output),
        owner.logs()
    );
    let images = owner.json(&["image", "list", "--json"]);
    assert_eq!(images.as_array().unwrap().len(), 3, "{images}");
    owner.ok(["image", "delete", &image]);
    owner.assert_nothing_left();
}

#[test]
fn an_init_that_gives_up_does_not_spoil_the_end() {
    if prerequisites(&["docker-registry", "skopeo", "gzip", "busybox"]).is_none() {
        return;
    }
    let (owner, registry) = (Owner::with_store(), Registry::start());
    let layer = registry.layer("fragile");
    install(&layer.join("bin/busybox"), &std::fs::read("/bin/busybox").unwrap());
    // It ends, and with it the kernel, as soon as one of its children is killed.
    let init = "#!/bin/busybox sh\nset -e\necho > /up\nwhile :; do /bin/busybox sleep 1; done\n";
    install(&layer.join("sbin/init"), init.as_bytes());
    registry.push("fragile:1", &[(&layer, "gzip")], json!({}));
    let image = registry.reference("fragile:1");
    owner.ok(["vm", "create", "--name", "fragile", "--image", &image, "--wait", "agent"]);
    let wait = "until [ -e /up ]; do /bin/busybox sleep 0.1; done";
    owner.ok(["vm", "exec", "fragile", "--", "/bin/busybox", "sh", "-c", wait]);
    owner.ok(["vm", "stop", "fragile"]);
    assert_eq!(owner.json(&["vm", "show", "--json", "fragile"])["state"], "stopped");
    owner.ok(["vm", "delete", "fragile"]);
    owner.assert_nothing_left();
}

#[test]
fn an_image_from_a_pipe() {
    if prerequisites(&["docker-registry", "skopeo", "gzip"]).is_none() {
        return;
    }
    let (owner, registry) = (Owner::with_store(), Registry::start());
    let single = registry.layer("single");
    install(&single.join("hello"), &static_program(&code_that_prints("hello from a pipe\n", 9)));
    registry.push("piped:1", &[(&single, "gzip")], json!({}));
    let saved = registry.dir.path().join("saved.tar");
    let from = format!("docker://{}", registry.reference("piped:1"));
    let to = format!("docker-archive:{}:example.test/piped:1", saved.display());
    run(Command::new("skopeo").args([
        "copy",
        "-q",
        "--insecure-policy",
        "--src-tls-verify=false",
        &from,
        &to,
    ]));
    let load = |archive: &[u8]| {
        let mut command = owner.banger(["image", "load"]);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Whoever has seen enough of it closes early.
        let _ = child.stdin.take().unwrap().write_all(archive);
        child.wait_with_output().unwrap()
    };
    let archive = std::fs::read(&saved).unwrap();
    let output = load(&archive[..archive.len() / 2]);
    assert_eq!(output.status.code(), Some(1), "{}", show(&output));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.starts_with("error: could not load `stdin`\n  caused by: "), "{said}");
    let images = owner.json(&["image", "list", "--json"]).as_array().unwrap().len();
    let output = load(&archive);
    assert_eq!(output.stdout, b"loaded example.test.piped_1\n", "{}{}", show(&output), owner.logs());
    assert_eq!(owner.json(&["image", "list", "--json"]).as_array().unwrap().len(), images + 1);
    let cache = owner.home().join(".cache/banger");
    let left = std::fs::read_dir(cache).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with("load-")).collect();
    assert!(left.is_empty(), "{left:?}");
    let command = ["vm", "run", "--rm", "--image", "example.test/piped:1", "--", "/hello"];
    let output = owner.banger(command).output().unwrap();
    assert_eq!(output.stdout, b"hello from a pipe\n", "{}{}", show(&output), owner.logs());
    assert_eq!(output.status.code(), Some(9));
    owner.assert_nothing_left();
}

#[test]
fn debian_from_a_registry() {
    if !is_root() {
        return skip("Debian from a registry: mmdebstrap needs root here");
    }
    if prerequisites(&["docker-registry", "skopeo", "gzip", "mmdebstrap"]).is_none() {
        return;
    }
    let (owner, registry) = (Owner::with_store(), Registry::start());
    let root = registry.layer("debian");
    run(Command::new("mmdebstrap")
        .args(["--quiet", "--mode=root", "--variant=essential", "bookworm"])
        .arg(&root)
        .stdin(Stdio::null()));
    registry.push("debian:test", &[(&root, "gzip")], json!({"Cmd": ["/bin/bash"]}));
    let image = registry.reference("debian:test");
    owner.ok(["image", "pull", &image]);
    let rootfs = run(Command::new("find").arg(owner.state().join("images")).args(["-name", "rootfs.ext4"]));
    for file in rootfs.lines() {
        let checked = Command::new("e2fsck").args(["-fn", file]).output().unwrap();
        assert!(checked.status.success(), "{}", show(&checked));
    }
    let output = owner
        .banger(["vm", "run", "--rm", "--image", &image, "--", "cat", "/etc/os-release"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("VERSION_CODENAME=bookworm"), "{}{}", show(&output), owner.logs());
    owner.assert_nothing_left();
}

#[test]
fn the_default_image_runs_docker() {
    let owner = Owner::with_store();
    if !has("busybox") {
        return skip("docker in the default image: `busybox` is not installed");
    }
    owner.ok(["vm", "create", "--name", "dock", "--memory", "1G", "--vcpu", "2", "--wait", "boot"]);
    let state = owner.ok(["exec", "dock", "--", "systemctl", "is-system-running"]);
    assert_eq!(state, "running\n");
    for program in ["git", "curl", "jq", "tmux", "ip", "docker", "sshd"] {
        owner.ok(["exec", "dock", "--", "sh", "-c", &format!("command -v {program}")]);
    }
    let mut copy = owner.banger(["exec", "dock", "--", "sh", "-c", "mkdir /tmp/i; cat > /tmp/i/busybox"]);
    copy.stdin(std::fs::File::open("/bin/busybox").unwrap());
    assert!(copy.status().unwrap().success());
    let script = "cd /tmp/i && chmod 755 busybox && tar c busybox | docker import - local:test >/dev/null && \
                  docker run --rm local:test /busybox echo inside a container";
    let output = owner.ok(["exec", "dock", "--", "sh", "-ec", script]);
    assert_eq!(output, "inside a container\n");
}

/// An image of one static program and `files` files of a mebibyte each, of which `seed` decides the content.
pub(crate) fn bulky_layout(dir: &Path, name: &str, files: u32, seed: u8) -> PathBuf {
    let tree = dir.join(format!("{name}.d"));
    install(&tree.join("hello"), &static_program(&code_that_prints("hello\n", seed)));
    for number in 0..files {
        // Nothing compresses it, so that there is something to do.
        let mut state = u64::from(number) << 8 | u64::from(seed) | 1 << 40;
        let mut content = Vec::with_capacity(1 << 20);
        while content.len() < 1 << 20 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            content.extend_from_slice(&state.to_le_bytes());
        }
        std::fs::write(tree.join(format!("file-{number}")), content).unwrap();
    }
    let layout = dir.join(name);
    run(Command::new("umoci").args(["init", "--layout"]).arg(&layout));
    let image = format!("{}:it", layout.display());
    run(Command::new("umoci").args(["new", "--image", &image]));
    run(Command::new("umoci").args(["insert", "--rootless", "--image", &image]).arg(&tree).arg("/"));
    run(Command::new("chmod").args(["-R", "a+rX"]).arg(dir));
    layout
}

/// Pulls that are cut short, each at another point.
const KILLS: u32 = 10;

#[test]
fn a_daemon_killed_at_any_point_of_a_pull_leaves_a_store_that_verifies() {
    if prerequisites(&["umoci"]).is_none() {
        return;
    }
    let (owner, dir) = (Owner::with_store(), tempfile::tempdir().unwrap());
    let layouts = [1, 2].map(|seed| bulky_layout(dir.path(), &format!("layout-{seed}"), 24, seed));
    let pull = |layout: &Path| {
        let reference = format!("oci:{}:it", layout.display());
        owner.banger(["image", "pull", &reference, "--name", "victim"]).output().unwrap()
    };
    let stored = || owner.json(&["image", "show", "victim", "--json"])["digest"].as_str().unwrap().to_owned();
    // The second replaces the first, as each of the following does.
    let digests = layouts.each_ref().map(|layout| {
        let output = pull(layout);
        assert!(output.status.success(), "{}{}", show(&output), owner.logs());
        stored()
    });
    let started = std::time::Instant::now();
    assert!(pull(&layouts[0]).status.success(), "{}", owner.logs());
    let whole = started.elapsed();
    let (mut killed, mut rounds) = (0, 0);
    while killed < KILLS && rounds < 5 * KILLS {
        let status = owner.json(&["daemon", "status", "--json"]);
        let pid = rustix::process::Pid::from_raw(status["pid"].as_i64().unwrap() as i32).unwrap();
        let next = usize::from(stored() == digests[0]);
        // Steps that share no divisor with the length spread over it.
        let wait = whole * (rounds * 7 % 19 + 1) / 20;
        let killer = std::thread::spawn(move || {
            std::thread::sleep(wait);
            rustix::process::kill_process(pid, rustix::process::Signal::KILL)
        });
        let output = pull(&layouts[next]);
        let _ = killer.join().unwrap();
        rounds += 1;
        killed += u32::from(!output.status.success());
        // A process that is dying may still take a connection.
        crate::support::wait_for("another daemon answers", || {
            let output = owner.banger(["image", "list"]).output().unwrap();
            if output.status.success() { Ok(()) } else { Err(show(&output)) }
        });
        let verified = owner.ok(["image", "verify"]);
        assert!(verified.contains("ok   image victim: ext4, sha256 "), "{verified}");
        assert!(verified.contains("ok   directories: nothing is left over"), "{verified}");
        let now = stored();
        assert!(digests.contains(&now), "{now}");
        assert!(!output.status.success() || now == digests[next], "what was said to be pulled is there");
    }
    println!("{killed} of {rounds} pulls were cut short, in {:.1} s each", whole.as_secs_f64());
    assert_eq!(killed, KILLS);
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing() {
    if !is_root() {
        return skip("a full disk: mounting a small one needs root");
    }
    if prerequisites(&["umoci", "unshare", "mount"]).is_none() {
        return;
    }
    let (owner, dir) = (Owner::with_store(), tempfile::tempdir().unwrap());
    let small = bulky_layout(dir.path(), "small", 2, 1);
    let large = bulky_layout(dir.path(), "large", 40, 2);
    let state = owner.home().join("state");
    std::fs::create_dir(&state).unwrap();
    // A mount of nobody else; the daemon ends with it.
    let script = format!(
        "set -e; mount -t tmpfs -o size=24m,mode=700 tmpfs {state}; chown {uid}:{uid} {state}; \
         exec setpriv --reuid={uid} --regid={uid} --clear-groups -- sh -c '\
         banger image pull oci:{small}:it --name small; \
         banger image pull oci:{large}:it --name large; echo status $?; \
         ls -A {state}/images; banger image delete {IMAGE}; banger image verify; banger image list; banger daemon stop'",
        state = state.display(),
        small = small.display(),
        large = large.display(),
        uid = owner.uid().unwrap(),
    );
    let path =
        owner.banger(["version"]).get_envs().find(|(key, _)| *key == "PATH").unwrap().1.unwrap().to_owned();
    let kernels = owner.state().join("kernels");
    let database = owner.state().join("banger.db");
    let script = script.replace(
        "exec setpriv",
        &format!("cp -a {} {} {}; exec setpriv", kernels.display(), database.display(), state.display()),
    );
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script.replace("size=24m", "size=120m")])
        .env_clear()
        .env("PATH", path)
        .env("HOME", owner.home())
        .env("BANGER_STATE_DIR", &state)
        .current_dir("/")
        .output()
        .unwrap();
    let (text, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("pulled small\n") && text.contains("status 1\n"), "{}", show(&output));
    assert!(
        said.contains("No space left on device") && said.contains("hint: make room on the disk of `"),
        "{said}"
    );
    assert!(text.contains("ok   image small: ext4, sha256 "), "{}", show(&output));
    assert!(text.contains("ok   directories: nothing is left over"), "{}", show(&output));
    assert!(!text.contains(".new-"), "{}", show(&output));
}

#[test]
fn pulls_of_one_image_at_a_time_do_the_work_once() {
    if prerequisites(&["umoci", "skopeo", "docker-registry"]).is_none() {
        return;
    }
    let (owner, dir, registry) = (Owner::with_store(), tempfile::tempdir().unwrap(), Registry::start());
    let layout = bulky_layout(dir.path(), "layout", 16, 3);
    let reference = registry.reference("bulky:1");
    run(Command::new("skopeo")
        .args(["copy", "-q", "--insecure-policy", "--dest-tls-verify=false"])
        .args([format!("oci:{}:it", layout.display()), format!("docker://{reference}")]));
    // Starts the daemon.
    owner.ok(["image", "list"]);
    let children: Vec<Child> = (0..3)
        .map(|_| {
            let mut command = owner.banger(["image", "pull", &reference]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", show(&output));
    }
    let log = std::fs::read_to_string(registry.dir.path().join("log")).unwrap();
    let gets = log.lines().filter(|line| line.contains("\"GET ") && line.contains("/blobs/sha256:")).count();
    // The configuration and the layer.
    assert_eq!(gets, 2, "{log}");
    let cache = owner.home().join(".cache/banger/blobs/sha256");
    assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 2);
    let line = owner.ok(["image", "cache", "prune", "--dry-run"]);
    assert!(line.starts_with("would remove 0 files and free 0 B; "), "{line}");
    owner.ok(["image", "delete", &reference]);
    let line = owner.ok(["image", "cache", "prune", "--dry-run"]);
    assert!(line.starts_with("would remove 2 files and free 16."), "{line}");
    assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 2);
    let line = owner.ok(["image", "cache", "prune"]);
    assert!(line.starts_with("removed 2 files, freed 16.") && line.ends_with("; 0 B stay\n"), "{line}");
    assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 0);
}

#[test]
fn an_image_without_an_init_does_what_it_was_made_for() {
    if prerequisites(&["docker-registry", "skopeo", "gzip", "busybox"]).is_none() {
        return;
    }
    let (owner, registry) = (Owner::with_store(), Registry::start());
    let tree = registry.layer("tree");
    install(&tree.join("bin/busybox"), &std::fs::read("/bin/busybox").unwrap());
    for name in ["sh", "echo", "env"] {
        std::os::unix::fs::symlink("busybox", tree.join("bin").join(name)).unwrap();
    }
    let config =
        json!({"Entrypoint": ["/bin/echo", "entry"], "Cmd": ["and", "a word"], "Env": ["PATH=/bin"]});
    registry.push("made:1", &[(&tree, "gzip")], config);
    let image = registry.reference("made:1");
    let run = |args: &[&str]| {
        let common = ["run", "--rm", "--memory", "256M", "--image", &image];
        let output = owner.banger(common.iter().chain(args)).output().unwrap();
        assert!(output.status.success(), "{}{}", show(&output), owner.logs());
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(run(&[]), "entry and a word\n");
    // What is named is run as it is, without the entrypoint before it.
    assert_eq!(run(&["--", "echo", "mine"]), "mine\n");
    let shown = owner.json(&["image", "show", &image, "--json"]);
    assert_eq!(shown["entrypoint"], json!(["/bin/echo", "entry"]));
    owner.assert_nothing_left();
}

#[test]
fn an_image_for_another_processor_is_kept_and_not_run() {
    if prerequisites(&["umoci"]).is_none() {
        return;
    }
    let (owner, dir) = (Owner::with_store(), tempfile::tempdir().unwrap());
    let layout = bulky_layout(dir.path(), "layout", 1, 4);
    run(Command::new("umoci").args([
        "config",
        "--architecture",
        "arm64",
        "--image",
        &format!("{}:it", layout.display()),
    ]));
    run(Command::new("chmod").args(["-R", "a+rX"]).arg(dir.path()));
    let reference = format!("oci:{}:it", layout.display());
    let failed = |args: &[&str]| {
        let output = owner.banger(args).output().unwrap();
        assert!(!output.status.success(), "{}", show(&output));
        String::from_utf8_lossy(&output.stderr).replace(&layout.display().to_string(), "LAYOUT")
    };
    let said = failed(&["image", "pull", &reference]);
    assert!(said.contains("there is no image for linux/amd64, only for linux/arm64\n"), "{said}");
    owner.ok(["image", "pull", &reference, "--platform", "linux/arm64", "--name", "arm"]);
    assert_eq!(owner.json(&["image", "show", "arm", "--json"])["arch"], "arm64");
    assert_eq!(
        failed(&["vm", "create", "--image", "arm"]),
        "error: image `arm` is for arm64, this machine is amd64\n\
         hint: pull it without `--platform`, under another name with `--name`\n"
    );
    let said = failed(&["image", "pull", IMAGE, "--platform", "linux/arm64", "--name", "x"]);
    assert!(
        said.starts_with(
            "error: image `debian-bookworm-slim` is made for this machine, not for linux/arm64\n"
        ),
        "{said}"
    );
}
