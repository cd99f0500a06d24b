//! Changing a vm that is there: what it has from its next start on.

use crate::daemon::{Daemon, check_disk, check_size, net_mode};
use crate::outbound;
use crate::plan::DISK_FILE;
use crate::state::{self, Wish};
use crate::store::VmRow;
use crate::vmsock;
use anyhow::Context as _;
use banger_wire::daemon::{NetMode, Outcome, VmSpec};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::net::{NetTarget, NetworkChoice};
use banger_wire::size::Mebibytes;
use rustix::fs::OFlags;
use std::path::Path;

/// What is to be different; the rest stays.
#[derive(Debug, Clone, Default)]
pub(crate) struct Change {
    pub(crate) vcpu: Option<u32>,
    pub(crate) memory: Option<Mebibytes>,
    pub(crate) disk_size: Option<Mebibytes>,
    pub(crate) net: Option<NetMode>,
    /// All that is allowed, instead of what was.
    pub(crate) net_allow: Option<Vec<NetTarget>>,
    /// The network of vms.
    pub(crate) network: Option<NetworkChoice>,
}

impl Change {
    /// The networks alone can be changed of a vm that runs.
    fn is_of_the_network(&self) -> bool {
        self.vcpu.is_none() && self.memory.is_none() && self.disk_size.is_none()
    }

    /// Whether what the vm reaches outside is another.
    fn is_of_the_way_out(&self) -> bool {
        self.net.is_some() || self.net_allow.is_some()
    }
}

impl Daemon {
    /// Changes what a vm has from its next start on, and what it reaches outside now.
    pub(crate) async fn set(&self, reference: &str, change: Change) -> anyhow::Result<Outcome> {
        let _alone = self.alone(&self.row(reference)?).await;
        let row = self.row(reference)?;
        let dir = self.paths.vm(row.id.as_str());
        let alive = vmsock::is_alive(&dir);
        let is_live = alive && change.is_of_the_network();
        if !is_live && !state::allows(Wish::Change, row.state, alive) {
            let text =
                format!("vm `{}` is running, and has what it was started with until it stops", row.name);
            return Err(WireError::new(ErrorCode::Invalid, text)
                .hinted(format!("stop it with `banger vm stop {}` first", row.name))
                .into());
        }
        if let Some(NetworkChoice::Named(network)) = &change.network {
            self.check_room(&row, network)?;
        }
        let (is_of_the_way_out, moves) = (change.is_of_the_way_out(), change.network.is_some());
        let changed = changed(&row, change)?;
        if changed.disk_size > row.disk_size {
            // CRASH: a disk longer than its row says. The vm's next start makes use of all of it, and the same request
            // writes the size down.
            grow(&dir, changed.disk_size).context("make the vm's disk larger")?;
        }
        // CRASH: rules that are not in force. The vm's next start, or the same request, puts them there.
        self.store.set_shape(&changed)?;
        if alive && is_of_the_way_out {
            outbound::follow(&changed, &dir).await?;
        }
        if !alive && moves {
            // CRASH: a place in the network that it is to leave. The vm's next start, or the same request, takes it there.
            self.join(&changed)?;
        }
        Ok(Outcome::Vm(self.view(&self.row(row.id.as_str())?)))
    }
}

/// The row as it is to be, unless it can't be.
fn changed(row: &VmRow, change: Change) -> anyhow::Result<VmRow> {
    let mut changed = VmRow {
        vcpu: change.vcpu.unwrap_or(row.vcpu),
        memory: change.memory.unwrap_or(row.memory),
        disk_size: change.disk_size.unwrap_or(row.disk_size),
        ..row.clone()
    };
    // What stays was fine when it was made, perhaps on a larger machine.
    if change.vcpu.is_some() || change.memory.is_some() {
        check_size(changed.vcpu, changed.memory)?;
    }
    if changed.disk_size < row.disk_size {
        let text = format!(
            "the disk of vm `{}` is {} and can't become smaller: its filesystem only grows",
            row.name, row.disk_size
        );
        return Err(WireError::new(ErrorCode::Invalid, text)
            .hinted("make a new vm with `--disk-size`, and copy what you need")
            .into());
    }
    if let Some(size) = change.disk_size {
        check_disk(size)?;
    }
    if change.is_of_the_way_out() || change.network.is_some() {
        let mut spec: VmSpec = serde_json::from_str(&row.spec).context("understand the stored request")?;
        if let Some(net) = change.net.filter(|net| *net != net_mode(&spec)) {
            spec.net = Some(net);
        }
        if let Some(allow) = change.net_allow {
            // The last word about a target counts.
            spec.net_rules.deny.retain(|target| !allow.contains(target));
            spec.net_rules.allow = allow;
            outbound::check(&spec.net_rules)?;
        }
        if let Some(network) = change.network {
            spec.network = network.name();
        }
        changed.spec = serde_json::to_string(&spec)?;
    }
    Ok(changed)
}

