//! Passing a signal on to a vm.

use crate::daemon::Daemon;
use crate::vmsock;
use anyhow::{Context as _, bail};
use banger_wire::daemon::Outcome;
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::vm::{VmEvent, VmRequest};

impl Daemon {
    /// Passes a signal on to the guest, which decides what it means.
    pub(crate) async fn signal(&self, reference: &str, number: i32) -> anyhow::Result<Outcome> {
        let row = self.row(reference)?;
        let dir = self.paths.vm(row.id.as_str());
        if !vmsock::is_alive(&dir) {
            return Err(WireError::new(ErrorCode::Failed, format!("vm `{}` is not running", row.name))
                .hinted(format!("start it with `banger vm start {}`", row.name))
                .into());
        }
        let mut connection = vmsock::connect_new(&dir).await?;
        connection.request(VmRequest::Signal { number }).await?;
        match connection.event().await?.context("it has ended, or was started by an earlier banger")? {
            VmEvent::Accepted => Ok(Outcome::Done),
            VmEvent::Refused(error) => Err(error.into()),
            _ => bail!("the supervisor gave an unexpected answer"),
        }
    }
}
