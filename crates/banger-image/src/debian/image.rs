//! Debian images, built from packages on the spot.
//!
//! ```text
//! plan                 names of a recipe -> packages with everything they need
//! write_unconfigured   packages -> file tree as after `dpkg --unpack`, plus the few files of our own
//! (in a vm)            configure_script() runs as root; the vm's root is that tree's filesystem, writable
//! ```
//!
//! Package scripts are code, so they run in a vm and nowhere else. The filesystem the vm leaves is the image: nothing
//! is exported, and the host does not parse what the guest wrote.

use std::collections::BTreeMap;
use std::io::{self, Cursor, Read};
use std::path::PathBuf;

use super::archive::{Archive, ArchiveConfig, ArchiveError, Bases, RELEASE};
use super::index::{Index, Package};
use super::resolve::{ResolveError, resolve};
use super::tree::{Attributes, Special, Tree};
use super::unpack::{EXCLUDES, UnpackError, unpack};
use crate::partial::hex;
use crate::progress::{Progress, Sink};
use sha2::{Digest, Sha256};
use thiserror::Error;

/// What both images have.
const COMMON: [&str; 24] = [
    // The package manager, and `/usr` merged without the perl program that would merge it.
    "apt",
    "usr-is-merged",
    // A system that boots without a failed unit.
    "systemd",
    "systemd-sysv",
    "dbus",
    "udev",
    "kmod",
    "mount",
    "passwd",
    "procps",
    "libpam-systemd",
    "openssh-server",
    "openssh-client",
    // What one types first.
    "git",
    "curl",
    "ca-certificates",
    "jq",
    "tmux",
    "iproute2",
    "less",
    "sudo",
    "xz-utils",
    "zstd",
    "netbase",
];
/// What the full image has besides.
const FULL: [&str; 6] = ["docker.io", "iptables", "iputils-ping", "rsync", "tzdata", "vim-tiny"];

/// The unit that makes a vm's ssh host keys at its first boot: no two vms share them.
const SSH_KEYS_UNIT: &str = "\
[Unit]
Description=Make the ssh host keys of this machine
Before=ssh.service
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key

[Service]
Type=oneshot
RemainAfterExit=yes
# RSA keys take seconds to make and no client of today needs one.
ExecStart=/usr/bin/ssh-keygen -q -t ed25519 -N \"\" -f /etc/ssh/ssh_host_ed25519_key
";
const SSH_KEYS_NAME: &str = "ssh-host-keys.service";

/// An image that can be built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recipe {
    /// Name in the catalog.
    pub name: &'static str,
    lists: &'static [&'static [&'static str]],
}

/// All recipes; the first is the default image.
pub const RECIPES: [Recipe; 2] = [
    Recipe { name: "debian-bookworm", lists: &[&COMMON, &FULL] },
    Recipe { name: "debian-bookworm-slim", lists: &[&COMMON] },
];

