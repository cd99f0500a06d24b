//! The guest that tells whether a machine's KVM runs an ordinary kernel: its code, and what it says.
//!
//! It needs, one after the other, what a stock kernel needs of the processor and of the parts that KVM provides, and
//! says after each that it got there. It is entered as a kernel with a PVH note is: protected mode with flat segments,
//! no paging. So the same bytes run as such a kernel under any other VMM, which is how a test shows that they are right.

use std::arch::global_asm;

/// Where the code and the pages behind it are in the guest's memory, and where it is entered.
pub const ADDRESS: u32 = 0x10_0000;
/// The memory it needs from there on: code, three page tables, a stack.
pub const MEMORY_LEN: usize = 5 * PAGE;
/// The port it writes the number of each reached [`Stage`] to.
pub const STAGE_PORT: u16 = 0xe9;
/// The port it writes its verdict to.
pub const VERDICT_PORT: u16 = 0xf4;
/// The verdict of a guest that got through. Any other means that something had a wrong result.
pub const PASSED: u8 = 0x2a;
const PAGE: usize = 4096;

/// How far the guest got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Its first instructions ran.
    ProtectedMode = 1,
    /// Paging and 64-bit code.
    LongMode,
    /// Vector registers, and a locked operation on 16 bytes.
    Vectors,
    /// An interrupt of the program's own, and the return from it.
    Interrupt,
    /// A page fault, handled.
    Fault,
    /// An interrupt from the local interrupt controller, while halted.
    Controller,
    /// One from its timer.
    Timer,
}

impl Stage {
    /// All of them, in order.
    pub const ALL: [Self; 7] = [
        Self::ProtectedMode,
        Self::LongMode,
        Self::Vectors,
        Self::Interrupt,
        Self::Fault,
        Self::Controller,
        Self::Timer,
    ];

    /// Returns what it is called where it is told of.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ProtectedMode => "protected mode",
            Self::LongMode => "64-bit mode",
            Self::Vectors => "vector registers",
            Self::Interrupt => "an interrupt of its own",
            Self::Fault => "a page fault",
            Self::Controller => "an interrupt of the APIC",
            Self::Timer => "an interrupt of the timer",
        }
    }

    /// Reads the number the guest writes.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|stage| *stage as u8 == number)
    }
}

