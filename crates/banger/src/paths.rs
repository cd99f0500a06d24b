//! Where the daemon and its files are.

use crate::stop::failed;
use banger_wire::error::{ErrorCode, WireError};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

/// Names the state directory in the config.
const STATE_DIR_KEY: &str = "state_dir";
/// Overrides the state directory.
pub(crate) const STATE_DIR_VARIABLE: &str = "BANGER_STATE_DIR";

/// Takes the one key out of the config that says where the daemon is. What else is wrong with the file, the daemon says.
fn configured(text: &str, file: &Path, home: Option<&Path>) -> Result<Option<PathBuf>, WireError> {
    let refuse = |cause: String| {
        let file = file.display();
        let mut error = WireError::new(ErrorCode::Invalid, format!("the config `{file}` can't be used"));
        error.causes.push(cause);
        error.hinted(format!("correct that line of `{file}`, or take it out"))
    };
    let table = match toml::from_str::<toml::Table>(text) {
        Ok(table) => table,
        // Going on elsewhere would show an owner none of their vms.
        Err(error) if text.contains(STATE_DIR_KEY) => return Err(refuse(error.message().to_owned())),
        Err(_) => return Ok(None),
    };
    let Some(value) = table.get(STATE_DIR_KEY) else { return Ok(None) };
    let path = match (value.as_str(), home) {
        (Some(text), Some(home)) if text.starts_with("~/") => Some(home.join(&text[2..])),
        (Some(text), _) => Some(PathBuf::from(text)),
        _ => None,
    };
    path.filter(|path| path.is_absolute()).map(Some).ok_or_else(|| {
        refuse(format!(
            "`{STATE_DIR_KEY}` can't be {value}: it is an absolute path, or one that begins with `~/`"
        ))
    })
}

/// The owner's state directory.
#[derive(Debug, Clone)]
pub(crate) struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// Returns the directory the environment names; nothing is created.
    ///
    /// # Errors
    /// When the environment names none.
    pub(crate) fn from_environment() -> Result<Self, WireError> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(path) = variable(STATE_DIR_VARIABLE) {
            let path = std::path::absolute(&path)
                .map_err(|error| failed(format!("could not resolve `{}`", path.display()), &error))?;
            return Ok(Self { path });
        }
        // The XDG specification asks to ignore relative paths.
        let absolute = |path: &PathBuf| path.is_absolute();
        let home = variable("HOME").filter(absolute);
        let config = variable("XDG_CONFIG_HOME").filter(absolute);
        if let Some(config) = config.or_else(|| Some(home.as_ref()?.join(".config"))) {
            let file = config.join("banger/config.toml");
            // One that can't be read is told by the daemon, which needs all of it.
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            if let Some(path) = configured(&text, &file, home.as_deref())? {
                return Ok(Self { path });
            }
        }
        if let Some(base) = variable("XDG_STATE_HOME").filter(absolute) {
            return Ok(Self { path: base.join("banger") });
        }
        match home {
            Some(home) => Ok(Self { path: home.join(".local/state/banger") }),
            None => Err(WireError::new(ErrorCode::Failed, "no state directory: `HOME` is not set")
                .hinted(format!("set `HOME` or `{STATE_DIR_VARIABLE}`"))),
        }
    }

    /// Returns a directory of this name.
    #[cfg(test)]
    pub(crate) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Returns the directory itself.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the directory of the daemon's socket.
    pub(crate) fn run(&self) -> PathBuf {
        self.path.join("run")
    }

    /// Returns the directory of what was placed in vms.
    pub(crate) fn workspaces(&self) -> PathBuf {
        self.path.join("workspaces")
    }

    /// Returns the daemon's log.
    pub(crate) fn log(&self) -> PathBuf {
        self.path.join("bangerd.log")
    }

    /// Makes the directory, for its owner alone.
    ///
    /// # Errors
    /// When it can't be made, or belongs to somebody else.
    pub(crate) fn ensure(&self) -> Result<(), WireError> {
        let shown = self.path.display();
        let error = |error: std::io::Error| failed(format!("could not make `{shown}`"), &error);
        if let Some(parent) = self.path.parent() {
            std::fs::create_dir_all(parent).map_err(error)?;
        }
        match std::fs::DirBuilder::new().mode(0o700).create(&self.path) {
            Err(found) if found.kind() == std::io::ErrorKind::AlreadyExists => {}
            made => made.map_err(error)?,
        }
        let owner = std::fs::metadata(&self.path).map_err(error)?.uid();
        if owner != rustix::process::getuid().as_raw() {
            return Err(WireError::new(
                ErrorCode::Failed,
                format!("`{shown}` belongs to uid {owner}, not to you"),
            )
            .hinted(format!("choose another directory with `{STATE_DIR_VARIABLE}`")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::configured;
    use std::path::{Path, PathBuf};

    #[test]
    fn the_config_may_say_where_the_state_is() {
        let of = |text: &str| configured(text, Path::new("/c"), Some(Path::new("/home/me")));
        assert_eq!(of("vmm = 'xen'\n[vm_defaults]\nstate_dir = 'x'\n").unwrap(), None);
        assert_eq!(
            of("state_dir = '/srv/banger'\nnonsense = 1").unwrap(),
            Some(PathBuf::from("/srv/banger"))
        );
        assert_eq!(of("state_dir = '~/b'").unwrap(), Some(PathBuf::from("/home/me/b")));
        assert_eq!(of("vmm =").unwrap(), None, "the daemon says what is wrong with it");
        for bad in ["state_dir = 'b'", "state_dir = 5", "state_dir = '/a'\nvmm ="] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }
}
