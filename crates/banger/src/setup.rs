//! `setup`: what there is, what was fetched, and what is left to do by hand.

use crate::args::SetupArgs;
use crate::context::{Context, expect_outcome};
use crate::stop::{Ended, Stop};
use banger_wire::daemon::Request;
use banger_wire::doctor::SetupState;

/// Runs `banger setup`; the status is 1 when something is left to do by hand or could not be fetched.
pub(crate) async fn setup(context: &mut Context, args: SetupArgs) -> Ended {
    let request = Request::Setup { dry_run: args.dry_run, firecracker_url: args.firecracker_url };
    let outcome = context.follow(request).await?;
    let items = expect_outcome!(outcome, Setup)?;
    if args.json {
        context.ui.json(&items)?;
    } else {
        for item in &items {
            context.ui.setup_item(item)?;
        }
    }
    let is_left = items.iter().any(|item| matches!(item.state, SetupState::ByHand | SetupState::Failed));
    if is_left { Err(Stop::Told) } else { Ok(0) }
}
