//! Keys of ssh, in the state directory: the client's, which lets the owner in, and what the host keys are made of. The
//! client's may be another one of the owner's (`ssh_key_path` in the config).
//!
//! A vm's host key follows from a secret and the vm's id, so no vm has a file of it, none is left when a vm goes, and no
//! two vms share one. A guest is told its own and learns nothing of another's.

use super::{DOMAIN, command, no_program};
use crate::paths::StateDir;
use crate::stop::failed;
use banger_wire::bytes::ByteString;
use banger_wire::daemon::VmView;
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::ssh::{KEY_LEN, SshSpec};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::hmac;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use rustix::fs::{FlockOperation, flock};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// What the fields of an Ed25519 public key begin with: its kind, and its length.
pub(super) const PUBLIC_PREFIX: &[u8] = b"\0\0\0\x0bssh-ed25519\0\0\0\x20";
/// What host keys are made of, besides the secret and the vm's id.
const HOST_KEY_PURPOSE: &str = "banger ssh host key 1 ";
/// Beginning of the names of unfinished files.
const UNFINISHED: &str = ".new-";

/// Everything that ssh needs to know about this owner's vms.
#[derive(Debug)]
pub(super) struct Keys {
    dir: PathBuf,
    secret: Vec<u8>,
    client: Vec<u8>,
    /// The owner's own, instead of the one in `dir`.
    chosen: Option<PathBuf>,
}

impl Keys {
    /// Reads the keys; makes banger's own when there are none. `chosen` is the client's private key, where it is to be
    /// another one.
    ///
    /// # Errors
    /// When they can't be read or made, or the chosen one can't be used.
    pub(super) fn ensure(state: &StateDir, chosen: Option<PathBuf>) -> Result<Self, WireError> {
        state.ensure()?;
        let dir = dir_of(state);
        let shown = dir.display().to_string();
        let error = |error: io::Error| failed(format!("could not make ssh's keys in `{shown}`"), &error);
        match DirBuilder::new().mode(0o700).create(&dir) {
            Err(found) if found.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.map_err(error)?,
        }
        let mut keys = Self::named(state, chosen);
        if !(keys.secret_file().exists() && (keys.chosen.is_some() || keys.client_key().exists())) {
            let _lock = lock(&keys.dir)?;
            keys.make()?;
        }
        keys.secret = std::fs::read(keys.secret_file()).map_err(error)?;
        let unusable = || {
            WireError::new(ErrorCode::Failed, format!("ssh's keys in `{shown}` can't be used"))
                .hinted(format!("remove that directory; new ones are made then: `rm -r {shown}`"))
        };
        if keys.secret.len() != KEY_LEN {
            return Err(unusable());
        }
        keys.client = match &keys.chosen {
            Some(chosen) => read_chosen(chosen)?,
            None => {
                let public = std::fs::read_to_string(keys.public_file()).map_err(error)?;
                parse_public(&public).ok_or_else(unusable)?
            }
        };
        Ok(keys)
    }

    /// Returns the keys by the names of their files, for settings; none is read or made.
    pub(super) fn named(state: &StateDir, chosen: Option<PathBuf>) -> Self {
        Self { dir: dir_of(state), secret: Vec::new(), client: Vec::new(), chosen }
    }

