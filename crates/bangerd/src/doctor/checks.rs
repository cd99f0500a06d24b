//! Judgements of [`Facts`], one function each: what was found, how bad that is, and the command that mends it here.
//!
//! A failure is what keeps vms from running at all. What they can do without, such as a network, is a warning.

use super::apparmor;
use super::distribution::Need;
use super::facts::{Device, Facts, Restriction, TUN};
use crate::kvm::{self, Kvm};
use crate::names;
use crate::programs::{is_at_least, numbers};
use banger_vmm::firecracker;
use banger_wire::doctor::{Check, Verdict};

/// The oldest QEMU whose machine and snapshots are as the driver needs them.
const QEMU_MIN: (u32, u32) = (7, 2);
/// Below this nothing can be pulled and a guest soon has no room.
const DISK_FREE_MIN: u64 = 512 << 20;
/// The default image and a vm that works.
const DISK_FREE_GOOD: u64 = 4 << 30;
/// A filesystem with room for fewer is about to be full.
const FILES_FREE_GOOD: u64 = 1000;
/// Open files of a daemon with 8 vms and a pull, and of pasta's connections.
const OPEN_FILES_GOOD: u64 = 1024;
/// Processes and threads of 8 vms.
const PROCESSES_GOOD: u64 = 512;
/// Memory a VMM takes besides its guest's, and others need to go on.
const MEMORY_SPARE: u64 = 512;
/// Namespaces of each kind for 8 vms and a user's other programs.
const NAMESPACES_GOOD: u64 = 64;

/// All of them, in the order they are told.
pub(crate) const ALL: [fn(&Facts) -> Check; 22] = [
    machine,
    config,
    kvm,
    namespaces,
    confinement,
    cgroup,
    neighbours,
    memory,
    limits,
    qemu,
    firecracker_program,
    tun,
    pasta,
    nft,
    route,
    dns,
    disk,
    logout,
    names,
    leftovers,
    kernel,
    image,
];

fn check(name: &str, verdict: Verdict, detail: impl Into<String>, hint: Option<String>) -> Check {
    Check { name: name.to_owned(), verdict, detail: detail.into(), hint }
}

fn pass(name: &str, detail: impl Into<String>) -> Check {
    check(name, Verdict::Pass, detail, None)
}

fn warn(name: &str, detail: impl Into<String>, hint: impl Into<String>) -> Check {
    check(name, Verdict::Warn, detail, Some(hint.into()))
}

fn fail(name: &str, detail: impl Into<String>, hint: impl Into<String>) -> Check {
    check(name, Verdict::Fail, detail, Some(hint.into()))
}

fn machine(facts: &Facts) -> Check {
    let Facts { arch, system, kernel_release, .. } = facts;
    let detail = format!("{arch}, {system}, Linux {kernel_release}");
    match arch.as_str() {
        "x86_64" => pass("machine", detail),
        "aarch64" => warn("machine", detail, "vms on this architecture are not tested yet"),
        _ => fail("machine", detail, "use a machine with an x86_64 processor"),
    }
}

fn config(facts: &Facts) -> Check {
    match &facts.config {
        Ok(Some(path)) => pass("config", format!("`{}`", path.display())),
        Ok(None) => pass("config", "none, which is fine"),
        Err(cause) => fail("config", cause.clone(), "correct that line of the config, or take it out"),
    }
}

