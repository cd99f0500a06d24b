//! What a command has at hand, and the two usual ways to ask the daemon something.

use crate::client::Client;
use crate::progress::Progress;
use crate::signals::Signals;
use crate::stop::Stop;
use crate::ui::Ui;
use crate::upload::Archive;
use banger_wire::daemon::{Event, Outcome, Request};

/// Takes the expected variant out of an outcome.
macro_rules! expect_outcome {
    ($outcome:expr, $variant:ident) => {
        match $outcome {
            banger_wire::daemon::Outcome::$variant(value) => Ok(value),
            _ => Err($crate::stop::Stop::from($crate::stop::unexpected_answer())),
        }
    };
}
pub(crate) use expect_outcome;

/// What every command needs.
#[derive(Debug)]
pub(crate) struct Context {
    /// Prints.
    pub(crate) ui: Ui,
    /// Speaks to the daemon.
    pub(crate) client: Client,
    /// Catches signals.
    pub(crate) signals: Signals,
}

impl Context {
    /// Sends a request that tells nothing but warnings before its end; a signal cancels it.
    ///
    /// # Errors
    /// The daemon's own, those of the connection, and the signal.
    pub(crate) async fn ask(&mut self, request: Request) -> Result<Outcome, Stop> {
        let mut observe = |event: &Event| {
            if let Event::Warning { text } = event {
                self.ui.warning(text);
            }
        };
        self.signals.unless(async { Ok(self.client.ask(request, &mut observe).await?) }).await
    }

    /// Sends a request whose steps are shown; a signal cancels it.
    ///
    /// # Errors
    /// The daemon's own, those of the connection, and the signal.
    pub(crate) async fn follow(&mut self, request: Request) -> Result<Outcome, Stop> {
        let mut progress = Progress::new(&self.ui);
        let mut observe = |event: &Event| progress.observe(event);
        let result = self.signals.unless(async { Ok(self.client.ask(request, &mut observe).await?) }).await;
        progress.finish();
        result
    }

    /// Like [`Context::follow`], with a file that follows the request.
    ///
    /// # Errors
    /// The daemon's own, those of the connection and of the file, and the signal.
    pub(crate) async fn send(&mut self, request: Request, file: Archive) -> Result<Outcome, Stop> {
        let mut progress = Progress::new(&self.ui);
        let mut observe = |event: &Event| progress.observe(event);
        let sending = async { Ok(self.client.send(request, file, &mut observe).await?) };
        let result = self.signals.unless(sending).await;
        progress.finish();
        result
    }
}
