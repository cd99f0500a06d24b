//! The process that tries KVM out: `bangerd kvm-probe`. It can be killed, which a guest that hangs makes necessary.
//!
//! It says what happens as it happens, a line each, so that what a killed one reached is known.

use super::{DEVICE, Refusal};
use banger_sys::{child, kvm};
use serde::{Deserialize, Serialize};
use std::io::{ErrorKind, Write as _};
use std::time::Duration;

/// How long the process may take. A guest takes a few milliseconds where KVM works.
const TIME_MAX: Duration = Duration::from_millis(200);
/// Longest text that is taken from it.
const TEXT_LEN_MAX: usize = 200;

/// What the process says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Word {
    /// The device is a name only.
    Absent,
    /// The device can't be opened.
    Denied(String),
    /// The guest got this far.
    Reached(String),
    /// It got no further, for this reason.
    Refused(String),
    /// It got through.
    Passed,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    Absent,
    Denied(String),
    Passed,
    /// Not certain when time was over, or the process came to grief: the machine may only have been busy.
    Refused {
        refusal: Refusal,
        is_certain: bool,
    },
}

/// The process.
pub(crate) fn main() -> anyhow::Result<()> {
    // A guest that hangs must not outlive a daemon that is not there any more to end it.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    if let Err(error) = std::fs::File::options().read(true).write(true).open(DEVICE) {
        const NO_DEVICE: [i32; 2] =
            [rustix::io::Errno::NODEV.raw_os_error(), rustix::io::Errno::NXIO.raw_os_error()];
        let is_absent = error.kind() == ErrorKind::NotFound
            || error.raw_os_error().is_some_and(|number| NO_DEVICE.contains(&number));
        return say(&if is_absent { Word::Absent } else { Word::Denied(error.to_string()) });
    }
    let mut told = Ok(());
    let passed = kvm::try_out(&mut |stage| {
        if told.is_ok() {
            told = say(&Word::Reached(stage.to_owned()));
        }
    });
    told?;
    say(&passed.map_or_else(|failure| Word::Refused(failure.to_string()), |()| Word::Passed))
}

fn say(word: &Word) -> anyhow::Result<()> {
    let line = format!("{}\n", serde_json::to_string(word)?);
    Ok(std::io::stdout().write_all(line.as_bytes())?)
}

/// Runs that process.
pub(super) fn run() -> Outcome {
    // Not by its path, which may lead to another build by now.
    let mut command = child::command("/proc/self/exe".as_ref());
    command.arg("kvm-probe");
    match child::output_within(command, TIME_MAX) {
        Ok(said) => understand(&said.bytes, said.status.is_some()),
        Err(error) => unclear(None, format!("start `bangerd kvm-probe`: {error}")),
    }
}

fn unclear(reached: Option<String>, cause: String) -> Outcome {
    Outcome::Refused { refusal: Refusal { reached, cause }, is_certain: false }
}

fn understand(said: &[u8], has_ended: bool) -> Outcome {
    let text = String::from_utf8_lossy(said);
    let short = |text: &str| text.escape_debug().take(TEXT_LEN_MAX).collect::<String>();
    let mut reached = None;
    for line in text.lines() {
        match serde_json::from_str(line) {
            Ok(Word::Absent) => return Outcome::Absent,
            Ok(Word::Denied(cause)) => return Outcome::Denied(short(&cause)),
            Ok(Word::Reached(stage)) => reached = Some(short(&stage)),
            Ok(Word::Refused(cause)) => {
                let refusal = Refusal { reached, cause: short(&cause) };
                return Outcome::Refused { refusal, is_certain: true };
            }
            Ok(Word::Passed) => return Outcome::Passed,
            Err(_) if has_ended => return unclear(reached, short(line)),
            Err(_) => {}
        }
    }
    let cause = if has_ended {
        "`bangerd kvm-probe` ended without a word".to_owned()
    } else {
        format!("it went on for {} ms and was ended", TIME_MAX.as_millis())
    };
    unclear(reached, cause)
}

#[cfg(test)]
mod tests {
    use super::{Outcome, Refusal, understand};

    fn refused(reached: Option<&str>, cause: &str, is_certain: bool) -> Outcome {
        let refusal = Refusal { reached: reached.map(str::to_owned), cause: cause.to_owned() };
        Outcome::Refused { refusal, is_certain }
    }

    #[test]
    fn what_the_process_says_is_understood() {
        let silent = "it went on for 200 ms and was ended";
        for (said, has_ended, expected) in [
            ("\"passed\"\n", true, Outcome::Passed),
            ("\"absent\"\n", true, Outcome::Absent),
            ("{\"denied\":\"no\"}\n", true, Outcome::Denied("no".to_owned())),
            ("{\"reached\":\"a\"}\n{\"reached\":\"b\"}\n\"passed\"\n", true, Outcome::Passed),
            ("{\"reached\":\"a\"}\n{\"refused\":\"x\"}\n", true, refused(Some("a"), "x", true)),
            ("{\"reached\":\"a\"}\n{\"reached\":\"b\"}\n{\"rea", false, refused(Some("b"), silent, false)),
            ("", false, refused(None, silent, false)),
            ("", true, refused(None, "`bangerd kvm-probe` ended without a word", false)),
            ("error: give up root: no\n", true, refused(None, "error: give up root: no", false)),
        ] {
            assert_eq!(understand(said.as_bytes(), has_ended), expected, "{said}");
        }
    }
}
