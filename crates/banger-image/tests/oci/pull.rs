//! The client against a registry that misbehaves.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use banger_image::oci::{OciError, OciImage, OciPull, Platform, RegistryConfig};
use tempfile::TempDir;

use crate::archive::{Archive, gzip};
use crate::readback;
use crate::registry::{Content, OCI_INDEX, OCI_MANIFEST, Registry, Response};

/// A place to pull to.
pub(crate) struct Place {
    pub(crate) dir: TempDir,
    pub(crate) config: RegistryConfig,
}

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = RegistryConfig { cache_dir: dir.path().join("cache"), ..RegistryConfig::default() };
        Self { dir, config }
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.dir.path().join("rootfs.ext4")
    }

    pub(crate) async fn pull(&self, reference: &str) -> Result<OciImage, OciError> {
        let platform: Platform = "linux/amd64".parse().unwrap();
        let pull = OciPull::resolve(&self.config, &reference.parse().unwrap(), &platform, &|_| {}).await?;
        pull.write_to(&self.rootfs(), &|_| {}).await
    }
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(&format!(": {cause}"));
        next = cause.source();
    }
    text
}

/// Two layers of everything simple.
pub(crate) fn sample() -> Content {
    let mut content = Content::default();
    let lower = Archive::new()
        .directory("etc")
        .file("etc/a", b"lower")
        .file("etc/gone", b"x")
        .symlink("lib", "usr/lib");
    let upper = Archive::new()
        .file("etc/a", b"upper")
        .file("etc/.wh.gone", b"")
        .file("lib/so", b"so")
        .file("sbin/init", b"i");
    content.image("latest", &[gzip(lower.end()), gzip(upper.end())]);
    content
}

#[tokio::test]
async fn an_image_becomes_a_filesystem() {
    let content = sample();
    let expected = String::from_utf8(content.manifests["latest"].1.clone()).unwrap();
    let registry = Registry::start(move |request| content.answer(request));
    let place = Place::new();
    let image = place.pull(&registry.reference("box")).await.unwrap();
    assert_eq!(image.digest, banger_image::oci::Digest::of(expected.as_bytes()));
    assert_eq!(image.init.as_deref(), Some("/sbin/init"));
    assert_eq!((image.config.workdir.as_deref(), image.config.user.as_deref()), (Some("/w"), Some("1:2")));
    assert_eq!(
        (&image.config.env[0][..], &image.config.entrypoint[0][..], image.config.cmd.len()),
        ("A=b", "/e", 0)
    );
    if !readback::have("debugfs") || !readback::have("e2fsck") {
        return;
    }
    readback::check(&place.rootfs());
    let tree = readback::read(&place.rootfs());
    let paths: Vec<String> = tree.keys().map(|path| path.escape_ascii().to_string()).collect();
    assert_eq!(
        paths,
        ["", "/etc", "/etc/a", "/lib", "/sbin", "/sbin/init", "/usr", "/usr/lib", "/usr/lib/so"]
    );
    assert_eq!(tree[&b"/etc/a"[..]].content, banger_image::oci::Digest::of(b"upper").to_string());
    // What is in the cache is not asked for again.
    let before = registry.log().len();
    std::fs::remove_file(place.rootfs()).unwrap();
    place.pull(&registry.reference("box")).await.unwrap();
    let again = registry.log().split_off(before);
    assert!(again.iter().all(|request| !request.path.contains("/blobs/")), "{again:?}");
}

