//! Process 1 until the image's init takes over.
//!
//! Small on purpose: what fails here can't be told to the host over the port, only on the console. It mounts,
//! loads modules, starts the agent with one end of a socket pair, and waits for a single order on the other:
//! which root to enter, and which init to become.

use crate::devices;
use rustix::fs::Mode;
use rustix::mount::{MountFlags, mount, mount_move};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Stdio;

/// The agent's `argv[0]`.
pub(crate) const AGENT_NAME: &str = "@banger-agent";
/// Where the agent assembles the new root.
pub(crate) const NEW_ROOT: &str = "/new";
/// The order to stay process 1 and reap.
const STAY: &str = "stay";
/// The order to become the `/init` of the image's own initrd.
pub(crate) const HANDOVER: &str = "hand over";
/// This program and its modules in an initramfs of ours.
const OWN: (&str, &str) = ("/init", "/modules");
/// The same where the image brings an initrd with an `/init`, to which ours was appended.
pub(crate) const APPENDED: (&str, &str) = ("/banger/init", "/banger/modules");

/// Writes a line to the console, by way of the kernel's log where possible.
pub(crate) fn log(line: &str) {
    let path = if std::process::id() == 1 { "/dev/kmsg" } else { "/dev/stderr" };
    let written = std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| writeln!(file, "banger: {line}"));
    if written.is_err() {
        let _ = writeln!(io::stderr(), "banger: {line}");
    }
}

/// Runs as process 1. Returns only when there is nothing left to be.
pub(crate) fn run(is_appended: bool) -> io::Result<()> {
    let (program, modules) = if is_appended { APPENDED } else { OWN };
    mount_kernel_filesystems()?;
    load_modules(Path::new(modules))?;
    let (mut ours, theirs) = UnixStream::pair()?;
    let mut agent = banger_sys::child::command(program.as_ref());
    agent.arg0(AGENT_NAME).stdin(Stdio::from(OwnedFd::from(theirs)));
    let _agent = agent.spawn()?;
    drop(agent);
    let mut order = String::new();
    // Ends when the agent has said what to do, or has died before it could.
    let _ = ours.read_to_string(&mut order)?;
    let order = order.trim_end();
    if order.is_empty() {
        return Err(io::Error::other("the agent ended before the root was ready"));
    }
    if order == HANDOVER {
        // It mounts these itself; the agent has open what it needs of them.
        for place in ["/sys", "/proc", "/dev"] {
            rustix::mount::unmount(place, rustix::mount::UnmountFlags::DETACH)?;
        }
        return Err(banger_sys::child::command("/init".as_ref()).exec());
    }
    enter(NEW_ROOT)?;
    if order != STAY {
        let error =
            banger_sys::child::command(order.as_ref()).env("NOTIFY_SOCKET", crate::readiness::ADDRESS).exec();
        log(&format!("could not become `{}`: {error}", order.escape_debug()));
    }
    reap_forever()
}

/// Tells process 1 what to become; none is to stay. Called by the agent, once.
pub(crate) fn give_order(init: Option<&Path>) -> io::Result<()> {
    send_order(init.and_then(Path::to_str).unwrap_or(STAY))
}

/// Sends process 1 its one order.
pub(crate) fn send_order(order: &str) -> io::Result<()> {
    let channel = io::stdin();
    rustix::io::write(channel.as_fd(), order.as_bytes())?;
    rustix::net::shutdown(channel.as_fd(), rustix::net::Shutdown::Both)?;
    Ok(())
}

fn mount_kernel_filesystems() -> io::Result<()> {
    let secure = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    for (source, target, kind, flags) in [
        ("dev", "/dev", "devtmpfs", MountFlags::NOSUID),
        ("proc", "/proc", "proc", secure),
        ("sys", "/sys", "sysfs", secure),
    ] {
        match rustix::fs::mkdir(target, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        match mount(source, target, kind, flags, None) {
            // Some kernels mount devtmpfs by themselves.
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => return Err(io::Error::other(format!("mount {target}: {error}"))),
        }
    }
    Ok(())
}

/// Loads the modules the initramfs lists, in its order; it has them decompressed and sorted by dependency. Of the devices
/// they drive only the agent's port is made use of.
fn load_modules(dir: &Path) -> io::Result<()> {
    let list = match std::fs::read_to_string(dir.join("modules.list")) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for name in list.lines().map(str::trim).filter(|name| !name.is_empty()) {
        devices::hold();
        let file = std::fs::File::open(dir.join(name))?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => log(&format!("module {name}: {error}, ignoring")),
        }
    }
    devices::probe_stream();
    Ok(())
}

/// Makes the assembled tree the root, for this process: kernel threads follow process 1.
fn enter(root: &str) -> io::Result<()> {
    rustix::process::chdir(root)?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    Ok(())
}

fn reap_forever() -> io::Result<()> {
    loop {
        match rustix::process::wait(rustix::process::WaitOptions::empty()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
