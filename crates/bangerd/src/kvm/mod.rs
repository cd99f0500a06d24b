//! Whether KVM runs vms here: found out by running a small one, and remembered.
//!
//! ```text
//! [Known::find] ── looks at the device ── remembered for it, this boot and this build? ── the answer
//!                                              └── no: `bangerd kvm-probe` ([probe]), killed after 200 ms
//! ```
//!
//! What a guest showed holds as long as the machine has not booted again and the device is the same. That it may be
//! opened does not: it is looked at each time, and a refusal is never written down.

pub(crate) mod probe;

use banger_wire::BUILD;
use serde::{Deserialize, Serialize};
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The device.
pub(crate) const DEVICE: &str = "/dev/kvm";
/// The kernel's name for the time since it was booted.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// How long a guest that took too long stands for what KVM can do. The machine may only have been busy, but one that
/// hangs takes as long each time.
const DOUBT_TIME: Duration = Duration::from_secs(60);

/// What there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kvm {
    /// No device; the processor may have the extensions all the same.
    Absent { processor: bool },
    /// The device can't be opened by those who run vms; its group, where it has one that helps.
    Denied { cause: String, group: Option<String> },
    /// The device is there, and an ordinary guest does not get through.
    Refuses(Refusal),
    /// An ordinary guest got through.
    Usable,
}

/// How a guest did not get through.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refusal {
    /// What it managed last; none when it did not run at all.
    pub(crate) reached: Option<String>,
    /// What ended it.
    pub(crate) cause: String,
}

/// What is written down: an answer, and what it was about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Answer {
    about: Subject,
    /// None when the guest got through.
    refusal: Option<Refusal>,
}

/// What an answer holds for: another boot, device or guest may give another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Subject {
    boot_id: String,
    build: String,
    device: u64,
    inode: u64,
    /// Owner, group and rights. The time of the last change would be simpler, but it changes when the device is opened.
    rights: (u32, u32, u32),
}

/// The answer, once it is known.
#[derive(Debug)]
pub(crate) struct Known {
    device: PathBuf,
    file: PathBuf,
    /// Until when it is believed, where that is not for good.
    answer: Mutex<Option<(Answer, Option<Instant>)>>,
}

/// Runs a guest.
type Probe<'a> = &'a dyn Fn() -> probe::Outcome;

impl Known {
    /// Remembers in this file.
    pub(crate) fn new(file: PathBuf) -> Self {
        Self { device: DEVICE.into(), file, answer: Mutex::default() }
    }

    /// Says what there is; runs a guest only when that is not known yet. Blocks meanwhile, 200 ms at most.
    pub(crate) fn find(&self) -> Kvm {
        self.ask(true, &probe::run)
    }

    /// Says what there is after running a guest, whatever is known.
    pub(crate) fn find_anew(&self) -> Kvm {
        self.ask(false, &probe::run)
    }

    fn ask(&self, believe: bool, run: Probe<'_>) -> Kvm {
        let Ok(metadata) = std::fs::metadata(&self.device) else { return absent() };
        if let Some(cause) = access(&self.device) {
            return Kvm::Denied { cause, group: helpful_group(&metadata) };
        }
        let about = subject(&metadata);
        // Whoever comes second waits for the first one's answer.
        let mut known = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        if believe {
            let now = Instant::now();
            let current = |(answer, until): &(Answer, Option<Instant>)| {
                about.as_ref() == Some(&answer.about) && until.is_none_or(|until| now < until)
            };
            if !known.as_ref().is_some_and(current) {
                *known = self.stored().map(|answer| (answer, None)).filter(current);
            }
            if let Some((answer, _)) = &*known {
                return answer.refusal.clone().map_or(Kvm::Usable, Kvm::Refuses);
            }
        }
        let (refusal, is_certain) = match run() {
            probe::Outcome::Absent => return absent(),
            probe::Outcome::Denied(cause) => {
                return Kvm::Denied { cause, group: helpful_group(&metadata) };
            }
            probe::Outcome::Passed => (None, true),
            probe::Outcome::Refused { refusal, is_certain } => (Some(refusal), is_certain),
        };
        if let Some(about) = about {
            let answer = Answer { about, refusal: refusal.clone() };
            let written = if is_certain { self.store(&answer) } else { self.forget() };
            if let Err(error) = written {
                tracing::warn!("write `{}`: {error}, ignoring", self.file.display());
            }
            *known = Some((answer, (!is_certain).then(|| Instant::now() + DOUBT_TIME)));
        }
        refusal.map_or(Kvm::Usable, Kvm::Refuses)
    }

    /// What is no answer is none.
    fn stored(&self) -> Option<Answer> {
        serde_json::from_slice(&std::fs::read(&self.file).ok()?).ok()
    }

    /// Visible whole or not at all.
    fn store(&self, answer: &Answer) -> std::io::Result<()> {
        let new = self.file.with_extension("new");
        std::fs::write(&new, serde_json::to_vec(answer)?)?;
        std::fs::rename(new, &self.file)
    }

