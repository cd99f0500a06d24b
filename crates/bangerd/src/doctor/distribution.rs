//! Which distribution this is, as far as commands for its administrator depend on it.

/// How packages are installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Distribution {
    /// Debian, Ubuntu and what is made of them.
    Apt,
    /// Fedora, RHEL and what is made of them.
    Dnf,
    /// Arch.
    Pacman,
    /// SUSE.
    Zypper,
    /// Alpine.
    Apk,
    /// Something else.
    Unknown,
}

/// A program that has to come from the distribution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    Qemu,
    Pasta,
    Nft,
}

impl Distribution {
    /// Returns that of this machine.
    pub(crate) fn host() -> Self {
        Self::parse(&os_release())
    }

    /// Reads it from `os-release`: its own name, else those of what it is made of.
    pub(crate) fn parse(text: &str) -> Self {
        let ids = [field(text, "ID"), field(text, "ID_LIKE")].into_iter().flatten().collect::<Vec<_>>();
        let mut found = ids.iter().flat_map(|ids| ids.split_whitespace()).map(|id| match id {
            "debian" | "ubuntu" => Self::Apt,
            "fedora" | "rhel" | "centos" => Self::Dnf,
            "arch" => Self::Pacman,
            "suse" | "opensuse" | "sles" => Self::Zypper,
            "alpine" => Self::Apk,
            _ => Self::Unknown,
        });
        found.find(|known| *known != Self::Unknown).unwrap_or(Self::Unknown)
    }

    /// Returns the command that installs a program here.
    pub(crate) fn install(self, need: Need) -> String {
        self.install_for(need, std::env::consts::ARCH)
    }

    fn install_for(self, need: Need, arch: &str) -> String {
        let arm = arch == "aarch64";
        let package = match (need, self) {
            (Need::Qemu, Self::Apt) if arm => "qemu-system-arm",
            (Need::Qemu, Self::Apt) => "qemu-system-x86",
            (Need::Qemu, Self::Dnf) if arm => "qemu-system-aarch64-core",
            (Need::Qemu, Self::Dnf) => "qemu-system-x86-core",
            (Need::Qemu, Self::Pacman) if arm => "qemu-system-aarch64",
            (Need::Qemu, Self::Pacman) => "qemu-system-x86",
            (Need::Qemu, Self::Zypper) if arm => "qemu-arm",
            (Need::Qemu, Self::Zypper) => "qemu-x86",
            (Need::Qemu, _) if arm => "qemu-system-aarch64",
            (Need::Qemu, _) => "qemu-system-x86_64",
            (Need::Pasta, _) => "passt",
            (Need::Nft, _) => "nftables",
        };
        let installer = match self {
            Self::Apt => "sudo apt-get install",
            Self::Dnf => "sudo dnf install",
            Self::Pacman => "sudo pacman -S",
            Self::Zypper => "sudo zypper install",
            Self::Apk => "sudo apk add",
            Self::Unknown => return format!("install {package} with this distribution's package manager"),
        };
        format!("{installer} {package}")
    }
}

/// Returns the system's own description of itself.
pub(crate) fn os_release() -> String {
    let paths = ["/etc/os-release", "/usr/lib/os-release"];
    paths.iter().find_map(|path| std::fs::read_to_string(path).ok()).unwrap_or_default()
}

/// Returns a field of `os-release`, without its quotes.
pub(crate) fn field(text: &str, name: &str) -> Option<String> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
    Some(value.trim_matches(['"', '\'']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::{Distribution, Need, field};

    #[test]
    fn distributions_and_their_relatives_are_known() {
        for (text, expected) in [
            ("ID=debian\n", Distribution::Apt),
            ("NAME=\"Linux Mint\"\nID=linuxmint\nID_LIKE=\"ubuntu debian\"\n", Distribution::Apt),
            ("ID=fedora\n", Distribution::Dnf),
            ("ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n", Distribution::Dnf),
            ("ID=manjaro\nID_LIKE=arch\n", Distribution::Pacman),
            ("ID=\"opensuse-tumbleweed\"\nID_LIKE=\"opensuse suse\"\n", Distribution::Zypper),
            ("ID=alpine\n", Distribution::Apk),
            ("ID=nixos\n", Distribution::Unknown),
            ("", Distribution::Unknown),
        ] {
            assert_eq!(Distribution::parse(text), expected, "{text}");
        }
        assert_eq!(field("PRETTY_NAME=\"Debian 12\"\n", "PRETTY_NAME").as_deref(), Some("Debian 12"));
    }

    #[test]
    fn every_distribution_has_its_commands() {
        let all = [
            Distribution::Apt,
            Distribution::Dnf,
            Distribution::Pacman,
            Distribution::Zypper,
            Distribution::Apk,
            Distribution::Unknown,
        ];
        let mut text = String::new();
        for distribution in all {
            for (need, arch) in [
                (Need::Qemu, "x86_64"),
                (Need::Qemu, "aarch64"),
                (Need::Pasta, "x86_64"),
                (Need::Nft, "x86_64"),
            ] {
                text += &format!("{}\n", distribution.install_for(need, arch));
            }
        }
        insta::assert_snapshot!(text);
    }
}
