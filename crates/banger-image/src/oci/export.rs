//! An image of one layer as other tools read it: an OCI layout in a directory, and that as an archive.
//!
//! The archive also has the `manifest.json` of `docker save`, so `docker load`, `podman load` and `skopeo` take it. There
//! is no time in it: the same tree makes the same bytes.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;

use super::digest::Digest;
use super::manifest::{ImageConfig, Platform};
use crate::hash::{Algorithm, Hasher};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

const BLOCK_LEN: usize = 512;
/// Largest number in the eleven octal digits of a tar's size.
const OCTAL11_MAX: u64 = 0o777_7777_7777;
const BUFFER_LEN: usize = 256 << 10;

/// What an exported image says about itself.
#[derive(Debug, Clone)]
pub struct ExportMeta {
    /// A whole reference, by which it is loaded again.
    pub name: String,
    /// How it is started.
    pub config: ImageConfig,
    /// What it is for.
    pub platform: Platform,
}

/// Writes a tree, given as an uncompressed tar, as a layout into a directory that exists and is empty. The layer is
/// compressed with gzip when `compress`.
///
/// # Errors
/// When the tar can't be read or the directory not written; what was written stays.
pub fn write_layout(dir: &Path, tar: &Path, meta: &ExportMeta, compress: bool) -> io::Result<()> {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let (diff_id, layer, size) = write_layer(&blobs, tar, compress)?;
    let config = json!({
        "architecture": meta.platform.architecture(),
        "os": "linux",
        "config": config_json(&meta.config),
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created_by": "banger image export"}],
    });
    let config = add(&blobs, &config, "application/vnd.oci.image.config.v1+json")?;
    let media_type = if compress { "tar+gzip" } else { "tar" };
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config,
        "layers": [{
            "mediaType": format!("application/vnd.oci.image.layer.v1.{media_type}"), "digest": layer, "size": size
        }],
    });
    let mut manifest = add(&blobs, &manifest, "application/vnd.oci.image.manifest.v1+json")?;
    manifest["annotations"] = json!({
        "org.opencontainers.image.ref.name": meta.name.rsplit(':').next().unwrap_or("latest"),
        "io.containerd.image.name": meta.name,
    });
    manifest["platform"] = json!({"architecture": meta.platform.architecture(), "os": "linux"});
    write_json(&dir.join("index.json"), &json!({"schemaVersion": 2, "manifests": [manifest]}))?;
    let path = |digest: &Value| {
        format!("blobs/sha256/{}", digest.as_str().unwrap_or("").trim_start_matches("sha256:"))
    };
    let saved = json!([{
        "Config": path(&config["digest"]), "RepoTags": [meta.name], "Layers": [path(&json!(layer))]
    }]);
    write_json(&dir.join("manifest.json"), &saved)?;
    write_json(&dir.join("oci-layout"), &json!({"imageLayoutVersion": "1.0.0"}))
}

/// Writes a layout as an archive.
///
/// # Errors
/// When it can't be read or `out` not written.
pub fn write_archive(dir: &Path, out: &mut dyn Write) -> io::Result<()> {
    let mut names = vec!["oci-layout".to_owned(), "index.json".to_owned(), "manifest.json".to_owned()];
    let mut blobs = Vec::new();
    for entry in fs::read_dir(dir.join("blobs/sha256"))? {
        blobs.extend(entry?.file_name().into_string().ok().map(|name| format!("blobs/sha256/{name}")));
    }
    blobs.sort();
    names.extend(blobs);
    for name in names {
        let mut file = File::open(dir.join(&name))?;
        let length = file.metadata()?.len();
        out.write_all(&header(&name, length))?;
        let copied = io::copy(&mut (&mut file).take(length), out)?;
        if copied != length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let rest = (length % BLOCK_LEN as u64) as usize;
        out.write_all(&[0; BLOCK_LEN][..if rest == 0 { 0 } else { BLOCK_LEN - rest }])?;
    }
    out.write_all(&[0; 2 * BLOCK_LEN])
}

fn header(name: &str, length: u64) -> [u8; BLOCK_LEN] {
    let mut block = [0; BLOCK_LEN];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(100, b"0000644");
    put(108, b"0000000");
    put(116, b"0000000");
    if length <= OCTAL11_MAX {
        put(124, format!("{length:011o}").as_bytes());
    } else {
        put(124, &[0x80]);
        put(128, &length.to_be_bytes());
    }
    put(136, b"00000000000");
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// Returns the digests of the tar and of the blob it became, and the blob's size.
fn write_layer(blobs: &Path, tar: &Path, compress: bool) -> io::Result<(String, String, u64)> {
    let place = blobs.join(".layer");
    let mut input = BufReader::with_capacity(BUFFER_LEN, File::open(tar)?);
    let out = Hashing::new(BufWriter::with_capacity(BUFFER_LEN, File::create_new(&place)?));
    let mut hash = Hasher::new(Algorithm::Sha256);
    let mut buffer = vec![0; BUFFER_LEN];
    let mut copy = |sink: &mut dyn Write| -> io::Result<()> {
        loop {
            let count = input.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            hash.update(&buffer[..count]);
            sink.write_all(&buffer[..count])?;
        }
    };
    let mut out = if compress {
        let mut encoder = GzEncoder::new(out, Compression::fast());
        copy(&mut encoder)?;
        encoder.finish()?
    } else {
        let mut out = out;
        copy(&mut out)?;
        out
    };
    out.flush()?;
    let (digest, size) = (Digest::from(out.hash), out.length);
    fs::rename(&place, blobs.join(digest.hex()))?;
    Ok((Digest::from(hash).to_string(), digest.to_string(), size))
}

struct Hashing<W> {
    inner: W,
    hash: Hasher,
    length: u64,
}

impl<W> Hashing<W> {
    fn new(inner: W) -> Self {
        Self { inner, hash: Hasher::new(Algorithm::Sha256), length: 0 }
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hash.update(&bytes[..count]);
        self.length += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn config_json(config: &ImageConfig) -> Value {
    let mut json = serde_json::Map::new();
    let lists = [("Env", &config.env), ("Entrypoint", &config.entrypoint), ("Cmd", &config.cmd)];
    json.extend(
        lists.iter().filter(|(_, list)| !list.is_empty()).map(|(key, list)| ((*key).to_owned(), json!(list))),
    );
    let texts = [("WorkingDir", &config.workdir), ("User", &config.user)];
    json.extend(texts.iter().filter_map(|(key, text)| Some(((*key).to_owned(), json!(text.as_ref()?)))));
    Value::Object(json)
}

/// Writes a document as a blob and returns its descriptor.
fn add(blobs: &Path, document: &Value, media_type: &str) -> io::Result<Value> {
    let bytes = serde_json::to_vec(document)?;
    let digest = Digest::of(&bytes);
    fs::write(blobs.join(digest.hex()), &bytes)?;
    Ok(json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()}))
}

fn write_json(path: &Path, document: &Value) -> io::Result<()> {
    fs::write(path, serde_json::to_vec(document)?)
}
