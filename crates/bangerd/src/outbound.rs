//! What a vm reaches, shown and changed while it runs.
//!
//! The rules are part of the vm's stored request, so they hold for every later start; a running vm's supervisor puts them
//! in force before the answer.

use crate::daemon::{Daemon, net_mode};
use crate::net::policy;
use crate::store::VmRow;
use crate::vmsock;
use anyhow::{Context as _, bail};
use banger_wire::daemon::{NetMode, Outcome, VmSpec};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::net::{NetReport, NetRules, NetTarget, NetView, OpenName, Place, TARGETS_MAX};
use banger_wire::vm::{VmEvent, VmRequest};
use std::path::Path;

impl Daemon {
    /// Shows what a vm reaches.
    pub(crate) async fn net_show(&self, reference: &str) -> anyhow::Result<Outcome> {
        let row = self.row(reference)?;
        let spec = spec(&row)?;
        let dir = self.paths.vm(row.id.as_str());
        // A vm on its way up or down has rules as well, and nothing to say of them.
        let report = if vmsock::is_alive(&dir) { report(&dir).await.ok() } else { None };
        let live = report.is_some();
        let open = report.unwrap_or_default().open;
        Ok(Outcome::Net(view(spec, &dir, live, open)))
    }

    /// Changes what a vm reaches.
    pub(crate) async fn net_change(
        &self,
        reference: &str,
        allow: &[NetTarget],
        deny: &[NetTarget],
    ) -> anyhow::Result<Outcome> {
        let _alone = self.alone(&self.row(reference)?).await;
        let row = self.row(reference)?;
        let mut spec = spec(&row)?;
        let dir = self.paths.vm(row.id.as_str());
        let running = running_mode(&dir);
        if net_mode(&spec) == NetMode::None && running.unwrap_or(NetMode::None) == NetMode::None {
            let text = format!("vm `{}` has no network", row.name);
            return Err(WireError::new(ErrorCode::Invalid, text)
                .hinted(format!(
                    "give it one with `banger vm set {} --net internet`, from its next start on",
                    row.name
                ))
                .into());
        }
        spec.net_rules = changed(spec.net_rules, allow, deny)?;
        let changed = VmRow { spec: serde_json::to_string(&spec)?, ..row.clone() };
        // CRASH: rules that are not in force. The vm's next start, or the same request, puts them there.
        self.store.set_shape(&changed)?;
        follow(&changed, &dir).await?;
        let live = running.is_some_and(|mode| mode != NetMode::None);
        Ok(Outcome::Net(view(spec, &dir, live, Vec::new())))
    }

    /// Lists what a running vm was refused.
    pub(crate) async fn net_denials(&self, reference: &str) -> anyhow::Result<Outcome> {
        let row = self.row(reference)?;
        let dir = self.paths.vm(row.id.as_str());
        if !vmsock::is_alive(&dir) {
            let text = format!("vm `{}` does not run, and what it was refused is not kept", row.name);
            return Err(WireError::new(ErrorCode::Invalid, text).into());
        }
        Ok(Outcome::Denials(report(&dir).await?.denials))
    }
}

/// Puts a vm's rules in force if it runs with a network, whatever mode it has from its next start on.
///
/// # Errors
/// When they are in force only from then on.
pub(crate) async fn follow(row: &VmRow, dir: &Path) -> anyhow::Result<()> {
    if running_mode(dir).is_none_or(|mode| mode == NetMode::None) {
        return Ok(());
    }
    put_in_force(dir, spec(row)?.net_rules)
        .await
        .with_context(|| format!("vm `{}` has the change from its next start on, and not before", row.name))
}

/// The mode a vm was started with; none when it does not run.
fn running_mode(dir: &Path) -> Option<NetMode> {
    vmsock::is_alive(dir).then(|| vmsock::load_plan(dir)).flatten().map(|plan| plan.net.mode)
}

fn view(spec: VmSpec, dir: &Path, live: bool, open: Vec<OpenName>) -> NetView {
    let next = net_mode(&spec);
    let mode = running_mode(dir).unwrap_or(next);
    NetView { mode, next_mode: (next != mode).then_some(next), rules: spec.net_rules, live, open }
}

fn spec(row: &VmRow) -> anyhow::Result<VmSpec> {
    serde_json::from_str(&row.spec).context("understand the stored request")
}

async fn ask(dir: &Path, request: VmRequest) -> anyhow::Result<VmEvent> {
    let mut connection = vmsock::connect(dir).await?;
    connection.request(request).await?;
    match connection.event().await?.context("the vm has ended")? {
        VmEvent::Refused(error) => Err(error.into()),
        event => Ok(event),
    }
}

