//! Where the daemon and its files are.

use crate::stop::failed;
use banger_wire::error::{ErrorCode, WireError};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

/// Overrides the state directory.
pub(crate) const STATE_DIR_VARIABLE: &str = "BANGER_STATE_DIR";

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
        if let Some(base) = variable("XDG_STATE_HOME").filter(absolute) {
            return Ok(Self { path: base.join("banger") });
        }
        match variable("HOME").filter(absolute) {
            Some(home) => Ok(Self { path: home.join(".local/state/banger") }),
            None => Err(WireError::new(ErrorCode::Failed, "no state directory: `HOME` is not set")
                .hinted(format!("set `HOME` or `{STATE_DIR_VARIABLE}`"))),
        }
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
