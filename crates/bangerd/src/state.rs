//! What state a vm is in, decided in one place.
//!
//! ```text
//!            launched            ready             asked to stop
//! created ─┬────────> starting ────────> running ────────────> stopping ──> stopped
//! stopped ─┤             │                  │ ended                │           │
//! error   ─┘<────────────┴──────────────────┴──────────────────────┴───────────┘
//!              failed, or: never launched                 with `--rm`: gone
//! ```
//!
//! Whether a vm runs is not a state but a fact, told by the lock on its disk; a state is what was last heard of it.

use banger_wire::daemon::VmState;
use banger_wire::vm::{EndReason, Phase, VmEnd};

/// Something that happened to a vm.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Happening<'a> {
    /// Its supervisor is about to be started.
    Launched,
    /// That came to nothing, and this is why.
    NotLaunched(&'a str),
    /// Its supervisor says how far it is.
    Told(&'a Phase),
    /// It ended and said how.
    Ended(&'a VmEnd),
    /// It is gone and said nothing: killed, or the host went down.
    Lost,
}

/// What a vm is afterwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Next {
    Stays,
    /// The text is the error that it has from now on.
    Becomes(VmState, Option<String>),
    /// It is removed.
    Goes,
}

/// Decides what becomes of a vm. `rm`: it is to go when it has ended.
pub(crate) fn next(state: VmState, rm: bool, happening: Happening<'_>) -> Next {
    let error = |text: &str| Next::Becomes(VmState::Error, Some(text.to_owned()));
    let is_up = matches!(state, VmState::Starting | VmState::Running | VmState::Stopping);
    match happening {
        Happening::Launched => Next::Becomes(VmState::Starting, None),
        Happening::NotLaunched(why) => error(why),
        Happening::Told(phase) => match phase {
            Phase::Preparing | Phase::Booting | Phase::Configuring => Next::Becomes(VmState::Starting, None),
            Phase::Ready | Phase::InitReady => Next::Becomes(VmState::Running, None),
            Phase::Stopping => Next::Becomes(VmState::Stopping, None),
            Phase::Failed { stage, cause } => error(&format!("{stage}: {cause}")),
        },
        Happening::Ended(end) if end.reason == EndReason::Failed => error(&end.detail),
        // A vm that never came up is kept, also with `--rm`: somebody has to look at it.
        Happening::Ended(_) if rm && state != VmState::Error => Next::Goes,
        Happening::Ended(_) => Next::Becomes(VmState::Stopped, None),
        Happening::Lost if rm && state != VmState::Error => Next::Goes,
        Happening::Lost if is_up => Next::Becomes(VmState::Stopped, None),
        Happening::Lost => Next::Stays,
    }
}

/// What a vm may not be in the middle of something for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    Start,
    /// Other processors, memory, disk.
    Change,
    Delete,
    /// To go with everything else that does nothing.
    Prune,
    Commit,
}

