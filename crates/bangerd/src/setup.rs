//! `setup`: fetches what is missing and may be fetched, and names the rest.
//!
//! Nothing here takes root's rights, so the distribution's own programs are only named, with its own command. Each
//! thing is looked after by itself: one that can't be had keeps no other from being fetched. Doing it again does nothing.

use crate::config::Config;
use crate::daemon::Daemon;
use crate::doctor::checks::{self, is_kvm_of_use};
use crate::doctor::facts::Facts;
use crate::doctor::{self, reason};
use crate::programs;
use crate::pull::sink;
use anyhow::Context as _;
use banger_image::firecracker::Release;
use banger_wire::daemon::{Event, Outcome};
use banger_wire::doctor::{SetupItem, SetupState, Verdict};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::mpsc::UnboundedSender;

/// Checks of `doctor` that take root's rights to mend.
const BY_HAND: [&str; 5] = ["namespaces", "qemu", "tap devices", "pasta", "nft"];

/// Looks after everything, or only says what it would do.
pub(crate) async fn run(
    daemon: &Arc<Daemon>,
    dry_run: bool,
    firecracker_url: Option<&str>,
    events: &UnboundedSender<Event>,
) -> anyhow::Result<Outcome> {
    // A config with a mistake is refused before anything is done.
    let config = Config::load()?;
    let facts = doctor::gather(daemon).await?;
    let mut items = by_hand(&facts);
    let is_blocked = items.iter().any(|item| ["namespaces", "qemu"].contains(&item.name.as_str()));
    items.push(firecracker(&config, &facts, dry_run, firecracker_url, events).await);
    let kernel = kernel(daemon, &facts, dry_run, events).await;
    // An image made of packages is finished in a vm.
    let waits_for = match kernel.state {
        SetupState::Failed => Some("the kernel"),
        _ if is_blocked => Some("what is missing above"),
        _ => None,
    };
    items.push(kernel);
    items.push(image(daemon, &facts, dry_run, waits_for, events).await);
    Ok(Outcome::Setup(items))
}

fn item(name: &str, state: SetupState, detail: impl Into<String>) -> SetupItem {
    SetupItem { name: name.to_owned(), state, detail: detail.into(), hint: None }
}

/// What the distribution has to provide and does not.
fn by_hand(facts: &Facts) -> Vec<SetupItem> {
    let judged = checks::ALL.iter().map(|judge| judge(facts));
    let missing = judged.filter(|check| {
        check.verdict != Verdict::Pass && check.hint.is_some() && BY_HAND.contains(&check.name.as_str())
    });
    missing
        .map(|check| SetupItem {
            name: check.name,
            state: SetupState::ByHand,
            detail: check.detail,
            hint: check.hint,
        })
        .collect()
}

async fn firecracker(
    config: &Config,
    facts: &Facts,
    dry_run: bool,
    url: Option<&str>,
    events: &UnboundedSender<Event>,
) -> SetupItem {
    let name = "firecracker";
    if let Some(path) = &config.firecracker_bin {
        let detail = format!("the config names `{}`", path.display());
        return item(name, SetupState::Present, detail);
    }
    let wanted = &config.firecracker;
    let release = Release::new(
        wanted.version.as_deref(),
        &facts.arch,
        wanted.sha256.as_deref(),
        url.or(wanted.url.as_deref()),
    );
    let release = match release {
        Ok(release) => release,
        Err(error) => {
            let hint = "set `version` and `sha256` under `[firecracker]` in the config";
            return SetupItem {
                hint: Some(hint.to_owned()),
                ..item(name, SetupState::Failed, reason(&error.into()))
            };
        }
    };
    let version = release.version();
    if let Ok(program) = &facts.firecracker
        && program.version.as_deref() == Some(version)
    {
        return item(name, SetupState::Present, format!("{version}, `{}`", program.path.display()));
    }
    if url.is_none() && !is_kvm_of_use(&facts.kvm) {
        return item(name, SetupState::NotNeeded, "this machine has no KVM it could use");
    }
    if dry_run {
        return item(name, SetupState::WouldFetch, format!("{version} from `{}`", release.url()));
    }
    let installed = async {
        let dir = programs::installed().context("neither `XDG_DATA_HOME` nor `HOME` is set")?;
        release.install(&dir, &sink(events)).await?;
        anyhow::Ok::<PathBuf>(dir.join(name))
    };
    match installed.await {
        Ok(path) => item(name, SetupState::Fetched, format!("{version}, `{}`", path.display())),
        Err(error) => {
            let hint = "try again, or name a mirror with `banger setup --firecracker-url URL`";
            SetupItem { hint: Some(hint.to_owned()), ..item(name, SetupState::Failed, reason(&error)) }
        }
    }
}

async fn kernel(
    daemon: &Arc<Daemon>,
    facts: &Facts,
    dry_run: bool,
    events: &UnboundedSender<Event>,
) -> SetupItem {
    let name = &facts.default_kernel;
    let text = format!("`{name}`");
    if facts.kernels.contains(name) {
        return item("kernel", SetupState::Present, text);
    }
    if dry_run {
        return item("kernel", SetupState::WouldFetch, text);
    }
    match daemon.ensure_kernel(name, events).await {
        Ok(_) => item("kernel", SetupState::Fetched, text),
        Err(error) => failed("kernel", &error, &format!("banger kernel pull {name}")),
    }
}

async fn image(
    daemon: &Arc<Daemon>,
    facts: &Facts,
    dry_run: bool,
    waits_for: Option<&str>,
    events: &UnboundedSender<Event>,
) -> SetupItem {
    let name = &facts.default_image;
    let text = format!("`{name}`");
    match (daemon.find_image(name), waits_for) {
        (Ok(Some(_)), _) => return item("image", SetupState::Present, text),
        (Err(error), _) => return failed("image", &error, "banger daemon logs"),
        _ if dry_run => return item("image", SetupState::WouldFetch, text),
        (_, Some(what)) => {
            let detail = format!("{text} needs {what} first");
            return SetupItem {
                hint: Some("mend that, then run `banger setup` again".to_owned()),
                ..item("image", SetupState::Failed, detail)
            };
        }
        _ => {}
    }
    let pulled = async {
        let kernel = daemon.ensure_kernel(&facts.default_kernel, events).await?;
        daemon.ensure_image(name, &kernel, events).await
    };
    match pulled.await {
        Ok(_) => item("image", SetupState::Fetched, text),
        Err(error) => failed("image", &error, &format!("banger image pull {name}")),
    }
}

/// A thing that could not be fetched, with its own advice where it has any.
fn failed(name: &str, error: &anyhow::Error, command: &str) -> SetupItem {
    let hint = crate::serve::wire_error(error).hint.unwrap_or_else(|| command.to_owned());
    SetupItem { hint: Some(hint), ..item(name, SetupState::Failed, reason(error)) }
}
