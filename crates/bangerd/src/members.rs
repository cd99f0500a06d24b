//! The networks that vms reach each other in: who is in them, and where members find each other.
//!
//! A vm has its place in a network from its creation to its removal, in the store, and as long a directory of its number
//! and a link of its name, which its peers' supervisors read (`supervise/net/member.rs`). The daemon is not needed in
//! between. One that is to be in another network (`set.rs`) has its place there at once, or at its next start where it runs:
//! what the store has is what it was started with.

use crate::daemon::Daemon;
use crate::net::member::{MEMBERS_MAX, MemberPlan, NAME_END, address};
use crate::store::VmRow;
use anyhow::Context as _;
use banger_wire::daemon::VmSpec;
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::names::NetworkName;
use banger_wire::net::{MemberView, NetworkChoice};
use banger_wire::vm::VmStatus;
use std::collections::HashSet;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

/// How often what is needed is made again when the last member left at that moment, and took the directory along.
const TRIES_MAX: u32 = 3;

impl Daemon {
    /// Gives a vm its place in the network it is to be in, where it has none, and takes it out of any other. None is in no
    /// network. The vm must not run, unless it is in that network.
    pub(crate) fn join(&self, row: &VmRow) -> anyhow::Result<Option<MemberPlan>> {
        let next = network(row);
        if let Some((former, _)) = self.store.member(&row.id)?
            && Some(&former) != next.as_ref()
        {
            if let Some(network) = &next {
                self.check_room(row, network)?;
            }
            // CRASH: a number without a place. Nobody else gets it, and the vm's next start comes by here again.
            self.leave(row)?;
        }
        let Some(network) = next else {
            self.store.part(&row.id)?;
            return Ok(None);
        };
        let Some(number) = self.store.join(&row.id, &network)? else {
            return Err(full(&network).into());
        };
        let dir = self.paths.networks().join(network.as_str());
        // CRASH: a vm has a place that it does not use yet. It goes with the vm; without one, at the next start.
        let mut made = make_place(&dir, row, number);
        for _ in 1..TRIES_MAX {
            if made.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
                made = make_place(&dir, row, number);
            }
        }
        made.with_context(|| format!("make the place of vm `{}` in network `{network}`", row.name))?;
        Ok(Some(MemberPlan { network, number, dir }))
    }

    /// Whether a network has a place for a vm, or has given it one.
    pub(crate) fn check_room(&self, row: &VmRow, network: &NetworkName) -> anyhow::Result<()> {
        let is_in = self.store.member(&row.id)?.is_some_and(|(of, _)| of == *network);
        if !is_in && self.store.members_of(network)? >= MEMBERS_MAX {
            return Err(full(network).into());
        }
        Ok(())
    }

    /// Takes a vm that is about to go, or to be elsewhere, out of its network. Its number is not free yet.
    pub(crate) fn leave(&self, row: &VmRow) -> anyhow::Result<()> {
        let Some((network, number)) = self.store.member(&row.id)? else {
            return Ok(());
        };
        let dir = self.paths.networks().join(network.as_str());
        remove_place(&dir, row, number)
            .with_context(|| format!("take vm `{}` out of network `{network}`", row.name))
    }

    /// What is said of a vm's place in its network, if it has one, and of the one that it is in from its next start on, if
    /// that is another. `next` is what it is to be in.
    pub(crate) fn member_view(
        &self,
        row: &VmRow,
        next: Option<NetworkName>,
        status: Option<&VmStatus>,
    ) -> (Option<MemberView>, Option<NetworkChoice>) {
        let member = self.store.member(&row.id).ok().flatten();
        let now = member.as_ref().map(|(name, _)| name.clone());
        let view = member.map(|(name, number)| {
            let warning = status.and_then(|status| status.member_warning.clone());
            MemberView { name, address: Some(address(number)), warning }
        });
        (view, (next != now).then(|| next.into()))
    }
}

fn full(network: &NetworkName) -> WireError {
    let text = format!("network `{network}` is full: it has {MEMBERS_MAX} vms");
    WireError::new(ErrorCode::Invalid, text).hinted("delete vms that are not needed with `banger vm prune`")
}

