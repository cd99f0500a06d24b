//! `vm logs`: a vm's serial console.
//!
//! Its bytes are the guest's, so control characters are spelled out unless `--raw` was given.

use crate::args::LogsArgs;
use crate::client::{Operation, Part};
use crate::context::Context;
use crate::stop::{Ended, Stop, failed, unexpected_answer};
use crate::streams::{Outputs, Written};
use crate::text::ConsoleText;
use banger_wire::daemon::{Event, Request};
use banger_wire::exec::STDOUT;
use tokio::sync::mpsc;

/// Runs `banger vm logs`.
pub(crate) async fn vm_logs(context: &mut Context, args: LogsArgs) -> Ended {
    let Context { ui, client, signals } = context;
    let request = Request::VmLogs { vm: args.vm, lines: args.lines, follow: args.follow };
    signals
        .unless(async {
            let mut operation = client.call(request).await?;
            copy(&mut operation, args.raw, |text| ui.warning(text)).await
        })
        .await?;
    Ok(0)
}

async fn copy(operation: &mut Operation, raw: bool, warn: impl Fn(&str)) -> Result<(), Stop> {
    let (outputs, mut written) =
        Outputs::start().map_err(|error| failed("could not serve the console's bytes", &error))?;
    let mut console = ConsoleText::default();
    loop {
        match operation.next().await? {
            Part::Data(bytes) => {
                let len = bytes.len();
                let text = if raw { bytes } else { console.push(&bytes).into_bytes() };
                pass_on(&outputs, &mut written, text).await?;
                operation.grant(STDOUT, len).await;
            }
            Part::Eof => {}
            Part::Event(Event::Done(_)) => break,
            Part::Event(Event::Failed(error)) => return Err(error.into()),
            Part::Event(Event::Warning { text }) => warn(&text),
            Part::Event(Event::Step { .. } | Event::Progress { .. }) => {}
            Part::Event(_) => return Err(unexpected_answer().into()),
        }
    }
    pass_on(&outputs, &mut written, console.finish().into_bytes()).await
}

async fn pass_on(
    outputs: &Outputs,
    written: &mut mpsc::UnboundedReceiver<Written>,
    bytes: Vec<u8>,
) -> Result<(), Stop> {
    if bytes.is_empty() {
        return Ok(());
    }
    outputs.send(STDOUT, bytes);
    match written.recv().await {
        Some(Written::Bytes { .. }) => Ok(()),
        Some(Written::Failed(error)) => Err(failed("could not write to stdout", &error).into()),
        Some(Written::Closed) | None => Err(Stop::OutputClosed),
    }
}
