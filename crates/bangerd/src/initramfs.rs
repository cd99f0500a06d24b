//! The initramfs: our agent as `/init`, and the modules a kernel needs to boot. Uncompressed "newc" cpio, which the
//! kernel reads faster than it would decompress it.

use anyhow::Context as _;
use banger_vmm::Driver;
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

const AGENT: &[u8] = include_bytes!(env!("BANGER_AGENT"));

/// What a machine needs to find its drives, its network and the agent's stream, where the kernel hasn't built it in.
/// Loading a module takes an emulator up to 0.1 s, so nothing is loaded to spare. Firecracker's devices may be on a bus or
/// not.
fn modules(driver: Driver) -> &'static [&'static str] {
    match driver {
        Driver::Qemu => &["virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "overlay", "ext4"],
        Driver::Firecracker => &[
            "virtio_pci",
            "virtio_mmio",
            "vmw_vsock_virtio_transport",
            "virtio_blk",
            "virtio_net",
            "overlay",
            "ext4",
        ],
    }
}

const DRIVERS: [Driver; 2] = [Driver::Qemu, Driver::Firecracker];
const PREFIX: &str = "initramfs-";

/// The name of the initramfs of this build's agent for a driver.
fn file_name(driver: Driver) -> String {
    let digest = Sha256::new().chain_update(AGENT).chain_update(modules(driver).join(" ")).finalize();
    let name: String = digest[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{PREFIX}{name}.cpio")
}

/// Returns the initramfs of a kernel directory for this build's agent and a driver, made when it isn't there yet.
///
/// # Errors
/// When the kernel's modules can't be read or the file can't be written.
pub(crate) fn ensure(kernel: &Path, driver: Driver) -> anyhow::Result<PathBuf> {
    let path = kernel.join(file_name(driver));
    if path.exists() {
        return Ok(path);
    }
    // Those of earlier builds; a VMM reads its own once, when it starts.
    for entry in std::fs::read_dir(kernel).context("look for earlier initramfs files")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(PREFIX) && DRIVERS.iter().all(|driver| file_name(*driver) != name) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    let boot = kernel.join("boot");
    let known =
        std::fs::read_to_string(boot.join("modules.list")).context("read the kernel's boot modules")?;
    let list = load_order(&known, modules(driver));
    let mut cpio = Cpio::default();
    for dir in ["dev", "proc", "sys", "modules"] {
        cpio.entry(dir, 0o040_755, &[]);
    }
    cpio.entry("init", 0o100_755, AGENT);
    cpio.entry("modules/modules.list", 0o100_644, list.as_bytes());
    for module in list.lines() {
        let bytes = std::fs::read(boot.join(module)).with_context(|| format!("read module `{module}`"))?;
        cpio.entry(&format!("modules/{module}"), 0o100_644, &bytes);
    }
    cpio.entry("TRAILER!!!", 0, &[]);
    let mut file = tempfile::NamedTempFile::new_in(kernel).context("write the initramfs")?;
    file.write_all(&cpio.bytes).context("write the initramfs")?;
    // Vms started by root read it as another user.
    std::fs::set_permissions(file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    file.persist(&path).context("write the initramfs")?;
    Ok(path)
}

/// Returns the files to load for `wanted`, one a line, from lines of a module and the files it needs in order.
fn load_order(known: &str, wanted: &[&str]) -> String {
    let needs: HashMap<&str, &str> = known.lines().filter_map(|line| line.split_once(':')).collect();
    let mut files: Vec<&str> = Vec::new();
    for file in wanted.iter().flat_map(|name| needs.get(name).copied().unwrap_or("").split_whitespace()) {
        if !files.contains(&file) {
            files.push(file);
        }
    }
    files.iter().map(|file| format!("{file}\n")).collect()
}

#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    inode: u32,
}

impl Cpio {
    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.inode += 1;
        let fields = [self.inode, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        fields.iter().for_each(|field| self.bytes.extend_from_slice(format!("{field:08x}").as_bytes()));
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn shared_needs_are_loaded_once_and_first() {
        let known = "virtio_pci:\nvirtio_blk: virtio_blk.ko\na: c.ko a.ko\nb: c.ko b.ko\n";
        assert_eq!(super::load_order(known, &["virtio_pci", "b", "a", "none"]), "c.ko\nb.ko\na.ko\n");
    }
}
