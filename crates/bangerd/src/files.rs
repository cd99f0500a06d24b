//! Large files of the owner, copied into the store.

use rustix::fs::SeekFrom;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::Path;

const BUFFER_LEN: usize = 1 << 20;

/// Copies a regular file into a new one: by sharing its blocks where the filesystem can, else with its holes.
///
/// # Errors
/// When it is no regular file, or can't be read or written. The new file may be left.
pub(crate) fn copy_sparse(from: &Path, to: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    // A fifo would hold its reader up for ever.
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let mut input = File::options().read(true).custom_flags(nonblocking).open(from)?;
    if !input.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut output = File::options().read(true).write(true).create_new(true).mode(0o600).open(to)?;
    if rustix::fs::ioctl_ficlone(&output, &input).is_ok() {
        return Ok(output);
    }
    let length = input.metadata()?.len();
    output.set_len(length)?;
    let mut buffer = vec![0; BUFFER_LEN];
    let mut at = 0;
    loop {
        let start = match rustix::fs::seek(&input, SeekFrom::Data(at)) {
            // Nothing but a hole is left.
            Err(rustix::io::Errno::NXIO) => return Ok(output),
            found => found?,
        };
        let end = rustix::fs::seek(&input, SeekFrom::Hole(start))?.min(length);
        input.seek(io::SeekFrom::Start(start))?;
        output.seek(io::SeekFrom::Start(start))?;
        let mut left = end.saturating_sub(start);
        while left > 0 {
            let wanted = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let count = input.read(&mut buffer[..wanted])?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            output.write_all(&buffer[..count])?;
            left -= count as u64;
        }
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use super::copy_sparse;
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    #[test]
    fn holes_stay_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = std::fs::File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(&[7; 3 << 20], 20 << 20).unwrap();
        let copy = copy_sparse(&from, &to).unwrap();
        assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(&to).unwrap());
        assert!(copy.metadata().unwrap().blocks() * 512 < 8 << 20);
        assert!(copy_sparse(&from, &to).is_err(), "nothing is replaced");
        assert!(copy_sparse(dir.path(), &dir.path().join("other")).is_err());
    }
}
