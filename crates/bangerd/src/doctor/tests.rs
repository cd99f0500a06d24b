//! What a broken machine is told, problem by problem: the checks that are not passed, whole.

use super::checks::ALL;
use super::distribution::Distribution;
use super::facts::{Device, Disk, Facts, Memory, Neighbours, Pasta, Program, Restriction, Route};
use crate::cgroup::Base;
use crate::kvm::{Kvm, Refusal};
use banger_wire::doctor::Verdict;
use banger_wire::size::Mebibytes;
use std::path::PathBuf;

/// A machine with nothing to complain of but what banger lacks itself.
fn healthy() -> Facts {
    let program =
        |path: &str, version: &str| Program { path: path.into(), version: Some(version.to_owned()) };
    Facts {
        arch: "x86_64".to_owned(),
        system: "Debian GNU/Linux 12 (bookworm)".to_owned(),
        kernel_release: "6.1.0-18-amd64".to_owned(),
        distribution: Distribution::Apt,
        user: "someone".to_owned(),
        program: "/usr/local/bin/bangerd".into(),
        config: Ok(None),
        kvm: Kvm::Usable,
        is_paravirtual: false,
        namespaces: Ok(()),
        restriction: Restriction::None,
        namespace_limits: [("max_user_namespaces".to_owned(), 30_000)].into(),
        confinement: (true, "Landlock 6, seccomp; memory and files of a VMM are limited".to_owned()),
        cgroup: Ok(Base { dir: "/sys/fs/cgroup/a.scope".into(), cpu: true }),
        memory: Memory { available: Some(Mebibytes(12_000)), of_vm: Mebibytes(2048) },
        neighbours: Neighbours { shares_cores: true, swaps: true, ..Neighbours::default() },
        tun: Device::Usable,
        pasta: Some(Pasta { path: "/usr/bin/pasta".into(), version: "pasta 1".to_owned(), is_usable: true }),
        nft: Some(Ok("/usr/sbin/nft".into())),
        route: Ok(Route { has_default: true, nets: 3 }),
        resolvers: Ok(vec!["127.0.0.53".to_owned(), "192.0.2.1".to_owned()]),
        qemu: Ok(program("/usr/bin/qemu-system-x86_64", "7.2.22")),
        firecracker: Ok(program("/home/someone/.local/share/banger/bin/firecracker", "1.17.0")),
        default_kernel: "generic-6.12".to_owned(),
        kernels: vec!["generic-6.12".to_owned()],
        default_image: "debian-bookworm".to_owned(),
        images: vec!["debian-bookworm".to_owned()],
        disk: Ok(Disk {
            path: "/home/someone/.local/state/banger".into(),
            free_bytes: 40 << 30,
            free_files: Some(1 << 20),
            is_read_only: false,
        }),
        open_files: (1024, 1 << 20),
        processes: 30_000,
        is_systemd: true,
        ends_at_logout: false,
        names: crate::names::State::Answers("127.0.0.1:42069".parse().unwrap()),
        leftovers: Ok(Vec::new()),
    }
}

fn render(facts: &Facts, is_told: impl Fn(Verdict) -> bool) -> String {
    let mut text = String::new();
    for check in ALL.iter().map(|judge| judge(facts)).filter(|check| is_told(check.verdict)) {
        text += &format!("{:?}  {}: {}\n", check.verdict, check.name, check.detail);
        if let Some(hint) = check.hint {
            text += &format!("      hint: {hint}\n");
        }
    }
    text
}

#[test]
fn a_healthy_machine() {
    insta::assert_snapshot!(render(&healthy(), |_| true));
}

/// A change that breaks the machine.
type Break = fn(&mut Facts);

