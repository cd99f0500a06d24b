//! The command line as a grammar. What needs more than one flag to decide is decided by the commands.

mod config;
mod copy;
mod dns;
mod image;
mod net;
mod ports;
mod ssh;
mod vm;

use crate::text::parse_duration;
use banger_wire::daemon::{CacheMount, VmmChoice, Wait, WorkspaceMode};
use banger_wire::names::{KernelName, VmName};
use banger_wire::net::NetworkChoice;
use banger_wire::ports::Publish;
use banger_wire::size::Mebibytes;
use banger_wire::time::AutoStop;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

pub(crate) use config::{CacheCommand, CachePruneArgs, ConfigCommand};
pub(crate) use copy::CopyArgs;
pub(crate) use dns::{DnsCommand, DnsSetupArgs, ResolverArg};
pub(crate) use image::{ImageCacheCommand, ImageCommand, KernelCommand};
pub(crate) use net::{NetArg, NetChangeArgs, NetCommand};
pub(crate) use ports::PortsArgs;
pub(crate) use ssh::{SshArgs, SshConfigArgs, SshProxyArgs, words_apart};
pub(crate) use vm::{
    ConsoleArgs, DeleteArgs, KillArgs, RestartArgs, SetArgs, StartArgs, StatsArgs, StopArgs,
};

const EXAMPLES: &str = "\
banger run                     a shell in a new vm
banger run --rm -- uname -a    one command in a vm of its own; exits with its status
banger ps                      the vms there are
";
const RUN_EXAMPLES: &str = "\
banger vm run                             a shell in a new vm
banger vm run --rm -- make test           one command in a vm of its own; exits with its status
banger vm run --rm ./repo -- make test    the same, in a copy of a git checkout
tar c . | banger vm run --rm -- tar tv    streams are the command's own
";
const EXEC_EXAMPLES: &str = "\
banger vm exec web -- ps aux    a command in a running vm
banger vm exec web              a shell there
";
const SSH_EXAMPLES: &str = "\
banger vm ssh web                            a shell, by ssh
banger vm ssh web -L 8080:localhost:80 -N    the vm's port 80 as 8080 here
";

/// Heading of the flags about a checkout.
const WORKSPACE: &str = "Workspace";

/// Disposable microVMs from one command.
#[derive(Debug, Parser)]
#[command(name = "banger", version = banger_wire::BUILD, before_help = EXAMPLES, max_term_width = 100)]
pub(crate) struct Cli {
    /// Show every stage and its time.
    #[arg(short, long, global = true)]
    pub(crate) verbose: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make, use and remove vms.
    #[command(subcommand)]
    Vm(VmCommand),
    /// Short for `vm run`.
    #[command(before_help = RUN_EXAMPLES)]
    Run(Box<RunArgs>),
    /// Short for `vm exec`.
    #[command(before_help = EXEC_EXAMPLES)]
    Exec(Box<ExecArgs>),
    /// Short for `vm ssh`.
    #[command(before_help = SSH_EXAMPLES)]
    Ssh(SshArgs),
    /// Short for `vm list`.
    Ps(ListArgs),
    /// Short for `vm workspace`.
    #[command(subcommand)]
    Workspace(WorkspaceCommand),
    /// Root filesystems.
    #[command(subcommand)]
    Image(ImageCommand),
    /// Kernels.
    #[command(subcommand)]
    Kernel(KernelCommand),
    /// Filesystems that outlive vms, for what package managers download.
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Have `ssh NAME.vm`, `scp`, `rsync` and editors find vms.
    SshConfig(SshConfigArgs),
    /// The owner's settings.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Names of vms on this machine.
    #[command(subcommand)]
    Dns(DnsCommand),
    /// Check this machine; the last check boots a vm.
    Doctor(DoctorArgs),
    /// Fetch what is missing, and say what must be installed by hand.
    Setup(SetupArgs),
    /// The daemon, which starts by itself.
    #[command(subcommand)]
    Daemon(DaemonCommand),
    /// Show the builds of banger and its daemon.
    Version(JsonArgs),
}

/// `banger doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// First mend what takes no root, and list the commands for the rest.
    #[arg(long)]
    pub(crate) fix: bool,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `banger setup`.
