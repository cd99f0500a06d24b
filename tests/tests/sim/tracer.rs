//! Runs a command and everything it starts, step by step, and breaks one step.
//!
//! A step is a system call by which something outside the process changes or may fail: a file or directory is made,
//! written, renamed or removed, a process or namespace is made, a filesystem mounted, something is sent to a socket. So
//! whatever a program does to its host is a step, and nobody has to say so in the program. A step's name is made of who
//! does it, the call, and what it is about; runs of the same command have the same names, if not in the same order.

use nix::libc::{self, user_regs_struct};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// Steps count from the moment on at which somebody makes this file.
pub(crate) const ARMED: &str = "steps-count-from-here";
/// A command that does not end by then hangs.
const PATIENCE: Duration = Duration::from_secs(90);
/// Longest path that is read.
const PATH_LEN_MAX: usize = 256;

/// Who does something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Role {
    Client,
    Daemon,
    Supervisor,
    Vmm,
    Pasta,
    Nft,
    Other,
}

/// What is done, by whom.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Step {
    pub(crate) role: Role,
    pub(crate) what: String,
}

/// How a step is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// The process is killed before it.
    Crash,
    /// The step fails, as on a full disk or without memory.
    Error,
    /// Every process is killed before it, as when the host goes down.
    Down,
}

/// Breaks the step when it is done for the `nth` time.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    pub(crate) step: Step,
    pub(crate) nth: u32,
    pub(crate) kind: Kind,
}

/// What happened.
#[derive(Debug)]
pub(crate) struct Trace {
    /// How often each step was done.
    pub(crate) steps: BTreeMap<Step, u32>,
    /// The step was reached.
    pub(crate) hit: bool,
    /// The command's status; none when it was killed.
    pub(crate) code: Option<i32>,
    /// It did not end in time.
    pub(crate) hung: bool,
}

/// Runs a command that stops itself (SIGSTOP) before it does anything. Of what it leaves running, nothing is traced any
/// more when this returns.
///
/// A VMM that is one is not traced: it would be too slow.
pub(crate) fn trace(command: Command, home: &Path, fault: Option<Fault>, real: bool) -> Trace {
    let home = home.to_str().unwrap().to_owned();
    // The kernel lets go of everything traced when the thread that traces ends.
    let thread = std::thread::spawn(move || Tracer::start(command, home, fault, real).run());
    thread.join().unwrap()
}

#[derive(Clone, Copy)]
struct Task {
    role: Role,
    /// The next stop is the end of a call.
    in_call: bool,
    /// What the call that is ending returns instead.
    error: Option<i32>,
}

struct Tracer {
    root: Pid,
    home: String,
    fault: Option<Fault>,
    real: bool,
    tasks: HashMap<Pid, Task>,
    armed: bool,
    /// The host went down; nothing goes on until nothing is left of it.
    down: bool,
    trace: Trace,
    /// Ends the watch over [`PATIENCE`].
    done: std::sync::mpsc::Sender<()>,
    watch: std::thread::JoinHandle<bool>,
}

