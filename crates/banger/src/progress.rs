//! What happens between a request and its answer, on stderr.
//!
//! On a terminal one line is rewritten; a stage that moved bytes leaves its line behind, others vanish. With `-v`
//! every stage leaves a line with its time, terminal or not. Otherwise nothing is said but warnings.

use crate::text::{bytes, duration, seconds};
use crate::ui::Ui;
use banger_wire::daemon::{Event, NetMode, PlanSummary, ProjectFile, StartedVm};
use std::time::{Duration, Instant};

/// Time between two rewritings of the line: more than that nobody can read.
const REDRAW_TIME_MIN: Duration = Duration::from_millis(100);
/// A rate over less than this says nothing.
const RATE_TIME_MIN: Duration = Duration::from_millis(500);

/// The stage under way.
#[derive(Debug)]
struct Stage {
    label: String,
    began: Instant,
    drawn: Instant,
    done: u64,
    total: Option<u64>,
}

/// Shows the events of one operation.
#[derive(Debug)]
pub(crate) struct Progress<'a> {
    ui: &'a Ui,
    stage: Option<Stage>,
    /// The name of the vm that was planned.
    pub(crate) planned: Option<String>,
}

impl<'a> Progress<'a> {
    /// Returns a display without a stage.
    pub(crate) fn new(ui: &'a Ui) -> Self {
        Self { ui, stage: None, planned: None }
    }

    /// Shows an event.
    pub(crate) fn observe(&mut self, event: &Event) {
        match event {
            Event::Planned(plan) => {
                self.planned = Some(plan.name.to_string());
                self.ui.note(&plan_line(plan));
                if let Some(note) = &plan.note {
                    self.ui.note(note);
                }
            }
            Event::Step { label } => {
                self.end_stage();
                let now = Instant::now();
                self.stage =
                    Some(Stage { label: label.clone(), began: now, drawn: now, done: 0, total: None });
                self.ui.progress(label);
            }
            Event::Progress { done, total } => self.advance(*done, *total),
            Event::Warning { text } => self.ui.warning(text),
            Event::Check(_) | Event::Done(_) | Event::Failed(_) => {}
        }
    }

    /// Ends the stage under way and leaves the terminal to what follows.
    pub(crate) fn finish(&mut self) {
        self.end_stage();
    }

    fn advance(&mut self, done: u64, total: Option<u64>) {
        let Some(stage) = &mut self.stage else { return };
        (stage.done, stage.total) = (done, total);
        let now = Instant::now();
        if now.duration_since(stage.drawn) >= REDRAW_TIME_MIN {
            stage.drawn = now;
            self.ui.progress(&moving_line(&stage.label, done, total, now - stage.began));
        }
    }

    fn end_stage(&mut self) {
        self.ui.clear_progress();
        let Some(stage) = self.stage.take() else { return };
        if self.ui.is_verbose() || (stage.done > 0 && self.ui.is_live()) {
            self.ui.note(&ended_line(&stage.label, stage.done, stage.began.elapsed()));
        }
    }
}

/// Returns the line before the progress.
pub(crate) fn plan_line(plan: &PlanSummary) -> String {
    let how = processor_word(plan.emulated);
    let net = match (plan.net, &plan.network) {
        (NetMode::Internet, _) => "",
        (NetMode::None, None) => ", no network",
        (NetMode::None, Some(_)) => ", no network but the vms'",
        (NetMode::Full, _) => ", full network",
        (NetMode::Allow, _) => ", network as allowed",
    };
    let network = plan.network.as_ref().map(|name| format!(", in `{name}`")).unwrap_or_default();
    let project = match plan.project.as_slice() {
        [] => String::new(),
        chosen => format!("; {} from {}", chosen.join(", "), ProjectFile::NAME),
    };
    format!(
        "vm {}: {} vcpu, {}, {} disk, {}, {} ({how}){net}{network}{project}",
        plan.name, plan.vcpu, plan.memory, plan.disk_size, plan.image, plan.vmm
    )
}

/// Returns what a vm's processor is.
pub(crate) fn processor_word(emulated: bool) -> &'static str {
    if emulated { "software emulation" } else { "KVM" }
}

/// Returns the lines after it: with `verbose` the measured steps, then how long all took.
pub(crate) fn ready_lines(started: &StartedVm, verbose: bool) -> Vec<String> {
    let mut lines = Vec::new();
    if verbose {
        let widest = started.timings.iter().map(|timing| timing.stage.chars().count()).max().unwrap_or(0);
        lines.extend(started.timings.iter().map(|timing| {
            let pad = widest - timing.stage.chars().count();
            format!("  {}{:pad$}  {:>6} ms", timing.stage, "", timing.ms)
        }));
    }
    lines.push(format!("ready in {}", seconds(Duration::from_millis(started.ready_ms))));
    lines
}

