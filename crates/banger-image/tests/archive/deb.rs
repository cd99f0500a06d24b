//! Package files: an `ar` archive of the version, what the package says of itself, and one file.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;

/// Builds a package file.
pub(crate) fn build(name: &str, version: &str, architecture: &str) -> Vec<u8> {
    let control = format!("Package: {name}\nVersion: {version}\nArchitecture: {architecture}\n");
    let path = format!("./usr/share/{name}/version");
    [
        b"!<arch>\n".to_vec(),
        member("debian-binary", b"2.0\n"),
        member("control.tar.gz", &gzip(&tar("./control", control.as_bytes()))),
        member("data.tar.xz", &xz(&tar(&path, version.as_bytes()))),
    ]
    .concat()
}

/// Packs as the archive packs its indexes.
pub(crate) fn xz(data: &[u8]) -> Vec<u8> {
    let mut writer = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
    writer.write_all(data).unwrap();
    writer.finish().unwrap()
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn member(name: &str, data: &[u8]) -> Vec<u8> {
    let mut out =
        format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, "100644", data.len()).into_bytes();
    out.extend_from_slice(data);
    if data.len() % 2 == 1 {
        out.push(b'\n');
    }
    out
}

/// A tar archive of one file.
fn tar(path: &str, data: &[u8]) -> Vec<u8> {
    let mut head = [0u8; 512];
    let mut put = |at: usize, text: &str| head[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, path);
    put(100, "0000644\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{:011o}\0", data.len()));
    put(136, "00000000000\0");
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\x0000");
    let sum: u32 = head.iter().map(|b| u32::from(*b)).sum();
    head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut out = [&head, data].concat();
    out.resize(out.len().next_multiple_of(512) + 1024, 0);
    out
}
