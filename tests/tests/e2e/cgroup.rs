//! Control groups. A vm of banger's is the machine: whoever runs these tests may be given none by theirs. What runs vms
//! there is a program that does nothing, since what it would run is not the point.

use crate::support::{IMAGE, Owner, programs, show};
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Sets the machine up: groups, a VMM, an owner's store with names but no content, and an ordinary user.
const SETUP: &str = "
    set -e
    mountpoint -q /sys/fs/cgroup || mount -t cgroup2 none /sys/fs/cgroup
    cd /sys/fs/cgroup
    grep -q memory cgroup.controllers
    printf '#!/bin/sh\\nexec sleep 1000\\n' >/usr/bin/vmm
    chmod 755 /usr/bin/vmm /usr/bin/banger /usr/bin/bangerd
    for home in /root /home/dev; do
        mkdir -p $home/.config/banger
        echo \"qemu_bin = '/usr/bin/vmm'\" >$home/.config/banger/config.toml
        mkdir -p $home/.local/state
        cp -a /store $home/.local/state/banger
        chmod 700 $home/.local/state/banger
    done
    chown -R 1234:1234 /home/dev
";

/// Starts a vm that never gets anywhere, tells of its group below a directory, ends it, and tells what is left. Ends the
/// VMM, or everything of the vm while there is no daemon.
const RUN: &str = "
    cd
    banger run -d --name web --memory 512M --vcpu 2 --net none --image IMAGE 2>/dev/null &
    bomb() { sh -c 'echo $$ >$0/cgroup.procs; for n in $(seq 400); do sleep 60 & done' $1 2>/dev/null; }
    names() { for pid in $(cat $group/cgroup.procs 2>/dev/null); do cat /proc/$pid/comm; done | sort -u; }
    for try in $(seq 200); do
        group=$(echo $1/banger-*[0-9]*)
        names | grep -q sleep && break
        sleep 0.1
    done
    for file in memory.max pids.max cpu.weight memory.oom.group; do echo $file $(cat $group/$file); done
    names
    if test $(id -u) = 0; then
        bomb $group
        test $(wc -l <$group/cgroup.procs) -le 258 && grep -q 'max [1-9]' $group/pids.events && echo bomb stopped
    fi
    test $2 = vmm || banger daemon stop
    for pid in $(cat $group/cgroup.procs); do
        if test $2 = all || grep -q sleep /proc/$pid/comm; then kill -9 $pid; fi
    done
    wait
    banger vm delete web >/dev/null
    for try in $(seq 100); do test -d $group || break; sleep 0.1; done
    ls -d $1/banger-*[0-9]* 2>/dev/null || echo gone
    banger daemon stop
";

