//! `vm stats`: what vms use, once or again and again.
//!
//! Percentages are of one processor, over the time between two readings.

use crate::args::StatsArgs;
use crate::context::{Context, expect_outcome};
use crate::stop::{Ended, Stop, failed};
use crate::table::Table;
use crate::terminal;
use crate::text::bytes;
use crate::vm::{NOTHING, state_word};
use banger_wire::daemon::{Request, VmState};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::stats::VmStats;
use serde::Serialize;
use std::collections::BTreeSet;
use std::time::Duration;

/// Between two readings, of which what is shown once is made.
const FIRST_DISTANCE: Duration = Duration::from_millis(500);
/// Between two pictures on a terminal.
const REFRESH: Duration = Duration::from_secs(1);
const SIGINT: i32 = 2;
/// Back to the beginning of a line so many lines above, and everything from there on away.
const UP_AND_CLEAR: (&str, &str) = ("\x1b[", "A\r\x1b[J");

/// A reading and its distance to the one before; also the shape of `--json`.
#[derive(Debug, Serialize)]
struct Usage {
    #[serde(flatten)]
    now: VmStats,
    /// Of the guest's processors, in percent of one.
    guest_cpu_percent: Option<f64>,
    /// Of the host's, by the VMM.
    host_cpu_percent: Option<f64>,
}

/// Runs `banger vm stats`.
pub(crate) async fn stats(context: &mut Context, args: StatsArgs) -> Ended {
    let live = !args.no_stream && !args.json && terminal::stdout_is_terminal();
    let references: Vec<String> = BTreeSet::from_iter(args.vms).into_iter().collect();
    let (mut before, failures) = read(context, &references).await?;
    for failure in &failures {
        context.ui.error(failure);
    }
    if before.is_empty() && !failures.is_empty() {
        return Err(Stop::Told);
    }
    let mut distance = FIRST_DISTANCE;
    let mut shown = 0;
    loop {
        let sleeping = async {
            tokio::time::sleep(distance).await;
            Ok(())
        };
        let waited = context.signals.unless(sleeping).await;
        let reading = match waited {
            Ok(()) => read(context, &references).await,
            Err(stop) => Err(stop),
        };
        let now = match reading {
            Ok((now, _)) => now,
            // There is no other way out of it.
            Err(Stop::Signalled(SIGINT)) if live => return Ok(0),
            Err(stop) => return Err(stop),
        };
        let usages: Vec<Usage> = now.iter().map(|now| usage(&before, now.clone())).collect();
        if args.json {
            context.ui.json(&usages)?;
        } else if live {
            let picture = cut(&table(&usages), usize::from(terminal::size().cols));
            let back = if shown > 0 {
                format!("{}{shown}{}", UP_AND_CLEAR.0, UP_AND_CLEAR.1)
            } else {
                String::new()
            };
            shown = picture.lines().count();
            context.ui.data(&format!("{back}{picture}"))?;
        } else {
            context.ui.data(&table(&usages))?;
        }
        if !live {
            return if failures.is_empty() { Ok(0) } else { Err(Stop::Told) };
        }
        // Those that were asked for are gone.
        if now.is_empty() && !references.is_empty() {
            return Ok(0);
        }
        (before, distance) = (now, REFRESH);
    }
}

/// Reads all vms at once, in the order of their names, and says of which that failed.
async fn read(context: &mut Context, references: &[String]) -> Result<(Vec<VmStats>, Vec<WireError>), Stop> {
    let mut wanted = references.to_vec();
    if wanted.is_empty() {
        let vms = expect_outcome!(context.ask(Request::VmList).await?, Vms)?;
        let runs = |state| !matches!(state, VmState::Created | VmState::Stopped);
        wanted = vms.iter().filter(|vm| runs(vm.state)).map(|vm| vm.id.to_string()).collect();
    }
    let mut tasks = tokio::task::JoinSet::new();
    for vm in wanted {
        let client = context.client.clone();
        tasks.spawn(async move { client.ask(Request::VmStats { vm }, &mut |_| {}).await });
    }
    let (mut stats, mut failures) = (Vec::new(), Vec::new());
    while let Some(joined) = context.signals.unless(async { Ok(tasks.join_next().await) }).await? {
        let result =
            joined.map_err(|error| Stop::from(failed("a request did not end as it should", &error)))?;
        match result {
            Ok(outcome) => stats.push(*expect_outcome!(outcome, Stats)?),
            // One of all that run may have gone since they were listed.
            Err(error) if references.is_empty() && error.code == ErrorCode::NotFound => {}
            Err(error) => failures.push(error),
        }
    }
    stats.sort_by(|one, other| (&one.name, &one.id).cmp(&(&other.name, &other.id)));
    // Two names of one vm.
    stats.dedup_by(|one, other| one.id == other.id);
    Ok((stats, failures))
}

fn usage(before: &[VmStats], now: VmStats) -> Usage {
    let before = before.iter().find(|before| before.id == now.id);
    let guests = before.and_then(|before| before.guest.as_ref()).zip(now.guest.as_ref());
    let of_guest = guests
        .and_then(|(before, now)| percent((before.cpu_ms, before.uptime_ms), (now.cpu_ms, now.uptime_ms)));
    let hosts =
        before.and_then(|before| Some((before.taken_ms, before.host.as_ref()?))).zip(now.host.as_ref());
    let of_host = hosts
        .filter(|((_, before), host)| before.pid == host.pid)
        .and_then(|((at, before), host)| percent((before.cpu_ms, at), (host.cpu_ms, now.taken_ms)));
    Usage { guest_cpu_percent: of_guest, host_cpu_percent: of_host, now }
}

