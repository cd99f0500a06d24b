//! Signals by name, for `vm kill`.

use crate::text::escape;

/// The number of `KILL`.
pub(crate) const SIGKILL: i32 = 9;
/// Linux's names in the order of their numbers, from 1 on, the same on x86 and ARM.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
    "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
    "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// Parses a name, with or without `SIG`, or a number.
///
/// # Errors
/// When there is no such signal.
pub(crate) fn parse_signal(text: &str) -> Result<i32, String> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let by_name = NAMES.iter().position(|known| *known == name).map(|at| at + 1);
    let number = by_name.or_else(|| text.parse().ok()).filter(|number| (1..=NAMES.len()).contains(number));
    number.and_then(|number| i32::try_from(number).ok()).ok_or_else(|| {
        format!("`{}` is no signal: use a name such as TERM, or a number from 1 to 31", escape(text))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_signals() {
        for (text, number) in
            [("KILL", SIGKILL), ("sigterm", 15), ("9", 9), ("Hup", 1), ("SIGSYS", 31), ("PWR", 30)]
        {
            assert_eq!(parse_signal(text), Ok(number), "{text}");
        }
        for bad in ["", "SIG", "0", "32", "-1", "TERMINATE", "RTMIN+3", "4294967305"] {
            assert!(parse_signal(bad).is_err(), "{bad}");
        }
    }
}
