//! What `sftp` of OpenSSH 9 asks of a server beyond files: copies that stay here (`cp`), and names of owners (`ls -l`).

use super::{Answer, END_OF_FILE, EXTENDED_REPLY, PIECE_LEN_MAX, Refused, done};
use crate::ssh::fields::Packet;
use crate::users;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

/// Bytes copied at once.
const CHUNK_LEN: u16 = 32 * 1024;

/// Copies `len` bytes, or with 0 what there is, from one open file to another.
pub(super) fn copy(from: (&File, u64), len: u64, to: (&File, u64)) -> Answer {
    let id = |file: &File| file.metadata().map(|found| (found.dev(), found.ino()));
    if id(from.0)? == id(to.0)? {
        // It could go on for ever.
        return Err(Refused::Io(ErrorKind::InvalidInput.into()));
    }
    let mut chunk = vec![0; CHUNK_LEN.into()];
    let (mut copied, until) = (0, if len == 0 { u64::MAX } else { len });
    let place =
        |begin: u64, copied: u64| begin.checked_add(copied).ok_or(io::Error::from(ErrorKind::InvalidInput));
    while copied < until {
        let wanted = (until - copied).min(CHUNK_LEN.into()) as usize;
        match from.0.read_at(&mut chunk[..wanted], place(from.1, copied)?)? {
            0 if len == 0 => break,
            0 => return Err(Refused::Status(END_OF_FILE)),
            read => {
                to.0.write_all_at(&chunk[..read], place(to.1, copied)?)?;
                copied += read as u64;
            }
        }
    }
    Ok(done())
}

/// Names users and groups by their numbers, from the files under `root`. Who has no name there has an empty one.
pub(super) fn names(root: &Path, uids: &[u8], gids: &[u8]) -> Answer {
    // An answer is no longer than a message may be: a number's place is as long as its name's, without the name.
    let len_max = (PIECE_LEN_MAX as usize).saturating_sub(uids.len() + gids.len()) / 2;
    let list = |file: &str, ids: &[u8]| {
        let (ids, rest) = ids.as_chunks();
        let names = if rest.is_empty() { users::names(root, file) } else { return Err(Refused::Bad) };
        let mut len = 0;
        Ok(ids.iter().fold(Packet::part(), |packet, id| {
            let name = names.get(&u32::from_be_bytes(*id)).map_or("", String::as_str);
            len += name.len();
            packet.bytes(if len <= len_max { name } else { "" })
        }))
    };
    let (users, groups) = (list("passwd", uids)?, list("group", gids)?);
    Ok(Packet::new(EXTENDED_REPLY).bytes(users.0).bytes(groups.0))
}

#[cfg(test)]
mod tests {
    use super::super::{
        CREATE, EXTENDED, FAILURE, FOR_READING, FOR_WRITING, MESSAGE_LEN_MAX, OK, OPEN, STATUS, Server,
        code_of,
    };
    use super::*;
    use crate::ssh::fields::Fields;
    use std::collections::HashMap;
    use std::os::unix::ffi::OsStrExt as _;

    #[test]
    fn copies_stay_here_and_end() {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..100_000_u32).map(|number| (number * 7919 % 251) as u8).collect();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        std::fs::write(&one, &content).unwrap();
        let mut server = Server { handles: HashMap::new(), next: 0 };
        for (path, how) in
            [(&one, FOR_READING), (&two, FOR_READING | FOR_WRITING | CREATE), (&one, FOR_WRITING)]
        {
            let open = Packet::new(OPEN).number(1).bytes(path.as_os_str().as_bytes()).number(how).number(0);
            server.answer(&open.0).unwrap();
        }
        let mut copy = |from: u32, offset: u64, len: u64, to: u32, to_offset: u64| {
            let packet = Packet::new(EXTENDED).number(1).bytes("copy-data").bytes(from.to_be_bytes());
            let packet = packet.long(offset).long(len).bytes(to.to_be_bytes()).long(to_offset);
            let answer = server.answer(&packet.0).unwrap();
            assert_eq!(answer.0[0], STATUS);
            Fields::of(&answer.0[5..]).number().unwrap()
        };
        assert_eq!(copy(0, 0, 0, 1, 0), OK);
        assert_eq!(std::fs::read(&two).unwrap(), content);
        assert_eq!(copy(0, 10, 70_000, 1, 5), OK);
        assert_eq!(std::fs::read(&two).unwrap()[..70_005], [&content[..5], &content[10..70_010]].concat());
        assert_eq!(copy(0, 99_990, 11, 1, 0), END_OF_FILE);
        // Onto itself, at no place that there is, and from what was not opened.
        for wrong in [
            (0, 0, 0, 2, 100_000),
            (0, u64::MAX, 1, 1, 0),
            (0, 0, 0, 1, u64::MAX),
            (7, 0, 0, 1, 0),
            (0, 0, 0, 7, 0),
        ] {
            assert_eq!(copy(wrong.0, wrong.1, wrong.2, wrong.3, wrong.4), FAILURE, "{wrong:?}");
        }
        assert_eq!(std::fs::read(&one).unwrap(), content);
        assert_eq!(code_of(&ErrorKind::InvalidInput.into()), FAILURE);
    }

    #[test]
    fn owners_have_names_or_none() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(
            dir.path().join("etc/passwd"),
            "root:x:0:0::/:\nnonsense\ndev:x:1000:7::/:\nsame:x:0:0::/:\n",
        )
        .unwrap();
        std::fs::write(dir.path().join("etc/group"), "staff:x:7:dev\n").unwrap();
        let ids = |ids: &[u32]| ids.iter().flat_map(|id| id.to_be_bytes()).collect::<Vec<_>>();
        let names = |uids: &[u8], gids: &[u8]| names(dir.path(), uids, gids);
        let answer = names(&ids(&[1000, 5, 0]), &ids(&[7, 0])).unwrap_or_else(|_| panic!("refused"));
        let users = Packet::part().bytes("dev").bytes("").bytes("root");
        let groups = Packet::part().bytes("staff").bytes("");
        assert_eq!(answer, Packet::new(EXTENDED_REPLY).bytes(users.0).bytes(groups.0));
        assert!(matches!(names(&[0; 5], &[]), Err(Refused::Bad)));
        // Long names of many do not make an answer that no client takes.
        std::fs::write(dir.path().join("etc/passwd"), format!("{}:x:1:1::/:\n", "a".repeat(4000))).unwrap();
        for many in [1, 20_000, 32_700] {
            let many = ids(&vec![1; many]);
            let answer = names(&many, &many).unwrap_or_else(|_| panic!("refused"));
            assert!(answer.0.len() < MESSAGE_LEN_MAX as usize, "{}", answer.0.len());
        }
        let empty = tempfile::tempdir().unwrap();
        let answer = super::names(empty.path(), &ids(&[0]), &[]).unwrap_or_else(|_| panic!("refused"));
        assert_eq!(answer, Packet::new(EXTENDED_REPLY).bytes(Packet::part().bytes("root").0).bytes(""));
    }
}
