//! The VMMs' programs: where they are, what they call their version, and whether that will do.

use crate::config::Config;
use crate::doctor::distribution::{Distribution, Need};
use banger_vmm::{Driver, firecracker};
use banger_wire::error::{ErrorCode, WireError};
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// A program that runs vms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vmm {
    Qemu,
    Firecracker,
}

impl Vmm {
    /// Returns the name its program has.
    pub(crate) fn program(self) -> String {
        match self {
            Self::Qemu => format!("qemu-system-{}", std::env::consts::ARCH),
            Self::Firecracker => "firecracker".to_owned(),
        }
    }
}

/// A VMM that can be used here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VmmProgram {
    pub(crate) driver: Driver,
    pub(crate) path: PathBuf,
    /// Its devices can be on a PCI bus.
    pub(crate) pci: bool,
}

impl VmmProgram {
    /// Finds what a driver needs.
    ///
    /// # Errors
    /// When it is not installed, or of a version the driver isn't made for.
    pub(crate) fn of(driver: Driver, config: &Config) -> anyhow::Result<Self> {
        match driver {
            Driver::Qemu => Ok(Self { driver, path: find(Vmm::Qemu, config)?, pci: true }),
            Driver::Firecracker => {
                let path = find(Vmm::Firecracker, config)?;
                let pci = firecracker_has_pci(&path, version(&said(&path, "--version")).as_deref())?;
                Ok(Self { driver, path, pci })
            }
        }
    }
}

fn firecracker_has_pci(path: &Path, version: Option<&str>) -> Result<bool, WireError> {
    let shown = path.display();
    let error = |text: String| {
        let hint = "get one that fits with `banger setup`, or name it in the config (`firecracker_bin`)";
        WireError::new(ErrorCode::Failed, text).hinted(hint)
    };
    let Some(version) = version else {
        return Err(error(format!("`{shown}` does not say its version, so it can't be used as Firecracker")));
    };
    match firecracker::unfit(numbers(version)) {
        Some(why) => Err(error(format!("`{shown}` is Firecracker {version}, {why}"))),
        None => Ok(numbers(version) >= firecracker::PCI_SINCE),
    }
}

/// Returns the directory `setup` installs programs in.
pub(crate) fn installed() -> Option<PathBuf> {
    let var = |name| std::env::var_os(name).map(PathBuf::from).filter(|path: &PathBuf| path.is_absolute());
    let base = var("XDG_DATA_HOME").or_else(|| Some(var("HOME")?.join(".local/share")))?;
    Some(base.join("banger/bin"))
}

