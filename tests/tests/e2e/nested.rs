//! An ordinary kernel under a real Firecracker, on any machine: an emulated processor has AMD's virtualisation, so a vm of
//! banger's, with its kernel's own KVM module, is a machine that Firecracker runs on.

use crate::support::{IMAGE, Owner, programs, run, show, skip, store};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The outer vm.
struct Host<'a>(&'a Owner);

impl Host<'_> {
    fn exec(&self, script: &str) -> Output {
        self.0
            .banger(["vm", "exec", "--env", "HOME=/root", "host", "--", "sh", "-c", script])
            .output()
            .unwrap()
    }

    /// Runs a script that has to succeed, and returns what it printed.
    fn ok(&self, script: &str) -> String {
        let output = self.exec(script);
        if !output.status.success() {
            let logs =
                "cd .local/state/banger; tail -n 30 bangerd.log vms/*/console.log vms/*/supervisor.log";
            panic!("{script}: {}{}", show(&output), show(&self.exec(&format!("cd; {logs}"))));
        }
        String::from_utf8(output.stdout).unwrap()
    }

    /// Copies files there, as `tar` packs them with these arguments.
    fn copy(&self, args: &[&Path], to: &str) {
        let mut tar = Command::new("tar").args(["-cSh"]).args(args).stdout(Stdio::piped()).spawn().unwrap();
        let mut unpack = self.0.banger(["vm", "exec", "host", "--", "tar", "-xS", "-C", to]);
        let output = unpack.stdin(tar.stdout.take().unwrap()).output().unwrap();
        assert!(tar.wait().unwrap().success() && output.status.success(), "{}", show(&output));
    }
}

fn find(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}

#[test]
fn linux_under_firecracker() {
    let Some(firecracker) = find("firecracker") else {
        return skip("linux_under_firecracker: `firecracker` is not on PATH");
    };
    let owner = Owner::with_store();
    let create = ["vm", "create", "--name", "host", "--memory", "3G", "--vcpu", "2", "--vmm", "qemu"];
    owner.ok([&create[..], &["--net", "none", "--image", IMAGE, "--wait", "boot"]].concat());
    let host = Host(&owner);
    if !host.exec("modprobe kvm_amd && modprobe tun && test -c /dev/kvm").status.success() {
        return skip("linux_under_firecracker: no KVM in a vm here");
    }
    // In the outer vm.
    let (bin, state) = ("/usr/local/bin", "/root/.local/state/banger");
    for program in [programs().join("banger"), programs().join("bangerd"), firecracker] {
        let (dir, name) = (program.parent().unwrap(), program.file_name().unwrap());
        host.copy(&["-C".as_ref(), dir, Path::new(name)], bin);
    }
    if !host.exec("banger version && firecracker --version").status.success() {
        return skip("linux_under_firecracker: the programs do not run on the image's C library");
    }
    host.ok(&format!("mkdir -p -m 700 {state}"));
    host.copy(&["-C".as_ref(), store(), "images".as_ref(), "kernels".as_ref(), "banger.db".as_ref()], state);
    host.ok(&format!("chmod 700 {state} {state}/*/"));

    let shape = format!("--memory 512M --vmm firecracker --image {IMAGE}");
    // The small vm that tells whether KVM is usable has 200 ms, which is little for an emulated processor on a busy
    // machine; another daemon tries again.
    let create = format!("banger vm create --name inner --wait boot {shape}");
    host.ok(&format!("for i in $(seq 40); do {create} && exit 0; banger daemon stop; done; exit 1"));
    let shown = host.ok("banger vm show inner");
    assert!(shown.contains("firecracker, KVM, process"), "{shown}");
    let inner = |script: &str| host.exec(&format!("banger vm exec inner -- sh -c '{script}'"));
    assert_eq!(inner("exit 42").status.code(), Some(42));
    let output = inner("echo out; echo err >&2; systemctl is-system-running");
    assert_eq!((&*output.stdout, &*output.stderr), (&b"out\nrunning\n"[..], &b"err\n"[..]));
    let links = String::from_utf8(inner("ip -br address").stdout).unwrap();
    assert!(links.contains("eth0") && links.contains("10.231.7.2/30"), "{links}");
    // Both ways, far beyond what any buffer holds.
    let there_and_back =
        "head -c 8000000 /dev/urandom > /tmp/sent; banger vm exec inner -- cat < /tmp/sent | cmp - /tmp/sent";
    host.ok(there_and_back);

    let boot_id = "cat /proc/sys/kernel/random/boot_id";
    let before = inner(boot_id).stdout;
    inner("echo kept > /root/file; systemctl reboot --no-block");
    let again = "for i in $(seq 600); do sleep 0.1; now=$(banger vm exec inner -- cat /proc/sys/kernel/random/boot_id 2>/dev/null);
        test -n \"$now\" && test \"$now\" != \"$0\" && exit 0; done; exit 1";
    host.ok(&format!("sh -c '{}' {}", again.replace('\'', ""), String::from_utf8_lossy(&before).trim()));
    host.ok("banger vm stop inner");
    assert!(host.ok("banger vm show inner").contains("state:        stopped"));
    host.ok("banger vm start --wait boot inner");
    assert_eq!(inner("cat /root/file").stdout, b"kept\n");
    inner("systemctl poweroff --no-block");
    host.ok(
        "for i in $(seq 600); do banger vm show inner | grep -q stopped && exit 0; sleep 0.1; done; exit 1",
    );
    // What the guest frees goes back, also where its memory began as a saved machine's.
    host.ok("banger vm start --wait boot inner");
    let output = inner("modprobe virtio_balloon && head -c 150M /dev/zero > /dev/shm/filler");
    assert!(output.status.success(), "{}", show(&output));
    let used = "awk '/RssAnon/ { print int($2 / 1024) }' /proc/$(pgrep -x firecracker)/status";
    let full: u32 = host.ok(used).trim().parse().unwrap();
    inner("rm /dev/shm/filler");
    let less = format!(
        "for i in $(seq 600); do test $({used}) -lt {} && exit 0; sleep 0.1; done; exit 1",
        full.saturating_sub(75)
    );
    host.ok(&less);
    println!("{full} MiB with 150 MiB in use, then {} MiB", host.ok(used).trim());
    host.ok("banger vm delete -f inner");
    // By its own user in its own namespaces, and gone with everything it had.
    let output = host.exec(&format!("banger vm run --rm -v {shape} -- printf '%s|' 'a b' \"c'd\" ''"));
    assert_eq!(output.stdout, b"a b|c'd||", "{}", show(&output));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("restore to agent"), "it went on from a saved machine: {said}");
    println!("{said}");
    let config = "mkdir -p .config/banger; echo restore = false >.config/banger/config.toml";
    let output = host.exec(&format!("cd; {config}; banger vm run --rm -v {shape} -- true"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("boot to agent"), "it boots: {said}");
    println!("{said}");
    host.ok("for i in $(seq 100); do pgrep firecracker >/dev/null || exit 0; sleep 0.1; done; exit 1");
    assert_eq!(host.ok(&format!("ls {state}/vms")), "");
    println!("with {}", run(Command::new("sh").args(["-c", "firecracker --version | head -n 1"])).trim());
    owner.ok(["vm", "delete", "-f", "host"]);
    owner.assert_nothing_left();
}
