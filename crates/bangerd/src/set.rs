//! Changing a vm that is there: what it has from its next start on.

use crate::daemon::{Daemon, check_disk, check_size, net_mode};
use crate::plan::DISK_FILE;
use crate::state::{self, Wish};
use crate::store::VmRow;
use crate::vmsock;
use anyhow::Context as _;
use banger_wire::daemon::{NetMode, Outcome, VmSpec};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::size::Mebibytes;
use rustix::fs::OFlags;
use std::path::Path;

/// What is to be different; the rest stays.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Change {
    pub(crate) vcpu: Option<u32>,
    pub(crate) memory: Option<Mebibytes>,
    pub(crate) disk_size: Option<Mebibytes>,
    pub(crate) net: Option<NetMode>,
}

impl Daemon {
    /// Changes what a vm has from its next start on.
    pub(crate) async fn set(&self, reference: &str, change: Change) -> anyhow::Result<Outcome> {
        let _alone = self.alone(&self.row(reference)?).await;
        let row = self.row(reference)?;
        let dir = self.paths.vm(row.id.as_str());
        if !state::allows(Wish::Change, row.state, vmsock::is_alive(&dir)) {
            let text =
                format!("vm `{}` is running, and has what it was started with until it stops", row.name);
            return Err(WireError::new(ErrorCode::Invalid, text)
                .hinted(format!("stop it with `banger vm stop {}` first", row.name))
                .into());
        }
        let changed = changed(&row, change)?;
        if changed.disk_size > row.disk_size {
            // CRASH: a disk longer than its row says. The vm's next start makes use of all of it, and the same request
            // writes the size down.
            grow(&dir, changed.disk_size).context("make the vm's disk larger")?;
        }
        self.store.set_shape(&changed)?;
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
    if let Some(net) = change.net {
        let mut spec: VmSpec = serde_json::from_str(&row.spec).context("understand the stored request")?;
        if net != net_mode(&spec) {
            spec.net = Some(net);
            changed.spec = serde_json::to_string(&spec)?;
        }
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

    const NOTHING: Change = Change { vcpu: None, memory: None, disk_size: None, net: None };

    #[test]
    fn what_is_not_named_stays() {
        let got = changed(&row(), NOTHING).unwrap();
        assert_eq!((got.vcpu, got.memory, got.disk_size), (1, Mebibytes(256), Mebibytes(8192)));
        assert_eq!(got.spec, row().spec);
        let net = Change { net: Some(NetMode::None), vcpu: Some(2), ..NOTHING };
        let got = changed(&row(), net).unwrap();
        let spec: VmSpec = serde_json::from_str(&got.spec).unwrap();
        assert_eq!((got.vcpu, spec.net), (2, Some(NetMode::None)));
    }

    #[test]
    fn a_disk_only_grows() {
        let to = |mib| changed(&row(), Change { disk_size: Some(Mebibytes(mib)), ..NOTHING });
        assert_eq!(to(16_384).unwrap().disk_size, Mebibytes(16_384));
        assert_eq!(to(8192).unwrap().disk_size, Mebibytes(8192));
        assert_eq!(
            to(4096).unwrap_err().to_string(),
            "the disk of vm `web` is 8 GiB and can't become smaller: its filesystem only grows"
        );
        assert!(to(1 << 40).unwrap_err().to_string().starts_with("a disk of "));
    }
}
