//! Rules about the tree, as tests (`tests/architecture.rs`), and the end-to-end suite (`tests/e2e`).
//!
//! The library part is what tests and benchmarks make their guests of.

/// Where programs are loaded.
const BASE: u64 = 0x40_0000;
/// Length of the two headers before the code.
const HEADERS_LEN: u64 = 64 + 56;

/// Returns a static x86-64 Linux program (ELF) that consists of this machine code and needs nothing of its system.
#[must_use]
pub fn static_program(code: &[u8]) -> Vec<u8> {
    let len = HEADERS_LEN + code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // Executable, x86-64, version 1.
    elf.extend([2_u16.to_le_bytes(), 62_u16.to_le_bytes()].concat());
    elf.extend(1_u32.to_le_bytes());
    // Entry, program headers, section headers.
    elf.extend([BASE + HEADERS_LEN, 64, 0].map(u64::to_le_bytes).concat());
    elf.extend(0_u32.to_le_bytes());
    elf.extend([64_u16, 56, 1, 0, 0, 0].map(u16::to_le_bytes).concat());
    // One segment, readable and executable.
    elf.extend([1_u32, 5].map(u32::to_le_bytes).concat());
    elf.extend([0, BASE, BASE, len, len, 0x1000].map(u64::to_le_bytes).concat());
    elf.extend(code);
    elf
}

/// Machine code that writes `text` to its standard output and exits with `status`.
#[must_use]
pub fn code_that_prints(text: &str, status: u8) -> Vec<u8> {
    let mut code = vec![0xb8, 1, 0, 0, 0, 0xbf, 1, 0, 0, 0]; // eax = write, edi = stdout
    code.extend([0x48, 0x8d, 0x35, 19, 0, 0, 0, 0xba]); // rsi = the text below, edx = its length
    code.extend((text.len() as u32).to_le_bytes());
    code.extend([0x0f, 0x05]); // syscall
    code.extend([0xb8, 60, 0, 0, 0, 0xbf, status, 0, 0, 0, 0x0f, 0x05]); // exit(status)
    code.extend(text.as_bytes());
    code
}

/// Machine code that, as process 1, powers the machine off.
#[must_use]
pub fn code_that_powers_off() -> Vec<u8> {
    let mut code = vec![0xb8, 169, 0, 0, 0]; // eax = reboot
    // The two magic numbers and `LINUX_REBOOT_CMD_POWER_OFF` of `linux/reboot.h`.
    for (register, value) in [(0xbf, 0xfee1_dead_u32), (0xbe, 672_274_793), (0xba, 0x4321_fedc)] {
        code.push(register);
        code.extend(value.to_le_bytes());
    }
    code.extend([0x0f, 0x05, 0xf4]); // syscall, halt
    code
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    #[allow(clippy::disallowed_methods, reason = "the program is what is tested")]
    fn a_program_of_a_few_bytes_runs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hello");
        std::fs::write(&path, super::static_program(&super::code_that_prints("hello\n", 7))).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let output = std::process::Command::new(path).output().unwrap();
        assert_eq!((output.stdout.as_slice(), output.status.code()), (&b"hello\n"[..], Some(7)));
    }
}
