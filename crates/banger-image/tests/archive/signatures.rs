//! Who may sign, and what is signed.

use banger_image::debian::archive::RELEASE;
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::SignatureType;

use crate::fixture::{Fixture, KEYRING, Key, SECURITY, Suite, UPDATES, block_on, now};

const UNTRUSTED: &str = "no good signature by a trusted Debian archive key (signed by ";

/// Replaces the first `from` by `to`.
fn replace(bytes: Vec<u8>, from: &str, to: &str) -> Vec<u8> {
    String::from_utf8(bytes).unwrap().replacen(from, to, 1).into_bytes()
}

#[test]
fn an_honest_archive_is_accepted() {
    let fixture = Fixture::new();
    let (index, bases) = block_on(fixture.load()).unwrap();
    assert_eq!(bases.main, fixture.url("/debian"));
    assert_eq!(bases.security, fixture.url("/debian-security"));
    let hello = index.best("hello").unwrap().unwrap();
    assert_eq!(hello.version.as_str(), "1.0-1+deb12u1");
    assert_eq!(hello.url, fixture.url(&Suite::new(SECURITY).pool("hello")));
    assert_eq!(index.best("tzdata").unwrap().unwrap().url, fixture.url(&Suite::new(UPDATES).pool("tzdata")));
}

#[test]
fn a_changed_byte_of_the_signed_text_is_refused() {
    let fixture = Fixture::new();
    let by = format!("{UNTRUSTED}{})", fixture.key.fingerprint());
    for name in [RELEASE, UPDATES, SECURITY] {
        let suite = Suite::new(name);
        let honest = fixture.server.get(&suite.in_release());
        for (from, to) in [
            ("Label: Debian", "Label: debian"),
            ("Packages.xz", "Packages.xy"),
            ("\nSHA256:", "\nsHA256:"),
            ("oldstable", "oldstabl "),
        ] {
            fixture.change(&suite.in_release(), |bytes| replace(bytes, from, to));
            fixture.assert_release_refused(&suite, &[&by]);
            fixture.server.put(&suite.in_release(), honest.clone());
        }
    }
    block_on(fixture.load()).unwrap();
}

#[test]
fn a_key_that_is_not_in_the_keyring_is_refused() {
    let fixture = Fixture::new();
    let (suite, stranger) = (Suite::new(RELEASE), Key::new());
    fixture.publish_signed(&suite, |text| stranger.sign(text));
    let by = format!("{UNTRUSTED}{})", stranger.fingerprint());
    fixture.assert_release_refused(&suite, &[&by]);
    // Neither removed keys nor those of others count.
    for keyring in ["debian-archive-removed-keys.gpg", "vendor.gpg", "debian-archive-keyring.gpg.old"] {
        fixture.trust(keyring, &stranger);
        fixture.assert_release_refused(&suite, &[&by]);
    }
    fixture.trust("debian-archive-another.gpg", &stranger);
    block_on(fixture.load()).unwrap();
}

#[test]
fn a_refused_newer_file_does_not_lock_out_the_honest_one() {
    let fixture = Fixture::new();
    let honest = Suite::new(RELEASE);
    let forged = Suite { date: honest.date + 60, ..honest.clone() };
    fixture.publish_signed(&forged, |text| Key::new().sign(text));
    fixture.assert_release_refused(&forged, &[UNTRUSTED]);
    fixture.publish(&honest);
    block_on(fixture.load()).unwrap();
    assert_eq!(fixture.accepted(RELEASE), Some(honest.date));
}

#[test]
fn a_signing_subkey_may_sign_and_a_primary_key_without_that_right_may_not() {
    let mut fixture = Fixture::new();
    fixture.key = Key::generate(false, true);
    fixture.trust(KEYRING, &fixture.key);
    for name in [RELEASE, UPDATES, SECURITY] {
        fixture.publish_signed(&Suite::new(name), |text| fixture.key.sign_with_subkey(text));
    }
    block_on(fixture.load()).unwrap();

    for by_subkey in [false, true] {
        let mut fixture = Fixture::new();
        let suite = Suite::new(UPDATES);
        fixture.key = Key::generate(false, false);
        fixture.trust("debian-archive-another.gpg", &fixture.key);
        fixture.publish_signed(&suite, |text| match by_subkey {
            true => fixture.key.sign_with_subkey(text),
            false => fixture.key.sign(text),
        });
        fixture.assert_release_refused(&suite, &[UNTRUSTED]);
    }
}

#[test]
fn a_signature_of_another_hash_or_kind_or_past_its_time_is_refused() {
    let fixture = Fixture::new();
    let (suite, hour_ago) = (Suite::new(RELEASE), now() - 3600);
    let publish = |kind, hash, seconds| {
        fixture.publish_signed(&suite, |text| fixture.key.sign_as(text, kind, hash, hour_ago, seconds));
    };
    for (kind, hash, seconds) in [
        (SignatureType::Text, HashAlgorithm::Sha3_256, 0),
        (SignatureType::Text, HashAlgorithm::Sha256, 60),
        (SignatureType::Binary, HashAlgorithm::Sha256, 0),
    ] {
        publish(kind, hash, seconds);
        fixture.assert_release_refused(&suite, &[UNTRUSTED, &fixture.key.fingerprint()]);
    }
    for seconds in [0, 7200] {
        publish(SignatureType::Text, HashAlgorithm::Sha256, seconds);
        block_on(fixture.load()).unwrap();
    }
}

#[test]
fn no_signature_is_refused() {
    let suite = Suite::new(RELEASE);
    let signature = |bytes: &[u8]| {
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        let at = text.find("-----BEGIN PGP SIGNATURE-----").unwrap();
        (text[..at].to_owned(), text[at..].to_owned())
    };
    let fixture = Fixture::new();
    fixture.publish_signed(&suite, |text| text.as_bytes().to_vec());
    let framing = "not a clear-signed message: ";
    fixture.assert_release_refused(&suite, &[framing, "it doesn't begin with the message's first line"]);

    let fixture = Fixture::new();
    fixture.change(&suite.in_release(), |bytes| signature(&bytes).0.into_bytes());
    fixture.assert_release_refused(&suite, &[framing, "it has no signature"]);

    let fixture = Fixture::new();
    fixture.change(&suite.in_release(), |mut bytes| {
        bytes.truncate(bytes.len() - 20);
        bytes.push(b'\n');
        bytes
    });
    fixture.assert_release_refused(&suite, &[framing]);

    let fixture = Fixture::new();
    let empty = "-----BEGIN PGP SIGNATURE-----\n\n-----END PGP SIGNATURE-----\n";
    fixture.change(&suite.in_release(), |bytes| (signature(&bytes).0 + empty).into_bytes());
    fixture.assert_release_refused(&suite, &[UNTRUSTED, "signed by nobody"]);
}

#[test]
fn text_around_the_signed_message_is_refused() {
    let suite = Suite::new(SECURITY);
    let fixture = Fixture::new();
    fixture.change(&suite.in_release(), |bytes| [b"Origin: Debian\n", &bytes[..]].concat());
    fixture.assert_release_refused(&suite, &["it doesn't begin with the message's first line"]);

    let fixture = Fixture::new();
    fixture.change(&suite.in_release(), |bytes| [&bytes[..], b"Codename: other\n"].concat());
    fixture.assert_release_refused(&suite, &["there is text after the signature"]);

    let fixture = Fixture::new();
    fixture.change(&suite.in_release(), |bytes| replace(bytes, "\n\n", "\nOrigin: Debian\n\n"));
    fixture.assert_release_refused(&suite, &["it has an armor header other than `Hash`"]);
}