/// An image could not be built.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The archive could not be used.
    #[error("could not get packages from the Debian archive")]
    Archive(#[from] ArchiveError),
    /// The packages don't fit together.
    #[error("could not choose the packages")]
    Resolve(#[from] ResolveError),
    /// The packages can't be unpacked.
    #[error("could not unpack the packages")]
    Unpack(#[from] UnpackError),
    /// A file of our own can't be written.
    #[error("could not write `/{path}`")]
    Write {
        /// The path.
        path: String,
        /// Why not.
        source: io::Error,
    },
}

/// Everything needed to make an image's file tree, on this machine.
#[derive(Debug)]
pub struct PackageSet {
    /// The packages, sorted by name.
    pub packages: Vec<Package>,
    /// Their files, in the same order.
    pub debs: Vec<PathBuf>,
    bases: Bases,
}

/// Finds a recipe by its catalog name.
pub fn recipe(name: &str) -> Option<Recipe> {
    RECIPES.into_iter().find(|recipe| recipe.name == name)
}

/// Returns the packages of a recipe with everything they need.
pub fn plan(index: &Index, recipe: &Recipe) -> Result<Vec<Package>, ResolveError> {
    let mut wanted = index.essential();
    wanted.extend(recipe.lists.iter().copied().flatten());
    resolve(index, &wanted)
}

impl PackageSet {
    /// Verifies the archive, chooses the packages of a recipe and downloads them.
    pub async fn fetch(config: &ArchiveConfig, recipe: &Recipe, sink: Sink<'_>) -> Result<Self, ImageError> {
        let archive = Archive::open(config)?;
        let (index, bases) = archive.load(sink).await?;
        let packages = plan(&index, recipe)?;
        sink(Progress::Step { label: format!("fetch {} packages", packages.len()) });
        let debs = archive.fetch(&packages, sink).await?;
        Ok(Self { packages, debs, bases })
    }

    /// Returns a digest of the set: the same digest makes the same tree.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for package in &self.packages {
            hash.update(format!("{} {} {}\n", package.name, package.version, package.sha256));
        }
        hash.update(format!("{}\n{}\n", self.bases.main, self.bases.security));
        hex(hash.finalize())
    }

    /// Writes the tree of unpacked, not yet configured packages.
    pub fn write_unconfigured(&self, tree: &mut dyn Tree, sink: Sink<'_>) -> Result<(), ImageError> {
        sink(Progress::Step { label: format!("unpack {} packages", self.packages.len()) });
        let mut tree = KeepCertificates { inner: tree, found: BTreeMap::new() };
        let mtime = unpack(&self.packages, &self.debs, &mut tree, sink)?;
        let certificates = std::mem::take(&mut tree.found);
        let mut files = OwnFiles { tree: tree.inner, mtime };
        files.settings(&self.bases)?;
        files.certificates(&certificates)
    }
}

/// Returns the script that configures the packages, to be run by `/bin/sh` as root in a vm.
pub fn configure_script() -> &'static str {
    include_str!("configure.sh")
}

/// apt sources for the guest: the mirrors this host uses.
fn apt_sources(bases: &Bases) -> String {
    let stanza = |uri: &str, suites: &str| {
        format!(
            "Types: deb\nURIs: {uri}\nSuites: {suites}\nComponents: main\n\
             Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        )
    };
    let main = stanza(&bases.main, &format!("{RELEASE} {RELEASE}-updates"));
    let security = stanza(&bases.security, &format!("{RELEASE}-security"));
    format!("{main}\n{security}")
}

/// Writes what no package has.
struct OwnFiles<'a> {
    tree: &'a mut dyn Tree,
    mtime: i64,
}

