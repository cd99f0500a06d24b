//! What the VMM and the supervisor itself may still do, within the vm's namespaces and its private root.
//!
//! Both read bytes of a guest nobody trusts, so each is made to give up what it does not need, before the first of these
//! bytes: the VMM between `fork` and `exec`, the supervisor once the network's namespace is there. What is decided here
//! is data ([`grants`], [`syscalls`]); `banger_sys::confine` has the order in which it comes into force.
//!
//! A step between fork and exec, and not a program that confines itself and then becomes the VMM: everything that
//! needs memory or time is done before, and a second `exec` of this large program would cost more than all of it.
//!
//! Control groups are not made here: they need a part of the tree that the owner was given, which the daemon looks for
//! (`cgroup`).

pub(crate) mod grants;
mod syscalls;

use super::net::NetThread;
use crate::plan::{Layer, Start, VmPlan};
use anyhow::Context as _;
use banger_sys::confine::{Confinement, Limit};
use banger_sys::namespace::Capability;
use grants::Grant;
use landlock::{ABI, Access as _, AccessFs, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _, Scope};
use std::os::fd::OwnedFd;

/// What Landlock is asked for; an older kernel enforces what it knows of this.
const LANDLOCK: ABI = ABI::V6;
/// Memory a VMM maps besides the guest's: its program, 128 MiB of translated code, 8 MiB of stack for each processor and
/// each of 64 workers, allocations. QEMU 7.2 has been seen with 0.8 GiB.
const VMM_MEMORY: u64 = 3 << 30;
/// What a saved machine has besides its memory, and for each of its pages.
const SAVED_MORE: u64 = 64 << 20;
/// Descriptors of a VMM: a few for each drive and processor.
const VMM_FILES: u64 = 1024;
/// Threads and processes of one vm. A VMM has one for each processor and up to 64 for its disks.
const VM_PROCESSES: u64 = 512;

/// What the VMM gives up before its program starts.
pub(crate) fn vmm(plan: &VmPlan) -> anyhow::Result<Confinement> {
    let has = |layer| !plan.without.contains(&layer);
    let mut confinement = Confinement::default();
    if has(Layer::Limits) {
        confinement.limits = limits(plan, per_namespace(&kernel_release()));
    }
    if has(Layer::Capabilities) {
        confinement.capabilities = Some(Vec::new());
    }
    if has(Layer::Landlock) {
        let scopes = Scope::AbstractUnixSocket | Scope::Signal;
        let ruleset = Ruleset::default().scope(scopes).context("confine signals")?;
        confinement.ruleset =
            rules(ruleset, &grants::vmm(plan)).context("make Landlock rules for the VMM")?;
    }
    if has(Layer::Seccomp) {
        confinement.filters =
            syscalls::vmm(plan.machine.driver).context("compile the VMM's filter of system calls")?;
    }
    Ok(confinement)
}

/// Confines the supervisor: the calling thread, from which all later ones come, and the one in the vm's network.
pub(crate) async fn supervisor(plan: &VmPlan, thread: &NetThread) -> anyhow::Result<()> {
    // What remains means something in the vm's network namespace only, and lets children be given less.
    let net = [Capability::NetAdmin, Capability::NetBindService, Capability::SetPcap].to_vec();
    let inside = confinement_of_supervisor(plan, net)?;
    thread.run(move || inside.enter()).await?.context("confine the network's thread")?;
    confinement_of_supervisor(plan, Vec::new())?.enter().context("confine the supervisor")
}

fn confinement_of_supervisor(plan: &VmPlan, capabilities: Vec<Capability>) -> anyhow::Result<Confinement> {
    let has = |layer| !plan.without.contains(&layer);
    let mut confinement = Confinement::default();
    if has(Layer::Limits) {
        confinement.limits = vec![(Limit::Core, 0)];
    }
    if has(Layer::Capabilities) {
        confinement.capabilities = Some(capabilities);
    }
    if has(Layer::Landlock) {
        let made = rules(Ruleset::default(), &grants::supervisor(plan));
        confinement.ruleset = made.context("make Landlock rules for the supervisor")?;
    }
    if has(Layer::Seccomp) {
        confinement.filters =
            syscalls::supervisor().context("compile the supervisor's filter of system calls")?;
    }
    Ok(confinement)
}

