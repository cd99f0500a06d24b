//! banger itself, built and with a store of its own.

use anyhow::{Context as _, bail};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// How it is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// As tests are.
    Dev,
    /// As it is used.
    Release,
}

/// The programs.
#[derive(Debug)]
pub(crate) struct Built {
    dir: PathBuf,
}

/// A state directory; its daemon ends with it.
#[derive(Debug)]
pub(crate) struct Store {
    state: PathBuf,
    banger: PathBuf,
    dir: tempfile::TempDir,
}

impl Built {
    /// Builds them.
    pub(crate) fn new(profile: Profile) -> anyhow::Result<Self> {
        let mut command = Command::new("cargo");
        command.args(["build", "--quiet", "--package", "banger", "--package", "bangerd"]);
        if profile == Profile::Release {
            command.arg("--release");
        }
        if !command.status().context("start cargo")?.success() {
            bail!("banger could not be built");
        }
        let metadata =
            Command::new("cargo").args(["metadata", "--format-version=1", "--no-deps"]).output()?;
        let metadata: serde_json::Value = serde_json::from_slice(&metadata.stdout)?;
        let target = metadata["target_directory"].as_str().context("no target directory")?;
        let name = if profile == Profile::Release { "release" } else { "debug" };
        Ok(Self { dir: Path::new(target).join(name) })
    }

    /// Makes a store and pulls images into it.
    pub(crate) fn store(&self, images: &[&str]) -> anyhow::Result<Store> {
        let dir = tempfile::Builder::new().prefix("banger-store-").tempdir()?;
        // Made by banger itself, and so closed to other users.
        let store = Store { state: dir.path().join("state"), banger: self.dir.join("banger"), dir };
        for image in images {
            store.ok(&["image", "pull", image])?;
        }
        // What it has in memory is on the disk then, for whoever copies the directory.
        store.ok(&["daemon", "stop"])?;
        Ok(store)
    }

    /// Makes a store of what another one has, whose daemon does not run.
    pub(crate) fn store_like(&self, other: &Path) -> anyhow::Result<Store> {
        let dir = tempfile::Builder::new().prefix("banger-store-").tempdir()?;
        let state = dir.path().join("state");
        let copied = Command::new("cp").args(["-a", "--reflink=auto"]).args([other, &state]).status()?;
        if !copied.success() {
            bail!("`{}` could not be copied", other.display());
        }
        Ok(Store { state, banger: self.dir.join("banger"), dir })
    }
}

impl Store {
    /// Returns the state directory.
    pub(crate) fn path(&self) -> &Path {
        &self.state
    }

    /// Writes the config that `banger` has on this store.
    pub(crate) fn configure(&self, text: &str) -> anyhow::Result<()> {
        let dir = self.dir.path().join("banger");
        std::fs::create_dir_all(&dir)?;
        Ok(std::fs::write(dir.join("config.toml"), text)?)
    }

    /// Returns `banger` with arguments, on this store.
    pub(crate) fn banger(&self, args: &[&str]) -> Command {
        let mut command = self.program(&self.banger);
        command.args(args);
        command
    }

    /// Returns a program for which `banger` is on this store.
    pub(crate) fn program(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env("BANGER_STATE_DIR", self.path()).env("XDG_CONFIG_HOME", self.dir.path());
        command
    }

    /// Runs `banger`, which has to succeed.
    pub(crate) fn ok(&self, args: &[&str]) -> anyhow::Result<Output> {
        let output =
            self.banger(args).output().with_context(|| format!("start {}", self.banger.display()))?;
        if !output.status.success() {
            bail!("banger {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        Ok(output)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // Nothing goes on in a directory that goes.
        let _ = self.banger(&["daemon", "stop", "--all"]).output();
    }
}
