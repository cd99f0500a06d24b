//! Workspaces as the commands see them: flags, what is shown, and the steps in their order.

use super::checkout::{Survey, Wanted, survey};
use super::metadata::Branching;
use super::place::{self, Placement, Target};
use crate::args::{PrepareArgs, WorkspaceArgs, WorkspaceCommand};
use crate::context::Context;
use crate::progress::Progress;
use crate::run::running;
use crate::stop::{Ended, Stop, failed, invalid};
use crate::text::escape;
use crate::transfer::{on_thread, start_thread};
use banger_wire::bytes::ByteString;
use banger_wire::daemon::{Event, VmView, WorkspaceMode};
use banger_wire::error::WireError;
use std::path::{Path, PathBuf};
use tokio::sync::oneshot;

/// Where a workspace goes in the guest.
const GUEST_PATH: &str = "/root/repo";

/// What is to be placed where, as asked for.
#[derive(Debug)]
pub(crate) struct Asked {
    path: PathBuf,
    wanted: Wanted,
    branching: Branching,
    guest_path: PathBuf,
    readonly: bool,
}

/// What is placed once the vm is up.
#[derive(Debug)]
pub(crate) struct Placed<'a> {
    pub(crate) wanted: Option<&'a Asked>,
    pub(crate) making: Option<Making>,
}

/// Work on the host that goes on while the vm boots.
#[derive(Debug)]
pub(crate) struct Making {
    done: oneshot::Receiver<Result<Placement, WireError>>,
    /// Where below the root the command is to run.
    below: PathBuf,
}

/// Runs `banger vm workspace …`.
pub(crate) async fn dispatch(context: &mut Context, command: WorkspaceCommand) -> Ended {
    match command {
        WorkspaceCommand::Prepare(args) => prepare(context, args).await,
    }
}

async fn prepare(context: &mut Context, args: PrepareArgs) -> Ended {
    let vm = running(context, args.vm).await?;
    let before = vm.workspace.as_ref().map(|workspace| PathBuf::from(workspace.source.as_os_str()));
    let path = args.path.or(before).unwrap_or_else(|| PathBuf::from("."));
    let asked = wanted(Some(path), args.workspace)?;
    let survey = look(context, asked.as_ref()).await?;
    let (Some(asked), true) = (&asked, survey.is_some()) else { return Ok(0) };
    if let (true, Some(survey)) = (args.dry_run, &survey) {
        return tell_survey(context, asked, survey);
    }
    if let Some(making) = make(context, Some(asked), survey)? {
        place(context, &vm, asked, making).await?;
    }
    Ok(0)
}

/// Understands the flags; none when there is nothing to place.
///
/// # Errors
/// When they need a path or contradict each other.
pub(crate) fn wanted(path: Option<PathBuf>, args: WorkspaceArgs) -> Result<Option<Asked>, WireError> {
    let flags = [
        ("--mode", args.mode.is_some()),
        ("--guest-path", args.guest_path.is_some()),
        ("--branch", args.branch.is_some()),
        ("--tracked-only", args.tracked_only),
        ("--include-secrets", args.include_secrets),
        ("--readonly", args.readonly),
    ];
    let Some(path) = path else {
        return match flags.iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(invalid(format!("`{flag}` is about a checkout, and none is named"))
                .hinted("name one before the command: `banger vm run ./repo -- make test`")),
            None => Ok(None),
        };
    };
    let guest_path = args.guest_path.unwrap_or_else(|| PathBuf::from(GUEST_PATH));
    // A trailing slash, or more of them, says nothing.
    let guest_path: PathBuf = guest_path.components().collect();
    let has_name = guest_path.file_name().is_some() && guest_path.is_absolute();
    if !has_name || guest_path.components().any(|part| part == std::path::Component::ParentDir) {
        let shown = escape(&guest_path.display().to_string());
        return Err(invalid(format!("`{shown}` can't be a workspace in the guest"))
            .hinted("name an absolute path, such as `/root/repo`"));
    }
    Ok(Some(Asked {
        path,
        wanted: Wanted {
            mode: args.mode.map_or(WorkspaceMode::default(), Into::into),
            tracked_only: args.tracked_only,
            include_secrets: args.include_secrets,
        },
        branching: Branching { branch: args.branch },
        guest_path,
        readonly: args.readonly,
    }))
}

