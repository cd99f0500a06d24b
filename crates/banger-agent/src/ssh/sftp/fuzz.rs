//! The file server against requests in any order with any numbers, below a directory of the test's own.

use super::*;
use crate::ssh::fuzz::{NUMBERS, Rng, rounds};

/// Places that there are, that there are not, and that are something else than a client thinks.
fn some_path(rng: &mut Rng, top: &Path) -> Vec<u8> {
    const NAMES: [&str; 10] =
        ["", "a", "b", "dir", "dir/c", "link", "pipe", "dir/../a", "missing/x", "a/below"];
    top.join(NAMES[rng.below(NAMES.len())]).as_os_str().as_bytes().to_vec()
}

fn some_handle(rng: &mut Rng) -> Vec<u8> {
    match rng.below(8) {
        0 => Vec::new(),
        1 => b"long handle".to_vec(),
        2 => rng.number().to_be_bytes()[..4].to_vec(),
        _ => (rng.below(12) as u32).to_be_bytes().to_vec(),
    }
}

fn some_changes(rng: &mut Rng) -> Vec<u8> {
    let bits = if rng.below(4) == 0 { rng.number() as u32 } else { (rng.below(16) as u32) & !HAS_OWNER };
    let mut packet = Packet::part().number(bits);
    // A file of a size that a disk has.
    if bits & HAS_SIZE != 0 {
        packet = packet.long(rng.below(100_000) as u64);
    }
    if bits & HAS_OWNER != 0 {
        packet = packet.number(rustix::process::getuid().as_raw()).number(rustix::process::getgid().as_raw());
    }
    for _ in 0..rng.below(4) {
        packet = packet.number(rng.number() as u32);
    }
    packet.0
}

fn some_request(rng: &mut Rng, top: &Path) -> Vec<u8> {
    const KINDS: [u8; 24] = [
        INIT, OPEN, OPEN, OPEN, CLOSE, READ, READ, WRITE, WRITE, LSTAT, FSTAT, SETSTAT, FSETSTAT, OPENDIR,
        READDIR, READDIR, REMOVE, MKDIR, RMDIR, REALPATH, STAT, RENAME, READLINK, EXTENDED,
    ];
    let kind = KINDS[rng.below(KINDS.len())];
    let packet = Packet::new(kind).number(rng.number() as u32);
    let packet = match kind {
        INIT => packet,
        OPEN => packet.bytes(some_path(rng, top)).number(rng.below(64) as u32).raw(&some_changes(rng)),
        READ => packet.bytes(some_handle(rng)).long(rng.number()).number(rng.number() as u32),
        WRITE => {
            // Beyond that a hole would have to be made of.
            let offset = if rng.below(4) == 0 {
                i64::MAX as u64 + rng.below(3) as u64
            } else {
                rng.below(100_000) as u64
            };
            packet.bytes(some_handle(rng)).long(offset).bytes(vec![7; rng.below(5000)])
        }
        CLOSE | FSTAT | READDIR => packet.bytes(some_handle(rng)),
        FSETSTAT => packet.bytes(some_handle(rng)).raw(&some_changes(rng)),
        SETSTAT | MKDIR => packet.bytes(some_path(rng, top)).raw(&some_changes(rng)),
        RENAME => packet.bytes(some_path(rng, top)).bytes(some_path(rng, top)),
        EXTENDED => {
            let (name, _) = EXTENSIONS[rng.below(EXTENSIONS.len())];
            let packet = packet.bytes(name);
            match name {
                "copy-data" => {
                    let packet = packet.bytes(some_handle(rng)).long(rng.number());
                    let packet = packet.long(rng.below(100_000) as u64).bytes(some_handle(rng));
                    packet.long(rng.below(100_000) as u64)
                }
                "users-groups-by-id@openssh.com" => {
                    packet.bytes(vec![0; rng.below(5000)]).bytes(vec![0; 4 * rng.below(5000)])
                }
                "fsync@openssh.com" => packet.bytes(some_handle(rng)),
                "lsetstat@openssh.com" => packet.bytes(some_path(rng, top)).raw(&some_changes(rng)),
                _ => packet.bytes(some_path(rng, top)).bytes(some_path(rng, top)),
            }
        }
        _ => packet.bytes(some_path(rng, top)),
    };
    let mut message = packet.0;
    // What is cut off can't be another path than before: it is none.
    if rng.below(6) == 0 {
        message.truncate(rng.below(message.len() + 1));
    }
    message
}

#[test]
fn requests_in_any_order_are_answered_and_bounded() {
    assert!(NUMBERS.len() > 4);
    rounds("sftp", |rng| {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path();
        std::fs::create_dir(top.join("dir")).unwrap();
        std::fs::write(top.join("a"), "content").unwrap();
        std::os::unix::fs::symlink("a", top.join("link")).unwrap();
        rustix::fs::mknodat(CWD, top.join("pipe"), rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o600), 0)
            .unwrap();
        let mut server = Server { handles: HashMap::new(), next: 0 };
        for _ in 0..400 {
            let request = some_request(rng, top);
            let id = request.get(1..5).map(<[u8]>::to_vec);
            let Some(answer) = server.answer(&request) else {
                assert!(request.len() < 5, "a request without an answer: {request:?}");
                continue;
            };
            assert!(answer.0.len() <= MESSAGE_LEN_MAX as usize, "an answer of {} bytes", answer.0.len());
            assert!(answer.0[0] == VERSION || answer.0.get(1..5) == id.as_deref(), "another one's answer");
            assert!(server.handles.len() <= HANDLES_MAX);
        }
    });
}