/// What is in the networks' directories of vms that are not in them.
pub(crate) fn unknown(daemon: &Daemon) -> anyhow::Result<Vec<PathBuf>> {
    let top = daemon.paths.networks();
    let mut there = Vec::new();
    for network in std::fs::read_dir(&top)? {
        let network = network?.path();
        there.extend(std::fs::read_dir(&network).into_iter().flatten().flatten().map(|entry| entry.path()));
        there.push(network);
    }
    // After the directories: who joins meanwhile has its row first.
    let mut known = HashSet::new();
    for (network, number, name) in daemon.store.members()? {
        let dir = top.join(network);
        known.extend([dir.join(number.to_string()), dir.join(format!("{name}{NAME_END}"))]);
        known.insert(dir);
    }
    there.retain(|path| !known.contains(path));
    Ok(there)
}

fn network(row: &VmRow) -> Option<NetworkName> {
    serde_json::from_str::<VmSpec>(&row.spec).ok()?.network
}

/// Makes what is not there yet.
fn make_place(dir: &Path, row: &VmRow, number: u16) -> io::Result<()> {
    let own = dir.join(number.to_string());
    // Where each vm has a user of its own, that one makes its socket, and the others find it. Nobody else comes so far.
    let mode = if row.run_as.is_some() { 0o711 } else { 0o700 };
    std::fs::DirBuilder::new().recursive(true).mode(mode).create(&own)?;
    if let Some(user) = row.run_as {
        for dir in [dir, &own] {
            std::fs::set_permissions(dir, PermissionsExt::from_mode(mode))?;
        }
        chown(&own, Some(user), Some(user))?;
    }
    let (link, number) = (dir.join(format!("{}{NAME_END}", row.name)), number.to_string());
    if std::fs::read_link(&link).is_ok_and(|to| to == Path::new(&number)) {
        return Ok(());
    }
    gone(std::fs::remove_file(&link))?;
    symlink(number, link)
}

/// Removes what is there of it, and the network with its last member.
fn remove_place(dir: &Path, row: &VmRow, number: u16) -> io::Result<()> {
    gone(std::fs::remove_file(dir.join(format!("{}{NAME_END}", row.name))))?;
    gone(std::fs::remove_dir_all(dir.join(number.to_string())))?;
    match std::fs::remove_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        removed => gone(removed),
    }
}

