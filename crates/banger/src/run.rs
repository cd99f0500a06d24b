//! `vm run`, `vm create` and `vm exec`: a vm and what runs in it.

use crate::args::{CreateArgs, ExecArgs, RunArgs, SessionArgs, SpecArgs};
use crate::context::{Context, expect_outcome};
use crate::env::{self, proxy_variables};
use crate::progress::{Progress, plan_line, ready_lines};
use crate::project;
use crate::session::{self, SessionPlan};
use crate::ssh::agent;
use crate::stop::{Ended, Stop, invalid};
use crate::terminal;
use crate::text::escape;
use crate::upload::{Local, local};
use crate::vm::state_word;
use crate::workspace::bootstrap::Tools;
use crate::workspace::checkout::Survey;
use crate::workspace::command::{
    Asked, Back, Placed, bring_back, check_back, look, make, place, refresh, wanted, warn_stale,
};
use crate::workspace::{listing, reuse};
use banger_wire::bytes::ByteString;
use banger_wire::daemon::{Event, Outcome, Request, StartedVm, VmSpec, VmState, VmView, Wait};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::ExecSpec;
use banger_wire::net::{NetRules, NetworkChoice};
use banger_wire::vm::VmRequest;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// Runs `banger vm run`.
pub(crate) async fn run(context: &mut Context, args: RunArgs) -> Ended {
    check(&args)?;
    check_agent(context, &args.session).await?;
    let flags_given = !args.workspace.are_absent();
    // A command would fail in ways that say less; in a shell somebody can see to it.
    let tools = Tools { must: !args.command.is_empty(), user: args.session.user.clone() };
    let wanted = wanted(args.path, args.workspace, (!args.no_bootstrap).then_some(tools))?;
    let reused = match &wanted {
        Some(asked) if args.reuse && !args.dry_run => reuse::find(context, asked.path()).await?,
        _ => None,
    };
    let wanted = match (reused, wanted) {
        (Some(vm), Some(asked)) => {
            let again = Again { asked, flags_given, spec: args.spec };
            let back = Back { patch: args.export, apply: args.apply, ..Back::default() };
            let (detach, session, command) = (args.detach, args.session, args.command);
            let session = RunSession { rm: false, detach, session, command, back };
            return run_again(context, vm, again, session, args.json).await;
        }
        (_, wanted) => wanted,
    };
    let survey = look(context, wanted.as_ref()).await?;
    if args.dry_run
        && let (Some(wanted), Some(survey)) = (&wanted, &survey)
    {
        return listing::tell(context, wanted, survey, args.json);
    }
    let default_wait = if args.command.is_empty() { Wait::Boot } else { Wait::Agent };
    let spec = vm_spec(args.spec, args.rm, default_wait, survey.as_ref())?;
    if args.dry_run {
        return dry_run(context, spec, args.json).await;
    }
    let back = Back { patch: args.export, apply: args.apply, ..Back::default() };
    check_back(context, &back, survey.as_ref()).await?;
    let rm = args.rm;
    let making = make(context, wanted.as_ref(), survey)?;
    let started = start(context, Request::VmRun(Box::new(spec)), rm).await?;
    let name = started.vm.name.to_string();
    let placed = Placed { wanted: wanted.as_ref(), making };
    let session = RunSession { rm, detach: args.detach, session: args.session, command: args.command, back };
    let result = run_placed(context, &started, placed, session).await;
    if args.detach {
        result?;
        return tell_vm(context, &started.vm, args.json);
    }
    if rm {
        delete(context, &started.vm).await;
    } else if result.is_ok() && context.ui.is_live() {
        context.ui.note(&format!("vm `{name}` keeps running; stop it with `banger vm stop {name}`"));
    }
    result
}

/// How `vm run` goes on once the vm is up.
struct RunSession {
    rm: bool,
    detach: bool,
    session: SessionArgs,
    command: Vec<OsString>,
    back: Back,
}

