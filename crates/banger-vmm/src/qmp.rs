//! QMP, the protocol QEMU is controlled by: one JSON object a line, answers and events mixed.
//!
//! Only what the supervisor acts on is understood. Source: QEMU's `qapi/` schemas.

use crate::machine::Counters;
use serde::Deserialize;

/// Longest line accepted; events are a few hundred bytes.
pub const LINE_LEN_MAX: usize = 64 * 1024;
/// Ends the negotiation; nothing else is answered before it.
pub const CAPABILITIES: &str = r#"{"execute":"qmp_capabilities"}"#;
/// Asks for what drives have moved; [`Event::Counted`] comes.
pub const COUNT: &str = r#"{"execute":"query-blockstats","id":"count"}"#;
/// Lets a stopped machine go on.
pub const CONTINUE: &str = r#"{"execute":"cont"}"#;
/// Saves the machine, memory and devices, into a file whose descriptor comes with these lines. [`Event::Saved`] says that
/// it is done; the machine then stands still. Without a limit of its own QEMU would take its time, as over a network.
pub const SAVE: &str = concat!(
    r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"events","state":true}]}}"#,
    "\n",
    r#"{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":1000000000000}}"#,
    "\n",
    r#"{"execute":"getfd","arguments":{"fdname":"saved"}}"#,
    "\n",
    r#"{"execute":"migrate","arguments":{"uri":"fd:saved"}}"#,
);

/// What a machine tells of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A disk could not be written because the host has no room; the machine stands still and loses nothing.
    NoSpace,
    /// The machine goes on.
    Resumed,
    /// The guest reset the machine: it wants to boot again, or its kernel panicked.
    Reset,
    /// The machine is saved.
    Saved,
    /// What it has counted since it began.
    Counted(Counters),
    /// What was asked for can't be done, and why.
    Refused(String),
}

#[derive(Deserialize)]
struct Line {
    event: Option<String>,
    #[serde(default)]
    data: Data,
    error: Option<Error>,
    id: Option<String>,
    #[serde(default, rename = "return")]
    answer: serde_json::Value,
}

#[derive(Deserialize)]
struct Drive {
    stats: Moved,
}

#[derive(Deserialize)]
struct Moved {
    rd_bytes: u64,
    wr_bytes: u64,
}

#[derive(Deserialize)]
struct Error {
    desc: String,
}

#[derive(Deserialize, Default)]
struct Data {
    action: Option<String>,
    #[serde(default)]
    nospace: bool,
    reason: Option<String>,
    status: Option<String>,
}

/// Returns the event a line is, when it is one that matters.
#[must_use]
pub fn parse(line: &[u8]) -> Option<Event> {
    let Line { event, data, error, id, answer } = serde_json::from_slice(line).ok()?;
    if id.as_deref() == Some("count") {
        let drives: Vec<Drive> = serde_json::from_value(answer).ok()?;
        let sum = |part: fn(&Moved) -> u64| drives.iter().map(|drive| part(&drive.stats)).sum();
        let counted = Counters { read: sum(|moved| moved.rd_bytes), written: sum(|moved| moved.wr_bytes) };
        return Some(Event::Counted(counted));
    }
    if let Some(Error { desc }) = error {
        return Some(Event::Refused(desc));
    }
    match event?.as_str() {
        "BLOCK_IO_ERROR" if data.nospace && data.action.as_deref() == Some("stop") => Some(Event::NoSpace),
        "RESUME" => Some(Event::Resumed),
        "SHUTDOWN" if data.reason.as_deref() == Some("guest-reset") => Some(Event::Reset),
        "MIGRATION" => match data.status.as_deref() {
            Some("completed") => Some(Event::Saved),
            Some("failed") => Some(Event::Refused("the machine could not be saved".to_owned())),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{Counters, Event, parse};

    #[test]
    fn lines_of_a_real_qemu() {
        for (line, event) in [
            (
                r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}"#,
                None,
            ),
            (r#"{"return": {}}"#, None),
            (
                r#"{"return": [{"device": "drive0", "stats": {"rd_bytes": 5, "wr_bytes": 0, "flush_operations": 0}}, {"device": "drive1", "stats": {"rd_bytes": 1, "wr_bytes": 2}}], "id": "count"}"#,
                Some(Event::Counted(Counters { read: 6, written: 2 })),
            ),
            (r#"{"error": {"class": "GenericError", "desc": "no"}}"#, Some(Event::Refused("no".to_owned()))),
            (r#"{"event": "MIGRATION", "data": {"status": "active"}}"#, None),
            (r#"{"event": "MIGRATION", "data": {"status": "completed"}}"#, Some(Event::Saved)),
            (
                r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "BLOCK_IO_ERROR", "data": {"device": "drive1", "nospace": true, "node-name": "x", "reason": "No space left on device", "operation": "write", "action": "stop"}}"#,
                Some(Event::NoSpace),
            ),
            (
                r#"{"event": "BLOCK_IO_ERROR", "data": {"device": "drive1", "nospace": false, "operation": "read", "action": "report"}}"#,
                None,
            ),
            (r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESUME"}"#, Some(Event::Resumed)),
            (
                r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}"#,
                Some(Event::Reset),
            ),
            (r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}"#, None),
            ("", None),
            ("[1]", None),
        ] {
            assert_eq!(parse(line.as_bytes()), event, "{line}");
        }
    }
}