#[derive(Debug, Args)]
pub(crate) struct SetupArgs {
    /// Only say what would be done.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// A mirror of Firecracker's releases; fetches it also where there is no KVM.
    #[arg(long, value_name = "URL")]
    pub(crate) firecracker_url: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `banger vm`.
#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Make a vm and run a shell or one command in it.
    #[command(before_help = RUN_EXAMPLES)]
    Run(Box<RunArgs>),
    /// Make a vm and start it.
    Create(Box<CreateArgs>),
    /// Start vms.
    Start(StartArgs),
    /// Stop vms in order.
    Stop(StopArgs),
    /// Stop vms in order and start them again.
    Restart(RestartArgs),
    /// End vms at once, or send them a signal.
    Kill(KillArgs),
    /// Give a vm other processors, memory or networks or a larger disk, from its next start on.
    Set(SetArgs),
    /// Delete vms and their disks.
    #[command(alias = "rm")]
    Delete(DeleteArgs),
    /// List vms.
    #[command(alias = "ls")]
    List(ListArgs),
    /// Show everything known about a vm.
    Show(ShowArgs),
    /// Show a vm's serial console.
    Logs(LogsArgs),
    /// Attach to a vm's serial console.
    Console(ConsoleArgs),
    /// Show what vms use: processors, memory, disk, network.
    Stats(StatsArgs),
    /// Show what listens in vms, and where that is reached.
    Ports(PortsArgs),
    /// What a vm may reach, and what it was refused.
    #[command(subcommand)]
    Net(NetCommand),
    /// Run a command or a shell in a running vm.
    #[command(before_help = EXEC_EXAMPLES)]
    Exec(Box<ExecArgs>),
    /// Copy files and trees into a running vm, or out of it.
    #[command(before_help = copy::EXAMPLES)]
    Cp(CopyArgs),
    /// Run `ssh` into a running vm, of any image.
    #[command(before_help = SSH_EXAMPLES)]
    Ssh(SshArgs),
    /// Carries the bytes of one ssh connection.
    #[command(hide = true)]
    SshProxy(SshProxyArgs),
    /// Delete every vm that is not running.
    Prune(PruneArgs),
    /// Checkouts in vms.
    #[command(subcommand)]
    Workspace(WorkspaceCommand),
}

/// `banger vm workspace`.
#[derive(Debug, Subcommand)]
pub(crate) enum WorkspaceCommand {
    /// Place a checkout in a running vm, or bring the one there up to date.
    Prepare(PrepareArgs),
    /// Take what changed in the vm as one patch, or apply it to the checkout.
    Export(ExportArgs),
    /// Show what changed on both sides since the checkout was placed.
    Status(ShowArgs),
    /// Take the last apply to a checkout back.
    Undo {
        /// A directory of the checkout; the current one when absent.
        path: Option<PathBuf>,
    },
}

/// `banger vm workspace export`.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Write the patch to this file instead of stdout.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Compare with this commit of the checkout instead of with what was placed.
    #[arg(long, value_name = "COMMIT")]
    pub(crate) base_commit: Option<String>,
    /// Change the files of the checkout accordingly; `banger vm workspace undo` takes that back.
    #[arg(long, conflicts_with = "base_commit")]
    pub(crate) apply: bool,
    /// Show what changed file by file, and ask for each whether to take it.
    #[arg(long)]
    pub(crate) review: bool,
    /// Take the commits made in the vm instead, as this branch of the checkout.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["output", "base_commit", "apply", "review"])]
    pub(crate) branch: Option<String>,
    /// Name, id or the beginning of an id.
    #[arg(value_name = "REF")]
    pub(crate) vm: String,
}

/// `banger vm workspace prepare`.
#[derive(Debug, Args)]
pub(crate) struct PrepareArgs {
    #[command(flatten)]
    pub(crate) workspace: WorkspaceArgs,
    /// List what would be copied.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print the list as JSON.
    #[arg(long, requires = "dry_run")]
    pub(crate) json: bool,
    /// Do not install the tools that the checkout names for mise.
    #[arg(long, help_heading = WORKSPACE)]
    pub(crate) no_bootstrap: bool,
    /// Replace what was changed in the vm.
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Name, id or the beginning of an id.
    #[arg(value_name = "REF")]
    pub(crate) vm: String,
    /// A directory of the checkout; the one that was placed last, else the current one, when absent.
    pub(crate) path: Option<PathBuf>,
}

