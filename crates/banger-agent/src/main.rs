//! banger inside the guest.
//!
//! The same static program is three processes. As `/init` of the initramfs it is process 1: it mounts the kernel's
//! filesystems, loads the few modules the boot needs, starts the agent, and later becomes the image's init or stays
//! and reaps ([`init`]). The agent ([`agent`]) talks to the host from before the image is mounted until the end;
//! its name begins with `@`, which is how systemd knows to leave it alone. And it is what systemd becomes at the very
//! end ([`shutdown`]). Each ssh connection has one more ([`ssh`]).
//!
//! Nothing here resolves a name through the C library: that would load the guest's own libraries.

mod agent;
mod beside;
mod command;
mod connect;
mod console;
mod copy;
mod devices;
mod disk;
mod export;
mod forwarded;
mod guest;
mod handover;
mod init;
mod link;
mod listeners;
mod port;
mod readiness;
mod session;
mod shutdown;
mod sparse;
mod ssh;
mod stats;
mod tar;
mod users;
mod workspace;

use std::process::ExitCode;

/// The C library's allocator gives each buffer of a frame's size back to the kernel when it is freed, and takes it anew
/// page by page: in an emulated guest that was nearly half of what a stream of data cost the agent.
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_default();
    let ended = match (name.to_str(), args.next().as_deref().and_then(|arg| arg.to_str())) {
        (Some(init::AGENT_NAME), _) => agent::run_in_guest(),
        (_, Some("--socket")) => agent::run_on_socket(&args.next().unwrap_or_default()),
        (_, Some(ssh::ARGUMENT)) if std::process::id() != 1 => ssh::serve(),
        (_, Some(ssh::SFTP_ARGUMENT)) if std::process::id() != 1 => ssh::serve_sftp(),
        (Some(shutdown::NAME), Some(how)) if std::process::id() == 1 => shutdown::run(how),
        (Some(name), _) if std::process::id() == 1 => init::run(name == init::APPENDED.0),
        _ => {
            Err(std::io::Error::other("this is the first process of a banger vm; it does nothing elsewhere"))
        }
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            init::log(&format!("{error}"));
            ExitCode::FAILURE
        }
    }
}