fn kvm(facts: &Facts) -> Check {
    let (device, user) = (kvm::DEVICE, &facts.user);
    let slow = "vms run in software emulation, which is slower";
    match &facts.kvm {
        Kvm::Usable => pass("kvm", format!("`{device}` runs vms: a small one went well")),
        Kvm::Refuses(refusal) => {
            let kind = if facts.is_paravirtual { " (kvm_pvm, which needs kernels made for it)" } else { "" };
            let reached = match &refusal.reached {
                Some(stage) => format!("a small vm managed {stage} and no more"),
                None => "a small vm did not run".to_owned(),
            };
            let detail =
                format!("`{device}`{kind} runs no ordinary vms: {reached}: {}; {slow}", refusal.cause);
            let hint = "where this is a vm itself, have nested virtualization turned on for it; \
                        elsewhere, look for the cause with `sudo dmesg | grep -i kvm`";
            warn("kvm", detail, hint)
        }
        Kvm::Absent { processor: true } => {
            let module = if facts.arch == "x86_64" { "kvm_intel || sudo modprobe kvm_amd" } else { "kvm" };
            warn("kvm", format!("there is no `{device}`; {slow}"), format!("sudo modprobe {module}"))
        }
        Kvm::Absent { processor: false } => {
            let hint = "turn on virtualization in the firmware, or nested virtualization where this is a vm";
            warn("kvm", format!("there is no `{device}`, and the processor offers none; {slow}"), hint)
        }
        Kvm::Denied { cause, group } => {
            let who = if user == "root" { " by the users that root's vms run as" } else { "" };
            let detail = format!("`{device}` can't be opened{who}: {cause}; {slow}");
            let (command, then) = kvm::cure(group.as_deref(), user);
            warn("kvm", detail, format!("{command}   # {then}"))
        }
    }
}

fn confinement(facts: &Facts) -> Check {
    match &facts.confinement {
        (true, detail) => pass("confinement", detail.clone()),
        (false, detail) => {
            let hint =
                "boot a kernel with Landlock, and name it in the kernel's `lsm=` option if there is one";
            warn("confinement", detail.clone(), hint)
        }
    }
}

fn cgroup(facts: &Facts) -> Check {
    let name = "cgroup limits";
    match &facts.cgroup {
        Ok(base) => {
            let cpu = if base.cpu { " and share of the processors" } else { "" };
            pass(name, format!("memory, processes{cpu} of each vm, below `{}`", base.dir.display()))
        }
        Err(cause) => {
            let detail = format!("{cause}; a VMM's memory and processes have limits of their own");
            // A scope given to its user has groups to give; the daemon is to be alone in it.
            let scope = "banger daemon stop; systemd-run --user --scope -p Delegate=yes banger vm list";
            let can_ask = facts.is_systemd && facts.user != "root";
            check(name, Verdict::Warn, detail, can_ask.then(|| scope.to_owned()))
        }
    }
}

fn neighbours(facts: &Facts) -> Check {
    let (name, found) = ("side channels", &facts.neighbours);
    if found.merges_pages {
        let detail = "equal pages of different vms are merged, by which they can learn of each other's";
        return warn(name, detail, "echo 2 | sudo tee /sys/kernel/mm/ksm/run");
    }
    if !found.flaws.is_empty() {
        let detail = format!("nothing is done about this processor's {}", found.flaws.join(", "));
        let hint = "update the kernel and the processor's microcode, and take `mitigations=off` out of the kernel's options";
        return warn(name, detail, hint);
    }
    let mut detail = "nothing that a setting closes".to_owned();
    if found.shares_cores {
        detail += "; two vms may share a core (SMT)";
    }
    if found.swaps {
        detail += "; a vm's memory may get to the swap space";
    }
    pass(name, detail)
}

fn memory(facts: &Facts) -> Check {
    let of_vm = facts.memory.of_vm;
    match facts.memory.available {
        Some(available) if available.0 < of_vm.0 + MEMORY_SPARE => {
            let detail = format!("{available} available, too little for a vm of the default size, {of_vm}");
            warn("memory", detail, "banger ps   # stop one of them, or give a vm less with `--memory`")
        }
        Some(available) => pass("memory", format!("{available} available; a vm has {of_vm} by default")),
        None => pass("memory", format!("a vm has {of_vm} by default")),
    }
}

