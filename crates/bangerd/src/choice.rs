//! Which VMM runs a vm, and how fast: decided from what was asked for and what the machine has.

use crate::doctor::facts::Program;
use crate::kvm::{self, Kvm, Refusal};
use crate::programs::{Vmm, numbers};
use banger_vmm::firecracker;
use banger_wire::daemon::VmmChoice;
use banger_wire::error::{ErrorCode, WireError};
use std::path::PathBuf;

/// What a choice is made from.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) asked: VmmChoice,
    pub(crate) kvm: Kvm,
    pub(crate) qemu: Result<PathBuf, WireError>,
    pub(crate) firecracker: Result<Program, WireError>,
    /// Whose vms these are.
    pub(crate) user: String,
}

/// What runs a vm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) vmm: Vmm,
    pub(crate) program: PathBuf,
    /// With hardware virtualisation; in software otherwise.
    pub(crate) kvm: bool,
    /// Its devices can be on a PCI bus.
    pub(crate) pci: bool,
    /// It gives memory back that the guest frees.
    pub(crate) gives_memory_back: bool,
    /// Without KVM: that this is slower, why it is so, and what helps.
    pub(crate) note: Option<String>,
}

/// Chooses: Firecracker where it can be, unless QEMU is asked for.
///
/// # Errors
/// When what was asked for is impossible here, or there is nothing to run vms with. The hint is the next command.
pub(crate) fn choose(facts: Facts) -> Result<Choice, WireError> {
    let firecracker = match facts.asked {
        VmmChoice::Firecracker => Some(use_firecracker(&facts)?),
        VmmChoice::Auto => use_firecracker(&facts).ok(),
        VmmChoice::Qemu => None,
    };
    if let Some((program, version)) = firecracker {
        return Ok(Choice {
            vmm: Vmm::Firecracker,
            program,
            kvm: true,
            pci: version >= firecracker::PCI_SINCE,
            gives_memory_back: version >= firecracker::REPORTING_SINCE,
            note: None,
        });
    }
    let (why, cure) = obstacle(&facts.kvm, &facts.user).unzip();
    let note = why.map(|why| {
        let what = cure.flatten().unwrap_or_else(|| "see `banger doctor`".to_owned());
        format!("{why}, so vms run in software emulation, which is slower; {what}")
    });
    let (kvm, program) = (note.is_none(), facts.qemu?);
    Ok(Choice { vmm: Vmm::Qemu, program, kvm, pci: true, gives_memory_back: true, note })
}

/// Returns Firecracker's program and version, or why it can't be used.
fn use_firecracker(facts: &Facts) -> Result<(PathBuf, (u32, u32)), WireError> {
    let error = |text: String| WireError::new(ErrorCode::Invalid, text);
    let instead = "use `--vmm qemu`";
    if let Some((why, cure)) = obstacle(&facts.kvm, &facts.user) {
        let text = format!("Firecracker needs KVM, and {why}");
        return Err(error(text).hinted(cure.unwrap_or_else(|| instead.to_owned())));
    }
    let program = facts.firecracker.as_ref().map_err(WireError::clone)?;
    let path = program.path.display();
    let wrong = match program.version.as_deref() {
        None => format!("`{path}` does not say its version"),
        Some(version) => match firecracker::unfit(numbers(version)) {
            Some(why) => format!("`{path}` is {version}, {why}"),
            None => return Ok((program.path.clone(), numbers(version))),
        },
    };
    Err(error(wrong)
        .hinted("fetch one that fits with `banger setup`, or name one as `firecracker_bin` in the config"))
}

/// Returns what is in the way of KVM, and the advice that clears it, where there is one that helps for sure.
fn obstacle(kvm: &Kvm, user: &str) -> Option<(String, Option<String>)> {
    let device = kvm::DEVICE;
    Some(match kvm {
        Kvm::Usable => return None,
        Kvm::Absent { .. } => (format!("there is no `{device}`"), None),
        Kvm::Denied { cause, group } => {
            let (command, then) = kvm::cure(group.as_deref(), user);
            (format!("`{device}` can't be opened ({cause})"), Some(format!("use `{command}`, {then}")))
        }
        Kvm::Refuses(Refusal { reached: Some(stage), .. }) => {
            (format!("`{device}` runs no ordinary vms (a small one managed {stage} and no more)"), None)
        }
        Kvm::Refuses(Refusal { reached: None, cause }) => (format!("`{device}` runs no vms ({cause})"), None),
    })
}

