//! `doctor`: what of the machine helps vms and what hinders them, with the command that mends it here.
//!
//! ```text
//! [facts] gathered ── [checks], pure functions ── one event each ── last a vm that boots and runs a command
//! ```
//!
//! `--fix` mends first what takes no root: what crashes left, and what `setup` fetches.

pub(crate) mod apparmor;
pub(crate) mod checks;
pub(crate) mod distribution;
pub(crate) mod facts;
pub(crate) mod leftovers;
pub(crate) mod namespaces;
#[cfg(test)]
mod tests;

use crate::daemon::Daemon;
use crate::plan::CONSOLE_FILE;
use crate::store::VmRow;
use crate::{setup, vmsock};
use anyhow::bail;
use banger_wire::daemon::{Event, Outcome, VmSpec, VmState};
use banger_wire::doctor::{Check, SetupState, Verdict};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::{ExecSpec, ExitStatus};
use facts::Facts;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

/// Lines of a console that are quoted when a boot fails.
const CONSOLE_LINES: usize = 5;

/// Runs all checks; each is an event. Tells of the vm that it makes.
pub(crate) async fn run(
    daemon: &Arc<Daemon>,
    fix: bool,
    events: &UnboundedSender<Event>,
    made: &(dyn Fn(VmRow) + Send + Sync),
) -> anyhow::Result<Outcome> {
    let mended = if fix { mend(daemon, events).await? } else { Vec::new() };
    let facts = gather(daemon).await?;
    let mut blocking = Vec::new();
    for judge in checks::ALL {
        let mut check = judge(&facts);
        if let Some((_, what)) = mended.iter().find(|(name, _)| *name == check.name) {
            check.detail = format!("{}; {what}", check.detail);
        }
        if check.verdict == Verdict::Fail {
            blocking.push(format!("`{}`", check.name));
        }
        let _ = events.send(Event::Check(check));
    }
    let _ = events.send(Event::Step { label: "boot a vm".to_owned() });
    let _ = events.send(Event::Check(boot(daemon, &facts, &blocking, made).await));
    Ok(Outcome::Done)
}

/// Gathers the facts beside the daemon's other work: programs are asked for their versions.
pub(crate) async fn gather(daemon: &Arc<Daemon>) -> anyhow::Result<Facts> {
    let daemon = Arc::clone(daemon);
    Ok(banger_image::blocking::start(move || facts::gather(&daemon)).await?)
}

/// Mends what can be; returns the names of checks with what was done or what went wrong.
async fn mend(
    daemon: &Arc<Daemon>,
    events: &UnboundedSender<Event>,
) -> anyhow::Result<Vec<(String, String)>> {
    let mut mended = Vec::new();
    match leftovers::mend(daemon).await {
        Ok(0) => {}
        Ok(count) => mended.push(("leftovers".to_owned(), format!("{count} removed now"))),
        Err(error) => mended.push(("leftovers".to_owned(), reason(&error))),
    }
    let Outcome::Setup(items) = setup::run(daemon, false, None, events).await? else {
        bail!("setup gave an unexpected answer");
    };
    for item in items {
        match item.state {
            SetupState::Fetched => mended.push((item.name, "fetched now".to_owned())),
            SetupState::Failed => mended.push((item.name, item.detail)),
            _ => {}
        }
    }
    Ok(mended)
}