#[test]
fn a_vm_has_limits_where_there_is_a_group_to_give() {
    let owner = Owner::with_store();
    let host = Host::start(&owner);
    let limits = "memory.max 1610612736\npids.max 258\ncpu.weight 50\nmemory.oom.group 1\nbangerd\nsleep\n";
    let end = "gone\nstopped bangerd\n";
    let told = |place: &str| {
        format!(
            "pass  cgroup limits: memory, processes and share of the processors of each vm, below `{place}`\n"
        )
    };
    // Root, in the topmost group.
    let bomb = "bomb stopped\n";
    assert_eq!(host.ok("export HOME=/root; sh /run.sh /sys/fs/cgroup vmm"), format!("{limits}{bomb}{end}"));
    let free = "mkdir /sys/fs/cgroup/free; bomb() { BOMB; }; bomb /sys/fs/cgroup/free;
        wc -l </sys/fs/cgroup/free/cgroup.procs; echo 1 >/sys/fs/cgroup/free/cgroup.kill";
    let line =
        RUN.lines().find_map(|line| line.trim().strip_prefix("bomb() { ")?.strip_suffix("; }")).unwrap();
    assert_eq!(host.ok(&free.replace("BOMB", line)), "400\n", "without a group of a vm");
    // The next daemon finds the group.
    let output = host.ok("export HOME=/root; sh /run.sh /sys/fs/cgroup all");
    assert_eq!(output, format!("{limits}{bomb}stopped bangerd\n{end}"));
    let doctor = "banger doctor | grep 'cgroup limits'; banger daemon stop >/dev/null";
    assert_eq!(host.ok(&format!("export HOME=/root; {doctor}")), told("/sys/fs/cgroup"));
    // A user, in a group of the user's own, which has nobody in it but the daemon.
    let user = "
        top=/sys/fs/cgroup dir=/sys/fs/cgroup/dev
        mkdir $dir; chown 1234:1234 $dir $dir/cgroup.procs $dir/cgroup.subtree_control
        as() { HOME=/home/dev setpriv --reuid 1234 --regid 1234 --clear-groups -- sh -c \"$1\"; }
        begin() { echo $$ >$1/cgroup.procs; as 'cd; banger vm list' >/dev/null; echo $$ >$top/cgroup.procs; }
    ";
    let run = format!(
        "{user} begin $dir; as \"sh /run.sh $dir vmm\"; begin $dir/banger-daemon; as \"{doctor}\"; rmdir $dir/banger-daemon $dir"
    );
    assert_eq!(host.ok(&run), format!("{limits}{end}{}", told("/sys/fs/cgroup/dev")));
    let run = format!("{user} rmdir $dir; echo $$ >$top/cgroup.procs; as \"{doctor}\"");
    assert_eq!(
        host.ok(&run),
        "warn  cgroup limits: `/sys/fs/cgroup` is not this user's; \
         a VMM's memory and processes have limits of their own\n"
    );
    owner.ok(["vm", "delete", "-f", "host"]);
    owner.assert_nothing_left();
}

/// The machine.
struct Host<'a> {
    owner: &'a Owner,
}

impl<'a> Host<'a> {
    fn start(owner: &'a Owner) -> Self {
        // Before a daemon has it open.
        let store = tempfile::tempdir().unwrap();
        let names = "find . \\( -type d -o -type f -size -100k \\) -print0 | \
                     tar c --null --no-recursion -T - | tar x -C \"$0\"; \
                     find . -type f -size +99k ! -name 'initramfs-*' -exec sh -c 'for f; do test -e \"$0/$f\" || : >\"$0/$f\"; done' \"$0\" {} +";
        let copied =
            Command::new("sh").args(["-ec", names]).arg(store.path()).current_dir(owner.state()).status();
        assert!(copied.unwrap().success());
        let boot = "cp -a kernels/*/boot \"$0\"/kernels/*/ ; cp banger.db \"$0\"";
        let copied =
            Command::new("sh").args(["-ec", boot]).arg(store.path()).current_dir(owner.state()).status();
        assert!(copied.unwrap().success());
        owner.ok(["vm", "run", "-d", "--name", "host", "--image", IMAGE, "--net", "none", "--memory", "1G"]);
        let host = Self { owner };
        host.send(store.path(), ".", "/store");
        host.send(programs(), "banger bangerd", "/usr/bin");
        host.ok(SETUP);
        host.ok(&format!("cat >/run.sh <<'END'\n{}\nEND", RUN.replace("IMAGE", IMAGE)));
        host
    }

    fn exec(&self, script: &str) -> Command {
        self.owner.banger(["vm", "exec", "host", "--", "bash", "-c", script])
    }

    /// Puts files there, as root's.
    fn send(&self, from: &Path, names: &str, to: &str) {
        let mut tar = Command::new("tar");
        tar.arg("c").arg("-C").arg(from).args(names.split(' ')).stdout(Stdio::piped());
        let mut tar = tar.spawn().unwrap();
        let mut untar = self.exec(&format!("mkdir -p {to} && tar x --no-same-owner -C {to}"));
        let output = untar.stdin(tar.stdout.take().unwrap()).output().unwrap();
        assert!(output.status.success() && tar.wait().unwrap().success(), "{}", show(&output));
    }

    /// Runs a script there, which has to succeed; returns what it printed.
    fn ok(&self, script: &str) -> String {
        let output: Output = self.exec(script).output().unwrap();
        assert!(output.status.success(), "{script}: {}", show(&output));
        String::from_utf8(output.stdout).unwrap()
    }
}
