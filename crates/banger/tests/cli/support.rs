//! A scripted daemon and supervisor, and the binary run against them.
//!
//! Models the protocol's frames, its windows and one answer per request; no vm, no store, no timing.

use banger_wire::BUILD;
use banger_wire::daemon::{Call, Event, Outcome, PlanSummary, Request, StartedVm, VmView};
use banger_wire::error::WireError;
use banger_wire::exec::{ExecSpec, ExitStatus, STDIN, STDOUT, SessionEvent, TerminalSize, WINDOW};
use banger_wire::frame::{Decoder, Frame, Kind, MESSAGE_LEN_MAX};
use banger_wire::guest::{SessionKind, Timing};
use banger_wire::vm::{VmCall, VmEvent, VmRequest};
use serde::Serialize;
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

/// One connection, seen from the side that was connected to.
pub(crate) struct Peer {
    stream: UnixStream,
    decoder: Decoder,
}

impl Peer {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream, decoder: Decoder::new(MESSAGE_LEN_MAX) }
    }

    /// Returns the next frame, or none when the other side has gone.
    pub(crate) fn next(&mut self) -> Option<Frame> {
        let mut chunk = vec![0; 64 * 1024];
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(frame);
            }
            let len = self.stream.read(&mut chunk).unwrap_or(0);
            if len == 0 {
                return None;
            }
            self.decoder.push(&chunk[..len]);
        }
    }

    pub(crate) fn send(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        // The other side may have gone, as it may in life.
        let _ = self.stream.write_all(&bytes);
    }

    pub(crate) fn say<T: Serialize>(&mut self, message: &T) {
        self.send(&Frame::message(0, message).unwrap());
    }

    pub(crate) fn done(&mut self, outcome: Outcome) {
        self.say(&Event::Done(Box::new(outcome)));
    }

    pub(crate) fn fail(&mut self, error: WireError) {
        self.say(&Event::Failed(error));
    }

    /// Ends a session as a command that exited.
    pub(crate) fn exit(&mut self, code: u8) {
        self.say(&SessionEvent::Exited(ExitStatus::Code(code)));
    }
}

/// A state directory with whoever listens in it.
pub(crate) struct Bench {
    dir: tempfile::TempDir,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Bench {
    /// Returns a state directory in which nothing listens.
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("state/run")).unwrap();
        Self { dir, requests: Arc::default() }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.path().join("state")
    }

    /// Returns what was asked of the daemon so far.
    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// Lets a daemon answer every request with `script`.
    pub(crate) fn daemon(&self, script: impl Fn(Request, &mut Peer) + Send + Sync + 'static) {
        let listener = UnixListener::bind(self.state().join("run/bangerd.sock")).unwrap();
        let requests = Arc::clone(&self.requests);
        serve(listener, move |peer| {
            let call: Call = peer.next().unwrap().parse().unwrap();
            assert_eq!(call.build, BUILD);
            requests.lock().unwrap().push(call.request.clone());
            script(call.request, peer);
        });
    }

    /// Lets a supervisor answer every request with `script`, and returns its socket. Its path is too long for an address.
    pub(crate) fn supervisor(&self, script: impl Fn(VmRequest, &mut Peer) + Send + Sync + 'static) -> String {
        let dir = self.path().join("d".repeat(120));
        std::fs::create_dir(&dir).unwrap();
        let here = self.path().join("vm.sock");
        let listener = UnixListener::bind(&here).unwrap();
        std::fs::rename(here, dir.join("vm.sock")).unwrap();
        serve(listener, move |peer| {
            let call: VmCall = peer.next().unwrap().parse().unwrap();
            script(call.request, peer);
        });
        dir.join("vm.sock").to_str().unwrap().to_owned()
    }

    /// Lets a daemon start and delete one vm whose sessions are `script`.
    pub(crate) fn vm(&self, script: impl Fn(ExecSpec, bool, &mut Peer) + Send + Sync + 'static) {
        let socket = self.supervisor(move |request, peer| {
            let VmRequest::Open { what: SessionKind::Exec(spec), lease } = request else {
                panic!("{request:?}")
            };
            script(*spec, lease, peer);
        });
        self.daemon(move |request, peer| match request {
            Request::VmRun(_) | Request::VmStart { .. } => {
                peer.say(&Event::Planned(plan()));
                peer.say(&Event::Step { label: "boot".to_owned() });
                peer.done(Outcome::Started(started(&socket)));
            }
            Request::VmShow { .. } => peer.done(Outcome::Vm(started(&socket).vm)),
            Request::VmDelete { .. } => peer.done(Outcome::Done),
            other => panic!("{other:?}"),
        });
    }

    /// Returns the binary with its environment made the same everywhere.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        self.command_of(Path::new(env!("CARGO_BIN_EXE_banger")), args)
    }

    /// The same for a copy of the binary.
    pub(crate) fn command_of<S: AsRef<OsStr>>(
        &self,
        program: &Path,
        args: impl IntoIterator<Item = S>,
    ) -> Command {
        let mut command = Command::new(program);
        command.args(args).env_clear().env("PATH", "/usr/bin:/bin").env("HOME", self.path());
        command.env("BANGER_STATE_DIR", self.state()).env("TERM", "xterm").env("TZ", "UTC");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs the binary without input and returns what it showed, ready for a snapshot.
    pub(crate) fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> String {
        self.show(&self.command(args).output().unwrap())
    }

    /// Returns status, stdout and stderr as one text without this run's paths.
    pub(crate) fn show(&self, output: &Output) -> String {
        let mut text = format!("status {}\n", output.status.code().unwrap());
        for (name, bytes) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
            if !bytes.is_empty() {
                text.push_str(&format!("--- {name}\n{}", String::from_utf8_lossy(bytes)));
            }
        }
        text.replace(self.path().to_str().unwrap(), "[DIR]").replace(BUILD, "[BUILD]")
    }
}

