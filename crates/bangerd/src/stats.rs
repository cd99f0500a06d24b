//! What a vm uses: the guest's own numbers, asked of its agent, and the host's, read here.
//!
//! The host's are those of the VMM's process, which lives in the vm's network namespace and so has its links in
//! `/proc/PID/net/dev`, and what the VMM counts of its drives. Whoever does not answer costs [`WAIT`] and leaves its numbers
//! out.

use crate::daemon::Daemon;
use crate::net::TAP;
use crate::vmsock;
use anyhow::bail;
use banger_wire::daemon::{Outcome, VmState, VmView};
use banger_wire::guest::SessionKind;
use banger_wire::stats::{GUEST_STATS_LEN_MAX, GuestStats, HostStats, VmStats};
use banger_wire::vm::{VmEvent, VmRequest, VmUse};
use std::path::Path;
use std::time::Duration;

/// How long a guest may take to answer, under emulation and load, and a VMM.
const WAIT: Duration = Duration::from_secs(2);
/// Milliseconds of the unit in which the kernel tells times to userspace.
const TICK_MS: u64 = 10;

impl Daemon {
    /// Reads what a vm uses now.
    pub(crate) async fn stats(&self, reference: &str) -> anyhow::Result<Outcome> {
        let row = self.row(reference)?;
        let view = self.view(&row);
        let dir = self.paths.vm(row.id.as_str());
        let asked = matches!(view.state, VmState::Running);
        let (guest, used) = tokio::join!(
            tokio::time::timeout(WAIT, async { if asked { guest(&dir).await.ok() } else { None } }),
            tokio::time::timeout(WAIT, async { if asked { used(&dir).await.ok() } else { None } }),
        );
        let used = used.ok().flatten().unwrap_or_default();
        let host = view.vmm_pid.and_then(host).map(|host| HostStats {
            disk_read_bytes: used.read,
            disk_written_bytes: used.written,
            ..host
        });
        Ok(Outcome::Stats(Box::new(stats(view, guest.ok().flatten(), host))))
    }
}

fn stats(view: VmView, guest: Option<GuestStats>, host: Option<HostStats>) -> VmStats {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    VmStats {
        id: view.id,
        name: view.name,
        state: view.state,
        vcpu: view.vcpu,
        taken_ms: now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000,
        guest,
        host,
        disk_used_bytes: view.disk_used_bytes,
        disk_size: view.disk_size,
    }
}

async fn guest(dir: &Path) -> anyhow::Result<GuestStats> {
    let mut json = Vec::new();
    let take = |bytes: &[u8]| {
        if json.len() + bytes.len() > GUEST_STATS_LEN_MAX {
            bail!("the guest says too much");
        }
        json.extend_from_slice(bytes);
        Ok(())
    };
    vmsock::stream(dir, SessionKind::Stats, take).await?;
    Ok(serde_json::from_slice(&json)?)
}

/// What the VMM counts.
async fn used(dir: &Path) -> anyhow::Result<VmUse> {
    let mut connection = vmsock::connect(dir).await?;
    connection.request(VmRequest::Use).await?;
    match connection.event().await? {
        Some(VmEvent::Used(used)) => Ok(used),
        _ => bail!("the supervisor does not say"),
    }
}

/// What a VMM takes; none when it has ended.
fn host(pid: i32) -> Option<HostStats> {
    let file = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).ok();
    let net = link(&file("net/dev").unwrap_or_default());
    Some(HostStats {
        pid,
        cpu_ms: cpu_ms(&file("stat")?)?,
        memory_bytes: memory(&file("statm")?)?,
        disk_read_bytes: None,
        disk_written_bytes: None,
        net_from_guest_bytes: net.map(|(received, _)| received),
        net_to_guest_bytes: net.map(|(_, sent)| sent),
    })
}

/// Processor time in user mode and in the kernel. The program's name before may have anything in it.
fn cpu_ms(stat: &str) -> Option<u64> {
    let mut words = stat.rsplit_once(") ")?.1.split(' ');
    // The first of these is the third field, and the times are the 14th and 15th.
    let user: u64 = words.nth(11)?.parse().ok()?;
    let kernel: u64 = words.next()?.parse().ok()?;
    Some((user + kernel) * TICK_MS)
}

fn memory(statm: &str) -> Option<u64> {
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

/// Bytes the tap has received, which is what the guest sent, and sent.
fn link(dev: &str) -> Option<(u64, u64)> {
    let line = dev.lines().find_map(|line| line.trim_start().strip_prefix(TAP)?.strip_prefix(':'))?;
    let mut words = line.split_whitespace().map(|word| word.parse().ok());
    Some((words.next()??, words.nth(7)??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_understood() {
        let stat = "7 (qemu) R 1 2) S 1 7 7 0 -1 4194560 900 0 0 0 1234 66 0 0 20 0 4 0 1 2 3";
        assert_eq!(cpu_ms(stat), Some(13_000));
        assert_eq!(cpu_ms("7 (qemu"), None);
        assert_eq!(memory("1000 20 3 4 0 5 0\n"), Some(20 * rustix::param::page_size() as u64));
        let dev = "Inter-|\n    lo: 1 1 0 0 0 0 0 0 2\n  tap0:1000 1 0 0 0 0 0 0 2000 2 0\n tap00: 9 9\n";
        assert_eq!(link(dev), Some((1000, 2000)));
        assert_eq!(link("    lo: 1 1 0 0 0 0 0 0 2\n"), None);
    }

    #[test]
    fn a_process_is_read_while_it_lives() {
        let own = host(std::process::id().cast_signed()).unwrap();
        assert!(own.memory_bytes > 0 && own.net_from_guest_bytes.is_none());
        assert_eq!(host(i32::MAX), None);
    }
}
