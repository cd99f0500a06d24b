//! The life of one vm: boot, watch, end.

use super::console::{Console, HaltWatch};
use super::link::{Link, Source};
use super::machine::Started;
use super::monitor::Monitor;
use super::net::starter::Starter;
use super::net::{self, Child, Network, State};
use super::ports::Ports;
use super::terminal::Terminal;
use super::{client, confine, counters, machine, root};
use crate::plan::{
    CONSOLE_FILE, SAVED_FILE, SAVED_INSIDE, SOCKET_FILE, STATE_FILE, STATE_INSIDE, Start, VmPlan,
};
use anyhow::{Context as _, bail};
use banger_sys::sock_diag::SockDiag;
use banger_vmm::qmp::Event;
use banger_vmm::{Control, Counters, Driver, MachinePlan, Saved, firecracker};
use banger_wire::bytes::ByteString;
use banger_wire::guest::{GuestMessage, HEARTBEAT_MS, HostMessage, Timing};
use banger_wire::ports::VmPorts;
use banger_wire::time::millis;
use banger_wire::vm::{EndReason, Phase, VmEnd, VmStatus, VmUse};
use std::cell::RefCell;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::Path;
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixListener;
use tokio::net::unix::pipe::Receiver;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

/// A boot with no word from console or agent for this long is started again; nothing can have been written yet.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// How long a machine may take to be saved.
const SAVE_TIME: Duration = Duration::from_secs(60);
/// How a kernel begins to say that it can't go on.
const PANIC: &str = "Kernel panic";
/// How often a boot that comes to nothing is started again.
const RESTARTS_MAX: u32 = 3;

/// Warnings of a guest that are passed on, and characters of each.
const WARNINGS_MAX: usize = 4;
const WARNING_LEN_MAX: usize = 300;

/// How often a vm that waits for room on the host's disk tries again.
const RESUME_EVERY: Duration = Duration::from_secs(5);

/// What a vm that nobody uses gets to stop in order.
const IDLE_GRACE_MS: u64 = 30_000;
/// The same when the host goes down; whoever ends its processes gives them 90 s as a rule.
const TERM_GRACE_MS: u64 = 30_000;
/// How long a vm that is ended by force may take to put what is in its caches on the disk. Its own disk goes, or may have
/// lost what was not synced; a cache is the next vm's.
const FLUSH_TIME: Duration = Duration::from_secs(10);

/// A vm that is to live as long as its client's connection ends when none comes: the client died before it could open
/// it. Longer than a client waits for the image's init.
const LEASE_TIME: Duration = Duration::from_secs(180);

/// What clients want of the vm.
#[derive(Debug)]
pub(crate) enum Order {
    Stop { grace_ms: u64 },
    Kill,
    LeaseEnded,
    Use(oneshot::Sender<VmUse>),
}

/// What connections see of the vm.
pub(crate) struct Shared {
    pub(crate) status: watch::Sender<VmStatus>,
    pub(crate) end: watch::Sender<Option<VmEnd>>,
    pub(crate) orders: mpsc::Sender<Order>,
    /// How many connections use the vm; see [`Shared::use_it`].
    pub(crate) sessions: watch::Sender<usize>,
    pub(crate) link: RefCell<Option<Link>>,
    pub(crate) started_by_root: bool,
    pub(crate) terminal: Terminal,
    pub(crate) ports: RefCell<VmPorts>,
    /// What is wanted of the network.
    pub(crate) net: mpsc::Sender<net::Order>,
}

/// A connection that uses the vm, as long as this lives.
pub(crate) struct InUse(Rc<Shared>);

impl Shared {
    /// Keeps the vm from stopping by itself.
    pub(crate) fn use_it(self: &Rc<Self>) -> InUse {
        self.sessions.send_modify(|count| *count += 1);
        InUse(Rc::clone(self))
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.sessions.send_modify(|count| *count -= 1);
    }
}

/// Why a VMM's time was over.
enum Outcome {
    End(VmEnd),
    /// The boot came to nothing, and another one may do better: nothing was heard of it, or its kernel gave up before the
    /// guest could write. Emulated processors under load do that now and then.
    Fruitless,
    /// The guest rebooted.
    Again,
}

