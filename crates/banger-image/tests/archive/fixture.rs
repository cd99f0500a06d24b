//! A small archive as Debian lays it out, signed with a key made here, and a host whose apt uses it.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use banger_image::debian::archive::{Archive, ArchiveConfig, ArchiveError, Bases, RELEASE, architecture};
use banger_image::debian::index::{Index, Package};
use banger_image::debian::release::parse_date;
use pgp::composed::{
    ArmorOptions, CleartextSignedMessage, KeyType, SecretKeyParamsBuilder, SignedSecretKey,
    SubkeyParamsBuilder,
};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{SignatureConfig, SignatureType, Subpacket, SubpacketData};
use pgp::ser::Serialize as _;
use pgp::types::{Duration, KeyDetails as _, Password, Timestamp};
use rand::thread_rng;
use sha2::{Digest as _, Sha256};

use crate::deb;
use crate::server::Server;

pub(crate) const UPDATES: &str = "bookworm-updates";
pub(crate) const SECURITY: &str = "bookworm-security";
/// The host's file of trusted keys.
pub(crate) const KEYRING: &str = "debian-archive-keyring.gpg";
pub(crate) const DAY: i64 = 86_400;

/// Who signs.
#[derive(Debug)]
pub(crate) struct Key {
    secret: SignedSecretKey,
}

impl Key {
    /// A key that signs by itself.
    pub(crate) fn new() -> Self {
        Self::generate(true, false)
    }

    /// Makes a key; its primary key or a subkey may sign, or neither.
    pub(crate) fn generate(primary_signs: bool, subkey_signs: bool) -> Self {
        let mut params = SecretKeyParamsBuilder::default();
        params
            .key_type(KeyType::Ed25519Legacy)
            .can_certify(true)
            .can_sign(primary_signs)
            .primary_user_id("A test's archive <archive@example>".into());
        let mut subkey = SubkeyParamsBuilder::default();
        subkey.key_type(KeyType::Ed25519Legacy).can_sign(subkey_signs).can_authenticate(!subkey_signs);
        params.subkeys(vec![subkey.build().unwrap()]);
        Self { secret: params.build().unwrap().generate(thread_rng()).unwrap() }
    }

    pub(crate) fn public(&self) -> Vec<u8> {
        self.secret.to_public_key().to_bytes().unwrap()
    }

    pub(crate) fn fingerprint(&self) -> String {
        self.secret.fingerprint().to_string()
    }

    pub(crate) fn sign(&self, text: &str) -> Vec<u8> {
        armored(CleartextSignedMessage::sign(
            thread_rng(),
            text,
            &self.secret.primary_key,
            &Password::empty(),
        ))
    }

    /// Signs as `kind` and with `hash`, at a time for a while; zero seconds are forever.
    pub(crate) fn sign_as(
        &self,
        text: &str,
        kind: SignatureType,
        hash: HashAlgorithm,
        created: i64,
        seconds: u32,
    ) -> Vec<u8> {
        let key = &self.secret.primary_key;
        let mut config = SignatureConfig::v4(kind, key.algorithm(), hash);
        let created = Timestamp::from_secs(created.try_into().unwrap());
        config.hashed_subpackets = [
            SubpacketData::SignatureCreationTime(created),
            SubpacketData::SignatureExpirationTime(Duration::from_secs(seconds)),
            SubpacketData::IssuerFingerprint(key.fingerprint()),
        ]
        .map(|data| Subpacket::regular(data).unwrap())
        .into();
        armored(CleartextSignedMessage::new(text, config, key, &Password::empty()))
    }

    pub(crate) fn sign_with_subkey(&self, text: &str) -> Vec<u8> {
        let subkey = &self.secret.secret_subkeys[0].key;
        armored(CleartextSignedMessage::sign(thread_rng(), text, subkey, &Password::empty()))
    }
}

fn armored(message: pgp::errors::Result<CleartextSignedMessage>) -> Vec<u8> {
    message.unwrap().to_armored_bytes(ArmorOptions::default()).unwrap()
}

