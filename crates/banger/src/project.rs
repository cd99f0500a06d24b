//! What a checkout says about the vm it wants, as far as it gets from here to the daemon, which understands it.

use crate::stop::{failed, invalid};
use crate::text::escape;
use banger_wire::daemon::ProjectFile;
use banger_wire::error::WireError;
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

/// Reads the file at the top of a checkout; none when there is none.
///
/// # Errors
/// When it is a link or no plain file, is too long or no text, or can't be read.
pub(crate) fn read(top: &Path) -> Result<Option<ProjectFile>, WireError> {
    let path = top.join(ProjectFile::NAME);
    let shown = escape(&path.display().to_string());
    let hint = "`--no-project-config` leaves the file aside";
    let refuse = |why: &str| invalid(format!("the checkout's own `{shown}` {why}")).hinted(hint);
    // Whoever wrote the checkout chose what is there.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(&path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(rustix::io::Errno::LOOP) => return Err(refuse("is a link, which is not followed")),
        Err(error) => {
            return Err(
                failed(format!("could not read `{shown}`"), &std::io::Error::from(error)).hinted(hint)
            );
        }
    };
    let failed = |error: std::io::Error| failed(format!("could not read `{shown}`"), &error).hinted(hint);
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(refuse("is not a plain file"));
    }
    let mut bytes = Vec::new();
    file.take(ProjectFile::LEN_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > ProjectFile::LEN_MAX {
        return Err(refuse(&format!("has more than {} KiB", ProjectFile::LEN_MAX / 1024)));
    }
    let text = String::from_utf8(bytes).map_err(|_| refuse("is not text in UTF-8"))?;
    Ok(Some(ProjectFile { path: path.display().to_string(), text }))
}

#[cfg(test)]
mod tests {
    use super::read;

    #[test]
    fn only_a_short_plain_text_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".banger.toml");
        assert_eq!(read(dir.path()).unwrap(), None);
        std::fs::write(&path, "image = 'a'").unwrap();
        assert_eq!(read(dir.path()).unwrap().unwrap().text, "image = 'a'");
        let mut said = String::new();
        let mut refused = || {
            let error = read(dir.path()).unwrap_err();
            said.push_str(&error.message.replace(dir.path().to_str().unwrap(), "DIR"));
            said.push('\n');
        };
        std::fs::write(&path, vec![b' '; 16 * 1024 + 1]).unwrap();
        refused();
        std::fs::write(&path, [0xff]).unwrap();
        refused();
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        refused();
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        refused();
        std::fs::remove_dir(&path).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        refused();
        insta::assert_snapshot!(said, @r"
        the checkout's own `DIR/.banger.toml` has more than 16 KiB
        the checkout's own `DIR/.banger.toml` is not text in UTF-8
        the checkout's own `DIR/.banger.toml` is a link, which is not followed
        the checkout's own `DIR/.banger.toml` is not a plain file
        the checkout's own `DIR/.banger.toml` is not a plain file
        ");
    }
}
