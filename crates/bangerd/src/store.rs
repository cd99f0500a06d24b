//! What the owner has: vms, images, kernels. SQLite, one connection, numbered migrations.

use crate::net::member::MEMBERS_MAX;
use crate::programs::Vmm;
use anyhow::{Context as _, bail};
use banger_image::oci::ImageConfig;
use banger_wire::daemon::VmState;
use banger_wire::names::{NetworkName, VmId, VmName};
use banger_wire::size::Mebibytes;
use rusqlite::{Connection, OptionalExtension as _, Row, params};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Each runs once, in its own transaction; never changed after a release.
const MIGRATIONS: [&str; 4] = [
    "
    CREATE TABLE image (
        name TEXT PRIMARY KEY, source TEXT NOT NULL, digest TEXT NOT NULL, arch TEXT NOT NULL,
        created INTEGER NOT NULL, size_bytes INTEGER NOT NULL, init TEXT, config TEXT NOT NULL
    ) STRICT;
    CREATE TABLE kernel (
        name TEXT PRIMARY KEY, release TEXT NOT NULL, version TEXT NOT NULL, arch TEXT NOT NULL,
        created INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE vm (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, state TEXT NOT NULL, error TEXT,
        image TEXT NOT NULL REFERENCES image (name), kernel TEXT NOT NULL REFERENCES kernel (name),
        vcpu INTEGER NOT NULL, memory INTEGER NOT NULL, disk_size INTEGER NOT NULL,
        created INTEGER NOT NULL, rm INTEGER NOT NULL, run_as INTEGER UNIQUE, spec TEXT NOT NULL
    ) STRICT;
",
    "
    ALTER TABLE vm ADD COLUMN vmm TEXT NOT NULL DEFAULT 'qemu';
    ALTER TABLE vm ADD COLUMN kvm INTEGER NOT NULL DEFAULT 0;
",
    // `kernel`: the image's own choice, null for the default one. `sha256`: of the filesystem, empty where it was not
    // written down. `blobs`: what it was made of, digests as a JSON list. `initrd`: 1 for one of its own.
    "
    ALTER TABLE image ADD COLUMN kernel TEXT REFERENCES kernel (name);
    ALTER TABLE image ADD COLUMN sha256 TEXT NOT NULL DEFAULT '';
    ALTER TABLE image ADD COLUMN filesystem TEXT NOT NULL DEFAULT 'ext4';
    ALTER TABLE image ADD COLUMN blobs TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE image ADD COLUMN initrd INTEGER NOT NULL DEFAULT 0;
",
    // Vms in networks: each has a number there, which is its address.
    "
    CREATE TABLE member (
        vm TEXT PRIMARY KEY REFERENCES vm (id) ON DELETE CASCADE, network TEXT NOT NULL, number INTEGER NOT NULL,
        UNIQUE (network, number)
    ) STRICT;
",
];
/// Users vms started by root run as: above every range that distributions hand out.
const RUN_AS_FIRST: u32 = 1_900_000_000;

/// The user the vm that configures an image runs as, under root.
pub(crate) const RUN_AS_BUILD: u32 = RUN_AS_FIRST - 1;
/// The one of machines that are saved at the start of their guest, where nothing of a user's runs.
pub(crate) const RUN_AS_TEMPLATE: u32 = RUN_AS_FIRST - 2;

/// A stored vm.
#[derive(Debug, Clone)]
pub(crate) struct VmRow {
    pub(crate) id: VmId,
    pub(crate) name: VmName,
    pub(crate) state: VmState,
    pub(crate) error: Option<String>,
    pub(crate) image: String,
    pub(crate) kernel: String,
    pub(crate) vcpu: u32,
    pub(crate) memory: Mebibytes,
    pub(crate) disk_size: Mebibytes,
    pub(crate) created: i64,
    pub(crate) rm: bool,
    pub(crate) run_as: Option<u32>,
    /// The request it was made by, as JSON: environment and what else a later start needs again.
    pub(crate) spec: String,
    /// What runs it, or did last, or will first.
    pub(crate) vmm: Vmm,
    /// With hardware virtualisation.
    pub(crate) kvm: bool,
}

/// A stored image; also what `image.json` beside its filesystem says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageRow {
    pub(crate) name: String,
    pub(crate) source: String,
    pub(crate) digest: String,
    pub(crate) arch: String,
    pub(crate) created: i64,
    pub(crate) size_bytes: u64,
    pub(crate) init: Option<String>,
    /// How its programs are started, as its maker wrote it down.
    pub(crate) config: ImageConfig,
    /// The kernel it boots with, unless another is asked for; none is the default one.
    pub(crate) kernel: Option<String>,
    /// Digest of the filesystem; empty where nobody wrote it down.
    pub(crate) sha256: String,
    /// The filesystem's type, which is also how its file's name ends.
    pub(crate) filesystem: String,
    /// Digests of what it was made of.
    pub(crate) blobs: Vec<String>,
    /// It has an initrd of its own, which its vms boot with.
    pub(crate) initrd: bool,
}

