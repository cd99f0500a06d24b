//! Checks of the machine, first version: what has to be there for a vm to boot, then a boot.

use crate::daemon::Daemon;
use banger_wire::daemon::{Check, Event, Outcome, Verdict, VmSpec};
use std::sync::Arc;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

/// Runs all checks; each is an event.
pub(crate) async fn run(daemon: &Arc<Daemon>, events: &UnboundedSender<Event>) -> anyhow::Result<Outcome> {
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
    report("network", Verdict::Warn, "vms have no outbound network yet".to_owned(), None);
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
    let row = daemon.create(&spec, &quiet).await?;
    match daemon.start(&row, spec.wait, &quiet).await {
        Ok(started) => {
            let stages: Vec<String> =
                started.timings.iter().map(|timing| format!("{} {} ms", timing.stage, timing.ms)).collect();
            report("boot", Verdict::Pass, format!("`{}` in {}", image.name, stages.join(", ")), None);
        }
        Err(error) => report("boot", Verdict::Fail, format!("{error:#}"), Some("banger daemon logs")),
    }
    daemon.release(&row).await?;
    Ok(Outcome::Done)
}
