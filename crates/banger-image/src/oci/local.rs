//! Images without a registry: an OCI layout in a directory, or an archive.
//!
//! Everything the registry client checks is checked here too: platforms, digests, sizes, limits. Only `docker save`'s own
//! format has no digests of its files; there the configuration's digests of the layers' content decide.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::OFlags;
use serde::Deserialize;

use super::digest::Digest;
use super::layer::{Layer, LayerError, write_layers};
use super::limits::Limits;
use super::manifest::{Config, Descriptor, Document, ImageConfig, ManifestError, Platform, choose};
use super::pull::{INDEXES_MAX, OciImage, Unfinished};
use super::reference::{Reference, ReferenceError};
use super::spool::{Archive, Member};
use super::stream::Source;
use crate::ext4::Room;
use crate::hash::Algorithm;

/// Images of one archive.
const IMAGES_MAX: usize = 64;
/// What an index of a layout calls an image: a tag, or a whole reference.
const NAME: &str = "org.opencontainers.image.ref.name";
/// The whole reference, as containerd and docker write it beside.
const FULL_NAME: &str = "io.containerd.image.name";

/// An image in a file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// No image at all.
    #[error(
        "there is no image in it: neither `index.json` of an OCI layout nor `manifest.json` of `docker save`"
    )]
    Nothing,
    /// A file that should be there.
    #[error("`{}` is missing, which is {what}", .name.escape_debug())]
    Missing {
        /// Its name.
        name: String,
        /// What it should be.
        what: &'static str,
    },
    /// A file can't be read.
    #[error("could not read `{}`", .name.escape_debug())]
    Read {
        /// Its name.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// A document that is larger than one can be.
    #[error("`{}` is larger than the {limit} bytes allowed", .name.escape_debug())]
    TooLarge {
        /// Its name.
        name: String,
        /// The limit.
        limit: u64,
    },
    /// A file isn't what it is called.
    #[error("blob {digest} was tampered with or damaged: its {} is {}", .found.algorithm().name(), .found.hex())]
    Digest {
        /// What it is called.
        digest: Digest,
        /// What it is.
        found: Digest,
    },
    /// It has another length than the manifest says.
    #[error("blob {digest} is {found} bytes long, but {expected} where it is named")]
    Size {
        /// The blob.
        digest: Digest,
        /// What it should have.
        expected: u64,
        /// What it has.
        found: u64,
    },
    /// `manifest.json` isn't one.
    #[error("`manifest.json` is not what `docker save` writes")]
    DockerManifest(#[source] serde_json::Error),
    /// The name it gives an image.
    #[error("an image's name can't be used")]
    Name(#[source] ReferenceError),
    /// The manifest or the configuration.
    #[error("could not use the image's manifest")]
    Manifest(#[from] ManifestError),
    /// None of that name.
    #[error("there is no image `{}` in it, only {available}", .wanted.escape_debug())]
    NoImage {
        /// What was asked for.
        wanted: String,
        /// What there is.
        available: String,
    },
    /// More than one, and none was named.
    #[error("there are several images in it: {0}")]
    Several(String),
    /// More than anybody saves.
    #[error("there are {found} images in it, more than the {limit} allowed")]
    TooManyImages {
        /// How many there are.
        found: usize,
        /// How many may be.
        limit: usize,
    },
    /// Its layers don't make a filesystem.
    #[error("could not unpack the image")]
    Layer(#[from] LayerError),
    /// A thread ended without an answer.
    #[error("interrupted")]
    Interrupted,
}

/// An image that was found in a file or directory, with everything checked but its layers' content.
#[derive(Debug, Clone)]
pub struct LocalImage {
    names: Vec<Reference>,
    digest: Digest,
    config: ImageConfig,
    layers: Vec<(Layer, PathBuf)>,
    limits: Limits,
    room: Room,
}

impl LocalImage {
    /// Finds an image in an OCI layout, by its tag where there are several. Reads all of its blobs to check them.
    pub fn in_layout(
        dir: &Path,
        tag: Option<&str>,
        platform: &Platform,
        limits: &Limits,
    ) -> Result<Self, LocalError> {
        let read = |source| LocalError::Read { name: dir.display().to_string(), source };
        std::fs::metadata(dir).map_err(read)?;
        let mut images = in_index(&Files::Directory(dir), tag, platform, limits)?;
        match (images.pop(), images.is_empty()) {
            (Some((_, image)), true) => Ok(image),
            (None, _) => Err(LocalError::Nothing),
            (Some(last), false) => {
                images.push(last);
                Err(LocalError::Several(listed(images.iter().map(|(name, _)| name.as_deref()))))
            }
        }
    }

    /// Finds the images of an archive, or the one of a name.
    pub fn in_archive(
        archive: &Archive,
        wanted: Option<&str>,
        platform: &Platform,
        limits: &Limits,
    ) -> Result<Vec<Self>, LocalError> {
        let files = Files::Archive(archive);
        if archive.member("manifest.json").is_some() {
            return saved(&files, wanted, platform, limits);
        }
        let images = in_index(&files, wanted, platform, limits)?;
        Ok(images.into_iter().map(|(_, image)| image).collect())
    }

    /// Returns what whoever saved it called it.
    pub fn names(&self) -> &[Reference] {
        &self.names
    }

    /// Returns the digest of the manifest; that of the configuration where there is none.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Sets what its filesystem will have besides the image's files; nothing, otherwise.
    #[must_use]
    pub fn with_room(self, room: Room) -> Self {
        Self { room, ..self }
    }

    /// Writes the filesystem to a new file. After an error, or when the future is dropped, the file is gone.
    pub async fn write_to(&self, rootfs: &Path) -> Result<OciImage, LocalError> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let _cancel = SetOnDrop(Arc::clone(&cancelled));
        let (image, rootfs) = (self.clone(), rootfs.to_owned());
        let written = crate::blocking::start(move || image.write(&rootfs, &cancelled)).await;
        written.map_err(|_| LocalError::Interrupted)?
    }

    fn write(self, rootfs: &Path, cancelled: &AtomicBool) -> Result<OciImage, LocalError> {
        let mut unfinished = Unfinished(Some(rootfs.to_owned()));
        let (layers, paths): (Vec<Layer>, Vec<PathBuf>) = self.layers.into_iter().unzip();
        let source = Source {
            wait: &|at| Ok(paths[at].clone()),
            count: layers.len(),
            limits: &self.limits,
            cancelled,
            read: &AtomicU64::new(0),
        };
        let written = write_layers(rootfs, &layers, &source, self.room);
        // A file that was there before is not ours to remove.
        if matches!(written, Ok(_) | Err(LayerError::Create(_))) {
            unfinished.0 = None;
        }
        let summary = written?;
        Ok(OciImage {
            digest: self.digest,
            size_bytes: summary.size_bytes,
            init: summary.init,
            config: self.config,
            blobs: Vec::new(),
        })
    }
}

struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Where the files of images are.
enum Files<'a> {
    Directory(&'a Path),
    Archive(&'a Archive),
}

impl Files<'_> {
    /// Finds a file whose length `accept`s, and hashes it where that has not been done.
    fn find(
        &self,
        name: &str,
        what: &'static str,
        accept: &dyn Fn(u64) -> Result<(), LocalError>,
    ) -> Result<Member, LocalError> {
        let missing = || LocalError::Missing { name: name.to_owned(), what };
        match self {
            Self::Archive(archive) => {
                let member = archive.member(name).ok_or_else(missing)?;
                accept(member.size)?;
                Ok(member.clone())
            }
            Self::Directory(dir) => {
                let path = dir.join(name);
                let read = |source: io::Error| match source.kind() {
                    io::ErrorKind::NotFound => missing(),
                    _ => LocalError::Read { name: name.to_owned(), source },
                };
                let mut file = open_file(&path).map_err(read)?;
                let size = file.metadata().map_err(read)?.len();
                accept(size)?;
                let digest = Digest::of_reader(Algorithm::Sha256, &mut file).map_err(read)?;
                Ok(Member { path, size, digest })
            }
        }
    }

    /// Reads a document that nothing has a digest of.
    fn document(
        &self,
        name: &str,
        what: &'static str,
        limits: &Limits,
    ) -> Result<(Member, Vec<u8>), LocalError> {
        let member = self.find(name, what, &|size| check_document(size, name, limits))?;
        let body = read_document(&member, name)?;
        Ok((member, body))
    }

    /// Finds a blob and checks that it is what it is called.
    fn blob(&self, wanted: &Descriptor, what: &'static str) -> Result<Member, LocalError> {
        let accept = |found| {
            let (digest, expected) = (wanted.digest.clone(), wanted.size);
            if found == expected { Ok(()) } else { Err(LocalError::Size { digest, expected, found }) }
        };
        let name = blob_name(&wanted.digest);
        let mut member = self.find(&name, what, &accept)?;
        let algorithm = wanted.digest.algorithm();
        if member.digest.algorithm() != algorithm {
            let hashed = open_file(&member.path).and_then(|mut file| Digest::of_reader(algorithm, &mut file));
            member.digest = hashed.map_err(|source| LocalError::Read { name, source })?;
        }
        if member.digest != wanted.digest {
            return Err(LocalError::Digest { digest: wanted.digest.clone(), found: member.digest });
        }
        Ok(member)
    }

    fn blob_document(
        &self,
        wanted: &Descriptor,
        what: &'static str,
        limits: &Limits,
    ) -> Result<Vec<u8>, LocalError> {
        let name = blob_name(&wanted.digest);
        check_document(wanted.size, &name, limits)?;
        read_document(&self.blob(wanted, what)?, &name)
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().name(), digest.hex())
}

/// Opens a regular file and nothing else: a fifo would hold its reader up for ever.
fn open_file(path: &Path) -> io::Result<File> {
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(nonblocking).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is not a regular file")) }
}

fn check_document(size: u64, name: &str, limits: &Limits) -> Result<(), LocalError> {
    let limit = limits.document_bytes;
    if size > limit { Err(LocalError::TooLarge { name: name.to_owned(), limit }) } else { Ok(()) }
}

fn read_document(member: &Member, name: &str) -> Result<Vec<u8>, LocalError> {
    let mut body = Vec::new();
    let read = open_file(&member.path).and_then(|file| file.take(member.size).read_to_end(&mut body));
    read.map_err(|source| LocalError::Read { name: name.to_owned(), source })?;
    Ok(body)
}

/// The images of an OCI layout, with their names, or those of one name.
fn in_index(
    files: &Files<'_>,
    wanted: Option<&str>,
    platform: &Platform,
    limits: &Limits,
) -> Result<Vec<(Option<String>, LocalImage)>, LocalError> {
    let (_, body) =
        files.document("index.json", "the list of images", limits).map_err(|error| match error {
            LocalError::Missing { .. } => LocalError::Nothing,
            other => other,
        })?;
    let Document::Index(manifests) = Document::parse(&body, "application/vnd.oci.image.index.v1+json")?
    else {
        return Err(LocalError::Nothing);
    };
    // Manifests of one name are one image for several platforms.
    let mut groups: Vec<(Option<String>, Vec<Descriptor>)> = Vec::new();
    for manifest in manifests {
        let annotations = manifest.annotations.as_ref();
        let annotation = |key: &str| annotations.and_then(|all| all.get(key)).cloned();
        let name = annotation(FULL_NAME).or_else(|| annotation(NAME));
        match groups.iter_mut().find(|(other, _)| *other == name) {
            Some((_, group)) => group.push(manifest),
            None => groups.push((name, vec![manifest])),
        }
    }
    if let Some(wanted) = wanted {
        let available = listed(groups.iter().map(|(name, _)| name.as_deref()));
        groups.retain(|(name, _)| name.as_deref().is_some_and(|name| is_called(name, wanted)));
        if groups.is_empty() {
            return Err(LocalError::NoImage { wanted: shortened(wanted), available });
        }
    }
    check_count(groups.len())?;
    let image = |(name, group): (Option<String>, Vec<Descriptor>)| {
        let chosen = match &group[..] {
            [one] => one,
            several => choose(several, platform)?,
        };
        let mut image = from_manifest(files, chosen, platform, limits)?;
        // A bare tag says nothing about whose it is.
        let full = name.as_deref().filter(|name| name.contains(['/', ':']));
        image.names.extend(full.map(str::parse).transpose().map_err(LocalError::Name)?);
        Ok((name, image))
    };
    groups.into_iter().map(image).collect()
}

/// Returns true when an image called `name` is meant by `wanted`, which may be just its tag.
fn is_called(name: &str, wanted: &str) -> bool {
    let same = |a: &str, b: &str| match (a.parse::<Reference>(), b.parse::<Reference>()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    };
    name == wanted || same(name, wanted) || name.rsplit_once(':').is_some_and(|(_, tag)| tag == wanted)
}

fn from_manifest(
    files: &Files<'_>,
    descriptor: &Descriptor,
    platform: &Platform,
    limits: &Limits,
) -> Result<LocalImage, LocalError> {
    let mut at = descriptor.clone();
    let mut indexes = 0;
    let (config, layers) = loop {
        let body = files.blob_document(&at, "a manifest", limits)?;
        match Document::parse(&body, &at.media_type)? {
            Document::Manifest { config, layers } => break (config, layers),
            Document::Index(manifests) => {
                indexes += 1;
                if indexes > INDEXES_MAX {
                    return Err(ManifestError::Depth(INDEXES_MAX).into());
                }
                at = choose(&manifests, platform)?.clone();
            }
        }
    };
    let config = Config::parse(&files.blob_document(&config, "an image's configuration", limits)?)?;
    check_config(&config, layers.len(), platform, limits)?;
    let mut found = Vec::with_capacity(layers.len());
    for (layer, diff_id) in layers.iter().zip(config.diff_ids) {
        let path = files.blob(layer, "a layer")?.path;
        found.push((Layer { digest: layer.digest.clone(), diff_id }, path));
    }
    Ok(LocalImage {
        names: Vec::new(),
        digest: at.digest,
        config: config.image,
        layers: found,
        limits: limits.clone(),
        room: Room::Spare(0),
    })
}

/// What `docker save` says of an image.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

/// The images of `docker save`, or the one of a name.
fn saved(
    files: &Files<'_>,
    wanted: Option<&str>,
    platform: &Platform,
    limits: &Limits,
) -> Result<Vec<LocalImage>, LocalError> {
    let (_, body) = files.document("manifest.json", "the list of images", limits)?;
    let mut images: Vec<Saved> = serde_json::from_slice(&body).map_err(LocalError::DockerManifest)?;
    let tags = |image: &Saved| image.repo_tags.clone().unwrap_or_default();
    if let Some(wanted) = wanted {
        let all: Vec<Vec<String>> = images.iter().map(tags).collect();
        let available = listed(all.iter().flatten().map(|name| Some(name.as_str())));
        images.retain(|image| tags(image).iter().any(|tag| is_called(tag, wanted)));
        if images.is_empty() {
            return Err(LocalError::NoImage { wanted: shortened(wanted), available });
        }
    }
    check_count(images.len())?;
    let image = |image: Saved| {
        let names = tags(&image).iter().map(|tag| tag.parse()).collect::<Result<_, _>>();
        let names = names.map_err(LocalError::Name)?;
        let (member, body) = files.document(&image.config, "an image's configuration", limits)?;
        let config = Config::parse(&body)?;
        let layers = image.layers.unwrap_or_default();
        check_config(&config, layers.len(), platform, limits)?;
        let mut found = Vec::with_capacity(layers.len());
        for (layer, diff_id) in layers.iter().zip(config.diff_ids) {
            let layer = files.find(layer, "a layer", &|_| Ok(()))?;
            found.push((Layer { digest: layer.digest, diff_id }, layer.path));
        }
        Ok(LocalImage {
            names,
            digest: member.digest,
            config: config.image,
            layers: found,
            limits: limits.clone(),
            room: Room::Spare(0),
        })
    };
    images.into_iter().map(image).collect()
}

fn check_count(found: usize) -> Result<(), LocalError> {
    match found {
        0 => Err(LocalError::Nothing),
        1..=IMAGES_MAX => Ok(()),
        _ => Err(LocalError::TooManyImages { found, limit: IMAGES_MAX }),
    }
}

fn check_config(
    config: &Config,
    layers: usize,
    platform: &Platform,
    limits: &Limits,
) -> Result<(), ManifestError> {
    config.check_platform(platform)?;
    if layers > limits.layers {
        return Err(ManifestError::TooManyLayers { found: layers, limit: limits.layers });
    }
    let diff_ids = config.diff_ids.len();
    if diff_ids != layers { Err(ManifestError::LayerCount { layers, diff_ids }) } else { Ok(()) }
}

/// Names for a message, with those that could steer a terminal escaped.
fn listed<'a>(names: impl Iterator<Item = Option<&'a str>>) -> String {
    let text = |name: Option<&str>| match name {
        Some(name) => format!("`{}`", shortened(name).escape_debug()),
        None => "one without a name".to_owned(),
    };
    let all: Vec<String> = names.take(20).map(text).collect();
    if all.is_empty() { "images without names".to_owned() } else { all.join(", ") }
}

fn shortened(text: &str) -> String {
    text.chars().take(200).collect()
}
