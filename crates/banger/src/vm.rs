//! The vm commands without a session: life cycle, lists, pruning.

use crate::args::{
    DeleteArgs, ListArgs, PruneArgs, RefsArgs, RestartArgs, SetArgs, ShowArgs, StartArgs, StopArgs, VmCommand,
};
use crate::context::{Context, expect_outcome};
use crate::progress::processor_word;
use crate::stop::{Ended, Stop, invalid};
use crate::streams;
use crate::table::{Table, render_pairs};
use crate::text::{age, bytes, date, duration, now};
use crate::{logs, run, workspace};
use banger_wire::bytes::ByteString;
use banger_wire::daemon::{NetMode, Pruned, Request, VmState, VmView};
use std::collections::BTreeSet;
use std::time::Duration;

/// Runs `banger vm …`.
pub(crate) async fn dispatch(context: &mut Context, command: VmCommand) -> Ended {
    match command {
        VmCommand::Run(args) => run::run(context, *args).await,
        VmCommand::Create(args) => run::create(context, *args).await,
        VmCommand::Exec(args) => run::exec(context, *args).await,
        VmCommand::Start(args) => start(context, args).await,
        VmCommand::Stop(args) => stop(context, args).await,
        VmCommand::Restart(args) => restart(context, args).await,
        VmCommand::Kill(RefsArgs { vms }) => each(context, vms, "killed", |vm| Request::VmKill { vm }).await,
        VmCommand::Set(args) => set(context, args).await,
        VmCommand::Delete(DeleteArgs { refs, force }) => {
            each(context, refs.vms, "deleted", |vm| Request::VmDelete { vm, force }).await
        }
        VmCommand::List(args) => list(context, args).await,
        VmCommand::Show(args) => show(context, args).await,
        VmCommand::Logs(args) => logs::vm_logs(context, args).await,
        VmCommand::Prune(args) => prune(context, args).await,
        VmCommand::Workspace(command) => workspace::command::dispatch(context, command).await,
    }
}

async fn start(context: &mut Context, args: StartArgs) -> Ended {
    let wait = args.wait.into();
    match <[String; 1]>::try_from(args.refs.vms) {
        // Only one at a time can have the terminal's line.
        Ok([vm]) => {
            let started = run::start(context, Request::VmStart { vm, wait }, false).await?;
            context.ui.data(&format!("started {}\n", started.vm.name))?;
            Ok(0)
        }
        Err(vms) => each(context, vms, "started", |vm| Request::VmStart { vm, wait }).await,
    }
}

impl StopArgs {
    fn grace_ms(&self) -> u64 {
        u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX)
    }
}

async fn stop(context: &mut Context, args: StopArgs) -> Ended {
    let grace_ms = args.grace_ms();
    each(context, args.refs.vms, "stopped", |vm| Request::VmStop { vm, grace_ms }).await
}

async fn restart(context: &mut Context, args: RestartArgs) -> Ended {
    let (grace_ms, wait) = (args.stop.grace_ms(), args.wait.into());
    let requests =
        |vm: String| vec![Request::VmStop { vm: vm.clone(), grace_ms }, Request::VmStart { vm, wait }];
    each_in_turn(context, args.stop.refs.vms, "restarted", requests).await
}

async fn set(context: &mut Context, args: SetArgs) -> Ended {
    let request = Request::VmSet { vm: args.vm, vcpu: args.vcpu, memory: args.memory };
    let outcome = context.ask(request).await?;
    let vm = expect_outcome!(outcome, Vm)?;
    if args.json {
        context.ui.json(&vm)?;
    } else {
        context
            .ui
            .data(&format!("{} has {} vcpu and {} from its next start\n", vm.name, vm.vcpu, vm.memory))?;
    }
    Ok(0)
}

/// Sends one request for each name, all at once, and reports each as it ends.
pub(crate) async fn each<N: Ord + Clone + ToString>(
    context: &mut Context,
    names: Vec<N>,
    verb: &str,
    request: impl Fn(N) -> Request,
) -> Ended {
    each_in_turn(context, names, verb, |name| vec![request(name)]).await
}

