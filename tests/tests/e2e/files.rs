//! Images and kernels of files: registered, imported, verified, exported, committed.

use crate::support::{IMAGE, Owner, has, is_root, run, show, skip};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A tree whose one program is busybox.
pub(crate) fn busybox_tree(dir: &Path) -> PathBuf {
    let root = dir.join("root");
    for name in ["bin", "sbin", "etc", "dev", "proc", "sys", "tmp", "root"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    install(&root.join("bin/busybox"), &std::fs::read("/bin/busybox").unwrap());
    for name in
        ["sh", "test", "cat", "ls", "uname", "mount", "touch", "mv", "rm", "grep", "stat", "sync", "hostname"]
    {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    std::fs::write(root.join("etc/os-release"), "ID=registered\n").unwrap();
    std::fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\n").unwrap();
    root
}

pub(crate) fn install(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// Makes an ext4 of a tree, as an ordinary tool does.
pub(crate) fn ext4(tree: &Path, file: &Path) {
    run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(tree).arg(file).arg("64M"));
}

pub(crate) fn missing(what: &str, programs: &[&str]) -> bool {
    let missing = programs.iter().find(|program| !has(program));
    if let Some(program) = missing {
        skip(&format!("{what}: `{program}` is not installed"));
    }
    missing.is_some()
}

/// A directory that owners can read and write.
pub(crate) fn shared_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    dir
}

/// A kernel as distributions ship it, made of the store's: gzip after a boot header, in a directory like `/boot`, with
/// its modules beside.
pub(crate) fn boot_tree(owner: &Owner, dir: &Path) -> (PathBuf, String) {
    let kernel = owner.state().join("kernels/generic-6.12");
    let meta: serde_json::Value =
        serde_json::from_slice(&std::fs::read(kernel.join("kernel.json")).unwrap()).unwrap();
    let release = meta["release"].as_str().unwrap().to_owned();
    let packed = Command::new("gzip").args(["-1", "-n", "-c"]).arg(kernel.join("vmlinux")).output().unwrap();
    let mut image = vec![0u8; 1024];
    image[0x1f1] = 1;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x24c..0x250].copy_from_slice(&(packed.stdout.len() as u32).to_le_bytes());
    image.extend_from_slice(&packed.stdout);
    let (boot, modules) = (dir.join("boot"), dir.join("lib/modules").join(&release));
    std::fs::create_dir_all(&boot).unwrap();
    std::fs::create_dir_all(&modules).unwrap();
    std::fs::write(boot.join(format!("vmlinuz-{release}")), image).unwrap();
    run(Command::new("debugfs")
        .arg("-R")
        .arg(format!("rdump / {}", modules.display()))
        .arg(kernel.join("modules.ext4"))
        .stderr(Stdio::null()));
    run(Command::new("chmod").args(["-R", "a+rX"]).arg(dir));
    (boot, release)
}

#[test]
fn a_filesystem_of_each_kind_becomes_an_image() {
    if missing("registered images", &["mke2fs", "mksquashfs", "mkfs.erofs", "busybox"]) {
        return;
    }
    let (owner, dir) = (Owner::with_store(), shared_dir());
    let tree = busybox_tree(dir.path());
    let file = |kind: &str| dir.path().join(format!("rootfs.{kind}"));
    ext4(&tree, &file("ext4"));
    run(Command::new("mksquashfs").arg(&tree).arg(file("squashfs")).args([
        "-quiet",
        "-no-progress",
        "-all-root",
    ]));
    run(Command::new("mkfs.erofs").arg("--quiet").arg(file("erofs")).arg(&tree));
    for kind in ["ext4", "squashfs", "erofs"] {
        let name = format!("of-{kind}");
        let path = file(kind);
        let made = owner.ok(["image", "register", "--name", &name, "--rootfs", path.to_str().unwrap()]);
        assert_eq!(made, format!("registered {name}\n"));
        let shown = owner.json(&["image", "show", &name, "--json"]);
        assert_eq!(shown["filesystem"], kind);
        let script = "cat /etc/os-release; touch /etc/os-release /new && ls /new";
        let output = owner
            .banger(["run", "--rm", "--memory", "256M", "--image", &name, "--", "sh", "-c", script])
            .output()
            .unwrap();
        assert_eq!(output.stdout, b"ID=registered\n/new\n", "{kind}: {}{}", show(&output), owner.logs());
        std::fs::remove_file(path).unwrap();
    }
    let verified = owner.ok(["image", "verify"]);
    assert_eq!(verified.lines().filter(|line| line.starts_with("ok   image of-")).count(), 3, "{verified}");
    owner.assert_nothing_left();
}

