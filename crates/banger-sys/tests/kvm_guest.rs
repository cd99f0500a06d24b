//! The guest of the KVM probe under QEMU's emulation of a processor, which is known to run kernels: it gets through
//! there, and notices when something is broken. So where KVM does not let it through, KVM is to blame.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "a test")]

use banger_sys::kvm::guest::{ADDRESS, MEMORY_LEN, PASSED, Stage, code};
use std::path::Path;
use std::process::{Command, Stdio};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// What a present gate of the guest's interrupt table has after the low half of its address.
const GATE: [u8; 6] = [8, 0, 0, 0x8e, 0x10, 0];

/// An ELF file that a VMM loads at [`ADDRESS`] and enters there by its PVH note (Xen's `PHYS32_ENTRY`, 18).
fn kernel(code: &[u8]) -> Vec<u8> {
    const HEADER_LEN: u64 = 64;
    const SEGMENT_LEN: u64 = 56;
    const NOTE_LEN: u64 = 24;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
    put(&[2, 0, 62, 0, 1, 0, 0, 0]);
    put(&u64::from(ADDRESS).to_le_bytes());
    put(&HEADER_LEN.to_le_bytes());
    put(&[0; 12]);
    put(&[HEADER_LEN as u8, 0, SEGMENT_LEN as u8, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    let note_at = HEADER_LEN + 2 * SEGMENT_LEN;
    let code_at = note_at + NOTE_LEN;
    let mut segment = |kind: u32, at: u64, address: u64, len: u64, memory_len: u64| {
        put(&kind.to_le_bytes());
        put(&7u32.to_le_bytes());
        [at, address, address, len, memory_len, 4].iter().for_each(|field| put(&field.to_le_bytes()));
    };
    segment(1, code_at, u64::from(ADDRESS), code.len() as u64, MEMORY_LEN as u64);
    segment(4, note_at, 0, NOTE_LEN, NOTE_LEN);
    put(&[4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0]);
    put(b"Xen\0");
    put(&u64::from(ADDRESS).to_le_bytes());
    put(code);
    file
}

/// Runs it; returns the stages it told of, and the verdict unless it ended in another way.
fn run(code: &[u8]) -> (Vec<u8>, Option<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let (file, stages) = (dir.path().join("guest"), dir.path().join("stages"));
    std::fs::write(&file, kernel(code)).unwrap();
    let mut qemu = Command::new(QEMU);
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "32"]);
    qemu.args(["-machine", "q35", "-accel", "tcg", "-cpu", "max", "-kernel"]).arg(&file);
    qemu.arg("-chardev").arg(format!("file,id=stages,path={}", stages.display()));
    qemu.args(["-device", "isa-debugcon,iobase=0xe9,chardev=stages"]);
    qemu.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]).stdin(Stdio::null());
    let status = qemu.status().unwrap().code().unwrap();
    // That device makes the status of a value; an end by a reset has 0.
    let verdict = (status & 1 == 1).then_some((status >> 1) as u8);
    (std::fs::read(stages).unwrap(), verdict)
}

fn is_installed() -> bool {
    Path::new(QEMU).exists()
}

#[test]
fn an_emulated_processor_lets_the_guest_through() {
    if !is_installed() {
        println!("skipped: an_emulated_processor_lets_the_guest_through: `{QEMU}` is not installed");
        return;
    }
    let all = Stage::ALL.map(|stage| stage as u8).to_vec();
    assert_eq!(run(code()), (all, Some(PASSED)));
}

#[test]
fn a_guest_that_misses_something_does_not_get_further() {
    if !is_installed() {
        println!("skipped: a_guest_that_misses_something_does_not_get_further: `{QEMU}` is not installed");
        return;
    }
    let gates: Vec<usize> = (0..code().len() - 6).filter(|&at| code()[at..].starts_with(&GATE)).collect();
    // Page fault, the program's own, controller, timer: without its gate each of them is the end.
    assert_eq!(gates.len(), 4);
    for (gate, last) in
        gates.into_iter().zip([Stage::Interrupt, Stage::Vectors, Stage::Fault, Stage::Controller])
    {
        let mut broken = code().to_vec();
        broken[gate + 3] = 0;
        let (stages, verdict) = run(&broken);
        assert_eq!((stages.last(), verdict), (Some(&(last as u8)), None), "{last:?}");
    }
    let mut wrong = code().to_vec();
    // What two times 21 has to be.
    let at = wrong.windows(3).position(|bytes| bytes == [0x83, 0xf8, 42]).unwrap();
    wrong[at + 2] = 41;
    assert_eq!(run(&wrong), (vec![1, 2], Some(1)));
}
