//! Signals that ask banger to end, or that it passes on.

use crate::stop::{Stop, failed};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals a terminal or a service manager sends.
const KINDS: [SignalKind; 4] =
    [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()];

/// Catches signals from its making on; there is one for the process.
#[derive(Debug)]
pub(crate) struct Signals {
    caught: [Signal; KINDS.len()],
}

impl Signals {
    /// Begins to catch.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub(crate) fn new() -> Result<Self, Stop> {
        let catch =
            |kind| signal(kind).map_err(|error| Stop::from(failed("could not catch signals", &error)));
        let [interrupt, terminate, hangup, quit] = KINDS;
        Ok(Self { caught: [catch(interrupt)?, catch(terminate)?, catch(hangup)?, catch(quit)?] })
    }

    /// Returns the number of the next signal.
    pub(crate) async fn next(&mut self) -> i32 {
        let [interrupt, terminate, hangup, quit] = &mut self.caught;
        let kind = tokio::select! {
            _ = interrupt.recv() => KINDS[0],
            _ = terminate.recv() => KINDS[1],
            _ = hangup.recv() => KINDS[2],
            _ = quit.recv() => KINDS[3],
        };
        kind.as_raw_value()
    }

    /// Does `work` unless a signal comes first; dropping it closes its connections, which cancels what they asked.
    ///
    /// # Errors
    /// Those of `work`, or the signal.
    pub(crate) async fn unless<T>(&mut self, work: impl Future<Output = Result<T, Stop>>) -> Result<T, Stop> {
        tokio::select! {
            number = self.next() => Err(Stop::Signalled(number)),
            result = work => result,
        }
    }
}
