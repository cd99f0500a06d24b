//! Images with an initrd of their own: what becomes of their vms, and the initrds that Debian's two tools make.

use crate::files::{busybox_tree, ext4, initrd, install, missing, shared_dir};
use crate::support::{Owner, is_root, run, show, skip};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn check_filesystem(file: &Path) {
    let checked = Command::new("e2fsck").arg("-fn").arg(file).output().unwrap();
    assert!(checked.status.success(), "{}", show(&checked));
}

#[test]
fn a_vm_with_an_initrd_of_its_own_becomes_an_image_that_boots_like_it() {
    if missing("commit with an initrd", &["mke2fs", "e2fsck", "busybox", "cpio", "gzip"]) {
        return;
    }
    let (owner, dir) = (Owner::with_store(), shared_dir());
    let tree = busybox_tree(dir.path());
    install(&tree.join("sbin/init"), b"#!/bin/sh\nwhile :; do /bin/busybox sleep 60; done\n");
    // Of the image's own, not mounted by banger.
    for name in ["lib/modules/of-its-own", "var/lib/docker", "srv"] {
        std::fs::create_dir_all(tree.join(name)).unwrap();
    }
    std::fs::write(tree.join("lib/modules/of-its-own/module"), "kept\n").unwrap();
    std::fs::write(tree.join("srv/gone"), "").unwrap();
    let (rootfs, initrd) = (dir.path().join("rootfs.ext4"), initrd(dir.path()));
    ext4(&tree, &rootfs);
    let (rootfs, initrd) = (rootfs.to_str().unwrap(), initrd.to_str().unwrap());
    owner.ok(["image", "register", "--name", "classic", "--rootfs", rootfs, "--initrd", initrd]);
    let create = |name: &str, image: &str| {
        let sizes = ["--memory", "256M", "--disk-size", "512M"];
        owner.ok(["vm", "create", "--name", name, "--image", image].into_iter().chain(sizes));
    };
    create("work", "classic");
    let script = "rm /srv/gone && mv /srv /data && echo added > /var/lib/docker/added && sync && \
                  /bin/busybox dd if=/dev/zero of=/large bs=1M count=200 2>/dev/null && rm /large && sync";
    owner.ok(["exec", "work", "--", "sh", "-ec", script]);
    // Its filesystem has a journal to be replayed now.
    owner.ok(["vm", "kill", "work"]);
    assert_eq!(owner.ok(["image", "commit", "work", "made"]), "made made\n");
    owner.ok(["vm", "start", "work"]);
    owner.ok(["exec", "work", "--", "test", "-d", "/data"]);
    owner.ok(["vm", "delete", "-f", "work"]);
    owner.ok(["image", "delete", "classic"]);
    let shown = owner.json(&["image", "show", "made", "--json"]);
    assert_eq!((&shown["initrd"], &shown["filesystem"]), (&true.into(), &"ext4".into()), "{shown}");
    let verified = owner.ok(["image", "verify", "made"]);
    assert!(verified.starts_with("ok   image made: ext4, sha256 "), "{verified}");
    check_filesystem(&owner.state().join("images/made/rootfs.ext4"));

    create("again", "made");
    let script =
        "hostname; cat /etc/hostname /booted /var/lib/docker/added /lib/modules/of-its-own/module; ls /data";
    let said = owner.ok(["exec", "again", "--", "sh", "-c", script]);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!((&lines[..2], &lines[3..]), (&["again"; 2][..], &["added", "kept"][..]), "{said}");
    assert!(lines[2].contains("rdinit=/banger/init root=/dev/vda rw"), "{said}");
    let script =
        "/bin/busybox dd if=/dev/zero of=/large bs=1M count=200 2>/dev/null; echo kept > /kept; sync";
    owner.ok(["exec", "again", "--", "sh", "-c", script]);
    owner.ok(["vm", "kill", "again"]);
    owner.ok(["vm", "start", "again"]);
    let said = owner.ok(["exec", "again", "--", "sh", "-c", "cat /kept; stat -c %s /large"]);
    assert_eq!(said, format!("kept\n{}\n", 200 << 20));
    owner.ok(["vm", "stop", "again"]);
    check_filesystem(&disk(&owner));
    owner.ok(["vm", "delete", "again"]);
    owner.assert_nothing_left();
}

/// The disk of the owner's one vm.
fn disk(owner: &Owner) -> PathBuf {
    let mut vms = std::fs::read_dir(owner.state().join("vms")).unwrap();
    vms.next().unwrap().unwrap().path().join("disk.raw")
}