fn status(code: u16) -> Response {
    Response::new(code, r#"{"errors": [{"message": "because\u001b[1m"}]}"#)
}

/// A digest of the other kind.
fn sha512(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    let hash = sha2::Sha512::digest(bytes);
    format!("sha512:{}", hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

#[tokio::test]
async fn digests_of_the_other_kind_are_computed_and_compared() {
    let (tar, stored) = gzip(Archive::new().file("a", b"content").end());
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [sha512(&tar)]}
    });
    let config = serde_json::to_vec(&config).unwrap();
    let descriptor = |bytes: &[u8], kind: &str| serde_json::json!({"mediaType": kind, "digest": sha512(bytes), "size": bytes.len()});
    let manifest = serde_json::json!({
        "schemaVersion": 2, "config": descriptor(&config, "application/vnd.oci.image.config.v1+json"),
        "layers": [descriptor(&stored, "application/vnd.oci.image.layer.v1.tar+gzip")],
    });
    let manifest = serde_json::to_vec(&manifest).unwrap();
    let digest = sha512(&manifest);
    let content = |damaged: &str| {
        let mut content = Content::default();
        let damage =
            |name: &str, bytes: &[u8]| if name == damaged { [bytes, b" "].concat() } else { bytes.to_vec() };
        // As long as it should be, so that the digest alone tells.
        let layer = if damaged == "layer" { vec![0x1f; stored.len()] } else { stored.clone() };
        content.manifests.insert(digest.clone(), (OCI_MANIFEST.to_owned(), damage("manifest", &manifest)));
        content.blobs.insert(sha512(&config), config.clone());
        content.blobs.insert(sha512(&stored), layer);
        content
    };
    for (damaged, reason) in [("", ""), ("manifest", "sha512:"), ("layer", "was tampered with or damaged")] {
        let content = content(damaged);
        let registry = Registry::start(move |request| content.answer(request));
        let place = Place::new();
        let pulled = place.pull(&format!("{}@{digest}", registry.reference("box"))).await;
        match pulled {
            Ok(image) if damaged.is_empty() => {
                assert_eq!(image.digest.to_string(), digest);
                assert_eq!(
                    image.blobs.iter().map(ToString::to_string).collect::<Vec<_>>(),
                    [sha512(&config), sha512(&stored)]
                );
                let cached = place.config.cache_dir.join("sha512").join(image.blobs[1].hex());
                assert!(image.blobs[1].is_of_file(&cached).unwrap());
            }
            Ok(_) => panic!("a damaged {damaged} was taken"),
            Err(error) => {
                let error = chain(&error);
                assert!(!damaged.is_empty() && error.contains(reason), "{damaged}: {error}");
                assert!(!place.rootfs().exists());
            }
        }
    }
}

#[tokio::test]
async fn an_index_leads_to_the_platform() {
    let mut content = sample();
    let amd64 = content.manifests["latest"].clone();
    let digest = banger_image::oci::Digest::of(&amd64.1).to_string();
    let entry = |digest: &str, platform: serde_json::Value| serde_json::json!({"mediaType": amd64.0, "digest": digest, "size": amd64.1.len(), "platform": platform});
    let nowhere = format!("sha256:{}", "0".repeat(64));
    let manifests = serde_json::json!([
        entry(&nowhere, serde_json::json!({"os": "linux", "architecture": "arm64", "variant": "v8"})),
        entry(&nowhere, serde_json::json!({"os": "unknown", "architecture": "unknown"})),
        entry(&nowhere, serde_json::json!({"os": "linux", "architecture": "amd64", "variant": "v3"})),
        entry(&digest, serde_json::json!({"os": "linux", "architecture": "amd64"})),
    ]);
    content.manifest("many", OCI_INDEX, &serde_json::json!({"schemaVersion": 2, "manifests": manifests}));
    let only_arm = serde_json::json!({"schemaVersion": 2, "manifests": [manifests[0]]});
    content.manifest("arm", OCI_INDEX, &only_arm);
    let mut deep = content.manifests["many"].1.clone();
    for _ in 0..6 {
        let inner = serde_json::json!([entry(
            &content.manifest("deep", OCI_INDEX, &serde_json::from_slice(&deep).unwrap()),
            serde_json::json!({"os": "linux", "architecture": "amd64"})
        )]);
        deep = serde_json::to_vec(&serde_json::json!({"schemaVersion": 2, "manifests": inner})).unwrap();
    }
    let registry = Registry::start(move |request| content.answer(request));
    let place = Place::new();
    assert_eq!(place.pull(&registry.reference("box:many")).await.unwrap().digest.to_string(), digest);
    let error = chain(&place.pull(&registry.reference("box:arm")).await.unwrap_err());
    assert!(error.contains("linux/amd64") && error.contains("linux/arm64/v8"), "{error}");
    let error = chain(&place.pull(&registry.reference("box:deep")).await.unwrap_err());
    assert!(error.contains("further indexes"), "{error}");
    let error = chain(&place.pull(&registry.reference("box:absent")).await.unwrap_err());
    assert!(error.contains("not in the registry"), "{error}");
}

