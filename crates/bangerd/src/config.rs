//! `config.toml`: what the owner decided once. Read whenever it is needed, so a change needs no restart.

pub(crate) mod keys;
mod show;

use crate::cache::settle_places;
use crate::loopback::LoopbackRange;
use anyhow::Context as _;
use banger_image::oci::{HostConfig, Limits};
use banger_wire::daemon::{CacheMount, ConfigView, NetMode, VmmChoice};
use banger_wire::error::WireError;
use banger_wire::size::Mebibytes;
use banger_wire::time::{AutoStop, parse_duration};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Everything that can be set; all of it optional. A key that is not here is a mistake and an error; [`keys`] has them
/// all once more, with what each takes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// How much the daemon's log tells.
    pub(crate) log_level: Option<String>,
    /// Where the state directory is. Read on its own, by [`state_dir`].
    pub(crate) state_dir: Option<PathBuf>,
    /// What vms are, unless they are asked to be something else.
    #[serde(default)]
    pub(crate) vm_defaults: VmDefaults,
    /// How long a boot may take until the guest's agent speaks.
    #[serde(default, deserialize_with = "duration")]
    pub(crate) boot_timeout: Option<Duration>,
    /// How long vms run without a session.
    #[serde(default, deserialize_with = "text")]
    pub(crate) auto_stop_after: Option<AutoStop>,
    /// Files that every vm gets at each start.
    #[serde(default)]
    pub(crate) file_sync: Vec<FileSync>,
    /// Filesystems that every vm has, and that outlive it.
    #[serde(default)]
    pub(crate) cache: Vec<CacheMount>,
    /// Whether vms get the proxy variables of who makes them.
    #[serde(default)]
    pub(crate) pass_proxy: bool,
    /// A file of certificates (PEM) that programs in vms are to trust.
    pub(crate) ca_file: Option<PathBuf>,
    /// Debian's mirror where the host has no apt sources of its own: one address, or two (main and security).
    pub(crate) debian_mirror: Option<String>,
    /// The image of vms that name none.
    pub(crate) default_image: Option<String>,
    /// Whether emulated vms go on from a saved machine instead of booting; they do by default.
    pub(crate) restore: Option<bool>,
    /// Where names of vms are answered: an address and port of the loopback, or `off`.
    pub(crate) dns_listen: Option<String>,
    /// Where on the loopback vms have their addresses.
    #[serde(default, deserialize_with = "text")]
    pub(crate) loopback_cidr: Option<LoopbackRange>,
    /// The private key that the client comes in with by ssh, instead of banger's own. Read by the client.
    pub(crate) ssh_key_path: Option<PathBuf>,
    /// What each drive of a vm may read and write in a second, such as `100M`.
    #[serde(default, deserialize_with = "size")]
    pub(crate) disk_rate: Option<Mebibytes>,
    /// What a vm may send in a second, and receive.
    #[serde(default, deserialize_with = "size")]
    pub(crate) net_rate: Option<Mebibytes>,
    /// What runs vms that name nothing.
    pub(crate) vmm: Option<VmmChoice>,
    /// Registries by host, with the port where one is named.
    #[serde(default)]
    pub(crate) registry: BTreeMap<String, Registry>,
    /// How much an image may be.
    #[serde(default)]
    pub(crate) limits: ImageLimits,
    /// Firecracker's program, instead of the one that is found.
    pub(crate) firecracker_bin: Option<PathBuf>,
    /// QEMU's program, instead of the one that is found.
    pub(crate) qemu_bin: Option<PathBuf>,
    /// What `setup` fetches.
    #[serde(default)]
    pub(crate) firecracker: FirecrackerRelease,
}

/// What vms are, where it shall not be what is built in.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VmDefaults {
    /// Virtual processors.
    pub(crate) vcpu: Option<u32>,
    /// Memory.
    #[serde(default, deserialize_with = "size")]
    pub(crate) memory: Option<Mebibytes>,
    /// Limit of the disk.
    #[serde(default, deserialize_with = "size")]
    pub(crate) disk_size: Option<Mebibytes>,
    /// What they may reach.
    pub(crate) net: Option<NetMode>,
}