// The tables are built by the guest itself, behind its code: the root at 1 page, the second at 2, the third at 3, and
// the stack's end at 5. The third serves both the first 2 MiB and the controller's registers at 0xfee00000.
global_asm!(
    ".pushsection .rodata.banger_kvm_guest, \"a\", @progbits",
    ".globl banger_kvm_guest_start, banger_kvm_guest_end",
    ".hidden banger_kvm_guest_start, banger_kvm_guest_end",
    ".balign 16",
    "banger_kvm_guest_start:",
    ".set .Lg, banger_kvm_guest_start",
    ".code32",
    "cli",
    "movl $({address} + 0x5000), %esp",
    "movb $1, %al",
    "outb %al, ${stage}",
    // Long mode, by the manual: tables, physical address extension, the mode's bit, paging, 64-bit code segment.
    "movl $({address} + 0x2003), {address} + 0x1000",
    "movl $({address} + 0x3003), {address} + 0x2000",
    "movl $({address} + 0x3003), {address} + 0x2000 + 3 * 8",
    "movl $0x83, {address} + 0x3000",
    "movl $0xfee0009b, {address} + 0x3000 + 503 * 8",
    "movl %cr4, %eax",
    "orl $0x20, %eax",
    "movl %eax, %cr4",
    "movl $({address} + 0x1000), %eax",
    "movl %eax, %cr3",
    "movl $0xc0000080, %ecx",
    "rdmsr",
    "orl $0x100, %eax",
    "wrmsr",
    "lgdt .Lgdt_pointer - .Lg + {address}",
    "movl %cr0, %eax",
    "orl $0x80000001, %eax",
    "movl %eax, %cr0",
    "ljmpl $8, $(.Llong - .Lg + {address})",
    ".code64",
    ".Llong:",
    "movl $16, %eax",
    "movl %eax, %ds",
    "movl %eax, %es",
    "movl %eax, %ss",
    "movb $2, %al",
    "outb %al, ${stage}",
    // Vector registers are off at first: no emulation, exceptions of their own.
    "movq %cr0, %rax",
    "andl $~4, %eax",
    "orl $2, %eax",
    "movq %rax, %cr0",
    "movq %cr4, %rax",
    "orl $0x600, %eax",
    "movq %rax, %cr4",
    "movl $21, %eax",
    "movd %eax, %xmm0",
    "movdqa %xmm0, %xmm1",
    "paddd %xmm1, %xmm0",
    "movd %xmm0, %eax",
    "cmpl $42, %eax",
    "jne .Lwrong",
    "xorl %eax, %eax",
    "xorl %edx, %edx",
    "movl $7, %ebx",
    "movl $9, %ecx",
    "leaq {address} + 0x4000, %rdi",
    "lock cmpxchg16b (%rdi)",
    "jnz .Lwrong",
    "cmpq $9, 8(%rdi)",
    "jne .Lwrong",
    "movb $3, %al",
    "outb %al, ${stage}",
    // %ebp counts what the handlers saw.
    "xorl %ebp, %ebp",
    "lidt .Lidt_pointer(%rip)",
    "int $0x20",
    "cmpl $1, %ebp",
    "jne .Lwrong",
    "movb $4, %al",
    "outb %al, ${stage}",
    "movl $0x40000000, %edi",
    "movl (%rdi), %eax",
    ".Lfaulted:",
    "cmpl $2, %ebp",
    "jne .Lwrong",
    "movb $5, %al",
    "outb %al, ${stage}",
    // The old controllers off, the local one on, and an interrupt to itself. It is pending when the halt begins.
    "movb $0xff, %al",
    "outb %al, $0x21",
    "outb %al, $0xa1",
    "movl $0xfee00000, %ebx",
    "movl $0x1ff, 0xf0(%rbx)",
    "movl $0x44021, 0x300(%rbx)",
    "sti",
    "hlt",
    "cli",
    "cmpl $3, %ebp",
    "jne .Lwrong",
    "movb $6, %al",
    "outb %al, ${stage}",
    // A tenth of a millisecond of a bus of 1 GHz, which is what both KVM and QEMU have.
    "movl $0x22, 0x320(%rbx)",
    "movl $0xb, 0x3e0(%rbx)",
    "movl $100000, 0x380(%rbx)",
    "sti",
    "hlt",
    "cli",
    "cmpl $4, %ebp",
    "jne .Lwrong",
    "movb $7, %al",
    "outb %al, ${stage}",
    "movl ${passed}, %eax",
    "outl %eax, ${verdict}",
    ".Lhalt:",
    "hlt",
    "jmp .Lhalt",
    ".Lwrong:",
    "movl $1, %eax",
    "outl %eax, ${verdict}",
    "jmp .Lhalt",
    ".Lon_interrupt:",
    "incl %ebp",
    "iretq",
    ".Lon_controller:",
    "incl %ebp",
    "movl $0, 0xb0(%rbx)",
    "iretq",
    ".Lon_fault:",
    "movq %cr2, %rcx",
    "cmpq %rdi, %rcx",
    "jne .Lwrong",
    "incl %ebp",
    "leaq .Lfaulted(%rip), %rcx",
    "movq %rcx, 8(%rsp)",
    "addq $8, %rsp",
    "iretq",
    ".balign 8",
    ".Lgdt:",
    ".quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff",
    ".Lgdt_pointer:",
    ".short .Lgdt_pointer - .Lgdt - 1",
    ".long .Lgdt - .Lg + {address}",
    ".balign 8",
    // Gates in the order of their numbers: a page fault is 14, those above are free for use from 32 on.
    ".Lidt:",
    ".fill 14 * 16, 1, 0",
    ".short .Lon_fault - .Lg, 8, 0x8e00, {address} >> 16, 0, 0, 0, 0",
    ".fill 17 * 16, 1, 0",
    ".short .Lon_interrupt - .Lg, 8, 0x8e00, {address} >> 16, 0, 0, 0, 0",
    ".short .Lon_controller - .Lg, 8, 0x8e00, {address} >> 16, 0, 0, 0, 0",
    ".short .Lon_controller - .Lg, 8, 0x8e00, {address} >> 16, 0, 0, 0, 0",
    ".Lidt_pointer:",
    ".short .Lidt_pointer - .Lidt - 1",
    ".quad .Lidt - .Lg + {address}",
    "banger_kvm_guest_end:",
    ".popsection",
    address = const ADDRESS,
    stage = const STAGE_PORT,
    verdict = const VERDICT_PORT,
    passed = const PASSED,
    options(att_syntax)
);

unsafe extern "C" {
    static banger_kvm_guest_start: u8;
    static banger_kvm_guest_end: u8;
}

/// Returns the guest's code, to be put at [`ADDRESS`] and entered there.
#[must_use]
pub fn code() -> &'static [u8] {
    let (start, end) = (&raw const banger_kvm_guest_start, &raw const banger_kvm_guest_end);
    // SAFETY: both are symbols of the section above, and what is between them is constant data of the program.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}