fn write_config(place: &mut Place, json: &str) {
    std::fs::write(place.dir.path().join("config.json"), json).unwrap();
    place.config.auth_files = vec![place.dir.path().join("config.json")];
}

#[tokio::test]
async fn basic_credentials_are_sent_when_asked_for() {
    let content = sample();
    let registry = Registry::start(move |request| match request.header("authorization") {
        "Basic bWU6c2VjcmV0" => content.answer(request),
        _ => status(401).with("WWW-Authenticate", "Basic realm=\"x\""),
    });
    let mut place = Place::new();
    let error = chain(&place.pull(&registry.reference("box")).await.unwrap_err());
    assert!(error.contains("wants credentials"), "{error}");
    write_config(
        &mut place,
        &format!(r#"{{"auths": {{"{}": {{"auth": "bWU6c2VjcmV0"}}}}}}"#, registry.address),
    );
    place.pull(&registry.reference("box")).await.unwrap();
    let log = registry.log();
    assert!(log.iter().all(|request| request.path != "/v2/" || request.header("authorization").is_empty()));
    write_config(
        &mut place,
        &format!(r#"{{"auths": {{"{}": {{"auth": "bWU6d3Jvbmc="}}}}}}"#, registry.address),
    );
    std::fs::remove_file(place.rootfs()).unwrap();
    let error = chain(&place.pull(&registry.reference("box")).await.unwrap_err());
    assert!(error.contains("refused the credentials") && !error.contains("wrong"), "{error}");
}

#[tokio::test]
async fn a_token_is_fetched_and_renewed() {
    let content = sample();
    let calls = AtomicUsize::new(0);
    let registry = Registry::start(move |request| {
        let number = calls.fetch_add(1, Ordering::SeqCst);
        if request.path.starts_with("/token") {
            let wanted = "scope=repository%3Abox%3Apull&service=reg";
            assert!(request.path.ends_with(wanted), "{}", request.path);
            return Response::new(200, format!(r#"{{"token": "t{number}"}}"#));
        }
        // Every token is good for three requests.
        let token =
            request.header("authorization").strip_prefix("Bearer t").and_then(|n| n.parse::<usize>().ok());
        if token.is_some_and(|token| number <= token + 3) {
            return content.answer(request);
        }
        let realm = format!("http://{}/token", request.header("host"));
        let challenge = format!("Bearer realm=\"{realm}\",service=\"reg\",scope=\"repository:other:push\"");
        status(401).with("WWW-Authenticate", challenge)
    });
    let mut place = Place::new();
    write_config(
        &mut place,
        &format!(r#"{{"auths": {{"{}": {{"auth": "bWU6c2VjcmV0"}}}}}}"#, registry.address),
    );
    place.pull(&registry.reference("box")).await.unwrap();
    for request in registry.log() {
        let is_token = request.path.starts_with("/token");
        assert_eq!(request.header("authorization").starts_with("Basic "), is_token, "{request:?}");
    }
}

#[tokio::test]
async fn an_identity_token_is_exchanged() {
    let content = sample();
    let registry = Registry::start(move |request| {
        if request.path == "/token" {
            assert_eq!(request.method, "POST");
            assert!(request.body.contains("grant_type=refresh_token"), "{}", request.body);
            assert!(request.body.ends_with("refresh_token=a%2Fb"), "{}", request.body);
            return Response::new(200, r#"{"access_token": "good"}"#);
        }
        if request.header("authorization") == "Bearer good" {
            return content.answer(request);
        }
        status(401)
            .with("WWW-Authenticate", format!("Bearer realm=\"http://{}/token\"", request.header("host")))
    });
    let mut place = Place::new();
    write_config(
        &mut place,
        &format!(r#"{{"auths": {{"{}": {{"identitytoken": "a/b"}}}}}}"#, registry.address),
    );
    place.pull(&registry.reference("box")).await.unwrap();
}

#[tokio::test]
async fn a_foreign_token_service_is_not_asked() {
    let other = Registry::start(|_| Response::new(200, r#"{"token": "x"}"#));
    for realm in
        [format!("http://{}/token", other.address), "ftp://x/".to_owned(), "http://u:p@127.0.0.1/".to_owned()]
    {
        let registry = Registry::start(move |_| {
            status(401).with("WWW-Authenticate", format!("Bearer realm=\"{realm}\""))
        });
        let mut place = Place::new();
        write_config(
            &mut place,
            &format!(r#"{{"auths": {{"{}": {{"auth": "bWU6c2VjcmV0"}}}}}}"#, registry.address),
        );
        let error = chain(&place.pull(&registry.reference("box")).await.unwrap_err());
        assert!(error.contains("token service"), "{error}");
    }
    assert!(other.log().is_empty());
}

#[tokio::test]
async fn credentials_do_not_follow_a_redirect_elsewhere() {
    let content = sample();
    let there = content.clone();
    let storage = Registry::start(move |request| {
        let mut inner = request.clone();
        inner.path = inner.path.replace("/bucket", "/v2/box/blobs");
        there.answer(&inner)
    });
    let target = storage.address;
    let registry = Registry::start(move |request| {
        if request.header("authorization") != "Basic bWU6c2VjcmV0" {
            return status(401).with("WWW-Authenticate", "Basic");
        }
        match request.path.split_once("/blobs/") {
            Some((_, digest)) => {
                status(307).with("Location", format!("http://u:p@{target}/bucket/{digest}?signature=s"))
            }
            None => content.answer(request),
        }
    });
    let mut place = Place::new();
    write_config(
        &mut place,
        &format!(r#"{{"auths": {{"{}": {{"auth": "bWU6c2VjcmV0"}}}}}}"#, registry.address),
    );
    place.pull(&registry.reference("box")).await.unwrap();
    let log = storage.log();
    assert_eq!(log.len(), 3);
    assert!(log.iter().all(|request| request.header("authorization").is_empty()), "{log:?}");
}

#[tokio::test]
async fn a_redirect_without_end_or_to_nowhere_is_an_error() {
    let registry = Registry::start(|request| status(302).with("Location", format!("{}x", request.path)));
    let error = chain(&Place::new().pull(&registry.reference("box")).await.unwrap_err());
    assert!(error.contains("redirects"), "{error}");
    let registry = Registry::start(|_| status(302).with("Location", "file:///etc/passwd"));
    let error = chain(&Place::new().pull(&registry.reference("box")).await.unwrap_err());
    assert!(error.contains("no address of the web"), "{error}");
}

#[tokio::test]
async fn wrong_content_is_refused_and_not_kept() {
    type Change = fn(&mut Response);
    let changes: [(&str, Change); 3] = [
        ("tampered", |response| response.body[20] ^= 1),
        ("bytes long", |response| response.body.push(0)),
        ("bytes long", |response| response.body.truncate(response.body.len() - 1)),
    ];
    for (expected, change) in changes {
        let content = sample();
        let registry = Registry::start(move |request| {
            let mut response = content.answer(request);
            if request.path.contains("/blobs/") && response.body.starts_with(&[0x1f, 0x8b]) {
                change(&mut response);
            }
            if response.status == 206 {
                response.body.clear();
            }
            response
        });
        let place = Place::new();
        let error = chain(&place.pull(&registry.reference("box")).await.unwrap_err());
        assert!(error.contains(expected), "{error}");
        assert!(!place.rootfs().exists());
        let whole = std::fs::read_dir(place.config.cache_dir.join("sha256")).unwrap().count();
        assert_eq!(whole, 1, "only the configuration");
    }
    let content = sample();
    let registry = Registry::start(move |request| {
        let mut response = content.answer(request);
        if request.path.contains("/manifests/sha256") {
            response.body.push(b' ');
        }
        response
    });
    let reference = format!("box@{}", banger_image::oci::Digest::of(&sample().manifests["latest"].1));
    let error = chain(&Place::new().pull(&registry.reference(&reference)).await.unwrap_err());
    assert!(error.contains("has the digest"), "{error}");
}

#[tokio::test]
async fn a_broken_download_is_continued() {
    let mut content = Content::default();
    let noise: Vec<u8> = (0..300_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let tar = Archive::new().file("noise", &noise).end();
    content.image("latest", &[(tar.clone(), tar)]);
    let breaks = AtomicUsize::new(0);
    let registry = Registry::start(move |request| {
        let mut response = content.answer(request);
        if response.body.len() > 100_000 && breaks.fetch_add(1, Ordering::SeqCst) < 2 {
            response.cut = Some(100_000);
        }
        response
    });
    let place = Place::new();
    place.pull(&registry.reference("box")).await.unwrap();
    let ranges: Vec<String> =
        registry.log().iter().map(|r| r.header("range").to_owned()).filter(|r| !r.is_empty()).collect();
    assert_eq!(ranges.len(), 2, "{ranges:?}");
    let starts: Vec<usize> = ranges
        .iter()
        .map(|r| r.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap())
        .collect();
    assert!(starts[0] > 0 && starts[1] > starts[0], "{starts:?}");
}

#[tokio::test]
async fn what_an_earlier_process_left_is_continued_or_forgotten() {
    let content = sample();
    let layer = content.blobs.iter().find(|(_, bytes)| bytes.starts_with(&[0x1f, 0x8b])).unwrap();
    let (hex, bytes) = (layer.0.strip_prefix("sha256:").unwrap().to_owned(), layer.1.clone());
    for (left, ranged) in [(bytes[..50].to_vec(), true), (vec![0; 50], true), (vec![0; 100_000], false)] {
        let content = content.clone();
        let registry = Registry::start(move |request| content.answer(request));
        let place = Place::new();
        let partial = place.config.cache_dir.join("partial");
        std::fs::create_dir_all(&partial).unwrap();
        std::fs::write(partial.join(&hex), left).unwrap();
        place.pull(&registry.reference("box")).await.unwrap();
        assert_eq!(registry.log().iter().any(|request| request.header("range") == "bytes=50-"), ranged);
    }
}

#[tokio::test]
async fn a_damaged_cache_is_noticed() {
    let content = sample();
    let registry = Registry::start(move |request| content.answer(request));
    let place = Place::new();
    place.pull(&registry.reference("box")).await.unwrap();
    for entry in std::fs::read_dir(place.config.cache_dir.join("sha256")).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[30] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    std::fs::remove_file(place.rootfs()).unwrap();
    place.pull(&registry.reference("box")).await.unwrap();
}

#[tokio::test]
async fn a_busy_registry_is_asked_again() {
    let content = sample();
    let failures = AtomicUsize::new(0);
    let registry = Registry::start(move |request| {
        if request.path.contains("/manifests/") && failures.fetch_add(1, Ordering::SeqCst) < 2 {
            return status(503);
        }
        content.answer(request)
    });
    Place::new().pull(&registry.reference("box")).await.unwrap();
    let refusing = Registry::start(|request| if request.path == "/v2/" { status(200) } else { status(403) });
    let error = chain(&Place::new().pull(&refusing.reference("box")).await.unwrap_err());
    assert!(error.contains("403") && error.contains("because\\u{1b}"), "{error}");
    assert_eq!(refusing.log().iter().filter(|r| r.path.contains("/manifests/")).count(), 1);
}

#[tokio::test]
async fn a_mirror_comes_first_and_is_not_needed() {
    let content = sample();
    let upstream = Registry::start(move |request| content.answer(request));
    for works in [true, false] {
        let content = sample();
        let mirror =
            Registry::start(move |request| if works { content.answer(request) } else { status(500) });
        let mut place = Place::new();
        let host = place.config.hosts.entry(upstream.address.to_string()).or_default();
        host.mirrors = vec![format!("http://{}", mirror.address)];
        let before = upstream.log().len();
        place.pull(&upstream.reference("box")).await.unwrap();
        assert!(!mirror.log().is_empty());
        assert_eq!(upstream.log()[before..].iter().all(|r| r.path == "/v2/"), works);
    }
}

#[tokio::test]
async fn documents_that_are_no_images_say_what_they_are() {
    let blob =
        serde_json::json!({"mediaType": "x/y", "digest": format!("sha256:{}", "1".repeat(64)), "size": 5});
    let image =
        |layers: serde_json::Value| serde_json::json!({"schemaVersion": 2, "config": blob, "layers": layers});
    let mut said = String::new();
    for (json, expected) in [
        (serde_json::json!({"schemaVersion": 1}), "schema 1"),
        (serde_json::json!({"schemaVersion": 2}), "not an image"),
        (serde_json::json!([]), "not valid json"),
        (image(serde_json::json!([blob])), "can't be unpacked"),
        (image(serde_json::json!([{"digest": "sha256:../../x", "size": 1}])), "not valid json"),
        (
            serde_json::json!({"schemaVersion": 2, "config": blob, "layers": [], "manifests": []}),
            "not an image",
        ),
    ] {
        let mut content = Content::default();
        content.manifest("latest", "some/type", &json);
        let registry = Registry::start(move |request| content.answer(request));
        let reference = registry.reference("box");
        let error = chain(&Place::new().pull(&reference).await.unwrap_err());
        assert!(error.contains(expected), "{error}");
        said.push_str(&format!("{}\n", error.replace(&reference, "IMAGE")));
    }
    insta::assert_snapshot!(said);
    let registry = Registry::start(|_| Response::new(200, vec![b' '; 5 << 20]));
    let error = chain(&Place::new().pull(&registry.reference("box")).await.unwrap_err());
    assert!(error.contains("larger than"), "{error}");
}

/// Dropping the future ends the thread that writes, and the file goes with it.
#[tokio::test]
async fn a_cancelled_pull_leaves_nothing() {
    let content = sample();
    let registry = Registry::start(move |request| {
        if request.path.contains("/blobs/") && content.answer(request).body.starts_with(&[0x1f, 0x8b]) {
            std::thread::park_timeout(std::time::Duration::from_secs(5));
        }
        content.answer(request)
    });
    let place = Place::new();
    let reference = registry.reference("box");
    let pull = place.pull(&reference);
    assert!(tokio::time::timeout(std::time::Duration::from_millis(500), pull).await.is_err());
    for _ in 0..100 {
        if !place.rootfs().exists() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("the file is still there");
}

/// The helper is found on the path, which a process can only choose for another one: the test runs itself.
#[tokio::test]
async fn a_credential_helper_is_asked() {
    const INSIDE: &str = "BANGER_TEST_WITH_HELPER";
    if std::env::var_os(INSIDE).is_none() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("docker-credential-banger-test");
        let text = "#!/bin/sh\nread -r host\n[ \"$1\" = get ] || exit 3\ncase $host in 127.0.0.1:*)\n\
            echo '{\"ServerURL\": \"x\", \"Username\": \"me\", \"Secret\": \"secret\"}' ;;\n\
            *) echo 'credentials not found in native keychain'; exit 1 ;;\nesac\n";
        std::fs::write(&script, text).unwrap();
        std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
        let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "pull::a_credential_helper_is_asked"])
            .env("PATH", path)
            .env(INSIDE, "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        return;
    }
    let content = sample();
    let registry = Registry::start(move |request| match request.header("authorization") {
        "Basic bWU6c2VjcmV0" => content.answer(request),
        _ => status(401).with("WWW-Authenticate", "Basic realm=\"x\""),
    });
    let mut place = Place::new();
    write_config(&mut place, r#"{"credsStore": "banger-test"}"#);
    place.pull(&registry.reference("box")).await.unwrap();
    // What the helper doesn't know is pulled without credentials, here in vain.
    let elsewhere = format!("localhost:{}/box", registry.address.port());
    let error = chain(&place.pull(&elsewhere).await.unwrap_err());
    assert!(error.contains("wants credentials"), "{error}");
}