fn serve(listener: UnixListener, script: impl Fn(&mut Peer) + Send + Sync + 'static) {
    let script = Arc::new(script);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let script = Arc::clone(&script);
            let mut peer = Peer::new(stream.unwrap());
            std::thread::spawn(move || script(&mut peer));
        }
    });
}

/// Accepts a session as a supervisor does.
pub(crate) fn accept(peer: &mut Peer) {
    peer.say(&VmEvent::Accepted);
    peer.say(&SessionEvent::Started { pid: 7 });
}

/// Copies what a session is fed back to its stdout within both windows, until its end. Returns the bytes copied.
pub(crate) fn echo(peer: &mut Peer) -> u64 {
    let (mut window, mut granted) = (WINDOW as usize, WINDOW as usize);
    let (mut copied, mut ended) = (0_u64, false);
    let mut waiting = VecDeque::<Vec<u8>>::new();
    while !ended || !waiting.is_empty() {
        let frame = peer.next().unwrap();
        match (frame.kind, frame.channel) {
            (Kind::Data, STDIN) => {
                granted = granted.checked_sub(frame.payload.len()).expect("no more than was granted");
                waiting.push_back(frame.payload);
            }
            (Kind::Eof, STDIN) => ended = true,
            (Kind::Credit, STDOUT) => {
                window += frame.parse_credit().unwrap() as usize;
                assert!(window <= WINDOW as usize, "more was granted than sent");
            }
            (Kind::Message, _) => {}
            _ => panic!("{frame:?}"),
        }
        while let Some(bytes) = waiting.pop_front_if(|bytes| bytes.len() <= window) {
            let len = bytes.len();
            peer.send(&Frame::data(0, STDOUT, bytes));
            peer.send(&Frame::credit(0, STDIN, u32::try_from(len).unwrap()));
            (window, granted, copied) = (window - len, granted + len, copied + len as u64);
        }
    }
    copied
}

/// Returns the plan of the one vm there is.
pub(crate) fn plan() -> PlanSummary {
    serde_json::from_value(serde_json::json!({
        "name": "fuzzy-otter", "vcpu": 1, "memory": 512, "disk_size": 8192, "image": "debian-bookworm",
        "kernel": "generic-6.12", "vmm": "qemu", "net": "internet", "emulated": true,
        "note": "there is no `/dev/kvm`, so vms run in software emulation",
        "pull_image": true, "pull_kernel": false
    }))
    .unwrap()
}

/// Returns a view of a vm.
pub(crate) fn view(name: &str, state: &str) -> VmView {
    serde_json::from_value(serde_json::json!({
        "id": "0123456789ab", "name": name, "state": state, "image": "debian-bookworm",
        "kernel": "generic-6.12", "vcpu": 1, "memory": 512, "disk_size": 8192, "disk_used_bytes": 5 << 20,
        "net": "internet", "vmm": "qemu", "emulated": true, "created": 1_700_000_000, "rm": false, "dir": "/state/vms/0123456789ab",
        "socket": "/state/vms/0123456789ab/vm.sock", "watchdog_restarts": 0
    }))
    .unwrap()
}

fn started(socket: &str) -> StartedVm {
    let mut vm = view("fuzzy-otter", "running");
    socket.clone_into(&mut vm.socket);
    StartedVm {
        vm,
        socket: socket.to_owned(),
        timings: vec![Timing { stage: "kernel".to_owned(), ms: 640 }],
        ready_ms: 1840,
        command: Vec::new(),
    }
}

/// Returns both ends of a terminal of the given size.
pub(crate) fn terminal(size: TerminalSize) -> (File, File) {
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
    let master = File::from(master);
    resize(&master, size);
    (master, slave.into())
}

/// Gives a terminal another size.
pub(crate) fn resize(master: &File, size: TerminalSize) {
    let size = rustix::termios::Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(master, size).unwrap();
}

/// Returns what a terminal shows until it ends as given.
pub(crate) fn read_until(master: &mut File, end: &str) -> String {
    let mut shown = String::new();
    while !shown.ends_with(end) {
        let mut chunk = [0; 4096];
        let len = master.read(&mut chunk).unwrap();
        shown.push_str(std::str::from_utf8(&chunk[..len]).unwrap());
    }
    shown
}
