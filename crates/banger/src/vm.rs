//! The vm commands without a session: life cycle, lists, pruning.

use crate::args::{
    DeleteArgs, KillArgs, ListArgs, PruneArgs, RestartArgs, SetArgs, ShowArgs, StartArgs, StopArgs, VmCommand,
};
use crate::context::{Context, expect_outcome};
use crate::many::{Doing, each_vm};
use crate::progress::processor_word;
use crate::signal_name::SIGKILL;
use crate::stop::{Ended, Stop, invalid};
use crate::streams;
use crate::table::{Table, render_pairs};
use crate::text::{age, bytes, date, duration, now};
use crate::{console, cp, logs, net, ports, run, ssh, stats, workspace};
use banger_wire::bytes::ByteString;
use banger_wire::daemon::{NetMode, Pruned, Request, VmState, VmView};
use banger_wire::net::{MemberView, NetView};
use banger_wire::time::millis;
use std::time::Duration;

const START: Doing = Doing { verb: "start", done: "started" };
const STOP: Doing = Doing { verb: "stop", done: "stopped" };
const RESTART: Doing = Doing { verb: "restart", done: "restarted" };
const KILL: Doing = Doing { verb: "kill", done: "killed" };
const SIGNAL: Doing = Doing { verb: "signal", done: "signalled" };
const DELETE: Doing = Doing { verb: "delete", done: "deleted" };
/// What a column shows that has nothing to show.
pub(crate) const NOTHING: &str = "-";

/// Runs `banger vm …`.
pub(crate) async fn dispatch(context: &mut Context, command: VmCommand) -> Ended {
    match command {
        VmCommand::Run(args) => run::run(context, *args).await,
        VmCommand::Create(args) => run::create(context, *args).await,
        VmCommand::Exec(args) => run::exec(context, *args).await,
        VmCommand::Cp(args) => cp::copy(context, args).await,
        VmCommand::Ssh(args) => ssh::ssh(context, args).await,
        VmCommand::SshProxy(args) => ssh::proxy(context, args).await,
        VmCommand::Start(args) => start(context, args).await,
        VmCommand::Stop(args) => stop(context, args).await,
        VmCommand::Restart(args) => restart(context, args).await,
        VmCommand::Kill(args) => kill(context, args).await,
        VmCommand::Set(args) => set(context, args).await,
        VmCommand::Delete(DeleteArgs { refs, force }) => {
            each_vm(context, refs.vms, DELETE, |vm| vec![Request::VmDelete { vm, force }]).await
        }
        VmCommand::List(args) => list(context, args).await,
        VmCommand::Show(args) => show(context, args).await,
        VmCommand::Logs(args) => logs::vm_logs(context, args).await,
        VmCommand::Console(args) => console::attach(context, args).await,
        VmCommand::Stats(args) => stats::stats(context, args).await,
        VmCommand::Ports(args) => ports::ports(context, args).await,
        VmCommand::Net(command) => net::dispatch(context, command).await,
        VmCommand::Prune(args) => prune(context, args).await,
        VmCommand::Workspace(command) => workspace::command::dispatch(context, command).await,
    }
}

async fn start(context: &mut Context, args: StartArgs) -> Ended {
    let wait = args.wait.into();
    let first = args.refs.vms.first().cloned();
    match first.filter(|first| args.refs.vms.iter().all(|vm| vm == first)) {
        // Only one at a time can have the terminal's line.
        Some(vm) => {
            let started = run::start(context, Request::VmStart { vm, wait }, false).await?;
            context.ui.data(&format!("started {}\n", started.vm.name))?;
            Ok(0)
        }
        None => each_vm(context, args.refs.vms, START, |vm| vec![Request::VmStart { vm, wait }]).await,
    }
}

impl StopArgs {
    fn grace_ms(&self) -> u64 {
        millis(self.timeout)
    }
}

async fn stop(context: &mut Context, args: StopArgs) -> Ended {
    let grace_ms = args.grace_ms();
    each_vm(context, args.refs.vms, STOP, |vm| vec![Request::VmStop { vm, grace_ms }]).await
}

async fn restart(context: &mut Context, args: RestartArgs) -> Ended {
    let (grace_ms, wait) = (args.stop.grace_ms(), args.wait.into());
    let requests =
        |vm: String| vec![Request::VmStop { vm: vm.clone(), grace_ms }, Request::VmStart { vm, wait }];
    each_vm(context, args.stop.refs.vms, RESTART, requests).await
}

async fn kill(context: &mut Context, args: KillArgs) -> Ended {
    let (vms, signal) = (args.refs.vms, args.signal);
    if signal == SIGKILL {
        return each_vm(context, vms, KILL, |vm| vec![Request::VmKill { vm }]).await;
    }
    each_vm(context, vms, SIGNAL, |vm| vec![Request::VmSignal { vm, signal }]).await
}

