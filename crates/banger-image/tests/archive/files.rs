//! The files that a Release file vouches for: indexes and packages, and what is kept of them.

use banger_image::debian::archive::RELEASE;
use banger_image::debian::deb::Deb;
use banger_image::kernel::KernelPull;

use crate::fixture::{Fixture, SECURITY, Suite, block_on, chain, is_empty, sha256};
use crate::server::Request;

/// Changes one bit in the middle.
fn damage(mut bytes: Vec<u8>) -> Vec<u8> {
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    bytes
}

fn truncate(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.len() - 7);
    bytes
}

fn extend(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.push(0);
    bytes
}

#[test]
fn an_honest_package_is_fetched_once() {
    let fixture = Fixture::new();
    let (package, path) = block_on(fixture.fetch("hello")).unwrap();
    let control = Deb::open(&path).unwrap().control().unwrap();
    assert!(control[0].data.starts_with(b"Package: hello\nVersion: 1.0-1+deb12u1\n"));
    assert_eq!(path, fixture.cache_path("sha256", &package.sha256));
    // Three indexes and the package.
    assert_eq!(fixture.cached("sha256").len(), 4);
    assert_eq!(fixture.cached("partial"), [""; 0]);

    fixture.server.take_log();
    assert_eq!(block_on(fixture.fetch("hello")).unwrap().1, path);
    assert!(fixture.server.take_log().iter().all(|request| request.path.ends_with("/InRelease")));
}

#[test]
fn an_index_that_is_not_the_listed_one_is_refused() {
    let suite = Suite::new(SECURITY);
    for (change, expected) in [
        (damage as fn(Vec<u8>) -> Vec<u8>, "was tampered with or damaged: its sha256 is "),
        (truncate, "bytes long"),
        (extend, "bytes long"),
    ] {
        let fixture = Fixture::new();
        let listed = sha256(&fixture.server.get(&suite.index()));
        fixture.change(&suite.index(), change);
        let error = chain(&block_on(fixture.load()).unwrap_err());
        let url = format!("could not fetch from the Debian archive: `{}` ", fixture.url(&suite.index()));
        assert!(error.starts_with(&url) && error.contains(expected), "{error}");
        assert!(!fixture.cached("sha256").contains(&listed));
        assert!(!fixture.cached("partial").contains(&listed));
    }
}

#[test]
fn a_package_that_is_not_the_listed_one_is_refused() {
    let suite = Suite::new(SECURITY);
    let path = suite.pool("hello");
    for change in [damage, truncate, extend] {
        let fixture = Fixture::new();
        let honest = fixture.server.get(&path);
        let (listed, size) = (sha256(&honest), honest.len());
        fixture.change(&path, change);
        let served = fixture.server.get(&path);
        let error = chain(&block_on(fixture.fetch("hello")).unwrap_err());
        let reason = if served.len() == size {
            let found = sha256(&served);
            format!("was tampered with or damaged: its sha256 is {found}, the signed index says {listed}")
        } else {
            format!("is not {size} bytes long")
        };
        let url = fixture.url(&path);
        assert_eq!(error, format!("could not fetch from the Debian archive: `{url}` {reason}"));
        // The three indexes are there, and nothing else.
        assert_eq!(fixture.cached("sha256").len(), 3);
        assert!(!fixture.cached("sha256").contains(&listed));
        assert_eq!(fixture.cached("partial"), [""; 0]);

        fixture.server.put(&path, honest);
        block_on(fixture.fetch("hello")).unwrap();
    }
}

#[test]
fn a_missing_package_names_the_address() {
    let fixture = Fixture::new();
    let path = Suite::new(SECURITY).pool("hello");
    fixture.server.remove(&path);
    let error = chain(&block_on(fixture.fetch("hello")).unwrap_err());
    let url = fixture.url(&path);
    assert!(
        error.ends_with(&format!("could not download `{url}`: the mirror answered 404 Not Found")),
        "{error}"
    );
    assert_eq!(fixture.cached("sha256").len(), 3);
    assert_eq!(fixture.cached("partial"), [""; 0]);
}

#[test]
fn a_broken_download_is_continued() {
    let fixture = Fixture::new();
    let path = Suite::new(SECURITY).pool("hello");
    fixture.server.cut(&path, 100);
    let (package, file) = block_on(fixture.fetch("hello")).unwrap();
    let asked: Vec<Request> =
        fixture.server.take_log().into_iter().filter(|request| request.path == path).collect();
    let request = |from| Request { path: path.clone(), from };
    assert_eq!(asked, [request(None), request(Some(100))]);
    assert_eq!(sha256(&std::fs::read(file).unwrap()), package.sha256);
    assert_eq!(fixture.cached("partial"), [""; 0]);
}

#[test]
fn a_broken_download_that_continues_as_another_file_is_refused() {
    let fixture = Fixture::new();
    let path = Suite::new(SECURITY).pool("hello");
    let listed = sha256(&fixture.server.get(&path));
    fixture.change(&path, damage);
    fixture.server.cut(&path, 100);
    let error = chain(&block_on(fixture.fetch("hello")).unwrap_err());
    assert!(error.contains("was tampered with or damaged"), "{error}");
    assert!(!fixture.cached("sha256").contains(&listed));
    assert_eq!(fixture.cached("partial"), [""; 0]);
}

#[test]
fn a_broken_release_file_is_asked_for_again() {
    let fixture = Fixture::new();
    let path = Suite::new(RELEASE).in_release();
    fixture.server.cut(&path, 200);
    block_on(fixture.load()).unwrap();
    let asked = fixture.server.take_log().into_iter().filter(|request| request.path == path);
    assert_eq!(asked.map(|request| request.from).collect::<Vec<_>>(), [None, None]);
}

#[test]
fn what_an_earlier_process_left_is_not_believed() {
    let honest = Fixture::new().server.get(&Suite::new(SECURITY).pool("hello"));
    let digest = sha256(&honest);
    // A wrong beginning, a wrong file of the right length, one that is too long, and a finished one that decayed.
    for (kind, left) in [
        ("partial", vec![1; 100]),
        ("partial", damage(honest.clone())),
        ("partial", extend(honest.clone())),
        ("sha256", damage(honest.clone())),
        ("sha256", truncate(honest.clone())),
    ] {
        let fixture = Fixture::new();
        let place = fixture.cache_path(kind, &digest);
        std::fs::create_dir_all(place.parent().unwrap()).unwrap();
        std::fs::write(&place, left).unwrap();
        let (package, file) = block_on(fixture.fetch("hello")).unwrap();
        assert_eq!(
            (package.sha256.as_str(), std::fs::read(file).unwrap()),
            (digest.as_str(), honest.clone())
        );
        assert_eq!(fixture.cached("partial"), [""; 0]);
    }
}

#[test]
fn a_kernel_is_found_and_one_that_was_tampered_with_is_not_unpacked() {
    let fixture = Fixture::new();
    let suite = Suite::new(RELEASE);
    let name = &suite.packages[1].2;
    let listed = sha256(&fixture.server.get(&suite.pool(name)));
    fixture.change(&suite.pool(name), damage);
    let dir = tempfile::tempdir().unwrap();
    let error = block_on(async {
        let pull = KernelPull::resolve(&fixture.config(), "generic-6.12", &|_| {}).await.unwrap();
        assert_eq!(pull.version(), "6.12.1-1");
        chain(&pull.write_to(dir.path(), &|_| {}).await.unwrap_err())
    });
    assert!(error.contains("was tampered with or damaged"), "{error}");
    assert!(is_empty(dir.path()));
    assert!(!fixture.cached("sha256").contains(&listed));
}
