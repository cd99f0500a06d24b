//! The machine the guest runs in: a few pages of memory, one processor, KVM's own interrupt controllers.

use super::Failure;
use super::guest::{self, Stage};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use std::io;
use std::ptr::NonNull;

/// Three pages that Intel's processors need for a guest without paging, out of the guest's way. Other VMMs use them too.
const TASK_STATE: usize = 0xfffb_d000;
/// The version of the interface, which has not changed since 2007.
const API_VERSION: i32 = 12;
/// More exits than the guest makes.
const EXITS_MAX: u32 = 1000;

/// The guest's memory, zeroed.
struct Memory {
    address: NonNull<libc::c_void>,
}

impl Memory {
    fn new() -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                guest::MEMORY_LEN,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address).ok_or(io::ErrorKind::OutOfMemory)?;
        let code = guest::code();
        // SAFETY: the code is shorter than the pages it is to be in, which are mapped, writable and nobody else's.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), address.cast().as_ptr(), code.len()) };
        Ok(Self { address })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new`, which no reference points into.
        unsafe { libc::munmap(self.address.as_ptr(), guest::MEMORY_LEN) };
    }
}

fn machine<T, E: Into<io::Error>>(step: &'static str, result: Result<T, E>) -> Result<T, Failure> {
    result.map_err(|error| Failure::Machine { step, source: error.into() })
}

/// Makes the machine and runs the guest.
pub(super) fn run(tell: &mut dyn FnMut(Stage)) -> Result<(), Failure> {
    let kvm = machine("open `/dev/kvm`", Kvm::new())?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(Failure::Ended(format!("its interface has version {version}, not {API_VERSION}")));
    }
    // Declared before the vm, so that it goes after it.
    let memory = machine("get memory", Memory::new())?;
    let vm = machine("make a vm", kvm.create_vm())?;
    machine("set the task state's address", vm.set_tss_address(TASK_STATE))?;
    machine("make interrupt controllers", vm.create_irq_chip())?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: u64::from(guest::ADDRESS),
        memory_size: guest::MEMORY_LEN as u64,
        userspace_addr: memory.address.addr().get() as u64,
        flags: 0,
    };
    // SAFETY: the memory is mapped for as long as the vm is there, and nothing of this program refers to it.
    machine("give it memory", unsafe { vm.set_user_memory_region(region) })?;
    let mut vcpu = machine("make a processor", vm.create_vcpu(0))?;
    let features =
        machine("ask for the processor's features", kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))?;
    machine("set the processor's features", vcpu.set_cpuid2(&features))?;
    let sregs = machine("read the processor's state", vcpu.get_sregs())?;
    machine("set the processor's state", vcpu.set_sregs(&entry_state(sregs)))?;
    let regs = kvm_regs { rip: u64::from(guest::ADDRESS), rflags: 2, ..kvm_regs::default() };
    machine("set the processor's registers", vcpu.set_regs(&regs))?;
    follow(&mut vcpu, tell)
}

/// The state a PVH kernel is entered in: protected mode, flat segments, no paging.
fn entry_state(mut sregs: kvm_sregs) -> kvm_sregs {
    let flat = |selector, type_| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    let data = flat(0x10, 3);
    sregs.cs = flat(8, 11);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, s: 0, g: 0, db: 0, ..flat(0x18, 11) };
    sregs.cr0 = 0x11;
    sregs.cr4 = 0;
    sregs.efer = 0;
    sregs
}

/// Runs it until it has given its verdict or KVM its own.
fn follow(vcpu: &mut VcpuFd, tell: &mut dyn FnMut(Stage)) -> Result<(), Failure> {
    for _ in 0..EXITS_MAX {
        match machine("run it", vcpu.run())? {
            VcpuExit::IoOut(guest::STAGE_PORT, data) => {
                if let Some(stage) = data.first().and_then(|number| Stage::from_number(*number)) {
                    tell(stage);
                }
            }
            VcpuExit::IoOut(guest::VERDICT_PORT, data) => {
                return match data.first() {
                    Some(&guest::PASSED) => Ok(()),
                    _ => Err(Failure::Ended("a result was wrong".to_owned())),
                };
            }
            VcpuExit::Shutdown => return Err(Failure::Ended("it shut down".to_owned())),
            VcpuExit::InternalError => return Err(Failure::Ended("KVM had an internal error".to_owned())),
            VcpuExit::FailEntry(reason, _) => {
                return Err(Failure::Ended(format!("it could not be entered ({reason:#x})")));
            }
            other => return Err(Failure::Ended(format!("KVM stopped it ({other:?})"))),
        }
    }
    Err(Failure::Ended("KVM stopped it again and again".to_owned()))
}