/// Decides whether a vm can have what is asked for it. `alive`: its supervisor runs.
pub(crate) fn allows(wish: Wish, state: VmState, alive: bool) -> bool {
    match wish {
        Wish::Start | Wish::Change | Wish::Delete | Wish::Commit => !alive,
        Wish::Prune => match state {
            VmState::Running | VmState::Starting | VmState::Stopping => false,
            // Of a boot that failed, the VMM is kept for whoever looks; pruning is what ends it.
            VmState::Error => true,
            VmState::Created | VmState::Stopped => !alive,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::{Happening, Next, Wish, allows, next};
    use banger_wire::daemon::VmState::{self, Created, Error, Running, Starting, Stopped, Stopping};
    use banger_wire::vm::{EndReason, Phase, VmEnd};
    use proptest::prelude::*;

    const STATES: [VmState; 6] = [Created, Starting, Running, Stopping, Stopped, Error];

    fn end(reason: EndReason) -> VmEnd {
        VmEnd { reason, detail: format!("{reason:?}") }
    }

    #[test]
    fn every_state_and_every_end() {
        let reasons = [
            EndReason::Stopped,
            EndReason::Killed,
            EndReason::PoweredOff,
            EndReason::LeaseEnded,
            EndReason::Failed,
        ];
        let mut table = String::new();
        for state in STATES {
            for rm in [false, true] {
                let mut say = |what: String, next: Next| {
                    let next = match next {
                        Next::Stays => "stays".to_owned(),
                        Next::Goes => "goes".to_owned(),
                        Next::Becomes(state, error) => {
                            format!("{state:?}{}", if error.is_some() { " with a cause" } else { "" })
                        }
                    };
                    let rm = if rm { " --rm" } else { "" };
                    table.push_str(&format!("{state:?}{rm}, {what}: {next}\n"));
                };
                for reason in reasons {
                    say(format!("{reason:?}"), next(state, rm, Happening::Ended(&end(reason))));
                }
                say("Lost".to_owned(), next(state, rm, Happening::Lost));
            }
        }
        insta::assert_snapshot!(table);
    }

    #[test]
    fn what_each_state_allows() {
        let mut table = String::new();
        for wish in [Wish::Start, Wish::Change, Wish::Delete, Wish::Prune, Wish::Commit] {
            for alive in [false, true] {
                let allowed: Vec<_> =
                    STATES.into_iter().filter(|state| allows(wish, *state, alive)).collect();
                table.push_str(&format!(
                    "{wish:?}, {}: {allowed:?}\n",
                    if alive { "alive" } else { "not alive" }
                ));
            }
        }
        insta::assert_snapshot!(table);
    }

    #[derive(Debug, Clone)]
    enum Event {
        Launch,
        NotLaunched,
        Told(Phase),
        Ended(EndReason),
        Lost,
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let failed = Phase::Failed { stage: "agent silent".to_owned(), cause: "no word".to_owned() };
        let event = prop_oneof![
            Just(Event::Launch),
            Just(Event::NotLaunched),
            Just(Event::Lost),
            proptest::sample::select(vec![
                Phase::Preparing,
                Phase::Booting,
                Phase::Configuring,
                Phase::Ready,
                Phase::InitReady,
                Phase::Stopping,
                failed,
            ])
            .prop_map(Event::Told),
            proptest::sample::select(vec![
                EndReason::Stopped,
                EndReason::Killed,
                EndReason::PoweredOff,
                EndReason::LeaseEnded,
                EndReason::Failed,
            ])
            .prop_map(Event::Ended),
        ];
        proptest::collection::vec(event, 0..20)
    }

    proptest! {
        /// Whatever happens, in any order: an error has its cause and nothing else has one, only a vm made with `--rm` goes,
        /// one whose boot failed never does, and after its end a vm can be started and pruned.
        #[test]
        fn no_story_ends_badly(events in events(), rm in any::<bool>()) {
            let (mut state, mut error) = (Created, None::<String>);
            for event in events {
                let end = match &event { Event::Ended(reason) => Some(end(*reason)), _ => None };
                let happening = match &event {
                    Event::Launch => Happening::Launched,
                    Event::NotLaunched => Happening::NotLaunched("no memory"),
                    Event::Told(phase) => Happening::Told(phase),
                    Event::Ended(_) => Happening::Ended(end.as_ref().unwrap()),
                    Event::Lost => Happening::Lost,
                };
                match next(state, rm, happening) {
                    Next::Goes => {
                        prop_assert!(rm && state != Error);
                        return Ok(());
                    }
                    Next::Stays => {}
                    Next::Becomes(now, why) => (state, error) = (now, why),
                }
                prop_assert_eq!(error.is_some(), state == Error);
                if matches!(event, Event::Ended(_) | Event::Lost | Event::NotLaunched) {
                    prop_assert!(matches!(state, Created | Stopped | Error));
                    prop_assert!(allows(Wish::Prune, state, false) && allows(Wish::Start, state, false));
                }
            }
        }
    }
}
