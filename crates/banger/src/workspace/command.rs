//! Workspaces as the commands see them: flags, what is shown, and the steps in their order.

use super::apply::{self, apply, refuse_dirty};
use super::bootstrap::{self, Tools};
use super::checkout::{Survey, Wanted, survey};
use super::collect::{Changes, collect};
use super::commits::bring_branch;
use super::git::Git;
use super::listing;
use super::metadata::Branching;
use super::place::{self, Placement, Target};
use super::review::review;
use super::tree::path_of;
use crate::args::{PrepareArgs, ShowArgs, WorkspaceArgs, WorkspaceCommand};
use crate::context::Context;
use crate::progress::Progress;
use crate::run::running;
use crate::stop::{Ended, Stop, failed, invalid};
use crate::text::escape;
use crate::transfer::{on_thread, start_thread};
use banger_wire::bytes::ByteString;
use banger_wire::daemon::{Event, VmView, Workspace, WorkspaceAsked, WorkspaceMode};
use banger_wire::error::WireError;
use serde::Serialize;
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
    pub(super) guest_path: PathBuf,
    readonly: bool,
    /// How the tools that it names are installed; not at all when none.
    tools: Option<Tools>,
}

impl Asked {
    /// Asks for the named directory in the way it was placed before.
    pub(super) fn like(self, before: &Workspace) -> Self {
        Self { path: self.path, ..Self::again(before, self.tools) }
    }

    /// The directory that was named.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Asks for what was placed before, in the same way.
    fn again(before: &Workspace, tools: Option<Tools>) -> Self {
        let WorkspaceAsked { tracked_only, include_secrets, readonly, branch, from } = before.asked.clone();
        Self {
            path: named(before),
            wanted: Wanted { mode: before.mode, tracked_only, include_secrets, from },
            branching: Branching { branch, from: None },
            guest_path: path_of(&before.path),
            readonly,
            tools,
        }
    }

    fn asked(&self) -> WorkspaceAsked {
        let Wanted { tracked_only, include_secrets, ref from, .. } = self.wanted;
        WorkspaceAsked {
            tracked_only,
            include_secrets,
            readonly: self.readonly,
            branch: self.branching.branch.clone(),
            from: from.clone(),
        }
    }
}

/// The directory that was named when it was placed, or its checkout when that directory is gone.
fn named(before: &Workspace) -> PathBuf {
    let named = before.named();
    if named.is_dir() { named } else { path_of(&before.source) }
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
    /// Files at its top that name tools.
    tool_files: Vec<&'static str>,
}

/// Runs `banger vm workspace …`.
pub(crate) async fn dispatch(context: &mut Context, command: WorkspaceCommand) -> Ended {
    match command {
        WorkspaceCommand::Prepare(args) => prepare(context, args).await,
        WorkspaceCommand::Export(args) => {
            let vm = running(context, args.vm).await?;
            if let Some(branch) = args.branch {
                return bring_branch(context, &vm, branch).await;
            }
            let back = Back {
                patch: args.output,
                apply: args.apply,
                review: args.review,
                base_commit: args.base_commit,
            };
            bring_back(context, &vm, back).await
        }
        WorkspaceCommand::Status(args) => status(context, args).await,
        WorkspaceCommand::Undo { path } => undo(context, path).await,
    }
}

async fn prepare(context: &mut Context, args: PrepareArgs) -> Ended {
    let tools = (!args.no_bootstrap).then_some(Tools { must: true, user: None });
    let flags = args.workspace;
    if args.dry_run && args.path.is_some() {
        // What would travel does not depend on the vm, so nobody is asked about it.
        let Some(asked) = wanted(args.path, flags, None)? else { return Ok(0) };
        return match look(context, Some(&asked)).await? {
            Some(survey) => listing::tell(context, &asked, &survey, args.json),
            None => Ok(0),
        };
    }
    let vm = running(context, args.vm).await?;
    let asked = match &vm.workspace {
        // What was said then counts until something else is said.
        Some(before) if args.path.is_none() && flags.are_absent() => Some(Asked::again(before, tools)),
        before => {
            let path = args.path.or_else(|| before.as_ref().map(named)).unwrap_or_else(|| PathBuf::from("."));
            wanted(Some(path), flags, tools)?
        }
    };
    let Some(asked) = asked else { return Ok(0) };
    let Some(survey) = look(context, Some(&asked)).await? else { return Ok(0) };
    if args.dry_run {
        return listing::tell(context, &asked, &survey, args.json);
    }
    replace(context, &vm, asked, survey, args.force).await?;
    Ok(0)
}

/// Brings a vm's workspace up to date, the way it was placed.
///
/// # Errors
/// When it was changed in the vm, and those of placing.
pub(crate) async fn refresh(context: &mut Context, vm: &VmView) -> Result<(), Stop> {
    let Some(before) = &vm.workspace else { return Ok(()) };
    let asked = Asked::again(before, Some(Tools { must: true, user: None }));
    match look(context, Some(&asked)).await? {
        Some(survey) => replace(context, vm, asked, survey, false).await,
        None => Ok(()),
    }
}