/// Finds a VMM: where the config says, else where `setup` put it, else in `PATH`.
///
/// # Errors
/// When it is nowhere, or the config names something that is no program of the system.
pub(crate) fn find(vmm: Vmm, config: &Config) -> anyhow::Result<PathBuf> {
    let (configured, own) = match vmm {
        Vmm::Qemu => (&config.qemu_bin, None),
        Vmm::Firecracker => (&config.firecracker_bin, installed()),
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = own.into_iter().chain(std::env::split_paths(&path));
    Ok(choose(vmm, configured.as_deref(), dirs)?)
}

/// A vm's private root shows the system's directories only, and QEMU needs its files beside it. Firecracker is one file,
/// shown by itself.
fn is_usable(vmm: Vmm, path: &Path) -> bool {
    vmm == Vmm::Firecracker || ["/usr", "/bin", "/sbin"].iter().any(|dir| path.starts_with(dir))
}

fn choose(
    vmm: Vmm,
    configured: Option<&Path>,
    dirs: impl Iterator<Item = PathBuf>,
) -> Result<PathBuf, WireError> {
    let name = vmm.program();
    let error = |text| WireError::new(ErrorCode::Failed, text);
    if let Some(path) = configured {
        let key = if vmm == Vmm::Qemu { "qemu_bin" } else { "firecracker_bin" };
        let shown = path.display();
        if !path.is_absolute() || !path.is_file() {
            return Err(error(format!("`{key}` in the config is `{shown}`, which is no file"))
                .hinted("correct the config, or take the line out"));
        }
        if !is_usable(vmm, path) {
            return Err(error(format!("`{key}` in the config is `{shown}`, which vms can't see"))
                .hinted("name a program below `/usr`: a vm's processes see the system's directories only"));
        }
        return Ok(path.to_owned());
    }
    let found = { dirs }.map(|dir| dir.join(&name)).find(|path| is_usable(vmm, path) && path.is_file());
    found.ok_or_else(|| {
        let command = match vmm {
            Vmm::Qemu => Distribution::host().install(Need::Qemu),
            Vmm::Firecracker => "banger setup".to_owned(),
        };
        error(format!("`{name}` is not installed"))
            .hinted(format!("install it with `{command}`, or see `banger doctor`"))
    })
}

/// Runs a program that prints something about itself; old ones use the error stream for that.
pub(crate) fn said(program: &Path, argument: &str) -> String {
    let mut command = banger_sys::child::command(program.as_os_str());
    let output = command.arg(argument).stdin(Stdio::null()).output();
    output.map_or_else(
        |_| String::new(),
        |output| String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(),
    )
}

/// Finds the version in what a program says: the first word that begins with two numbers and a dot between them. Among
/// the words may be those of a log.
pub(crate) fn version(text: &str) -> Option<String> {
    let words = text.split_whitespace().map(|word| word.strip_prefix('v').unwrap_or(word));
    let numbers = words.filter(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    let plain = |word: &str| word.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect::<String>();
    numbers.map(plain).find(|word| word.contains('.'))
}

/// Tells whether a version is at least `least`.
pub(crate) fn is_at_least(version: &str, least: (u32, u32)) -> bool {
    numbers(version) >= least
}

/// Returns the first two numbers of a version.
pub(crate) fn numbers(version: &str) -> (u32, u32) {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::{Vmm, choose, firecracker_has_pci, is_at_least, version};
    use std::path::Path;

    #[test]
    fn the_config_comes_first_then_the_directories_in_order() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let dirs = || [one.path(), two.path()].map(Path::to_path_buf).into_iter();
        let missing = choose(Vmm::Firecracker, None, dirs()).unwrap_err();
        assert_eq!(missing.to_string(), "`firecracker` is not installed");
        assert_eq!(missing.hint.as_deref(), Some("install it with `banger setup`, or see `banger doctor`"));
        let second = two.path().join("firecracker");
        std::fs::write(&second, "").unwrap();
        assert_eq!(choose(Vmm::Firecracker, None, dirs()).unwrap(), second);
        let first = one.path().join("firecracker");
        std::fs::write(&first, "").unwrap();
        assert_eq!(choose(Vmm::Firecracker, None, dirs()).unwrap(), first);
        assert_eq!(choose(Vmm::Firecracker, Some(&second), dirs()).unwrap(), second);
    }

    #[test]
    fn a_configured_program_must_be_there_and_visible_to_vms() {
        let text = |vmm, path: &Path| choose(vmm, Some(path), std::iter::empty()).unwrap_err().to_string();
        assert_eq!(
            text(Vmm::Firecracker, Path::new("/nowhere/fc")),
            "`firecracker_bin` in the config is `/nowhere/fc`, which is no file"
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        let expected =
            format!("`qemu_bin` in the config is `{}`, which vms can't see", file.path().display());
        assert_eq!(text(Vmm::Qemu, file.path()), expected);
    }

    #[test]
    fn versions_are_found_and_compared() {
        for (text, expected, new) in [
            ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright", Some("7.2.22"), true),
            ("QEMU emulator version 10.0.0-rc1", Some("10.0.0"), true),
            ("QEMU emulator version 7.1.0", Some("7.1.0"), false),
            ("Firecracker v1.17.0\n", Some("1.17.0"), false),
            ("2026-11-25T13:10:04.334 [x:main] exiting\nFirecracker v1.17.0-dev\n\n", Some("1.17.0"), false),
            ("", None, false),
        ] {
            let found = version(text);
            assert_eq!(found.as_deref(), expected, "{text}");
            assert_eq!(found.is_some_and(|found| is_at_least(&found, (7, 2))), new, "{text}");
        }
    }

    #[test]
    fn a_firecracker_of_another_time_is_refused() {
        let has_pci = |version| firecracker_has_pci(Path::new("/opt/firecracker"), version);
        assert_eq!(has_pci(Some("1.12.1")), Ok(false));
        assert_eq!(has_pci(Some("1.13.0")), Ok(true));
        let refused = |version| {
            let error = has_pci(version).unwrap_err();
            format!("error: {error}\nhint: {}", error.hint.as_deref().unwrap_or_default())
        };
        let hint =
            "hint: get one that fits with `banger setup`, or name it in the config (`firecracker_bin`)";
        assert_eq!(
            refused(Some("1.11.0")),
            format!("error: `/opt/firecracker` is Firecracker 1.11.0, older than 1.12\n{hint}")
        );
        let newer = "newer than this banger, which knows Firecracker 1.12 to 1.x";
        assert_eq!(
            refused(Some("2.0.0")),
            format!("error: `/opt/firecracker` is Firecracker 2.0.0, {newer}\n{hint}")
        );
        let silent = "does not say its version, so it can't be used as Firecracker";
        assert_eq!(refused(None), format!("error: `/opt/firecracker` {silent}\n{hint}"));
    }
}