/// A file or directory that vms get at each start.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileSync {
    /// On the host: absolute, or below `~/`.
    pub(crate) host: String,
    /// In the guest: absolute, or below `~/`; the same as on the host when absent.
    pub(crate) guest: Option<String>,
    /// Permission bits of files, in octal; the host's when absent.
    pub(crate) mode: Option<String>,
}

/// A release of Firecracker, where it shall not be the one that is built in.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FirecrackerRelease {
    /// Such as `1.17.0`.
    pub(crate) version: Option<String>,
    /// Digest of its archive for this machine's architecture.
    pub(crate) sha256: Option<String>,
    /// Where releases are, laid out as the project's own.
    pub(crate) url: Option<String>,
}

/// How much an image may be, where it shall not be what is built in.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ImageLimits {
    /// What all layers may unpack to, such as `512G`.
    #[serde(default, deserialize_with = "size")]
    unpacked: Option<Mebibytes>,
    /// Entries of all layers.
    entries: Option<u64>,
    /// How many times its compressed size a layer may unpack to.
    ratio: Option<u64>,
    /// Layers.
    layers: Option<usize>,
}

/// How a registry is reached.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Registry {
    /// Hosts that are asked first.
    #[serde(default)]
    mirror: Mirrors,
    /// Plain http.
    #[serde(default)]
    insecure: bool,
    /// A file of certificates (PEM) that are trusted besides the public ones.
    ca_file: Option<PathBuf>,
}

/// One host, or several in order.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
enum Mirrors {
    One(String),
    Several(Vec<String>),
}

impl Default for Mirrors {
    fn default() -> Self {
        Self::Several(Vec::new())
    }
}

impl Config {
    /// Reads the owner's file; none is an empty one.
    ///
    /// # Errors
    /// When it can't be read, is no TOML, or has a key that means nothing. The text names file, line and key.
    pub(crate) fn load() -> anyhow::Result<Self> {
        let Some(path) = path() else { return Ok(Self::default()) };
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            read => read.with_context(|| format!("read the config `{}`", path.display()))?,
        };
        Ok(Self::parse(&text, &path)?)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, WireError> {
        let shown = path.display().to_string();
        keys::look_through(text, keys::CONFIG, WHAT, &shown)?;
        let mut config: Self =
            toml::from_str(text).map_err(|error| keys::no_toml(text, &error, WHAT, &shown))?;
        settle_places(&mut config.cache);
        for path in [&mut config.firecracker_bin, &mut config.qemu_bin, &mut config.ca_file]
            .into_iter()
            .chain(config.registry.values_mut().map(|registry| &mut registry.ca_file))
            .flatten()
        {
            *path = below_home(path);
        }
        Ok(config)
    }

    /// Returns every value in force and where it comes from, as far as the file and this process's environment say.
    ///
    /// # Errors
    /// Those of [`Self::load`].
    pub(crate) fn show() -> anyhow::Result<ConfigView> {
        let path = path();
        let text = path.as_ref().and_then(|path| std::fs::read_to_string(path).ok());
        // The file may have what is a mistake only once it is understood.
        Self::load()?;
        let shown = path.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
        let found = keys::look_through(text.as_deref().unwrap_or_default(), keys::CONFIG, WHAT, &shown)?;
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        Ok(show::show(path.as_deref(), text.is_some(), &found, variable))
    }

    /// Returns the bounds on images.
    pub(crate) fn limits(&self) -> Limits {
        let default = Limits::default();
        Limits {
            unpacked_bytes: self.limits.unpacked.map_or(default.unpacked_bytes, Mebibytes::bytes),
            entries: self.limits.entries.unwrap_or(default.entries),
            ratio: self.limits.ratio.unwrap_or(default.ratio),
            layers: self.limits.layers.unwrap_or(default.layers),
            ..default
        }
    }