async fn set(context: &mut Context, args: SetArgs) -> Ended {
    let (vcpu, memory, disk_size) = (args.vcpu, args.memory, args.disk_size);
    let is_of_networks = vcpu.is_none() && memory.is_none() && disk_size.is_none();
    if is_of_networks && args.net.is_none() && args.network.is_none() {
        return Err(invalid("there is nothing to change")
            .hinted("use `--vcpu`, `--memory`, `--disk-size`, `--net` or `--network`")
            .into());
    }
    let (net, net_allow) = args.net.map_or((None, None), |net| (Some(net.mode), net.allow));
    let (has_net, network) = (net.is_some(), args.network);
    let has_network = network.is_some();
    let request = Request::VmSet { vm: args.vm, vcpu, memory, disk_size, net, net_allow, network };
    let outcome = context.ask(request).await?;
    let vm = expect_outcome!(outcome, Vm)?;
    if args.json {
        context.ui.json(&vm)?;
        return Ok(0);
    }
    let runs = matches!(vm.state, VmState::Running | VmState::Starting);
    let mut text = String::new();
    if is_of_networks && runs && has_net {
        // What it reaches outside is what may count at once.
        let outcome = context.ask(Request::VmNetShow { vm: vm.id.to_string() }).await?;
        text += &net_sentence(vm.name.as_str(), &expect_outcome!(outcome, Net)?);
    } else if !is_of_networks || has_net {
        let net = net_word(vm.net);
        text += &format!(
            "{} has {} vcpu, {} memory, {} disk and network {net} from its next start\n",
            vm.name, vm.vcpu, vm.memory, vm.disk_size
        );
    }
    if has_network {
        text += &network_sentence(&vm, runs);
    }
    context.ui.data(&text)?;
    Ok(0)
}

/// What became of a vm's place in a network of vms.
fn network_sentence(vm: &VmView, runs: bool) -> String {
    let network = |name: Option<String>| match name {
        Some(name) => format!("network {name}"),
        None => "no network of vms".to_owned(),
    };
    let now = vm.network.as_ref().map(|member| member.name.to_string());
    match &vm.next_network {
        Some(next) => {
            let next = network(next.clone().name().map(|name| name.to_string()));
            format!("{} is in {next} from its next start, and in {} until then\n", vm.name, network(now))
        }
        None if runs => format!("{} is in {}\n", vm.name, network(now)),
        None => format!("{} is in {} from its next start\n", vm.name, network(now)),
    }
}

/// What became of the network of a vm that runs.
fn net_sentence(vm: &str, net: &NetView) -> String {
    let mode = net_word(net.mode);
    match net.next_mode.map(net_word) {
        Some(next) => format!("{vm} has network {next} from its next start, and {mode} until then\n"),
        None if net.live => format!("{vm} has network {mode}, and its rules are in force\n"),
        None => format!("{vm} has network {mode} from its next start\n"),
    }
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
    let heading = ["ID", "NAME", "STATE", "IMAGE", "ADDRESS", "VCPU", "MEM", "DISK", "WORKSPACE", "CREATED"];
    let mut table = Table::new(&heading);
    for vm in vms {
        table.row([
            vm.id.to_string(),
            vm.name.to_string(),
            state_word(vm.state).to_owned(),
            vm.image.clone(),
            vm.address.map_or_else(|| NOTHING.to_owned(), |address| address.to_string()),
            vm.vcpu.to_string(),
            vm.memory.to_string(),
            format!("{}/{}", bytes(vm.disk_used_bytes), vm.disk_size),
            vm.workspace
                .as_ref()
                .map_or_else(|| NOTHING.to_owned(), |workspace| path_text(&workspace.source)),
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
    let why = vm.network_warning.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
    let network = format!("{}{why}", net_word(vm.net));
    let restarts = (vm.watchdog_restarts > 0).then(|| vm.watchdog_restarts.to_string());
    let workspace =
        vm.workspace.as_ref().map(|of| format!("{} at {}", path_text(&of.source), path_text(&of.path)));
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
        ("network", Some(network)),
        ("vms' network", networks_text(vm)),
        ("address here", vm.address.map(|address| address.to_string())),
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
        ("disk file", vm.disk.clone()),
        ("console log", vm.console.clone()),
        ("command line", vm.cmdline.clone()),
    ])
}

/// A vm's place in a network of vms, and the one that it is in from its next start on.
fn networks_text(vm: &VmView) -> Option<String> {
    let now = vm.network.as_ref().map(member_text);
    match &vm.next_network {
        None => now,
        Some(next) => {
            Some(format!("{}; {next} from its next start", now.unwrap_or_else(|| "none".to_owned())))
        }
    }
}

/// A vm's place among those of its network.
fn member_text(member: &MemberView) -> String {
    let address = member.address.map(|address| format!(", {address}")).unwrap_or_default();
    let why = member.warning.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
    format!("{}{address}{why}", member.name)
}

fn path_text(path: &ByteString) -> String {
    path.as_os_str().to_string_lossy().into_owned()
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

pub(crate) fn net_word(net: NetMode) -> &'static str {
    match net {
        NetMode::Internet => "internet",
        NetMode::None => "none",
        NetMode::Full => "full",
        NetMode::Allow => "allow",
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
