//! KVM as far as it shows without using it.

use std::path::Path;

/// The device.
pub(crate) const DEVICE: &str = "/dev/kvm";

/// What there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kvm {
    /// No device; the processor may have the extensions all the same.
    Absent { processor: bool },
    /// The device can't be opened by this user; its group, where it has one that helps.
    Denied { cause: String, group: Option<String> },
    /// The device belongs to a hypervisor that runs modified guests only.
    Pvm,
    /// It can be opened. That it runs guests is not tried.
    Openable,
}

/// Looks.
pub(crate) fn probe() -> Kvm {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(metadata) = std::fs::metadata(DEVICE) else {
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        return Kvm::Absent { processor: has_extensions(&cpu) };
    };
    if Path::new("/sys/module/kvm_pvm").exists() {
        return Kvm::Pvm;
    }
    match std::fs::File::options().read(true).write(true).open(DEVICE) {
        Ok(_) => Kvm::Openable,
        Err(error) => {
            let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
            let readable = metadata.mode() & 0o060 == 0o060;
            let group = group_name(&groups, metadata.gid()).filter(|name| readable && name != "root");
            Kvm::Denied { cause: error.to_string(), group }
        }
    }
}

/// Tells whether the processor says that it can run guests.
fn has_extensions(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm")
}

fn group_name(groups: &str, gid: u32) -> Option<String> {
    let mut lines = groups.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let line = lines.find(|fields| fields.get(2).is_some_and(|id| id.parse() == Ok(gid)))?;
    Some(line[0].to_owned())
}

#[cfg(test)]
mod tests {
    use super::{group_name, has_extensions};

    #[test]
    fn the_processors_flags_are_read() {
        assert!(has_extensions("processor\t: 0\nflags\t\t: fpu vmx ssse3\n"));
        assert!(has_extensions("flags\t\t: fpu svm\n"));
        assert!(!has_extensions("vmx flags\t: preemption\nflags\t\t: fpu svmx\n"));
    }

    #[test]
    fn groups_are_found_by_number() {
        let groups = "root:x:0:\nkvm:x:104:someone\n";
        assert_eq!(group_name(groups, 104).as_deref(), Some("kvm"));
        assert_eq!(group_name(groups, 10), None);
    }
}
