//! Which devices have their drivers when.
//!
//! Until the host says which vm this is, only what the agent's stream is on is in use. Drives and network are probed afterwards: they
//! can be others than those the kernel found when it booted, if the memory it booted into was saved and restored since.

use std::path::Path;

const BUS: &str = "/sys/bus/virtio";
/// What the agent's stream can be on: a port of the console (`VIRTIO_ID_CONSOLE`), a vsock (`VIRTIO_ID_VSOCK`).
const STREAMS: [u32; 2] = [3, 19];

/// Keeps drivers that are loaded from now on away from devices. Where virtio itself is a module, the bus is not there
/// before that is loaded, so this is repeated.
pub(crate) fn hold() {
    let _ = std::fs::write(Path::new(BUS).join("drivers_autoprobe"), "0");
}

/// Brings the way to the host up.
pub(crate) fn probe_stream() {
    probe(|kind| STREAMS.contains(&kind));
}

/// Brings everything up that has a driver, in the order the host has it in, and what comes later at once.
pub(crate) fn probe_all() {
    probe(|_| true);
    let _ = std::fs::write(Path::new(BUS).join("drivers_autoprobe"), "1");
}

fn probe(wanted: impl Fn(u32) -> bool) {
    for name in sorted(
        std::fs::read_dir(Path::new(BUS).join("devices"))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok()),
    ) {
        let kind = std::fs::read_to_string(Path::new(BUS).join("devices").join(&name).join("device"));
        let kind =
            kind.ok().and_then(|text| u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok());
        if kind.is_some_and(&wanted) {
            // Refused for a device that has its driver, or has none.
            let _ = std::fs::write(Path::new(BUS).join("drivers_probe"), name);
        }
    }
}

/// The devices of the bus by their number: the drives are named in the order they are probed in.
fn sorted(names: impl Iterator<Item = String>) -> Vec<String> {
    let number = |name: &String| name.strip_prefix("virtio").and_then(|number| number.parse::<u32>().ok());
    let mut names: Vec<String> = names.filter(|name| number(name).is_some()).collect();
    names.sort_by_key(number);
    names
}

#[cfg(test)]
mod tests {
    #[test]
    fn devices_come_by_number() {
        let names = ["virtio10", "virtio2", "pci", "virtio0"].map(str::to_owned);
        assert_eq!(super::sorted(names.into_iter()), ["virtio0", "virtio2", "virtio10"]);
    }
}