/// What a Release file says, and the packages below it.
#[derive(Debug, Clone)]
pub(crate) struct Suite {
    /// The directory it is published in.
    pub(crate) name: &'static str,
    pub(crate) origin: &'static str,
    pub(crate) codename: &'static str,
    /// Seconds since 1970.
    pub(crate) date: i64,
    pub(crate) valid_until: i64,
    /// Name, version and dependencies.
    pub(crate) packages: Vec<(String, &'static str, String)>,
}

impl Suite {
    pub(crate) fn new(name: &'static str) -> Self {
        let package = |name: &str, version| (name.to_owned(), version, String::new());
        let arch = architecture();
        let packages = match name {
            UPDATES => vec![package("tzdata", "2026a")],
            SECURITY => vec![package("hello", "1.0-1+deb12u1")],
            _ => {
                let kernel = format!("linux-image-6.12.0-1-cloud-{arch}");
                vec![
                    package("hello", "1.0-1"),
                    (format!("linux-image-6.12-cloud-{arch}"), "6.12.1-1", kernel.clone()),
                    package(&kernel, "6.12.1-1"),
                ]
            }
        };
        let now = now();
        let (date, valid_until) = (now - DAY, now + 7 * DAY);
        Self { name, origin: "Debian", codename: name, date, valid_until, packages }
    }

    fn base(&self) -> &'static str {
        if self.name == SECURITY { "/debian-security" } else { "/debian" }
    }

    pub(crate) fn in_release(&self) -> String {
        format!("{}/dists/{}/InRelease", self.base(), self.name)
    }

    pub(crate) fn index(&self) -> String {
        format!("{}/dists/{}/main/binary-{}/Packages.xz", self.base(), self.name, architecture())
    }

    pub(crate) fn pool(&self, name: &str) -> String {
        format!("{}/pool/{name}.deb", self.base())
    }

    /// The text of its Release file.
    pub(crate) fn text(&self, plain: &[u8], packed: &[u8]) -> String {
        let listed = |name: &str, bytes: &[u8]| {
            let path = format!("main/binary-{}/{name}", architecture());
            format!(" {} {} {path}\n", sha256(bytes), bytes.len())
        };
        format!(
            "Origin: {}\nLabel: Debian\nSuite: oldstable\nCodename: {}\nDate: {}\nValid-Until: {}\n\
             Acquire-By-Hash: yes\n\
             SHA256:\n{}{}",
            self.origin,
            self.codename,
            format_date(self.date),
            format_date(self.valid_until),
            listed("Packages", plain),
            listed("Packages.xz", packed),
        )
    }
}

/// The archive, and a host that uses it.
#[derive(Debug)]
pub(crate) struct Fixture {
    pub(crate) server: Server,
    pub(crate) key: Key,
    dir: tempfile::TempDir,
}

impl Fixture {
    /// An honest archive of three suites.
    pub(crate) fn new() -> Self {
        let fixture = Self { server: Server::start(), key: Key::new(), dir: tempfile::tempdir().unwrap() };
        for name in [RELEASE, UPDATES, SECURITY] {
            fixture.publish(&Suite::new(name));
        }
        fixture.trust(KEYRING, &fixture.key);
        let address = fixture.server.address;
        let sources = format!(
            "deb http://{address}/debian bookworm main\ndeb http://{address}/debian bookworm-updates main\n\
             deb http://{address}/debian-security bookworm-security main\n"
        );
        fixture.write("etc/apt/sources.list", sources.as_bytes());
        fixture
    }

    /// Writes a file of the host.
    pub(crate) fn write(&self, path: &str, bytes: &[u8]) {
        let path = self.dir.path().join("root").join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    /// Puts a key into a keyring file of the host, in place of what was there.
    pub(crate) fn trust(&self, keyring: &str, key: &Key) {
        self.write(&format!("usr/share/keyrings/{keyring}"), &key.public());
    }

    /// Publishes a suite, signed with the archive's key.
    pub(crate) fn publish(&self, suite: &Suite) {
        self.publish_signed(suite, |text| self.key.sign(text));
    }

    pub(crate) fn publish_signed(&self, suite: &Suite, sign: impl FnOnce(&str) -> Vec<u8>) {
        let mut plain = String::new();
        for (name, version, depends) in &suite.packages {
            let bytes = deb::build(name, version, architecture());
            let depends = if depends.is_empty() { String::new() } else { format!("Depends: {depends}\n") };
            plain.push_str(&format!(
                "Package: {name}\nVersion: {version}\nArchitecture: {}\n{depends}Filename: pool/{name}.deb\n\
                 Size: {}\nSHA256: {}\n\n",
                architecture(),
                bytes.len(),
                sha256(&bytes)
            ));
            self.server.put(&suite.pool(name), bytes);
        }
        let packed = deb::xz(plain.as_bytes());
        self.server.put(&suite.in_release(), sign(&suite.text(plain.as_bytes(), &packed)));
        self.server.put(&suite.index(), packed);
    }

    /// Replaces a published file by what `change` makes of it.
    pub(crate) fn change(&self, path: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) {
        let before = self.server.get(path);
        let after = change(before.clone());
        assert_ne!(before, after, "{path}");
        self.server.put(path, after);
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.server.address)
    }