/// The kernel of both tests, as the security archive of bookworm has it.
const KERNEL: &str = "linux-image-6.12-cloud-amd64";

/// A Debian with systemd, and the initrds that initramfs-tools and dracut make in it.
struct Debian {
    rootfs: PathBuf,
    kernel: PathBuf,
    modules: PathBuf,
    initrds: [(&'static str, PathBuf); 2],
}

fn debian(dir: &Path) -> Debian {
    let (root, out) = (dir.join("debian"), dir.join("out"));
    std::fs::create_dir(&out).unwrap();
    let take = |name: &str| format!("cp \"$1\"/boot/initrd.img-* {}/{name}", out.display());
    // Its package takes the place of the other one.
    let dracut = "chroot \"$1\" env DEBIAN_FRONTEND=noninteractive \
                  apt-get install -qq -y --no-install-recommends dracut >/dev/null 2>&1";
    let mut command = Command::new("mmdebstrap");
    command.args(["--quiet", "--mode=root", "--variant=minbase"]);
    command.arg(format!("--include={KERNEL},initramfs-tools,systemd-sysv,zstd"));
    for hook in [take("initramfs-tools").as_str(), dracut, &take("dracut")] {
        command.arg(format!("--customize-hook={hook}"));
    }
    run(command.arg("bookworm").arg(&root).stdin(Stdio::null()));
    let script =
        "cp \"$1\"/boot/vmlinuz-* \"$2\"/vmlinuz && cp -a \"$1\"/lib/modules \"$2\" && chmod -R a+rX \"$2\"";
    run(Command::new("sh").args(["-ec", script, "sh"]).arg(&root).arg(&out));
    let rootfs = out.join("rootfs.ext4");
    run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&root).arg(&rootfs).arg("1G"));
    Debian {
        rootfs,
        kernel: out.join("vmlinuz"),
        modules: out.join("modules"),
        initrds: ["initramfs-tools", "dracut"].map(|tool| (tool, out.join(tool))),
    }
}

#[test]
fn the_initrds_of_debian_boot() {
    if !is_root() {
        return skip("Debian's initrds: mmdebstrap needs root here");
    }
    if missing("Debian's initrds", &["mmdebstrap", "mke2fs"]) {
        return;
    }
    let (owner, dir) = (Owner::with_store(), shared_dir());
    let made = debian(dir.path());
    for (tool, initrd) in &made.initrds {
        owner.ok([
            "image".as_ref(),
            "register".as_ref(),
            "--name".as_ref(),
            tool.as_ref(),
            "--rootfs".as_ref(),
            made.rootfs.as_os_str(),
            "--kernel".as_ref(),
            made.kernel.as_os_str(),
            "--modules".as_ref(),
            made.modules.as_os_str(),
            "--initrd".as_ref(),
            initrd.as_os_str(),
        ]);
        // Both unpack to many times their size.
        owner.ok(["vm", "create", "--name", "d", "--image", tool, "--memory", "768M"]);
        let script = "until systemctl is-system-running --wait; do sleep 0.5; done; cat /proc/1/comm; \
                      hostname; cat /etc/machine-id; stat -f -c %S*%b /; systemctl --failed --no-legend";
        let said = owner.ok(["exec", "d", "--", "sh", "-c", &format!("{{ {script}; }} 2>/dev/null")]);
        let id = owner.json(&["vm", "show", "--json", "d"])["id"].as_str().unwrap().to_owned();
        let lines: Vec<&str> = said.lines().collect();
        let states = lines.len() - 4;
        assert_eq!(lines[states - 1], "running", "{tool}: {said}");
        assert_eq!(&lines[states..states + 2], ["systemd", "d"], "{tool}: {said}");
        assert!(lines[states + 2].starts_with(&id), "the machine's id is that of the vm: {tool}: {said}");
        let (len, blocks) = lines[states + 3].split_once('*').unwrap();
        let size = len.parse::<u64>().unwrap() * blocks.parse::<u64>().unwrap();
        assert!(size > 7 << 30, "the filesystem is as large as the disk: {tool}: {size}");
        owner.ok(["exec", "d", "--", "sh", "-c", "echo kept > /kept"]);
        owner.ok(["vm", "stop", "d"]);
        check_filesystem(&disk(&owner));
        owner.ok(["vm", "start", "d"]);
        assert_eq!(owner.ok(["exec", "d", "--", "cat", "/kept"]), "kept\n");
        owner.ok(["vm", "delete", "-f", "d"]);
        owner.ok(["image", "delete", tool]);
    }
    owner.assert_nothing_left();
}
