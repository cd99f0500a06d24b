//! Firecracker's release from a server on a loopback port: an honest one, and the ways it can fail to be one.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "a test")]

use banger_image::firecracker::{FirecrackerError, Release};
use banger_image::progress::Progress;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Mutex;

const ARCHIVE: &str = "/v9.8.7/firecracker-v9.8.7-x86_64.tgz";
const MEMBER: &str = "release-v9.8.7-x86_64/firecracker-v9.8.7-x86_64";
const JAILER: &str = "release-v9.8.7-x86_64/jailer-v9.8.7-x86_64";

/// Serves whole answers by path until the test ends; its address is returned.
fn serve(answers: BTreeMap<String, Vec<u8>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            answer(&stream.unwrap(), &answers);
        }
    });
    format!("http://{address}")
}

fn answer(mut stream: &TcpStream, answers: &BTreeMap<String, Vec<u8>>) {
    let lines: Vec<String> =
        BufReader::new(stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
    let path = lines[0].split(' ').nth(1).unwrap();
    let missing = b"HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".to_vec();
    // A client that has seen enough closes early.
    let _ = stream.write_all(answers.get(path).unwrap_or(&missing));
}

fn ok(body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

/// A gzipped tar of plain files.
fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    for (name, bytes) in files {
        let mut header = [0; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0000755");
        header[108..115].copy_from_slice(b"0000000");
        header[116..123].copy_from_slice(b"0000000");
        header[124..135].copy_from_slice(format!("{:011o}", bytes.len()).as_bytes());
        header[136..147].copy_from_slice(b"00000000000");
        header[148..156].copy_from_slice(b"        ");
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        gzip.write_all(&header).unwrap();
        gzip.write_all(bytes).unwrap();
        gzip.write_all(&vec![0; bytes.len().next_multiple_of(512) - bytes.len()]).unwrap();
    }
    gzip.write_all(&[0; 1024]).unwrap();
    gzip.finish().unwrap()
}

fn good() -> Vec<u8> {
    archive(&[
        ("release-v9.8.7-x86_64/README", b"read me"),
        (MEMBER, b"the monitor"),
        (JAILER, b"the jailer"),
        ("firecracker", b"not this one"),
        ("/release-v9.8.7-x86_64/firecracker", b"nor this"),
    ])
}

/// Installs from a server with these answers an archive that must have the digest of `expected`.
fn install(
    answers: &[(&str, Vec<u8>)],
    expected: &[u8],
    dir: &Path,
    seen: &Mutex<Vec<Progress>>,
) -> Result<(), FirecrackerError> {
    let server = serve(answers.iter().map(|(path, bytes)| ((*path).to_owned(), bytes.clone())).collect());
    let digest: String = Sha256::digest(expected).iter().map(|byte| format!("{byte:02x}")).collect();
    let release = Release::new(Some("9.8.7"), "x86_64", Some(&digest), Some(&server)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(release.install(dir, &|progress| seen.lock().unwrap().push(progress)))
}

/// Everything below a directory, with contents.
fn tree(dir: &Path) -> Vec<(String, String)> {
    let mut files: Vec<(String, String)> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, String::from_utf8(std::fs::read(path).unwrap()).unwrap())
        })
        .collect();
    files.sort();
    files
}

/// What an install that has to fail says, its server's address replaced; what was installed before is still there.
fn refused(answers: &[(&str, Vec<u8>)], expected: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let bin = dir.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    std::fs::write(bin.join("firecracker"), "the old one").unwrap();
    let error = install(answers, expected, &bin, &Mutex::default()).unwrap_err();
    assert_eq!(tree(&bin), [("firecracker".to_owned(), "the old one".to_owned())]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing beside it");
    let text = error.to_string();
    let Some((before, after)) = text.split_once("http://127.0.0.1:") else { return text };
    format!("{before}http://SERVER{}", after.trim_start_matches(|c: char| c.is_ascii_digit()))
}

#[test]
fn a_release_is_unpacked_and_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let bin = dir.path().join("share/banger/bin");
    let seen = Mutex::default();
    install(&[(ARCHIVE, ok(&good()))], &good(), &bin, &seen).unwrap();
    let expected = [("firecracker", "the monitor"), ("jailer", "the jailer")];
    assert_eq!(tree(&bin), expected.map(|(name, text)| (name.to_owned(), text.to_owned())));
    for name in ["firecracker", "jailer"] {
        let mode = std::fs::metadata(bin.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o755);
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing outside");
    let seen = seen.into_inner().unwrap();
    let total = good().len() as u64;
    assert_eq!(seen.first(), Some(&Progress::Step { label: "download Firecracker 9.8.7".to_owned() }));
    assert_eq!(seen.last(), Some(&Progress::Bytes { done: total, total: Some(total) }));
}

#[test]
fn installing_again_replaces_what_runs() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("firecracker"), "the old one").unwrap();
    let running = std::fs::File::open(dir.path().join("firecracker")).unwrap();
    install(&[(ARCHIVE, ok(&good()))], &good(), dir.path(), &Mutex::default()).unwrap();
    assert_eq!(std::io::read_to_string(running).unwrap(), "the old one");
    assert_eq!(tree(dir.path())[0].1, "the monitor");
}

