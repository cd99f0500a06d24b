//! Checks of the machine, first version: what has to be there for a vm to boot, then a boot.

use crate::daemon::Daemon;
use crate::net::{self, host, nft, pasta::PastaPlan};
use crate::store::VmRow;
use crate::supervise::confine;
use anyhow::Context as _;
use banger_wire::daemon::{Check, Event, Outcome, Verdict, VmSpec, VmState};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

/// Runs all checks; each is an event. Tells of the vm that it makes.
pub(crate) async fn run(
    daemon: &Arc<Daemon>,
    events: &UnboundedSender<Event>,
    made: &(dyn Fn(VmRow) + Send + Sync),
) -> anyhow::Result<Outcome> {
    let report = |name: &str, verdict, detail: String, hint: Option<&str>| {
        let check = Check { name: name.to_owned(), verdict, detail, hint: hint.map(str::to_owned) };
        let _ = events.send(Event::Check(check));
    };
    match daemon.qemu() {
        Ok(path) => report("qemu", Verdict::Pass, path.display().to_string(), None),
        Err(error) => {
            let hint = "sudo apt-get install qemu-system-x86";
            report("qemu", Verdict::Fail, format!("{error:#}"), Some(hint));
            return Ok(Outcome::Done);
        }
    }
    report("acceleration", Verdict::Warn, "software emulation; KVM is not used yet".to_owned(), None);
    let (landlock, detail) = confine::summary();
    let hint = "boot a kernel with Landlock, and name it in the kernel's `lsm=` option if there is one";
    let (verdict, hint) = if landlock { (Verdict::Pass, None) } else { (Verdict::Warn, Some(hint)) };
    report("confinement", verdict, detail, hint);
    for check in network() {
        let _ = events.send(Event::Check(check));
    }
    let kernels = daemon.store.kernels()?.len();
    let images = daemon.store.images()?;
    let Some(image) = images.iter().find(|image| image.name.ends_with("-slim")).or(images.first()) else {
        let detail = format!("{kernels} kernels, no image here yet");
        report("boot", Verdict::Warn, detail, Some("banger image pull debian-bookworm-slim"));
        return Ok(Outcome::Done);
    };
    let spec = VmSpec { image: Some(image.name.clone()), rm: true, ..VmSpec::default() };
    // Its steps are no news to somebody who asked for checks.
    let (quiet, _queue) = unbounded_channel();
    let row = daemon.create(&spec, VmState::Starting, &quiet).await?;
    made(row.clone());
    match daemon.start(&row, spec.wait, &quiet).await {
        Ok(started) => {
            let stages: Vec<String> =
                started.timings.iter().map(|timing| format!("{} {} ms", timing.stage, timing.ms)).collect();
            report("boot", Verdict::Pass, format!("`{}` in {}", image.name, stages.join(", ")), None);
        }
        Err(error) => report("boot", Verdict::Fail, format!("{error:#}"), Some("banger daemon logs")),
    }
    daemon.remove(&row).await?;
    Ok(Outcome::Done)
}

/// What a vm needs to reach the network. Without one of these it boots all the same, cut off.
fn network() -> Vec<Check> {
    let check = |name: &str, result: anyhow::Result<String>, hint: &str| {
        let (verdict, detail, hint) = match result {
            Ok(detail) => (Verdict::Pass, detail, None),
            Err(error) => (Verdict::Warn, format!("{error:#}"), Some(hint.to_owned())),
        };
        Check { name: name.to_owned(), verdict, detail, hint }
    };
    let missing = |name: &str| anyhow::anyhow!("`{name}` is not installed");
    let (pasta_hint, nft_hint) = ("sudo apt-get install passt", "sudo apt-get install nftables");
    vec![
        check("tap devices", tap_devices(), "sudo modprobe tun && sudo chmod 0666 /dev/net/tun"),
        check("pasta", net::program("pasta").ok_or_else(|| missing("pasta")).and_then(usable), pasta_hint),
        check("nft", net::program("nft").ok_or_else(|| missing("nft")).and_then(filters), nft_hint),
        check("route", default_route(), "ip route show default"),
    ]
}

fn tap_devices() -> anyhow::Result<String> {
    let path = "/dev/net/tun";
    std::fs::File::options().read(true).write(true).open(path).with_context(|| format!("open `{path}`"))?;
    Ok(format!("`{path}` can be opened"))
}

fn usable(program: PathBuf) -> anyhow::Result<String> {
    let plan = PastaPlan::probe(program);
    let version = plan.version();
    plan.args.with_context(|| format!("`{version}` lacks options that vms need"))?;
    Ok(format!("{}, {version}", plan.program.display()))
}

fn filters(program: PathBuf) -> anyhow::Result<String> {
    nft::try_out(&program)?;
    Ok(format!("{}, took the policy in a namespace of its own", program.display()))
}

fn default_route() -> anyhow::Result<String> {
    let host = host::read()?;
    anyhow::ensure!(host.has_default_route, "this machine has no default route");
    Ok(format!("there is one; {} networks of this machine are out of vms' reach", host.nets.len()))
}