/// Places a checkout where one may have been placed before; what the vm ignores of that one stays.
async fn replace(
    context: &mut Context,
    vm: &VmView,
    asked: Asked,
    survey: Survey,
    force: bool,
) -> Result<(), Stop> {
    let is_same_place = vm.workspace.as_ref().is_some_and(|before| path_of(&before.path) == asked.guest_path);
    let mut kept = force.then(Vec::new);
    if is_same_place {
        let changes = collected(context, vm).await?;
        if !force && changes.len() > 0 {
            let message = format!("{} in vm `{}` would be lost", count(changes.len(), "change"), vm.name);
            let hint = format!(
                "take them with `banger vm workspace export {0} --output FILE` first, or use `--force`",
                vm.name
            );
            return Err(invalid(message).hinted(hint).into());
        }
        kept = Some(changes.kept());
    }
    if let Some(making) = make(context, Some(&asked), Some(survey))? {
        place(context, vm, &asked, making, kept).await?;
    }
    Ok(())
}

pub(super) async fn collected(context: &mut Context, vm: &VmView) -> Result<Changes, Stop> {
    let state = context.client.state().clone();
    context.signals.unless(collect(vm, &state)).await
}

pub(super) fn count(number: usize, of: &str) -> String {
    if number == 1 { format!("1 {of}") } else { format!("{number} {of}s") }
}

/// What is wanted of a vm's changes.
#[derive(Debug, Default)]
pub(crate) struct Back {
    pub(crate) patch: Option<PathBuf>,
    pub(crate) apply: bool,
    /// Somebody is asked about each file.
    pub(crate) review: bool,
    pub(crate) base_commit: Option<String>,
}

/// Refuses what can't be brought back later, before anything is made.
///
/// # Errors
/// When the checkout has changes of its own, or the patch has no directory.
pub(crate) async fn check_back(
    context: &mut Context,
    back: &Back,
    survey: Option<&Survey>,
) -> Result<(), Stop> {
    if let Some(patch) = &back.patch {
        let parent = patch.parent().filter(|parent| !parent.as_os_str().is_empty());
        if parent.is_some_and(|parent| !parent.is_dir()) || patch.is_dir() {
            let shown = escape(&patch.display().to_string());
            return Err(invalid(format!(
                "`{shown}` can't be written: its directory is missing, or it is one"
            ))
            .into());
        }
    }
    let Some(survey) = survey.filter(|_| back.apply) else { return Ok(()) };
    let root = survey.root.clone();
    let tops =
        survey.repositories.iter().map(|repository| root.join(&repository.prefix).into_os_string().into());
    let tops: Vec<ByteString> = tops.collect();
    context.signals.unless(on_thread(move || refuse_dirty(&root, &tops))).await
}

/// Brings a vm's changes back: as a patch on stdout unless a file or the checkout is named.
///
/// # Errors
/// When nothing was placed, when they can't be applied, and those of reading and writing.
pub(crate) async fn bring_back(context: &mut Context, vm: &VmView, back: Back) -> Ended {
    let changes = collected(context, vm).await?;
    for (path, why) in &changes.left_out {
        let shown = escape(&path.as_os_str().to_string_lossy());
        context.ui.warning(&format!("`{shown}` {why} and does not come back"));
    }
    let changes = if back.review { review(context, changes).await? } else { changes };
    let state = context.client.state().clone();
    let to_stdout = back.patch.is_none() && !back.apply;
    let work = move || {
        let patch = if back.apply && back.patch.is_none() {
            Vec::new()
        } else {
            changes.patch(back.base_commit.as_deref())?
        };
        if let Some(path) = &back.patch {
            let shown = escape(&path.display().to_string());
            std::fs::write(path, &patch)
                .map_err(|error| failed(format!("could not write `{shown}`"), &error))?;
        }
        let applied = if back.apply {
            refuse_dirty(&path_of(&changes.workspace.source), &changes.base.repositories)?;
            Some(apply(&changes, &state)?)
        } else {
            None
        };
        Ok((patch, changes.len(), applied))
    };
    let (patch, changed, applied) = context.signals.unless(on_thread(work)).await?;
    if to_stdout {
        context.ui.foreign_data(&patch)?;
    }
    match applied {
        Some(applied) => {
            context.ui.note(&format!("applied {} of vm `{}`", count(applied, "changed file"), vm.name))
        }
        None if changed == 0 => context.ui.note(&format!("nothing has changed in vm `{}`", vm.name)),
        None => {}
    }
    Ok(0)
}

