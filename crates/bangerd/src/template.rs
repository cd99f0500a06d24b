//! Machines saved at the moment their agent first spoke. An emulated vm, and one under Firecracker, goes on from there
//! instead of booting, which takes a tenth of the time.
//!
//! A template is made by a vm of its own that has no image, no disk to speak of and no network, and that ends when it is
//! saved: it holds a kernel and our agent, and nothing of any user or vm. What sets a vm apart reaches its guest
//! afterwards, with random bytes first. A vm's processes get it to read and can't write it.
//!
//! The name says what it is good for: this machine since it was switched on, this VMM, kernel, initramfs and agent, and a
//! machine of just this shape. Whatever goes wrong, a vm boots as it would without.

use crate::config::Config;
use crate::daemon::Daemon;
use crate::net::{GUEST_MAC, NetPlan};
use crate::plan::{Bind, DISK_FILE, SAVED_FILE, SAVED_INSIDE, STATE_FILE, STATE_INSIDE, Start, VmPlan};
use crate::pull::{Build, put, staging};
use crate::store::RUN_AS_TEMPLATE;
use crate::supervise::root::VM_DIR;
use crate::vmsock;
use anyhow::{Context as _, bail};
use banger_vmm::{Driver, MachinePlan, NetDevice, NetLink};
use banger_wire::daemon::{Event, NetMode};
use banger_wire::guest::GuestConfig;
use banger_wire::vm::{EndReason, Phase, VmEvent, VmRequest, VmStatus};
use rustix::fs::OFlags;
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc::UnboundedSender;

/// How many are kept; each takes the memory a guest has touched when its agent speaks, about 100 MB.
const KEPT_MAX: usize = 4;
/// One used a moment ago may be about to be opened.
const IDLE_MIN: Duration = Duration::from_secs(60);
/// Length of the disk that a template's drives all are.
const DISK_LEN: u64 = 1 << 20;
/// Which start of the host this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

impl Daemon {
    /// Has the plan's machine go on from a template, made now if there is none. Returns its name; none when the machine
    /// has to boot.
    pub(crate) async fn use_template(
        &self,
        plan: &mut VmPlan,
        events: &UnboundedSender<Event>,
    ) -> Option<String> {
        // A machine of QEMU's with KVM holds more of the host's processor than QEMU keeps account of.
        if plan.machine.kvm && plan.machine.driver == Driver::Qemu
            || !Config::load().is_ok_and(|config| config.restore.unwrap_or(true))
        {
            return None;
        }
        let name = name(plan).inspect_err(|error| tracing::warn!("name a template: {error:#}")).ok()?;
        let dir = self.paths.templates().join(&name);
        let file = dir.join(SAVED_FILE);
        let mut unusable = self.templates.lock().await;
        if unusable.contains(&name) {
            return None;
        }
        if !file.exists() {
            let _ = events.send(Event::Step { label: "save a machine to start from".to_owned() });
            if let Err(error) = self.make_template(plan, &name).await {
                tracing::warn!("make a template: {error:#}");
                unusable.insert(name);
                return None;
            }
        }
        // Kept for as long as it is used.
        let _ = File::open(&file).and_then(|file| file.set_modified(SystemTime::now()));
        plan.binds.push(Bind { host: file, inside: SAVED_INSIDE.into() });
        plan.binds.push(Bind { host: dir.join(STATE_FILE), inside: STATE_INSIDE.into() });
        plan.start = Start::Restore;
        Some(name)
    }

    /// A vm could not go on from it: no other one tries.
    pub(crate) async fn distrust(&self, name: String) {
        tracing::warn!("template {name} is of no use");
        let mut unusable = self.templates.lock().await;
        let _ = std::fs::remove_dir_all(self.paths.templates().join(&name));
        unusable.insert(name);
    }

    async fn make_template(&self, of: &VmPlan, name: &str) -> anyhow::Result<()> {
        let parent = self.paths.templates();
        let staging = staging(&parent)?;
        let dir = staging.path().join("build");
        std::fs::create_dir(&dir)?;
        File::create(dir.join(DISK_FILE))?.set_len(DISK_LEN)?;
        let plan = VmPlan { id: self.new_id()?, ..plan(of, dir.clone()) };
        let build = Build::new(staging);
        let mut connection = vmsock::start(&plan).await?;
        connection.request(VmRequest::Watch).await?;
        let end = loop {
            match connection.event().await?.context("its vm was killed")? {
                VmEvent::Ended(end) => break end,
                // Its VMM would stay for somebody to look at, and nobody knows of it.
                VmEvent::State(VmStatus { phase: Phase::Failed { stage, cause }, .. }) => {
                    bail!("{stage}: {cause}")
                }
                VmEvent::State(VmStatus { paused: Some(why), .. }) => bail!("{why}"),
                _ => {}
            }
        };
        vmsock::wait_gone(&dir).await;
        if end.reason != EndReason::Stopped {
            bail!("{}", end.detail);
        }
        let staging = build.done()?;
        for name in [SAVED_FILE, STATE_FILE] {
            let saved = vmsock::open_file(&dir, name, OFlags::RDONLY).context("open what was saved")?;
            if plan.run_as.is_some() {
                std::os::unix::fs::fchown(&saved, Some(0), Some(0))?;
            }
            saved.set_permissions(PermissionsExt::from_mode(0o444))?;
            std::fs::rename(dir.join(name), staging.path().join(name))?;
        }
        std::fs::remove_dir_all(&dir)?;
        // CRASH: an unfinished directory is left, and the next start removes it. Nothing is synced: after the host's next
        // start this is another template's time.
        put(staging, &parent.join(name)).context("publish the template")?;
        if let Err(error) = remove_idle(&parent) {
            tracing::warn!("remove templates nobody uses: {error:#}");
        }
        Ok(())
    }
}

