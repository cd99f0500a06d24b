//! Vms as the daemon makes them: a directory with a plan, and a supervisor that is left to itself.

use crate::guest::Script;
use banger_wire::BUILD;
use banger_wire::frame::{DATA_LEN_MAX, Decoder, Frame, MESSAGE_LEN_MAX};
use banger_wire::vm::{VmCall, VmEnd, VmEvent, VmRequest};
use serde_json::{Value, json};
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Users of those vms that root starts: each has its own, so that one's processes can be told from another's.
static NEXT_UID: AtomicU32 = AtomicU32::new(1_873_000_000);
/// No single step may take longer, on a loaded machine, with an emulator.
const PATIENCE: Duration = Duration::from_secs(60);
const MEMORY_MIB: u32 = 128;
/// Length of each drive.
const DRIVE_LEN: usize = 1 << 20;

/// What runs the vm.
#[derive(Debug, Clone)]
pub(crate) struct Vmm {
    pub(crate) driver: &'static str,
    pub(crate) program: PathBuf,
    pub(crate) pci: bool,
}

/// A vm, ended when it goes out of scope.
pub(crate) struct Vm {
    dir: tempfile::TempDir,
    uid: Option<u32>,
}

impl Vm {
    /// Starts one of a kernel and what it is to do; `change` may change the plan.
    pub(crate) fn start(vmm: &Vmm, kernel: &Path, script: &Script, change: impl FnOnce(&mut Value)) -> Self {
        let uid = rustix::process::getuid().is_root().then(|| NEXT_UID.fetch_add(1, Ordering::Relaxed));
        let vm = Self { dir: tempfile::Builder::new().prefix("banger-test-").tempdir().unwrap(), uid };
        let at = |name: &str| vm.dir.path().join(name);
        fs::create_dir(at("vm")).unwrap();
        fs::write(at("initramfs"), script.bytes()).unwrap();
        fs::write(at("image.ext4"), vec![b'I'; DRIVE_LEN]).unwrap();
        fs::write(vm.path("disk.raw"), vec![b'D'; DRIVE_LEN]).unwrap();
        for path in [at("vm"), vm.path("disk.raw")] {
            chown(path, uid, uid).unwrap();
        }
        let mut plan = vm.plan(vmm, kernel);
        change(&mut plan);
        fs::write(vm.path("plan.json"), plan.to_string()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_bangerd"));
        command.arg("supervise").arg("--dir").arg(at("vm")).stdin(Stdio::null()).stdout(Stdio::null());
        // Not a pipe, whose end would only come with that of the vm.
        let log = vm.path("supervisor.log");
        let status = command.stderr(fs::File::create(&log).unwrap()).status().unwrap();
        assert!(status.success(), "{}", fs::read_to_string(&log).unwrap());
        vm
    }

    fn plan(&self, vmm: &Vmm, kernel: &Path) -> Value {
        let host = |name: &str| self.dir.path().join(name);
        let mut binds = vec![
            json!({ "host": kernel, "inside": "/boot/vmlinux" }),
            json!({ "host": host("initramfs"), "inside": "/boot/initramfs" }),
            json!({ "host": host("image.ext4"), "inside": "/boot/image.ext4" }),
        ];
        let mut program = vmm.program.clone();
        if vmm.driver == "firecracker" {
            binds.push(json!({ "host": program, "inside": "/boot/firecracker" }));
            program = "/boot/firecracker".into();
        }
        json!({
            "id": "0123456789ab", "name": "driven", "dir": host("vm"), "run_as": self.uid, "lease": false,
            "binds": binds,
            "machine": {
                "driver": vmm.driver, "program": program, "kvm": vmm.driver == "firecracker", "pci": vmm.pci,
                "vcpu": 1, "memory": MEMORY_MIB, "kernel": "/boot/vmlinux", "initrd": "/boot/initramfs",
                "tsc_khz": null, "cmdline": ["word=of-the-plan"], "net": null, "run_dir": "/run",
                "drives": [
                    { "path": "/boot/image.ext4", "read_only": true },
                    { "path": "/vm/disk.raw", "read_only": false },
                ],
            },
            "guest": {
                "hostname": "driven", "machine_id": "0", "unix_ns": 0, "entropy": "", "network": null,
                "init": "auto", "env": [], "workdir": null, "user": null,
                "drives": { "image": "/dev/vda", "image_fs": "ext4", "disk": "/dev/vdb", "modules": null },
            },
            "net": { "mode": "none", "nft": null, "pasta": null },
            "boot_timeout_ms": 60_000,
        })
    }

    /// A file of the vm's directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("vm").join(name)
    }

