//! `daemon …` and `version`.

use crate::args::{DaemonCommand, JsonArgs};
use crate::context::{Context, expect_outcome};
use crate::launch;
use crate::many::each;
use crate::stop::{Ended, Stop, failed};
use crate::table::render_pairs;
use crate::text::{ConsoleText, date, now};
use banger_wire::BUILD;
use banger_wire::daemon::{DaemonView, Request, VmState, VmView};
use banger_wire::time::millis;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::time::Duration;

/// Bytes of the log read at once.
const CHUNK_LEN: usize = 64 * 1024;

/// Runs `banger daemon …`.
pub(crate) async fn dispatch(context: &mut Context, command: DaemonCommand) -> Ended {
    match command {
        DaemonCommand::Status(args) => status(context, args).await,
        DaemonCommand::Stop(args) => {
            let stopped = if args.all { stop_vms(context, args.timeout).await } else { Ok(0) };
            if let Err(Stop::Signalled(_)) = stopped {
                return stopped;
            }
            let client = &context.client;
            let ran = context.signals.unless(async { Ok(client.stop_daemon().await?) }).await?;
            context.ui.data(if ran { "stopped bangerd\n" } else { "bangerd does not run\n" })?;
            stopped
        }
        DaemonCommand::Logs { lines } => logs(context, lines),
        DaemonCommand::Detach { program } => Err(launch::detach(&program).into()),
    }
}

/// Stops every vm that runs, all at once. A daemon that is needed for it is started.
async fn stop_vms(context: &mut Context, timeout: Duration) -> Ended {
    let outcome = context.ask(Request::VmList).await?;
    let vms = expect_outcome!(outcome, Vms)?;
    let may_run = |vm: &VmView| !matches!(vm.state, VmState::Created | VmState::Stopped);
    let names: Vec<String> = vms.iter().filter(|vm| may_run(vm)).map(|vm| vm.name.to_string()).collect();
    let grace_ms = millis(timeout);
    each(context, names, "stopped", |vm| Request::VmStop { vm, grace_ms }).await
}

async fn running(context: &mut Context) -> Result<Option<DaemonView>, Stop> {
    let client = &context.client;
    let outcome = context.signals.unless(async {
        match client.call_running(Request::DaemonStatus).await? {
            Some(mut operation) => Ok(Some(operation.outcome(&mut |_| {}).await?)),
            None => Ok(None),
        }
    });
    match outcome.await? {
        Some(outcome) => Ok(Some(expect_outcome!(outcome, Daemon)?)),
        None => Ok(None),
    }
}

async fn status(context: &mut Context, args: JsonArgs) -> Ended {
    let daemon = running(context).await?;
    if args.json {
        context.ui.json(&daemon)?;
    } else {
        match &daemon {
            Some(daemon) => context.ui.data(&pairs(daemon))?,
            None => context.ui.data("bangerd does not run; it starts by itself when needed\n")?,
        }
    }
    if daemon.is_some() { Ok(0) } else { Err(Stop::Told) }
}

fn pairs(daemon: &DaemonView) -> String {
    render_pairs(&[
        ("process", Some(daemon.pid.to_string())),
        ("build", Some(daemon.build.clone())),
        ("started", Some(date(daemon.started, now()))),
        ("running vms", Some(daemon.running.to_string())),
        ("state", Some(daemon.state_dir.clone())),
        ("cache", Some(daemon.cache_dir.clone())),
        ("log", Some(daemon.log.clone())),
    ])
}

/// Prints the log. What it quotes may come from a guest, so control characters are spelled out.
fn logs(context: &Context, lines: Option<usize>) -> Ended {
    let path = context.client.state().log();
    let error = |error: std::io::Error| {
        let hint = "bangerd writes it from its first start on";
        failed(format!("could not read `{}`", path.display()), &error).hinted(hint)
    };
    let mut file = std::fs::File::open(&path).map_err(error)?;
    let start = match lines {
        Some(lines) => tail_start(&mut file, lines).map_err(error)?,
        None => 0,
    };
    file.seek(SeekFrom::Start(start)).map_err(error)?;
    let mut text = ConsoleText::default();
    let mut chunk = vec![0; CHUNK_LEN];
    loop {
        let len = file.read(&mut chunk).map_err(error)?;
        if len == 0 {
            break;
        }
        context.ui.data(&text.push(&chunk[..len]))?;
    }
    context.ui.data(&text.finish())?;
    Ok(0)
}

/// Returns where the last lines begin, reading backwards.
fn tail_start(file: &mut std::fs::File, lines: usize) -> std::io::Result<u64> {
    let end = file.seek(SeekFrom::End(0))?;
    let mut left = lines;
    let mut at = end;
    let mut chunk = vec![0; CHUNK_LEN];
    while at > 0 {
        let len = usize::try_from(at).unwrap_or(CHUNK_LEN).min(CHUNK_LEN);
        at -= len as u64;
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut chunk[..len])?;
        for index in (0..len).rev() {
            let position = at + index as u64;
            // The break at the very end closes the last line and begins none.
            if chunk[index] == b'\n' && position + 1 < end {
                if left <= 1 {
                    return Ok(if lines == 0 { end } else { position + 1 });
                }
                left -= 1;
            }
        }
    }
    Ok(if lines == 0 { end } else { 0 })
}

/// Runs `banger version`.
pub(crate) async fn version(context: &mut Context, args: JsonArgs) -> Ended {
    let daemon = running(context).await?;
    if args.json {
        let daemon = daemon.map(|daemon| daemon.build);
        context.ui.json(&serde_json::json!({ "banger": BUILD, "bangerd": daemon }))?;
        return Ok(0);
    }
    let daemon = match daemon {
        Some(daemon) => daemon.build,
        None => "does not run".to_owned(),
    };
    context.ui.data(&render_pairs(&[("banger", Some(BUILD.to_owned())), ("bangerd", Some(daemon))]))?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::tail_start;
    use std::io::Write as _;

    #[test]
    fn the_last_lines_begin_where_they_should() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"one\ntwo\nthree\n").unwrap();
        for (lines, start) in [(0, 14), (1, 8), (2, 4), (3, 0), (99, 0)] {
            assert_eq!(tail_start(&mut file, lines).unwrap(), start, "{lines}");
        }
        file.write_all(b"four").unwrap();
        assert_eq!(tail_start(&mut file, 1).unwrap(), 14);
        assert_eq!(tail_start(&mut tempfile::tempfile().unwrap(), 3).unwrap(), 0);
    }
}