/// The same with several requests, one after another while they succeed.
async fn each_in_turn<N: Ord + Clone + ToString>(
    context: &mut Context,
    names: Vec<N>,
    verb: &str,
    requests: impl Fn(N) -> Vec<Request>,
) -> Ended {
    let mut tasks = tokio::task::JoinSet::new();
    for name in BTreeSet::from_iter(names) {
        let (client, requests, name) = (context.client.clone(), requests(name.clone()), name.to_string());
        tasks.spawn(async move {
            let mut result = Ok(());
            for request in requests {
                result = client.ask(request, &mut |_| {}).await.map(drop);
                if result.is_err() {
                    break;
                }
            }
            (name, result)
        });
    }
    let mut told = false;
    while let Some(joined) = context.signals.unless(async { Ok(tasks.join_next().await) }).await? {
        let (name, result) = joined
            .map_err(|error| Stop::from(crate::stop::failed("a request did not end as it should", &error)))?;
        match result {
            Ok(()) => context.ui.data(&format!("{verb} {}\n", crate::text::escape(&name)))?,
            Err(error) => {
                context.ui.error(&error);
                told = true;
            }
        }
    }
    if told { Err(Stop::Told) } else { Ok(0) }
}

/// Runs `banger vm list`.
pub(crate) async fn list(context: &mut Context, args: ListArgs) -> Ended {
    let outcome = context.ask(Request::VmList).await?;
    let vms = expect_outcome!(outcome, Vms)?;
    if args.json {
        context.ui.json(&vms)?;
    } else if args.quiet {
        let ids: String = vms.iter().map(|vm| format!("{}\n", vm.id)).collect();
        context.ui.data(&ids)?;
    } else {
        context.ui.data(&vm_table(&vms, now()))?;
    }
    Ok(0)
}

/// Returns the table of vms.
pub(crate) fn vm_table(vms: &[VmView], now: i64) -> String {
    let mut table = Table::new(&["ID", "NAME", "STATE", "IMAGE", "VCPU", "MEM", "DISK", "CREATED"]);
    for vm in vms {
        table.row([
            vm.id.to_string(),
            vm.name.to_string(),
            state_word(vm.state).to_owned(),
            vm.image.clone(),
            vm.vcpu.to_string(),
            vm.memory.to_string(),
            format!("{}/{}", bytes(vm.disk_used_bytes), vm.disk_size),
            age(vm.created, now),
        ]);
    }
    table.render()
}

async fn show(context: &mut Context, args: ShowArgs) -> Ended {
    let outcome = context.ask(Request::VmShow { vm: args.vm }).await?;
    let vm = expect_outcome!(outcome, Vm)?;
    if args.json {
        context.ui.json(&vm)?;
    } else {
        context.ui.data(&vm_pairs(&vm, now()))?;
    }
    Ok(0)
}

fn vm_pairs(vm: &VmView, now: i64) -> String {
    let pid = vm.vmm_pid.map(|pid| format!(", process {pid}")).unwrap_or_default();
    let restarts = (vm.watchdog_restarts > 0).then(|| vm.watchdog_restarts.to_string());
    let shown = |path: &ByteString| path.as_os_str().to_string_lossy().into_owned();
    let workspace = vm.workspace.as_ref().map(|of| format!("{} at {}", shown(&of.source), shown(&of.path)));
    let caches: Vec<String> = vm.caches.iter().map(|of| format!("{} at {}", of.name, of.path)).collect();
    let caches = Some(caches.join(", ")).filter(|caches| !caches.is_empty());
    render_pairs(&[
        ("id", Some(vm.id.to_string())),
        ("name", Some(vm.name.to_string())),
        ("state", Some(state_word(vm.state).to_owned())),
        ("error", vm.error.clone()),
        ("image", Some(vm.image.clone())),
        ("kernel", Some(vm.kernel.clone())),
        ("vcpu", Some(vm.vcpu.to_string())),
        ("memory", Some(vm.memory.to_string())),
        ("disk", Some(format!("{} of {}", bytes(vm.disk_used_bytes), vm.disk_size))),
        ("network", Some(net_word(vm.net).to_owned())),
        ("vmm", Some(format!("{}, {}{pid}", vm.vmm, processor_word(vm.emulated)))),
        ("boot id", vm.boot_id.clone()),
        ("boot restarts", restarts),
        ("workspace", workspace),
        ("caches", caches),
        ("stops by itself", vm.auto_stop_at.map(|at| stop_text(at, now))),
        ("created", Some(date(vm.created, now))),
        ("deleted at end", vm.rm.then(|| "yes".to_owned())),
        ("directory", Some(vm.dir.clone())),
        ("socket", Some(vm.socket.clone())),
        ("command line", vm.cmdline.clone()),
    ])
}

