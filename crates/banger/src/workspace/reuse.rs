//! `vm run PATH --reuse`: back into the vm that has the checkout.

use super::command::{Asked, collected, count, look, make, place};
use super::git::Git;
use super::tree::path_of;
use crate::context::{Context, expect_outcome};
use crate::stop::{Stop, failed, invalid};
use crate::text::escape;
use crate::transfer::on_thread;
use banger_wire::bytes::ByteString;
use banger_wire::daemon::{Request, VmState, VmView};
use std::path::{Path, PathBuf};

/// Finds the vm that has the checkout which contains `path`: one that runs before one that doesn't, the one it was placed
/// in last before others.
///
/// # Errors
/// When there is no such directory, and those of asking.
pub(crate) async fn find(context: &mut Context, path: &Path) -> Result<Option<VmView>, Stop> {
    let path = path.to_owned();
    let top = context.signals.unless(on_thread(move || top(&path))).await?;
    let outcome = context.ask(Request::VmList).await?;
    Ok(choose(expect_outcome!(outcome, Vms)?, &top))
}

fn top(path: &Path) -> Result<PathBuf, banger_wire::error::WireError> {
    let shown = escape(&path.display().to_string());
    let full = path.canonicalize().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => invalid(format!("there is no directory `{shown}`")),
        _ => failed(format!("could not find `{shown}`"), &error),
    })?;
    let top = Git::at(&full).line(&["rev-parse", "--show-toplevel"])?;
    Ok(top.map_or(full, PathBuf::from))
}

fn choose(vms: Vec<VmView>, top: &Path) -> Option<VmView> {
    // One with `--rm` goes with the command it was made for, and one that failed is kept to be looked at.
    let is_fit = |vm: &VmView| !vm.rm && !matches!(vm.state, VmState::Error | VmState::Stopping);
    let placed =
        |vm: &VmView| vm.workspace.as_ref().filter(|of| path_of(&of.source) == top).map(|of| of.placed);
    let runs = |vm: &VmView| matches!(vm.state, VmState::Running | VmState::Starting);
    let fit = vms.into_iter().filter(is_fit).filter_map(|vm| Some((runs(&vm), placed(&vm)?, vm)));
    fit.max_by_key(|(runs, placed, _)| (*runs, *placed)).map(|(_, _, vm)| vm)
}

/// Brings a running vm's copy of the checkout up to date, unless it was changed there. Returns the directory in the guest
/// that corresponds to the one that was named.
///
/// # Errors
/// When the checkout can't travel, and those of placing.
pub(crate) async fn rejoin(
    context: &mut Context,
    vm: &VmView,
    asked: Asked,
    flags_given: bool,
) -> Result<Option<ByteString>, Stop> {
    let Some(before) = &vm.workspace else { return Ok(None) };
    // What was said then counts until something else is said.
    let asked = if flags_given { asked } else { asked.like(before) };
    let is_same_place = path_of(&before.path) == asked.guest_path;
    let Some(survey) = look(context, Some(&asked)).await? else { return Ok(None) };
    let below = asked.guest_path.join(&survey.below);
    let mut kept = None;
    if is_same_place {
        let changes = collected(context, vm).await?;
        if changes.len() > 0 {
            context.ui.warning(&format!(
                "what was changed in vm `{name}` stays ({}), so its copy of the checkout is not brought up to date; \
                 take it with `banger vm workspace export {name} --output FILE`, or drop it with \
                 `banger vm workspace prepare --force {name}`",
                count(changes.len(), "change"),
                name = vm.name
            ));
            return Ok(Some(ByteString::from(below.into_os_string())));
        }
        kept = Some(changes.kept());
    }
    match make(context, Some(&asked), Some(survey))? {
        Some(making) => place(context, vm, &asked, making, kept).await.map(Some),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::choose;
    use banger_wire::daemon::VmView;
    use std::path::Path;

    fn vm(name: &str, state: &str, source: Option<&str>, placed: i64) -> VmView {
        let workspace = source.map(|source| {
            serde_json::json!({
                "source": banger_wire::bytes::ByteString::from(source), "mode": "shallow_overlay", "placed": placed,
                "path": banger_wire::bytes::ByteString::from("/root/repo"), "head": null,
                "asked": banger_wire::daemon::WorkspaceAsked::default()
            })
        });
        serde_json::from_value(serde_json::json!({
            "id": "0123456789ab", "name": name, "state": state, "image": "i", "kernel": "k", "vcpu": 1,
            "memory": 1, "disk_size": 1, "disk_used_bytes": 0, "net": "none", "vmm": "qemu", "emulated": true,
            "created": 0, "rm": name == "goes", "dir": "/", "socket": "/s", "watchdog_restarts": 0,
            "workspace": workspace
        }))
        .unwrap()
    }

    #[test]
    fn the_vm_of_the_checkout_is_found() {
        let found = |vms: &[VmView]| choose(vms.to_vec(), Path::new("/repo")).map(|vm| vm.name.to_string());
        let other = vm("other", "running", Some("/repo2"), 9);
        let none = vm("none", "running", None, 0);
        assert_eq!(found(&[other.clone(), none.clone()]), None);
        let old = vm("old", "stopped", Some("/repo"), 1);
        let new = vm("new", "stopped", Some("/repo"), 2);
        assert_eq!(found(&[old.clone(), other, new.clone(), none]).as_deref(), Some("new"));
        let runs = vm("runs", "running", Some("/repo"), 0);
        assert_eq!(found(&[old, runs, new]).as_deref(), Some("runs"));
        let unfit = [vm("goes", "running", Some("/repo"), 1), vm("broken", "error", Some("/repo"), 1)];
        assert_eq!(found(&unfit), None);
    }
}