impl OwnFiles<'_> {
    fn settings(&mut self, bases: &Bases) -> Result<(), ImageError> {
        self.file("etc/apt/sources.list.d/debian.sources", &apt_sources(bases))?;
        self.file(
            "etc/apt/apt.conf.d/90banger",
            "Acquire::Languages \"none\";\nAPT::Install-Recommends \"false\";\n",
        )?;
        self.file("etc/dpkg/dpkg.cfg.d/banger", EXCLUDES)?;
        self.file("etc/fstab", "# Mounted by the agent before the system starts.\n")?;
        self.file("etc/hosts", "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n")?;
        self.file("etc/machine-id", "")?;
        self.file("etc/default/locale", "LANG=C.UTF-8\n")?;
        self.file(&format!("etc/systemd/system/{SSH_KEYS_NAME}"), SSH_KEYS_UNIT)?;
        self.directory("etc/systemd/system/ssh.service.wants")?;
        self.symlink(
            &format!("etc/systemd/system/ssh.service.wants/{SSH_KEYS_NAME}"),
            &format!("../{SSH_KEYS_NAME}"),
        )
    }

    /// Does what `update-ca-certificates` would do with some thousand processes, except for the links by hash.
    fn certificates(&mut self, found: &BTreeMap<Vec<u8>, Vec<u8>>) -> Result<(), ImageError> {
        if found.is_empty() {
            return Ok(());
        }
        let (mut list, mut bundle) = (String::new(), Vec::new());
        for (path, certificate) in found {
            let name = String::from_utf8_lossy(path);
            list.push_str(&format!("{name}\n"));
            bundle.extend_from_slice(certificate);
            if !certificate.ends_with(b"\n") {
                bundle.push(b'\n');
            }
            let stem = name.rsplit('/').next().unwrap_or("").trim_end_matches(".crt");
            let link: String = stem
                .chars()
                .map(|c| match c {
                    ' ' | ',' => '_',
                    '(' | ')' => '=',
                    c => c,
                })
                .collect();
            self.symlink(&format!("etc/ssl/certs/{link}.pem"), &format!("/{CERTIFICATES}{name}"))?;
        }
        self.file("etc/ca-certificates.conf", &list)?;
        self.bytes("etc/ssl/certs/ca-certificates.crt", &bundle)
    }

    fn attributes(&self, mode: u32) -> Attributes {
        Attributes { mode, uid: 0, gid: 0, mtime: self.mtime }
    }

    fn file(&mut self, path: &str, text: &str) -> Result<(), ImageError> {
        self.bytes(path, text.as_bytes())
    }

    fn bytes(&mut self, path: &str, data: &[u8]) -> Result<(), ImageError> {
        let attributes = self.attributes(0o644);
        let result = self.tree.file(path.as_bytes(), &attributes, data.len() as u64, &mut Cursor::new(data));
        result.map_err(|source| ImageError::Write { path: path.to_owned(), source })
    }

    fn directory(&mut self, path: &str) -> Result<(), ImageError> {
        let result = self.tree.directory(path.as_bytes(), &self.attributes(0o755));
        result.map_err(|source| ImageError::Write { path: path.to_owned(), source })
    }

    fn symlink(&mut self, path: &str, target: &str) -> Result<(), ImageError> {
        let attributes = self.attributes(0o777);
        let result = self.tree.symlink(path.as_bytes(), target.as_bytes(), &attributes);
        result.map_err(|source| ImageError::Write { path: path.to_owned(), source })
    }
}

/// Where ca-certificates has its certificates.
const CERTIFICATES: &str = "usr/share/ca-certificates/";
/// Certificates larger than this are not; a hundred times a real one.
const CERTIFICATE_MAX: u64 = 256 << 10;

/// Passes everything on and keeps a copy of the certificates.
struct KeepCertificates<'a> {
    inner: &'a mut dyn Tree,
    found: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Tree for KeepCertificates<'_> {
    fn directory(&mut self, path: &[u8], attributes: &Attributes) -> io::Result<()> {
        self.inner.directory(path, attributes)
    }

    fn file(
        &mut self,
        path: &[u8],
        attributes: &Attributes,
        size: u64,
        data: &mut dyn Read,
    ) -> io::Result<()> {
        let name = path.strip_prefix(CERTIFICATES.as_bytes()).filter(|name| name.ends_with(b".crt"));
        let Some(name) = name.filter(|_| size <= CERTIFICATE_MAX) else {
            return self.inner.file(path, attributes, size, data);
        };
        let mut copy = Vec::new();
        data.read_to_end(&mut copy)?;
        self.inner.file(path, attributes, size, &mut Cursor::new(&copy))?;
        self.found.insert(name.to_vec(), copy);
        Ok(())
    }

    fn symlink(&mut self, path: &[u8], target: &[u8], attributes: &Attributes) -> io::Result<()> {
        self.inner.symlink(path, target, attributes)
    }

    fn hard_link(&mut self, path: &[u8], existing: &[u8]) -> io::Result<()> {
        self.inner.hard_link(path, existing)
    }

    fn special(&mut self, path: &[u8], special: Special, attributes: &Attributes) -> io::Result<()> {
        self.inner.special(path, special, attributes)
    }
}