/// Places the checkout, if there is one, and runs the command, unless the vm is left to itself.
async fn run_placed(
    context: &mut Context,
    started: &StartedVm,
    placed: Placed<'_>,
    run: RunSession,
) -> Ended {
    let (name, socket) = (started.vm.name.to_string(), PathBuf::from(&started.socket));
    let (mut hold, mut workdir) = (None, None);
    if let (Some(wanted), Some(making)) = (placed.wanted, placed.making) {
        if run.rm {
            // More than one session is needed, so none of them can be the lease.
            hold = Some(context.signals.unless(session::request(&name, &socket, VmRequest::Hold)).await?);
        }
        workdir = Some(place(context, &started.vm, wanted, making, None).await?);
    }
    if run.detach {
        return Ok(0);
    }
    let (mut exec, timeout) = exec_spec(run.session, run.command, Vec::new());
    exec.workdir = exec.workdir.or(workdir);
    // Without a command an image without an init does what its maker meant it to do. In a checkout a shell is meant.
    if exec.argv.is_empty() && placed.wanted.is_none() {
        exec.argv = started.command.iter().map(|word| ByteString(word.clone().into_bytes())).collect();
    }
    let lease = run.rm && hold.is_none();
    let plan = SessionPlan { vm: name, socket, timeout, exec, lease };
    let result = session::run(plan, &mut context.signals).await;
    let ran = matches!(result, Ok(_) | Err(Stop::TimedOut(_)));
    if ran && (run.back.apply || run.back.patch.is_some()) {
        // Whatever its status was: a tool that reports what it has mended by one is none the worse.
        let vm = show(context, started).await?;
        bring_back(context, &vm, run.back).await?;
    }
    drop(hold);
    result
}

/// A checkout that is in a vm already.
struct Again {
    asked: Asked,
    flags_given: bool,
    spec: SpecArgs,
}

/// Runs in the vm that has the checkout, which is started where it does not run, and brings its copy up to date.
async fn run_again(
    context: &mut Context,
    mut vm: VmView,
    again: Again,
    run: RunSession,
    json: bool,
) -> Ended {
    let env = env::collect(&again.spec.env_file, &again.spec.env)?;
    let given: Vec<String> =
        again.spec.given().iter().filter(|(_, given)| *given).map(|(flag, _)| format!("`{flag}`")).collect();
    if !given.is_empty() {
        let text = format!("vm `{}` stays as it was made: {} is for new ones", vm.name, given.join(", "));
        context.ui.warning(&text);
    }
    if matches!(vm.state, VmState::Running | VmState::Starting) {
        context.ui.note(&format!("back in vm `{}`", vm.name));
    } else {
        let default_wait = if run.command.is_empty() { Wait::Boot } else { Wait::Agent };
        let wait = again.spec.wait.map_or(default_wait, Into::into);
        vm = start(context, Request::VmStart { vm: vm.id.to_string(), wait }, false).await?.vm;
    }
    let workdir = reuse::rejoin(context, &vm, again.asked, again.flags_given).await?;
    if run.detach {
        return tell_vm(context, &vm, json);
    }
    let (mut exec, timeout) = exec_spec(run.session, run.command, env);
    exec.workdir = exec.workdir.or(workdir);
    let socket = PathBuf::from(&vm.socket);
    let plan = SessionPlan { vm: vm.name.to_string(), socket, timeout, exec, lease: false };
    let result = session::run(plan, &mut context.signals).await;
    let ran = matches!(result, Ok(_) | Err(Stop::TimedOut(_)));
    if ran && (run.back.apply || run.back.patch.is_some()) {
        let outcome = context.ask(Request::VmShow { vm: vm.id.to_string() }).await?;
        bring_back(context, &expect_outcome!(outcome, Vm)?, run.back).await?;
    }
    result
}

/// Asks for the vm anew: it has a workspace by now.
async fn show(context: &mut Context, started: &StartedVm) -> Result<VmView, Stop> {
    let outcome = context.ask(Request::VmShow { vm: started.vm.id.to_string() }).await?;
    expect_outcome!(outcome, Vm)
}

/// Runs `banger vm create`.
pub(crate) async fn create(context: &mut Context, args: CreateArgs) -> Ended {
    let tools = Tools { must: false, user: None };
    let wanted = wanted(args.path, args.workspace, (!args.no_bootstrap).then_some(tools))?;
    if args.no_start && wanted.is_some() {
        return Err(invalid("a checkout can only be placed in a vm that runs")
            .hinted("leave `--no-start` out, or use `banger vm workspace prepare` once it runs")
            .into());
    }
    let survey = look(context, wanted.as_ref()).await?;
    let spec = vm_spec(args.spec, false, Wait::Boot, survey.as_ref())?;
    if args.dry_run {
        return match (&wanted, &survey) {
            (Some(wanted), Some(survey)) => listing::tell(context, wanted, survey, args.json),
            _ => dry_run(context, spec, args.json).await,
        };
    }
    if args.no_start {
        let outcome = context.follow(Request::VmCreate(Box::new(spec))).await?;
        let vm = expect_outcome!(outcome, Created)?;
        return tell_vm(context, &vm, args.json);
    }
    let making = make(context, wanted.as_ref(), survey)?;
    let started = start(context, Request::VmRun(Box::new(spec)), false).await?;
    if let (Some(wanted), Some(making)) = (&wanted, making) {
        place(context, &started.vm, wanted, making, None).await?;
    }
    tell_vm(context, &started.vm, args.json)
}