#[test]
fn each_problem_with_the_command_that_mends_it() {
    let problems: [(&str, Break); 43] = [
        ("another processor", |facts| facts.arch = "riscv64".to_owned()),
        ("a config with a mistake", |facts| {
            facts.config = Err("the config `~/config.toml` can't be used: line 1".to_owned());
        }),
        ("no kvm in the kernel", |facts| facts.kvm = Kvm::Absent { processor: true }),
        ("no kvm in the processor", |facts| facts.kvm = Kvm::Absent { processor: false }),
        ("kvm of the group", |facts| {
            let (cause, group) = ("Permission denied (os error 13)".to_owned(), Some("kvm".to_owned()));
            facts.kvm = Kvm::Denied { cause, group };
        }),
        ("kvm of root", |facts| {
            facts.kvm = Kvm::Denied { cause: "Permission denied (os error 13)".to_owned(), group: None };
        }),
        ("kvm of root, for root's vms", |facts| {
            facts.user = "root".to_owned();
            facts.kvm = Kvm::Denied { cause: "Permission denied (os error 13)".to_owned(), group: None };
        }),
        ("kvm_pvm", |facts| {
            let (reached, cause) = ("64-bit mode".to_owned(), "KVM had an internal error".to_owned());
            facts.kvm = Kvm::Refuses(Refusal { reached: Some(reached), cause });
            facts.is_paravirtual = true;
        }),
        ("a kvm that somebody else has", |facts| {
            let cause = "make a vm: Device or resource busy (os error 16)".to_owned();
            facts.kvm = Kvm::Refuses(Refusal { reached: None, cause });
        }),
        ("AppArmor", |facts| {
            facts.namespaces = Err("mount a tmpfs: Permission denied (os error 13)".to_owned());
            facts.restriction = Restriction::AppArmor;
        }),
        ("Debian's switch", |facts| {
            facts.namespaces = Err("make namespaces: Operation not permitted (os error 1)".to_owned());
            facts.restriction = Restriction::Sysctl;
        }),
        ("no namespaces allowed", |facts| {
            facts.namespaces = Err("make namespaces: No space left on device (os error 28)".to_owned());
            facts.namespace_limits.insert("max_user_namespaces".to_owned(), 0);
        }),
        ("unshare refused by seccomp", |facts| {
            facts.namespaces = Err("make namespaces: Operation not permitted (os error 1)".to_owned());
            facts.nft = Some(Err("start `nft`: Operation not permitted (os error 1)".to_owned()));
        }),
        ("no Landlock", |facts| {
            facts.confinement = (false, "this kernel has no Landlock".to_owned());
        }),
        ("no control group to give", |facts| {
            facts.cgroup = Err("`/sys/fs/cgroup/a.scope` is not this user's".to_owned());
        }),
        ("no control groups, for root", |facts| {
            facts.user = "root".to_owned();
            facts.cgroup = Err("control groups of version 2 are not mounted".to_owned());
        }),
        ("merged pages", |facts| facts.neighbours.merges_pages = true),
        ("open flaws", |facts| {
            facts.neighbours.flaws = ["mds", "spectre_v2"].map(str::to_owned).to_vec();
        }),
        ("little memory", |facts| facts.memory.available = Some(Mebibytes(2500))),
        ("few namespaces", |facts| {
            facts.namespace_limits.insert("max_net_namespaces".to_owned(), 10);
        }),
        ("few open files", |facts| facts.open_files = (256, 4096)),
        ("few open files for good", |facts| facts.open_files = (256, 256)),
        ("few processes", |facts| facts.processes = 100),
        ("no qemu", |facts| facts.qemu = Err("`qemu-system-x86_64` is not installed".to_owned())),
        ("no qemu on Fedora", |facts| {
            facts.distribution = Distribution::Dnf;
            facts.qemu = Err("`qemu-system-x86_64` is not installed".to_owned());
        }),
        ("an old qemu", |facts| facts.qemu.as_mut().unwrap().version = Some("6.2.0".to_owned())),
        ("a broken qemu", |facts| facts.qemu.as_mut().unwrap().version = None),
        ("no firecracker", |facts| facts.firecracker = Err("`firecracker` is not installed".to_owned())),
        ("an old firecracker", |facts| {
            facts.firecracker.as_mut().unwrap().version = Some("1.7.0".to_owned());
        }),
        ("a firecracker of the future", |facts| {
            facts.firecracker.as_mut().unwrap().version = Some("2.0.1".to_owned());
        }),
        ("no tun", |facts| facts.tun = Device::Absent),
        ("tun of root", |facts| facts.tun = Device::Denied("Permission denied (os error 13)".to_owned())),
        ("no pasta", |facts| facts.pasta = None),
        ("an old pasta on Arch", |facts| {
            facts.distribution = Distribution::Pacman;
            facts.pasta.as_mut().unwrap().is_usable = false;
        }),
        ("no nft", |facts| facts.nft = None),
        ("a kernel without nftables", |facts| {
            facts.nft = Some(Err("`nft` refused the policy: no such file".to_owned()));
        }),
        ("no route", |facts| facts.route = Ok(Route { has_default: false, nets: 1 })),
        ("no resolv.conf", |facts| {
            facts.resolvers = Err("No such file or directory (os error 2)".to_owned())
        }),
        ("an empty resolv.conf", |facts| facts.resolvers = Ok(Vec::new())),
        ("a read-only disk", |facts| facts.disk.as_mut().unwrap().is_read_only = true),
        ("logout", |facts| facts.ends_at_logout = true),
        ("the name server's port is taken", |facts| {
            facts.names = crate::names::State::Taken {
                at: "127.0.0.1:42069".parse().unwrap(),
                error: "Address already in use (os error 98)".to_owned(),
                holder: Some("`dnsmasq` (process 7)".to_owned()),
            };
        }),
        ("nothing pulled, and leftovers", |facts| {
            facts.kernels.clear();
            facts.images.clear();
            facts.disk.as_mut().unwrap().free_bytes = 100 << 20;
            facts.leftovers = Ok(["a", "b"].map(PathBuf::from).to_vec());
        }),
    ];
    let mut text = String::new();
    for (name, break_it) in problems {
        let mut facts = healthy();
        break_it(&mut facts);
        let told = render(&facts, |verdict| verdict != Verdict::Pass);
        assert!(!told.is_empty(), "{name} goes unnoticed");
        text += &format!("# {name}\n{told}\n");
    }
    insta::assert_snapshot!(text);
}