/// The plan of the vm that makes a template for another: the same machine without anything of that vm's.
fn plan(of: &VmPlan, dir: PathBuf) -> VmPlan {
    let mut binds: Vec<Bind> = of.binds.iter().filter(|bind| is_of_machine(of, bind)).cloned().collect();
    let disk = Path::new(VM_DIR).join(DISK_FILE);
    let mut drives = of.machine.drives.clone();
    let (net, device) = match of.machine.driver {
        Driver::Qemu => {
            drives.iter_mut().for_each(|drive| drive.path.clone_from(&disk));
            let device = NetDevice { mac: GUEST_MAC.to_owned(), link: NetLink::Loose };
            (NetPlan::none(), of.guest.network.as_ref().map(|_| device))
        }
        Driver::Firecracker => {
            // It finds the other vm's drives and tap under the names that it saved. The tap leads nowhere.
            let elsewhere = drives.iter().filter(|drive| drive.path != disk);
            let disk = dir.join(DISK_FILE);
            binds.extend(elsewhere.map(|drive| Bind { host: disk.clone(), inside: drive.path.clone() }));
            // Nothing is let through, so it does not matter which.
            let mode = if of.net.has_link() { NetMode::Internet } else { NetMode::None };
            (NetPlan { mode, ..NetPlan::none() }, None)
        }
    };
    let machine = MachinePlan { drives, net: device, to_be_saved: true, ..of.machine.clone() };
    VmPlan {
        binds,
        dir,
        run_as: of.run_as.map(|_| RUN_AS_TEMPLATE),
        cgroup: None,
        // Nobody is told: the vm ends before.
        guest: GuestConfig {
            hostname: "template".to_owned(),
            entropy: Default::default(),
            env: Vec::new(),
            workdir: None,
            user: None,
            ca: None,
            network: net.guest(),
            ..of.guest.clone()
        },
        net,
        lease: false,
        ports: None,
        auto_stop_ms: None,
        caches: Vec::new(),
        writable: Vec::new(),
        start: Start::Save,
        machine,
        ..of.clone()
    }
}

/// Kernel, initramfs and VMM.
fn is_of_machine(plan: &VmPlan, bind: &Bind) -> bool {
    let machine = &plan.machine;
    [&machine.kernel, &machine.initrd, &machine.program].contains(&&bind.inside)
}

/// Names the template a machine can go on from.
fn name(of: &VmPlan) -> anyhow::Result<String> {
    let VmPlan { machine, net, .. } = plan(of, PathBuf::new());
    let mut hash = Sha256::new();
    // The clock's rate is measured at each start of the daemon, and never twice the same to the last digit.
    let launch = banger_vmm::launch(&MachinePlan { tsc_khz: None, ..machine.clone() });
    let args = launch.args.iter().map(|arg| arg.as_encoded_bytes());
    for text in args.chain(launch.files.iter().map(|(_, text)| &text[..])) {
        hash.update(text);
        hash.update([0]);
    }
    // Where it is not among these, the supervisor adds it.
    hash.update([u8::from(net.has_link())]);
    let shown = of.binds.iter().filter(|bind| is_of_machine(of, bind)).map(|bind| &bind.host);
    let program = Some(&machine.program).filter(|path| of.binds.iter().all(|bind| bind.inside != **path));
    for file in shown.chain(program) {
        let at = std::fs::metadata(file).with_context(|| format!("look at `{}`", file.display()))?;
        for number in
            [at.dev(), at.ino(), at.len(), at.mtime().cast_unsigned(), at.mtime_nsec().cast_unsigned()]
        {
            hash.update(number.to_le_bytes());
        }
    }
    let digest: String = hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("{}-{digest}", host_boot()?))
}

/// The beginning of every name until the host starts anew.
fn host_boot() -> anyhow::Result<String> {
    let id = std::fs::read_to_string(BOOT_ID).context("read the host's boot id")?;
    Ok(id.chars().filter(char::is_ascii_hexdigit).take(16).collect())
}

/// Templates of an earlier start of the host, and unfinished ones.
pub(crate) fn old(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let prefix = format!("{}-", host_boot()?);
    let entries = std::fs::read_dir(dir)?.collect::<Result<Vec<_>, _>>()?;
    let is_old = |entry: &std::fs::DirEntry| !entry.file_name().to_string_lossy().starts_with(&prefix);
    Ok(entries.iter().filter(|entry| is_old(entry)).map(std::fs::DirEntry::path).collect())
}

/// Removes what has not been used for longest, beyond what is kept.
fn remove_idle(dir: &Path) -> anyhow::Result<()> {
    let mut used: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if let Ok(metadata) = std::fs::metadata(path.join(SAVED_FILE)) {
            used.push((metadata.modified()?, path));
        }
    }
    used.sort();
    let excess = used.len().saturating_sub(KEPT_MAX);
    for (at, path) in &used[..excess] {
        if at.elapsed().is_ok_and(|idle| idle > IDLE_MIN) {
            std::fs::remove_dir_all(path).with_context(|| format!("remove `{}`", path.display()))?;
        }
    }
    Ok(())
}