/// What a vm is made of.
#[derive(Debug, Args)]
pub(crate) struct SpecArgs {
    /// Its name; made up when absent.
    #[arg(long)]
    pub(crate) name: Option<VmName>,
    /// Image name or OCI reference.
    #[arg(long, value_name = "NAME|OCI-REF")]
    pub(crate) image: Option<String>,
    /// Kernel.
    #[arg(long, value_name = "NAME")]
    pub(crate) kernel_ref: Option<KernelName>,
    /// Virtual processors.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) vcpu: Option<u32>,
    /// Memory, such as `512M` or `2G`.
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<Mebibytes>,
    /// Limit of its own disk, such as `8G`.
    #[arg(long, value_name = "SIZE")]
    pub(crate) disk_size: Option<Mebibytes>,
    /// What it may reach: `internet` (nothing private), `none`, `full` (what this host reaches), or
    /// `allow=HOST[:PORT],…` (names, addresses, networks, and nothing else).
    #[arg(long, value_name = "MODE")]
    pub(crate) net: Option<NetArg>,
    /// Join the vms of this network: they reach each other under their names, whatever `--net` says; `none` joins none.
    #[arg(long, value_name = "NAME")]
    pub(crate) network: Option<NetworkChoice>,
    /// What runs it [default: the config's `vmm`, else auto].
    #[arg(long, value_name = "VMM")]
    pub(crate) vmm: Option<VmmArg>,
    /// A variable of every session; `K` alone takes the value from here.
    #[arg(long, value_name = "K[=V]")]
    pub(crate) env: Vec<OsString>,
    /// A file of such lines.
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// What ready means [default: agent with a command, boot for a shell].
    #[arg(long, value_name = "STATE")]
    pub(crate) wait: Option<WaitArg>,
    /// Stop it when it had no session for this time [default: the config's, else never].
    #[arg(long, value_name = "TIME|never")]
    pub(crate) auto_stop_after: Option<AutoStop>,
    /// Open a port of the host for one of the vm's, at 127.0.0.1 where no address is given. A loopback address takes
    /// its owner's and root's connections only, any other one everybody's.
    #[arg(long, value_name = "[ADDR:]HOSTPORT:GUESTPORT", value_parser = ports::parse_publish)]
    pub(crate) publish: Vec<Publish>,
    /// Mount a filesystem that outlives the vm; it is made when there is none of that name.
    #[arg(long, value_name = "NAME:PATH", value_parser = config::parse_cache)]
    pub(crate) cache: Vec<CacheMount>,
    /// Leave the checkout's `.banger.toml` aside.
    #[arg(long, help_heading = WORKSPACE)]
    pub(crate) no_project_config: bool,
}

