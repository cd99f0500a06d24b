//! A state directory of the test's own, made of the one `BANGER_TEST_STORE` names, and the programs that use it.

use super::world::World;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The directory, for one user. Its daemon ends with it.
pub(crate) struct Store {
    home: tempfile::TempDir,
    banger: PathBuf,
    image: String,
    uid: u32,
}

impl Store {
    /// Makes it, or says why not.
    pub(crate) fn prepare(uid: u32) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("making networks needs root".to_owned());
        }
        let store = std::env::var_os("BANGER_TEST_STORE").ok_or("`BANGER_TEST_STORE` is not set")?;
        let store = Path::new(&store);
        let images = std::fs::read_dir(store.join("images")).map_err(|error| error.to_string())?;
        let names = images.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let image = names.filter(|name| !name.starts_with('.')).min_by_key(|name| !name.ends_with("-slim"));
        let image = image.ok_or("`BANGER_TEST_STORE` has no image")?;
        let banger = Path::new(env!("CARGO_BIN_EXE_bangerd")).with_file_name("banger");
        if !banger.exists() {
            return Err(format!("`{}` is not built", banger.display()));
        }
        for program in ["ip", "nft", "pasta", "qemu-system-x86_64", "tcpdump"] {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
            if !std::env::split_paths(&path).chain(system).any(|dir| dir.join(program).exists()) {
                return Err(format!("`{program}` is not installed"));
            }
        }
        let home = tempfile::Builder::new().prefix("banger-test-").tempdir().unwrap();
        let state = home.path().join("state");
        for dir in ["images", "kernels"] {
            clone(&store.join(dir), &state.join(dir), uid);
        }
        for name in ["banger.db", "banger.db-wal"] {
            if store.join(name).exists() {
                std::fs::copy(store.join(name), state.join(name)).unwrap();
                chown(state.join(name), Some(uid), Some(uid)).unwrap();
            }
        }
        for dir in [home.path(), &state] {
            std::fs::set_permissions(dir, PermissionsExt::from_mode(0o700)).unwrap();
            chown(dir, Some(uid), Some(uid)).unwrap();
        }
        Ok(Self { home, banger, image, uid })
    }

    /// Writes the owner's config.
    pub(crate) fn configure(&self, text: &str) {
        let dir = self.home.path().join(".config/banger");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("config.toml"), text).unwrap();
        for path in [&self.home.path().join(".config"), &dir, &dir.join("config.toml")] {
            chown(path, Some(self.uid), Some(self.uid)).unwrap();
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.banger);
        command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", self.home.path());
        command.env("BANGER_STATE_DIR", self.home.path().join("state")).current_dir("/");
        if self.uid != 0 {
            command.uid(self.uid).gid(self.uid);
        }
        command
    }

    /// Runs `banger` on the world's host; returns what it wrote to its two streams, and whether it ended well.
    pub(crate) fn banger(&self, world: &World, args: &[&str]) -> (String, String, bool) {
        let mut command = self.command();
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = world.on_host(move || command.spawn().unwrap());
        let output = child.wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        (text(output.stdout), text(output.stderr), output.status.success())
    }

    /// The image's name.
    pub(crate) fn image(&self) -> &str {
        &self.image
    }

    /// Runs a script in a vm of the world's host; returns what it wrote to its two streams.
    pub(crate) fn run(&self, world: &World, flags: &[&str], script: &str) -> (String, String) {
        let mut command = self.command();
        command.args(["vm", "run", "--rm", "--image", &self.image]).args(flags);
        command.args(["--", "bash", "-c", script]).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = world.on_host(move || command.spawn().unwrap());
        let output = child.wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        (text(output.stdout), text(output.stderr))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.command().args(["daemon", "stop"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}

/// Whether a file of root's can be read by this user.
fn is_readable(path: &Path, uid: u32) -> bool {
    uid == 0 || path.metadata().unwrap().permissions().mode() & 0o004 != 0
}

/// Copies a tree; files become links to the same ones where they can, for images are large and never written.
fn clone(from: &Path, to: &Path, uid: u32) {
    std::fs::create_dir_all(to).unwrap();
    std::fs::set_permissions(to, PermissionsExt::from_mode(0o700)).unwrap();
    chown(to, Some(uid), Some(uid)).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().unwrap().is_dir() {
            clone(&source, &target, uid);
        } else if !is_readable(&source, uid) || std::fs::hard_link(&source, &target).is_err() {
            std::fs::copy(&source, &target).unwrap();
            chown(&target, Some(uid), Some(uid)).unwrap();
        }
    }
}
