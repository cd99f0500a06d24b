//! System calls that are refused.
//!
//! These are lists of what is refused, not of what is allowed. The VMM and the C library it brings change with the
//! distribution, and a call that is missing from a list of allowed ones ends a vm months later, in an error path nobody
//! has run. What has no use in a virtual machine, and is where kernels are attacked, is known and does not change. QEMU adds its
//! own list (`-sandbox`), which also refuses to start programs; Firecracker brings a list of what it needs.
//!
//! A refused call fails with `EPERM`: programs cope with that, since containers do the same.

use banger_vmm::Driver;
use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Is, SeccompCondition as Condition,
    SeccompFilter, SeccompRule as Rule, sock_filter,
};
use std::collections::BTreeMap;

/// Never of use to a vm's processes once its namespaces are made.
const NEVER: &[c_long] = &[
    // Mounts and namespaces.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    // Files by number instead of by name, which is how one leaves a private root.
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    // Large parts of the kernel that many attacks begin with.
    libc::SYS_bpf,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_userfaultfd,
    libc::SYS_perf_event_open,
    libc::SYS_fanotify_init,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_personality,
    // The host as a whole.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_acct,
    libc::SYS_syslog,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    // Memory that outlives its process, or that no limit counts.
    libc::SYS_shmget,
    libc::SYS_msgget,
    libc::SYS_semget,
    libc::SYS_mq_open,
    libc::SYS_memfd_secret,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];

/// Not of use to the VMM either.
const NEVER_IN_VMM: &[c_long] = &[
    // It signals its own threads, by another call.
    libc::SYS_kill,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    libc::SYS_rt_sigqueueinfo,
    // Rights on its disk.
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chmod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lchown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
];

/// Not of use to QEMU, and to Firecracker they are.
const NEVER_IN_QEMU: &[c_long] = &[
    // QEMU listens, and inherits its network. Firecracker connects to the agent's socket when its guest does; what else
    // it reaches so is the supervisor's own socket, which takes nobody of the vm's processes.
    libc::SYS_connect,
    // Files that its limits of memory don't count; the limit of a file's length holds for each. Firecracker keeps the
    // queues of network and vsock in such files, to map them twice.
    libc::SYS_memfd_create,
];

/// Namespaces a new process could be put in.
const NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

/// Puts bytes into a terminal as if they had been typed there. The type of libc's constant differs between C libraries.
const TIOCSTI: u64 = 0x5412;

type Rules = BTreeMap<c_long, Vec<Rule>>;

/// For the VMM, from before its program starts.
pub(crate) fn vmm(driver: Driver) -> anyhow::Result<Vec<BpfProgram>> {
    let mut rules = common()?;
    rules.extend(NEVER_IN_VMM.iter().map(|call| (*call, Vec::new())));
    if driver == Driver::Qemu {
        rules.extend(NEVER_IN_QEMU.iter().map(|call| (*call, Vec::new())));
    }
    // Threads, and no processes.
    rules.entry(libc::SYS_clone).or_default().push(bits(0, libc::CLONE_THREAD, 0)?);
    // No network, not even another virtual machine's or the host's `AF_VSOCK`, which no namespace holds back.
    rules.insert(libc::SYS_socket, vec![not_among(&[libc::AF_UNIX])?]);
    filters(rules)
}

/// For the supervisor, which still starts processes and talks to the host's resolvers.
pub(crate) fn supervisor() -> anyhow::Result<Vec<BpfProgram>> {
    let mut rules = common()?;
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
    rules.insert(libc::SYS_socket, vec![not_among(&families)?]);
    filters(rules)
}

fn common() -> anyhow::Result<Rules> {
    let mut rules: Rules = NEVER.iter().map(|call| (*call, Vec::new())).collect();
    let namespaces = NAMESPACES.iter().map(|flag| bits(0, *flag, *flag)).collect::<anyhow::Result<_>>()?;
    rules.insert(libc::SYS_clone, namespaces);
    rules.insert(libc::SYS_ioctl, vec![equals(1, TIOCSTI)?]);
    Ok(rules)
}

fn filters(rules: Rules) -> anyhow::Result<Vec<BpfProgram>> {
    let refuse = |rules, errno: i32| -> anyhow::Result<BpfProgram> {
        let arch = std::env::consts::ARCH.try_into()?;
        let action = SeccompAction::Errno(errno.unsigned_abs());
        Ok(SeccompFilter::new(rules, SeccompAction::Allow, action, arch)?.try_into()?)
    };
    // The flags of `clone3` are in memory, where no filter looks. Without it the C library takes `clone`.
    let clone3 = refuse([(libc::SYS_clone3, Vec::new())].into(), libc::ENOSYS)?;
    Ok(vec![other_numbers(), clone3, refuse(rules, libc::EPERM)?])
}

/// The x32 way to call x86-64 kernels has numbers of its own, beginning here, for all the same calls. No distribution's
/// programs use it.
const X32: u32 = 0x4000_0000;

/// Refuses what the lists could not name.
fn other_numbers() -> BpfProgram {
    let instruction = |code: u32, jt, jf, k| sock_filter { code: code as u16, jt, jf, k };
    vec![
        // The call's number is the first word of what a filter sees.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 0, 1, X32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs()),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ]
}

/// True when the bits `mask` of an argument are `value`.
fn bits(argument: u8, mask: i32, value: i32) -> anyhow::Result<Rule> {
    let wide = |bits: i32| u64::from(bits.cast_unsigned());
    Ok(Rule::new(vec![Condition::new(argument, Len::Dword, Is::MaskedEq(wide(mask)), wide(value))?])?)
}

fn equals(argument: u8, value: u64) -> anyhow::Result<Rule> {
    Ok(Rule::new(vec![Condition::new(argument, Len::Dword, Is::Eq, value)?])?)
}

/// True when the first argument is none of these.
fn not_among(values: &[i32]) -> anyhow::Result<Rule> {
    let differs = |value: &i32| Condition::new(0, Len::Dword, Is::Ne, u64::from(value.cast_unsigned()));
    Ok(Rule::new(values.iter().map(differs).collect::<Result<_, _>>()?)?)
}