    pub(crate) fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.path("console.log")).unwrap_or_default()).into_owned()
    }

    /// Waits until the console has this.
    pub(crate) fn wait_for_console(&self, text: &str) {
        let done = || self.console().contains(text) || self.path("end.json").exists();
        wait_for(&format!("`{text}` on the console"), done, || self.console());
        assert!(self.console().contains(text), "the vm has ended: {}", self.console());
    }

    /// Asks the supervisor for something; its answers follow.
    pub(crate) fn request(&self, request: VmRequest) -> Answers {
        let socket = self.path("vm.sock");
        let stream = || UnixStream::connect(&socket);
        wait_for("the supervisor's socket", || stream().is_ok(), String::new);
        let mut stream = stream().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut bytes = Vec::new();
        Frame::message(0, &VmCall { build: BUILD.to_owned(), request }).unwrap().encode(&mut bytes);
        stream.write_all(&bytes).unwrap();
        Answers { stream, decoder: Decoder::new(MESSAGE_LEN_MAX) }
    }

    /// Waits for the vm's end and for everything of it to be gone; returns what its supervisor wrote down.
    pub(crate) fn end(&self) -> VmEnd {
        let file = self.path("end.json");
        wait_for("the vm to end", || file.exists(), || self.console());
        self.wait_gone();
        serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
    }

    /// Waits until no process of the vm is left and nobody holds its disk.
    pub(crate) fn wait_gone(&self) {
        let lock = || {
            let disk = fs::File::open(self.path("disk.raw")).unwrap();
            rustix::fs::flock(&disk, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok()
        };
        let left = || format!("{:?}, lock free: {}", self.processes(), lock());
        wait_for("nothing to be left", || self.processes().is_empty() && lock(), left);
    }

    /// Ids and names of the vm's processes. Without root, those of its supervisor, with which the rest goes.
    pub(crate) fn processes(&self) -> Vec<(i32, String)> {
        let dir = self.dir.path().join("vm");
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let is_ours = |pid: &i32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            match self.uid {
                // A process that has ended and waits for its parent has no memory left.
                Some(uid) => status.contains(&format!("\nUid:\t{uid}\t")) && status.contains("\nVmSize:"),
                None => line.split(|byte| *byte == 0).any(|word| word == dir.as_os_str().as_encoded_bytes()),
            }
        };
        let name = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        pids.filter(is_ours).map(|pid| (pid, name(&pid).trim().to_owned())).collect()
    }

    /// The supervisor's process.
    pub(crate) fn supervisor(&self) -> rustix::process::Pid {
        let found = self.processes();
        let (pid, _) = found.iter().find(|(_, name)| name == "bangerd").expect("a supervisor");
        rustix::process::Pid::from_raw(*pid).unwrap()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // After a test that failed.
        for (pid, _) in self.processes() {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

/// What a supervisor answers.
pub(crate) struct Answers {
    stream: UnixStream,
    decoder: Decoder,
}

impl Answers {
    /// The next one; none when the supervisor has closed the connection.
    pub(crate) fn next(&mut self) -> Option<VmEvent> {
        self.next_frame().map(|frame| frame.parse().unwrap())
    }

    /// Says more.
    pub(crate) fn send(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.stream.write_all(&bytes).unwrap();
    }

    /// The next answer that need not be an event.
    pub(crate) fn next_frame(&mut self) -> Option<Frame> {
        let mut chunk = vec![0; DATA_LEN_MAX];
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(frame);
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => return None,
                Ok(len) => self.decoder.push(&chunk[..len]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => panic!("no answer: {error}"),
            }
        }
    }
}

fn wait_for(what: &str, done: impl Fn() -> bool, otherwise: impl Fn() -> String) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited for {what}: {}", otherwise());
        std::thread::sleep(Duration::from_millis(5));
    }
}