#[test]
fn what_can_not_be_registered_is_said_and_leaves_nothing() {
    if missing("registered images", &["mke2fs", "debugfs"]) {
        return;
    }
    let (owner, dir) = (Owner::with_store(), shared_dir());
    let file = |name: &str, content: &[u8]| {
        std::fs::write(dir.path().join(name), content).unwrap();
        dir.path().join(name).to_str().unwrap().to_owned()
    };
    let text = file("text", b"not a filesystem");
    let dirty = dir.path().join("dirty");
    run(Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(&dirty).arg("8M"));
    run(Command::new("debugfs")
        .args(["-w", "-R", "feature needs_recovery"])
        .arg(&dirty)
        .stderr(Stdio::null()));
    let dirty = dirty.to_str().unwrap();
    let refused = |args: &[&str]| {
        let output = owner.banger(["image", "register", "--name", "x"].iter().chain(args)).output().unwrap();
        assert!(matches!(output.status.code(), Some(1 | 2)), "{}", show(&output));
        String::from_utf8_lossy(&output.stderr).replace(&dir.path().display().to_string(), "DIR")
    };
    let clean = dir.path().join("clean");
    run(Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(&clean).arg("8M"));
    let clean = clean.to_str().unwrap();
    let said = [
        refused(&["--rootfs", &text]),
        refused(&["--rootfs", dirty]),
        refused(&["--rootfs", "/nowhere"]),
        refused(&["--rootfs", clean, "--kernel", &text]),
        refused(&["--rootfs", clean, "--initrd", &text]),
        refused(&["--rootfs", clean, "--kernel-ref", "of-nobody"]),
    ];
    insta::assert_snapshot!(said.join("\n"));
    let images = owner.json(&["image", "list", "--json"]);
    assert_eq!(images.as_array().unwrap().len(), 1, "{images}");
    assert_eq!(std::fs::read_dir(owner.state().join("images")).unwrap().count(), 1);
    assert_eq!(std::fs::read_dir(owner.state().join("kernels")).unwrap().count(), 1);
}