    /// Returns the registries as the registry client takes them.
    pub(crate) fn hosts(&self) -> BTreeMap<String, HostConfig> {
        let host = |registry: &Registry| HostConfig {
            mirrors: match &registry.mirror {
                Mirrors::One(mirror) => vec![mirror.clone()],
                Mirrors::Several(mirrors) => mirrors.clone(),
            },
            plain_http: registry.insecure,
            ca_file: registry.ca_file.clone(),
        };
        self.registry.iter().map(|(name, registry)| (name.clone(), host(registry))).collect()
    }
}

/// What the file is called in messages.
const WHAT: &str = "the config";

/// Returns where the owner wants the state directory, whatever else is wrong with the file. The client finds it in the
/// same way.
///
/// # Errors
/// When the file names one, and can't be understood so far.
pub(crate) fn state_dir() -> anyhow::Result<Option<PathBuf>> {
    let Some(path) = path() else { return Ok(None) };
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(None) };
    let shown = path.display().to_string();
    let table = match toml::from_str::<toml::Table>(&text) {
        Ok(table) => table,
        Err(error) if text.contains("state_dir") => {
            return Err(keys::no_toml(&text, &error, WHAT, &shown).into());
        }
        Err(_) => return Ok(None),
    };
    let named = table.get("state_dir").and_then(toml::Value::as_str).map(|text| below_home(Path::new(text)));
    Ok(named.filter(|path| path.is_absolute()))
}

/// The owner's home.
pub(crate) fn home() -> Option<PathBuf> {
    std::env::var_os("HOME").map(PathBuf::from).filter(|path| path.is_absolute())
}

/// Returns what a path means that may begin with `~`.
pub(crate) fn below_home(path: &Path) -> PathBuf {
    match (path.strip_prefix("~"), home()) {
        (Ok(below), Some(home)) => home.join(below),
        _ => path.to_owned(),
    }
}

/// Anything that has a text form.
fn text<'de, D: serde::Deserializer<'de>, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    String::deserialize(deserializer)?.parse().map(Some).map_err(serde::de::Error::custom)
}

/// A span of time as text.
fn duration<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    parse_duration(&String::deserialize(deserializer)?).map(Some).map_err(serde::de::Error::custom)
}

