//! The archive keys we trust, and the check of a clear-signed file against them.
//!
//! Trusted are the keys that come with banger (their fingerprints are constants here and compared when they are loaded)
//! and the archive keys of the host's own `debian-archive-keyring` package, which outlives a banger release. The
//! cleartext framing is parsed by us and strictly: one message from the first byte to the last, nothing around it, so
//! there is no text that a reader of the file sees and the signature doesn't cover.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use pgp::composed::{Deserializable, DetachedSignature, SignedPublicKey, SignedPublicSubKey};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{Signature, SignatureType};
use pgp::types::{KeyDetails, Tag};
use thiserror::Error;

/// Where the host's keyring package puts its files, below the root directory.
const KEYRING_DIR: &str = "usr/share/keyrings";
/// A keyring file larger than this is not read; Debian's is 56 KiB.
const KEYRING_MAX: u64 = 4 << 20;
/// Signatures looked at in one file; Debian makes up to four.
const SIGNATURES_MAX: usize = 16;

const BEGIN_MESSAGE: &str = "-----BEGIN PGP SIGNED MESSAGE-----";
const BEGIN_SIGNATURE: &str = "-----BEGIN PGP SIGNATURE-----";
const END_SIGNATURE: &str = "-----END PGP SIGNATURE-----";

/// The keys shipped with banger: primary fingerprint and key (see `keys/README.md`).
const EMBEDDED: [(&str, &[u8]); 6] = [
    ("b8b80b5b623eab6ad8775c45b7c5d7d6350947f8", include_bytes!("keys/bookworm-automatic.gpg")),
    ("05ab90340c0c5e797f44a8c8254cf3b5aec0a8f0", include_bytes!("keys/bookworm-security-automatic.gpg")),
    ("4d64fec119c2029067d6e791f8d2585b8783d481", include_bytes!("keys/bookworm-stable.gpg")),
    ("04b54c3cdca79751b16bc6b5225629df75b188bd", include_bytes!("keys/trixie-automatic.gpg")),
    ("5e04a1e3223a19a20706e20f9904613d4cce68c6", include_bytes!("keys/trixie-security-automatic.gpg")),
    ("41587f7db8c774bccf131416762f67a0b2c39de4", include_bytes!("keys/trixie-stable.gpg")),
];

