//! A file or stdin on its way to the daemon.
//!
//! It is read on a thread, which is never joined: a read from a terminal or a pipe ends when it pleases, and the process
//! ends without it.

use crate::stop::failed;
use crate::text::escape;
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::frame::DATA_LEN_MAX;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use tokio::sync::mpsc;

/// Pieces read ahead of what the daemon takes.
const READ_AHEAD: usize = 2;

/// An archive that was opened.
#[derive(Debug)]
pub(crate) struct Archive {
    file: File,
    /// What it is called in messages.
    pub(crate) label: String,
    /// Its length, unless it is a pipe.
    pub(crate) size: Option<u64>,
}

impl Archive {
    /// Opens a file, or stdin for `-`.
    ///
    /// # Errors
    /// When it can't be opened, is a directory, or is a terminal.
    pub(crate) fn open(path: &Path) -> Result<Self, WireError> {
        if path == Path::new("-") {
            let stdin = rustix::stdio::stdin();
            if rustix::termios::isatty(stdin) {
                return Err(WireError::new(ErrorCode::Invalid, "stdin is a terminal, not an archive")
                    .hinted("name a file with `-i FILE`, or pipe one: `docker save X | banger image load`"));
            }
            let file = stdin.try_clone_to_owned().map_err(|error| failed("could not read stdin", &error))?;
            return Self::new(file.into(), "stdin".to_owned());
        }
        let label = escape(&path.display().to_string());
        let file = File::open(path).map_err(|error| failed(format!("could not open `{label}`"), &error))?;
        Self::new(file, label)
    }

    fn new(file: File, label: String) -> Result<Self, WireError> {
        let meta = file.metadata().map_err(|error| failed(format!("could not read `{label}`"), &error))?;
        if meta.is_dir() {
            return Err(WireError::new(
                ErrorCode::Invalid,
                format!("`{label}` is a directory, not an archive"),
            )
            .hinted(format!("pull an OCI layout with `banger image pull oci:{label}`")));
        }
        Ok(Self { file, size: meta.is_file().then_some(meta.len()), label })
    }

    /// Starts to read. The channel ends with the file; an error is the last.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(crate) fn start(mut self) -> Result<mpsc::Receiver<std::io::Result<Vec<u8>>>, WireError> {
        let (sender, pieces) = mpsc::channel(READ_AHEAD);
        let read = move || {
            let mut piece = vec![0; DATA_LEN_MAX];
            loop {
                let read = match self.file.read(&mut piece) {
                    Ok(0) => return,
                    Ok(len) => Ok(piece[..len].to_vec()),
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    // Another program that shares the description may have made it non-blocking.
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                        let mut polled = [rustix::event::PollFd::from_borrowed_fd(
                            self.file.as_fd(),
                            rustix::event::PollFlags::IN,
                        )];
                        let _ = rustix::event::poll(&mut polled, None);
                        continue;
                    }
                    Err(error) => Err(error),
                };
                let ended = read.is_err();
                if sender.blocking_send(read).is_err() || ended {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("archive".to_owned()).spawn(read);
        thread.map_err(|error| failed("could not start a thread", &error))?;
        Ok(pieces)
    }
}

/// Where an image without a registry is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Local {
    /// A reference for the daemon, made absolute.
    Layout(String),
    /// An archive, and which of its images.
    Archive(PathBuf, Option<String>),
}

/// Tells whether a reference is of a file or directory, and which.
///
/// # Errors
/// When the current directory is gone.
pub(crate) fn local(text: &str) -> Result<Option<Local>, WireError> {
    if let Some(rest) = text.strip_prefix("oci:") {
        // A tag stays at the end of it.
        let path = std::path::absolute(rest);
        let path = path.map_err(|error| failed(format!("could not find `{}`", escape(rest)), &error))?;
        return Ok(Some(Local::Layout(format!("oci:{}", path.display()))));
    }
    let archive = ["docker-archive:", "oci-archive:"].iter().find_map(|prefix| text.strip_prefix(prefix));
    Ok(archive.map(|rest| {
        // A name may have colons and so may a path: the longest that is there is the file.
        let cuts = rest.char_indices().filter(|(_, c)| *c == ':').map(|(at, _)| at);
        let is_file = |at: &usize| Path::new(&rest[..*at]).exists();
        match cuts.rev().find(is_file) {
            Some(at) if !Path::new(rest).exists() => {
                Local::Archive(rest[..at].into(), Some(rest[at + 1..].to_owned()))
            }
            _ => Local::Archive(rest.into(), None),
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::{Local, local};

    #[test]
    fn references_of_files_are_told_from_those_of_registries() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a:b.tar");
        std::fs::write(&file, "").unwrap();
        let shown = file.display();
        let archive = |name: Option<&str>| Some(Local::Archive(file.clone(), name.map(str::to_owned)));
        assert_eq!(local(&format!("docker-archive:{shown}")).unwrap(), archive(None));
        let named = format!("oci-archive:{shown}:localhost:5000/x:1");
        assert_eq!(local(&named).unwrap(), archive(Some("localhost:5000/x:1")));
        assert_eq!(local("oci:/a:b").unwrap(), Some(Local::Layout("oci:/a:b".to_owned())));
        let Some(Local::Layout(relative)) = local("oci:a/./b:t").unwrap() else { panic!("no layout") };
        assert!(relative.starts_with("oci:/") && relative.ends_with("/a/b:t"), "{relative}");
        assert_eq!(local("debian:12").unwrap(), None);
    }
}
