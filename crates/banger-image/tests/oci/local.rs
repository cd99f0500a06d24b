//! Images in directories and archives, whole and hostile.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use banger_image::oci::{Archive, Digest, Limits, LocalError, LocalImage, Platform, SpoolError};
use serde_json::{Value, json};

use crate::archive::{self, Header, gzip};
use crate::pull::{chain, sample};
use crate::readback;
use crate::registry::{Content, OCI_INDEX, OCI_MANIFEST};

/// The files of an image in an archive or directory, by name.
type Files = BTreeMap<String, Vec<u8>>;

fn platform() -> Platform {
    "linux/amd64".parse().unwrap()
}

fn hex(digest: &str) -> &str {
    digest.strip_prefix("sha256:").unwrap()
}

/// An OCI layout of everything in a registry, with the given manifests in its index.
fn layout(content: &Content, manifests: &Value) -> Files {
    let documents = content.manifests.values().map(|(_, bytes)| bytes);
    let mut files: Files = documents
        .chain(content.blobs.values())
        .map(|bytes| (format!("blobs/sha256/{}", hex(&Digest::of(bytes).to_string())), bytes.clone()))
        .collect();
    let index = json!({"schemaVersion": 2, "manifests": manifests});
    files.insert("index.json".to_owned(), index.to_string().into_bytes());
    files.insert("oci-layout".to_owned(), br#"{"imageLayoutVersion": "1.0.0"}"#.to_vec());
    files
}

/// How an index names the manifest that a registry has under a tag.
fn entry(content: &Content, tag: &str, name: Option<&str>) -> Value {
    let (media_type, bytes) = &content.manifests[tag];
    let mut entry =
        json!({"mediaType": media_type, "digest": Digest::of(bytes).to_string(), "size": bytes.len()});
    if let Some(name) = name {
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": name});
    }
    entry
}

fn sample_layout(name: Option<&str>) -> Files {
    let content = sample();
    let entry = entry(&content, "latest", name);
    layout(&content, &json!([entry]))
}

/// What `docker save` writes of an image.
fn saved(content: &Content, names: &[&str]) -> Files {
    let manifest: Value = serde_json::from_slice(&content.manifests["latest"].1).unwrap();
    let config = manifest["config"]["digest"].as_str().unwrap();
    let mut files = Files::new();
    files.insert(format!("{}.json", hex(config)), content.blobs[config].clone());
    let mut layers = Vec::new();
    for layer in manifest["layers"].as_array().unwrap() {
        let digest = layer["digest"].as_str().unwrap();
        let name = format!("{}/layer.tar", hex(digest));
        files.insert(name.clone(), content.blobs[digest].clone());
        layers.push(name);
    }
    let list = json!([{"Config": format!("{}.json", hex(config)), "RepoTags": names, "Layers": layers}]);
    files.insert("manifest.json".to_owned(), list.to_string().into_bytes());
    files
}

fn write_dir(dir: &Path, files: &Files) {
    for (name, bytes) in files {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

fn tar(files: &Files) -> archive::Archive {
    files.iter().fold(archive::Archive::new().directory("blobs"), |tar, (name, bytes)| tar.file(name, bytes))
}

fn spool(bytes: &[u8], dir: &Path, limits: &Limits) -> Result<Archive, SpoolError> {
    Archive::spool(&mut &bytes[..], dir, limits, &AtomicBool::new(false))
}

/// Puts an archive aside and finds its images; the error is whole.
fn load(bytes: &[u8], wanted: Option<&str>) -> Result<(Vec<LocalImage>, tempfile::TempDir), String> {
    let dir = tempfile::tempdir().unwrap();
    let archive = spool(bytes, dir.path(), &Limits::default()).map_err(|error| chain(&error))?;
    let images = LocalImage::in_archive(&archive, wanted, &platform(), &Limits::default());
    Ok((images.map_err(|error| chain(&error))?, dir))
}

fn load_error(bytes: &[u8], wanted: Option<&str>) -> String {
    load(bytes, wanted).map(|(images, _)| images).unwrap_err()
}

async fn check_sample(image: &LocalImage) {
    let dir = tempfile::tempdir().unwrap();
    let rootfs = dir.path().join("rootfs.ext4");
    let written = image.write_to(&rootfs).await.unwrap();
    assert_eq!(written.init.as_deref(), Some("/sbin/init"));
    assert_eq!(written.config.entrypoint, ["/e"]);
    if readback::have("debugfs") && readback::have("e2fsck") {
        readback::check(&rootfs);
        let tree = readback::read(&rootfs);
        assert_eq!(tree[&b"/etc/a"[..]].content, Digest::of(b"upper").to_string());
        assert!(!tree.contains_key(&b"/etc/gone"[..]));
    }
}

#[tokio::test]
async fn a_layout_becomes_a_filesystem() {
    let dir = tempfile::tempdir().unwrap();
    write_dir(dir.path(), &sample_layout(Some("stable")));
    for tag in [None, Some("stable")] {
        let image = LocalImage::in_layout(dir.path(), tag, &platform(), &Limits::default()).unwrap();
        assert_eq!(image.digest(), &Digest::of(&sample().manifests["latest"].1));
        assert!(image.names().is_empty(), "a tag alone is no name");
        check_sample(&image).await;
    }
}

#[tokio::test]
async fn archives_of_every_kind_are_the_same_image() {
    let named = "registry.example/box:1";
    let zstd = |tar: &[u8]| zstd::encode_all(tar, 1).unwrap();
    for files in [sample_layout(Some(named)), saved(&sample(), &[named])] {
        let plain = tar(&files).end();
        for bytes in [plain.clone(), gzip(plain.clone()).1, zstd(&plain)] {
            for wanted in [None, Some(named), Some("1")] {
                let (images, _dir) = load(&bytes, wanted).unwrap();
                assert_eq!(images.len(), 1);
                assert_eq!(images[0].names()[0].to_string(), named);
                check_sample(&images[0]).await;
            }
        }
    }
}

#[tokio::test]
async fn a_shared_layer_may_be_a_link() {
    let mut files = saved(&sample(), &["box:1"]);
    let name = files.keys().find(|name| name.ends_with("/layer.tar")).unwrap().clone();
    let layer = files.remove(&name).unwrap();
    files.insert("shared/layer.tar".to_owned(), layer);
    let bytes = tar(&files).symlink(&name, "../shared/layer.tar").end();
    let (images, _dir) = load(&bytes, None).unwrap();
    check_sample(&images[0]).await;
}

#[test]
fn an_image_is_chosen_by_name_and_platform() {
    let mut content = sample();
    content.image("other", &[gzip(archive::Archive::new().file("x", b"y").end())]);
    let mut arm = entry(&content, "latest", Some("a"));
    arm["platform"] = json!({"os": "linux", "architecture": "arm64"});
    let mut amd = entry(&content, "other", Some("a"));
    amd["platform"] = json!({"os": "linux", "architecture": "amd64"});
    let (b, none) = (entry(&content, "latest", Some("b\u{1b}")), entry(&content, "latest", None));
    let dir = tempfile::tempdir().unwrap();
    write_dir(dir.path(), &layout(&content, &json!([arm, amd, b, none])));
    let find = |tag| LocalImage::in_layout(dir.path(), tag, &platform(), &Limits::default());
    assert_eq!(find(Some("a")).unwrap().digest(), &Digest::of(&content.manifests["other"].1));
    let text = |error: LocalError| chain(&error);
    assert_eq!(
        text(find(None).unwrap_err()),
        "there are several images in it: `a`, `b\\u{1b}`, one without a name"
    );
    assert_eq!(
        text(find(Some("c")).unwrap_err()),
        "there is no image `c` in it, only `a`, `b\\u{1b}`, one without a name"
    );
}

/// A layout with one thing about it changed, and what is said of it.
#[test]
fn a_directory_that_is_not_there_is_said_to_be_so() {
    let dir = tempfile::tempdir().unwrap();
    let find =
        |dir: &Path| chain(&LocalImage::in_layout(dir, None, &platform(), &Limits::default()).unwrap_err());
    let none = dir.path().join("none");
    let expected = format!("could not read `{}`: No such file or directory (os error 2)", none.display());
    assert_eq!(find(&none), expected);
    assert!(find(dir.path()).starts_with("there is no image in it"), "{}", find(dir.path()));
}

#[test]
fn a_layout_that_lies_is_refused() {
    let content = sample();
    let manifest_digest = Digest::of(&content.manifests["latest"].1).to_string();
    let manifest: Value = serde_json::from_slice(&content.manifests["latest"].1).unwrap();
    let layer = manifest["layers"][0]["digest"].as_str().unwrap().to_owned();
    let config = manifest["config"]["digest"].as_str().unwrap().to_owned();
    let path = |digest: &str| format!("blobs/sha256/{}", hex(digest));
    let damaged = |digest: &str| {
        let mut files = sample_layout(None);
        files.get_mut(&path(digest)).unwrap()[12] ^= 1;
        let found = Digest::of(&files[&path(digest)]);
        let text = format!("blob {digest} was tampered with or damaged: its sha256 is {}", found.hex());
        (files, text)
    };
    let without = |digest: &str, what: &str| {
        let mut files = sample_layout(None);
        files.remove(&path(digest));
        (files, format!("`{}` is missing, which is {what}", path(digest)))
    };
    let longer = |digest: &str| {
        let mut files = sample_layout(None);
        let bytes = files.get_mut(&path(digest)).unwrap();
        let was = bytes.len();
        bytes.push(0);
        (files, format!("blob {digest} is {} bytes long, but {was} where it is named", was + 1))
    };
    let index = |index: &str| {
        let mut files = sample_layout(None);
        files.insert("index.json".to_owned(), index.as_bytes().to_vec());
        files
    };
    let huge = |size: u64| {
        let mut entry = entry(&content, "latest", None);
        entry["size"] = json!(size);
        layout(&content, &json!([entry]))
    };
    let nothing =
        "there is no image in it: neither `index.json` of an OCI layout nor `manifest.json` of `docker save`";
    let many: Vec<Value> = (0..65).map(|n| entry(&content, "latest", Some(&format!("n{n}")))).collect();
    let cases: Vec<(Files, String)> = vec![
        damaged(&layer),
        damaged(&config),
        damaged(&manifest_digest),
        without(&layer, "a layer"),
        without(&config, "an image's configuration"),
        without(&manifest_digest, "a manifest"),
        longer(&layer),
        longer(&config),
        (Files::new(), nothing.to_owned()),
        (layout(&content, &json!([])), nothing.to_owned()),
        (
            index("{\"schemaVersion\": 2"),
            "could not use the image's manifest: the manifest is not valid json of its kind: \
             EOF while parsing an object at line 1 column 19"
                .to_owned(),
        ),
        (
            index(r#"{"manifests": [{"digest": "sha256:../../../etc/passwd", "size": 1}]}"#),
            "could not use the image's manifest: the manifest is not valid json of its kind: \
             `sha256:../../../etc/passwd` is not a digest: `sha256:` and 64 lower-case hex digits, or `sha512:` and 128 \
             at line 1 column 54"
                .to_owned(),
        ),
        (
            huge(5 << 20),
            format!("`{}` is larger than the 4194304 bytes allowed", path(&manifest_digest)),
        ),
        (layout(&content, &json!(many)), "there are 65 images in it, more than the 64 allowed".to_owned()),
        (index(&" ".repeat((4 << 20) + 1)), "`index.json` is larger than the 4194304 bytes allowed".to_owned()),
        (
            sample_layout(Some("../../x:y")),
            "an image's name can't be used: `../../x:y` is not an image reference: the registry is not a host name \
             with an optional port"
                .to_owned(),
        ),
    ];
    for (files, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        write_dir(dir.path(), &files);
        let error = LocalImage::in_layout(dir.path(), None, &platform(), &Limits::default()).unwrap_err();
        assert_eq!(chain(&error), expected, "in a directory");
        assert_eq!(load_error(&tar(&files).end(), None), expected, "in an archive");
    }
}

#[test]
fn indexes_do_not_lead_on_for_ever() {
    let mut content = sample();
    let mut inner = entry(&content, "latest", None);
    for depth in 0..6 {
        let tag = format!("deep{depth}");
        content.manifest(&tag, OCI_INDEX, &json!({"schemaVersion": 2, "manifests": [inner]}));
        inner = entry(&content, &tag, None);
    }
    let error = load_error(&tar(&layout(&content, &json!([inner]))).end(), None);
    assert_eq!(
        error,
        "could not use the image's manifest: the index leads to further indexes, more than 4 deep"
    );
    // A manifest can't hold its own digest, so a circle is one that is damaged somewhere.
    let circle = format!("sha256:{}", "ab".repeat(32));
    let body =
        json!({"schemaVersion": 2, "manifests": [{"digest": circle, "size": 300, "mediaType": OCI_INDEX}]});
    let mut files = layout(&sample(), &body["manifests"]);
    let mut body = body.to_string().into_bytes();
    body.resize(300, b' ');
    let found = Digest::of(&body);
    files.insert(format!("blobs/sha256/{}", hex(&circle)), body);
    assert_eq!(
        load_error(&tar(&files).end(), None),
        format!("blob {circle} was tampered with or damaged: its sha256 is {}", found.hex())
    );
}

#[test]
fn an_image_of_another_platform_or_shape_is_refused() {
    let mut content = Content::default();
    let layer = gzip(archive::Archive::new().file("x", b"y").end());
    content.image("latest", &[layer]);
    let mut manifest: Value = serde_json::from_slice(&content.manifests["latest"].1).unwrap();
    let mut config: Value =
        serde_json::from_slice(&content.blobs[manifest["config"]["digest"].as_str().unwrap()]).unwrap();
    let mut error = |content: &mut Content, config: &Value| {
        let bytes = config.to_string().into_bytes();
        manifest["config"]["size"] = json!(bytes.len());
        manifest["config"]["digest"] = json!(content.blob(bytes));
        content.manifest("latest", OCI_MANIFEST, &manifest);
        let entry = entry(content, "latest", None);
        load_error(&tar(&layout(content, &json!([entry]))).end(), None)
    };
    config["architecture"] = json!("s390x");
    assert_eq!(
        error(&mut content, &config),
        "could not use the image's manifest: there is no image for linux/amd64, only for linux/s390x"
    );
    config["architecture"] = json!("amd64");
    config["rootfs"]["diff_ids"] = json!([]);
    assert_eq!(
        error(&mut content, &config),
        "could not use the image's manifest: the manifest has 1 layers, the configuration 0"
    );
}

#[test]
fn what_docker_saved_must_fit_together() {
    let list = |json: &str| {
        let mut files = saved(&sample(), &["box:1"]);
        files.insert("manifest.json".to_owned(), json.as_bytes().to_vec());
        files
    };
    for (files, expected) in [
        (
            list("{}"),
            "`manifest.json` is not what `docker save` writes: invalid type: map, expected a sequence at line 1 \
             column 0",
        ),
        (
            list(r#"[{"Config": "../../etc/shadow", "Layers": []}]"#),
            "`../../etc/shadow` is missing, which is an image's configuration",
        ),
        (
            list(r#"[{"Config": "/etc/shadow", "Layers": []}]"#),
            "`/etc/shadow` is missing, which is an image's configuration",
        ),
        (
            list("[]"),
            "there is no image in it: neither `index.json` of an OCI layout nor `manifest.json` of `docker save`",
        ),
        (
            saved(&sample(), &["a b"]),
            "an image's name can't be used: `a b` is not an image reference: the name must be lower-case letters \
             and digits, with `.`, `_`, `-` and `/` between them",
        ),
    ] {
        assert_eq!(load_error(&tar(&files).end(), None), expected);
    }
    assert_eq!(
        load_error(&tar(&saved(&sample(), &["box:1"])).end(), Some("box:2")),
        "there is no image `box:2` in it, only `box:1`"
    );
}

#[tokio::test]
async fn a_layer_that_is_not_what_the_configuration_says_is_refused() {
    let mut files = saved(&sample(), &["box:1"]);
    let other = archive::Archive::new().file("etc/evil", b"x").end();
    let name = files.keys().find(|name| name.ends_with("/layer.tar")).unwrap().clone();
    files.insert(name, other.clone());
    let (images, dir) = load(&tar(&files).end(), None).unwrap();
    let rootfs = dir.path().join("rootfs.ext4");
    let error = chain(&images[0].write_to(&rootfs).await.unwrap_err());
    let found = Digest::of(&other);
    assert!(
        error.starts_with(&format!(
            "could not unpack the image: layer {found} unpacks to {found}, but the image's "
        )),
        "{error}"
    );
    assert!(!rootfs.exists());
}

#[test]
fn archives_with_what_no_image_has_are_refused() {
    let new = archive::Archive::new;
    let cut = |mut bytes: Vec<u8>, at: usize| {
        bytes.truncate(at);
        bytes
    };
    let header = |name: &'static [u8], kind| Header { name, kind, ..Header::default() };
    for (bytes, expected) in [
        (
            new().file("../../etc/cron.d/x", b"x").end(),
            "damaged archive: entry `../../etc/cron.d/x`: \
             a path contains `..`",
        ),
        (
            new().file("a/../../x", b"x").end(),
            "damaged archive: entry `a/../../x`: \
             a path contains `..`",
        ),
        (
            new().symlink("layer.tar", "../../../etc/shadow").end(),
            "entry `layer.tar` of the archive can't be used: its link leads out of the archive",
        ),
        (
            new().symlink("layer.tar", "/etc/shadow").end(),
            "entry `layer.tar` of the archive can't be used: its link leads out of the archive",
        ),
        (
            new().file("x", b"").hard_link("y", "x").end(),
            "entry `y` of the archive can't be used: it is neither a file, a directory nor a symbolic link",
        ),
        (
            new().add(header(b"null", b'3'), b"").end(),
            "entry `null` of the archive can't be used: it is neither a file, a directory nor a symbolic link",
        ),
        (
            new().file("manifest.json", b"[]").file("./manifest.json", b"{}").end(),
            "entry `manifest.json` of the archive can't be used: it is there twice",
        ),
        (
            new().add(header(b"\xff\x1b[2J", b'0'), b"").end(),
            "entry `\\xff\\x1b[2J` of the archive can't be used: its name is not UTF-8",
        ),
        (
            cut(new().file("x", &[1; 5000]).end(), 3000),
            "could not read the archive: the archive is truncated",
        ),
        (
            cut(gzip(new().file("x", &[1; 5000]).end()).1, 40),
            "could not read the archive: incomplete deflate stream",
        ),
        (
            b"this is no archive at all, and long enough to be one".repeat(30),
            "damaged archive: a header has a number that can't be read",
        ),
        (
            new().end(),
            "there is no image in it: neither `index.json` of an OCI layout nor `manifest.json` of `docker save`",
        ),
        (
            Vec::new(),
            "there is no image in it: neither `index.json` of an OCI layout nor `manifest.json` of `docker save`",
        ),
        (
            new().file("repositories", b"{}").end(),
            "there is no image in it: neither `index.json` of an OCI layout nor `manifest.json` of `docker save`",
        ),
    ] {
        assert_eq!(load_error(&bytes, None), expected);
    }
}

#[test]
fn an_archive_is_bounded() {
    let limits = Limits { unpacked_bytes: 100_000, ratio: 20, ratio_free_bytes: 50_000, ..Limits::default() };
    let dir = tempfile::tempdir().unwrap();
    let error = |bytes: &[u8]| {
        let dir = tempfile::tempdir_in(&dir).unwrap();
        chain(&spool(bytes, dir.path(), &limits).unwrap_err())
    };
    let noise: Vec<u8> = (0..200_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    assert_eq!(
        error(&archive::Archive::new().file("x", &noise).end()),
        "could not read the archive: \
         the image unpacks to more than the 100000 bytes allowed"
    );
    let bomb = gzip(archive::Archive::new().file("y", &[0; 90_000]).end()).1;
    let text = error(&bomb);
    assert!(text.ends_with("bytes, as no real one does") && text.contains("more than 20 times"), "{text}");
    let mut many = archive::Archive::new();
    for n in 0..=20_000 {
        many = many.symlink(&format!("l{n}"), "x");
    }
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(
        chain(&spool(&many.end(), dir.path(), &Limits::default()).unwrap_err()),
        "the archive has more than 20000 entries"
    );
    let cancelled = AtomicBool::new(true);
    let bytes = tar(&sample_layout(None)).end();
    let error = Archive::spool(&mut &bytes[..], dir.path(), &Limits::default(), &cancelled).unwrap_err();
    assert!(chain(&error).ends_with("interrupted"), "{}", chain(&error));
}

#[test]
fn what_is_no_regular_file_is_not_opened() {
    let dir = tempfile::tempdir().unwrap();
    let made = std::process::Command::new("mkfifo").arg(dir.path().join("index.json")).status().unwrap();
    assert!(made.success());
    let error = LocalImage::in_layout(dir.path(), None, &platform(), &Limits::default()).unwrap_err();
    assert_eq!(chain(&error), "could not read `index.json`: it is not a regular file");
    let mut file = std::fs::File::create(dir.path().join("file")).unwrap();
    file.write_all(b"x").unwrap();
    let error =
        LocalImage::in_layout(&dir.path().join("file"), None, &platform(), &Limits::default()).unwrap_err();
    assert!(chain(&error).starts_with("could not read `index.json`: Not a directory"), "{}", chain(&error));
}