impl ImageRow {
    /// Returns the name of its filesystem within its directory.
    pub(crate) fn rootfs_file(&self) -> String {
        format!("rootfs.{}", self.filesystem)
    }
}

/// A stored kernel.
#[derive(Debug, Clone)]
pub(crate) struct KernelRow {
    pub(crate) name: String,
    pub(crate) release: String,
    pub(crate) version: String,
    pub(crate) arch: String,
    pub(crate) created: i64,
}

/// The store. Calls are short; a lock around the connection is all the concurrency there is.
#[derive(Debug)]
pub(crate) struct Store {
    connection: Mutex<Connection>,
}

impl Store {
    /// Opens the store and brings its schema up to date.
    ///
    /// # Errors
    /// When it can't be opened, or was written by a later banger.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let mut connection =
            Connection::open(path).with_context(|| format!("open the store `{}`", path.display()))?;
        connection.execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;",
        )?;
        // A file that can't be opened for writing is opened for reading, silently; so is its log, which only a write tells.
        if connection.is_readonly(rusqlite::MAIN_DB)? {
            bail!("the store `{}` can't be opened for writing", path.display());
        }
        connection
            .execute_batch("BEGIN IMMEDIATE; COMMIT")
            .with_context(|| format!("write to the store `{}`", path.display()))?;
        let version: usize = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        if version > MIGRATIONS.len() {
            bail!(
                "the store `{}` was written by a later banger (schema {version}); update this one",
                path.display()
            );
        }
        for (index, migration) in MIGRATIONS.iter().enumerate().skip(version) {
            let transaction = connection.transaction()?;
            transaction.execute_batch(migration)?;
            transaction.pragma_update(None, "user_version", index + 1)?;
            transaction.commit()?;
        }
        Ok(Self { connection: Mutex::new(connection) })
    }

    /// Moves what is in the log into the file, which is the whole store then.
    pub(crate) fn checkpoint(&self) -> anyhow::Result<()> {
        self.lock()
            .execute_batch("PRAGMA wal_checkpoint(TRUNCATE)")
            .context("write the store's log into its file")
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // Statements are atomic, so a panic elsewhere leaves the connection usable.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves the vm's name; false when it is taken. As root, also gives the vm a user of its own.
    pub(crate) fn insert_vm(&self, row: &mut VmRow, as_root: bool) -> anyhow::Result<bool> {
        let mut connection = self.lock();
        let transaction = connection.transaction()?;
        let taken: Option<i64> = transaction
            .query_row("SELECT 1 FROM vm WHERE name = ?", [row.name.as_str()], |row| row.get(0))
            .optional()?;
        if taken.is_some() {
            return Ok(false);
        }
        if as_root {
            let query = "SELECT coalesce(max(run_as) + 1, ?) FROM vm";
            row.run_as = Some(transaction.query_row(query, [RUN_AS_FIRST], |row| row.get(0))?);
        }
        transaction.execute(
            "INSERT INTO vm VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            params![
                row.id.as_str(),
                row.name.as_str(),
                state_text(row.state),
                row.error,
                row.image,
                row.kernel,
                row.vcpu,
                row.memory.0,
                row.disk_size.0,
                row.created,
                row.rm,
                row.run_as,
                row.spec,
                row.vmm.name(),
                row.kvm
            ],
        )?;
        transaction.commit()?;
        Ok(true)
    }

    pub(crate) fn set_state(&self, id: &VmId, state: VmState, error: Option<&str>) -> anyhow::Result<()> {
        let update = "UPDATE vm SET state = ?, error = ? WHERE id = ?";
        self.lock().execute(update, params![state_text(state), error, id.as_str()])?;
        Ok(())
    }

    /// Writes down what a vm has from its next start on.
    pub(crate) fn set_shape(&self, row: &VmRow) -> anyhow::Result<()> {
        let update = "UPDATE vm SET vcpu = ?, memory = ?, disk_size = ?, spec = ? WHERE id = ?";
        let values = params![row.vcpu, row.memory.0, row.disk_size.0, row.spec, row.id.as_str()];
        self.lock().execute(update, values)?;
        Ok(())
    }

    pub(crate) fn set_vmm(&self, id: &VmId, vmm: Vmm, kvm: bool) -> anyhow::Result<()> {
        let update = "UPDATE vm SET vmm = ?, kvm = ? WHERE id = ?";
        self.lock().execute(update, params![vmm.name(), kvm, id.as_str()])?;
        Ok(())
    }

    pub(crate) fn delete_vm(&self, id: &VmId) -> anyhow::Result<()> {
        self.lock().execute("DELETE FROM vm WHERE id = ?", [id.as_str()])?;
        Ok(())
    }

    /// Returns a vm's number in a network, the lowest free one when it has none; none when all are taken. The number it had
    /// in another one is free then.
    pub(crate) fn join(&self, id: &VmId, network: &NetworkName) -> anyhow::Result<Option<u16>> {
        if let Some((_, number)) = self.member(id)?.filter(|(of, _)| of == network) {
            return Ok(Some(number));
        }
        let mut connection = self.lock();
        let transaction = connection.transaction()?;
        let taken: Vec<u16> = {
            let query = "SELECT number FROM member WHERE network = ? ORDER BY number";
            let mut statement = transaction.prepare(query)?;
            let rows = statement.query_map([network.as_str()], |row| row.get(0))?;
            rows.collect::<Result<_, _>>()?
        };
        let mut taken = taken.into_iter();
        let Some(number) = (1..=MEMBERS_MAX).find(|number| taken.next() != Some(*number)) else {
            return Ok(None);
        };
        let insert = "INSERT INTO member (vm, network, number) VALUES (?, ?, ?)
            ON CONFLICT (vm) DO UPDATE SET network = excluded.network, number = excluded.number";
        transaction.execute(insert, params![id.as_str(), network.as_str(), number])?;
        transaction.commit()?;
        Ok(Some(number))
    }

    /// Frees the number a vm has in a network.
    pub(crate) fn part(&self, id: &VmId) -> anyhow::Result<()> {
        self.lock().execute("DELETE FROM member WHERE vm = ?", [id.as_str()])?;
        Ok(())
    }

    /// Returns the network a vm has a place in, and its number there.
    pub(crate) fn member(&self, id: &VmId) -> anyhow::Result<Option<(NetworkName, u16)>> {
        let query = "SELECT network, number FROM member WHERE vm = ?";
        let of = |row: &rusqlite::Row<'_>| Ok((row.get::<_, String>(0)?, row.get(1)?));
        let found = self.lock().query_row(query, [id.as_str()], of).optional()?;
        found.map(|(network, number)| Ok((network.parse()?, number))).transpose()
    }

    /// Returns how many vms have a place in a network.
    pub(crate) fn members_of(&self, network: &NetworkName) -> anyhow::Result<u16> {
        let query = "SELECT count(*) FROM member WHERE network = ?";
        Ok(self.lock().query_row(query, [network.as_str()], |row| row.get(0))?)
    }

    /// Returns the name and number of every vm that is in a network, with that.
    pub(crate) fn members(&self) -> anyhow::Result<Vec<(String, u16, String)>> {
        let connection = self.lock();
        let query = "SELECT network, number, name FROM member JOIN vm ON vm.id = member.vm";
        let mut statement = connection.prepare(query)?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Returns a vm, if there is one.
    pub(crate) fn vm(&self, id: &VmId) -> anyhow::Result<Option<VmRow>> {
        let query = "SELECT * FROM vm WHERE id = ?";
        self.lock().query_row(query, [id.as_str()], vm_row).optional()?.transpose()
    }

    pub(crate) fn vms(&self) -> anyhow::Result<Vec<VmRow>> {
        let connection = self.lock();
        let mut statement = connection.prepare("SELECT * FROM vm ORDER BY created, id")?;
        let rows = statement.query_map([], vm_row)?.collect::<Result<Vec<_>, _>>()?;
        rows.into_iter().collect()
    }

    pub(crate) fn insert_image(&self, row: &ImageRow) -> anyhow::Result<()> {
        self.lock().execute(
            "INSERT OR REPLACE INTO image VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            params![
                row.name,
                row.source,
                row.digest,
                row.arch,
                row.created,
                row.size_bytes as i64,
                row.init,
                serde_json::to_string(&row.config)?,
                row.kernel,
                row.sha256,
                row.filesystem,
                serde_json::to_string(&row.blobs)?,
                row.initrd
            ],
        )?;
        Ok(())
    }

    pub(crate) fn delete_image(&self, name: &str) -> anyhow::Result<()> {
        self.lock().execute("DELETE FROM image WHERE name = ?", [name])?;
        Ok(())
    }

    pub(crate) fn images(&self) -> anyhow::Result<Vec<ImageRow>> {
        let connection = self.lock();
        let mut statement = connection.prepare("SELECT * FROM image ORDER BY name")?;
        let rows = statement.query_map([], |row| {
            Ok(ImageRow {
                name: row.get(0)?,
                source: row.get(1)?,
                digest: row.get(2)?,
                arch: row.get(3)?,
                created: row.get(4)?,
                size_bytes: row.get::<_, i64>(5)?.unsigned_abs(),
                init: row.get(6)?,
                config: serde_json::from_str(&row.get::<_, String>(7)?).unwrap_or_default(),
                kernel: row.get(8)?,
                sha256: row.get(9)?,
                filesystem: row.get(10)?,
                blobs: serde_json::from_str(&row.get::<_, String>(11)?).unwrap_or_default(),
                initrd: row.get(12)?,
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    pub(crate) fn insert_kernel(&self, row: &KernelRow) -> anyhow::Result<()> {
        self.lock().execute(
            "INSERT OR REPLACE INTO kernel VALUES (?, ?, ?, ?, ?)",
            params![row.name, row.release, row.version, row.arch, row.created],
        )?;
        Ok(())
    }

    pub(crate) fn delete_kernel(&self, name: &str) -> anyhow::Result<()> {
        self.lock().execute("DELETE FROM kernel WHERE name = ?", [name])?;
        Ok(())
    }

    pub(crate) fn kernels(&self) -> anyhow::Result<Vec<KernelRow>> {
        let connection = self.lock();
        let mut statement = connection.prepare("SELECT * FROM kernel ORDER BY name")?;
        let rows = statement.query_map([], |row| {
            Ok(KernelRow {
                name: row.get(0)?,
                release: row.get(1)?,
                version: row.get(2)?,
                arch: row.get(3)?,
                created: row.get(4)?,
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}

fn vm_row(row: &Row<'_>) -> rusqlite::Result<anyhow::Result<VmRow>> {
    let (id, name, state): (String, String, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
    let rest = VmRowRest {
        error: row.get(3)?,
        image: row.get(4)?,
        kernel: row.get(5)?,
        numbers: (row.get(6)?, row.get(7)?, row.get(8)?, row.get(9)?),
        rm: row.get(10)?,
        run_as: row.get(11)?,
        spec: row.get(12)?,
        vmm: row.get(13)?,
        kvm: row.get(14)?,
    };
    Ok((|| {
        let (vcpu, memory, disk_size, created) = rest.numbers;
        Ok(VmRow {
            id: id.parse().context("a stored vm's id")?,
            name: name.parse().context("a stored vm's name")?,
            state: parse_state(&state)?,
            error: rest.error,
            image: rest.image,
            kernel: rest.kernel,
            vcpu,
            memory: Mebibytes(memory),
            disk_size: Mebibytes(disk_size),
            created,
            rm: rest.rm,
            run_as: rest.run_as,
            spec: rest.spec,
            vmm: Vmm::from_name(&rest.vmm)
                .with_context(|| format!("unknown VMM `{}` in the store", rest.vmm))?,
            kvm: rest.kvm,
        })
    })())
}

/// The columns that need no checking.
struct VmRowRest {
    error: Option<String>,
    image: String,
    kernel: String,
    numbers: (u32, u64, u64, i64),
    rm: bool,
    run_as: Option<u32>,
    spec: String,
    vmm: String,
    kvm: bool,
}

const STATES: [(VmState, &str); 6] = [
    (VmState::Created, "created"),
    (VmState::Starting, "starting"),
    (VmState::Running, "running"),
    (VmState::Stopping, "stopping"),
    (VmState::Stopped, "stopped"),
    (VmState::Error, "error"),
];

fn state_text(state: VmState) -> &'static str {
    STATES.iter().find(|(known, _)| *known == state).map_or("error", |(_, text)| text)
}

fn parse_state(text: &str) -> anyhow::Result<VmState> {
    let found = STATES.iter().find(|(_, known)| *known == text);
    found.map(|(state, _)| *state).with_context(|| format!("unknown state `{text}` in the store"))
}

#[cfg(test)]
mod tests {
    use super::{KernelRow, Store};

    #[test]
    fn an_image_of_the_first_schema_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.db");
        let old = rusqlite::Connection::open(&path).unwrap();
        old.execute_batch(super::MIGRATIONS[0]).unwrap();
        let row = "INSERT INTO image VALUES ('a', 's', 'd', 'amd64', 1, 2, NULL, '{}')";
        old.execute_batch(&format!("{row}; PRAGMA user_version = 1;")).unwrap();
        drop(old);
        let rows = Store::open(&path).unwrap().images().unwrap();
        assert_eq!((rows[0].rootfs_file().as_str(), rows[0].sha256.as_str()), ("rootfs.ext4", ""));
        assert_eq!((rows[0].kernel.as_deref(), rows[0].blobs.len(), rows[0].initrd), (None, 0, false));
    }

    #[test]
    fn a_kernel_in_use_is_replaced_and_not_deleted() {
        let store = Store::open(std::path::Path::new(":memory:")).unwrap();
        let kernel = |version: &str| KernelRow {
            name: "k".to_owned(),
            release: version.to_owned(),
            version: version.to_owned(),
            arch: "amd64".to_owned(),
            created: 0,
        };
        store.insert_kernel(&kernel("1")).unwrap();
        let insert = "INSERT INTO image (name, source, digest, arch, created, size_bytes, config, kernel)
                      VALUES ('i', '', '', '', 0, 0, '{}', 'k')";
        store.lock().execute(insert, []).unwrap();
        store.insert_kernel(&kernel("2")).unwrap();
        assert_eq!(store.kernels().unwrap()[0].version, "2");
        assert!(store.delete_kernel("k").is_err(), "an image boots with it");
    }

    #[test]
    fn a_later_schema_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.db");
        drop(Store::open(&path).unwrap());
        drop(Store::open(&path).unwrap());
        rusqlite::Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
        let error = Store::open(&path).unwrap_err().to_string();
        assert!(error.contains("later banger (schema 99)"), "{error}");
    }
}
