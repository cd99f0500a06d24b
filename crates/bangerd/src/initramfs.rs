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
        Driver::Qemu => {
            &["virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "virtio_balloon", "overlay", "ext4"]
        }
        Driver::Firecracker => &[
            "virtio_pci",
            "virtio_mmio",
            "vmw_vsock_virtio_transport",
            "virtio_blk",
            "virtio_net",
            "virtio_balloon",
            "overlay",
            "ext4",
        ],
    }
}

const PREFIX: &str = "initramfs-";
/// An image's own initrd, within its directory.
pub(crate) const INITRD_FILE: &str = "initrd";
/// Where the agent's program is when ours was appended to it.
pub(crate) const APPENDED_INIT: &str = "/banger/init";

/// Returns the initramfs of a kernel directory for this build's agent and an driver, and an image of such a filesystem,
/// made when it isn't there yet.
///
/// # Errors
/// When the kernel's modules can't be read, it has no driver for the filesystem, or the file can't be written.
pub(crate) fn ensure(kernel: &Path, driver: Driver, filesystem: &str) -> anyhow::Result<PathBuf> {
    let mut modules = modules(driver).to_vec();
    if !modules.contains(&filesystem) {
        modules.push(filesystem);
    }
    let path = place(kernel, &modules.join(" "), &format!("{}-{filesystem}", driver.name()))?;
    if !path.exists() {
        let mut cpio = Cpio::default();
        ["dev", "proc", "sys", "modules"].iter().for_each(|dir| cpio.entry(dir, 0o040_755, &[]));
        cpio.entry("init", 0o100_755, AGENT);
        add_modules(&mut cpio, kernel, &modules, "modules")?;
        write(kernel, &path, &[], cpio)?;
    }
    Ok(path)
}

/// Returns an image's own initrd with ours appended, for a kernel; made when it isn't there yet.
///
/// # Errors
/// When the initrd or the kernel's modules can't be read, or the file can't be written.
pub(crate) fn ensure_appended(image: &Path, kernel: &Path, driver: Driver) -> anyhow::Result<PathBuf> {
    let list = std::fs::read_to_string(kernel.join("kernel.json")).context("read what the kernel is")?;
    let path = place(image, &list, &format!("{}-appended", driver.name()))?;
    if !path.exists() {
        let own = std::fs::read(image.join(INITRD_FILE)).context("read the image's initrd")?;
        let mut cpio = Cpio::default();
        let dirs = ["dev", "proc", "sys", "banger", "banger/modules"];
        dirs.iter().for_each(|dir| cpio.entry(dir, 0o040_755, &[]));
        cpio.entry(APPENDED_INIT.trim_start_matches('/'), 0o100_755, AGENT);
        add_modules(&mut cpio, kernel, modules(driver), "banger/modules")?;
        write(image, &path, &own, cpio)?;
    }
    Ok(path)
}

/// Returns where the file for this build goes; it depends on `key` too. Removes those of the same use that earlier
/// builds made: a VMM reads its own once, when it starts.
fn place(dir: &Path, key: &str, usage: &str) -> anyhow::Result<PathBuf> {
    let digest = Sha256::new().chain_update(AGENT).chain_update(key).finalize();
    let name: String = digest[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let prefix = format!("{PREFIX}{usage}-");
    let path = dir.join(format!("{prefix}{name}.cpio"));
    if !path.exists() {
        for entry in std::fs::read_dir(dir).context("look for earlier initramfs files")?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
    Ok(path)
}

fn add_modules(cpio: &mut Cpio, kernel: &Path, modules: &[&str], place: &str) -> anyhow::Result<()> {
    let boot = kernel.join("boot");
    let known =
        std::fs::read_to_string(boot.join("modules.list")).context("read the kernel's boot modules")?;
    let list = load_order(&known, modules);
    cpio.entry(&format!("{place}/modules.list"), 0o100_644, list.as_bytes());
    for module in list.lines() {
        let bytes = std::fs::read(boot.join(module)).with_context(|| format!("read module `{module}`"))?;
        cpio.entry(&format!("{place}/{module}"), 0o100_644, &bytes);
    }
    Ok(())
}

/// Writes an archive after what comes before it.
fn write(dir: &Path, path: &Path, before: &[u8], mut cpio: Cpio) -> anyhow::Result<()> {
    cpio.entry("TRAILER!!!", 0, &[]);
    let mut file = tempfile::NamedTempFile::new_in(dir).context("write the initramfs")?;
    // An uncompressed archive has to begin at a multiple of four.
    let padding = before.len().next_multiple_of(4) - before.len();
    for part in [before, &[0; 4][..padding], &cpio.bytes] {
        file.write_all(part).context("write the initramfs")?;
    }
    // Vms started by root read it as another user.
    std::fs::set_permissions(file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    file.persist(path).context("write the initramfs")?;
    Ok(())
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