/// Boots the vm and stays until it has ended. The VMM gets the descriptors `kept`; `dir` is that of its network of vms.
pub(crate) async fn run(
    plan: &VmPlan,
    kept: &[RawFd],
    starter: Option<Starter>,
    diag: Option<SockDiag>,
    dir: Option<std::io::Result<OwnedFd>>,
) -> anyhow::Result<VmEnd> {
    let started = Instant::now();
    let (orders, mut order_queue) = mpsc::channel(16);
    let status = VmStatus {
        phase: Phase::Preparing,
        vmm_pid: None,
        hello: None,
        boot_id: None,
        timings: Vec::new(),
        watchdog_restarts: 0,
        network_warning: None,
        member_warning: None,
        guest_warnings: Vec::new(),
        paused: None,
        leased: false,
        auto_stop_at: None,
        address: None,
    };
    let net_orders = mpsc::channel(net::ORDERS_MAX);
    let shared = Rc::new(Shared {
        status: watch::channel(status).0,
        end: watch::channel(None).0,
        orders,
        sessions: watch::channel(0).0,
        link: RefCell::new(None),
        started_by_root: plan.run_as.is_some(),
        terminal: Terminal::default(),
        ports: RefCell::default(),
        net: net_orders.0.clone(),
    });
    let socket = Path::new(root::VM_DIR).join(SOCKET_FILE);
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).context("listen on the vm's socket")?;
    tokio::task::spawn_local(client::serve(listener, shared.clone()));
    let mut terminated = signal(SignalKind::terminate()).context("listen for signals")?;
    let orders = shared.orders.clone();
    tokio::task::spawn_local(async move {
        while terminated.recv().await.is_some() {
            let _ = orders.send(Order::Stop { grace_ms: TERM_GRACE_MS }).await;
        }
    });
    let is_alone = plan.run_as.is_none();
    let network = Network::create(&plan.net, plan.machine.driver, starter, net_orders, dir, is_alone).await?;
    confine::supervisor(plan, &network.thread).await?;
    if let Some(ports) = &plan.ports {
        let ports = Ports::open(ports, diag).await?;
        shared.status.send_modify(|status| status.address = ports.address());
        tokio::task::spawn_local(ports.serve(shared.clone()));
    }
    let mut life = Life {
        plan,
        kept,
        shared: shared.clone(),
        network_state: network.subscribe(),
        network,
        network_told: false,
        started,
        may_restore: plan.start == Start::Restore,
        restored: false,
        rebooted: false,
        asked_for_use: Vec::new(),
        configured: false,
        init_ready: false,
        stop_reason: None,
        was_idle: false,
        flushes: false,
    };
    life.stage("make network");
    let end = loop {
        match life.boot(&mut order_queue).await? {
            Outcome::End(end) => break end,
            Outcome::Fruitless => {
                // What the saved machine is good for has been seen.
                life.may_restore = false;
                shared.status.send_modify(|status| {
                    status.watchdog_restarts += 1;
                    status.hello = None;
                });
            }
            Outcome::Again => {
                life.started = Instant::now();
                life.rebooted = true;
                (life.configured, life.init_ready) = (false, false);
                shared.status.send_modify(|status| {
                    status.phase = Phase::Preparing;
                    status.hello = None;
                    status.boot_id = None;
                    status.timings.clear();
                    status.watchdog_restarts = 0;
                });
            }
        }
    };
    let _ = shared.end.send(Some(end.clone()));
    // Connections that watch get the word out; there is nothing else to wait for.
    tokio::time::sleep(Duration::from_millis(10)).await;
    Ok(end)
}

/// A VMM that was started.
struct Vmm {
    process: Child,
    agent: Source,
    control: Control,
    /// What it counts into.
    counters: Option<Receiver>,
    console: Rc<RefCell<Console>>,
    reading: JoinHandle<std::io::Result<()>>,
    /// The console has said something.
    hears: watch::Receiver<()>,
    /// The console says that the guest stands still.
    halted: watch::Receiver<bool>,
}

