//! The command line: parse, ask the daemon, render.
//!
//! The daemon decides and does; this program turns words into one request and the answer into text and an exit
//! status. Only a session is more: its bytes go straight to the vm's supervisor, so a daemon that ends in the middle
//! is not noticed. Nothing is made on the host here but the daemon's process and its state directory.

mod args;
mod client;
mod config;
mod console;
mod context;
mod cp;
mod daemon;
mod dns;
mod doctor;
mod env;
mod export;
mod image;
mod kernel;
mod launch;
mod logs;
mod many;
mod net;
mod paths;
mod ports;
mod progress;
mod project;
mod run;
mod session;
mod setup;
mod signal_name;
mod signals;
mod ssh;
mod stats;
mod stop;
mod streams;
mod table;
mod terminal;
mod text;
mod transfer;
mod ui;
mod upload;
mod vm;
mod workspace;

use args::{Cli, Command, DaemonCommand, DnsCommand};
use clap::Parser as _;
use client::Client;
use context::Context;
use signals::Signals;
use std::process::ExitCode;
use stop::{Ended, STATUS_OWN_FAILURE, STATUS_USAGE, Stop, failed};
use text::duration;
use ui::Ui;

fn main() -> ExitCode {
    let words = args::words_apart(std::env::args_os().collect());
    let remote = args::is_remote(&words);
    let cli = match Cli::try_parse_from(&words) {
        Ok(cli) => cli,
        Err(error) => {
            Ui::parser(&error);
            return match (error.use_stderr(), remote) {
                (false, _) => ExitCode::SUCCESS,
                (true, true) => ExitCode::from(STATUS_OWN_FAILURE),
                (true, false) => ExitCode::from(STATUS_USAGE),
            };
        }
    };
    let ui = Ui::new(cli.verbose);
    restore_terminal_on_panic();
    let status = match start(cli.command, ui) {
        (_, Ok(status)) => status,
        (ui, Err(stop)) => {
            tell(&ui, &stop);
            stop.status(remote)
        }
    };
    ExitCode::from(status)
}

/// A panic's message on a raw terminal can't be read, and the shell after it neither.
fn restore_terminal_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        terminal::restore();
        report(panic);
    }));
}

fn start(command: Command, ui: Ui) -> (Ui, Ended) {
    // Before there are threads or open descriptors: this process becomes the daemon.
    if let Command::Daemon(DaemonCommand::Detach { program }) = command {
        return (ui, Err(launch::detach(&program).into()));
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return (ui, Err(failed("could not start", &error).into())),
    };
    runtime.block_on(async {
        let parts = Client::new().map_err(Stop::from).and_then(|client| Ok((client, Signals::new()?)));
        let (client, signals) = match parts {
            Ok(parts) => parts,
            Err(stop) => return (ui, Err(stop)),
        };
        let mut context = Context { ui, client, signals };
        let result = dispatch(&mut context, command).await;
        (context.ui, result)
    })
}

async fn dispatch(context: &mut Context, command: Command) -> Ended {
    match command {
        Command::Vm(command) => vm::dispatch(context, command).await,
        Command::Run(args) => run::run(context, *args).await,
        Command::Exec(args) => run::exec(context, *args).await,
        Command::Ssh(args) => ssh::ssh(context, args).await,
        Command::SshConfig(args) => ssh::ssh_config(context, args).await,
        Command::Ps(args) => vm::list(context, args).await,
        Command::Workspace(command) => workspace::command::dispatch(context, command).await,
        Command::Image(command) => image::dispatch(context, command).await,
        Command::Kernel(command) => kernel::dispatch(context, command).await,
        Command::Cache(command) => config::caches(context, command).await,
        Command::Config(command) => config::dispatch(context, command).await,
        Command::Dns(DnsCommand::Setup(args)) => dns::setup(context, &args),
        Command::Doctor(args) => doctor::doctor(context, args).await,
        Command::Setup(args) => setup::setup(context, args).await,
        Command::Daemon(command) => daemon::dispatch(context, command).await,
        Command::Version(args) => daemon::version(context, args).await,
    }
}

fn tell(ui: &Ui, stop: &Stop) {
    match stop {
        Stop::Failed(error) => ui.error(error),
        Stop::TimedOut(time) => {
            ui.error(&stop::invalid(format!(
                "the command was ended after {} (`--timeout`)",
                duration(*time)
            )));
        }
        Stop::Told | Stop::Signalled(_) | Stop::OutputClosed => ui.clear_progress(),
    }
}