impl Tracer {
    #[allow(clippy::disallowed_methods, reason = "a tracer starts what it traces")]
    fn start(mut command: Command, home: String, fault: Option<Fault>, real: bool) -> Self {
        let child = command.spawn().unwrap();
        let root = Pid::from_raw(child.id().cast_signed());
        // Dropping the handle does not wait for it; the tracer does.
        drop(child);
        let flags = WaitPidFlag::WUNTRACED | WaitPidFlag::__WNOTHREAD;
        assert!(matches!(waitpid(root, Some(flags)), Ok(WaitStatus::Stopped(..))));
        let follow = ptrace::Options::PTRACE_O_TRACEFORK
            | ptrace::Options::PTRACE_O_TRACEVFORK
            | ptrace::Options::PTRACE_O_TRACECLONE
            | ptrace::Options::PTRACE_O_TRACEEXEC
            | ptrace::Options::PTRACE_O_TRACESYSGOOD;
        ptrace::seize(root, follow).unwrap();
        kill(root, Signal::SIGCONT).unwrap();
        let (done, wait) = channel();
        let watch = std::thread::spawn(move || {
            let hangs = wait.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout);
            if hangs {
                let _ = kill(root, Signal::SIGKILL);
            }
            hangs
        });
        let trace = Trace { steps: BTreeMap::new(), hit: false, code: None, hung: false };
        Self { root, home, fault, real, tasks: HashMap::new(), armed: false, down: false, trace, done, watch }
    }

    fn run(mut self) -> Trace {
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        loop {
            match waitpid(None, Some(flags)) {
                Ok(WaitStatus::Exited(pid, code)) if pid == self.root && !self.down => {
                    self.trace.code = Some(code);
                    break;
                }
                Ok(WaitStatus::Signaled(pid, ..)) if pid == self.root && !self.down => break,
                Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..)) => {
                    self.tasks.remove(&pid);
                }
                // Made while the others were killed.
                Ok(
                    WaitStatus::PtraceSyscall(pid)
                    | WaitStatus::PtraceEvent(pid, ..)
                    | WaitStatus::Stopped(pid, _),
                ) if self.down => {
                    let _ = kill(pid, Signal::SIGKILL);
                }
                Ok(WaitStatus::PtraceSyscall(pid)) => {
                    self.call(pid);
                    let _ = ptrace::syscall(pid, None);
                }
                Ok(WaitStatus::PtraceEvent(pid, _, event)) => {
                    self.event(pid, event);
                    if self.real && self.task(pid).role == Role::Vmm {
                        self.tasks.remove(&pid);
                        let _ = ptrace::detach(pid, None);
                    } else {
                        let _ = ptrace::syscall(pid, None);
                    }
                }
                Ok(WaitStatus::Stopped(pid, signal)) => drop(ptrace::syscall(pid, signal)),
                Ok(_) | Err(nix::errno::Errno::EINTR | nix::errno::Errno::EINVAL) => {}
                Err(_) => break,
            }
        }
        let _ = self.done.send(());
        self.trace.hung = self.watch.join().unwrap();
        self.trace
    }

    fn task(&mut self, pid: Pid) -> &mut Task {
        self.tasks.entry(pid).or_insert_with(|| Task { role: role_of(pid), in_call: false, error: None })
    }

    fn event(&mut self, pid: Pid, event: i32) {
        match event {
            libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK | libc::PTRACE_EVENT_CLONE => {
                let parent = self.task(pid).role;
                if let Ok(child) = ptrace::getevent(pid) {
                    // It may have come further than this already.
                    let child = Pid::from_raw(child as i32);
                    self.tasks.entry(child).or_insert(Task { role: parent, in_call: false, error: None });
                }
            }
            libc::PTRACE_EVENT_EXEC => {
                let role = role_of(pid);
                // The call goes on to its end.
                self.tasks.insert(pid, Task { role, in_call: true, error: None });
            }
            _ => {}
        }
    }

    /// At the beginning or the end of a call.
    fn call(&mut self, pid: Pid) {
        let Ok(mut registers) = ptrace::getregs(pid) else { return };
        let task = self.task(pid);
        task.in_call = !task.in_call;
        let (role, begins) = (task.role, task.in_call);
        if !begins {
            if let Some(error) = task.error.take() {
                registers.rax = (-i64::from(error)).cast_unsigned();
                let _ = ptrace::setregs(pid, registers);
            }
            return;
        }
        if role == Role::Other && self.armed {
            return;
        }
        let Some(call) = decode(pid, &registers) else { return };
        if !self.armed {
            self.armed = call.target.ends_with(ARMED);
            return;
        }
        let step = Step { role, what: format!("{} {}", call.name, self.plain(&call.target)) };
        let count = self.trace.steps.entry(step.clone()).or_default();
        *count += 1;
        let count = *count;
        let Some(fault) = &self.fault else { return };
        if self.trace.hit || fault.step != step || fault.nth != count {
            return;
        }
        self.trace.hit = true;
        match fault.kind {
            Kind::Crash => drop(kill(pid, Signal::SIGKILL)),
            Kind::Down => {
                self.down = true;
                for pid in self.tasks.keys() {
                    let _ = kill(*pid, Signal::SIGKILL);
                }
            }
            Kind::Error => {
                // Something harmless instead; filters of system calls let it through.
                registers.orig_rax = libc::SYS_getpid.cast_unsigned();
                if ptrace::setregs(pid, registers).is_ok() {
                    self.task(pid).error = Some(call.error);
                }
            }
        }
    }

    /// A name without what is different in every run.
    fn plain(&self, target: &str) -> String {
        let target = target.replace(&self.home, "~");
        let part = |part: &str| {
            if part.len() == 12 && part.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return "ID".to_owned();
            }
            if part.len() == 64 && part.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return "DIGEST".to_owned();
            }
            if let Some(prefix) =
                [".tmp", ".new-", ".load-"].into_iter().find(|prefix| part.starts_with(prefix))
            {
                return prefix.to_owned();
            }
            let mut plain = String::new();
            for character in part.chars() {
                let digit = character.is_ascii_digit();
                if !(digit && plain.ends_with('0')) {
                    plain.push(if digit { '0' } else { character });
                }
            }
            plain
        };
        target.split('/').map(part).collect::<Vec<_>>().join("/")
    }
}