fn namespaces(facts: &Facts) -> Check {
    let Err(cause) = &facts.namespaces else {
        return pass("namespaces", "one was made, and mounted in");
    };
    // A limit of 0 forbids them, whatever else does.
    if let Some((name, limit)) = facts.namespace_limits.iter().find(|(_, limit)| **limit == 0) {
        let detail = format!("{cause} (`user.{name}` is {limit})");
        return fail("namespaces", detail, format!("sudo sysctl -w user.{name}=15000"));
    }
    match facts.restriction {
        Restriction::AppArmor => {
            let program = facts.program.display();
            let place = apparmor::PLACE;
            let detail = format!(
                "{cause} (AppArmor restricts user namespaces: `kernel.apparmor_restrict_unprivileged_userns` is 1)"
            );
            let install = format!("{program} apparmor-profile | sudo tee {place} >/dev/null");
            fail("namespaces", detail, format!("{install} && sudo apparmor_parser --replace {place}"))
        }
        Restriction::Sysctl => {
            let detail = format!("{cause} (`kernel.unprivileged_userns_clone` is 0)");
            fail("namespaces", detail, "sudo sysctl -w kernel.unprivileged_userns_clone=1")
        }
        Restriction::None => {
            let hint = "allow user namespaces here; a container's seccomp profile often refuses them \
                        (Docker: `--security-opt seccomp=unconfined`)";
            fail("namespaces", cause.clone(), hint)
        }
    }
}

fn limits(facts: &Facts) -> Check {
    let (soft, hard) = facts.open_files;
    if hard < OPEN_FILES_GOOD {
        let line = format!("{} hard nofile 4096", facts.user);
        let hint = format!("echo '{line}' | sudo tee -a /etc/security/limits.conf   # then log in again");
        return warn("limits", format!("at most {hard} open files, which is few"), hint);
    }
    if soft < OPEN_FILES_GOOD {
        let detail = format!("{soft} open files, which is few");
        return warn("limits", detail, format!("banger daemon stop; ulimit -n {OPEN_FILES_GOOD}"));
    }
    if facts.processes < PROCESSES_GOOD {
        let line = format!("{} hard nproc 4096", facts.user);
        let hint = format!("echo '{line}' | sudo tee -a /etc/security/limits.conf   # then log in again");
        return warn("limits", format!("{} processes, which is few", facts.processes), hint);
    }
    let low = facts.namespace_limits.iter().find(|(_, limit)| **limit < NAMESPACES_GOOD);
    match low {
        // The namespaces themselves fail then, with their own text.
        Some((name, limit)) if *limit > 0 => {
            let detail = format!("`user.{name}` is {limit}, which is few");
            warn("limits", detail, format!("sudo sysctl -w user.{name}=15000"))
        }
        _ => pass("limits", format!("{} open files, {} processes", count(soft), count(facts.processes))),
    }
}

fn count(limit: u64) -> String {
    if limit == u64::MAX { "any number of".to_owned() } else { limit.to_string() }
}

fn qemu(facts: &Facts) -> Check {
    let install = || facts.distribution.install(Need::Qemu);
    let least = format!("{}.{}", QEMU_MIN.0, QEMU_MIN.1);
    let program = match &facts.qemu {
        Ok(program) => program,
        Err(cause) => return fail("qemu", cause.clone(), install()),
    };
    let path = program.path.display();
    match &program.version {
        None => fail("qemu", format!("`{path}` does not say its version"), install()),
        Some(version) if !is_at_least(version, QEMU_MIN) => {
            let hint = format!("{}   # or set `qemu_bin` in the config to a newer one", install());
            fail("qemu", format!("`{path}` is {version}, older than {least}"), hint)
        }
        Some(version) => pass("qemu", format!("{version}, `{path}`")),
    }
}

