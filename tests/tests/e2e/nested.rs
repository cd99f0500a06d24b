//! An ordinary kernel under a real Firecracker, on any machine: an emulated processor has AMD's virtualisation, so a vm of
//! banger's, with its kernel's own KVM module, is a machine that Firecracker runs on.

use crate::support::{IMAGE, Owner, programs, run, show, skip, store};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Arguments of vms in the outer vm.
pub(crate) const FIRECRACKER: &str = "--vmm firecracker --image debian-bookworm-slim";

/// The outer vm, as one of its users has it.
#[derive(Clone, Copy)]
pub(crate) struct Host<'a> {
    owner: &'a Owner,
    user: &'static str,
    home: &'static str,
}

impl<'a> Host<'a> {
    /// Starts it, with banger, a store and Firecracker for its root, or says why not. The owner has no store yet.
    pub(crate) fn start(owner: &'a Owner) -> Result<Self, &'static str> {
        let firecracker = find("firecracker").ok_or("`firecracker` is not on PATH")?;
        owner.copy_store();
        let create = ["vm", "create", "--name", "host", "--memory", "3G", "--vcpu", "2", "--vmm", "qemu"];
        owner.ok([&create[..], &["--net", "none", "--image", IMAGE, "--wait", "boot"]].concat());
        let host = Self { owner, user: "root", home: "/root" };
        if !host.exec("modprobe kvm_amd && modprobe tun && test -c /dev/kvm").status.success() {
            return Err("no KVM in a vm here");
        }
        // While there is a machine of KVM, a kernel calls it from its scheduler, whose code it rewrites for that when the
        // first one comes and the last one goes. An emulated processor may run into that and bring the kernel down, so
        // there is one all the time.
        host.ok("setsid perl -e 'open my $kvm, \"+<\", \"/dev/kvm\" or die; ioctl $kvm, 0xae01, 0 or die; sleep' </dev/null >/dev/null 2>&1 &");
        host.copy_into(
            &[programs().join("banger"), programs().join("bangerd"), firecracker],
            "/usr/local/bin",
        );
        if !host.exec("banger version && firecracker --version").status.success() {
            return Err("the programs do not run on the image's C library");
        }
        host.ok(&format!("mkdir -p -m 700 {}", host.state()));
        let parts = ["images", "kernels", "banger.db"].map(Path::new);
        host.copy(&[&["-C".as_ref(), store()], &parts[..]].concat(), &host.state());
        host.ok(&format!("chmod 700 {0} {0}/*/", host.state()));
        Ok(host)
    }

    /// Makes an ordinary user, who may open `/dev/kvm` and has a store.
    pub(crate) fn user(&self) -> Self {
        let user = Self { user: "dev", home: "/home/dev", ..*self };
        let (from, to) = (self.state(), user.state());
        // Files that nobody writes to are shared, as in an owner's store.
        self.ok(&format!(
            "useradd -m -s /bin/sh -G kvm dev && mkdir -p -m 700 {to} && cd {to} && cp -al {from}/images . &&
             cp -a {from}/kernels {from}/banger.db . && chown -R dev: kernels banger.db &&
             find images /home/dev/.local -type d -exec chown dev: '{{}}' +"
        ));
        user
    }

    pub(crate) fn state(&self) -> String {
        format!("{}/.local/state/banger", self.home)
    }

    /// Returns a command of this user's there.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let home = format!("HOME={}", self.home);
        let exec = ["vm", "exec", "--user", self.user, "--workdir", self.home, "--env", &home, "host", "--"];
        self.owner.banger([&exec, args].concat())
    }

    pub(crate) fn exec(&self, script: &str) -> Output {
        self.command(&["sh", "-c", script]).output().unwrap()
    }

    /// Runs a script that has to succeed, and returns what it printed.
    pub(crate) fn ok(&self, script: &str) -> String {
        self.succeeded(script, self.exec(script))
    }

    /// Runs `banger` there, which has to succeed, and returns what it printed.
    pub(crate) fn banger(&self, args: &[&str]) -> String {
        let output = self.command(&[&["banger"], args].concat()).output().unwrap();
        self.succeeded(&args.join(" "), output)
    }

    fn succeeded(&self, what: &str, output: Output) -> String {
        if !output.status.success() {
            let logs =
                format!("cd {}; tail -n 30 bangerd.log vms/*/console.log vms/*/supervisor.log", self.state());
            panic!("{what}: {}{}{}", show(&output), show(&self.exec(&logs)), self.owner.logs());
        }
        String::from_utf8(output.stdout).unwrap()
    }

    /// Makes the first vm there. The small vm that tells whether KVM is usable has 200 ms, which is little for an emulated
    /// processor on a busy machine; another daemon tries again.
    pub(crate) fn create_first(&self, args: &str) {
        let create = format!("banger vm create {FIRECRACKER} {args}");
        self.ok(&format!("for i in $(seq 100); do {create} && exit 0; banger daemon stop; done; exit 1"));
    }

    /// Copies files there, as `tar` packs them with these arguments.
    fn copy(&self, args: &[&Path], to: &str) {
        let mut tar = Command::new("tar").args(["-cSh"]).args(args).stdout(Stdio::piped()).spawn().unwrap();
        let mut unpack = self.owner.banger(["vm", "exec", "host", "--", "tar", "-xS", "-C", to]);
        let output = unpack.stdin(tar.stdout.take().unwrap()).output().unwrap();
        assert!(tar.wait().unwrap().success() && output.status.success(), "{}", show(&output));
    }

    /// Copies files into a directory there, under their own names.
    pub(crate) fn copy_into<'f>(&self, files: impl IntoIterator<Item = &'f PathBuf>, to: &str) {
        let place =
            |file: &'f PathBuf| ["-C".as_ref(), file.parent().unwrap(), Path::new(file.file_name().unwrap())];
        self.copy(&files.into_iter().flat_map(place).collect::<Vec<_>>(), to);
    }
}

pub(crate) fn find(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}

#[test]
fn linux_under_firecracker() {
    let owner = Owner::new();
    let host = match Host::start(&owner) {
        Ok(host) => host,
        Err(reason) => return skip(&format!("linux_under_firecracker: {reason}")),
    };
    let shape = format!("--memory 512M {FIRECRACKER}");
    host.create_first("--memory 512M --name inner --wait boot");
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
    assert_eq!(host.ok(&format!("ls {}/vms", host.state())), "");
    println!("with {}", run(Command::new("sh").args(["-c", "firecracker --version | head -n 1"])).trim());
    owner.ok(["vm", "delete", "-f", "host"]);
    owner.assert_nothing_left();
}