/// What `vm workspace status` tells; also the shape of `--json`.
#[derive(Debug, Serialize)]
struct Status {
    #[serde(flatten)]
    workspace: Workspace,
    /// The commit that is checked out on the host now.
    host_head: Option<String>,
    /// Placed files that are others on the host now.
    host_changed: Vec<ByteString>,
    /// Files that changed in the guest.
    guest_changed: Vec<ByteString>,
}

async fn status(context: &mut Context, args: ShowArgs) -> Ended {
    let vm = running(context, args.vm).await?;
    let changes = collected(context, &vm).await?;
    let status = context.signals.unless(on_thread(move || {
        let workspace = changes.workspace.clone();
        let host_changed = changes.changed_on_host()?;
        let guest_changed = changes.list.iter().map(|change| change.path.clone()).collect();
        Ok(Status { host_head: host_head(&workspace)?, workspace, host_changed, guest_changed })
    }));
    let status = status.await?;
    if args.json {
        context.ui.json(&status)?;
        return Ok(0);
    }
    let moved = status.host_head != status.workspace.head;
    let files = |list: &[ByteString]| {
        let names: String =
            list.iter().map(|path| format!("  {}\n", escape(&path.as_os_str().to_string_lossy()))).collect();
        format!("{}\n{names}", count(list.len(), "file"))
    };
    let shown = |path: &ByteString| escape(&path.as_os_str().to_string_lossy());
    let mut text = format!("{} at {}\n", shown(&status.workspace.source), shown(&status.workspace.path));
    if moved {
        text.push_str("the host has another commit checked out since\n");
    }
    text.push_str(&format!("changed on the host: {}", files(&status.host_changed)));
    text.push_str(&format!("changed in the vm: {}", files(&status.guest_changed)));
    context.ui.data(&text)?;
    Ok(0)
}

fn host_head(workspace: &Workspace) -> Result<Option<String>, WireError> {
    let git = Git::at(&path_of(&workspace.source));
    let head = git.line(&["rev-parse", "-q", "--verify", "HEAD^{commit}"])?;
    Ok(head.and_then(|head| head.into_string().ok()))
}

/// Warns when the host has another commit checked out than when the workspace was placed.
pub(crate) fn warn_stale(context: &Context, vm: &VmView) {
    let Some(workspace) = &vm.workspace else { return };
    if host_head(workspace).is_ok_and(|head| head != workspace.head) {
        let source = escape(&workspace.source.as_os_str().to_string_lossy());
        context.ui.warning(&format!(
            "`{source}` has another commit checked out than vm `{0}` has; bring it up to date with `banger vm workspace \
             prepare {0}`",
            vm.name
        ));
    }
}

async fn undo(context: &mut Context, path: Option<PathBuf>) -> Ended {
    let state = context.client.state().clone();
    let path = path.unwrap_or_else(|| PathBuf::from("."));
    let work = move || {
        let shown = escape(&path.display().to_string());
        let full =
            path.canonicalize().map_err(|error| failed(format!("could not find `{shown}`"), &error))?;
        let top = Git::at(&full).line(&["rev-parse", "--show-toplevel"])?;
        apply::undo(&top.map_or(full, PathBuf::from), &state)
    };
    let restored = context.signals.unless(on_thread(work)).await?;
    context.ui.note(&format!("restored {}", count(restored, "file")));
    Ok(0)
}

/// Understands the flags; none when there is nothing to place.
///
/// # Errors
/// When they need a path or contradict each other.
pub(crate) fn wanted(
    path: Option<PathBuf>,
    args: WorkspaceArgs,
    tools: Option<Tools>,
) -> Result<Option<Asked>, WireError> {
    let flags = args.given();
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
            from: args.from,
        },
        branching: Branching { branch: args.branch, from: None },
        guest_path,
        readonly: args.readonly,
        tools,
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
    let state = context.client.state().clone();
    let branching = Branching { from: survey.from.clone(), ..asked.branching.clone() };
    let (below, tool_files) = (survey.below.clone(), bootstrap::files(&survey));
    let done = start_thread(move || Placement::make(survey, &state, &branching))?;
    Ok(Some(Making { done, below, tool_files }))
}

/// Places what was made in a vm that is up, and installs the tools it names. Returns the directory that corresponds to the one that was named.
///
/// # Errors
/// When it can't be made or placed.
pub(crate) async fn place(
    context: &mut Context,
    vm: &VmView,
    asked: &Asked,
    making: Making,
    replace: Option<Vec<ByteString>>,
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
            asked: asked.asked(),
            replace,
        };
        place::place(placement, target, &state, &mut observe).await
    };
    let placed = context.signals.unless(placing).await;
    progress.finish();
    placed?;
    if let (Some(tools), false) = (&asked.tools, making.tool_files.is_empty()) {
        bootstrap::install(context, vm, &asked.guest_path, &making.tool_files, tools).await?;
    }
    Ok(ByteString::from(asked.guest_path.join(&making.below).into_os_string()))
}
