//! A daemon that is killed, or has no room, in the middle of making an image or a kernel.

use crate::errors::docker_archive;
use crate::files::{boot_tree, busybox_tree, ext4, missing, shared_dir};
use crate::images::{Registry, bulky_layout, prerequisites};
use crate::support::{IMAGE, Owner, run, show, wait_for};
use std::path::Path;
use std::process::{Command, Output};
use std::time::Instant;

/// Attempts of each kind that are cut short, each at another point.
const KILLS: u32 = 3;

/// Makes something called `victim` again and again, and kills the daemon meanwhile. Whatever it had done, the next daemon
/// finds a store that verifies and nothing left over, and the same can be done again.
fn kill_in_the_middle(owner: &Owner, what: &str, make: &dyn Fn() -> Output, forget: &dyn Fn()) {
    forget();
    let started = Instant::now();
    let output = make();
    let whole = started.elapsed();
    assert!(output.status.success(), "{what}: {}{}", show(&output), owner.logs());
    let (mut killed, mut rounds) = (0, 0);
    while killed < KILLS && rounds < 10 * KILLS {
        forget();
        let status = owner.json(&["daemon", "status", "--json"]);
        let pid = rustix::process::Pid::from_raw(status["pid"].as_i64().unwrap() as i32).unwrap();
        // Steps that share no divisor with the length spread over it.
        let wait = whole * (rounds * 7 % 19 + 1) / 20;
        let killer = std::thread::spawn(move || {
            std::thread::sleep(wait);
            rustix::process::kill_process(pid, rustix::process::Signal::KILL)
        });
        let output = make();
        let _ = killer.join().unwrap();
        rounds += 1;
        killed += u32::from(!output.status.success());
        // A process that is dying may still take a connection.
        wait_for("another daemon answers", || {
            let output = owner.banger(["image", "list"]).output().unwrap();
            if output.status.success() { Ok(()) } else { Err(show(&output)) }
        });
        let verified = owner.ok(["image", "verify"]);
        assert!(verified.contains("ok   directories: nothing is left over"), "{what}: {verified}");
        let list = owner.ok(["image", "list"]) + &owner.ok(["kernel", "list"]);
        assert!(!output.status.success() || list.contains("victim"), "{what}: it was said to be there");
        let spools = names(&owner.home().join(".cache/banger"), "load-");
        assert!(spools.is_empty(), "{what}: {spools:?}");
    }
    println!("{what}: {killed} of {rounds} attempts were cut short, in {:.1} s each", whole.as_secs_f64());
    assert_eq!(killed, KILLS, "{what}");
    forget();
    let output = make();
    assert!(output.status.success(), "{what}: {}{}", show(&output), owner.logs());
    forget();
}

/// Names in a directory that begin like this.
fn names(dir: &Path, prefix: &str) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(prefix)).collect()
}

#[test]
fn a_daemon_killed_at_any_point_of_a_pull_from_a_registry_or_a_load_leaves_a_store_that_verifies() {
    if prerequisites(&["umoci", "skopeo", "docker-registry"]).is_none() {
        return;
    }
    let (owner, dir, registry) = (Owner::with_store(), shared_dir(), Registry::start());
    let layout = bulky_layout(dir.path(), "layout", 24, 5);
    let (reference, archive) = (registry.reference("bulky:1"), dir.path().join("saved.tar"));
    for to in [format!("docker://{reference}"), format!("docker-archive:{}:victim:1", archive.display())] {
        run(Command::new("skopeo")
            .args(["copy", "-q", "--insecure-policy", "--dest-tls-verify=false"])
            .args([format!("oci:{}:it", layout.display()), to]));
    }
    run(Command::new("chmod").arg("a+r").arg(&archive));
    // With what was downloaded, or the next time would be a shorter one.
    let forget = || {
        let _ = owner.banger(["image", "delete", "victim"]).output().unwrap();
        owner.ok(["image", "cache", "prune", "--all"]);
    };
    let pull = || owner.banger(["image", "pull", &reference, "--name", "victim"]).output().unwrap();
    kill_in_the_middle(&owner, "pull from a registry", &pull, &forget);
    let archive = archive.to_str().unwrap();
    let load = || owner.banger(["image", "load", "-i", archive, "--name", "victim"]).output().unwrap();
    kill_in_the_middle(&owner, "load", &load, &forget);
}