/// Why a signed file was refused.
#[derive(Debug, Error)]
pub enum VerifyError {
    /// The framing is not one clear-signed message and nothing else.
    #[error("not a clear-signed message: {0}")]
    Framing(&'static str),
    /// The signature block can't be read.
    #[error("the signature can't be parsed")]
    Signature(#[source] pgp::errors::Error),
    /// None of the signatures is by a trusted, valid key over this text.
    #[error("no good signature by a trusted Debian archive key (signed by {})", if .signers.is_empty() { "nobody" } else { .signers })]
    Untrusted {
        /// Fingerprints or key ids the signatures name, comma separated.
        signers: String,
    },
}

/// Why the trusted keys could not be loaded.
#[derive(Debug, Error)]
pub enum KeyringError {
    /// A file isn't a keyring.
    #[error("`{name}` is not an OpenPGP keyring")]
    Parse {
        /// The file, or the fingerprint of the key shipped with banger.
        name: String,
        /// Why not.
        source: pgp::errors::Error,
    },
    /// A key shipped with banger isn't the one whose fingerprint the source states.
    #[error("the built-in key has fingerprint {found}, expected {expected}")]
    Fingerprint {
        /// What it has.
        found: String,
        /// What it must have.
        expected: &'static str,
    },
}

/// A set of trusted keys.
#[derive(Debug, Clone)]
pub struct Keyring {
    keys: Vec<SignedPublicKey>,
}

impl Keyring {
    /// Loads the built-in keys and those of the keyring package installed below `root`.
    pub fn debian(root: &Path) -> Result<Self, KeyringError> {
        let mut keyring = Self { keys: Vec::new() };
        for (expected, bytes) in EMBEDDED {
            let loaded = Self::from_bytes(expected, bytes)?;
            for key in loaded.keys {
                let found = key.fingerprint().to_string();
                if !found.eq_ignore_ascii_case(expected) {
                    return Err(KeyringError::Fingerprint { found, expected });
                }
                keyring.keys.push(key);
            }
        }
        for path in host_keyrings(&root.join(KEYRING_DIR)) {
            let read = |path: &Path| {
                let mut bytes = Vec::new();
                fs::File::open(path)?.take(KEYRING_MAX).read_to_end(&mut bytes).map(|_| bytes)
            };
            let name = path.display().to_string();
            match read(&path).map(|bytes| Self::from_bytes(&name, &bytes)) {
                Ok(Ok(keys)) => keyring.merge(keys),
                Ok(Err(err)) => tracing::warn!(keyring = name, %err, "can't parse the keyring, ignoring"),
                Err(err) => tracing::warn!(keyring = name, %err, "can't read the keyring, ignoring"),
            }
        }
        Ok(keyring)
    }

    /// Parses a keyring, binary or armored.
    pub fn from_bytes(name: &str, bytes: &[u8]) -> Result<Self, KeyringError> {
        let parse = |source| KeyringError::Parse { name: name.to_owned(), source };
        let (keys, _) = SignedPublicKey::from_reader_many_buf(bytes).map_err(parse)?;
        Ok(Self { keys: keys.collect::<Result<_, _>>().map_err(parse)? })
    }

    fn merge(&mut self, other: Self) {
        for key in other.keys {
            if !self.keys.iter().any(|have| have.fingerprint() == key.fingerprint()) {
                self.keys.push(key);
            }
        }
    }

    /// Checks a clear-signed file and returns the text that is signed, which is all that may be used of it.
    pub fn verify(&self, file: &[u8]) -> Result<String, VerifyError> {
        let message = parse_clearsigned(file)?;
        let (parsed, _) =
            DetachedSignature::from_armor_many(message.armor.as_bytes()).map_err(VerifyError::Signature)?;
        let mut signatures = Vec::new();
        for signature in parsed.take(SIGNATURES_MAX) {
            signatures.push(signature.map_err(VerifyError::Signature)?.signature);
        }
        let now = unix_now();
        let signed = message.lines.join("\r\n");
        if signatures.iter().any(|signature| self.is_good(signature, signed.as_bytes(), now)) {
            let mut text = message.lines.join("\n");
            text.push('\n');
            return Ok(text);
        }
        let signers: Vec<String> = signatures.iter().map(name_signer).collect();
        Err(VerifyError::Untrusted { signers: signers.join(", ") })
    }

    fn is_good(&self, signature: &Signature, text: &[u8], now: u64) -> bool {
        let strong = matches!(
            signature.hash_alg(),
            Some(HashAlgorithm::Sha256 | HashAlgorithm::Sha384 | HashAlgorithm::Sha512)
        );
        if signature.typ() != Some(SignatureType::Text) || !strong || is_expired(signature, now) {
            return false;
        }
        self.keys.iter().any(|key| {
            let by_primary = signature.verify(&key.primary_key, text).is_ok() && may_primary_sign(key, now);
            by_primary
                || key.public_subkeys.iter().any(|subkey| {
                    signature.verify(&subkey.key, text).is_ok()
                        && is_alive(key, now)
                        && may_subkey_sign(key, subkey, now)
                })
        })
    }
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

/// The host's archive keyrings; the file of removed keys lies beside them and must not count.
fn host_keyrings(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("");
            let kind = [".gpg", ".pgp", ".asc"].iter().any(|end| name.ends_with(end));
            kind && name.starts_with("debian-archive-") && !name.contains("removed")
        })
        .collect();
    found.sort();
    found
}

fn name_signer(signature: &Signature) -> String {
    let fingerprint = signature.issuer_fingerprint().first().map(|f| f.to_string());
    let key_id = || signature.issuer_key_id().first().map(|id| id.to_string());
    fingerprint.or_else(key_id).unwrap_or_else(|| "an unnamed key".into())
}

fn is_expired(signature: &Signature, now: u64) -> bool {
    let Some(created) = signature.created() else { return true };
    let lifetime = signature.signature_expiration_time().map_or(0, |d| u64::from(d.as_secs()));
    lifetime > 0 && u64::from(created.as_secs()) + lifetime < now
}

/// Whether a key made at `created` is past the lifetime its newest self-signature gives it.
fn is_key_expired(created: u64, binding: &Signature, now: u64) -> bool {
    let lifetime = binding.key_expiration_time().map_or(0, |d| u64::from(d.as_secs()));
    lifetime > 0 && created + lifetime < now
}

fn newest<'a>(signatures: impl Iterator<Item = &'a Signature>) -> Option<&'a Signature> {
    signatures.max_by_key(|s| s.created().map_or(0, |t| t.as_secs()))
}