impl SpecArgs {
    /// The flags that say what a new vm is, and whether each was given.
    pub(crate) fn given(&self) -> [(&'static str, bool); 12] {
        [
            ("--name", self.name.is_some()),
            ("--image", self.image.is_some()),
            ("--kernel-ref", self.kernel_ref.is_some()),
            ("--vcpu", self.vcpu.is_some()),
            ("--memory", self.memory.is_some()),
            ("--disk-size", self.disk_size.is_some()),
            ("--net", self.net.is_some()),
            ("--network", self.network.is_some()),
            ("--vmm", self.vmm.is_some()),
            ("--auto-stop-after", self.auto_stop_after.is_some()),
            ("--publish", !self.publish.is_empty()),
            ("--cache", !self.cache.is_empty()),
        ]
    }
}

/// How a checkout is placed in a vm.
#[derive(Debug, Args)]
pub(crate) struct WorkspaceArgs {
    /// How much of the checkout is copied.
    #[arg(long, value_name = "MODE", help_heading = WORKSPACE)]
    pub(crate) mode: Option<ModeArg>,
    /// Where it goes in the guest [default: /root/repo].
    #[arg(long, value_name = "DIR", help_heading = WORKSPACE)]
    pub(crate) guest_path: Option<PathBuf>,
    /// Begin this branch in the guest.
    #[arg(long, value_name = "NAME", help_heading = WORKSPACE)]
    pub(crate) branch: Option<String>,
    /// Take the files of this commit, and none of the working tree.
    #[arg(long, value_name = "REF", requires = "branch", help_heading = WORKSPACE)]
    pub(crate) from: Option<String>,
    /// Leave untracked files here.
    #[arg(long, help_heading = WORKSPACE)]
    pub(crate) tracked_only: bool,
    /// Take untracked files along that look like secrets.
    #[arg(long, help_heading = WORKSPACE)]
    pub(crate) include_secrets: bool,
    /// Nobody in the guest can change it.
    #[arg(long, help_heading = WORKSPACE)]
    pub(crate) readonly: bool,
}

impl WorkspaceArgs {
    /// Each flag, and whether it was given.
    pub(crate) fn given(&self) -> [(&'static str, bool); 7] {
        [
            ("--mode", self.mode.is_some()),
            ("--guest-path", self.guest_path.is_some()),
            ("--branch", self.branch.is_some()),
            ("--from", self.from.is_some()),
            ("--tracked-only", self.tracked_only),
            ("--include-secrets", self.include_secrets),
            ("--readonly", self.readonly),
        ]
    }

    /// Returns true when none was given.
    pub(crate) fn are_absent(&self) -> bool {
        self.given().iter().all(|(_, given)| !given)
    }
}

/// How a command is run.
#[derive(Debug, Args)]
pub(crate) struct SessionArgs {
    /// Working directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) workdir: Option<OsString>,
    /// User, optionally `user:group`.
    #[arg(long)]
    pub(crate) user: Option<String>,
    /// End the command after this time, such as `30s` or `5m`; the status is 124 then.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) timeout: Option<Duration>,
    /// Give it a terminal.
    #[arg(short = 't', long = "tty", conflicts_with = "no_tty")]
    pub(crate) tty: bool,
    /// Give it no terminal.
    #[arg(short = 'T', long = "no-tty")]
    pub(crate) no_tty: bool,
    /// Let it use your ssh agent, for as long as it runs.
    #[arg(short = 'A', long)]
    pub(crate) forward_agent: bool,
}

/// `banger vm run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) spec: SpecArgs,
    #[command(flatten)]
    pub(crate) workspace: WorkspaceArgs,
    #[command(flatten)]
    pub(crate) session: SessionArgs,
    /// Delete the vm once the command or shell has ended.
    #[arg(long)]
    pub(crate) rm: bool,
    /// Make the vm and return.
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Show what would be made.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print data as JSON, with `-d` or `--dry-run`.
    #[arg(long)]
    pub(crate) json: bool,
    /// Afterwards, write what changed in the vm's copy of the checkout to this file, as a patch.
    #[arg(long, value_name = "PATCH", help_heading = WORKSPACE, requires = "path")]
    pub(crate) export: Option<PathBuf>,
    /// Afterwards, change the files of the checkout as they were changed in the vm.
    #[arg(long, help_heading = WORKSPACE, requires = "path")]
    pub(crate) apply: bool,
    /// Do not install the tools that the checkout names for mise.
    #[arg(long, help_heading = WORKSPACE, requires = "path")]
    pub(crate) no_bootstrap: bool,
    /// Go back into the vm that has the checkout, if there is one.
    #[arg(long, help_heading = WORKSPACE, requires = "path")]
    pub(crate) reuse: bool,
    /// A git checkout to place in the vm, where the command then runs.
    pub(crate) path: Option<PathBuf>,
    /// What to run; a shell when absent, or what an image without an init was made to run.
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<OsString>,
}

/// `banger vm create`.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    pub(crate) spec: SpecArgs,
    #[command(flatten)]
    pub(crate) workspace: WorkspaceArgs,
    /// Make it without starting it.
    #[arg(long)]
    pub(crate) no_start: bool,
    /// Show what would be made.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Do not install the tools that the checkout names for mise.
    #[arg(long, help_heading = WORKSPACE, requires = "path")]
    pub(crate) no_bootstrap: bool,
    /// A git checkout to place in the vm.
    pub(crate) path: Option<PathBuf>,
}

/// `banger vm exec`.
#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    #[command(flatten)]
    pub(crate) session: SessionArgs,
    /// First bring the vm's workspace up to date.
    #[arg(long, help_heading = WORKSPACE)]
    pub(crate) auto_prepare: bool,
    /// A variable of the command; `K` alone takes the value from here.
    #[arg(long, value_name = "K[=V]")]
    pub(crate) env: Vec<OsString>,
    /// A file of such lines.
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Name, id or the beginning of an id.
    #[arg(value_name = "REF")]
    pub(crate) vm: String,
    /// What to run; a shell when absent.
    #[arg(trailing_var_arg = true, value_name = "CMD")]
    pub(crate) command: Vec<OsString>,
}

/// `banger vm list`.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Print JSON.
    #[arg(long, conflicts_with = "quiet")]
    pub(crate) json: bool,
    /// Print ids only.
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// `banger vm show`.
#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// Name, id or the beginning of an id.
    #[arg(value_name = "REF")]
    pub(crate) vm: String,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `banger vm logs`.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Name, id or the beginning of an id.
    #[arg(value_name = "REF")]
    pub(crate) vm: String,
    /// Go on until the vm has ended.
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only the last N lines.
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) lines: Option<usize>,
    /// The bytes as they are, escape sequences alive.
    #[arg(long)]
    pub(crate) raw: bool,
}

