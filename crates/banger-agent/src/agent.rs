//! The agent: greeting, configuration, then sessions until the end.

use crate::beside;
use crate::command::Defaults;
use crate::console::Console;
use crate::guest::{self, Failure};
use crate::init;
use crate::link::{self, Control, Incoming};
use crate::port::Port;
use crate::readiness::Readiness;
use crate::shutdown;
use banger_wire::frame::{Frame, Kind};
use banger_wire::guest::{
    GENERATION, GuestConfig, GuestMessage, Hello, HostMessage, InitMode, PORT_NAME, Timing, VSOCK_PORT,
};
use banger_wire::time::millis;
use rustix::process::{Pid, Signal};
use std::ffi::OsStr;
use std::io;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Time between two greetings while the host is silent; it may connect late.
const HELLO_EVERY: Duration = Duration::from_millis(250);
/// A clock that is off by more is stepped; less is left to the guest's own time keeping.
const CLOCK_STEP: Duration = Duration::from_secs(1);

/// Runs as the agent of a vm, started by process 1.
pub(crate) fn run_in_guest() -> io::Result<()> {
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    run(|| Port::open(PORT_NAME, VSOCK_PORT), true)
}

/// Runs against a Unix socket on an ordinary machine, without touching it: for tests of the protocol.
pub(crate) fn run_on_socket(path: &OsStr) -> io::Result<()> {
    run(|| Port::new(std::os::unix::net::UnixStream::connect(path)?.into(), true), false)
}

fn run(open: impl Fn() -> io::Result<Port>, in_guest: bool) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let (config, mut incoming, out) = loop {
            let (mut incoming, out) = link::open(open()?);
            match greet(&mut incoming, &out).await {
                Ok(Some(config)) => break (config, incoming, out),
                // A vsock loses its connections when the machine is saved and goes on elsewhere. A host that has gone
                // takes none, which ends this.
                Ok(None) | Err(_) if in_guest => {}
                ended => return ended.map(drop),
            }
        };
        let started = Instant::now();
        match if in_guest { become_vm(&config) } else { Ok((None, Vec::new())) } {
            Err(Failure { stage, message }) => {
                link::send(&out, &GuestMessage::ConfigureFailed { stage: stage.to_owned(), message }).await;
            }
            Ok((starting, warnings)) => {
                let ms = millis(started.elapsed());
                let timings = vec![Timing { stage: "configure guest".to_owned(), ms }];
                let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
                link::send(&out, &GuestMessage::Configured { boot_id, timings, warnings }).await;
                report_init(starting, out.clone());
            }
        }
        // What has to be whole at the end: the vm's disk, or the image it finishes.
        let image_is_written = matches!(config.init, InitMode::Build | InitMode::Handover);
        let written = match (image_is_written, in_guest) {
            (true, _) => vec![config.drives.image.clone()],
            (false, true) => config.drives.written(),
            (false, false) => Vec::new(),
        };
        let image = in_guest.then(|| (config.drives.image.clone(), config.drives.image_fs.clone()));
        let defaults =
            Defaults { env: config.env, workdir: config.workdir, user: config.user, in_guest, image };
        link::serve(
            &mut incoming,
            &out,
            &defaults,
            &mut Local { in_guest, written, console: Console::new(defaults.clone(), in_guest) },
        )
        .await
    })
}

/// Says that the image's init is up; at once where there is none, or none that would say so.
fn report_init(starting: Option<Readiness>, out: mpsc::Sender<Frame>) {
    tokio::task::spawn_local(async move {
        let failed = match starting {
            Some(readiness) => readiness.ready().await.err(),
            None => None,
        };
        match failed {
            None => link::send(&out, &GuestMessage::InitReady).await,
            Some(error) => init::log(&format!("listen to the init: {error}, ignoring")),
        }
    });
}