    /// Makes what is missing; the lock is held. Each file is whole when it has its name.
    fn make(&self) -> Result<(), WireError> {
        let error = |error: io::Error| {
            failed(format!("could not make ssh's keys in `{}`", self.dir.display()), &error)
        };
        // CRASH: an unfinished directory is removed by whoever makes keys next.
        for entry in std::fs::read_dir(&self.dir).map_err(error)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                std::fs::remove_dir_all(entry.path()).map_err(error)?;
            }
        }
        let unfinished = tempfile::Builder::new().prefix(UNFINISHED).tempdir_in(&self.dir).map_err(error)?;
        if !self.secret_file().exists() {
            let mut secret = [0; KEY_LEN];
            rustix::rand::getrandom(&mut secret, rustix::rand::GetRandomFlags::empty())
                .map_err(|errno| error(errno.into()))?;
            let file = unfinished.path().join("secret");
            write_private(&file, &secret)
                .and_then(|()| std::fs::rename(&file, self.secret_file()))
                .map_err(error)?;
        }
        if self.chosen.is_none() && !self.client_key().exists() {
            let file = unfinished.path().join("key");
            let mut keygen = command(Path::new("ssh-keygen"));
            keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", "banger", "-f"]).arg(&file);
            let made = keygen.output().map_err(|error| no_program("ssh-keygen", &error))?;
            if !made.status.success() {
                let said = String::from_utf8_lossy(&made.stderr).trim().to_owned();
                return Err(error(io::Error::other(said)));
            }
            let public = unfinished.path().join("key.pub");
            // The private one says that both are there.
            std::fs::rename(public, self.public_file()).map_err(error)?;
            std::fs::rename(file, self.client_key()).map_err(error)?;
        }
        Ok(())
    }

    /// Returns the client's private key.
    pub(super) fn client_key(&self) -> PathBuf {
        self.chosen.clone().unwrap_or_else(|| self.dir.join("id_ed25519"))
    }

    /// Returns the file of known hosts.
    pub(super) fn known_hosts(&self) -> PathBuf {
        self.dir.join("known_hosts")
    }

    fn public_file(&self) -> PathBuf {
        self.dir.join("id_ed25519.pub")
    }

    fn secret_file(&self) -> PathBuf {
        self.dir.join("host_secret")
    }

    fn host_seed(&self, vm: &str) -> Vec<u8> {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.secret);
        hmac::sign(&key, format!("{HOST_KEY_PURPOSE}{vm}").as_bytes()).as_ref().to_vec()
    }

    fn host_key(&self, vm: &str) -> Result<Ed25519KeyPair, WireError> {
        Ed25519KeyPair::from_seed_unchecked(&self.host_seed(vm)).map_err(|_| {
            WireError::new(ErrorCode::Failed, format!("could not make the host key of vm `{vm}`"))
        })
    }

    /// Returns what the guest has to know of the vm of this id.
    ///
    /// # Errors
    /// When the key can't be made.
    pub(super) fn spec(&self, vm: &str) -> Result<SshSpec, WireError> {
        self.host_key(vm)?;
        Ok(SshSpec { host_key: ByteString(self.host_seed(vm)), client_key: ByteString(self.client.clone()) })
    }

    /// Writes down the host keys of these vms and no others.
    ///
    /// # Errors
    /// When the file can't be written.
    pub(super) fn write_known_hosts(&self, vms: &[VmView]) -> Result<(), WireError> {
        let mut text = String::new();
        for vm in vms {
            let key = self.host_key(vm.id.as_str())?;
            let blob = STANDARD.encode([PUBLIC_PREFIX, key.public_key().as_ref()].concat());
            text.push_str(&format!("{}{DOMAIN},{}{DOMAIN} ssh-ed25519 {blob}\n", vm.name, vm.id));
        }
        replace(&self.known_hosts(), text.as_bytes())
    }
}

/// Keeps others from changing the files in ssh's directory, until it is dropped.
///
/// # Errors
/// When it can't be taken.
pub(super) fn lock(dir: &Path) -> Result<File, WireError> {
    let path = dir.join("lock");
    let mut options = OpenOptions::new();
    options.write(true).create(true).mode(0o600);
    let lock = options.open(&path).and_then(|file| {
        flock(&file, FlockOperation::LockExclusive)?;
        Ok(file)
    });
    lock.map_err(|error| failed(format!("could not lock `{}`", path.display()), &error))
}

/// Returns the directory of ssh's files.
pub(super) fn dir_of(state: &StateDir) -> PathBuf {
    state.path().join("ssh")
}

/// Takes the key out of a public key file; none when it is of another kind.
fn parse_public(text: &str) -> Option<Vec<u8>> {
    let mut words = text.split(' ');
    let blob =
        (words.next()? == "ssh-ed25519").then(|| STANDARD.decode(words.next()?.trim()).ok()).flatten()?;
    blob.strip_prefix(PUBLIC_PREFIX).filter(|key| key.len() == KEY_LEN).map(<[u8]>::to_vec)
}

/// Looks whether a key of the owner's own can be used.
///
/// # Errors
/// When it can't.
pub(super) fn check_chosen(private: &Path) -> Result<(), WireError> {
    read_chosen(private).map(|_| ())
}

/// Returns the public half of a key of the owner's own, which has to be next to it.
fn read_chosen(private: &Path) -> Result<Vec<u8>, WireError> {
    let shown = private.display();
    let refuse = |cause: String, hint: String| {
        let mut error =
            WireError::new(ErrorCode::Invalid, format!("`ssh_key_path`, `{shown}`, can't be used"));
        error.causes.push(cause);
        error.hinted(hint)
    };
    let other = "name another one in the config, or take `ssh_key_path` out: `banger config path`";
    let metadata = std::fs::metadata(private).map_err(|error| refuse(error.to_string(), other.to_owned()))?;
    if !metadata.is_file() {
        return Err(refuse("it is not a file".to_owned(), other.to_owned()));
    }
    // `ssh` leaves out a key that others can read, and says so only among much else.
    if metadata.mode() & 0o077 != 0 && metadata.uid() == rustix::process::getuid().as_raw() {
        let cause = format!("others may use it: its mode is {:o}", metadata.mode() & 0o777);
        return Err(refuse(cause, format!("make it yours alone: `chmod 600 {shown}`")));
    }
    let mut public = private.as_os_str().to_owned();
    public.push(".pub");
    let public = PathBuf::from(public);
    let text = read_short(&public).map_err(|error| {
        let hint = format!("make it with `ssh-keygen -y -f {shown} > {}`", public.display());
        refuse(format!("its public half, `{}`: {error}", public.display()), hint)
    })?;
    parse_public(&text).ok_or_else(|| {
        let kind = text.split_whitespace().next().unwrap_or_default().escape_debug().to_string();
        let cause = match kind.as_str() {
            "ssh-ed25519" | "" => format!("`{}` has no public key", public.display()),
            kind => format!("it is a key of the kind `{kind}`, and vms let in `ssh-ed25519` only"),
        };
        refuse(cause, "make one with `ssh-keygen -t ed25519`, or take `ssh_key_path` out".to_owned())
    })
}

