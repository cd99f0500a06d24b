//! Where things are.

use crate::config;
use anyhow::{Context as _, bail};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// The owner's directories.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    pub(crate) state: PathBuf,
    pub(crate) cache: PathBuf,
}

impl Paths {
    /// Finds them from the environment and makes them, readable by their owner alone.
    ///
    /// # Errors
    /// When there is no home, or the state directory belongs to somebody else or is open to others.
    pub(crate) fn open() -> anyhow::Result<Self> {
        let missing = "neither `HOME` nor `BANGER_STATE_DIR` is set";
        let state = match var("BANGER_STATE_DIR") {
            Some(dir) => dir,
            None => config::state_dir()?.or_else(default_state).context(missing)?,
        };
        let cache = under("XDG_CACHE_HOME", ".cache").map(|dir| dir.join("banger")).context(missing)?;
        let paths = Self { state, cache };
        for dir in [&paths.state, &paths.cache] {
            private_dir(dir)?;
        }
        for dir in
            ["run", "vms", "images", "kernels", "archive", "templates", "workspaces", "caches", "networks"]
        {
            private_dir(&paths.state.join(dir))?;
        }
        Ok(paths)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.state.join("run/bangerd.sock")
    }

    pub(crate) fn vm(&self, id: &str) -> PathBuf {
        self.state.join("vms").join(id)
    }

    pub(crate) fn workspace(&self, id: &str) -> PathBuf {
        self.state.join("workspaces").join(id)
    }

    pub(crate) fn image(&self, name: &str) -> PathBuf {
        self.state.join("images").join(name)
    }

    pub(crate) fn caches(&self) -> PathBuf {
        self.state.join("caches")
    }

    pub(crate) fn networks(&self) -> PathBuf {
        self.state.join("networks")
    }

    pub(crate) fn templates(&self) -> PathBuf {
        self.state.join("templates")
    }

    pub(crate) fn kernel(&self, name: &str) -> PathBuf {
        self.state.join("kernels").join(name)
    }
}

fn var(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn under(xdg: &str, home: &str) -> Option<PathBuf> {
    var(xdg).filter(|path| path.is_absolute()).or_else(|| Some(var("HOME")?.join(home)))
}

/// The state directory when nobody names one.
pub(crate) fn default_state() -> Option<PathBuf> {
    under("XDG_STATE_HOME", ".local/state").map(|dir| dir.join("banger"))
}

fn private_dir(dir: &Path) -> anyhow::Result<()> {
    let shown = dir.display();
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("make directory `{shown}`"))?;
    let metadata = std::fs::symlink_metadata(dir).with_context(|| format!("look at `{shown}`"))?;
    if !metadata.is_dir() || metadata.uid() != rustix::process::getuid().as_raw() {
        bail!("`{shown}` is not a directory of yours");
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        bail!("`{shown}` is open to other users; close it with `chmod 700 {shown}`");
    }
    Ok(())
}