fn moving_line(label: &str, done: u64, total: Option<u64>, elapsed: Duration) -> String {
    let mut line = match total {
        Some(total) => format!("{label}  {} of {}", bytes(done), bytes(total)),
        None => format!("{label}  {}", bytes(done)),
    };
    if let Some(rate) = rate(done, elapsed) {
        line.push_str(&format!("  {}/s", bytes(rate)));
        if let Some(left) = total.and_then(|total| total.checked_sub(done)) {
            line.push_str(&format!("  {} left", duration(Duration::from_secs(left.div_ceil(rate)))));
        }
    }
    line
}

fn ended_line(label: &str, done: u64, elapsed: Duration) -> String {
    if done > 0 {
        format!("{label}  {} in {}", bytes(done), duration(elapsed))
    } else {
        format!("{label}  {}", duration(elapsed))
    }
}

fn rate(done: u64, elapsed: Duration) -> Option<u64> {
    let ms = elapsed.as_millis();
    if elapsed < RATE_TIME_MIN {
        return None;
    }
    u64::try_from(u128::from(done) * 1000 / ms).ok().filter(|&rate| rate > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use banger_wire::guest::Timing;

    #[test]
    fn a_moving_line_tells_rate_and_time_left() {
        let mib = 1 << 20;
        for (done, total, ms, line) in [
            (0, None, 0, "pull  0 B"),
            (10 * mib, Some(40 * mib), 100, "pull  10.0 MiB of 40.0 MiB"),
            (10 * mib, Some(40 * mib), 1000, "pull  10.0 MiB of 40.0 MiB  10.0 MiB/s  3.0 s left"),
            (10 * mib, None, 1000, "pull  10.0 MiB  10.0 MiB/s"),
            (50 * mib, Some(40 * mib), 1000, "pull  50.0 MiB of 40.0 MiB  50.0 MiB/s"),
            (0, Some(mib), 9000, "pull  0 B of 1.0 MiB"),
            (u64::MAX, Some(u64::MAX), 1000, "pull  16384.0 PiB of 16384.0 PiB  16384.0 PiB/s  0 ms left"),
        ] {
            assert_eq!(moving_line("pull", done, total, Duration::from_millis(ms)), line);
        }
    }

    #[test]
    fn the_plan_says_what_is_special() {
        let mut plan = PlanSummary {
            name: "fuzzy-otter".parse().unwrap(),
            vcpu: 1,
            memory: "512".parse().unwrap(),
            disk_size: "8G".parse().unwrap(),
            image: "debian-bookworm".to_owned(),
            kernel: "generic-6.12".parse().unwrap(),
            vmm: "qemu".to_owned(),
            net: NetMode::Internet,
            network: None,
            emulated: true,
            note: None,
            pull_image: false,
            pull_kernel: false,
            project: Vec::new(),
        };
        let line = "vm fuzzy-otter: 1 vcpu, 512 MiB, 8 GiB disk, debian-bookworm, qemu";
        assert_eq!(plan_line(&plan), format!("{line} (software emulation)"));
        plan.emulated = false;
        plan.net = NetMode::None;
        assert_eq!(plan_line(&plan), format!("{line} (KVM), no network"));
        plan.project = vec!["image".to_owned(), "net".to_owned()];
        assert_eq!(plan_line(&plan), format!("{line} (KVM), no network; image, net from .banger.toml"));
        plan.project.clear();
        plan.network = Some("lab".parse().unwrap());
        assert_eq!(plan_line(&plan), format!("{line} (KVM), no network but the vms', in `lab`"));
        plan.net = NetMode::Internet;
        assert_eq!(plan_line(&plan), format!("{line} (KVM), in `lab`"));
    }

    #[test]
    fn timings_are_for_the_curious() {
        let vm = serde_json::json!({
            "id": "0123456789ab", "name": "web", "state": "running", "image": "i", "kernel": "k", "vcpu": 1,
            "memory": 1, "disk_size": 1, "disk_used_bytes": 0, "net": "none", "vmm": "qemu", "emulated": true,
            "created": 0,
            "rm": false, "dir": "/", "socket": "/s", "watchdog_restarts": 0
        });
        let started = StartedVm {
            vm: serde_json::from_value(vm).unwrap(),
            socket: "/s".to_owned(),
            timings: vec![
                Timing { stage: "kernel".to_owned(), ms: 120 },
                Timing { stage: "network".to_owned(), ms: 7 },
            ],
            ready_ms: 1840,
            command: Vec::new(),
        };
        assert_eq!(ready_lines(&started, false), ["ready in 1.8 s"]);
        assert_eq!(
            ready_lines(&started, true),
            ["  kernel      120 ms", "  network       7 ms", "ready in 1.8 s"]
        );
    }
}
