//! Bare machines, for comparison: banger's VMM and kernel, and nothing of banger in the guest.

use crate::programs::Store;
use anyhow::{Context as _, bail};
use banger_tests::{code_that_powers_off, static_program};
use banger_vmm::{AgentSocket, Driver, Launch, MachinePlan};
use banger_wire::size::Mebibytes;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a bare machine may take to boot.
const BOOTS: Duration = Duration::from_secs(120);
/// Bytes that one read or write of the guest's has.
const CHUNK_LEN: usize = 64 << 10;
/// A guest that takes bytes from the agent's port (`p CHUNKS`, and `P CHUNKS` by way of a pipe), answering with a line, or
/// puts some there (`g` and `G`).
const STREAMS: &str = "#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
port=$(echo /dev/vport*p1)
exec 3<>$port
echo ready >&3
while read -r how count <&3; do
    case $how in
    p) /bin/busybox dd bs=64k count=$count iflag=fullblock <&3 >/dev/null 2>/dev/null; echo done >&3 ;;
    P) /bin/busybox dd bs=64k count=$count iflag=fullblock <&3 2>/dev/null | /bin/busybox cat >/dev/null; echo done >&3 ;;
    g) /bin/busybox dd bs=64k count=$count if=/dev/zero >&3 2>/dev/null ;;
    G) /bin/busybox dd bs=64k count=$count if=/dev/zero 2>/dev/null | /bin/busybox dd bs=64k >&3 2>/dev/null ;;
    esac
done
";

/// The least a boot can cost: the same VMM, machine, processor, memory and kernel, and nothing to do.
pub(crate) struct Floor {
    launch: Launch,
    _dir: tempfile::TempDir,
}

impl Floor {
    /// Makes a machine whose `/init` powers off.
    pub(crate) fn new(store: &Store, vcpu: u32, memory_mib: u64) -> anyhow::Result<Self> {
        let init = static_program(&code_that_powers_off());
        let dir = tempfile::tempdir()?;
        let launch = prepare(store, dir.path(), vcpu, memory_mib, &[("init", 0o100_755, &init)])?;
        Ok(Self { launch, _dir: dir })
    }

    /// Boots it and waits for its end.
    pub(crate) fn boot(&self) -> anyhow::Result<()> {
        let status = start(&self.launch).status()?;
        if status.success() { Ok(()) } else { bail!("the bare machine ended with {status}") }
    }
}

/// The plainest stream there is through a vm's channel: two programs, one on each end, and no protocol.
pub(crate) struct RawChannel {
    vmm: Child,
    port: BufReader<UnixStream>,
    _dir: tempfile::TempDir,
}

impl RawChannel {
    /// Boots a machine with one on its agent's port.
    pub(crate) fn open(store: &Store) -> anyhow::Result<Self> {
        let busybox = std::fs::read("/bin/busybox").context("`busybox-static` is not installed")?;
        let dir = tempfile::tempdir()?;
        let files: [(&str, u32, &[u8]); 4] = [
            ("bin", 0o040_755, &[]),
            ("dev", 0o040_755, &[]),
            ("bin/busybox", 0o100_755, &busybox),
            ("init", 0o100_755, STREAMS.as_bytes()),
        ];
        let launch = prepare(store, dir.path(), 1, 256, &files)?;
        let AgentSocket::Dial(path) = &launch.agent else { bail!("the agent's socket is not the VMM's") };
        let mut vmm = start(&launch).spawn()?;
        let opened = Self::greeted(path);
        if opened.is_err() {
            vmm.kill()?;
            vmm.wait()?;
        }
        Ok(Self { port: opened?, vmm, _dir: dir })
    }