/// When a vm that nobody uses stops.
fn stop_text(at: i64, now: i64) -> String {
    let left = Duration::from_secs(u64::try_from(at.saturating_sub(now)).unwrap_or(0));
    format!("in {}, unless it is used before", duration(left))
}

/// Returns a state as a word.
pub(crate) fn state_word(state: VmState) -> &'static str {
    match state {
        VmState::Created => "created",
        VmState::Starting => "starting",
        VmState::Running => "running",
        VmState::Stopping => "stopping",
        VmState::Stopped => "stopped",
        VmState::Error => "error",
    }
}

fn net_word(net: NetMode) -> &'static str {
    match net {
        NetMode::Internet => "internet",
        NetMode::None => "none",
        NetMode::Full => "full",
    }
}

async fn prune(context: &mut Context, args: PruneArgs) -> Ended {
    if !args.force {
        if !crate::terminal::stdin_is_terminal() {
            return Err(invalid("pruning deletes disks, and nobody can be asked here")
                .hinted("use `banger vm prune --force`")
                .into());
        }
        let outcome = context.ask(Request::VmPrune { dry_run: true }).await?;
        let pruned = expect_outcome!(outcome, Pruned)?;
        if pruned.vms.is_empty() {
            return report(context, &pruned, args.json);
        }
        if !confirm(context, &pruned).await? {
            context.ui.note("nothing was deleted");
            return Err(Stop::Told);
        }
    }
    let outcome = context.ask(Request::VmPrune { dry_run: false }).await?;
    let pruned = expect_outcome!(outcome, Pruned)?;
    report(context, &pruned, args.json)
}

async fn confirm(context: &mut Context, pruned: &Pruned) -> Result<bool, Stop> {
    context.ui.aside(&vm_table(&pruned.vms, now()));
    let (count, freed) = (pruned.vms.len(), bytes(pruned.freed_bytes));
    let vms = if count == 1 { "this vm".to_owned() } else { format!("these {count} vms") };
    context.ui.question(&format!("delete {vms} and free {freed}? [y/N]"));
    let answer = context.signals.unless(async {
        streams::read_line()
            .await
            .map_err(|error| crate::stop::failed("could not read the answer", &error).into())
    });
    Ok(matches!(answer.await?.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

fn report(context: &Context, pruned: &Pruned, json: bool) -> Ended {
    if json {
        context.ui.json(pruned)?;
        return Ok(0);
    }
    let deleted: String = pruned.vms.iter().map(|vm| format!("deleted {}\n", vm.name)).collect();
    context.ui.data(&deleted)?;
    if pruned.vms.is_empty() {
        context.ui.data("nothing to prune\n")?;
    } else {
        context.ui.data(&format!("freed {}\n", bytes(pruned.freed_bytes)))?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_time_to_come_is_said_as_such() {
        assert_eq!(super::stop_text(1_000_090, 1_000_000), "in 1 min 30 s, unless it is used before");
        assert_eq!(super::stop_text(5, 9), "in 0 ms, unless it is used before");
    }
}
