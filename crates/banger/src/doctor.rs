//! `doctor`: one line a check, as it ends.

use crate::args::JsonArgs;
use crate::context::Context;
use crate::stop::{Ended, Stop};
use banger_wire::daemon::{Check, Event, Request, Verdict};

/// Runs `banger doctor`; the status is 1 when a check failed.
pub(crate) async fn doctor(context: &mut Context, args: JsonArgs) -> Ended {
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
    let result = signals.unless(async { Ok(client.ask(Request::Doctor, &mut observe).await?) }).await;
    ui.clear_progress();
    told?;
    if args.json {
        ui.json(&checks)?;
    }
    result?;
    let failed = checks.iter().any(|check| check.verdict == Verdict::Fail);
    if failed { Err(Stop::Told) } else { Ok(0) }
}