#[test]
fn an_image_with_a_kernel_of_its_own() {
    if missing("a registered kernel", &["mke2fs", "debugfs", "gzip", "busybox"]) {
        return;
    }
    let (owner, dir) = (Owner::with_store(), shared_dir());
    let (boot, release) = boot_tree(&owner, dir.path());
    let rootfs = dir.path().join("rootfs.ext4");
    ext4(&busybox_tree(dir.path()), &rootfs);
    let rootfs = rootfs.to_str().unwrap();
    let imported = owner.ok(["kernel", "import", "own", "--from", boot.to_str().unwrap()]);
    assert_eq!(imported, "imported own\n");
    let kernel = boot.join(format!("vmlinuz-{release}"));
    let modules = dir.path().join("lib");
    owner.ok([
        "image",
        "register",
        "--name",
        "both",
        "--rootfs",
        rootfs,
        "--kernel",
        kernel.to_str().unwrap(),
        "--modules",
        modules.to_str().unwrap(),
    ]);
    owner.ok(["image", "register", "--name", "mixed", "--rootfs", rootfs, "--kernel-ref", "own"]);
    for (image, kernel) in [("both", "both"), ("mixed", "own")] {
        let vm =
            owner.json(&["vm", "create", "--json", "--memory", "256M", "--name", image, "--image", image]);
        assert_eq!(vm["kernel"], kernel);
        let script = "uname -r; grep -c . /lib/modules/$(uname -r)/modules.dep";
        let said = owner.ok(["exec", image, "--", "sh", "-c", script]);
        let (found, count) = said.trim().split_once('\n').unwrap();
        assert_eq!(found, release);
        assert!(count.parse::<u32>().unwrap() > 100, "{said}");
    }
    let refused = |args: &[&str]| {
        let output = owner.banger(args).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", show(&output));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(refused(&["kernel", "delete", "own"]).starts_with("error: kernel `own` is used by `mixed`\n"));
    owner.ok(["vm", "delete", "-f", "mixed", "both"]);
    let said = refused(&["kernel", "delete", "own"]);
    assert!(said.contains("banger image delete"), "{said}");
    owner.ok(["image", "delete", "mixed", "both"]);
    let kernels = owner.json(&["kernel", "list", "--json"]);
    let names: Vec<&str> = kernels.as_array().unwrap().iter().map(|k| k["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["generic-6.12", "own"], "the one that came with an image has gone with it");
    owner.ok(["kernel", "delete", "own"]);
}

/// An initrd of the classic kind: a shell script finds the root filesystem and enters it.
pub(crate) fn initrd(dir: &Path) -> PathBuf {
    let root = dir.join("initrd.d");
    for name in ["bin", "dev", "proc", "sys", "mnt"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    install(&root.join("bin/busybox"), &std::fs::read("/bin/busybox").unwrap());
    let script = "#!/bin/busybox sh\n\
                  /bin/busybox mount -t proc proc /proc\n\
                  /bin/busybox mount -t devtmpfs dev /dev\n\
                  /bin/busybox mount -t ext4 -o rw /dev/vda /mnt\n\
                  echo \"$(/bin/busybox cat /proc/cmdline)\" > /mnt/booted\n\
                  /bin/busybox mount --move /proc /mnt/proc\n\
                  /bin/busybox mount --move /dev /mnt/dev\n\
                  exec /bin/busybox switch_root /mnt /sbin/init\n";
    install(&root.join("init"), script.as_bytes());
    let file = dir.join("initrd.img");
    let mut child = Command::new("sh")
        .args(["-c", "find . | cpio -o -H newc --quiet | gzip -n"])
        .current_dir(&root)
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(&file).unwrap())
        .spawn()
        .unwrap();
    assert!(child.wait().unwrap().success());
    file
}

#[test]
fn an_image_with_an_initrd_of_its_own_boots_the_classic_way() {
    if missing("a registered initrd", &["mke2fs", "busybox", "cpio", "gzip"]) {
        return;
    }
    let (owner, dir) = (Owner::with_store(), shared_dir());
    let tree = busybox_tree(dir.path());
    install(
        &tree.join("sbin/init"),
        b"#!/bin/sh\nhostname -F /etc/hostname\necho $$ > /init-was\nwhile :; do /bin/busybox sleep 60; done\n",
    );
    let rootfs = dir.path().join("rootfs.ext4");
    ext4(&tree, &rootfs);
    let initrd = initrd(dir.path());
    owner.ok([
        "image",
        "register",
        "--name",
        "classic",
        "--rootfs",
        rootfs.to_str().unwrap(),
        "--initrd",
        initrd.to_str().unwrap(),
    ]);
    owner.ok([
        "vm",
        "create",
        "--memory",
        "256M",
        "--name",
        "c",
        "--image",
        "classic",
        "--disk-size",
        "256M",
    ]);
    let said = owner.ok([
        "exec",
        "c",
        "--",
        "sh",
        "-c",
        "until test -s /init-was; do /bin/busybox sleep 0.1; done; cat /init-was /etc/hostname; hostname; cat /booted",
    ]);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(&lines[..3], ["1", "c", "c"], "{said}");
    assert!(lines[3].contains("rdinit=/banger/init root=/dev/vda rw"), "{said}");
    let free = owner.ok(["exec", "c", "--", "/bin/busybox", "stat", "-f", "-c", "%f %S", "/"]);
    let (blocks, len) = free.trim().split_once(' ').unwrap();
    let free = blocks.parse::<u64>().unwrap() * len.parse::<u64>().unwrap();
    assert!(free > 160 << 20, "the filesystem is as large as the disk: {free} bytes free");
    owner.ok(["exec", "c", "--", "sh", "-c", "echo kept > /kept; sync"]);
    owner.ok(["vm", "stop", "c"]);
    owner.ok(["vm", "start", "c"]);
    assert_eq!(owner.ok(["exec", "c", "--", "cat", "/kept"]), "kept\n");
    let output =
        owner.banger(["run", "--rm", "--memory", "256M", "--image", "classic", "--", "ls", "/kept"]).output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(1), "another vm has a copy of its own: {}", show(&output));
    owner.ok(["vm", "delete", "-f", "c"]);
    owner.assert_nothing_left();
}

#[test]
fn damage_is_found() {
    if !is_root() {
        return skip("damage to a store: its files are shared between tests unless root copies them");
    }
    let owner = Owner::with_store();
    let rootfs = owner.state().join("images").join(IMAGE).join("rootfs.ext4");
    // The tests share this file.
    let copy = rootfs.with_extension("copy");
    run(Command::new("cp").args(["--sparse=always"]).arg(&rootfs).arg(&copy));
    std::fs::rename(&copy, &rootfs).unwrap();
    let text = owner.ok(["image", "verify", IMAGE]);
    assert!(text.starts_with(&format!("ok   image {IMAGE}: ")), "{text}");
    let file = std::fs::File::options().write(true).open(&rootfs).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0x55; 16], 1024).unwrap();
    let modules = owner.state().join("kernels/generic-6.12/boot/modules.list");
    std::fs::File::options().append(true).open(&modules).unwrap().write_all(b"more\n").unwrap();
    let output = owner.banger(["image", "verify"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", show(&output));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains(&format!("FAIL image {IMAGE}: ")) && text.contains("FAIL kernel generic-6.12: "),
        "{text}"
    );
    assert!(text.contains("banger image delete") && text.contains("banger kernel delete"), "{text}");
}

#[test]
fn an_image_goes_out_and_comes_back() {
    if missing("export", &["mke2fs", "debugfs", "busybox", "tar", "skopeo"]) {
        return;
    }
    let (owner, dir) = (Owner::with_store(), shared_dir());
    let tree = busybox_tree(dir.path());
    std::fs::hard_link(tree.join("etc/passwd"), tree.join("etc/passwd-too")).unwrap();
    std::os::unix::fs::symlink("of nothing", tree.join("etc/link")).unwrap();
    let mut mode = std::fs::metadata(tree.join("tmp")).unwrap().permissions();
    mode.set_mode(0o1777);
    std::fs::set_permissions(tree.join("tmp"), mode).unwrap();
    let sparse = std::fs::File::create(tree.join("etc/sparse")).unwrap();
    sparse.write_all_at(&[7; 70_000], 300 << 20).unwrap();
    sparse.set_len(1 << 30).unwrap();
    let rootfs = dir.path().join("sparse.ext4");
    ext4(&tree, &rootfs);
    owner.ok(["image", "register", "--name", "out", "--rootfs", rootfs.to_str().unwrap()]);
    let mut command = owner.banger(["image", "export", "out"]);
    let archive = command.output().unwrap();
    assert!(archive.status.success(), "{}{}", show(&archive), owner.logs());
    assert!(archive.stdout.len() < 32 << 20, "holes are not sent: {} bytes", archive.stdout.len());
    let mut load = owner.banger(["image", "load", "--name", "back"]);
    let mut child = load.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&archive.stdout).unwrap();
    assert!(child.wait().unwrap().success());
    let layout = dir.path().join("layout");
    owner.ok(["image", "export", "out", "-o", &format!("oci:{}", layout.display())]);
    let inspected = run(Command::new("skopeo").args(["inspect", &format!("oci:{}", layout.display())]));
    assert!(inspected.contains("\"Architecture\": \"amd64\""), "{inspected}");
    owner.ok(["image", "pull", &format!("oci:{}", layout.display()), "--name", "pulled"]);
    let list = |image: &str| {
        let file = owner.state().join("images").join(image).join("rootfs.ext4");
        let script = "ls -l /\nls -l /etc\nls -l /bin\nls -l /tmp\ncat /etc/os-release\nstat /etc/link\n";
        let mut child = Command::new("debugfs")
            .args(["-f", "-"])
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        // Everything but inode numbers, and what ext4 itself put there.
        let kept = |line: &&str| {
            !line.contains("lost+found") && !line.contains("BLOCKS") && !line.contains("Inode:")
        };
        let line = |line: &str| line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ");
        let mut lines: Vec<String> = text.lines().filter(kept).map(line).collect();
        // Plain files and links; how long a directory is, is ext4's own affair.
        let told = |line: &str| line.starts_with("100") || line.starts_with("120") || line.contains("ID=");
        lines.retain(|line| told(line));
        lines.sort();
        lines.join("\n")
    };
    let expected = list("out");
    assert!(expected.contains("passwd-too") && expected.contains("busybox"), "{expected}");
    for image in ["back", "pulled"] {
        assert_eq!(list(image), expected, "{image}");
    }
    assert_eq!(list("back").matches("passwd").count(), 2);
    let stat = Command::new("debugfs")
        .args(["-R", "stat /etc/sparse"])
        .arg(owner.state().join("images/back/rootfs.ext4"))
        .output()
        .unwrap();
    let stat = String::from_utf8_lossy(&stat.stdout).into_owned();
    // In units of 512 bytes: 18 blocks.
    assert!(stat.contains("Size: 1073741824") && stat.contains("Blockcount: 144"), "{stat}");
    std::fs::write(dir.path().join("out.tar"), &archive.stdout).unwrap();
    others_read_holes(dir.path(), &tree.join("etc/sparse"));
    owner.assert_nothing_left();
}

