//! The one thing in a file of the user's: lines at the top of `~/.ssh/config` that include ours, put there and taken
//! out when asked.
//!
//! Everything else in the file stays byte for byte. A link is followed, so that a file kept elsewhere stays there.

use super::DOMAIN;
use super::keys::{dir_of, replace};
use super::options::quoted;
use crate::paths::StateDir;
use crate::stop::failed;
use banger_wire::error::{ErrorCode, WireError};
use std::fs::{DirBuilder, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

const BEGIN: &str = "# >>> banger >>>";
const END: &str = "# <<< banger <<<\n";
/// Follows `BEGIN` where there was no such file, and where there was no directory for it either.
const MADE_FILE: &str = " (there was no such file)";
const MADE_ALL: &str = " (there was no such directory)";

/// Returns the text of our file. A name with a quote is no vm's: it would end the one that keeps the name a single word for
/// the shell, and OpenSSH refuses such names since 9.6 only, whoever made them up.
pub(super) fn render(options: &[(&'static str, String)]) -> String {
    let lines: String = options.iter().map(|(name, value)| format!("    {name} {value}\n")).collect();
    format!(
        "# banger's vms; `banger ssh-config --uninstall` removes this file and what includes it.\n\
         Host *{DOMAIN} \"!*'*\"\n{lines}    User root\n"
    )
}

/// Returns where our file is.
pub(super) fn our_file(state: &StateDir) -> PathBuf {
    dir_of(state).join("config")
}

/// Has `~/.ssh/config` include our file; returns the file that was changed.
///
/// # Errors
/// When one of the files can't be read or written.
pub(super) fn install(home: &Path, state: &StateDir, text: &str) -> Result<PathBuf, WireError> {
    replace(&our_file(state), text.as_bytes())?;
    let dir = home.join(".ssh");
    let file = find(&dir.join("config"))?;
    let before = read(&file)?;
    let mut made = "";
    if before.is_none() {
        made = MADE_FILE;
        match DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => made = MADE_ALL,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(format!("could not make `{}`", dir.display()), &error)),
        }
    }
    let before = before.unwrap_or_default();
    let (was, rest) = take_out(&before, &file)?;
    let made = was.unwrap_or(made);
    let after = [block(made, state)?.as_bytes(), &rest].concat();
    if after != before {
        write(&file, &after)?;
    }
    Ok(file)
}

/// Returns our lines; `made` is what the first one says besides.
///
/// # Errors
/// When our file's path can't be written there.
pub(super) fn block(made: &str, state: &StateDir) -> Result<String, WireError> {
    Ok(format!("{BEGIN}{made}\nInclude {}\n{END}", quoted(&our_file(state))?))
}

/// Takes out what [`install`] put in; returns the file that was changed, if any was.
///
/// # Errors
/// When one of the files can't be read or written.
pub(super) fn uninstall(home: &Path, state: &StateDir) -> Result<Option<PathBuf>, WireError> {
    let dir = home.join(".ssh");
    let file = find(&dir.join("config"))?;
    let before = read(&file)?.unwrap_or_default();
    let (made, rest) = take_out(&before, &file)?;
    if let Some(made) = made {
        if made.is_empty() || !rest.is_empty() {
            write(&file, &rest)?;
        } else {
            std::fs::remove_file(&file)
                .map_err(|error| failed(format!("could not remove `{}`", file.display()), &error))?;
            if made == MADE_ALL {
                // Stays when something else is in it by now.
                let _ = std::fs::remove_dir(&dir);
            }
        }
    }
    match std::fs::remove_file(our_file(state)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed(format!("could not remove `{}`", our_file(state).display()), &error));
        }
        _ => {}
    }
    Ok(made.map(|_| file))
}

/// Follows links; a file that is not there is where it would be.
///
/// # Errors
/// When a link leads to nothing.
pub(super) fn find(file: &Path) -> Result<PathBuf, WireError> {
    match std::fs::canonicalize(file) {
        Ok(real) => Ok(real),
        Err(_) if !file.is_symlink() => Ok(file.to_path_buf()),
        Err(error) => Err(failed(format!("`{}` is a link to nothing", file.display()), &error)),
    }
}

/// Returns what is in a file; none when it is not there.
///
/// # Errors
/// When it can't be read.
pub(super) fn read(file: &Path) -> Result<Option<Vec<u8>>, WireError> {
    match std::fs::read(file) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(format!("could not read `{}`", file.display()), &error)),
    }
}

/// Returns what our first line says besides, where there is one, and everything that is not ours.
///
/// # Errors
/// When our last line is missing.
pub(super) fn take_out(bytes: &[u8], file: &Path) -> Result<(Option<&'static str>, Vec<u8>), WireError> {
    let is_line = |at: usize| at == 0 || bytes[at - 1] == b'\n';
    let find = |what: &str, from: usize| {
        let what = what.as_bytes();
        (from..bytes.len()).find(|&at| is_line(at) && bytes[at..].starts_with(what))
    };
    let Some(begin) = find(BEGIN, 0) else { return Ok((None, bytes.to_vec())) };
    let marker = &bytes[begin + BEGIN.len()..];
    let made = [MADE_FILE, MADE_ALL].into_iter().find(|made| marker.starts_with(made.as_bytes()));
    let end = find(END, begin).map(|end| end + END.len());
    // A last line of the file need not have an end.
    let end = end.or_else(|| bytes.ends_with(END.trim_end().as_bytes()).then_some(bytes.len()));
    let end = end.ok_or_else(|| {
        let message = format!("`{}` has banger's first line `{BEGIN}` and not its last", file.display());
        WireError::new(ErrorCode::Failed, message).hinted("take banger's lines out by hand")
    })?;
    Ok((Some(made.unwrap_or("")), [&bytes[..begin], &bytes[end..]].concat()))
}