    fn forget(&self) -> std::io::Result<()> {
        match std::fs::remove_file(&self.file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

fn absent() -> Kvm {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    Kvm::Absent { processor: has_extensions(&cpu) }
}

/// None where the boot has no name: then nothing can be remembered.
fn subject(metadata: &Metadata) -> Option<Subject> {
    let boot_id = std::fs::read_to_string(BOOT_ID).ok()?.trim().to_owned();
    Some(Subject {
        boot_id,
        build: BUILD.to_owned(),
        device: metadata.rdev(),
        inode: metadata.ino(),
        rights: (metadata.uid(), metadata.gid(), metadata.mode()),
    })
}

/// Returns why this user may not open the device. Root's vms each have a device of their own.
fn access(device: &Path) -> Option<String> {
    if rustix::process::getuid().is_root() {
        return None;
    }
    let rights = rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK;
    rustix::fs::access(device, rights).err().map(|error| std::io::Error::from(error).to_string())
}

/// Returns the command that lets vms have the device, and what to know about it.
pub(crate) fn cure(group: Option<&str>, user: &str) -> (String, &'static str) {
    match group {
        // Root is refused where a container was not given the device.
        _ if user == "root" => (format!("ls -l {DEVICE}"), "outside of the container, if this is one"),
        Some(group) => (format!("sudo usermod -aG {group} {user}"), "then log in again"),
        None => (format!("sudo setfacl -m u:{user}:rw {DEVICE}"), "which holds until the next boot"),
    }
}

/// A device of root's group is nobody else's.
fn group_of(metadata: &Metadata) -> Option<u32> {
    (metadata.mode() & 0o060 == 0o060 && metadata.gid() != 0).then(|| metadata.gid())
}

fn helpful_group(metadata: &Metadata) -> Option<String> {
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    group_name(&groups, group_of(metadata)?)
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
    use super::probe::Outcome;
    use super::{Answer, Instant, Known, Kvm, Refusal, group_name, has_extensions};
    use std::cell::Cell;
    use std::path::Path;
    use std::sync::Mutex;

    /// A daemon with a file for a device.
    fn daemon(dir: &Path) -> Known {
        Known { device: dir.join("device"), file: dir.join("kvm.json"), answer: Mutex::default() }
    }

    /// Asks, with a guest that ends like this; returns the answer, and whether the guest ran.
    fn ask(daemon: &Known, believe: bool, outcome: &Outcome) -> (Kvm, bool) {
        let ran = Cell::new(false);
        let run = || {
            ran.set(true);
            outcome.clone()
        };
        (daemon.ask(believe, &run), ran.get())
    }

    fn refused(is_certain: bool) -> (Outcome, Kvm) {
        let refusal = Refusal { reached: Some("64-bit mode".to_owned()), cause: "no".to_owned() };
        (Outcome::Refused { refusal: refusal.clone(), is_certain }, Kvm::Refuses(refusal))
    }

    #[test]
    fn a_guest_is_run_once_for_each_boot_and_device() {
        let dir = tempfile::tempdir().unwrap();
        let first = daemon(dir.path());
        assert!(matches!(ask(&first, true, &Outcome::Passed), (Kvm::Absent { .. }, false)));
        std::fs::write(dir.path().join("device"), "").unwrap();
        assert_eq!(ask(&first, true, &Outcome::Passed), (Kvm::Usable, true));
        let (refuses, answer) = refused(true);
        assert_eq!(ask(&first, true, &refuses), (Kvm::Usable, false));
        let second = daemon(dir.path());
        assert_eq!(ask(&second, true, &refuses), (Kvm::Usable, false), "the next daemon");
        // Whoever wants to know for sure; everybody else then knows as well.
        assert_eq!(ask(&second, false, &refuses), (answer.clone(), true));
        assert_eq!(ask(&second, true, &Outcome::Passed), (answer.clone(), false));
        assert_eq!(ask(&daemon(dir.path()), true, &Outcome::Passed), (answer, false));
        // Another device of the same name.
        std::fs::write(dir.path().join("new"), "").unwrap();
        std::fs::rename(dir.path().join("new"), dir.path().join("device")).unwrap();
        assert_eq!(ask(&second, true, &Outcome::Passed), (Kvm::Usable, true));
        // Another boot, and a file that is none of ours.
        let mut stored: Answer = second.stored().unwrap();
        stored.about.boot_id = "another".to_owned();
        second.store(&stored).unwrap();
        assert_eq!(ask(&daemon(dir.path()), true, &Outcome::Passed), (Kvm::Usable, true));
        std::fs::write(dir.path().join("kvm.json"), "{\"about\":").unwrap();
        assert_eq!(ask(&daemon(dir.path()), true, &Outcome::Passed), (Kvm::Usable, true));
    }

    #[test]
    fn a_refused_device_and_a_slow_guest_are_not_written_down() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("device"), "").unwrap();
        let first = daemon(dir.path());
        for _ in 0..2 {
            let (denied, ran) = ask(&first, true, &Outcome::Denied("no".to_owned()));
            assert!(matches!(denied, Kvm::Denied { .. }) && ran);
        }
        let (slow, answer) = refused(false);
        assert_eq!(ask(&first, true, &slow), (answer.clone(), true));
        assert_eq!(ask(&first, true, &Outcome::Passed), (answer, false), "it does not try on and on");
        // A minute later.
        first.answer.lock().unwrap().as_mut().unwrap().1 = Some(Instant::now());
        assert_eq!(ask(&first, true, &Outcome::Passed), (Kvm::Usable, true));
        assert!(ask(&first, false, &slow).1);
        assert_eq!(ask(&daemon(dir.path()), true, &Outcome::Passed), (Kvm::Usable, true));
    }

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