#[test]
fn a_daemon_killed_while_files_are_registered_or_imported_leaves_a_store_that_verifies() {
    if missing("killed while registering", &["mke2fs", "debugfs", "gzip", "busybox"]) {
        return;
    }
    let (owner, dir) = (Owner::with_store(), shared_dir());
    let (boot, release) = boot_tree(&owner, dir.path());
    let tree = busybox_tree(dir.path());
    // Something to copy.
    for number in 0..48 {
        std::fs::write(tree.join(format!("file-{number}")), vec![number; 1 << 20]).unwrap();
    }
    let rootfs = dir.path().join("rootfs.ext4");
    ext4(&tree, &rootfs);
    let kernel = boot.join(format!("vmlinuz-{release}"));
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let mut register = ["image", "register", "--name", "victim"].map(str::to_owned).to_vec();
    for (option, file) in [("--rootfs", rootfs), ("--kernel", kernel), ("--modules", dir.path().join("lib"))]
    {
        register.extend([option.to_owned(), path(&file)]);
    }
    let forget = || {
        let _ = owner.banger(["image", "delete", "victim"]).output().unwrap();
        // One that came with an image is never there without it.
        assert!(!owner.ok(["kernel", "list"]).contains("victim"));
    };
    let make = || owner.banger(&register).output().unwrap();
    kill_in_the_middle(&owner, "register", &make, &forget);
    let boot = path(&boot);
    let forget = || drop(owner.banger(["kernel", "delete", "victim"]).output().unwrap());
    let import = || owner.banger(["kernel", "import", "victim", "--from", &boot]).output().unwrap();
    kill_in_the_middle(&owner, "kernel import", &import, &forget);
}

#[test]
fn a_full_disk_ends_whatever_makes_images_and_kernels_and_leaves_nothing() {
    if missing("a full disk", &["mke2fs", "debugfs", "gzip", "busybox", "unshare"]) {
        return;
    }
    let (owner, dir) = (Owner::with_store(), shared_dir());
    boot_tree(&owner, dir.path());
    let tree = busybox_tree(dir.path());
    let data = |mib: usize| (0..mib << 20).map(|at| (at * 31 / 7) as u8 | 1).collect::<Vec<_>>();
    for (name, mib) in [("base", 12), ("large", 40)] {
        std::fs::write(tree.join("data"), data(mib)).unwrap();
        ext4(&tree, &dir.path().join(format!("{name}.ext4")));
    }
    docker_archive(&dir.path().join("large.tar"), 40 << 20);
    run(Command::new("chmod").args(["-R", "a+rX"]).arg(dir.path()));
    // A template takes more room than there is, and time.
    let config = owner.home().join(".config/banger");
    run(owner.program("mkdir").arg("-p").arg(&config));
    std::fs::write(config.join("config.toml"), "restore = false\n").unwrap();
    // A small disk that is there for these commands only. A file takes all of it but 6 MB.
    let script = format!(
        r#"state={state}; dir={dir}; kernels=$(mktemp -d)
        say() {{ echo "$ banger $*"; banger "$@" 2>&1; }}
        cp -a $state/kernels $state/banger.db $kernels
        mount -t tmpfs -o size=200m,mode=700 none $state
        mv $kernels/* $state; export XDG_CACHE_HOME=$state/cache
        banger image register --name base --rootfs $dir/base.ext4
        banger vm create --no-start --name work --image base --memory 256M
        left=$(df --output=avail -k $state | tail -n 1)
        head -c $(((left - 6000) * 1024)) /dev/zero > $state/filler
        say image load -i $dir/large.tar --name x
        say image register --name x --rootfs $dir/large.ext4
        say kernel import x --from $dir/boot
        say image commit work x
        say image export base > $state/../out.tar
        sed 1d $state/../out.tar
        say image verify base
        rm $state/filler
        say image delete {IMAGE}
        say image verify | sed 's/^\(ok   kernel generic-6.12\):.*/\1/'
        banger image list | cut -d ' ' -f 1
        say image load -i $dir/large.tar --name x
        say image commit work y
        banger daemon stop"#,
        state = owner.state().display(),
        dir = dir.path().display()
    );
    let mut command = owner.program("unshare");
    let command = command.args(["-Um", "--map-current-user", "--keep-caps", "sh", "-c", &script]);
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text)
        .replace(owner.home().to_str().unwrap(), "~")
        .replace(dir.path().to_str().unwrap(), "DIR");
    insta::assert_snapshot!(without_random_names(&text));
}

/// Replaces what temporary names end in, and digests of what differs from one release of a tool to the next.
fn without_random_names(text: &str) -> String {
    let mut out = text.to_owned();
    for (prefix, len) in [("/load-", 6), ("/.new-", 6), ("ext4, sha256 ", 64), ("vmlinuz-", 0)] {
        let parts: Vec<&str> = out.split(prefix).collect();
        let rest = parts[1..].iter().map(|part| match len {
            0 => part.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || "+.-".contains(c)),
            _ => part.get(len..).unwrap_or(part),
        });
        out = std::iter::once(parts[0]).chain(rest).collect::<Vec<_>>().join(&format!("{prefix}[…]"));
    }
    out
}
