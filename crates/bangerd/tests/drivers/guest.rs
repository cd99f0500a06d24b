//! The guest: its program as a kernel, and what it is told to do as an initramfs.

use banger_wire::frame::{Frame, SYNC};
use banger_wire::guest::GuestMessage;
use std::path::Path;
use std::process::Command;

/// Where the program is loaded and entered, as in `guest.ld`.
const ADDRESS: u64 = 0x10_0000;
/// Its memory: the program, and what it begins with zeroes.
const MEMORY_LEN: u64 = 1 << 20;
/// What the note of a PVH kernel is: the address of its entry.
const PHYS32_ENTRY: u32 = 18;

/// Compiles the program and makes a kernel of it; nothing when there is no compiler that can.
pub(crate) fn build(kernel: &Path) -> bool {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/drivers");
    let program = kernel.with_extension("bin");
    let mut cc = Command::new("cc");
    // Nothing a processor without an operating system, or an emulator of its instructions, may lack.
    cc.args(["-m32", "-Os", "-ffreestanding", "-mgeneral-regs-only", "-fcf-protection=none", "-fno-pic"]);
    cc.args(["-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-Wall", "-Werror"]);
    cc.args(["-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,--oformat=binary"]);
    cc.arg("-T").arg(source.join("guest.ld")).arg("-o").arg(&program).arg(source.join("guest.c"));
    if !cc.status().is_ok_and(|status| status.success()) {
        return false;
    }
    std::fs::write(kernel, elf(&std::fs::read(program).unwrap())).unwrap();
    true
}

/// An ELF file for x86-64, which is what loaders of kernels take, with one segment and the note that says it is PVH.
fn elf(program: &[u8]) -> Vec<u8> {
    let (headers, segment) = (64, 56);
    let note_at = headers + 2 * segment;
    let mut note = [4u32, 4, PHYS32_ENTRY].map(u32::to_le_bytes).concat();
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&(ADDRESS as u32).to_le_bytes());
    let program_at = 4096;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // An executable of x86-64, version 1.
    file.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    [ADDRESS, headers, 0].iter().for_each(|number| file.extend_from_slice(&number.to_le_bytes()));
    file.extend_from_slice(&0u32.to_le_bytes());
    let sizes = [headers as u16, segment as u16, 2, 64, 0, 0];
    sizes.iter().for_each(|number| file.extend_from_slice(&number.to_le_bytes()));
    let mut add = |kind: u32, flags: u32, numbers: [u64; 6]| {
        [kind, flags].iter().for_each(|number| file.extend_from_slice(&number.to_le_bytes()));
        numbers.iter().for_each(|number| file.extend_from_slice(&number.to_le_bytes()));
    };
    let len = |bytes: &[u8]| bytes.len() as u64;
    add(1, 7, [program_at, ADDRESS, ADDRESS, len(program), MEMORY_LEN, 4096]);
    add(4, 4, [note_at, 0, 0, len(&note), len(&note), 4]);
    file.extend_from_slice(&note);
    file.resize(program_at as usize, 0);
    file.extend_from_slice(program);
    file
}

/// What the guest does, step by step. After the last one it stands still.
#[derive(Debug, Clone, Default)]
pub(crate) struct Script(Vec<u8>);

impl Script {
    pub(crate) fn print(self, text: &str) -> Self {
        self.with_bytes(b'p', text.as_bytes())
    }

    pub(crate) fn print_cmdline(self) -> Self {
        self.with(b'c', 0)
    }

    /// Connects to a port of the host's on a vsock.
    pub(crate) fn dial(self, port: u32) -> Self {
        self.with(b'd', port)
    }

    /// Waits for the loss of the connections on its vsock, and connects again.
    pub(crate) fn dial_again(self, port: u32) -> Self {
        self.with(b'n', port)
    }

    /// Opens the port of a virtio-serial device that an agent uses.
    pub(crate) fn open_port(self) -> Self {
        self.with(b'e', 0)
    }

    /// Sends as the agent does.
    pub(crate) fn send(self, message: &GuestMessage) -> Self {
        let mut bytes = SYNC.to_vec();
        Frame::message(0, message).unwrap().encode(&mut bytes);
        self.with_bytes(b's', &bytes)
    }

    /// Reads until this has come.
    pub(crate) fn wait_for(self, text: &str) -> Self {
        self.with_bytes(b'w', text.as_bytes())
    }

    /// Prints the first byte of a drive.
    pub(crate) fn read_drive(self, number: u32) -> Self {
        self.with(b'r', number)
    }

    /// Reads a sector of the first drive this many times.
    pub(crate) fn read_much(self, times: u32) -> Self {
        self.with(b'm', times)
    }

    /// Writes `x` to the beginning of a drive and prints `written` or `refused`.
    pub(crate) fn write_drive(self, number: u32) -> Self {
        self.with(b'o', number)
    }

    /// Prints `there` when there is a virtio device of this kind.
    pub(crate) fn find_device(self, kind: u32) -> Self {
        self.with(b'v', kind)
    }

    /// Opens the network device: the one on a PCI bus, or the other.
    pub(crate) fn open_net(self, on_pci: bool) -> Self {
        self.with(b'g', on_pci.into())
    }

    /// Sends a frame, once.
    pub(crate) fn frame(self, frame: &[u8]) -> Self {
        self.with_bytes(b'x', frame)
    }

    /// Sends a frame again and again until one is heard that has these bytes, which are in none before. Without a frame
    /// it waits for that one. What begins like [`crate::frames::udp`]'s text is printed.
    pub(crate) fn ask(self, frame: &[u8], heard: &[u8]) -> Self {
        self.with_bytes(b'q', frame).with_bytes(b'h', heard)
    }

    /// Prints what is typed, up to the end of a line.
    pub(crate) fn echo(self) -> Self {
        self.with(b'i', 0)
    }

    /// Prints without end.
    pub(crate) fn flood(self) -> Self {
        self.with(b'f', 0)
    }

    /// Ends with a reset by the keyboard controller.
    pub(crate) fn reset_by_keyboard(self) -> Self {
        self.with(b'k', 0)
    }

    /// Ends with a reset by the fault of a fault of a fault.
    pub(crate) fn reset_by_fault(self) -> Self {
        self.with(b't', 0)
    }

    /// Ends with ACPI's "soft off".
    pub(crate) fn acpi_off(self) -> Self {
        self.with(b'a', 0)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn with(mut self, letter: u8, number: u32) -> Self {
        self.0.push(letter);
        self.0.extend_from_slice(&number.to_le_bytes());
        self
    }

    fn with_bytes(self, letter: u8, bytes: &[u8]) -> Self {
        let mut script = self.with(letter, bytes.len() as u32);
        script.0.extend_from_slice(bytes);
        script
    }
}
