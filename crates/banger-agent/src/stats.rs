//! What this guest uses, from its kernel's counters. A few small files are read and nothing is waited for, so that it
//! works in a guest that hardly does.

use banger_wire::stats::GuestStats;
use std::io;

/// Milliseconds of the unit in which the kernel tells times to userspace.
const TICK_MS: u64 = 10;
/// Bytes of what `/proc/diskstats` calls a sector, whatever the drive's own are.
const SECTOR_LEN: u64 = 512;
/// How the drives of a vm are named, and its link to the network.
const DRIVE: &str = "vd";
const LINK: &str = "eth0";

/// Returns the numbers as JSON. What can't be read is zero.
pub(crate) fn read() -> io::Result<Vec<u8>> {
    let file = |name: &str| std::fs::read_to_string(format!("/proc/{name}")).unwrap_or_default();
    let mut stats = GuestStats {
        uptime_ms: hundredths(file("uptime").split(' ').next().unwrap_or_default()) * 10,
        cpu_ms: busy_ms(&file("stat")),
        load_hundredths: load(&file("loadavg")),
        ..GuestStats::default()
    };
    (stats.memory_bytes, stats.memory_used_bytes) = memory(&file("meminfo"));
    (stats.disk_read_bytes, stats.disk_written_bytes) = drives(&file("diskstats"));
    // The agent's own namespace is the guest's first.
    (stats.net_received_bytes, stats.net_sent_bytes) = link(&file("net/dev"));
    if let Ok(root) = rustix::fs::statvfs("/") {
        stats.root_bytes = root.f_blocks.saturating_mul(root.f_frsize);
        stats.root_used_bytes = root.f_blocks.saturating_sub(root.f_bfree).saturating_mul(root.f_frsize);
    }
    Ok(serde_json::to_vec(&stats)?)
}

fn number(word: Option<&str>) -> u64 {
    word.and_then(|word| word.parse().ok()).unwrap_or(0)
}

/// Hundredths of a number with two digits after the point.
fn hundredths(word: &str) -> u64 {
    let (whole, part) = word.split_once('.').unwrap_or((word, "0"));
    let part = format!("{part:0<2}");
    number(Some(whole)).saturating_mul(100).saturating_add(number(part.get(..2)))
}

/// Time all processors were not idle, and not waiting for the host's.
fn busy_ms(stat: &str) -> u64 {
    let times: Vec<u64> =
        stat.lines().next().unwrap_or_default().split_whitespace().skip(1).map(|w| number(Some(w))).collect();
    // user, nice, system, idle, iowait, irq, softirq, steal
    [0, 1, 2, 5, 6].into_iter().filter_map(|at| times.get(at)).sum::<u64>().saturating_mul(TICK_MS)
}

fn load(loadavg: &str) -> [u32; 3] {
    let mut words = loadavg.split(' ').map(|word| u32::try_from(hundredths(word)).unwrap_or(u32::MAX));
    std::array::from_fn(|_| words.next().unwrap_or(0))
}

/// All memory, and what of it is in use.
fn memory(meminfo: &str) -> (u64, u64) {
    let of = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
        number(line.and_then(|line| line.split_whitespace().next())).saturating_mul(1024)
    };
    let total = of("MemTotal:");
    (total, total.saturating_sub(of("MemAvailable:")))
}

/// Bytes read and written.
fn drives(diskstats: &str) -> (u64, u64) {
    let (mut read, mut written) = (0, 0_u64);
    for line in diskstats.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        // Partitions are counted with their drive.
        let is_drive =
            |name: &&&str| name.starts_with(DRIVE) && !name.ends_with(|last: char| last.is_ascii_digit());
        if words.get(2).filter(is_drive).is_some() {
            read += number(words.get(5).copied());
            written += number(words.get(9).copied());
        }
    }
    (read.saturating_mul(SECTOR_LEN), written.saturating_mul(SECTOR_LEN))
}

/// Bytes received and sent.
fn link(dev: &str) -> (u64, u64) {
    let of_link = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        (name.trim() == LINK).then(|| counters.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    };
    let counters = dev.lines().find_map(of_link).unwrap_or_default();
    let at = |index: usize| number(counters.get(index).map(String::as_str));
    (at(0), at(8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_understood() {
        assert_eq!(busy_ms("cpu  1 2 3 1000 500 4 5 600 7 8\ncpu0 9 9 9 9\n"), 150);
        assert_eq!(load("0.07 1.50 12.00 1/123 4567\n"), [7, 150, 1200]);
        assert_eq!(hundredths("12345.6"), 1_234_560);
        let meminfo = "MemTotal:  1000 kB\nMemFree:  10 kB\nMemAvailable:  400 kB\n";
        assert_eq!(memory(meminfo), (1_024_000, 614_400));
        let diskstats = " 254 0 vda 10 0 100 5 20 0 7 9 0 0 0\n 254 1 vda1 1 0 9 0 9 0 9 0\n\
                         254 16 vdb 1 0 1 0 1 0 2 0\n 7 0 loop0 1 0 9 0 9 0 9 0\n";
        assert_eq!(drives(diskstats), (101 * 512, 9 * 512));
        let dev = "Inter-|   Receive\n    lo: 5 5 5 5 5 5 5 5 5\n  eth0:1000 1 0 0 0 0 0 0 2000 2 0\n";
        assert_eq!(link(dev), (1000, 2000));
    }

    #[test]
    fn what_is_not_there_is_zero() {
        assert_eq!(
            (busy_ms(""), load(""), memory(""), drives("a b"), link(":")),
            (0, [0; 3], (0, 0), (0, 0), (0, 0))
        );
        let huge = "cpu 18446744073709551615 0\n";
        assert_eq!(busy_ms(huge), u64::MAX);
        let json = read().unwrap();
        assert!(json.len() < banger_wire::stats::GUEST_STATS_LEN_MAX);
        assert!(serde_json::from_slice::<GuestStats>(&json).unwrap().memory_bytes > 0);
    }
}