/// What other programs unpack of the exported `layout` and `out.tar` has the file's content.
fn others_read_holes(dir: &Path, original: &Path) {
    if !is_root() || missing("other readers of holes", &["umoci", "buildah"]) {
        return;
    }
    let same = |file: &Path| {
        let compared = Command::new("cmp").arg(file).arg(original).output().unwrap();
        assert!(compared.status.success(), "{}", show(&compared));
    };
    let bundle = dir.join("bundle");
    run(Command::new("umoci")
        .args(["unpack", "--image", &format!("{}/layout:latest", dir.display())])
        .arg(&bundle));
    same(&bundle.join("rootfs/etc/sparse"));
    let buildah = |args: &[&str]| {
        let mut command = Command::new("buildah");
        command.args(["--root", dir.join("storage").to_str().unwrap()]);
        command.args(["--runroot", dir.join("run").to_str().unwrap(), "--storage-driver", "vfs"]).args(args);
        run(&mut command).trim().to_owned()
    };
    let container = buildah(&["from", &format!("docker-archive:{}/out.tar", dir.display())]);
    same(&Path::new(&buildah(&["mount", &container])).join("etc/sparse"));
    buildah(&["umount", &container]);
    buildah(&["rm", &container]);
}

#[test]
fn a_stopped_vm_becomes_an_image() {
    if missing("commit", &["mke2fs", "busybox"]) {
        return;
    }
    let (owner, dir) = (Owner::with_store(), shared_dir());
    let tree = busybox_tree(dir.path());
    std::fs::create_dir_all(tree.join("srv/old/deep")).unwrap();
    std::fs::write(tree.join("srv/old/deep/file"), "from the image\n").unwrap();
    std::fs::write(tree.join("srv/gone"), "").unwrap();
    let rootfs = dir.path().join("rootfs.ext4");
    ext4(&tree, &rootfs);
    owner.ok(["image", "register", "--name", "base", "--rootfs", rootfs.to_str().unwrap()]);
    owner.ok(["vm", "create", "--memory", "256M", "--name", "work", "--image", "base"]);
    let script =
        "mv /srv/old /srv/new && rm /srv/gone && echo added > /srv/added && echo v2 > /etc/os-release";
    owner.ok(["exec", "work", "--", "sh", "-c", script]);
    let output = owner.banger(["image", "commit", "work", "made"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(said, "error: vm `work` is running\nhint: stop it with `banger vm stop work` first\n");
    owner.ok(["vm", "stop", "work"]);
    assert_eq!(owner.ok(["image", "commit", "work", "made"]), "made made\n");
    owner.ok(["vm", "start", "work"]);
    owner.ok(["vm", "delete", "-f", "work"]);
    owner.ok(["image", "delete", "base"]);
    let script = "cat /srv/new/deep/file /srv/added /etc/os-release; ls /srv";
    let output = owner
        .banger(["run", "--rm", "--memory", "256M", "--image", "made", "--", "sh", "-c", script])
        .output();
    let output = output.unwrap();
    assert_eq!(
        output.stdout,
        b"from the image\nadded\nv2\nadded\nnew\n",
        "{}{}",
        show(&output),
        owner.logs()
    );
    let verified = owner.ok(["image", "verify", "made"]);
    assert!(verified.starts_with("ok   image made: ext4, sha256 "), "{verified}");
    owner.assert_nothing_left();
}

#[test]
fn a_daemon_killed_while_a_vm_becomes_an_image_leaves_it_stopped() {
    let owner = Owner::with_store();
    owner.ok(["vm", "create", "--no-start", "--memory", "256M", "--name", "work", "--image", IMAGE]);
    let vms = std::fs::read_dir(owner.state().join("vms")).unwrap();
    let dir = vms.map(|entry| entry.unwrap().path()).next().unwrap();
    let status = owner.json(&["daemon", "status", "--json"]);
    let pid = rustix::process::Pid::from_raw(status["pid"].as_i64().unwrap() as i32).unwrap();
    let mut commit = owner.banger(["image", "commit", "work", "made"]);
    let mut commit = commit.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    crate::support::wait_for("the vm that reads boots", || {
        let plan = std::fs::read_to_string(dir.join("plan.json")).unwrap_or_default();
        let console = std::fs::metadata(dir.join("console.log")).is_ok();
        if plan.contains("agent-only") && console { Ok(()) } else { Err(plan) }
    });
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert!(!commit.wait().unwrap().success());
    crate::support::wait_for("another daemon has found it", || {
        let output = owner.banger(["vm", "list", "--json"]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if text.contains("\"created\"") { Ok(()) } else { Err(show(&output)) }
    });
    let running = owner.processes().into_iter().filter(|line| line.contains("qemu")).count();
    assert_eq!(running, 0, "{:#?}", owner.processes());
    let images = owner.json(&["image", "list", "--json"]);
    assert_eq!(images.as_array().unwrap().len(), 1, "{images}");
    owner.ok(["vm", "start", "work"]);
    owner.ok(["vm", "delete", "-f", "work"]);
    owner.assert_nothing_left();
}
