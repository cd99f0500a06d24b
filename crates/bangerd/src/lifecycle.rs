//! A vm from its start to its removal.
//!
//! ```text
//! start ──> supervisor ──> watcher ── Starting, Running, Stopping, Error ──> store
//!                             └────── the end: Stopped, Error, or gone
//! ```
//!
//! While a vm runs its watcher alone writes its state: whoever started the vm may leave before it is up. Start, stop and
//! removal of one vm exclude each other, so nobody acts on what was true a moment ago.

use crate::cgroup;
use crate::config::Config;
use crate::daemon::{Daemon, net_mode};
use crate::net::NetPlan;
use crate::plan::{Boot, Inputs, MODULES_FILE, plan};
use crate::pull::entropy;
use crate::state::{self, Happening, Next, Wish};
use crate::store::VmRow;
use crate::{cache, initramfs, request, vmsock};
use anyhow::{Context as _, bail};
use banger_wire::daemon::{Event, Outcome, Pruned, StartedVm, VmSpec, VmState, VmView, VmmChoice, Wait};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::time::millis;
use banger_wire::vm::{EndReason, Phase, VmEnd, VmEvent, VmRequest, VmStatus};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;

/// How long an image's init may take to finish starting, with a service that waits for something.
const INIT_WAIT: Duration = Duration::from_secs(120);
/// How long a vm may take to end beyond the grace it was given.
const END_WAIT: Duration = Duration::from_secs(30);

/// How long after the store could not be written it is tried again.
const WRITE_AGAIN: Duration = Duration::from_secs(1);
/// And at most, each time being twice as long as the one before.
const WRITE_AGAIN_MAX: Duration = Duration::from_secs(60);

/// What is said of a vm that has not said how it ended.
const LOST: &str = "its supervisor was killed, or the machine went down";

type Phases = watch::Receiver<Option<VmStatus>>;