/// Nothing when this kernel has no Landlock.
fn rules(ruleset: Ruleset, grants: &[Grant]) -> anyhow::Result<Option<OwnedFd>> {
    let mut made = ruleset.handle_access(AccessFs::from_all(LANDLOCK))?.create()?;
    for grant in grants {
        // A file that is not there needs no rule; the private root has all there will be.
        made = made.add_rules(landlock::path_beneath_rules([&grant.path], grant.access.rights()))?;
    }
    Ok(made.into())
}

fn limits(plan: &VmPlan, processes_per_namespace: bool) -> Vec<(Limit, u64)> {
    let memory = plan.machine.memory.0 << 20;
    let mut limits = vec![
        (Limit::AddressSpace, memory + VMM_MEMORY),
        (Limit::Core, 0),
        (Limit::LockedMemory, 0),
        (Limit::OpenFiles, VMM_FILES),
        // It fills the disk it has and makes it no longer.
        (Limit::FileSize, if plan.start == Start::Save { memory + SAVED_MORE } else { writable_len(plan) }),
    ];
    if processes_per_namespace {
        limits.push((Limit::Processes, VM_PROCESSES + u64::from(plan.machine.vcpu)));
    }
    limits
}

/// The length of the longest file the machine writes.
fn writable_len(plan: &VmPlan) -> u64 {
    let drives = plan.machine.drives.iter().filter(|drive| !drive.read_only);
    drives.filter_map(|drive| Some(std::fs::metadata(&drive.path).ok()?.len())).max().unwrap_or(0)
}

/// Whether the kernel counts processes for each user namespace; before Linux 5.14 a limit would also count everything
/// else its user runs.
fn per_namespace(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|word| word.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(5), Some(14))
}

fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// What of this the machine offers, for `banger doctor`.
pub(crate) fn summary() -> (bool, String) {
    let landlock = banger_sys::confine::landlock_version();
    let mut text = landlock.map_or_else(
        || "this kernel has no Landlock: VMMs can open what is in their private root".to_owned(),
        |version| format!("Landlock {version}, seccomp"),
    );
    text.push_str("; memory and files of a VMM are limited, processors are not");
    if !per_namespace(&kernel_release()) {
        text.push_str(", nor its processes before Linux 5.14");
    }
    (landlock.is_some(), text)
}

#[cfg(test)]
mod tests {
    use super::grants::{Access, Grant};
    use super::{Confinement, Ruleset, per_namespace, rules, syscalls};
    use banger_vmm::Driver;
    use rustix::io::Errno;
    use std::io::ErrorKind;

    #[test]
    fn what_is_not_granted_is_denied() {
        let grants = [Grant { path: "/usr".into(), access: Access::Run }];
        let Some(ruleset) = rules(Ruleset::default(), &grants).unwrap() else {
            println!("skipped: what_is_not_granted_is_denied: this kernel has no Landlock");
            return;
        };
        let tried = std::thread::spawn(move || {
            let before = std::fs::read_dir("/etc").is_ok();
            Confinement { ruleset: Some(ruleset), ..Confinement::default() }.enter().unwrap();
            let denied = std::fs::read_dir("/etc").unwrap_err().kind();
            (before, denied, std::fs::read_dir("/usr").is_ok())
        });
        // Only that thread is confined.
        assert_eq!(tried.join().unwrap(), (true, ErrorKind::PermissionDenied, true));
        assert!(std::fs::read_dir("/etc").is_ok());
    }

    /// An ordinary user's vm can't load any in the first place, so this is tried with root's rights.
    #[test]
    fn not_even_root_could_load_a_module() {
        // No module: the kernel gets to its contents only when it would have loaded one.
        let load = || rustix::system::init_module(&[0; 64], c"").unwrap_err();
        let allowed = load();
        if allowed != Errno::NOEXEC {
            println!("skipped: not_even_root_could_load_a_module: this process may load none ({allowed})");
            return;
        }
        for driver in [Driver::Qemu, Driver::Firecracker] {
            let filters = syscalls::vmm(driver).unwrap();
            let tried = std::thread::spawn(move || {
                Confinement { filters, ..Confinement::default() }.enter().unwrap();
                load()
            });
            assert_eq!(tried.join().unwrap(), Errno::PERM, "{driver:?}");
        }
        assert_eq!(load(), Errno::NOEXEC);
    }

    #[test]
    fn processes_are_limited_where_the_limit_is_the_vms_own() {
        for (release, expected) in
            [("6.1.0-18-amd64", true), ("5.14.0", true), ("5.10.200", false), ("4.19", false), ("", false)]
        {
            assert_eq!(per_namespace(release), expected, "{release}");
        }
    }
}