struct Life<'a> {
    plan: &'a VmPlan,
    /// Locked files, which each VMM keeps.
    kept: &'a [RawFd],
    shared: Rc<Shared>,
    network: Network,
    network_state: watch::Receiver<State>,
    /// The network's part of the timings has been told.
    network_told: bool,
    started: Instant,
    /// The next VMM goes on from the saved machine.
    may_restore: bool,
    /// This VMM does.
    restored: bool,
    /// It is not the first boot that got somewhere.
    rebooted: bool,
    /// Who waits to hear what the machine has used.
    asked_for_use: Vec<oneshot::Sender<VmUse>>,
    /// The guest has configured itself; it is ready once the network is settled too.
    configured: bool,
    /// The image's init has reported that it is done.
    init_ready: bool,
    stop_reason: Option<EndReason>,
    /// The order to stop was the vm's own: nobody used it.
    was_idle: bool,
    /// It ends as soon as its caches are on the disk.
    flushes: bool,
}

impl Life<'_> {
    /// Starts the VMM.
    async fn start_vmm(&mut self) -> anyhow::Result<Vmm> {
        let (saved, saved_file) = self.saved().unzip();
        self.restored = saved.is_some();
        if self.plan.start == Start::Save {
            self.make_saved_files().context("make the files for the machine")?;
        }
        let saved_file = saved_file.flatten();
        let saved_fd = saved_file.as_ref().map(File::as_raw_fd);
        let machine = MachinePlan { saved, ..self.network.machine(&self.plan.machine) };
        let launch = banger_vmm::launch(&machine);
        machine::prepare(&launch).context("make the VMM's files")?;
        let counters = launch.counters.as_deref().map(counters::open).transpose();
        let counters = counters.context("make the pipe that the VMM counts into")?;
        let agent = Source::new(launch.agent.clone()).context("listen for the agent")?;
        let keep = self.network.tap().into_iter().chain(self.kept.iter().copied()).chain(saved_fd).collect();
        let confinement = confine::vmm(self.plan)?;
        let started = machine::start(&launch, keep, confinement, &self.network.thread).await?;
        let Started { process, output, input } = started;
        self.shared.status.send_modify(|status| {
            status.phase = Phase::Booting;
            status.vmm_pid = Some(process.pid());
        });
        // Not before the VMM: the guest takes longer to boot than the rest of the network to be made.
        self.network.raise();
        self.network_state.mark_changed();
        self.stage("start vmm");
        let (heard, hears) = watch::channel(());
        let (halts, halted) = watch::channel(false);
        let console = Rc::new(RefCell::new(Console::create(&Path::new(root::VM_DIR).join(CONSOLE_FILE))?));
        self.shared.terminal.connect(console.clone(), input)?;
        let read = read_console(output, self.shared.clone(), console.clone(), heard, halts);
        let reading = tokio::task::spawn_local(read);
        Ok(Vmm { process, agent, control: launch.control, counters, console, reading, hears, halted })
    }

    /// Starts the VMM once and stays with it until it has ended.
    async fn boot(&mut self, orders: &mut mpsc::Receiver<Order>) -> anyhow::Result<Outcome> {
        let started = self.start_vmm().await?;
        let Vmm { process: mut vmm, console, reading, mut hears, mut halted, .. } = started;
        let driver = self.plan.machine.driver;
        let (link, mut messages) = Link::through(started.agent);
        if self.restored {
            // It spoke before it was saved; it is asked to do so again.
            link.control_later(&HostMessage::Ping { seq: 0 });
        }
        let connecting = Monitor::connect(&started.control, started.counters);
        tokio::pin!(connecting);
        let connected = loop {
            tokio::select! {
                monitor = &mut connecting => break monitor.inspect_err(log).ok(),
                _ = vmm.ended() => break None,
                Some(order) = orders.recv() => drop(self.order(order, &link, &vmm)),
            }
        };
        let Some(mut monitor) = connected else {
            vmm.kill();
            // Of one that did not end by itself there is no code.
            let status = vmm.ended().await.filter(|status| status.code().is_some_and(|code| code != 0));
            let _ = reading.await;
            let console = console.borrow();
            let is_wanted = self.stop_reason.is_some();
            return Ok(if is_wanted {
                self.ended(&console, false, None)
            } else {
                self.vmm_failed(&console, status)
            });
        };
        let mut resume_at = None;
        let mut reset = false;
        let boot_deadline = self.started + Duration::from_millis(self.plan.boot_timeout_ms);
        let mut silence = tokio::time::Instant::now() + SILENCE_MAX;
        let mut spoken = false;
        let mut kill_at: Option<tokio::time::Instant> = None;
        let mut lease_at = None;
        let mut sessions = self.shared.sessions.subscribe();
        let mut idle_at = None;
        let mut heartbeat = tokio::time::interval(Duration::from_millis(HEARTBEAT_MS));
        loop {
            let ready = self.is_ready();
            if ready && self.plan.lease && lease_at.is_none() {
                lease_at = Some(tokio::time::Instant::now() + LEASE_TIME);
            }
            let used = !ready || *sessions.borrow_and_update() > 0;
            idle_at = self.idle_at(used, idle_at);
            let leased = self.shared.status.borrow().leased;
            let restarts = self.shared.status.borrow().watchdog_restarts;
            tokio::select! {
                status = vmm.ended() => {
                    let _ = reading.await;
                    *self.shared.link.borrow_mut() = None;
                    while let Some(event) = monitor.rest().await {
                        reset |= event == Event::Reset;
                    }
                    let off = *halted.borrow();
                    // The one way in which Firecracker ends with success.
                    reset |= driver == Driver::Firecracker && status.is_some_and(|status| status.success());
                    let failed = status.filter(|status| !status.success() && !off);
                    return Ok(self.ended(&console.borrow(), reset, failed));
                }
                Some(event) = monitor.next() => match event {
                    Event::NoSpace => {
                        let text = "the host's disk is full; the vm goes on when there is room";
                        self.shared.status.send_modify(|status| status.paused = Some(text.to_owned()));
                        resume_at = Some(tokio::time::Instant::now() + RESUME_EVERY);
                    }
                    Event::Resumed => self.shared.status.send_modify(|status| status.paused = None),
                    Event::Reset => reset = true,
                    Event::Counted(counted) => self.tell_use(counted, &vmm).await,
                    Event::Saved | Event::Refused(_) => {}
                },
                () = sleep_until(resume_at), if resume_at.is_some() => {
                    resume_at = None;
                    monitor.resume().await;
                }
                // Nothing runs in there any more; QEMU has ended by itself then.
                Ok(()) = halted.changed(), if driver == Driver::Firecracker => vmm.kill(),
                changed = hears.changed(), if !spoken => {
                    // The console's own end shows as the VMM's.
                    if changed.is_ok() { spoken = true } else { silence += SILENCE_MAX }
                }
                Some(message) = messages.recv() => {
                    spoken = true;
                    if self.plan.start == Start::Save && matches!(message, GuestMessage::Hello(_)) {
                        let end = self.save(&mut monitor).await?;
                        vmm.kill();
                        let _ = vmm.ended().await;
                        return Ok(Outcome::End(end));
                    }
                    if self.flushes && message == GuestMessage::Synced {
                        vmm.kill();
                    }
                    self.message(message, &link);
                }
                // However short the session was, the time begins anew.
                Ok(()) = sessions.changed() => idle_at = None,
                () = sleep_until(idle_at), if idle_at.is_some() => {
                    self.was_idle = true;
                    kill_at = self.order(Order::Stop { grace_ms: IDLE_GRACE_MS }, &link, &vmm).or(kill_at);
                }
                Ok(()) = self.network_state.changed() => self.network_changed(),
                Some(order) = orders.recv() => {
                    if matches!(order, Order::Use(_)) {
                        monitor.count().await;
                    }
                    kill_at = self.order(order, &link, &vmm).or(kill_at);
                }
                () = tokio::time::sleep_until(silence), if !spoken && restarts < RESTARTS_MAX => {
                    vmm.kill();
                    let _ = vmm.ended().await;
                    return Ok(Outcome::Fruitless);
                }
                () = tokio::time::sleep_until(boot_deadline.into()), if self.is_booting() => {
                    let waited = self.plan.boot_timeout_ms / 1000;
                    let last = console.borrow().last_line().unwrap_or_else(|| "nothing".to_owned());
                    self.fail("agent silent", format!("no word from the guest's agent for {waited} s; last on the console: {last}"));
                }
                () = sleep_until(kill_at), if kill_at.is_some() => {
                    self.stop_reason = Some(EndReason::Killed);
                    kill_at = None;
                    vmm.kill();
                }
                () = sleep_until(lease_at), if lease_at.is_some() && !leased => {
                    kill_at = self.order(Order::LeaseEnded, &link, &vmm).or(kill_at);
                }
                _ = heartbeat.tick(), if ready => link.control_now(&HostMessage::Heartbeat { unix_ns: unix_ns() }),
            }
        }
    }

    /// The machine to go on from, if it fits the network that could be made, and the file that the VMM has to inherit.
    fn saved(&self) -> Option<(Saved, Option<File>)> {
        if !self.may_restore || !self.has_its_link() {
            return None;
        }
        let memory = File::open(SAVED_INSIDE).ok()?;
        Some(match self.plan.machine.driver {
            Driver::Qemu => (Saved::Open(memory.as_raw_fd()), Some(memory)),
            Driver::Firecracker => {
                (Saved::Files { memory: SAVED_INSIDE.into(), state: STATE_INSIDE.into() }, None)
            }
        })
    }

    /// The guest has a network device when it is to have one.
    fn has_its_link(&self) -> bool {
        self.network.has_link() == self.plan.guest.network.is_some()
    }

    /// The VMM may write no others, and finds out what it may write when it starts.
    fn make_saved_files(&self) -> anyhow::Result<()> {
        if !self.has_its_link() {
            bail!("its network device could not be made");
        }
        for name in [SAVED_FILE, STATE_FILE] {
            File::create(Path::new(root::VM_DIR).join(name))?;
        }
        Ok(())
    }

    /// Saves the machine.
    async fn save(&self, monitor: &mut Monitor) -> anyhow::Result<VmEnd> {
        let dir = Path::new(root::VM_DIR);
        let (memory, state) = (dir.join(SAVED_FILE), dir.join(STATE_FILE));
        let saved = monitor.save(&memory, &state);
        tokio::time::timeout(SAVE_TIME, saved).await.context("the machine was not saved in time")??;
        Ok(VmEnd { reason: EndReason::Stopped, detail: "saved".to_owned() })
    }

    /// Tells what the machine has used, with what it has counted itself.
    async fn tell_use(&mut self, counted: Counters, vmm: &Child) {
        if self.asked_for_use.is_empty() {
            return;
        }
        let (received, sent) = self.network.moved().await.unzip();
        let memory = std::fs::read_to_string(format!("/proc/{}/status", vmm.pid())).ok();
        let memory = memory.and_then(|status| {
            let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
            Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
        });
        let used = VmUse { read: Some(counted.read), written: Some(counted.written), sent, received, memory };
        for tell in self.asked_for_use.drain(..) {
            let _ = tell.send(used);
        }
    }

    fn is_ready(&self) -> bool {
        matches!(self.shared.status.borrow().phase, Phase::Ready | Phase::InitReady)
    }

    fn is_booting(&self) -> bool {
        matches!(self.shared.status.borrow().phase, Phase::Booting | Phase::Configuring)
    }

    fn message(&mut self, message: GuestMessage, link: &Link) {
        match message {
            // Said again and again until the answer arrives; the answer is given to the first.
            GuestMessage::Hello(hello) if self.shared.status.borrow().hello.is_none() => {
                self.shared.status.send_modify(|status| {
                    status.phase = Phase::Configuring;
                    status.hello = Some(hello);
                });
                self.stage(if self.restored { "restore to agent" } else { "boot to agent" });
                let mut config = self.plan.guest.clone();
                config.unix_ns = unix_ns();
                if self.rebooted
                    && let Ok(fresh) = crate::pull::entropy()
                {
                    // With the plan's it would draw the numbers of the boot before, where it goes on from the same machine.
                    config.entropy = ByteString(fresh);
                }
                if !self.network.has_link() {
                    config.network = None;
                }
                if !self.network.has_ipv6()
                    && let Some(network) = &mut config.network
                {
                    network.ipv6 = None;
                }
                link.control_later(&HostMessage::Configure(Box::new(config)));
            }
            GuestMessage::Configured { boot_id, warnings, .. } if self.is_booting() => {
                let printable = |text: String| text.escape_debug().take(WARNING_LEN_MAX).collect();
                let warnings = warnings.into_iter().take(WARNINGS_MAX).map(printable).collect();
                self.shared.status.send_modify(|status| {
                    status.boot_id = Some(boot_id);
                    status.guest_warnings = warnings;
                });
                *self.shared.link.borrow_mut() = Some(link.clone());
                self.stage("configure guest");
                self.configured = true;
                self.become_ready();
            }
            GuestMessage::ConfigureFailed { stage, message } => {
                let printable = |text: &str| text.escape_debug().take(300).collect::<String>();
                self.fail(&printable(&stage), printable(&message));
            }
            GuestMessage::InitReady => {
                self.init_ready = true;
                if self.is_ready() {
                    self.shared.status.send_modify(|status| status.phase = Phase::InitReady);
                }
            }
            _ => {}
        }
    }

    fn network_changed(&mut self) {
        let state = self.network_state.borrow_and_update().clone();
        let settled = state.settled;
        self.shared.status.send_if_modified(|status| {
            let told = (&status.network_warning, &status.member_warning);
            let changed = told != (&state.warning, &state.member_warning);
            (status.network_warning, status.member_warning) = (state.warning, state.member_warning);
            changed
        });
        if settled {
            if !self.network_told {
                self.network_told = true;
                self.stage("network");
            }
            self.become_ready();
        }
    }

    /// Sessions can be opened once guest and network are as far as they get.
    fn become_ready(&self) {
        if self.configured && self.is_booting() && self.network_state.borrow().settled {
            let phase = if self.init_ready { Phase::InitReady } else { Phase::Ready };
            self.shared.status.send_modify(|status| status.phase = phase);
        }
    }

    /// Carries an order out; returns when the VMM has to be killed, if it then still runs.
    fn order(&mut self, order: Order, link: &Link, vmm: &Child) -> Option<tokio::time::Instant> {
        match order {
            Order::Stop { grace_ms } if self.is_ready() => {
                self.stop_reason = Some(EndReason::Stopped);
                self.shared.status.send_modify(|status| status.phase = Phase::Stopping);
                link.control_later(&HostMessage::Shutdown { reboot: false });
                Some(tokio::time::Instant::now() + Duration::from_millis(grace_ms))
            }
            Order::Use(tell) => {
                self.asked_for_use.push(tell);
                None
            }
            // Already on its way down: the first deadline holds.
            Order::Stop { .. } if self.stop_reason.is_some() => None,
            // On its way down already; the deadline holds.
            Order::LeaseEnded | Order::Kill if self.flushes => None,
            Order::LeaseEnded | Order::Kill if self.is_ready() && !self.plan.caches.is_empty() => {
                let ended = matches!(order, Order::LeaseEnded);
                self.stop_reason = Some(if ended { EndReason::LeaseEnded } else { EndReason::Killed });
                self.flushes = true;
                self.shared.status.send_modify(|status| status.phase = Phase::Stopping);
                link.control_later(&HostMessage::Sync);
                Some(tokio::time::Instant::now() + FLUSH_TIME)
            }
            Order::LeaseEnded => {
                self.stop_reason = Some(EndReason::LeaseEnded);
                vmm.kill();
                None
            }
            Order::Stop { .. } | Order::Kill => {
                self.stop_reason = Some(EndReason::Killed);
                vmm.kill();
                None
            }
        }
    }

    /// When the vm stops by itself: from when nobody uses it, that long. Says so in the status when it changes.
    fn idle_at(&self, used: bool, before: Option<tokio::time::Instant>) -> Option<tokio::time::Instant> {
        let after = self.plan.auto_stop_ms.map(Duration::from_millis).filter(|_| !used);
        let at = after.and_then(|after| before.or_else(|| tokio::time::Instant::now().checked_add(after)));
        self.shared.status.send_if_modified(|status| match (at, after) {
            (Some(_), Some(after)) if at != before => {
                status.auto_stop_at = SystemTime::now().checked_add(after).map(unix_s);
                true
            }
            (Some(_), _) => false,
            (None, _) => status.auto_stop_at.take().is_some(),
        });
        at
    }

    /// Before the agent speaks no disk has been mounted.
    fn may_try_again(&self) -> bool {
        let status = self.shared.status.borrow();
        status.hello.is_none() && status.watchdog_restarts < RESTARTS_MAX
    }

    fn stage(&self, name: &str) {
        let ms = millis(self.started.elapsed());
        self.shared.status.send_modify(|status| status.timings.push(Timing { stage: name.to_owned(), ms }));
    }

    /// The boot failed; the VMM stays for inspection.
    fn fail(&self, stage: &str, cause: String) {
        let stage = stage.to_owned();
        self.shared.status.send_modify(|status| status.phase = Phase::Failed { stage, cause });
    }

    /// What comes after the end of a VMM that was never spoken to.
    fn vmm_failed(&self, console: &Console, status: Option<ExitStatus>) -> Outcome {
        if self.restored && self.may_try_again() {
            return Outcome::Fruitless;
        }
        if console.last_line_with(PANIC).is_some() {
            // It was quicker than the connection to it.
            return self.ended(console, true, None);
        }
        if status.is_some() {
            return self.ended(console, false, status);
        }
        let last = self.last_words(console).unwrap_or_else(|| "it printed nothing".to_owned());
        Outcome::End(VmEnd { reason: EndReason::Failed, detail: format!("the VMM ended at once: {last}") })
    }

    /// What the VMM said last, or why it can't go on, when it says that earlier.
    fn last_words(&self, console: &Console) -> Option<String> {
        let complaint = match self.plan.machine.driver {
            Driver::Qemu => None,
            Driver::Firecracker => console.last_after(firecracker::COMPLAINT),
        };
        complaint.or_else(|| console.last_line())
    }

    /// How the VMM ended, with what its driver knows of that.
    fn status(&self, status: ExitStatus) -> String {
        let meaning = status.code().filter(|_| self.plan.machine.driver == Driver::Firecracker);
        match meaning.and_then(firecracker::exit_reason) {
            Some(meaning) => format!("{status} ({meaning})"),
            None => status.to_string(),
        }
    }

    /// What comes after the VMM's end.
    fn ended(&self, console: &Console, reset: bool, failed: Option<ExitStatus>) -> Outcome {
        let end = |reason, detail: &str| Outcome::End(VmEnd { reason, detail: detail.to_owned() });
        let panic = console.last_line_with(PANIC).filter(|_| reset);
        match self.stop_reason {
            None if self.restored && self.may_try_again() => Outcome::Fruitless,
            Some(EndReason::Stopped) | None if let Some(status) = failed => {
                let last = self.last_words(console).unwrap_or_else(|| "nothing".to_owned());
                let status = self.status(status);
                end(EndReason::Failed, &format!("the VMM ended with {status}; it said last: {last}"))
            }
            Some(EndReason::Stopped) if let Some(line) = panic => end(EndReason::Failed, &line),
            Some(EndReason::Stopped) if self.was_idle => end(EndReason::Stopped, "stopped: nobody used it"),
            Some(EndReason::Stopped) => end(EndReason::Stopped, "stopped"),
            Some(EndReason::LeaseEnded) => end(EndReason::LeaseEnded, "its command ended"),
            Some(reason) => end(reason, "ended by force"),
            None if panic.is_some() && self.may_try_again() => Outcome::Fruitless,
            None if let Some(line) = panic => end(EndReason::Failed, &line),
            None if self.is_ready() && reset => Outcome::Again,
            None if self.is_ready() => end(EndReason::PoweredOff, "powered off from inside"),
            None => {
                let last = console.last_line().unwrap_or_else(|| "nothing".to_owned());
                end(EndReason::Failed, &format!("the vm ended while it booted; last on the console: {last}"))
            }
        }
    }
}

/// A line for the supervisor's log.
fn log(error: &anyhow::Error) {
    let _ = writeln!(std::io::stderr(), "{error:#}");
}

async fn sleep_until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn unix_s(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Copies the console into its file and tells that there was something, and of a kernel's last line.
async fn read_console(
    output: OwnedFd,
    shared: Rc<Shared>,
    console: Rc<RefCell<Console>>,
    heard: watch::Sender<()>,
    halts: watch::Sender<bool>,
) -> std::io::Result<()> {
    let mut halt = HaltWatch::default();
    let mut output = tokio::net::unix::pipe::Receiver::from_owned_fd(output)?;
    let mut chunk = vec![0; 16 * 1024];
    loop {
        let len = output.read(&mut chunk).await?;
        if len == 0 {
            return Ok(());
        }
        heard.send_replace(());
        // What a full disk has no room for is lost; the guest would wait for it otherwise.
        let _ = console.borrow_mut().write(&chunk[..len]);
        shared.terminal.show(&chunk[..len]);
        if halt.sees(&chunk[..len]) {
            halts.send_replace(true);
        }
    }
}