async fn report(dir: &Path) -> anyhow::Result<NetReport> {
    match ask(dir, VmRequest::Net).await? {
        VmEvent::Net(report) => Ok(report),
        _ => bail!("the supervisor gave an unexpected answer"),
    }
}

async fn put_in_force(dir: &Path, rules: NetRules) -> anyhow::Result<()> {
    match ask(dir, VmRequest::SetNet(rules)).await? {
        VmEvent::Accepted => Ok(()),
        _ => bail!("the supervisor gave an unexpected answer"),
    }
}

/// Rules with some more. What is allowed is not denied any more, and the other way round.
fn changed(mut rules: NetRules, allow: &[NetTarget], deny: &[NetTarget]) -> Result<NetRules, WireError> {
    for target in allow {
        rules.deny.retain(|known| known != target);
        if !rules.allow.contains(target) {
            rules.allow.push(target.clone());
        }
    }
    for target in deny {
        let before = rules.allow.len();
        rules.allow.retain(|known| known != target);
        if matches!(target.place, Place::Name(_)) && target.port.is_some() {
            // The addresses behind a name are not known, but for those that are open because it is allowed.
            if rules.allow.len() == before {
                let text = format!(
                    "`{target}` can't be denied: a name is denied as a whole, with all names below it"
                );
                return Err(WireError::new(ErrorCode::Invalid, text)
                    .hinted("leave the port away, or deny an address"));
            }
        } else if !rules.deny.contains(target) {
            rules.deny.push(target.clone());
        }
    }
    check(&rules)?;
    Ok(rules)
}

/// Whether rules can be what they say.
pub(crate) fn check(rules: &NetRules) -> Result<(), WireError> {
    if let Some(target) = rules.allow.iter().find(|target| policy::is_never_reached(target)) {
        let text = format!(
            "`{target}` is never reached: it is this host's loopback, link-local, cloud metadata, multicast or reserved"
        );
        return Err(WireError::new(ErrorCode::Invalid, text).hinted(
            "a port of this host can't be opened to a vm; `--net full` reaches what this host reaches",
        ));
    }
    if rules.allow.len().max(rules.deny.len()) > TARGETS_MAX {
        let text = format!("a vm has at most {TARGETS_MAX} network rules of each kind");
        return Err(
            WireError::new(ErrorCode::Invalid, text).hinted("name networks instead of single addresses")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{NetRules, NetTarget, changed};

    fn change(allowed: &str, denied: &str, allow: &str, deny: &str) -> Result<(String, String), String> {
        let targets = |text: &str| -> Vec<NetTarget> {
            text.split_whitespace().map(|target| target.parse().unwrap()).collect()
        };
        let rules = NetRules { allow: targets(allowed), deny: targets(denied) };
        let words =
            |targets: Vec<NetTarget>| targets.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let changed = changed(rules, &targets(allow), &targets(deny)).map_err(|error| error.message)?;
        Ok((words(changed.allow), words(changed.deny)))
    }

    #[test]
    fn the_last_word_counts() {
        let is = |allow: &str, deny: &str| Ok((allow.to_owned(), deny.to_owned()));
        assert_eq!(change("a.example", "", "b.example a.example", ""), is("a.example b.example", ""));
        assert_eq!(change("a.example", "", "", "a.example"), is("", "a.example"));
        assert_eq!(change("", "10.0.0.0/8", "10.0.0.0/8", ""), is("10.0.0.0/8", ""));
        // One with a port goes from what is allowed, and is nothing that can be denied.
        assert_eq!(change("a.example:443", "", "", "a.example:443"), is("", ""));
    }

    #[test]
    fn rules_that_would_do_nothing_are_refused() {
        assert_eq!(
            change("", "", "", "a.example:443").unwrap_err(),
            "`a.example:443` can't be denied: a name is denied as a whole, with all names below it"
        );
        assert_eq!(
            change("", "", "169.254.169.254:80", "").unwrap_err(),
            "`169.254.169.254:80` is never reached: it is this host's loopback, link-local, cloud metadata, multicast or \
             reserved"
        );
        let many: String = (0..=255).map(|number| format!("10.0.0.{number} ")).collect();
        assert!(change(&many, "", "", "").is_ok());
        assert_eq!(
            change(&many, "", "10.0.1.0", "").unwrap_err(),
            "a vm has at most 256 network rules of each kind"
        );
    }
}