    fn greeted(path: &Path) -> anyhow::Result<BufReader<UnixStream>> {
        let deadline = Instant::now() + BOOTS;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
                Err(error) => return Err(error).context("the bare machine has no port"),
            }
        };
        stream.set_read_timeout(Some(BOOTS))?;
        let mut port = BufReader::with_capacity(CHUNK_LEN, stream);
        let mut line = String::new();
        port.read_line(&mut line).context("the bare machine's port")?;
        if line == "ready\n" { Ok(port) } else { bail!("the bare machine said {line:?}") }
    }

    /// Sends zeros into the vm, a multiple of 64 KiB, and waits until they are there, as far as a pipe behind the port.
    pub(crate) fn send(&mut self, len: usize, piped: bool) -> anyhow::Result<()> {
        let stream = self.port.get_mut();
        let how = if piped { 'P' } else { 'p' };
        stream.write_all(format!("{how} {}\n", len / CHUNK_LEN).as_bytes())?;
        // The guest's shell reads its line a byte at a time, and takes nothing of what follows.
        let chunk = vec![0; CHUNK_LEN];
        (0..len / CHUNK_LEN).try_for_each(|_| stream.write_all(&chunk))?;
        let mut line = String::new();
        self.port.read_line(&mut line)?;
        if line == "done\n" { Ok(()) } else { bail!("the bare machine said {line:?}") }
    }

    /// Takes zeros out of the vm, a multiple of 64 KiB, also out of a pipe in front of the port.
    pub(crate) fn fetch(&mut self, len: usize, piped: bool) -> anyhow::Result<()> {
        let how = if piped { 'G' } else { 'g' };
        self.port.get_mut().write_all(format!("{how} {}\n", len / CHUNK_LEN).as_bytes())?;
        let mut chunk = vec![0; CHUNK_LEN];
        (0..len / CHUNK_LEN).try_for_each(|_| Ok(self.port.read_exact(&mut chunk)?))
    }
}

impl Drop for RawChannel {
    fn drop(&mut self) {
        // There is nothing on it; a VMM that can't be killed has ended.
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}

/// Writes an initramfs and says how a machine with it is started.
fn prepare(
    store: &Store,
    dir: &Path,
    vcpu: u32,
    memory_mib: u64,
    files: &[(&str, u32, &[u8])],
) -> anyhow::Result<Launch> {
    let initrd = dir.join("initrd");
    std::fs::write(&initrd, cpio(files))?;
    let plan = MachinePlan {
        driver: Driver::Qemu,
        program: which("qemu-system-x86_64")?,
        kvm: false,
        pci: true,
        vcpu,
        memory: Mebibytes(memory_mib),
        kernel: store.path().join("kernels/generic-6.12/vmlinux"),
        initrd,
        tsc_khz: tsc_khz(),
        cmdline: Vec::new(),
        drives: Vec::new(),
        net: None,
        run_dir: dir.to_owned(),
        gives_memory_back: false,
        to_be_saved: false,
        saved: None,
    };
    Ok(banger_vmm::launch(&plan))
}

fn start(launch: &Launch) -> Command {
    let mut command = Command::new(&launch.program);
    command.args(&launch.args).stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// The rate banger gives the kernel too, as the processor states it.
fn tsc_khz() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("cpu MHz"))?;
    let mhz: f64 = line.rsplit(' ').next()?.parse().ok()?;
    Some((mhz * 1000.0) as u64)
}

fn which(program: &str) -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(program)).find(|path| path.is_file());
    found.with_context(|| format!("`{program}` is not installed"))
}

/// An initramfs ("newc" cpio) of files and directories, each with name, mode and content.
fn cpio(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let entries = files.iter().copied().chain([("TRAILER!!!", 0, &[][..])]);
    for (number, (name, mode, data)) in entries.enumerate() {
        let fields =
            [number as u32 + 1, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        bytes.extend_from_slice(b"070701");
        fields.iter().for_each(|field| bytes.extend_from_slice(format!("{field:08x}").as_bytes()));
        for part in [&[name.as_bytes(), &[0]].concat()[..], data] {
            bytes.extend_from_slice(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
    }
    bytes
}