#[cfg(test)]
mod tests {
    use super::{Choice, Facts, choose};
    use crate::doctor::facts::Program;
    use crate::kvm::{Kvm, Refusal};
    use banger_wire::daemon::VmmChoice;
    use banger_wire::error::{ErrorCode, WireError};

    fn facts() -> Facts {
        Facts {
            asked: VmmChoice::Auto,
            kvm: Kvm::Usable,
            qemu: Ok("/usr/bin/qemu".into()),
            firecracker: Ok(Program { path: "/opt/firecracker".into(), version: Some("1.17.0".to_owned()) }),
            user: "someone".to_owned(),
        }
    }

    /// A machine that is not as the one above.
    type Change = fn(&mut Facts);

    const MACHINES: [(&str, Change); 13] = [
        ("real KVM and everything there", |_| {}),
        ("kvm_pvm", |facts| {
            let (reached, cause) = ("64-bit mode".to_owned(), "KVM had an internal error".to_owned());
            facts.kvm = Kvm::Refuses(Refusal { reached: Some(reached), cause });
        }),
        ("KVM that makes no vm", |facts| {
            let cause = "make a vm: Device or resource busy (os error 16)".to_owned();
            facts.kvm = Kvm::Refuses(Refusal { reached: None, cause });
        }),
        ("no device", |facts| facts.kvm = Kvm::Absent { processor: true }),
        ("a device of its group", |facts| {
            let (cause, group) = ("Permission denied (os error 13)".to_owned(), Some("kvm".to_owned()));
            facts.kvm = Kvm::Denied { cause, group };
        }),
        ("a device of root", |facts| {
            facts.kvm = Kvm::Denied { cause: "Permission denied (os error 13)".to_owned(), group: None };
        }),
        ("a container that was not given the device", |facts| {
            facts.kvm = Kvm::Denied { cause: "Permission denied (os error 13)".to_owned(), group: None };
            facts.user = "root".to_owned();
        }),
        ("no firecracker", |facts| {
            facts.firecracker = Err(WireError::new(ErrorCode::Failed, "`firecracker` is not installed")
                .hinted("install it with `banger setup`, or see `banger doctor`"));
        }),
        ("an old firecracker", |facts| version(facts, Some("1.11.9"))),
        ("the oldest firecracker that will do", |facts| version(facts, Some("1.12.0"))),
        ("a firecracker of the future", |facts| version(facts, Some("2.0.0"))),
        ("a firecracker that says nothing", |facts| version(facts, None)),
        ("no qemu", |facts| {
            facts.qemu = Err(WireError::new(ErrorCode::Failed, "`qemu-system-x86_64` is not installed")
                .hinted("install it with `sudo apt-get install qemu-system-x86`, or see `banger doctor`"));
        }),
    ];

    fn version(facts: &mut Facts, version: Option<&str>) {
        facts.firecracker.as_mut().unwrap().version = version.map(str::to_owned);
    }

    fn render(chosen: Result<Choice, WireError>) -> String {
        match chosen {
            Ok(Choice { vmm, program, kvm, pci, gives_memory_back, note }) => {
                let note = note.map(|note| format!("\n             {note}")).unwrap_or_default();
                let how = if kvm { "KVM" } else { "emulation" };
                let bus = if pci { "" } else { ", without a bus" };
                let memory = if gives_memory_back { "" } else { ", keeps freed memory" };
                format!("{vmm:?} `{}`, {how}{bus}{memory}{note}", program.display())
            }
            Err(error) => {
                format!("error: {error}\n             hint: {}", error.hint.as_deref().unwrap_or("none"))
            }
        }
    }

    #[test]
    fn every_machine_and_every_wish() {
        let mut text = String::new();
        for (name, change) in MACHINES {
            text += &format!("# {name}\n");
            for asked in [VmmChoice::Auto, VmmChoice::Firecracker, VmmChoice::Qemu] {
                let mut facts = facts();
                change(&mut facts);
                facts.asked = asked;
                text += &format!("{:<12} {}\n", format!("{asked:?}"), render(choose(facts)));
            }
        }
        insta::assert_snapshot!(text);
    }

    #[test]
    fn what_is_chosen_by_itself_is_always_something_that_is_there() {
        for (name, change) in MACHINES {
            let mut facts = facts();
            change(&mut facts);
            let (has_qemu, is_usable) = (facts.qemu.is_ok(), facts.kvm == Kvm::Usable);
            match choose(facts) {
                Ok(choice) => {
                    assert!(choice.kvm == is_usable && choice.kvm == choice.note.is_none(), "{name}")
                }
                Err(_) => assert!(!has_qemu, "{name}"),
            }
        }
    }
}
