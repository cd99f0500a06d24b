//! Values as text for a person: escaped, rounded, dated.
//!
//! Pure functions. Whatever came from a guest, an image or another program passes [`escape`] or [`ConsoleText`]
//! before it reaches a terminal, so that no escape sequence in it is alive there.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use std::fmt::Write as _;
use std::time::Duration;

pub(crate) use banger_wire::time::parse_duration;

/// Returns true for characters that steer a terminal or reorder what is read.
fn is_hostile(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn push_escaped(out: &mut String, c: char) {
    match c {
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        c if c.is_ascii() => {
            let _ = write!(out, "\\x{:02x}", u32::from(c));
        }
        c => {
            let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
        }
    }
}

/// Returns the text on one line with every control character made visible.
#[must_use]
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_hostile(c) { push_escaped(&mut out, c) } else { out.push(c) }
    }
    out
}

/// Like [`escape`], but line breaks stay, with what follows indented so that it can't pose as a line of ours.
#[must_use]
pub(crate) fn escape_lines(text: &str, indent: &str) -> String {
    text.lines().map(escape).collect::<Vec<_>>().join(&format!("\n{indent}"))
}

/// Returns JSON with the control characters that JSON itself leaves alone written as `\u` escapes.
#[must_use]
pub(crate) fn escape_json(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if is_hostile(c) && c != '\n' {
            let _ = write!(out, "\\u{:04x}", u32::from(c));
        } else {
            out.push(c);
        }
    }
    out
}

/// Makes a console's byte stream printable, whatever way it is cut into pieces.
///
/// `\n` and `\t` stay, the `\r` of a serial line's `\r\n` goes, everything else that is not text is spelled out.
#[derive(Debug, Default)]
pub(crate) struct ConsoleText {
    /// The beginning of a character or of a `\r\n` whose rest has not arrived.
    rest: Vec<u8>,
}

impl ConsoleText {
    /// Returns the printable form of what can be decided after `bytes`.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> String {
        self.rest.extend_from_slice(bytes);
        let bytes = std::mem::take(&mut self.rest);
        let keep = undecided_len(&bytes);
        let (now, later) = bytes.split_at(bytes.len() - keep);
        self.rest = later.to_vec();
        printable(now)
    }

    /// Returns what was still undecided when the stream ended.
    pub(crate) fn finish(&mut self) -> String {
        printable(&std::mem::take(&mut self.rest))
    }
}

/// Returns how many bytes at the end may mean something else once more have arrived.
fn undecided_len(bytes: &[u8]) -> usize {
    let returns = bytes.iter().rev().take_while(|&&byte| byte == b'\r').count();
    if returns > 0 {
        return returns;
    }
    for len in 1..=bytes.len().min(3) {
        let tail = &bytes[bytes.len() - len..];
        if let Err(error) = std::str::from_utf8(tail)
            && error.valid_up_to() == 0
            && error.error_len().is_none()
        {
            return len;
        }
    }
    0
}

fn printable(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        let mut returns = 0;
        for c in chunk.valid().chars() {
            match c {
                '\r' => returns += 1,
                '\n' => {
                    returns = 0;
                    out.push(c);
                }
                c => {
                    flush_returns(&mut out, &mut returns);
                    if c != '\t' && is_hostile(c) { push_escaped(&mut out, c) } else { out.push(c) }
                }
            }
        }
        flush_returns(&mut out, &mut returns);
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

fn flush_returns(out: &mut String, returns: &mut usize) {
    for _ in 0..std::mem::take(returns) {
        out.push_str("\\r");
    }
}

/// Returns a number of bytes as a person would say it.
#[must_use]
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "one digit after the point is shown")]
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Returns a duration: `850 ms`, `1.8 s`, `2 min 5 s`, `3 h 20 min`.
#[must_use]
pub(crate) fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0 => format!("{} ms", time.as_millis()),
        1..60 => self::seconds(time),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// Returns a duration in seconds with one digit, such as `0.9 s`.
#[must_use]
pub(crate) fn seconds(time: Duration) -> String {
    if time >= Duration::from_secs(60) { duration(time) } else { format!("{:.1} s", time.as_secs_f64()) }
}

/// Returns how long ago a Unix time was.
#[must_use]
pub(crate) fn age(then: i64, now: i64) -> String {
    match now.saturating_sub(then).max(0) {
        0 => "now".to_owned(),
        s @ 1..60 => format!("{s} s ago"),
        s @ 60..3600 => format!("{} min ago", s / 60),
        s @ 3600..172_800 => format!("{} h ago", s / 3600),
        s => format!("{} days ago", s / 86_400),
    }
}

/// Returns the present as Unix time in seconds.
#[must_use]
pub(crate) fn now() -> i64 {
    Timestamp::now().as_second()
}

/// Returns a Unix time in the user's time zone, followed by how long ago that was.
#[must_use]
pub(crate) fn date(then: i64, now: i64) -> String {
    match Timestamp::from_second(then) {
        Ok(stamp) => {
            let local = stamp.to_zoned_datetime(TimeZone::system());
            format!("{} ({})", local.strftime("%Y-%m-%d %H:%M:%S %:z"), age(then, now))
        }
        Err(_) => then.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_spelled_out() {
        for (text, shown) in [
            ("plain grüße", "plain grüße"),
            ("a\u{1b}[31mb", "a\\x1b[31mb"),
            ("a\nb\tc\r", "a\\nb\\tc\\r"),
            ("\u{9b}2J\u{7f}", "\\u{9b}2J\\x7f"),
            ("abc\u{202e}txt", "abc\\u{202e}txt"),
        ] {
            assert_eq!(escape(text), shown);
        }
        assert_eq!(escape_lines("one\nerror: two\u{7}", "  "), "one\n  error: two\\x07");
    }

    #[test]
    fn json_stays_json() {
        let text = serde_json::to_string("a\u{9b}b\u{202e}\u{7f}\n\u{1b}").unwrap();
        let escaped = escape_json(&text);
        assert!(!escaped.chars().any(is_hostile), "{escaped:?}");
        assert_eq!(serde_json::from_str::<String>(&escaped).unwrap(), "a\u{9b}b\u{202e}\u{7f}\n\u{1b}");
    }

    #[test]
    fn console_text_is_the_same_however_it_is_cut() {
        let stream = b"ok\r\n\tgr\xc3\xbc\xc3\x9fe \x1b[2J\xff\r\r\nhalf\rline \xe2\x82\xac\xe2\x82";
        let whole = "ok\n\tgrüße \\x1b[2J\\xff\nhalf\\rline €\\xe2\\x82";
        for step in 1..stream.len() {
            let mut console = ConsoleText::default();
            let mut out: String = stream.chunks(step).map(|part| console.push(part)).collect();
            out.push_str(&console.finish());
            assert_eq!(out, whole, "in steps of {step}");
        }
    }

    #[test]
    fn numbers_read_well() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (123 << 20, "123.0 MiB"),
            (u64::MAX, "16384.0 PiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
        for (ms, text) in
            [(850, "850 ms"), (1840, "1.8 s"), (125_000, "2 min 5 s"), (12_000_000, "3 h 20 min")]
        {
            assert_eq!(duration(Duration::from_millis(ms)), text);
        }
        assert_eq!(seconds(Duration::from_millis(850)), "0.8 s");
        for (seconds, text) in
            [(-5, "now"), (0, "now"), (59, "59 s ago"), (3599, "59 min ago"), (200_000, "2 days ago")]
        {
            assert_eq!(age(1_000_000, 1_000_000 + seconds), text);
        }
    }
}