/// Says hello until the host configures this guest, and at once when it is asked. None when the stream ended.
///
/// The guest's memory may be saved here and restored many times, so nothing random may be drawn and kept before the
/// configuration has brought new random bytes; the kernel's boot id, made when it is first read, is such a thing.
async fn greet(incoming: &mut Incoming, out: &mpsc::Sender<Frame>) -> io::Result<Option<GuestConfig>> {
    let hello = GuestMessage::Hello(hello()?);
    let mut again = tokio::time::interval(HELLO_EVERY);
    let port = incoming.port();
    loop {
        tokio::select! {
            () = port.broken() => return Err(io::ErrorKind::ConnectionReset.into()),
            _ = again.tick() => if let Ok(frame) = Frame::message(0, &hello) {
                // A full queue means that nobody reads; the next tick tries again.
                if let Err(mpsc::error::TrySendError::Closed(_)) = out.try_send(frame) {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
            },
            frame = incoming.next() => match frame? {
                None => return Ok(None),
                Some(frame) if frame.session == 0 && frame.kind == Kind::Message => {
                    match frame.parse() {
                        Ok(HostMessage::Configure(config)) => return Ok(Some(*config)),
                        Ok(HostMessage::Ping { .. }) => again.reset_immediately(),
                        _ => {}
                    }
                }
                Some(_) => {}
            },
        }
    }
}

fn hello() -> io::Result<Hello> {
    let uptime = std::fs::read_to_string("/proc/uptime")?;
    let seconds: f64 = uptime.split(' ').next().and_then(|text| text.parse().ok()).unwrap_or(0.0);
    Ok(Hello {
        generation: GENERATION,
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        uptime_ms: (seconds * 1000.0) as u64,
        timings: Vec::new(),
    })
}

/// Assembles the root, lets process 1 take it over, and follows it there. Returns where an init that reports does so, and
/// what could not be done.
fn become_vm(config: &GuestConfig) -> Result<(Option<Readiness>, Vec<String>), Failure> {
    if config.init == InitMode::Handover {
        return guest::configure_handover(config).map(|()| (None, Vec::new()));
    }
    let (init, warnings) = guest::configure(config)?;
    let enter = || -> io::Result<Option<Readiness>> {
        // Opened before process 1 moves it: the move changes the name, not what this names.
        let root = rustix::fs::open(
            init::NEW_ROOT,
            rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )?;
        rustix::process::fchdir(&root)?;
        rustix::process::chroot(".")?;
        let reports = init.as_ref().is_some_and(|init| init.is_systemd);
        let readiness = if reports { Some(Readiness::listen()?) } else { None };
        init::give_order(init.as_ref().map(|init| init.path.as_path()))?;
        Ok(readiness)
    };
    let readiness = enter().map_err(|error| Failure { stage: "enter root", message: error.to_string() })?;
    Ok((readiness, warnings))
}

/// Control messages that concern the guest as a whole.
struct Local {
    in_guest: bool,
    /// The devices of the filesystems that are written to.
    written: Vec<String>,
    console: Console,
}

impl Control for Local {
    fn control(&mut self, message: HostMessage, out: &mpsc::Sender<Frame>) {
        match message {
            HostMessage::Ping { seq } => reply(out, GuestMessage::Pong { seq }),
            HostMessage::Heartbeat { unix_ns } if self.in_guest => {
                let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
                let now = Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0));
                if now.abs_diff(Duration::from_nanos(unix_ns)) > CLOCK_STEP {
                    let _ = guest::set_clock(unix_ns);
                }
            }
            HostMessage::Sync => {
                let out = out.clone();
                tokio::task::spawn_local(async move {
                    // Blocks for as long as the disk needs; sessions go on meanwhile.
                    beside::finish(rustix::fs::sync).await;
                    link::send(&out, &GuestMessage::Synced).await;
                });
            }
            HostMessage::Shutdown { reboot } if self.in_guest => {
                shut_down(reboot, self.written.clone(), out.clone());
            }
            HostMessage::Signal { number } if self.in_guest => match Signal::from_named_raw(number) {
                Some(Signal::INT | Signal::QUIT | Signal::TERM | Signal::POWER) => {
                    shut_down(false, self.written.clone(), out.clone());
                }
                Some(signal) => drop(rustix::process::kill_process(Pid::INIT, signal)),
                None => {}
            },
            HostMessage::Console { size } if self.in_guest => self.console.attach(size),
            _ => {}
        }
    }
}

fn reply(out: &mpsc::Sender<Frame>, message: GuestMessage) {
    let out = out.clone();
    tokio::task::spawn_local(async move { link::send(&out, &message).await });
}

/// Writes everything to the disk, then leaves the rest to systemd where it is process 1, or ends the machine.
fn shut_down(reboot: bool, disks: Vec<String>, out: mpsc::Sender<Frame>) {
    tokio::task::spawn_local(async move {
        beside::finish(rustix::fs::sync).await;
        link::send(&out, &GuestMessage::GoingDown { reboot }).await;
        let systemd = std::path::Path::new("/run/systemd/private").exists();
        if systemd {
            let unit = if reboot { "reboot" } else { "poweroff" };
            let asked = banger_sys::child::command("systemctl".as_ref()).args(["--no-block", unit]).status();
            if asked.is_ok_and(|status| status.success()) {
                return;
            }
        }
        beside::finish(move || shutdown::power_off(reboot, &disks)).await;
    });
}