/// The last check: a vm is made, boots, runs a command and goes.
async fn boot(
    daemon: &Arc<Daemon>,
    facts: &Facts,
    blocking: &[String],
    made: &(dyn Fn(VmRow) + Send + Sync),
) -> Check {
    let check = |verdict, detail, hint: Option<&str>| Check {
        name: "boot".to_owned(),
        verdict,
        detail,
        hint: hint.map(str::to_owned),
    };
    if !blocking.is_empty() {
        return check(Verdict::Warn, format!("not tried: mend {} first", blocking.join(", ")), None);
    }
    let default = facts.images.iter().find(|image| **image == facts.default_image);
    let image = default.or_else(|| facts.images.iter().find(|image| image.ends_with("-slim")));
    let image = image.or(facts.images.first());
    let (Some(image), true) = (image, facts.kernels.contains(&facts.default_kernel)) else {
        let detail = "not tried: there is no image or no kernel yet".to_owned();
        return check(Verdict::Warn, detail, Some("banger setup"));
    };
    match try_boot(daemon, image, made).await {
        Ok(stages) => check(Verdict::Pass, format!("`{image}` in {stages}"), None),
        Err(failure) => check(Verdict::Fail, failure, Some("banger daemon logs")),
    }
}

/// Boots a vm of an image; returns what took how long, or at which stage it failed and why.
async fn try_boot(
    daemon: &Arc<Daemon>,
    image: &str,
    made: &(dyn Fn(VmRow) + Send + Sync),
) -> Result<String, String> {
    let spec = VmSpec { image: Some(image.to_owned()), rm: true, ..VmSpec::default() };
    // Its steps are no news to somebody who asked for checks.
    let (quiet, _queue) = unbounded_channel();
    let failed = |stage: &str, error: &anyhow::Error| format!("`{image}`: {stage}: {}", reason(error));
    let created = Instant::now();
    let row = daemon.create(&spec, VmState::Starting, &quiet).await;
    let row = row.map_err(|error| failed("create", &error))?;
    made(row.clone());
    let dir = daemon.paths.vm(row.id.as_str());
    let mut stages = vec![format!("create {} ms", created.elapsed().as_millis())];
    let result = match daemon.start(&row, spec.wait, &quiet).await {
        Err(error) => Err(failed("start", &error) + &console(&dir)),
        Ok(started) => {
            stages.extend(started.timings.iter().map(|timing| format!("{} {} ms", timing.stage, timing.ms)));
            let begun = Instant::now();
            match command(&dir).await {
                Err(error) => Err(failed("command", &error) + &console(&dir)),
                Ok(()) => {
                    stages.push(format!("command {} ms", begun.elapsed().as_millis()));
                    Ok(stages.join(", "))
                }
            }
        }
    };
    match daemon.remove(&row).await {
        Ok(()) => result,
        Err(error) => match result {
            Ok(_) => Err(failed("remove", &error)),
            Err(first) => Err(format!("{first}; {}", failed("remove", &error))),
        },
    }
}

/// Runs `true` in the vm.
async fn command(dir: &Path) -> anyhow::Result<()> {
    let spec = ExecSpec { argv: vec!["true".into()], ..ExecSpec::default() };
    match vmsock::exec(dir, spec).await {
        Ok((ExitStatus::Code(0), _)) => Ok(()),
        Ok((status, _)) => bail!("`true` ended with status {}", status.shell_code()),
        // An image without it: the agent in the guest has looked, which is as good.
        Err(error) if is_not_found(&error) => Ok(()),
        Err(error) => Err(error),
    }
}

fn is_not_found(error: &anyhow::Error) -> bool {
    let wire = error.downcast_ref::<WireError>();
    wire.is_some_and(|wire| wire.code == ErrorCode::CommandNotFound)
}

/// The end of what the guest's kernel said, before its vm goes.
fn console(dir: &Path) -> String {
    let text = vmsock::read_file(dir, CONSOLE_FILE);
    let text = String::from_utf8_lossy(&text);
    let mut lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines.drain(..lines.len().saturating_sub(CONSOLE_LINES));
    if lines.is_empty() {
        return "\nits console is empty".to_owned();
    }
    format!("\nits console ends with:\n{}", lines.join("\n"))
}

/// An error with its causes, in one line.
pub(crate) fn reason(error: &anyhow::Error) -> String {
    let wire = crate::serve::wire_error(error);
    let causes = std::iter::once(wire.message).chain(wire.causes);
    causes.collect::<Vec<_>>().join(": ")
}
