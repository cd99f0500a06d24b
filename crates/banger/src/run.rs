//! `vm run`, `vm create` and `vm exec`: a vm and what runs in it.

use crate::args::{CreateArgs, ExecArgs, RunArgs, SessionArgs, SpecArgs};
use crate::context::{Context, expect_outcome};
use crate::env;
use crate::progress::{Progress, plan_line, ready_lines};
use crate::session::{self, SessionPlan};
use crate::stop::{Ended, Stop, invalid};
use crate::terminal;
use crate::text::escape;
use crate::upload::{Local, local};
use crate::vm::state_word;
use banger_wire::bytes::ByteString;
use banger_wire::daemon::{Event, Outcome, Request, StartedVm, VmSpec, VmState, VmView, Wait};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::ExecSpec;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Runs `banger vm run`.
pub(crate) async fn run(context: &mut Context, args: RunArgs) -> Ended {
    check(&args)?;
    if args.dry_run
        && let Some(path) = args.path.as_deref().filter(|path| path.exists())
    {
        if args.json {
            return Err(invalid("the list of a checkout's files can't be printed as JSON yet").into());
        }
        return dry_run_workspace(context, path);
    }
    check_path(args.path.as_deref())?;
    let default_wait = if args.command.is_empty() { Wait::Boot } else { Wait::Agent };
    let spec = vm_spec(args.spec, args.rm, default_wait)?;
    if args.dry_run {
        return dry_run(context, spec, args.json).await;
    }
    let rm = args.rm;
    let started = start(context, Request::VmRun(Box::new(spec)), rm).await?;
    if args.detach {
        return tell_vm(context, &started.vm, args.json);
    }
    let name = started.vm.name.to_string();
    let timeout = args.session.timeout;
    let mut exec = exec_spec(args.session, args.command, Vec::new());
    // Without a command an image without an init does what its maker meant it to do.
    if exec.argv.is_empty() {
        exec.argv = started.command.iter().map(|word| ByteString(word.clone().into_bytes())).collect();
    }
    let plan =
        SessionPlan { vm: name.clone(), socket: PathBuf::from(&started.socket), timeout, exec, lease: rm };
    let result = session::run(plan, &mut context.signals).await;
    if rm {
        delete(context, &started.vm).await;
    } else if result.is_ok() && context.ui.is_live() {
        context.ui.note(&format!("vm `{name}` keeps running; stop it with `banger vm stop {name}`"));
    }
    result
}

/// Runs `banger vm create`.
pub(crate) async fn create(context: &mut Context, args: CreateArgs) -> Ended {
    check_path(args.path.as_deref())?;
    let spec = vm_spec(args.spec, false, Wait::Boot)?;
    if args.dry_run {
        return dry_run(context, spec, args.json).await;
    }
    if args.no_start {
        let outcome = context.follow(Request::VmCreate(Box::new(spec))).await?;
        let vm = expect_outcome!(outcome, Created)?;
        return tell_vm(context, &vm, args.json);
    }
    let started = start(context, Request::VmRun(Box::new(spec)), false).await?;
    tell_vm(context, &started.vm, args.json)
}

/// Runs `banger vm exec`.
pub(crate) async fn exec(context: &mut Context, args: ExecArgs) -> Ended {
    let env = env::collect(&args.env_file, &args.env)?;
    let outcome = context.ask(Request::VmShow { vm: args.vm }).await?;
    let vm = expect_outcome!(outcome, Vm)?;
    if !matches!(vm.state, VmState::Running | VmState::Starting) {
        let message = format!("vm `{}` is not running, it is {}", vm.name, state_word(vm.state));
        let hint = format!("start it with `banger vm start {}`", vm.name);
        return Err(WireError::new(ErrorCode::Failed, message).hinted(hint).into());
    }
    let plan = SessionPlan {
        vm: vm.name.to_string(),
        socket: PathBuf::from(vm.socket),
        timeout: args.session.timeout,
        exec: exec_spec(args.session, args.command, env),
        lease: false,
    };
    session::run(plan, &mut context.signals).await
}

/// Lists what would travel; needs no daemon. The list is for people, so names are escaped.
fn dry_run_workspace(context: &Context, path: &Path) -> Ended {
    let plan = crate::workspace::plan(path)?;
    for name in &plan.held_back {
        context.ui.warning(&format!("`{}` looks like a secret and stays behind", name.display()));
    }
    let mut text = String::new();
    for (mode, len, name) in &plan.files {
        text.push_str(&format!("{mode:06o} {len:>10} {}\n", escape(&name.to_string_lossy())));
    }
    let total: u64 = plan.files.iter().map(|file| file.1).sum();
    text.push_str(&format!("{} files, {total} bytes\n", plan.files.len()));
    context.ui.data(&text)?;
    Ok(0)
}

/// Refuses what can be refused before anything is made.
fn check(args: &RunArgs) -> Result<(), WireError> {
    if args.detach && args.rm {
        return Err(invalid("`-d` and `--rm` contradict each other: nothing would ever end the vm")
            .hinted("leave one of them out"));
    }
    if args.detach && !args.command.is_empty() {
        return Err(invalid("`-d` makes a vm and returns, so it takes no command")
            .hinted("start it with `banger vm run -d`, then use `banger vm exec`"));
    }
    if args.json && !args.detach && !args.dry_run {
        return Err(invalid("`--json` needs `-d` or `--dry-run`: otherwise stdout is the command's"));
    }
    Ok(())
}

fn check_path(path: Option<&Path>) -> Result<(), WireError> {
    let Some(path) = path else { return Ok(()) };
    let shown = escape(&path.display().to_string());
    let error = invalid(format!("workspaces are not there yet, so `{shown}` can't be placed in a vm"));
    Err(if path.exists() {
        error
    } else {
        error.hinted(format!("to run a command, put it after `--`: `banger vm run -- {shown}`"))
    })
}

fn vm_spec(args: SpecArgs, rm: bool, default_wait: Wait) -> Result<VmSpec, WireError> {
    Ok(VmSpec {
        env: env::collect(&args.env_file, &args.env)?,
        name: args.name,
        image: args.image.map(local_image).transpose()?,
        kernel: args.kernel_ref,
        vcpu: args.vcpu,
        memory: args.memory,
        disk_size: args.disk_size,
        net: args.net.map(Into::into),
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
fn exec_spec(args: SessionArgs, command: Vec<OsString>, env: Vec<env::Variable>) -> ExecSpec {
    let wanted = command.is_empty() && terminal::stdin_is_terminal() && terminal::stdout_is_terminal();
    let tty = (args.tty || (wanted && !args.no_tty)).then(terminal::size);
    ExecSpec {
        argv: command.into_iter().map(ByteString::from).collect(),
        env,
        workdir: args.workdir.map(ByteString::from),
        user: args.user,
        term: tty.and_then(|_| std::env::var("TERM").ok()),
        tty,
    }
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