/// Longest file of a public key: one line, with a comment.
const PUBLIC_LEN_MAX: u64 = 16 * 1024;

fn read_short(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(PUBLIC_LEN_MAX).read_to_string(&mut text)?;
    Ok(text)
}

fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Replaces a file of ours unless it says the same already.
///
/// # Errors
/// When it can't be written.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<(), WireError> {
    if std::fs::read(path).is_ok_and(|now| now == bytes) {
        return Ok(());
    }
    let dir = path.parent().unwrap_or(Path::new("/"));
    let write = || -> io::Result<()> {
        // Readable by the owner alone.
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        file.write_all(bytes)?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(|error| failed(format!("could not write `{}`", path.display()), &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vm_has_a_host_key_of_its_own_and_keeps_it() {
        let keys = |secret: u8| Keys {
            dir: "/x".into(),
            secret: vec![secret; KEY_LEN],
            client: vec![1; KEY_LEN],
            chosen: None,
        };
        let spec = |secret: u8, vm: &str| keys(secret).spec(vm).unwrap().host_key;
        assert_eq!(spec(1, "a"), spec(1, "a"));
        assert_ne!(spec(1, "a"), spec(1, "b"));
        assert_ne!(spec(1, "a"), spec(2, "a"));
    }

    #[test]
    fn only_one_kind_of_key_is_read() {
        let key = STANDARD.encode([PUBLIC_PREFIX, &[9; KEY_LEN]].concat());
        assert_eq!(parse_public(&format!("ssh-ed25519 {key} banger\n")), Some(vec![9; KEY_LEN]));
        assert_eq!(parse_public(&format!("ssh-ed25519 {key}\n")), Some(vec![9; KEY_LEN]));
        for bad in ["", "ssh-rsa AAAA", "ssh-ed25519", "ssh-ed25519 !", "ssh-ed25519 AAAA"] {
            assert_eq!(parse_public(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_key_of_the_owners_own_has_to_be_one_that_works() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::at(&dir.path().join("state"));
        let key = dir.path().join("key");
        let refused = || {
            let error = Keys::ensure(&state, Some(key.clone())).unwrap_err();
            let text =
                format!("{}\n{}\nhint: {}", error.message, error.causes.join("\n"), error.hint.unwrap());
            text.replace(dir.path().to_str().unwrap(), "[DIR]")
        };
        insta::assert_snapshot!(refused(), @r"
        `ssh_key_path`, `[DIR]/key`, can't be used
        No such file or directory (os error 2)
        hint: name another one in the config, or take `ssh_key_path` out: `banger config path`
        ");
        write_private(&key, b"private").unwrap();
        insta::assert_snapshot!(refused(), @r"
        `ssh_key_path`, `[DIR]/key`, can't be used
        its public half, `[DIR]/key.pub`: No such file or directory (os error 2)
        hint: make it with `ssh-keygen -y -f [DIR]/key > [DIR]/key.pub`
        ");
        let public = dir.path().join("key.pub");
        std::fs::write(&public, "ssh-rsa AAAA me@here\n").unwrap();
        insta::assert_snapshot!(refused(), @r"
        `ssh_key_path`, `[DIR]/key`, can't be used
        it is a key of the kind `ssh-rsa`, and vms let in `ssh-ed25519` only
        hint: make one with `ssh-keygen -t ed25519`, or take `ssh_key_path` out
        ");
        std::fs::write(&public, "ssh-ed25519 AAAA\n").unwrap();
        insta::assert_snapshot!(refused(), @r"
        `ssh_key_path`, `[DIR]/key`, can't be used
        `[DIR]/key.pub` has no public key
        hint: make one with `ssh-keygen -t ed25519`, or take `ssh_key_path` out
        ");
        let blob = STANDARD.encode([PUBLIC_PREFIX, &[9; KEY_LEN]].concat());
        std::fs::write(&public, format!("ssh-ed25519 {blob} me@here\n")).unwrap();
        let keys = Keys::ensure(&state, Some(key.clone())).unwrap();
        assert_eq!((keys.client_key(), keys.client), (key.clone(), vec![9; KEY_LEN]));
        assert!(!dir.path().join("state/ssh/id_ed25519").exists(), "banger's own was not needed");
        std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        insta::assert_snapshot!(refused(), @r"
        `ssh_key_path`, `[DIR]/key`, can't be used
        others may use it: its mode is 644
        hint: make it yours alone: `chmod 600 [DIR]/key`
        ");
    }
}