/// Runs `banger vm exec`.
pub(crate) async fn exec(context: &mut Context, args: ExecArgs) -> Ended {
    let env = env::collect(&args.env_file, &args.env)?;
    check_agent(context, &args.session).await?;
    let vm = running(context, args.vm).await?;
    if args.auto_prepare {
        refresh(context, &vm).await?;
    } else {
        warn_stale(context, &vm);
    }
    let (mut exec, timeout) = exec_spec(args.session, args.command, env);
    exec.workspace = vm.workspace.map(|workspace| workspace.begin().into_os_string().into());
    let socket = PathBuf::from(vm.socket);
    let plan = SessionPlan { vm: vm.name.to_string(), socket, timeout, exec, lease: false };
    session::run(plan, &mut context.signals).await
}

/// Finds a vm that runs.
///
/// # Errors
/// When there is none of that name, or it does not run.
pub(crate) async fn running(context: &mut Context, vm: String) -> Result<VmView, Stop> {
    let outcome = context.ask(Request::VmShow { vm }).await?;
    let vm = expect_outcome!(outcome, Vm)?;
    if matches!(vm.state, VmState::Running | VmState::Starting) {
        return Ok(vm);
    }
    Err(not_running(&vm).into())
}

/// Returns the failure of what takes a vm that runs.
pub(crate) fn not_running(vm: &VmView) -> WireError {
    let message = format!("vm `{}` is not running, it is {}", vm.name, state_word(vm.state));
    let hint = format!("start it with `banger vm start {}`", vm.name);
    WireError::new(ErrorCode::Failed, message).hinted(hint)
}

/// Refuses what can be refused before anything is made.
fn check(args: &RunArgs) -> Result<(), WireError> {
    if args.detach && args.rm {
        return Err(invalid("`-d` and `--rm` contradict each other: nothing would ever end the vm")
            .hinted("leave one of them out"));
    }
    if args.reuse && args.rm {
        return Err(invalid(
            "`--reuse` and `--rm` contradict each other: a vm that goes can't be gone back into",
        )
        .hinted("leave one of them out"));
    }
    if args.detach && args.session.forward_agent {
        return Err(invalid("`-d` makes a vm and returns, so nothing runs that could use `-A`")
            .hinted("start it with `banger vm run -d`, then use `banger vm exec -A`"));
    }
    if args.detach && !args.command.is_empty() {
        return Err(invalid("`-d` makes a vm and returns, so it takes no command")
            .hinted("start it with `banger vm run -d`, then use `banger vm exec`"));
    }
    if args.detach && (args.apply || args.export.is_some()) {
        return Err(invalid("`-d` returns before anything has changed that could be brought back")
            .hinted("use `banger vm workspace export` later"));
    }
    if args.json && !args.detach && !args.dry_run {
        return Err(invalid("`--json` needs `-d` or `--dry-run`: otherwise stdout is the command's"));
    }
    Ok(())
}

/// An agent that is to be forwarded has to be there before anything is made.
async fn check_agent(context: &mut Context, args: &SessionArgs) -> Result<(), Stop> {
    if args.forward_agent {
        context.signals.unless(async { Ok(agent::find().await?) }).await?;
    }
    Ok(())
}

fn vm_spec(
    args: SpecArgs,
    rm: bool,
    default_wait: Wait,
    checkout: Option<&Survey>,
) -> Result<VmSpec, WireError> {
    let checkout = checkout.filter(|_| !args.no_project_config);
    Ok(VmSpec {
        auto_stop_after: args.auto_stop_after,
        publish: args.publish,
        caches: args.cache,
        proxy: proxy_variables(),
        project: checkout.map(|survey| project::read(&survey.root)).transpose()?.flatten(),
        env: env::collect(&args.env_file, &args.env)?,
        name: args.name,
        image: args.image.map(local_image).transpose()?,
        kernel: args.kernel_ref,
        vcpu: args.vcpu,
        memory: args.memory,
        disk_size: args.disk_size,
        net: args.net.as_ref().map(|net| net.mode),
        net_rules: NetRules {
            allow: args.net.and_then(|net| net.allow).unwrap_or_default(),
            deny: Vec::new(),
        },
        network: args.network.and_then(NetworkChoice::name),
        vmm: args.vmm.map(Into::into),
        rm,
        wait: args.wait.map_or(default_wait, Into::into),
    })
}

