//! Release files that are signed by the right key and refused nevertheless, and mirrors that aren't there.

use banger_image::debian::archive::{Archive, ArchiveConfig, RELEASE};

use crate::fixture::{DAY, Fixture, SECURITY, Suite, UPDATES, block_on, chain, format_date, now};

#[test]
fn a_replayed_release_file_is_refused() {
    let fixture = Fixture::new();
    let new = Suite::new(SECURITY);
    let old = Suite { date: new.date - 1, ..new.clone() };
    block_on(fixture.load()).unwrap();
    assert_eq!(fixture.accepted(SECURITY), Some(new.date));
    let cached = fixture.cached("sha256");

    let older = Suite { packages: vec![("hello".into(), "0.9-1", String::new())], ..old.clone() };
    fixture.publish(&older);
    fixture.server.take_log();
    let error = chain(&block_on(fixture.load()).unwrap_err());
    let expected = format!(
        "refused `{}`: the Release file of `bookworm-security` is of {}, older than the one of {} accepted before",
        fixture.url(&old.in_release()),
        format_date(old.date),
        format_date(new.date)
    );
    assert_eq!(error, expected);
    assert_eq!(fixture.cached("sha256"), cached);
    assert!(fixture.server.take_log().iter().all(|request| request.path.ends_with("/InRelease")));
    assert_eq!(fixture.accepted(SECURITY), Some(new.date));

    fixture.publish(&new);
    block_on(fixture.load()).unwrap();
}

#[test]
fn another_origin_is_refused() {
    let fixture = Fixture::new();
    let suite = Suite { origin: "Vendor", ..Suite::new(RELEASE) };
    fixture.publish(&suite);
    let text = "the Release file of `bookworm` says `Origin: Vendor`, expected `Debian`";
    fixture.assert_release_refused(&suite, &[text]);
    assert_eq!(fixture.accepted(RELEASE), None);
}

#[test]
fn another_suite_is_refused() {
    // What a mirror would do to hold back security fixes: the honest file of another suite in the place of theirs.
    let fixture = Fixture::new();
    let (updates, fixes) = (Suite::new(UPDATES), Suite::new(SECURITY));
    fixture.server.put(&fixes.in_release(), fixture.server.get(&updates.in_release()));
    let text = "the Release file of `bookworm-security` says `Codename: bookworm-updates`, expected `bookworm-security`";
    fixture.assert_release_refused(&fixes, &[text]);

    let fixture = Fixture::new();
    let suite = Suite { codename: "trixie", ..Suite::new(RELEASE) };
    fixture.publish(&suite);
    let text = "the Release file of `bookworm` says `Codename: trixie`, expected `bookworm`";
    fixture.assert_release_refused(&suite, &[text]);
}

#[test]
fn an_expired_release_file_is_refused_unless_apt_accepts_it() {
    let fixture = Fixture::new();
    let suite = Suite { date: now() - 9 * DAY, valid_until: now() - 60, ..Suite::new(UPDATES) };
    fixture.publish(&suite);
    let text =
        format!("the Release file of `bookworm-updates` expired on {}", format_date(suite.valid_until));
    fixture.assert_release_refused(&suite, &[&text]);
    assert_eq!(fixture.accepted(UPDATES), None);

    fixture.write("etc/apt/apt.conf.d/50frozen", b"Acquire::Check-Valid-Until \"false\";\n");
    block_on(fixture.load()).unwrap();
}

#[test]
fn a_missing_release_file_names_the_address() {
    let fixture = Fixture::new();
    let suite = Suite::new(UPDATES);
    fixture.server.remove(&suite.in_release());
    let error = chain(&block_on(fixture.load()).unwrap_err());
    let url = fixture.url(&suite.in_release());
    assert_eq!(
        error,
        format!(
            "could not fetch from the Debian archive: could not download `{url}`: the mirror answered 404 Not Found"
        )
    );
    assert_eq!(fixture.cached("sha256"), [""; 0]);
}

#[test]
fn the_next_mirror_is_asked_when_the_first_is_refused() {
    let (bad, good) = (Fixture::new(), Fixture::new());
    let sources =
        format!("deb {} bookworm main\ndeb {} bookworm main\n", bad.url("/debian"), good.url("/debian"));
    good.write("etc/apt/sources.list", sources.as_bytes());
    // The first archive is signed with a key this host doesn't know.
    let (_, bases) = block_on(good.load()).unwrap();
    assert_eq!((bases.main, bases.security), (good.url("/debian"), good.url("/debian-security")));
}

#[test]
fn a_configured_mirror_is_verified_like_any_other() {
    let (other, fixture) = (Fixture::new(), Fixture::new());
    let config = ArchiveConfig { mirror: Some(other.url("/debian")), ..fixture.config() };
    let archive = Archive::open(&config).unwrap();
    let error = chain(&block_on(archive.load(&|_| {})).unwrap_err());
    assert!(error.contains("no good signature by a trusted Debian archive key"), "{error}");
    assert!(fixture.server.take_log().is_empty());
}

#[test]
fn without_a_mirror_the_error_says_how_to_name_one() {
    let fixture = Fixture::new();
    fixture.write("etc/apt/sources.list", b"# nothing\ndeb http://vendor.example/apt stable vendor\n");
    let error = chain(&Archive::open(&fixture.config()).unwrap_err());
    assert!(error.starts_with("no Debian mirror to fetch from: no Debian mirror is known"), "{error}");
    assert!(error.contains("BANGER_DEBIAN_MIRROR") && error.contains("`debian_mirror`"), "{error}");
    assert!(fixture.server.take_log().is_empty());
}