/// Replaces a file by rename, with the rights the old one has.
fn write(file: &Path, bytes: &[u8]) -> Result<(), WireError> {
    let dir = file.parent().unwrap_or(Path::new("/"));
    let write = || -> io::Result<()> {
        let mut new = tempfile::Builder::new().prefix(".banger-").tempfile_in(dir)?;
        if let Ok(old) = std::fs::metadata(file) {
            new.as_file().set_permissions(Permissions::from_mode(old.mode() & 0o7777))?;
        }
        new.write_all(bytes)?;
        new.as_file().sync_all()?;
        new.persist(file)?;
        Ok(())
    };
    write().map_err(|error| failed(format!("could not write `{}`", file.display()), &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Home {
        dir: tempfile::TempDir,
        state: StateDir,
    }

    impl Home {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let state = StateDir::at(&dir.path().join("state dir"));
            std::fs::create_dir_all(dir_of(&state)).unwrap();
            Self { dir, state }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn install(&self) -> Result<PathBuf, WireError> {
            install(self.dir.path(), &self.state, "Host *.vm\n")
        }

        fn uninstall(&self) -> Result<Option<PathBuf>, WireError> {
            uninstall(self.dir.path(), &self.state)
        }

        fn included(&self) -> String {
            format!("Include \"{}\"\n", our_file(&self.state).display())
        }
    }

    #[test]
    fn our_file_is_of_names_without_quotes() {
        let text =
            render(&[("ProxyCommand", "banger vm ssh-proxy '%h'".to_owned()), ("Port", "22".to_owned())]);
        insta::assert_snapshot!(text, @r#"
        # banger's vms; `banger ssh-config --uninstall` removes this file and what includes it.
        Host *.vm "!*'*"
            ProxyCommand banger vm ssh-proxy '%h'
            Port 22
            User root
        "#);
    }

    #[test]
    fn what_was_there_stays_and_comes_back_byte_for_byte() {
        for before in [
            &b"Host *\n  User me\n"[..],
            b"",
            b"no line end",
            b"\xff\xfe latin\r\n\n\n",
            b"\n# <<< banger <<<\n",
        ] {
            let home = Home::new();
            std::fs::create_dir(home.path(".ssh")).unwrap();
            let file = home.path(".ssh/config");
            std::fs::write(&file, before).unwrap();
            std::fs::set_permissions(&file, Permissions::from_mode(0o640)).unwrap();
            for _ in 0..2 {
                home.install().unwrap();
                let now = std::fs::read(&file).unwrap();
                let block = format!("{BEGIN}\n{}{END}", home.included());
                assert_eq!(now, [block.as_bytes(), before].concat());
            }
            assert_eq!(std::fs::read(our_file(&home.state)).unwrap(), b"Host *.vm\n");
            assert!(home.uninstall().unwrap().is_some());
            assert_eq!(std::fs::read(&file).unwrap(), before);
            assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o7777, 0o640);
            assert!(!our_file(&home.state).exists());
            assert_eq!(home.uninstall().unwrap(), None);
        }
    }

    #[test]
    fn what_was_not_there_goes_again() {
        let home = Home::new();
        home.install().unwrap();
        home.install().unwrap();
        let mode = |name: &str| std::fs::metadata(home.path(name)).unwrap().mode() & 0o777;
        assert_eq!((mode(".ssh"), mode(".ssh/config")), (0o700, 0o600));
        home.uninstall().unwrap();
        assert!(!home.path(".ssh").exists());
        // The directory was there, and something was added to the file meanwhile.
        std::fs::create_dir(home.path(".ssh")).unwrap();
        home.install().unwrap();
        home.uninstall().unwrap();
        assert!(home.path(".ssh").exists() && !home.path(".ssh/config").exists());
        home.install().unwrap();
        let mut text = std::fs::read_to_string(home.path(".ssh/config")).unwrap();
        text.push_str("Host mine\n");
        std::fs::write(home.path(".ssh/config"), text).unwrap();
        home.uninstall().unwrap();
        assert_eq!(std::fs::read_to_string(home.path(".ssh/config")).unwrap(), "Host mine\n");
    }

    #[test]
    fn a_link_stays_one_and_what_is_broken_is_not_touched() {
        let home = Home::new();
        std::fs::create_dir(home.path(".ssh")).unwrap();
        std::fs::write(home.path("dotfile"), "Host a\n").unwrap();
        let file = home.path(".ssh/config");
        std::os::unix::fs::symlink("../dotfile", &file).unwrap();
        home.install().unwrap();
        assert!(file.is_symlink());
        assert!(std::fs::read_to_string(home.path("dotfile")).unwrap().starts_with(BEGIN));
        home.uninstall().unwrap();
        assert!(file.is_symlink());
        assert_eq!(std::fs::read_to_string(home.path("dotfile")).unwrap(), "Host a\n");
        let broken = format!("{BEGIN}\nInclude x\n");
        std::fs::write(home.path("dotfile"), &broken).unwrap();
        let error = home.install().unwrap_err().message;
        assert!(error.contains("and not its last") && home.uninstall().is_err(), "{error}");
        assert_eq!(std::fs::read_to_string(home.path("dotfile")).unwrap(), broken);
        std::fs::remove_file(home.path("dotfile")).unwrap();
        assert!(home.install().unwrap_err().message.contains("is a link to nothing"));
    }
}