fn firecracker_program(facts: &Facts) -> Check {
    let is_of_use = is_kvm_of_use(&facts.kvm);
    match &facts.firecracker {
        Err(cause) if is_of_use => warn("firecracker", cause.clone(), "banger setup"),
        Err(cause) => pass("firecracker", format!("{cause}; without KVM it is not needed")),
        Ok(program) => {
            let path = program.path.display();
            match &program.version {
                None => warn("firecracker", format!("`{path}` does not say its version"), "banger setup"),
                Some(version) => match firecracker::unfit(numbers(version)) {
                    Some(why) => warn("firecracker", format!("`{path}` is {version}, {why}"), "banger setup"),
                    None => pass("firecracker", format!("{version}, `{path}`")),
                },
            }
        }
    }
}

/// Tells whether Firecracker may be of use, now or once the user may open the device.
pub(crate) fn is_kvm_of_use(kvm: &Kvm) -> bool {
    matches!(kvm, Kvm::Usable | Kvm::Denied { .. })
}

fn tun(facts: &Facts) -> Check {
    let without = "vms have no network";
    match &facts.tun {
        Device::Usable => pass("tap devices", format!("`{TUN}` can be opened")),
        Device::Absent => warn("tap devices", format!("there is no `{TUN}`; {without}"), "sudo modprobe tun"),
        Device::Denied(cause) => {
            let detail = format!("`{TUN}` can't be opened: {cause}; {without}");
            warn("tap devices", detail, format!("sudo chmod 0666 {TUN}"))
        }
        Device::Broken(cause) => {
            let detail = format!("`{TUN}` can't be opened: {cause}; {without}");
            warn("tap devices", detail, "sudo modprobe tun")
        }
    }
}

fn pasta(facts: &Facts) -> Check {
    let install = facts.distribution.install(Need::Pasta);
    match &facts.pasta {
        None => warn("pasta", "`pasta` is not installed; vms have no network", install),
        Some(pasta) if !pasta.is_usable => {
            let detail = format!("`{}` lacks options that vms need; they have no network", pasta.version);
            warn("pasta", detail, install)
        }
        Some(pasta) => pass("pasta", format!("{}, `{}`", pasta.version, pasta.path.display())),
    }
}

fn nft(facts: &Facts) -> Check {
    match &facts.nft {
        None => {
            let install = facts.distribution.install(Need::Nft);
            warn("nft", "`nft` is not installed; vms have no network", install)
        }
        // Where namespaces fail, so does this, and that is what to mend.
        Some(Err(cause)) if facts.namespaces.is_err() => {
            check("nft", Verdict::Warn, format!("{cause}; it needs namespaces, see above"), None)
        }
        Some(Err(cause)) => {
            let detail = format!("{cause}; vms have no network");
            warn("nft", detail, "sudo modprobe -a nf_tables nft_chain_nat nft_masq nft_ct nft_reject_inet")
        }
        Some(Ok(path)) => {
            pass("nft", format!("`{}` took the policy in a namespace of its own", path.display()))
        }
    }
}

fn route(facts: &Facts) -> Check {
    match facts.route {
        Ok(route) if route.has_default => pass(
            "route",
            format!("there is one; {} networks of this machine are out of vms' reach", route.nets),
        ),
        Ok(_) => {
            let detail = "this machine has no default route; vms have no network";
            warn("route", detail, "ip route show default   # connect this machine first")
        }
        Err(ref cause) => warn("route", cause.clone(), "ip route show default"),
    }
}

fn dns(facts: &Facts) -> Check {
    let file = "/etc/resolv.conf";
    match &facts.resolvers {
        Err(cause) => {
            let detail = format!("`{file}` can't be read: {cause}; vms resolve no names");
            warn("dns", detail, format!("ls -lL {file}   # a link there may lead nowhere"))
        }
        Ok(servers) if servers.is_empty() => {
            let detail = format!("`{file}` names no server; vms resolve no names");
            warn("dns", detail, format!("echo 'nameserver 9.9.9.9' | sudo tee -a {file}"))
        }
        Ok(servers) => {
            let stub = |server: &String| match server.starts_with("127.") || server == "::1" {
                true => format!("{server} (on this machine)"),
                false => server.clone(),
            };
            pass("dns", servers.iter().map(stub).collect::<Vec<_>>().join(", "))
        }
    }
}

