//! `image export`: an image on its way out.

use crate::client::Part;
use crate::context::Context;
use crate::image::absolute;
use crate::progress::Progress;
use crate::stop::{Ended, Stop, failed, invalid};
use crate::streams::{Outputs, Written};
use crate::terminal;
use crate::text::escape;
use banger_wire::daemon::{Event, Request};
use banger_wire::exec::STDOUT;
use std::ffi::OsStr;
use std::io::Write as _;
use std::path::Path;
use tokio::sync::mpsc::UnboundedReceiver;

/// Runs `banger image export`.
pub(crate) async fn export(context: &mut Context, image: String, output: &OsStr) -> Ended {
    if let Some(dir) = output.to_str().and_then(|output| output.strip_prefix("oci:")) {
        let layout = Some(absolute(Path::new(dir))?);
        context.follow(Request::ImageExport { image, layout }).await?;
        return Ok(0);
    }
    let request = Request::ImageExport { image, layout: None };
    if output != "-" {
        let path = Path::new(output);
        let shown = escape(&path.display().to_string());
        let cannot = |error: std::io::Error| failed(format!("could not write `{shown}`"), &error);
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // Beside the file, which is replaced once the archive is whole.
        let file = tempfile::Builder::new().prefix(".new-").tempfile_in(dir).map_err(cannot)?;
        let mut target = Target::File(file);
        receive(context, request, &mut target).await?;
        if let Target::File(file) = target {
            file.persist(path).map_err(|error| cannot(error.error))?;
        }
        return Ok(0);
    }
    if terminal::stdout_is_terminal() {
        return Err(invalid("an archive is not for a terminal")
            .hinted("name a file with `-o FILE`, or pipe it: `banger image export X | docker load`")
            .into());
    }
    let (outputs, written) =
        Outputs::start().map_err(|error| failed("could not write the archive", &error))?;
    receive(context, request, &mut Target::Stdout(outputs, written)).await?;
    Ok(0)
}

/// Where the archive goes.
enum Target {
    File(tempfile::NamedTempFile),
    Stdout(Outputs, UnboundedReceiver<Written>),
}

impl Target {
    async fn write(&mut self, piece: Vec<u8>) -> Result<(), Stop> {
        match self {
            Self::File(file) => {
                file.write_all(&piece).map_err(|error| failed("could not write the archive", &error).into())
            }
            Self::Stdout(outputs, written) => {
                outputs.send(STDOUT, piece);
                match written.recv().await {
                    Some(Written::Bytes { .. }) => Ok(()),
                    Some(Written::Failed(error)) => Err(failed("could not write to stdout", &error).into()),
                    Some(Written::Closed) | None => Err(Stop::OutputClosed),
                }
            }
        }
    }
}

/// Receives the archive, with what the daemon tells before shown.
async fn receive(context: &mut Context, request: Request, target: &mut Target) -> Result<(), Stop> {
    let Context { ui, client, signals } = context;
    let mut progress = Progress::new(ui);
    let result = signals
        .unless(async {
            let mut operation = client.call(request).await?;
            loop {
                match operation.next().await? {
                    Part::Data(bytes) => target.write(bytes).await?,
                    Part::Eof => {}
                    Part::Event(Event::Done(_)) => return Ok(()),
                    Part::Event(Event::Failed(error)) => return Err(error.into()),
                    Part::Event(event) => progress.observe(&event),
                }
            }
        })
        .await;
    progress.finish();
    result
}