/// Makes the disk longer, by a hole. Its filesystem is the guest's, which makes it as large at its next start.
fn grow(dir: &Path, size: Mebibytes) -> std::io::Result<()> {
    let disk = vmsock::open_file(dir, DISK_FILE, OFlags::WRONLY)?;
    let len = banger_image::ext4::disk_len(size.bytes());
    if disk.metadata()?.len() < len {
        disk.set_len(len)?;
        disk.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Change, changed};
    use crate::programs::Vmm;
    use crate::store::VmRow;
    use banger_wire::daemon::{NetMode, VmSpec, VmState};
    use banger_wire::net::{NetRules, NetTarget};
    use banger_wire::size::Mebibytes;

    fn row() -> VmRow {
        VmRow {
            id: "0123456789ab".parse().unwrap(),
            name: "web".parse().unwrap(),
            state: VmState::Stopped,
            error: None,
            image: "image".to_owned(),
            kernel: "kernel".to_owned(),
            vcpu: 1,
            memory: Mebibytes(256),
            disk_size: Mebibytes(8192),
            created: 0,
            rm: false,
            run_as: None,
            spec: serde_json::to_string(&VmSpec::default()).unwrap(),
            vmm: Vmm::Qemu,
            kvm: false,
        }
    }

    #[test]
    fn what_is_not_named_stays() {
        let got = changed(&row(), Change::default()).unwrap();
        assert_eq!((got.vcpu, got.memory, got.disk_size), (1, Mebibytes(256), Mebibytes(8192)));
        assert_eq!(got.spec, row().spec);
        let net = Change { net: Some(NetMode::None), vcpu: Some(2), ..Change::default() };
        let got = changed(&row(), net).unwrap();
        let spec: VmSpec = serde_json::from_str(&got.spec).unwrap();
        assert_eq!((got.vcpu, spec.net), (2, Some(NetMode::None)));
    }

    #[test]
    fn what_is_allowed_is_replaced_and_what_is_denied_stays() {
        let targets = |text: &str| -> Vec<NetTarget> {
            text.split_whitespace().map(|target| target.parse().unwrap()).collect()
        };
        let mut row = row();
        let rules = NetRules { allow: targets("a.example"), deny: targets("b.example 10.0.0.0/8") };
        row.spec = serde_json::to_string(&VmSpec { net_rules: rules, ..VmSpec::default() }).unwrap();
        let rules = |net, allow: Option<&str>| {
            let change = Change { net, net_allow: allow.map(targets), ..Change::default() };
            let spec: VmSpec = serde_json::from_str(&changed(&row, change).unwrap().spec).unwrap();
            let words =
                |targets: &[NetTarget]| targets.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
            (spec.net, words(&spec.net_rules.allow), words(&spec.net_rules.deny))
        };
        let is = |net, allow: &str, deny: &str| (net, allow.to_owned(), deny.to_owned());
        let (allow, full) = (Some(NetMode::Allow), Some(NetMode::Full));
        assert_eq!(rules(full, None), is(full, "a.example", "b.example 10.0.0.0/8"));
        assert_eq!(rules(allow, Some("b.example c.example")), is(allow, "b.example c.example", "10.0.0.0/8"));
        assert_eq!(rules(allow, Some("")), is(allow, "", "b.example 10.0.0.0/8"));
        let never = Change { net: allow, net_allow: Some(targets("169.254.169.254")), ..Change::default() };
        let error = changed(&row, never).unwrap_err().to_string();
        assert!(error.starts_with("`169.254.169.254` is never reached"), "{error}");
    }

    #[test]
    fn a_network_of_vms_is_another_or_none() {
        let network = |row: &VmRow, network: Option<&str>| {
            let network = network.map(|text| text.parse().unwrap());
            let got = changed(row, Change { network, ..Change::default() }).unwrap();
            let name = serde_json::from_str::<VmSpec>(&got.spec).unwrap().network;
            (got, name.map(|name| name.to_string()))
        };
        let (in_one, name) = network(&row(), Some("shop"));
        assert_eq!(name.as_deref(), Some("shop"));
        assert_eq!(network(&in_one, Some("lab")).1.as_deref(), Some("lab"));
        assert_eq!(network(&in_one, None).1.as_deref(), Some("shop"));
        assert_eq!(network(&in_one, Some("none")).1, None);
    }

    #[test]
    fn a_disk_only_grows() {
        let to = |mib| changed(&row(), Change { disk_size: Some(Mebibytes(mib)), ..Change::default() });
        assert_eq!(to(16_384).unwrap().disk_size, Mebibytes(16_384));
        assert_eq!(to(8192).unwrap().disk_size, Mebibytes(8192));
        assert_eq!(
            to(4096).unwrap_err().to_string(),
            "the disk of vm `web` is 8 GiB and can't become smaller: its filesystem only grows"
        );
        assert!(to(1 << 40).unwrap_err().to_string().starts_with("a disk of "));
    }
}