/// The newest self-certification of a primary key, where its flags and lifetime are.
fn self_certification(key: &SignedPublicKey) -> Option<&Signature> {
    newest(key.details.users.iter().flat_map(|user| {
        user.signatures.iter().filter(|s| {
            s.is_certification() && s.verify_certification(&key.primary_key, Tag::UserId, &user.id).is_ok()
        })
    }))
}

/// Whether the primary key is neither revoked nor expired.
fn is_alive(key: &SignedPublicKey, now: u64) -> bool {
    let revoked = key.details.revocation_signatures.iter().any(|s| s.verify_key(&key.primary_key).is_ok());
    let created = u64::from(key.primary_key.created_at().as_secs());
    !revoked && self_certification(key).is_some_and(|s| !is_key_expired(created, s, now))
}

fn may_primary_sign(key: &SignedPublicKey, now: u64) -> bool {
    is_alive(key, now) && self_certification(key).is_some_and(|s| s.key_flags().sign())
}

/// Whether the newest valid binding makes the subkey a signing key, with the subkey's own consent.
fn may_subkey_sign(key: &SignedPublicKey, subkey: &SignedPublicSubKey, now: u64) -> bool {
    let valid =
        |s: &&Signature| is_binding(s) && s.verify_subkey_binding(&key.primary_key, &subkey.key).is_ok();
    let revoked = subkey.signatures.iter().any(|s| {
        s.typ() == Some(SignatureType::SubkeyRevocation)
            && s.verify_subkey_binding(&key.primary_key, &subkey.key).is_ok()
    });
    let Some(binding) = newest(subkey.signatures.iter().filter(valid)) else { return false };
    let consents = binding
        .embedded_signature()
        .is_some_and(|back| back.verify_primary_key_binding(&subkey.key, &key.primary_key).is_ok());
    let created = u64::from(subkey.key.created_at().as_secs());
    !revoked && binding.key_flags().sign() && consents && !is_key_expired(created, binding, now)
}

fn is_binding(signature: &Signature) -> bool {
    signature.typ() == Some(SignatureType::SubkeyBinding)
}

#[derive(Debug)]
struct Clearsigned<'a> {
    /// The signed lines, unescaped and without the trailing blanks a signature doesn't cover.
    lines: Vec<&'a str>,
    armor: String,
}

fn parse_clearsigned(file: &[u8]) -> Result<Clearsigned<'_>, VerifyError> {
    let text = std::str::from_utf8(file).map_err(|_| VerifyError::Framing("it is not UTF-8"))?;
    if text.contains(['\r', '\0']) {
        return Err(VerifyError::Framing("it contains control characters"));
    }
    let Some(text) = text.strip_suffix('\n') else {
        return Err(VerifyError::Framing("the last line is not complete"));
    };
    let mut rest = text.split('\n');
    if rest.next() != Some(BEGIN_MESSAGE) {
        return Err(VerifyError::Framing("it doesn't begin with the message's first line"));
    }
    for line in rest.by_ref() {
        if line.is_empty() {
            break;
        }
        if !line.starts_with("Hash: ") {
            return Err(VerifyError::Framing("it has an armor header other than `Hash`"));
        }
    }
    let mut lines = Vec::new();
    loop {
        let Some(line) = rest.next() else { return Err(VerifyError::Framing("it has no signature")) };
        if line == BEGIN_SIGNATURE {
            break;
        }
        let line = match line.strip_prefix('-') {
            None => line,
            Some(escaped) => match escaped.strip_prefix(' ') {
                Some(unescaped) => unescaped,
                None => return Err(VerifyError::Framing("a line of the text begins with an unescaped dash")),
            },
        };
        lines.push(line.trim_end_matches([' ', '\t']));
    }
    let mut armor = format!("{BEGIN_SIGNATURE}\n");
    loop {
        let Some(line) = rest.next() else { return Err(VerifyError::Framing("the signature has no end")) };
        if line.starts_with('-') && line != END_SIGNATURE {
            return Err(VerifyError::Framing("there is another block in the signature"));
        }
        armor.push_str(line);
        armor.push('\n');
        if line == END_SIGNATURE {
            break;
        }
    }
    if rest.any(|line| !line.is_empty()) {
        return Err(VerifyError::Framing("there is text after the signature"));
    }
    Ok(Clearsigned { lines, armor })
}