    pub(crate) fn config(&self) -> ArchiveConfig {
        ArchiveConfig {
            root: self.dir.path().join("root"),
            mirror: None,
            cache_dir: self.dir.path().join("cache"),
            state_dir: self.dir.path().join("state"),
        }
    }

    pub(crate) async fn load(&self) -> Result<(Index, Bases), ArchiveError> {
        Archive::open(&self.config())?.load(&|_| {}).await
    }

    /// Fetches a package through everything before it.
    pub(crate) async fn fetch(&self, name: &str) -> Result<(Package, PathBuf), ArchiveError> {
        let archive = Archive::open(&self.config())?;
        let (index, _) = archive.load(&|_| {}).await?;
        let package = index.best(name)?.unwrap();
        let paths = archive.fetch(std::slice::from_ref(&package), &|_| {}).await?;
        Ok((package, paths.into_iter().next().unwrap()))
    }

    /// Names of the files in a directory of the cache, sorted. A finished file must have the digest it is named by.
    pub(crate) fn cached(&self, kind: &str) -> Vec<String> {
        let dir = self.dir.path().join("cache").join(kind);
        let Ok(entries) = std::fs::read_dir(&dir) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        if kind == "sha256" {
            for name in &names {
                assert_eq!(&sha256(&std::fs::read(dir.join(name)).unwrap()), name);
            }
        }
        names
    }

    /// Where the cache has a file of that digest.
    pub(crate) fn cache_path(&self, kind: &str, sha256: &str) -> PathBuf {
        self.dir.path().join("cache").join(kind).join(sha256)
    }

    /// Loads the archive, which must fail before anything that a Release file vouches for is asked for.
    #[track_caller]
    pub(crate) fn assert_release_refused(&self, suite: &Suite, expected: &[&str]) {
        self.server.take_log();
        let error = chain(&block_on(self.load()).unwrap_err());
        let url = format!("refused `{}`: ", self.url(&suite.in_release()));
        assert!(error.starts_with(&url), "{error}");
        for text in expected {
            assert!(error.contains(text), "{error}");
        }
        let log = self.server.take_log();
        assert!(log.iter().all(|request| request.path.ends_with("/InRelease")), "{log:?}");
        assert_eq!(self.cached("sha256"), [""; 0]);
        assert_eq!(self.cached("partial"), [""; 0]);
    }

    /// The date of the newest Release file accepted of a suite.
    pub(crate) fn accepted(&self, suite: &str) -> Option<i64> {
        let text = std::fs::read_to_string(self.config().state_dir.join(format!("release-{suite}"))).ok()?;
        Some(parse_date(&text).unwrap())
    }
}

/// The error and its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

pub(crate) fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir).unwrap().next().is_none()
}

/// The time when it was first asked for: a suite made twice has the same dates.
pub(crate) fn now() -> i64 {
    static NOW: OnceLock<i64> = OnceLock::new();
    *NOW.get_or_init(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().try_into().unwrap())
}

/// A date as Release files write it.
pub(crate) fn format_date(seconds: i64) -> String {
    let months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let is_leap = |year: i64| (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    let (mut days, clock) = (seconds / DAY, seconds % DAY);
    let weekday = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"][usize::try_from(days % 7).unwrap()];
    let mut year = 1970;
    while days >= 365 + i64::from(is_leap(year)) {
        days -= 365 + i64::from(is_leap(year));
        year += 1;
    }
    let mut month = 0;
    let lengths = [31, 28 + i64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    let (hour, minute, second) = (clock / 3600, clock / 60 % 60, clock % 60);
    let text =
        format!("{weekday}, {:02} {} {year} {hour:02}:{minute:02}:{second:02} UTC", days + 1, months[month]);
    assert_eq!(parse_date(&text), Some(seconds), "{text}");
    text
}
