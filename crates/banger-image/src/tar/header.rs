//! The fields of a header block.

use super::pax::Overrides;
use super::{BLOCK, Entry, Kind, NAME_MAX, TarError};

pub(super) fn check_sum(header: &[u8; BLOCK]) -> Result<(), TarError> {
    let blanked = |at: usize, byte: u8| if (148..156).contains(&at) { b' ' } else { byte };
    let bytes = || header.iter().enumerate().map(|(at, byte)| blanked(at, *byte));
    let expected = number(&header[148..156])?;
    // Old tools add up signed bytes.
    let signed: i64 = bytes().map(|byte| i64::from(byte as i8)).sum();
    if bytes().map(u64::from).sum::<u64>() == expected || u64::try_from(signed) == Ok(expected) {
        Ok(())
    } else {
        Err(TarError::Damaged("a header's checksum is wrong"))
    }
}

/// Parses an octal field, or GNU's base-256 form for numbers that don't fit.
pub(super) fn number(field: &[u8]) -> Result<u64, TarError> {
    u64::try_from(signed(field)?).map_err(|_| BAD_NUMBER)
}

const BAD_NUMBER: TarError = TarError::Damaged("a header has a number that can't be read");

fn signed(field: &[u8]) -> Result<i64, TarError> {
    match field {
        [first @ 0x80..=0xff, rest @ ..] => {
            // Two's complement of which the first bit only says that it is one.
            let start = if first & 0x40 == 0 { i64::from(first & 0x3f) } else { i64::from(*first as i8) };
            rest.iter()
                .try_fold(start, |n, b| n.checked_mul(256)?.checked_add(i64::from(*b)))
                .ok_or(BAD_NUMBER)
        }
        _ => {
            let trimmed = std::str::from_utf8(field).map_err(|_| BAD_NUMBER)?.trim_matches([' ', '\0']);
            let digits = trimmed.split('\0').next().unwrap_or("");
            if digits.is_empty() { Ok(0) } else { i64::from_str_radix(digits, 8).map_err(|_| BAD_NUMBER) }
        }
    }
}

fn text(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|b| *b == 0).unwrap_or(field.len())]
}

/// The name as the header alone has it.
pub(super) fn name(header: &[u8; BLOCK]) -> Vec<u8> {
    let name = text(&header[..100]);
    // In the POSIX form (not GNU's older one) the field behind holds the leading part of the name.
    if &header[257..263] == b"ustar\0" && header[345] != 0 {
        [text(&header[345..500]), b"/", name].concat()
    } else {
        name.to_vec()
    }
}

/// Puts an entry together. Its size is that of the data in the archive.
pub(super) fn entry(header: &[u8; BLOCK], size: u64, overrides: Overrides) -> Result<Entry, TarError> {
    let name = overrides.path.unwrap_or_else(|| name(header));
    let kind = match header[156] {
        // Before there was a type for directories.
        0 if name.ends_with(b"/") => Kind::Directory,
        b'0' | 0 | b'7' => Kind::File,
        b'1' => Kind::HardLink,
        b'2' => Kind::Symlink,
        b'3' => Kind::CharDevice,
        b'4' => Kind::BlockDevice,
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        b'S' => Kind::SparseFile,
        _ => return Err(TarError::Damaged("it is of an unknown type")),
    };
    let narrow =
        |n: u64| u32::try_from(n).map_err(|_| TarError::Damaged("its owner or device number is too large"));
    let has_data = matches!(kind, Kind::File | Kind::SparseFile);
    let size = if has_data { overrides.size.unwrap_or(size) } else { 0 };
    // Room for the padding, and for sums in the caller.
    if size > i64::MAX as u64 / 2 {
        return Err(TarError::Damaged("it is too large"));
    }
    let (mtime, mtime_nanos) = match overrides.mtime {
        Some(mtime) => mtime,
        None => (signed(&header[136..148])?, 0),
    };
    let is_device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
    let device = |field: &[u8]| if is_device { narrow(number(field)?) } else { Ok(0) };
    Ok(Entry {
        path: clean_path(&name)?,
        link: overrides.link.unwrap_or_else(|| text(&header[157..257]).to_vec()),
        kind,
        mode: (number(&header[100..108])? & 0o7777) as u32,
        uid: narrow(overrides.uid.map_or_else(|| number(&header[108..116]), Ok)?)?,
        gid: narrow(overrides.gid.map_or_else(|| number(&header[116..124]), Ok)?)?,
        mtime,
        mtime_nanos,
        size,
        segments: Vec::new(),
        device: (device(&header[329..337])?, device(&header[337..345])?),
        xattrs: overrides.xattrs.into_iter().map(|(name, (_, value))| (name, value)).collect(),
    })
}

/// Brings a path to the form `a/b`, as seen from the archive's own root; one that leaves it is an error.
pub fn clean_path(path: &[u8]) -> Result<Vec<u8>, TarError> {
    let mut clean: Vec<u8> = Vec::with_capacity(path.len());
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(TarError::Damaged("a path contains `..`")),
            _ if part.contains(&0) => return Err(TarError::Damaged("a path contains a zero byte")),
            _ => {
                if !clean.is_empty() {
                    clean.push(b'/');
                }
                clean.extend_from_slice(part);
            }
        }
    }
    if clean.len() as u64 > NAME_MAX {
        return Err(TarError::Damaged("a path is too long"));
    }
    Ok(clean)
}