#[test]
fn redirects_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    let there =
        "HTTP/1.1 302 Found\r\nConnection: close\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n";
    let answers = [(ARCHIVE, there.as_bytes().to_vec()), ("/elsewhere", ok(&good()))];
    install(&answers, &good(), dir.path(), &Mutex::default()).unwrap();
    assert_eq!(tree(dir.path()).len(), 2);
}

#[test]
fn a_redirect_in_circles_ends() {
    let there = format!(
        "HTTP/1.1 302 Found\r\nConnection: close\r\nLocation: {ARCHIVE}\r\nContent-Length: 0\r\n\r\n"
    );
    let text = refused(&[(ARCHIVE, there.into_bytes())], &good());
    assert_eq!(text, format!("could not download `http://SERVER{ARCHIVE}`"));
}

#[test]
fn another_archive_is_refused() {
    let other = archive(&[(MEMBER, b"evil"), (JAILER, b"evil")]);
    let hex =
        |bytes: &[u8]| -> String { Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect() };
    let expected = format!(
        "`http://SERVER{ARCHIVE}` was tampered with or damaged: its sha256 is {}, it must be {}",
        hex(&other),
        hex(&good())
    );
    assert_eq!(refused(&[(ARCHIVE, ok(&other))], &good()), expected);
}

#[test]
fn an_archive_that_breaks_off_is_refused() {
    let whole = ok(&good());
    let text = refused(&[(ARCHIVE, whole[..whole.len() - 10].to_vec())], &good());
    assert_eq!(text, format!("could not download `http://SERVER{ARCHIVE}`"));
    // A server that does not say how much there is.
    let body = good();
    let answer = [b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", &body[..body.len() - 10]].concat();
    assert!(refused(&[(ARCHIVE, answer)], &good()).contains("was tampered with or damaged"));
}

#[test]
fn an_archive_that_is_not_there_is_named() {
    let text = refused(&[], &good());
    assert_eq!(
        text,
        format!("could not download `http://SERVER{ARCHIVE}`: the mirror answered 404 Not Found")
    );
}

#[test]
fn an_archive_without_a_program_is_refused() {
    for (files, missing) in [
        (&[(MEMBER, &b"the monitor"[..])][..], JAILER),
        (&[(JAILER, b"the jailer"), ("firecracker-v9.8.7-x86_64", b"elsewhere")], MEMBER),
        (&[(JAILER, b"the jailer"), (MEMBER, b"")], MEMBER),
    ] {
        let body = archive(files);
        let text = refused(&[(ARCHIVE, ok(&body))], &body);
        assert_eq!(text, format!("`http://SERVER{ARCHIVE}` has no `{missing}`"));
    }
}

#[test]
fn a_name_that_leads_out_of_the_archive_is_refused() {
    for name in ["../../../outside", "release-v9.8.7-x86_64/../firecracker"] {
        let body = archive(&[(JAILER, b"the jailer"), (name, b"out"), (MEMBER, b"the monitor")]);
        let text = refused(&[(ARCHIVE, ok(&body))], &body);
        assert_eq!(text, format!("could not unpack `http://SERVER{ARCHIVE}`"));
    }
}

#[test]
fn what_has_the_digest_and_is_no_archive_is_refused() {
    let body = b"<html>a page</html>";
    let text = refused(&[(ARCHIVE, ok(body))], body);
    assert_eq!(text, format!("could not unpack `http://SERVER{ARCHIVE}`"));
}