/// `banger vm prune`.
#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// Do not ask.
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Whether data is JSON.
#[derive(Debug, Args)]
pub(crate) struct JsonArgs {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `banger daemon`.
#[derive(Debug, Subcommand)]
pub(crate) enum DaemonCommand {
    /// Show what the daemon is doing; exits with 1 when it does not run.
    Status(JsonArgs),
    /// End the daemon; vms go on.
    Stop(DaemonStopArgs),
    /// Print the daemon's log.
    Logs {
        /// Only the last N lines.
        #[arg(short = 'n', long, value_name = "N")]
        lines: Option<usize>,
    },
    /// Leaves this session and becomes the daemon.
    #[command(hide = true)]
    Detach {
        /// The daemon's program.
        program: PathBuf,
    },
}

/// `banger daemon stop`.
#[derive(Debug, Args)]
pub(crate) struct DaemonStopArgs {
    /// First stop every vm in order.
    #[arg(long)]
    pub(crate) all: bool,
    /// Use force for vms after this time.
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "30s", requires = "all")]
    pub(crate) timeout: Duration,
}

/// [`VmmChoice`] as a flag's value.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum VmmArg {
    /// Firecracker where KVM works and this banger can use it, else QEMU.
    Auto,
    /// Firecracker, which needs KVM.
    Firecracker,
    /// QEMU, with KVM where that works.
    Qemu,
}

impl From<VmmArg> for VmmChoice {
    fn from(vmm: VmmArg) -> Self {
        match vmm {
            VmmArg::Auto => Self::Auto,
            VmmArg::Firecracker => Self::Firecracker,
            VmmArg::Qemu => Self::Qemu,
        }
    }
}

/// [`WorkspaceMode`] as a flag's value.
#[derive(Debug, Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum ModeArg {
    /// The working tree as it is, and the last commits.
    ShallowOverlay,
    /// The working tree as it is, submodules included, and every commit; or a directory without git.
    FullCopy,
}

impl From<ModeArg> for WorkspaceMode {
    fn from(mode: ModeArg) -> Self {
        match mode {
            ModeArg::ShallowOverlay => Self::ShallowOverlay,
            ModeArg::FullCopy => Self::FullCopy,
        }
    }
}

/// [`Wait`] as a flag's value.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum WaitArg {
    /// Commands can be run.
    Agent,
    /// The image's init has finished starting.
    Boot,
}

impl From<WaitArg> for Wait {
    fn from(wait: WaitArg) -> Self {
        match wait {
            WaitArg::Agent => Self::Agent,
            WaitArg::Boot => Self::Boot,
        }
    }
}

/// Returns true when success would have the status of a command in the guest, so that our own failures need a status
/// of their own. Looks at the words, because mistakes in them are such failures too.
pub(crate) fn is_remote(args: &[OsString]) -> bool {
    let ours: Vec<&str> =
        args.iter().skip(1).take_while(|arg| *arg != "--").map(|arg| arg.to_str().unwrap_or("\0")).collect();
    let mut words = ours.iter().filter(|arg| !arg.starts_with('-'));
    let verb = match words.next() {
        Some(&"vm") => words.next(),
        other => other,
    };
    let is_short_detach = |arg: &&str| arg.starts_with('-') && !arg.starts_with("--") && arg.contains('d');
    let detached = ours.iter().any(|arg| *arg == "--detach" || is_short_detach(arg));
    let has_command = ours.len() + 2 < args.len();
    match verb {
        Some(&"exec") => true,
        Some(&"run") => has_command || !detached,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_grammar_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_remote_commands_status_is_recognised_in_wrong_lines_too() {
        for (line, remote) in [
            ("banger vm run --bogus -- true", true),
            ("banger -v run", true),
            ("banger run -d", false),
            ("banger run -vd --rm", false),
            ("banger run --detach -- true", true),
            ("banger run --", true),
            ("banger run -d --", false),
            ("banger exec web ls -d", true),
            ("banger vm exec", true),
            ("banger vm list --bogus", false),
            ("banger vm create -- run", false),
            ("banger image list", false),
            ("banger", false),
        ] {
            let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            assert_eq!(is_remote(&args), remote, "{line}");
        }
    }

    #[test]
    fn flags_after_the_command_are_the_commands() {
        let cli = Cli::try_parse_from(["banger", "exec", "-t", "web", "ls", "-t", "--", "-v"]).unwrap();
        let Command::Exec(args) = cli.command else { panic!("not exec") };
        assert_eq!(args.command, ["ls", "-t", "--", "-v"]);
        assert!(args.session.tty && !cli.verbose);
        let cli = Cli::try_parse_from(["banger", "exec", "web", "--", "-x", "--", "y"]).unwrap();
        let Command::Exec(args) = cli.command else { panic!("not exec") };
        assert_eq!(args.command, ["-x", "--", "y"]);
    }
}
