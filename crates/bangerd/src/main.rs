//! The owner daemon, and the supervisor of each vm.

mod cache;
mod cgroup;
mod choice;
mod config;
mod daemon;
mod doctor;
mod export;
mod file_sync;
mod files;
mod initramfs;
mod kvm;
mod lifecycle;
mod load;
mod loopback;
mod members;
mod names;
mod net;
mod outbound;
mod paths;
mod plan;
mod ports;
mod programs;
mod pull;
mod register;
mod request;
mod serve;
mod set;
mod setup;
mod signal;
mod state;
mod stats;
mod store;
mod supervise;
mod template;
mod verify;
mod vmsock;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let ended = match args.iter().map(|arg| arg.to_str()).collect::<Vec<_>>().as_slice() {
        [Some("supervise"), Some("--dir"), _] => supervise::run(Path::new(&args[2])),
        [Some("serve")] => logged(|| serve::run(None)),
        [Some("serve"), Some("--ready-fd"), Some("1")] => logged(|| serve::run(Some(take_stdout()?))),
        [Some("probe-namespaces")] => doctor::namespaces::probe(),
        [Some("kvm-probe")] => kvm::probe::main(),
        [Some("apparmor-profile")] => doctor::apparmor::print(),
        _ => Err(anyhow::anyhow!(
            "usage: bangerd serve [--ready-fd 1] | supervise --dir DIRECTORY | probe-namespaces | kvm-probe | \
             apparmor-profile"
        )),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The daemon's error stream is its log; a supervisor's is `supervisor.log`, whose end the daemon quotes.
            let _ =
                std::io::Write::write_all(&mut std::io::stderr(), format!("error: {error:#}\n").as_bytes());
            ExitCode::FAILURE
        }
    }
}

fn logged(serve: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    // A config that can't be used is told to whoever asks for something it is needed for.
    let level = || config::Config::load().ok()?.log_level;
    let filter = tracing_subscriber::EnvFilter::try_from_env("BANGER_LOG")
        .unwrap_or_else(|_| level().unwrap_or_else(|| "info".to_owned()).into());
    // What any user of this machine can send the name server must not fill the log.
    let filter = match "hickory_proto=off".parse() {
        Ok(quiet) => filter.add_directive(quiet),
        Err(_) => filter,
    };
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    serve()
}

/// Standard output as a file of its own, and the null device in its place, so that closing it is seen at the other end.
fn take_stdout() -> anyhow::Result<std::fs::File> {
    let ready = std::os::fd::AsFd::as_fd(&std::io::stdout()).try_clone_to_owned()?;
    let null = std::fs::File::options().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(ready.into())
}