fn disk(facts: &Facts) -> Check {
    let disk = match &facts.disk {
        Ok(disk) => disk,
        Err(cause) => return fail("disk space", cause.clone(), "ls -ld ~/.local/state/banger"),
    };
    let path = disk.path.display();
    let free = bytes(disk.free_bytes);
    let room = "banger vm prune   # or: banger image list, banger image delete";
    if disk.is_read_only {
        let hint = format!("sudo mount -o remount,rw \"$(findmnt -no TARGET -T {path})\"");
        fail("disk space", format!("`{path}` is on a read-only filesystem"), hint)
    } else if disk.free_bytes < DISK_FREE_MIN {
        fail("disk space", format!("{free} free in `{path}`, too little for a vm"), room)
    } else if let Some(files) = disk.free_files.filter(|files| *files < FILES_FREE_GOOD) {
        fail("disk space", format!("room for {files} more files in `{path}`, too few for a vm"), room)
    } else if disk.free_bytes < DISK_FREE_GOOD {
        warn("disk space", format!("{free} free in `{path}`, which is little"), room)
    } else {
        pass("disk space", format!("{free} free in `{path}`"))
    }
}

fn bytes(bytes: u64) -> String {
    if bytes < 1 << 30 { format!("{} MiB", bytes >> 20) } else { format!("{} GiB", bytes >> 30) }
}

fn logout(facts: &Facts) -> Check {
    if !facts.ends_at_logout {
        return pass("logout", "vms go on after a logout");
    }
    let user = &facts.user;
    let detail = "this system ends its users' processes at logout, and vms with them (`KillUserProcesses`)";
    let place = "/etc/systemd/logind.conf.d/banger.conf";
    let hint = format!(
        "printf '[Login]\\nKillExcludeUsers=root {user}\\n' | sudo tee {place} && \
         sudo systemctl kill -s HUP systemd-logind"
    );
    warn("logout", detail, hint)
}

fn names(facts: &Facts) -> Check {
    let hint = "set `dns_listen` in the config to another port of 127.0.0.1, or to `off`: banger config path";
    match &facts.names {
        names::State::Answers(at) => pass("names of vms", format!("`NAME.vm` is answered at {at}")),
        names::State::Off => pass("names of vms", "not answered, as the config says (`dns_listen`)"),
        names::State::Begins => warn("names of vms", "not answered yet", "banger daemon logs"),
        names::State::Wrong(why) => warn("names of vms", format!("not answered: {why} (`dns_listen`)"), hint),
        names::State::Taken { at, error, holder } => {
            let by = holder.as_ref().map(|holder| format!(", which {holder} has")).unwrap_or_default();
            warn("names of vms", format!("not answered: can't listen at {at}{by}: {error}"), hint)
        }
    }
}

fn leftovers(facts: &Facts) -> Check {
    match &facts.leftovers {
        Err(cause) => warn("leftovers", cause.clone(), "banger daemon logs"),
        Ok(found) => match found.split_first() {
            None => pass("leftovers", "none"),
            Some((first, rest)) => {
                let mut detail = format!("`{}`", first.display());
                if !rest.is_empty() {
                    detail += &format!(" and {} more", rest.len());
                }
                let detail = format!("{detail}, left by a crash and used by nothing");
                warn("leftovers", detail, "banger doctor --fix")
            }
        },
    }
}

fn kernel(facts: &Facts) -> Check {
    pulled("kernel", &facts.default_kernel, &facts.kernels)
}

fn image(facts: &Facts) -> Check {
    pulled("image", &facts.default_image, &facts.images)
}

fn pulled(kind: &str, name: &String, there: &[String]) -> Check {
    if there.contains(name) {
        pass(kind, format!("`{name}`"))
    } else {
        warn(kind, format!("`{name}` is not pulled yet; the first vm waits for that"), "banger setup")
    }
}