/// A size as text, or as a number of MiB.
fn size<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Mebibytes>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Size {
        Number(u64),
        Text(String),
    }
    match Size::deserialize(deserializer)? {
        Size::Number(number) => Ok(Some(Mebibytes(number))),
        Size::Text(text) => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

/// Where the owner's file is, or would be.
pub(crate) fn path() -> Option<PathBuf> {
    let var = |name| std::env::var_os(name).map(PathBuf::from).filter(|path: &PathBuf| path.is_absolute());
    let base = var("XDG_CONFIG_HOME").or_else(|| Some(var("HOME")?.join(".config")))?;
    Some(base.join("banger/config.toml"))
}

#[cfg(test)]
mod tests {
    use super::{AutoStop, Config, Mebibytes, NetMode, VmmChoice};
    use std::path::Path;
    use std::time::Duration;

    #[test]
    fn everything_is_optional_and_read() {
        let path = Path::new("/config.toml");
        assert_eq!(Config::parse("", path).unwrap(), Config::default());
        let text = "debian_mirror = 'http://mirror.example/debian'\ndefault_image = 'debian-bookworm-slim'\n\
                    [registry.'registry.example:5000']\nmirror = 'cache.example'\ninsecure = true\n\
                    [registry.'docker.io']\nmirror = ['a.example', 'b.example']\nca_file = '/etc/ca.pem'\n";
        let config = Config::parse(text, path).unwrap();
        assert_eq!(config.debian_mirror.as_deref(), Some("http://mirror.example/debian"));
        let hosts = config.hosts();
        assert!(hosts["registry.example:5000"].plain_http);
        assert_eq!(hosts["registry.example:5000"].mirrors, ["cache.example"]);
        assert_eq!(hosts["docker.io"].mirrors, ["a.example", "b.example"]);
    }

    #[test]
    fn programs_and_releases_can_be_named() {
        let text = "qemu_bin = '/usr/libexec/qemu-kvm'\nfirecracker_bin = '/opt/firecracker'\n\
                    [firecracker]\nversion = '1.16.2'\nsha256 = 'ab'\nurl = 'http://mirror.example/fc'\n";
        let text = format!("vmm = 'firecracker'\n{text}");
        let config = Config::parse(&text, Path::new("/config.toml")).unwrap();
        assert_eq!(config.vmm, Some(VmmChoice::Firecracker));
        assert_eq!(config.qemu_bin.as_deref(), Some(Path::new("/usr/libexec/qemu-kvm")));
        assert_eq!(config.firecracker_bin.as_deref(), Some(Path::new("/opt/firecracker")));
        assert_eq!(config.firecracker.version.as_deref(), Some("1.16.2"));
        assert_eq!(config.firecracker.url.as_deref(), Some("http://mirror.example/fc"));
    }

    #[test]
    fn rates_can_be_set() {
        let config = Config::parse("disk_rate = '100M'\nnet_rate = 10\n", Path::new("/config.toml")).unwrap();
        assert_eq!((config.disk_rate, config.net_rate), (Some(Mebibytes(100)), Some(Mebibytes(10))));
        assert!(Config::parse("net_rate = '10K'\n", Path::new("/config.toml")).is_err());
    }

    #[test]
    fn limits_can_be_set() {
        let text = "[limits]\nunpacked = '2G'\nentries = 5\nratio = 6\nlayers = 7\n";
        let limits = Config::parse(text, Path::new("/config.toml")).unwrap().limits();
        assert_eq!((limits.unpacked_bytes, limits.entries, limits.ratio, limits.layers), (2 << 30, 5, 6, 7));
        let default = banger_image::oci::Limits::default();
        assert_eq!(Config::default().limits(), default);
    }

    #[test]
    fn what_vms_are_can_be_set() {
        let text = "auto_stop_after = '30m'\nboot_timeout = '5m'\nca_file = '/ca.pem'\npass_proxy = true\n[vm_defaults]\nvcpu = 2\n\
                    memory = '2G'\ndisk_size = 4096\nnet = 'none'\n[[file_sync]]\nhost = '~/.gitconfig'\n\
                    mode = '600'\n[[cache]]\nname = 'cargo'\npath = '/root/.cargo'\n";
        let config = Config::parse(text, Path::new("/config.toml")).unwrap();
        assert_eq!(config.auto_stop_after, Some(AutoStop::AfterMs(1_800_000)));
        assert_eq!(config.boot_timeout, Some(Duration::from_secs(300)));
        assert_eq!(config.vm_defaults.memory.map(|size| size.0), Some(2048));
        assert_eq!((config.vm_defaults.vcpu, config.vm_defaults.net), (Some(2), Some(NetMode::None)));
        assert_eq!(config.file_sync[0].mode.as_deref(), Some("600"));
        assert_eq!(config.cache[0].path, "/root/.cargo");
        assert!(config.pass_proxy && config.ca_file.is_some());
    }

    #[test]
    fn every_field_is_among_the_keys() {
        for (table, prefix) in [
            ("", ""),
            ("[vm_defaults]\n", "vm_defaults."),
            ("[limits]\n", "limits."),
            ("[firecracker]\n", "firecracker."),
            ("[registry.r]\n", "registry.*."),
            ("[[file_sync]]\n", "file_sync[]."),
            ("[[cache]]\n", "cache[]."),
        ] {
            // Serde names them all when it is given another one.
            let error = toml::from_str::<Config>(&format!("{table}another = 1\n")).unwrap_err();
            let (_, fields) = error.message().split_once("expected ").unwrap();
            let fields: Vec<&str> = fields.split('`').skip(1).step_by(2).collect();
            assert!(!fields.is_empty(), "{error}");
            for field in fields {
                let name = format!("{prefix}{field}");
                let is_known = |key: &super::keys::Key| {
                    key.name
                        .strip_prefix(&name)
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
                };
                assert!(super::keys::CONFIG.iter().any(is_known), "`{name}` is in no list of keys");
            }
        }
    }

    #[test]
    fn what_lacks_something_is_named_with_its_line() {
        let error = Config::parse("\n[[file_sync]]\nmode = '600'\n", Path::new("/c")).unwrap_err();
        assert_eq!(error.causes, ["line 2: missing field `host`"]);
    }
}