/// Time used of time passed, with one digit after the point. None when time did not pass, or went back: another boot.
fn percent(before: (u64, u64), now: (u64, u64)) -> Option<f64> {
    let used = now.0.checked_sub(before.0)?;
    let passed = now.1.checked_sub(before.1).filter(|passed| *passed > 0)?;
    #[expect(clippy::cast_precision_loss, reason = "one digit after the point is kept")]
    let percent = used as f64 / passed as f64 * 100.0;
    Some((percent * 10.0).round() / 10.0)
}

fn table(usages: &[Usage]) -> String {
    let heading =
        ["NAME", "STATE", "CPU", "LOAD", "MEM", "READ/WRITTEN", "IN/OUT", "DISK", "VMM CPU", "VMM MEM"];
    let mut table = Table::new(&heading);
    let or_nothing = |text: Option<String>| text.unwrap_or_else(|| NOTHING.to_owned());
    let percent = |value: Option<f64>| or_nothing(value.map(|value| format!("{value:.1}%")));
    let pair = |one: u64, other: u64| format!("{}/{}", bytes(one), bytes(other));
    for usage in usages {
        let (now, guest) = (&usage.now, usage.now.guest.as_ref());
        table.row([
            now.name.to_string(),
            state_word(now.state).to_owned(),
            percent(usage.guest_cpu_percent),
            or_nothing(guest.map(|guest| load(guest.load_hundredths[0]))),
            or_nothing(guest.map(|guest| pair(guest.memory_used_bytes, guest.memory_bytes))),
            or_nothing(guest.map(|guest| pair(guest.disk_read_bytes, guest.disk_written_bytes))),
            or_nothing(guest.map(|guest| pair(guest.net_received_bytes, guest.net_sent_bytes))),
            format!("{}/{}", bytes(now.disk_used_bytes), now.disk_size),
            percent(usage.host_cpu_percent),
            or_nothing(now.host.as_ref().map(|host| bytes(host.memory_bytes))),
        ]);
    }
    table.render()
}

fn load(hundredths: u32) -> String {
    format!("{}.{:02}", hundredths / 100, hundredths % 100)
}

/// Cuts lines to a width: one that continues on the next would not be found again.
fn cut(text: &str, columns: usize) -> String {
    let cut = |line: &str| line.chars().take(columns).collect::<String>() + "\n";
    text.lines().map(cut).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn reading(taken_ms: u64, guest: serde_json::Value, host: serde_json::Value) -> VmStats {
        serde_json::from_value(json!({
            "id": "0123456789ab", "name": "web", "state": "running", "vcpu": 2, "taken_ms": taken_ms,
            "guest": guest, "host": host, "disk_used_bytes": 5 << 20, "disk_size": 8192
        }))
        .unwrap()
    }

    fn guest(uptime_ms: u64, cpu_ms: u64) -> serde_json::Value {
        json!({
            "uptime_ms": uptime_ms, "cpu_ms": cpu_ms, "load_hundredths": [107, 20, 5],
            "memory_bytes": 512 << 20, "memory_used_bytes": 100 << 20, "disk_read_bytes": 3 << 20,
            "disk_written_bytes": 2048, "root_bytes": 0, "root_used_bytes": 0, "net_received_bytes": 10,
            "net_sent_bytes": 20
        })
    }

    #[test]
    fn shares_are_of_the_time_between_two_readings() {
        let host = |pid: i32, cpu_ms: u64| json!({"pid": pid, "cpu_ms": cpu_ms, "memory_bytes": 300 << 20});
        let before = [reading(1000, guest(5000, 100), host(7, 50))];
        let usages = [
            usage(&before, reading(2000, guest(6000, 1600), host(7, 800))),
            // A silent guest, another VMM.
            usage(&before, reading(2000, json!(null), host(8, 800))),
            // Another boot.
            usage(&before, reading(2000, guest(10, 5), json!(null))),
        ];
        insta::assert_snapshot!(table(&usages), @r"
        NAME  STATE    CPU     LOAD  MEM                  READ/WRITTEN     IN/OUT     DISK           VMM CPU  VMM MEM
        web   running  150.0%  1.07  100.0 MiB/512.0 MiB  3.0 MiB/2.0 KiB  10 B/20 B  5.0 MiB/8 GiB  75.0%    300.0 MiB
        web   running  -       -     -                    -                -          5.0 MiB/8 GiB  -        300.0 MiB
        web   running  -       1.07  100.0 MiB/512.0 MiB  3.0 MiB/2.0 KiB  10 B/20 B  5.0 MiB/8 GiB  -        -
        ");
    }

    #[test]
    fn no_counter_is_too_large() {
        assert_eq!(percent((0, 0), (u64::MAX, 1)), Some(u64::MAX as f64 * 100.0));
        assert_eq!(percent((5, 5), (5, 5)), None);
        assert_eq!(percent((6, 5), (5, 6)), None);
        assert_eq!(percent((0, 0), (1, 3)), Some(33.3));
    }

    #[test]
    fn lines_end_at_the_edge() {
        assert_eq!(cut("größe  x\nab\n", 4), "größ\nab\n");
    }
}
