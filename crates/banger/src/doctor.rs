//! `doctor`: one line a check, as it ends. The first are about the daemon itself and the owner's
//! settings of ssh, which only a client can tell.

use crate::args::DoctorArgs;
use crate::client::Client;
use crate::context::Context;
use crate::ssh;
use crate::stop::{Ended, Stop};
use banger_wire::BUILD;
use banger_wire::daemon::{Event, Outcome, Request};
use banger_wire::doctor::{Check, Verdict};
use banger_wire::error::WireError;

/// Runs `banger doctor`; the status is 1 when a check failed.
pub(crate) async fn doctor(context: &mut Context, args: DoctorArgs) -> Ended {
    let Context { client, signals, .. } = context;
    let before = signals.unless(async { Ok(build_before(client).await) }).await?;
    let ssh = ssh::check::check(context).await?;
    let Context { ui, client, signals } = context;
    let mut checks: Vec<Check> = Vec::new();
    let mut told = Ok(());
    let mut observe = |event: &Event| match event {
        Event::Check(check) => {
            ui.clear_progress();
            if !args.json && told.is_ok() {
                told = ui.check(check);
            }
            checks.push(check.clone());
        }
        // The last check boots a vm, which takes a while.
        Event::Step { label } => ui.progress(label),
        Event::Warning { text } => ui.warning(text),
        _ => {}
    };
    let result = signals
        .unless(async {
            let request = Request::Doctor { fix: args.fix };
            let mut operation = match client.call(request).await {
                Ok(operation) => operation,
                Err(error) => {
                    observe(&Event::Check(unreachable_daemon(&error)));
                    return Ok(None);
                }
            };
            observe(&Event::Check(same_build(before.as_deref())));
            observe(&Event::Check(ssh));
            Ok(Some(operation.outcome(&mut observe).await?))
        })
        .await;
    ui.clear_progress();
    told?;
    if args.json {
        ui.json(&checks)?;
    }
    result?;
    if args.fix && !args.json {
        let mut commands: Vec<&str> = Vec::new();
        let open = checks.iter().filter(|check| check.verdict != Verdict::Pass);
        for hint in open.filter_map(|check| check.hint.as_deref()).filter(|hint| hint.contains("sudo ")) {
            if !commands.contains(&hint) {
                commands.push(hint);
            }
        }
        ui.root_commands(&commands)?;
    }
    let failed = checks.iter().any(|check| check.verdict == Verdict::Fail);
    if failed { Err(Stop::Told) } else { Ok(0) }
}

/// The build of the daemon that runs, if one does: asking it for checks replaces one of another build.
async fn build_before(client: &Client) -> Option<String> {
    let mut operation = client.call_running(Request::DaemonStatus).await.ok().flatten()?;
    match operation.outcome(&mut |_| {}).await {
        Ok(Outcome::Daemon(daemon)) => Some(daemon.build),
        _ => None,
    }
}

fn daemon_check(verdict: Verdict, detail: String, hint: Option<String>) -> Check {
    Check { name: "daemon".to_owned(), verdict, detail, hint }
}

fn same_build(before: Option<&str>) -> Check {
    match before.filter(|build| *build != BUILD) {
        Some(other) => {
            let detail =
                format!("was of build {other} and has been replaced by {BUILD}, which `banger` is of");
            daemon_check(Verdict::Warn, detail, None)
        }
        None => daemon_check(Verdict::Pass, format!("build {BUILD}, as `banger`"), None),
    }
}

/// Nothing else can be checked then.
fn unreachable_daemon(error: &WireError) -> Check {
    let text = [vec![error.message.clone()], error.causes.clone()].concat().join(": ");
    let hint = error.hint.clone().unwrap_or_else(|| "banger daemon logs".to_owned());
    daemon_check(Verdict::Fail, text, Some(hint))
}