/// Looks at what is to be placed, before anything is made, and says what stays behind.
///
/// # Errors
/// When it can't travel.
pub(crate) async fn look(context: &mut Context, asked: Option<&Asked>) -> Result<Option<Survey>, Stop> {
    let Some(asked) = asked else { return Ok(None) };
    let (path, wanted) = (asked.path.clone(), asked.wanted.clone());
    let looking = on_thread(move || survey(&path, &wanted).map_err(|error| hint_command(&path, error)));
    let survey = context.signals.unless(looking).await?;
    for name in &survey.held_back {
        let shown = escape(&name.to_string_lossy());
        context.ui.warning(&format!("`{shown}` looks like a secret and stays behind"));
    }
    for name in &survey.nested {
        let shown = escape(&name.to_string_lossy());
        context.ui.warning(&format!("`{shown}` is a repository of its own and stays behind"));
    }
    Ok(Some(survey))
}

/// What is no path may be a command that lacks its dashes.
fn hint_command(path: &Path, error: WireError) -> WireError {
    if path.exists() || error.hint.is_some() {
        return error;
    }
    let shown = escape(&path.display().to_string());
    error.hinted(format!("to run a command, put it after `--`: `banger vm run -- {shown}`"))
}

/// Lists what would travel. The list is for people, so names are escaped.
///
/// # Errors
/// When it can't be printed.
pub(crate) fn tell_survey(context: &Context, asked: &Asked, survey: &Survey) -> Ended {
    let mut text = String::new();
    for entry in &survey.entries {
        let name = escape(&entry.path.to_string_lossy());
        text.push_str(&format!("{:06o} {:>10} {name}\n", entry.mode, entry.len));
    }
    let mode = match survey.mode {
        WorkspaceMode::ShallowOverlay => "shallow_overlay",
        WorkspaceMode::FullCopy => "full_copy",
    };
    let to = escape(&asked.guest_path.display().to_string());
    text.push_str(&format!("{} files, {} bytes, {mode}, to {to}\n", survey.entries.len(), survey.len()));
    context.ui.data(&text)?;
    Ok(0)
}

/// Begins to make what the guest needs besides the files.
///
/// # Errors
/// When there can be no thread.
pub(crate) fn make(
    context: &Context,
    asked: Option<&Asked>,
    survey: Option<Survey>,
) -> Result<Option<Making>, WireError> {
    let (Some(asked), Some(survey)) = (asked, survey) else { return Ok(None) };
    let (state, branching) = (context.client.state().clone(), asked.branching.clone());
    let below = survey.below.clone();
    let done = start_thread(move || Placement::make(survey, &state, &branching))?;
    Ok(Some(Making { done, below }))
}

/// Places what was made in a vm that is up. Returns the directory that corresponds to the one that was named.
///
/// # Errors
/// When it can't be made or placed.
pub(crate) async fn place(
    context: &mut Context,
    vm: &VmView,
    asked: &Asked,
    making: Making,
) -> Result<ByteString, Stop> {
    let state = context.client.state().clone();
    let mut progress = Progress::new(&context.ui);
    let mut observe = |event: &Event| progress.observe(event);
    let placing = async {
        let made = making.done.await;
        let placement = made.map_err(|error| failed("a thread ended too early", &error))??;
        let target = Target {
            vm: vm.name.as_str(),
            id: vm.id.as_str(),
            socket: Path::new(&vm.socket),
            path: ByteString::from(asked.guest_path.clone().into_os_string()),
            readonly: asked.readonly,
        };
        place::place(placement, target, &state, &mut observe).await
    };
    let placed = context.signals.unless(placing).await;
    progress.finish();
    placed?;
    Ok(ByteString::from(asked.guest_path.join(&making.below).into_os_string()))
}
