//! The VMMs' programs: where they are, what they call their version, and whether that will do.

use crate::config::Config;
use crate::doctor::distribution::{Distribution, Need};
use banger_sys::child;
use banger_vmm::Driver;
use banger_wire::error::{ErrorCode, WireError};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// How long a program may take to say something about itself, on a busy machine too.
const SAY_TIME_MAX: Duration = Duration::from_secs(2);

/// A program that runs vms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vmm {
    Qemu,
    Firecracker,
}

impl Vmm {
    /// Returns what it is called in the store and to clients.
    pub(crate) fn name(self) -> &'static str {
        self.driver().name()
    }

    /// Reads that name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [Self::Qemu, Self::Firecracker].into_iter().find(|vmm| vmm.name() == name)
    }

    /// Returns what drives it.
    pub(crate) fn driver(self) -> Driver {
        match self {
            Self::Qemu => Driver::Qemu,
            Self::Firecracker => Driver::Firecracker,
        }
    }

    /// Returns the name its program has.
    pub(crate) fn program(self) -> String {
        match self {
            Self::Qemu => format!("qemu-system-{}", std::env::consts::ARCH),
            Self::Firecracker => "firecracker".to_owned(),
        }
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
pub(crate) fn find(vmm: Vmm, config: &Config) -> Result<PathBuf, WireError> {
    let (configured, own) = match vmm {
        Vmm::Qemu => (&config.qemu_bin, None),
        Vmm::Firecracker => (&config.firecracker_bin, installed()),
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = own.into_iter().chain(std::env::split_paths(&path));
    choose(vmm, configured.as_deref(), dirs)
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

/// Runs a program that prints something about itself; old ones use the error stream for that. One that does not end
/// says nothing.
pub(crate) fn said(program: &Path, argument: &str) -> String {
    let mut command = child::command(program.as_os_str());
    command.arg(argument);
    match child::output_within(command, SAY_TIME_MAX) {
        Ok(said) if said.status.is_some() => String::from_utf8_lossy(&said.bytes).into_owned(),
        _ => String::new(),
    }
}

/// Asks a program for its version. The answer is remembered until the program changes.
pub(crate) fn version_of(program: &Path) -> Option<String> {
    static KNOWN: Mutex<BTreeMap<PathBuf, (SystemTime, Option<String>)>> = Mutex::new(BTreeMap::new());
    let changed = std::fs::metadata(program).and_then(|metadata| metadata.modified()).ok()?;
    let known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner).get(program).cloned();
    if let Some((_, version)) = known.filter(|(time, version)| *time == changed && version.is_some()) {
        return version;
    }
    let version = version(&said(program, "--version"));
    let answer = (changed, version.clone());
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner).insert(program.to_owned(), answer);
    version
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
    use super::{Vmm, choose, is_at_least, version, version_of};
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
    fn a_program_that_changes_has_another_version() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tool");
        // By another process: what this one has open for writing, a child of another test could keep open.
        let write = |version: &str, time: &str| {
            let mut shell = banger_sys::child::command("sh".as_ref());
            let script =
                format!("printf '#!/bin/sh\\necho {version}\\n' >tool; chmod 755 tool; touch -d {time} tool");
            assert!(shell.args(["-c", &script]).current_dir(&dir).status().unwrap().success());
        };
        write("1.0", "@1");
        assert_eq!(version_of(&file).as_deref(), Some("1.0"));
        write("2.0", "@1");
        assert_eq!(version_of(&file).as_deref(), Some("1.0"), "it was not asked again");
        write("2.0", "@2");
        assert_eq!(version_of(&file).as_deref(), Some("2.0"));
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
}