fn role_of(pid: Pid) -> Role {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words = line.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    let program = words.next().unwrap_or_default();
    let argument = words.next().unwrap_or_default();
    match (program.rsplit('/').next().unwrap_or_default(), &*argument) {
        ("banger", _) => Role::Client,
        ("bangerd", "serve") => Role::Daemon,
        ("bangerd", "supervise") => Role::Supervisor,
        ("nft", _) => Role::Nft,
        (name, _) if name.starts_with("qemu-system-") => Role::Vmm,
        (name, _) if name.starts_with("pasta") => Role::Pasta,
        _ => Role::Other,
    }
}

struct Call {
    name: &'static str,
    /// A path, or what a descriptor is.
    target: String,
    /// What the call says when it fails for a reason that is not the caller's.
    error: i32,
}

/// What a call is about, if it is a step.
fn decode(pid: Pid, registers: &user_regs_struct) -> Option<Call> {
    use libc::{EIO, EMFILE, ENOLCK, ENOMEM, ENOSPC, EPIPE};
    let [first, second, third] = [registers.rdi, registers.rsi, registers.rdx];
    let path = |address| text(pid, address);
    let writes = |flags: u64| {
        let flags = flags as i32;
        flags & (libc::O_CREAT | libc::O_TRUNC | libc::O_WRONLY | libc::O_RDWR) != 0
    };
    let call = |name, target: String, error| Some(Call { name, target, error });
    match registers.orig_rax.cast_signed() {
        libc::SYS_open if writes(second) => call("open", path(first), ENOSPC),
        libc::SYS_openat if writes(third) => call("open", path(second), ENOSPC),
        libc::SYS_creat => call("open", path(first), ENOSPC),
        libc::SYS_mkdir => call("mkdir", path(first), ENOSPC),
        libc::SYS_mkdirat => call("mkdir", path(second), ENOSPC),
        libc::SYS_rmdir => call("rmdir", path(first), EIO),
        libc::SYS_unlink => call("unlink", path(first), EIO),
        libc::SYS_unlinkat => call("unlink", path(second), EIO),
        libc::SYS_rename => call("rename", path(second), ENOSPC),
        libc::SYS_renameat | libc::SYS_renameat2 => call("rename", path(registers.r10), ENOSPC),
        libc::SYS_link => call("link", path(second), ENOSPC),
        libc::SYS_linkat => call("link", path(registers.r10), ENOSPC),
        libc::SYS_symlink => call("symlink", path(second), ENOSPC),
        libc::SYS_symlinkat => call("symlink", path(third), ENOSPC),
        libc::SYS_chmod | libc::SYS_chown | libc::SYS_lchown => call("own", path(first), EIO),
        libc::SYS_fchmodat | libc::SYS_fchownat => call("own", path(second), EIO),
        libc::SYS_mknod => call("mknod", path(first), ENOSPC),
        libc::SYS_mknodat => call("mknod", path(second), ENOSPC),
        libc::SYS_fchmod | libc::SYS_fchown => call("own", descriptor(pid, first)?, EIO),
        libc::SYS_write | libc::SYS_pwrite64 | libc::SYS_writev | libc::SYS_pwritev => {
            let target = descriptor(pid, first)?;
            let error = if target.starts_with('/') { ENOSPC } else { EPIPE };
            call("write", target, error)
        }
        libc::SYS_ftruncate | libc::SYS_fallocate => call("resize", descriptor(pid, first)?, ENOSPC),
        libc::SYS_fsync | libc::SYS_fdatasync => call("sync", descriptor(pid, first)?, EIO),
        libc::SYS_copy_file_range => call("copy", descriptor(pid, third)?, ENOSPC),
        libc::SYS_sendfile => call("copy", descriptor(pid, first)?, ENOSPC),
        libc::SYS_flock => call("flock", descriptor(pid, first)?, ENOLCK),
        libc::SYS_sendto | libc::SYS_sendmsg => call("send", String::new(), EPIPE),
        libc::SYS_connect => call("connect", String::new(), libc::ECONNREFUSED),
        libc::SYS_bind => call("bind", String::new(), libc::EADDRINUSE),
        libc::SYS_socket => call("socket", String::new(), EMFILE),
        libc::SYS_socketpair => call("socketpair", String::new(), EMFILE),
        libc::SYS_accept4 => call("accept", String::new(), EMFILE),
        libc::SYS_clone | libc::SYS_clone3 | libc::SYS_fork | libc::SYS_vfork => {
            call("clone", String::new(), libc::EAGAIN)
        }
        libc::SYS_execve => call("exec", path(first), ENOMEM),
        libc::SYS_unshare => call("unshare", String::new(), libc::ENOSPC),
        libc::SYS_setns => call("setns", String::new(), ENOMEM),
        libc::SYS_mount => call("mount", path(second), ENOMEM),
        libc::SYS_umount2 => call("umount", path(first), EIO),
        libc::SYS_pivot_root => call("pivot_root", path(first), ENOMEM),
        // TUNSETIFF
        libc::SYS_ioctl if second == 0x4004_54ca => call("tap", String::new(), libc::EBUSY),
        _ => None,
    }
}

/// What a descriptor is; nothing for what a process only tells itself.
fn descriptor(pid: Pid, number: u64) -> Option<String> {
    let target = std::fs::read_link(format!("/proc/{pid}/fd/{number}")).ok()?;
    let target = target.to_string_lossy().into_owned();
    match target.split(':').next() {
        Some("anon_inode") => None,
        Some(kind @ ("socket" | "pipe")) => Some(kind.to_owned()),
        _ => Some(target.trim_end_matches(" (deleted)").to_owned()),
    }
}

/// Reads a path of a stopped process.
fn text(pid: Pid, address: u64) -> String {
    let mut bytes = Vec::new();
    while bytes.len() < PATH_LEN_MAX {
        let Ok(word) = ptrace::read(pid, (address + bytes.len() as u64) as ptrace::AddressType) else {
            break;
        };
        let word = word.to_ne_bytes();
        let end = word.iter().position(|byte| *byte == 0);
        bytes.extend_from_slice(&word[..end.unwrap_or(word.len())]);
        if end.is_some() {
            break;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