impl Daemon {
    /// Waits until nobody else starts, stops or removes this vm.
    pub(crate) async fn alone(&self, row: &VmRow) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
            // Nobody waits for one that is not shared.
            busy.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(busy.entry(row.id.to_string()).or_default())
        };
        lock.lock_owned().await
    }

    /// Boots a vm and returns once sessions can be opened.
    pub(crate) async fn start(
        self: &Arc<Self>,
        row: &VmRow,
        wait: Wait,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<StartedVm> {
        let begun = Instant::now();
        // Whoever asked may leave; between its process and its lock a vm must not be taken for one that does not run.
        let launching = tokio::spawn(self.clone().launch(row.clone(), events.clone()));
        let (mut phases, template) = launching.await.context("start the vm")??;
        let mut status = settled(&mut phases).await;
        if let (Some(template), Some(status)) = (template, &status)
            && status.watchdog_restarts > 0
        {
            self.distrust(template).await;
        }
        match status.as_ref().map(|status| &status.phase) {
            Some(Phase::Ready | Phase::InitReady) => {}
            Some(Phase::Failed { stage, cause }) => {
                return Err(unreachable(row, &format!("{stage}: {cause}")));
            }
            _ => return Err(self.ended_early(row)),
        }
        self.sync_files(&self.paths.vm(row.id.as_str()), events).await;
        if wait == Wait::Boot {
            let done = phases.wait_for(|status: &Option<VmStatus>| {
                !matches!(status.as_ref().map(|status| &status.phase), Some(Phase::Ready))
            });
            match tokio::time::timeout(INIT_WAIT, done).await {
                Ok(Ok(last)) => status = last.clone(),
                Ok(Err(_)) => return Err(self.ended_early(row)),
                Err(_) => {
                    let waited = INIT_WAIT.as_secs();
                    let text = format!(
                        "the image's init has not finished starting for {waited} s; going on without it"
                    );
                    let _ = events.send(Event::Warning { text });
                }
            }
        }
        let of_network = |status: &VmStatus| [status.network_warning.clone(), status.member_warning.clone()];
        for text in status.iter().flat_map(of_network).flatten() {
            let _ = events.send(Event::Warning { text });
        }
        for text in status.iter().flat_map(|status| status.guest_warnings.clone()) {
            let _ = events.send(Event::Warning { text });
        }
        let view = self.view(&self.row(row.id.as_str())?);
        let image = self.find_image(&row.image)?.filter(|image| image.init.is_none());
        let command = image.map(|image| [image.config.entrypoint, image.config.cmd].concat());
        Ok(StartedVm {
            command: command.unwrap_or_default(),
            socket: view.socket.clone(),
            vm: view,
            timings: status.map(|status| status.timings).unwrap_or_default(),
            ready_ms: millis(begun.elapsed()),
        })
    }

    /// Starts the supervisor and its watcher. Also returns the template the vm goes on from, if it does.
    async fn launch(
        self: Arc<Self>,
        row: VmRow,
        events: UnboundedSender<Event>,
    ) -> anyhow::Result<(Phases, Option<String>)> {
        let _alone = self.alone(&row).await;
        // It may be gone by now, or run.
        let row = self.row(row.id.as_str())?;
        let dir = self.paths.vm(row.id.as_str());
        if !state::allows(Wish::Start, row.state, vmsock::is_alive(&dir)) {
            let text = format!("vm `{}` is running already", row.name);
            return Err(WireError::new(ErrorCode::Invalid, text).into());
        }
        let launched = self.launch_idle(&row, dir, &events).await;
        if let Err(error) = &launched {
            // What was to be started may be there all the same.
            if let Err(error) = vmsock::end(&self.paths.vm(row.id.as_str())).await {
                tracing::warn!("vm {}: {error:#}", row.name);
            }
            // One that was refused before it was about to start stays what it is.
            if self.row(row.id.as_str())?.state == VmState::Starting {
                self.note(&row, Happening::NotLaunched(&format!("{error:#}")))?;
            }
        }
        launched
    }

    /// The same of a vm that nobody else acts on, and that does not run.
    async fn launch_idle(
        self: &Arc<Self>,
        row: &VmRow,
        dir: PathBuf,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<(Phases, Option<String>)> {
        let kernel = self.paths.kernel(&row.kernel);
        let spec: VmSpec = serde_json::from_str(&row.spec).context("understand the stored request")?;
        let image = self.find_image(&row.image)?.context("the vm's image is gone")?;
        let choice = self.choose(spec.vmm.unwrap_or(VmmChoice::Auto)).await?;
        self.store.set_vmm(&row.id, choice.vmm, choice.kvm)?;
        let (image_dir, driver) = (self.paths.image(&row.image), choice.vmm.driver());
        let initramfs = if image.initrd {
            initramfs::ensure_appended(&image_dir, &kernel, driver)?
        } else {
            initramfs::ensure(&kernel, driver, &image.filesystem)?
        };
        let mut plan = plan(Inputs {
            row,
            spec: &spec,
            config: &image.config,
            dir,
            image: image_dir.join(image.rootfs_file()),
            filesystem: image.filesystem.clone(),
            modules: kernel.join(MODULES_FILE).exists(),
            initramfs,
            kernel,
            choice,
            entropy: entropy()?,
            tsc_khz: self.tsc_khz().await,
            net: NetPlan::find(net_mode(&spec), spec.net_rules.clone(), self.join(row)?),
            cgroup: self.cgroup(row),
            boot: if image.initrd { Boot::Handover } else { Boot::Image },
        });
        let config = Config::load()?;
        // A vm that starts has its caches before another one looks for them.
        let has_caches = !spec.caches.is_empty() || !config.cache.is_empty();
        let _caching = if has_caches { Some(self.caching.lock().await) } else { None };
        let caches = self.find_caches(&spec, &config.cache, !image.initrd, row.run_as, events)?;
        cache::attach(&mut plan, &caches);
        plan.limit(config.disk_rate, config.net_rate);
        request::add_settings(&mut plan, &spec, &config)?;
        let template = self.use_template(&mut plan, events).await;
        let _ = events.send(Event::Step { label: format!("boot {}", row.name) });
        self.note(row, Happening::Launched)?;
        let connection = vmsock::start(&plan).await?;
        let (tell, phases) = watch::channel(None);
        tokio::spawn(self.clone().follow(row.clone(), Some(connection), tell));
        Ok((phases, template))
    }

    /// Makes the vm's control group, where there can be one.
    fn cgroup(&self, row: &VmRow) -> Option<PathBuf> {
        let base = cgroup::prepare().ok()?;
        // CRASH: an empty group is used by the vm's next start, or removed with the vm.
        let made = cgroup::make(&base, row.id.as_str(), row.memory, row.vcpu);
        made.inspect_err(|error| tracing::warn!("vm {}: make its control group: {error}, ignoring", row.name))
            .ok()
    }

    fn ended_early(&self, row: &VmRow) -> anyhow::Error {
        let end = vmsock::load_end(&self.paths.vm(row.id.as_str()));
        unreachable(row, end.as_ref().map_or(LOST, |end| &end.detail))
    }

    /// Follows a vm found running.
    pub(crate) fn watch(self: &Arc<Self>, row: VmRow) {
        tokio::spawn(self.clone().follow(row, None, watch::channel(None).0));
    }

    /// Writes down what a vm's supervisor says until the vm has ended, and then how.
    async fn follow(
        self: Arc<Self>,
        row: VmRow,
        mut connection: Option<vmsock::Connection>,
        tell: watch::Sender<Option<VmStatus>>,
    ) {
        let dir = self.paths.vm(row.id.as_str());
        let mut end = None;
        // A lost connection is not the vm's end; its lock is.
        while end.is_none() && vmsock::is_alive(&dir) {
            let Some(mut connection) = (match connection.take() {
                Some(connection) => Some(connection),
                None => vmsock::connect_new(&dir).await.ok(),
            }) else {
                continue;
            };
            end = self.follow_connection(&row, &mut connection, &tell).await;
        }
        vmsock::wait_gone(&dir).await;
        let (mut tell, mut delay) = (Some(tell), WRITE_AGAIN);
        loop {
            let alone = self.alone(&row).await;
            // Started again meanwhile: the next watcher has it.
            if vmsock::is_alive(&dir) {
                return;
            }
            cgroup::remove_of(&dir).await;
            self.running().remove(row.id.as_str());
            let end = end.clone().or_else(|| vmsock::load_end(&dir));
            // Whoever waits for the boot reads the end from the disk, so the vm's files stay until then.
            let Err(error) = self.settle(&row, end.as_ref()).await else { return };
            drop(alone);
            tell.take();
            tracing::error!("vm {}: {error:#}, trying again", row.name);
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(WRITE_AGAIN_MAX);
        }
    }

    async fn follow_connection(
        &self,
        row: &VmRow,
        connection: &mut vmsock::Connection,
        tell: &watch::Sender<Option<VmStatus>>,
    ) -> Option<VmEnd> {
        connection.request(VmRequest::Watch).await.ok()?;
        let mut written = None;
        while let Ok(Some(event)) = connection.event().await {
            match event {
                VmEvent::State(mut status) => {
                    let inside = status.vmm_pid.zip(connection.supervisor);
                    status.vmm_pid = inside.and_then(|(pid, parent)| vmsock::outside_pid(parent, pid));
                    let is_new = written.as_ref() != Some(&status.phase);
                    written = Some(status.phase.clone());
                    // Whoever waits is told, even where the store has no room for it.
                    let noted =
                        if is_new { self.note(row, Happening::Told(&status.phase)).err() } else { None };
                    self.running().insert(row.id.to_string(), status.clone());
                    tell.send_replace(Some(status.clone()));
                    if let Some(error) = noted {
                        self.note_again(row, &status.phase, error).await;
                    }
                }
                VmEvent::Ended(how) => return Some(how),
                _ => {}
            }
        }
        None
    }

    /// Writes down how far a vm is once the store can be written again; until then the store tells an earlier state.
    async fn note_again(&self, row: &VmRow, phase: &Phase, mut error: anyhow::Error) {
        let (dir, mut delay) = (self.paths.vm(row.id.as_str()), WRITE_AGAIN);
        while vmsock::is_alive(&dir) {
            tracing::error!("vm {}: {error:#}, trying again", row.name);
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(WRITE_AGAIN_MAX);
            match self.note(row, Happening::Told(phase)) {
                Ok(_) => return,
                Err(again) => error = again,
            }
        }
    }

    /// Writes down what happened to a vm. Returns what it calls for: one that is to go is still there.
    fn note(&self, row: &VmRow, happening: Happening<'_>) -> anyhow::Result<Next> {
        let Some(row) = self.store.vm(&row.id)? else {
            // Removed meanwhile.
            return Ok(Next::Stays);
        };
        let next = state::next(row.state, row.rm, happening);
        if let Next::Becomes(state, error) = &next
            && (*state, error) != (row.state, &row.error)
        {
            self.store.set_state(&row.id, *state, error.as_deref())?;
        }
        Ok(next)
    }

    /// Writes down how a vm ended, if it has said so; one made with `--rm` goes, unless it never came up. Nobody else may
    /// act on the vm.
    pub(crate) async fn settle(&self, row: &VmRow, end: Option<&VmEnd>) -> anyhow::Result<()> {
        tracing::info!("vm {}: {}", row.name, end.map_or(LOST, |end| &end.detail));
        match self.note(row, end.map_or(Happening::Lost, Happening::Ended))? {
            Next::Goes => self.release(row).await,
            Next::Stays | Next::Becomes(..) => Ok(()),
        }
    }

    /// Removes a vm, whatever it is doing.
    pub(crate) async fn remove(self: &Arc<Self>, row: &VmRow) -> anyhow::Result<()> {
        let alone = self.alone(row).await;
        self.release_whole(row.clone(), alone).await
    }

    /// Removes a vm that nobody else acts on, to the end, also when whoever asked for it leaves.
    async fn release_whole(
        self: &Arc<Self>,
        row: VmRow,
        alone: tokio::sync::OwnedMutexGuard<()>,
    ) -> anyhow::Result<()> {
        let daemon = Arc::clone(self);
        let removing = async move {
            let _alone = alone;
            daemon.release(&row).await
        };
        tokio::spawn(removing).await.context("remove the vm")?
    }

    /// The one way a vm goes: ended if it runs, its files, its row. Can be repeated. Nobody else may act on the vm.
    async fn release(&self, row: &VmRow) -> anyhow::Result<()> {
        let dir = self.paths.vm(row.id.as_str());
        vmsock::end(&dir).await?;
        cgroup::remove_of(&dir).await;
        // CRASH: files without a row are removed at the next start; a row is only ever deleted after its files.
        self.leave(row)?;
        for dir in [self.paths.workspace(row.id.as_str()), dir] {
            let place = dir.clone();
            // A large disk takes a while to go.
            let removed = banger_image::blocking::start(move || std::fs::remove_dir_all(place)).await?;
            match removed {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("remove `{}`", dir.display()));
                }
                _ => {}
            }
        }
        self.store.delete_vm(&row.id)
    }

    /// Ends a vm; its state says so when this returns.
    pub(crate) async fn stop(
        &self,
        reference: &str,
        request: VmRequest,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<Outcome> {
        let row = self.row(reference)?;
        let _alone = self.alone(&row).await;
        let dir = self.paths.vm(row.id.as_str());
        if !vmsock::is_alive(&dir) {
            return Ok(Outcome::Vm(self.view(&row)));
        }
        let grace = match &request {
            VmRequest::Stop { grace_ms } => Some(Duration::from_millis(*grace_ms)),
            _ => None,
        };
        let mut connection = vmsock::connect_new(&dir).await?;
        connection.request(request).await?;
        let ended = async {
            while let Ok(Some(event)) = connection.event().await {
                if let VmEvent::Ended(end) = event {
                    return Some(end);
                }
            }
            None
        };
        let ended = tokio::time::timeout(grace.unwrap_or_default() + END_WAIT, ended).await.ok().flatten();
        vmsock::wait_gone(&dir).await;
        if vmsock::is_alive(&dir) {
            bail!("vm `{}` has not ended", row.name);
        }
        let end = ended.or_else(|| vmsock::load_end(&dir));
        if self.row(row.id.as_str()).is_ok() {
            self.settle(&row, end.as_ref()).await?;
        }
        match end {
            Some(end) if end.reason == EndReason::Failed => {
                bail!("vm `{}` did not end in order: {}", row.name, end.detail)
            }
            Some(end) if end.reason == EndReason::Killed && grace.is_some() => {
                let text = format!(
                    "vm `{}` did not shut down and was ended by force; it may have lost what it had not written to its disk",
                    row.name
                );
                let _ = events.send(Event::Warning { text });
            }
            _ => {}
        }
        Ok(Outcome::Done)
    }

    pub(crate) async fn delete(self: &Arc<Self>, reference: &str, force: bool) -> anyhow::Result<Outcome> {
        let row = self.row(reference)?;
        let alone = self.alone(&row).await;
        let alive = vmsock::is_alive(&self.paths.vm(row.id.as_str()));
        if !force && !state::allows(Wish::Delete, row.state, alive) {
            return Err(WireError::new(ErrorCode::Invalid, format!("vm `{}` is running", row.name))
                .hinted(format!(
                    "stop it with `banger vm stop {0}` first, or use `banger vm delete --force {0}`",
                    row.name
                ))
                .into());
        }
        self.release_whole(row, alone).await?;
        Ok(Outcome::Done)
    }

    /// Removes every vm that does not run. One whose boot failed counts as such, even if its VMM is still there.
    pub(crate) async fn prune(self: &Arc<Self>, dry_run: bool) -> anyhow::Result<Outcome> {
        let idle = |row: &VmRow| {
            state::allows(Wish::Prune, row.state, vmsock::is_alive(&self.paths.vm(row.id.as_str())))
        };
        let mut vms: Vec<VmView> = Vec::new();
        for row in self.store.vms()?.into_iter().filter(|row| idle(row)) {
            let alone = if dry_run { None } else { Some(self.alone(&row).await) };
            // What was idle may have been started while others went.
            let Ok(row) = self.row(row.id.as_str()) else { continue };
            if !idle(&row) {
                continue;
            }
            vms.push(self.view(&row));
            if let Some(alone) = alone {
                self.release_whole(row, alone).await?;
            }
        }
        let freed_bytes = vms.iter().map(|vm| vm.disk_used_bytes).sum();
        Ok(Outcome::Pruned(Pruned { vms, freed_bytes }))
    }
}

/// Waits until a boot is as far as it gets. None when the vm ended before.
async fn settled(phases: &mut Phases) -> Option<VmStatus> {
    let settled = phases.wait_for(|status: &Option<VmStatus>| {
        let phase = status.as_ref().map(|status| &status.phase);
        matches!(phase, Some(Phase::Ready | Phase::InitReady | Phase::Failed { .. }))
    });
    settled.await.ok().and_then(|status| status.clone())
}

fn unreachable(row: &VmRow, cause: &str) -> anyhow::Error {
    let mut error = WireError::new(ErrorCode::Unreachable, format!("could not start vm `{}`", row.name));
    error.causes.push(cause.to_owned());
    let name = &row.name;
    error
        .hinted(format!(
            "it was kept: `banger vm logs {name}`, `banger vm show {name}`, `banger vm delete --force {name}`"
        ))
        .into()
}
