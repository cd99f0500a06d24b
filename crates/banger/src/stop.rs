//! How a command ends without success, and which exit status that is.

use banger_wire::error::{ErrorCode, WireError};
use std::time::Duration;

/// Exit status of banger's own failures where the status is otherwise the remote command's.
pub(crate) const STATUS_OWN_FAILURE: u8 = 125;
const STATUS_NOT_EXECUTABLE: u8 = 126;
const STATUS_NOT_FOUND: u8 = 127;
const STATUS_TIMED_OUT: u8 = 124;
const STATUS_FAILURE: u8 = 1;
/// Exit status of a wrong command line.
pub(crate) const STATUS_USAGE: u8 = 2;
const SIGPIPE: i32 = 13;

/// Why a command ends before it is done.
#[derive(Debug)]
pub(crate) enum Stop {
    /// It failed; the user has not been told.
    Failed(Box<WireError>),
    /// It failed, and every failure was told.
    Told,
    /// This signal asked for it.
    Signalled(i32),
    /// Nobody reads the output any more.
    OutputClosed,
    /// The remote command ran longer than `--timeout` allows.
    TimedOut(Duration),
}

/// How a command ends: an exit status, or earlier.
pub(crate) type Ended = Result<u8, Stop>;

impl From<WireError> for Stop {
    fn from(error: WireError) -> Self {
        Self::Failed(Box::new(error))
    }
}

impl Stop {
    /// Returns the exit status. `remote` is true where success has the status of a command in the guest.
    pub(crate) fn status(&self, remote: bool) -> u8 {
        match self {
            Self::Failed(error) => match error.code {
                ErrorCode::CommandNotFound if remote => STATUS_NOT_FOUND,
                ErrorCode::CommandNotExecutable if remote => STATUS_NOT_EXECUTABLE,
                _ if remote => STATUS_OWN_FAILURE,
                ErrorCode::Invalid => STATUS_USAGE,
                _ => STATUS_FAILURE,
            },
            Self::Told if remote => STATUS_OWN_FAILURE,
            Self::Told => STATUS_FAILURE,
            Self::Signalled(number) => of_signal(*number),
            Self::OutputClosed => of_signal(SIGPIPE),
            Self::TimedOut(_) => STATUS_TIMED_OUT,
        }
    }
}

fn of_signal(number: i32) -> u8 {
    u8::try_from(128 + number.clamp(0, 127)).unwrap_or(u8::MAX)
}

/// Returns a failure of `what` because of `cause`.
pub(crate) fn failed(what: impl Into<String>, cause: &(dyn std::error::Error + 'static)) -> WireError {
    let cause = WireError::from_error(ErrorCode::Failed, cause);
    let mut error = WireError::new(ErrorCode::Failed, what);
    error.causes.push(cause.message);
    error.causes.extend(cause.causes);
    error
}

/// Returns the refusal of a command line.
pub(crate) fn invalid(what: impl Into<String>) -> WireError {
    WireError::new(ErrorCode::Invalid, what)
}

/// Returns the error of an answer that the request can't have.
pub(crate) fn unexpected_answer() -> WireError {
    WireError::new(ErrorCode::Failed, "bangerd gave an answer that does not fit the question")
        .hinted("see `banger daemon logs`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_tell_our_failures_from_the_commands() {
        let failed = |code| Stop::from(WireError::new(code, "x"));
        for (stop, remote, status) in [
            (failed(ErrorCode::CommandNotFound), true, 127),
            (failed(ErrorCode::CommandNotExecutable), true, 126),
            (failed(ErrorCode::Invalid), true, 125),
            (failed(ErrorCode::Failed), true, 125),
            (failed(ErrorCode::Failed), false, 1),
            (failed(ErrorCode::NotFound), false, 1),
            (failed(ErrorCode::Invalid), false, 2),
            (Stop::Told, false, 1),
            (Stop::Signalled(2), false, 130),
            (Stop::OutputClosed, true, 141),
            (Stop::TimedOut(Duration::ZERO), true, 124),
        ] {
            assert_eq!(stop.status(remote), status, "{stop:?} {remote}");
        }
    }
}