/// It is as well that something is not there any more.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::{network, unknown};
    use crate::daemon::Daemon;
    use crate::net::member::{MEMBERS_MAX, MemberPlan};
    use crate::paths::Paths;
    use crate::programs::Vmm;
    use crate::store::{KernelRow, VmRow};
    use banger_image::oci::ImageConfig;
    use banger_wire::daemon::{VmSpec, VmState};
    use banger_wire::names::VmId;
    use banger_wire::size::Mebibytes;
    use std::path::Path;
    use std::sync::Arc;

    fn daemon(dir: &Path) -> Arc<Daemon> {
        let paths = Paths { state: dir.join("state"), cache: dir.join("cache") };
        std::fs::create_dir_all(paths.networks()).unwrap();
        let daemon = Daemon::open(paths).unwrap();
        let text = String::new;
        let kernel =
            KernelRow { name: "k".into(), release: text(), version: text(), arch: text(), created: 0 };
        daemon.store.insert_kernel(&kernel).unwrap();
        let image = crate::store::ImageRow {
            name: "i".into(),
            source: text(),
            digest: text(),
            arch: text(),
            created: 0,
            size_bytes: 0,
            init: None,
            config: ImageConfig::default(),
            kernel: None,
            sha256: text(),
            filesystem: "ext4".into(),
            blobs: Vec::new(),
            initrd: false,
        };
        daemon.store.insert_image(&image).unwrap();
        daemon
    }

    fn vm(daemon: &Daemon, number: u64, name: &str, network: Option<&str>) -> VmRow {
        let spec = VmSpec { network: network.map(|name| name.parse().unwrap()), ..VmSpec::default() };
        let mut row = VmRow {
            id: VmId::from_bits(number),
            name: name.parse().unwrap(),
            state: VmState::Created,
            error: None,
            image: "i".into(),
            kernel: "k".into(),
            vcpu: 1,
            memory: Mebibytes(256),
            disk_size: Mebibytes(256),
            created: 0,
            rm: false,
            run_as: None,
            spec: serde_json::to_string(&spec).unwrap(),
            vmm: Vmm::Qemu,
            kvm: false,
        };
        assert!(daemon.store.insert_vm(&mut row, false).unwrap());
        row
    }

    fn there(daemon: &Daemon) -> Vec<String> {
        let mut found = Vec::new();
        for network in std::fs::read_dir(daemon.paths.networks()).unwrap() {
            let network = network.unwrap();
            for entry in std::fs::read_dir(network.path()).unwrap() {
                let name = |entry: &std::fs::DirEntry| entry.file_name().into_string().unwrap();
                found.push(format!("{}/{}", name(&network), name(&entry.unwrap())));
            }
        }
        found.sort();
        found
    }

    #[test]
    fn each_vm_has_a_number_of_its_own_for_as_long_as_it_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let daemon = daemon(dir.path());
        let vms: Vec<VmRow> = ["a", "b", "c"]
            .iter()
            .zip(1..)
            .map(|(name, number)| vm(&daemon, number, name, Some("x")))
            .collect();
        let other = vm(&daemon, 4, "d", Some("y"));
        let none = vm(&daemon, 5, "e", None);
        let number = |row: &VmRow| daemon.join(row).unwrap().map(|plan: MemberPlan| plan.number);
        assert_eq!(vms.iter().map(number).collect::<Vec<_>>(), [Some(1), Some(2), Some(3)]);
        assert_eq!((number(&other), number(&none)), (Some(1), None));
        assert_eq!(number(&vms[1]), Some(2), "again");
        assert_eq!(there(&daemon), ["x/1", "x/2", "x/3", "x/a.vm", "x/b.vm", "x/c.vm", "y/1", "y/d.vm"]);
        assert_eq!(
            daemon.member_view(&vms[1], network(&vms[1]), None).0.unwrap().address,
            Some([10, 231, 128, 2].into())
        );
        assert_eq!(daemon.member_view(&none, network(&none), None), (None, None));
        for gone in [&vms[1], &other, &none] {
            daemon.leave(gone).unwrap();
            daemon.leave(gone).unwrap();
            daemon.store.delete_vm(&gone.id).unwrap();
        }
        assert_eq!(there(&daemon), ["x/1", "x/3", "x/a.vm", "x/c.vm"]);
        assert!(!daemon.paths.networks().join("y").exists());
        // What is free is given to the next.
        assert_eq!(number(&vm(&daemon, 6, "f", Some("x"))), Some(2));
        assert_eq!(number(&vm(&daemon, 7, "g", Some("x"))), Some(4));
    }

    /// The same vm, which is to be in another network, or none.
    fn moved(row: &VmRow, network: Option<&str>) -> VmRow {
        let spec = VmSpec { network: network.map(|name| name.parse().unwrap()), ..VmSpec::default() };
        VmRow { spec: serde_json::to_string(&spec).unwrap(), ..row.clone() }
    }

    #[test]
    fn who_goes_elsewhere_leaves_its_number_and_is_in_one_network_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let daemon = daemon(dir.path());
        let number = |row: &VmRow| daemon.join(row).unwrap().map(|plan: MemberPlan| plan.number);
        let (a, b) = (vm(&daemon, 1, "a", Some("x")), vm(&daemon, 2, "b", Some("x")));
        let c = vm(&daemon, 3, "c", Some("y"));
        assert_eq!([&a, &b, &c].map(number), [Some(1), Some(2), Some(1)]);
        // Nothing has happened yet, and so much is said.
        let elsewhere = moved(&a, Some("y"));
        let (now, next) = daemon.member_view(&elsewhere, network(&elsewhere), None);
        let (now, next) = (now.unwrap(), next.map(|next| next.to_string()));
        assert_eq!((now.name.as_str(), next.as_deref()), ("x", Some("y")));
        assert_eq!(number(&elsewhere), Some(2));
        assert_eq!(daemon.member_view(&elsewhere, network(&elsewhere), None).1, None);
        assert_eq!(there(&daemon), ["x/2", "x/b.vm", "y/1", "y/2", "y/a.vm", "y/c.vm"]);
        // What it left is given to the next, and it has not gone along with it.
        assert_eq!(number(&vm(&daemon, 4, "d", Some("x"))), Some(1));
        let nowhere = moved(&a, None);
        let next = daemon.member_view(&nowhere, network(&nowhere), None).1;
        assert_eq!(next.map(|next| next.to_string()).as_deref(), Some("none"));
        assert_eq!((number(&nowhere), number(&nowhere)), (None, None));
        assert_eq!(there(&daemon), ["x/1", "x/2", "x/b.vm", "x/d.vm", "y/1", "y/c.vm"]);
        assert_eq!(number(&vm(&daemon, 5, "e", Some("y"))), Some(2));
        // Killed between its place and its number: the next try goes on, and nothing is unknown in between.
        daemon.leave(&b).unwrap();
        assert!(unknown(&daemon).unwrap().is_empty());
        assert_eq!(number(&moved(&b, Some("y"))), Some(3));
        // The last one takes its network along.
        daemon.leave(&vm(&daemon, 6, "none", None)).unwrap();
        assert!(unknown(&daemon).unwrap().is_empty());
    }

    #[test]
    fn a_full_network_takes_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let daemon = daemon(dir.path());
        let last = vm(&daemon, 1, "last", Some("x"));
        let late = vm(&daemon, 2, "late", Some("x"));
        // One row after the other would take a minute.
        let path = daemon.paths.state.join("banger.db");
        let connection = rusqlite::Connection::open(path).unwrap();
        let fill = format!(
            "PRAGMA foreign_keys = OFF; WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {})
             INSERT INTO member SELECT 'vm' || i, 'x', i FROM n",
            MEMBERS_MAX - 1
        );
        connection.execute_batch(&fill).unwrap();
        assert_eq!(daemon.join(&last).unwrap().unwrap().number, MEMBERS_MAX);
        let error = daemon.join(&late).unwrap_err();
        // Neither does one that comes from elsewhere, which stays where it was.
        let other = vm(&daemon, 3, "other", Some("y"));
        assert_eq!(daemon.join(&other).unwrap().unwrap().number, 1);
        assert!(daemon.join(&moved(&other, Some("x"))).is_err());
        assert_eq!(daemon.join(&other).unwrap().unwrap().number, 1);
        assert!(there(&daemon).contains(&"y/other.vm".to_owned()));
        let error = error.downcast_ref::<banger_wire::error::WireError>().unwrap();
        insta::assert_snapshot!(
            format!("{error}\n{}", error.hint.clone().unwrap_or_default()),
            @r"
        network `x` is full: it has 32766 vms
        delete vms that are not needed with `banger vm prune`
        "
        );
    }

    #[test]
    fn what_a_crash_left_in_networks_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let daemon = daemon(dir.path());
        let row = vm(&daemon, 1, "a", Some("x"));
        daemon.join(&row).unwrap();
        assert!(unknown(&daemon).unwrap().is_empty());
        let top = daemon.paths.networks();
        for left in ["x/7", "gone/1"] {
            std::fs::create_dir_all(top.join(left)).unwrap();
        }
        std::os::unix::fs::symlink("7", top.join("x/b.vm")).unwrap();
        let mut found = unknown(&daemon).unwrap();
        found.sort();
        assert_eq!(found, ["gone", "gone/1", "x/7", "x/b.vm"].map(|name| top.join(name)));
        // A name that led elsewhere is put right by its vm's start.
        std::fs::remove_file(top.join("x/a.vm")).unwrap();
        std::os::unix::fs::symlink("7", top.join("x/a.vm")).unwrap();
        daemon.join(&row).unwrap();
        assert_eq!(std::fs::read_link(top.join("x/a.vm")).unwrap(), Path::new("1"));
    }
}