/// Makes the path of an image in a directory absolute: the daemon is somewhere else.
fn local_image(image: String) -> Result<String, WireError> {
    match local(&image)? {
        Some(Local::Layout(reference)) => Ok(reference),
        Some(Local::Archive(..)) => {
            let shown = escape(&image);
            Err(invalid(format!("`{shown}` has to be loaded first"))
                .hinted(format!("use `banger image pull {shown} --name NAME`, then `--image NAME`")))
        }
        None => Ok(image),
    }
}

/// A shell gets a terminal where there is one; a command only when asked, so that its streams stay apart.
fn exec_spec(
    args: SessionArgs,
    command: Vec<OsString>,
    env: Vec<env::Variable>,
) -> (ExecSpec, Option<Duration>) {
    let wanted = command.is_empty() && terminal::stdin_is_terminal() && terminal::stdout_is_terminal();
    let tty = (args.tty || (wanted && !args.no_tty)).then(terminal::size);
    let spec = ExecSpec {
        argv: command.into_iter().map(ByteString::from).collect(),
        env,
        workdir: args.workdir.map(ByteString::from),
        workspace: None,
        user: args.user,
        term: tty.and_then(|_| std::env::var("TERM").ok()),
        tty,
        forward_agent: args.forward_agent,
    };
    (spec, args.timeout)
}

async fn dry_run(context: &mut Context, spec: VmSpec, json: bool) -> Ended {
    let outcome = context.follow(Request::VmPlan(Box::new(spec))).await?;
    let plan = expect_outcome!(outcome, Plan)?;
    if json {
        context.ui.json(&plan)?;
        return Ok(0);
    }
    let mut text = format!("{}\n", escape(&plan_line(&plan)));
    if let Some(note) = &plan.note {
        text.push_str(&format!("{}\n", escape(note)));
    }
    if plan.pull_image {
        text.push_str(&format!("would pull image {}\n", escape(&plan.image)));
    }
    if plan.pull_kernel {
        text.push_str(&format!("would pull kernel {}\n", plan.kernel));
    }
    context.ui.data(&text)?;
    Ok(0)
}

/// Starts a vm with its stages shown, and says when it is ready.
pub(crate) async fn start(context: &mut Context, request: Request, rm: bool) -> Result<StartedVm, Stop> {
    let ui = &context.ui;
    let client = &context.client;
    let mut progress = Progress::new(ui);
    let mut observe = |event: &Event| progress.observe(event);
    let result = context.signals.unless(async { Ok(client.ask(request, &mut observe).await?) }).await;
    progress.finish();
    let outcome = result.map_err(|stop| explain_kept(stop, progress.planned.as_deref(), rm))?;
    let started = match outcome {
        Outcome::Started(started) => started,
        _ => return Err(crate::stop::unexpected_answer().into()),
    };
    for line in ready_lines(&started, ui.is_verbose()) {
        ui.note(&line);
    }
    Ok(started)
}

/// A vm that never became reachable is kept, which with `--rm` is not what was asked for.
fn explain_kept(stop: Stop, name: Option<&str>, rm: bool) -> Stop {
    match (stop, name) {
        (Stop::Failed(mut error), Some(name))
            if error.code == ErrorCode::Unreachable && (rm || error.hint.is_none()) =>
        {
            error.hint = Some(format!(
                "the vm was kept: see `banger vm logs {name}` and `banger vm show {name}`, \
                 then `banger vm delete --force {name}`"
            ));
            Stop::Failed(error)
        }
        (stop, _) => stop,
    }
}

fn tell_vm(context: &Context, vm: &VmView, json: bool) -> Ended {
    if json {
        context.ui.json(vm)?;
    } else {
        context.ui.data(&format!("{}\n", vm.name))?;
    }
    Ok(0)
}

/// The daemon deletes a vm whose lease has ended by itself; asking again means that nothing is left when we return.
async fn delete(context: &mut Context, vm: &VmView) {
    let request = Request::VmDelete { vm: vm.id.to_string(), force: true };
    match context.ask(request).await {
        Ok(_) | Err(Stop::Signalled(_)) => {}
        Err(Stop::Failed(error)) if error.code == ErrorCode::NotFound => {}
        Err(Stop::Failed(error)) => {
            context.ui.warning(&format!("vm `{}` is not deleted yet: {}", vm.name, error.message));
        }
        Err(_) => {}
    }
}
