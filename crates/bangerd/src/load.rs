//! Images without a registry into the store: directories with an OCI layout, and archives that a client sends.

use crate::config::Config;
use crate::daemon::Daemon;
use crate::files::copy_sparse;
use crate::initramfs::INITRD_FILE;
use crate::pull::{ROOTFS_FILE, Wanted, image_name, oci_row, sink, staging};
use crate::store::ImageRow;
use anyhow::Context as _;
use banger_image::oci::{Archive, LocalImage, Platform};
use banger_image::progress::Progress;
use banger_wire::daemon::Event;
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::names::ImageName;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{Receiver, UnboundedSender};

/// How an OCI layout in a directory is written: `oci:DIR` or `oci:DIR:TAG`.
pub(crate) const LAYOUT_PREFIX: &str = "oci:";
/// What the directories that archives are put aside in are called, in the cache.
pub(crate) const SPOOL_PREFIX: &str = "load-";
/// How often progress is reported.
const TICK: Duration = Duration::from_millis(100);

/// What a client sends of a file: its pieces, and none at its end.
pub(crate) type Upload = Receiver<Option<Vec<u8>>>;

/// What is to be loaded from an archive.
#[derive(Debug)]
pub(crate) struct Load {
    /// What the client calls the archive, for messages.
    pub(crate) label: String,
    /// Its length, where it has one.
    pub(crate) size: Option<u64>,
    /// The one image that is meant.
    pub(crate) wanted: Option<String>,
    /// What it is called in the store.
    pub(crate) name: Option<ImageName>,
}

impl Daemon {
    /// Loads the images of an archive that arrives.
    pub(crate) async fn load(
        &self,
        load: Load,
        upload: Upload,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<Vec<ImageRow>> {
        let failed = |error: &(dyn std::error::Error + 'static)| {
            let mut wire = WireError::new(ErrorCode::Failed, format!("could not load `{}`", load.label));
            let cause = WireError::from_error(ErrorCode::Failed, error);
            wire.causes = std::iter::once(cause.message).chain(cause.causes).collect();
            wire.hinted("it must be what `docker save`, `podman save`, `skopeo` or `buildah` writes")
        };
        let _ = events.send(Event::Step { label: format!("read {}", load.label.escape_debug()) });
        // CRASH: what is left of it is removed at the next start.
        let spool = tempfile::Builder::new().prefix(SPOOL_PREFIX).tempdir_in(&self.paths.cache);
        let spool = spool.context("make a directory in the cache")?;
        let limits = Config::load()?.limits();
        let archive = {
            let cancelled = CancelOnDrop(Arc::default());
            let (dir, limits, stop) = (spool.path().to_owned(), limits.clone(), Arc::clone(&cancelled.0));
            let mut input = Uploaded::new(upload, load.size, events.clone());
            let spooling =
                banger_image::blocking::start(move || Archive::spool(&mut input, &dir, &limits, &stop));
            spooling.await.context("read the archive")?.map_err(|error| failed(&error))?
        };
        let images = LocalImage::in_archive(&archive, load.wanted.as_deref(), &Platform::host(), &limits)
            .map_err(|error| failed(&error))?;
        if let (Some(name), true) = (&load.name, images.len() > 1) {
            let text = format!(
                "there are {} images in `{}`, and they can't all be called `{name}`",
                images.len(),
                load.label
            );
            return Err(WireError::new(ErrorCode::Invalid, text)
                .hinted("leave `--name` out, or name one with `banger image pull docker-archive:FILE:REF`")
                .into());
        }
        let _one = self.pulling.lock().await;
        let wanted = Wanted { name: load.name, ..Wanted::default() };
        let mut rows = Vec::new();
        for image in &images {
            let source = image.names().first().map_or_else(|| load.label.clone(), ToString::to_string);
            let row = self.store_local(image, &source, &wanted, events).await;
            rows.push(row?.map_err(|error| failed(&error))?);
        }
        Ok(rows)
    }

    /// Pulls from a directory with an OCI layout. `text` is its whole reference, with the prefix. The caller holds the
    /// lock for pulls.
    pub(crate) async fn pull_layout(
        &self,
        text: &str,
        wanted: &Wanted,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<ImageRow> {
        let failed = |error: &(dyn std::error::Error + 'static)| {
            let mut wire = WireError::new(ErrorCode::Failed, format!("could not use image `{text}`"));
            let cause = WireError::from_error(ErrorCode::Failed, error);
            wire.causes = std::iter::once(cause.message).chain(cause.causes).collect();
            wire.hinted("it must be a directory with an OCI layout, as `skopeo copy … oci:DIR:TAG` writes it")
        };
        let (dir, tag) = split_layout(text)?;
        let (limits, platform) = (Config::load()?.limits(), wanted.platform.clone());
        let found = banger_image::blocking::start(move || {
            LocalImage::in_layout(&dir, tag.as_deref(), &platform, &limits)
        });
        let image = found.await.context("look at the directory")?.map_err(|error| failed(&error))?;
        let stored = self.store_local(&image, text, wanted, events).await?;
        Ok(stored.map_err(|error| failed(&error))?)
    }

    pub(crate) async fn store_local(
        &self,
        image: &LocalImage,
        source: &str,
        wanted: &Wanted,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<Result<ImageRow, banger_image::oci::LocalError>> {
        let digest = image.digest().to_string();
        let name = match (&wanted.name, image.names().first()) {
            (Some(name), _) => name.to_string(),
            (None, Some(reference)) => image_name(&reference.to_string(), &self.store.images()?),
            (None, None) => format!("loaded_{}", &image.digest().hex()[..12]),
        };
        if let Some(same) = self.unchanged(&name, &digest)? {
            return Ok(Ok(same));
        }
        let _ = events.send(Event::Step { label: format!("unpack {name}") });
        let staging = staging(&self.paths.state.join("images"))?;
        let image = match image.write_to(&staging.path().join(ROOTFS_FILE)).await {
            Ok(image) => image,
            Err(error) => return Ok(Err(error)),
        };
        if let Some(initrd) = &wanted.initrd {
            copy_sparse(initrd, &staging.path().join(INITRD_FILE)).context("copy the initrd")?;
        }
        let row = oci_row(name, source.to_owned(), image, wanted);
        self.publish_image(staging, row, events).await.map(Ok)
    }
}

/// Splits `oci:DIR[:TAG]`. A directory whose own name has a colon is one without a tag.
fn split_layout(text: &str) -> anyhow::Result<(PathBuf, Option<String>)> {
    let rest = text.strip_prefix(LAYOUT_PREFIX).unwrap_or(text);
    if !rest.starts_with('/') {
        let text = format!("`{}` is not an absolute path", rest.escape_debug());
        return Err(WireError::new(ErrorCode::Invalid, text).into());
    }
    Ok(match rest.rsplit_once(':') {
        Some((dir, tag)) if !tag.contains('/') && !Path::new(rest).is_dir() => {
            (dir.into(), Some(tag.to_owned()))
        }
        _ => (rest.into(), None),
    })
}

struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a client sends, as a reader for a thread.
struct Uploaded {
    upload: Upload,
    piece: Vec<u8>,
    at: usize,
    ended: bool,
    done: u64,
    total: Option<u64>,
    told: Instant,
    progress: Box<dyn Fn(Progress) + Send + Sync>,
}

impl Uploaded {
    fn new(upload: Upload, total: Option<u64>, events: UnboundedSender<Event>) -> Self {
        Self {
            upload,
            piece: Vec::new(),
            at: 0,
            ended: false,
            done: 0,
            total,
            told: Instant::now(),
            progress: Box::new(sink(&events)),
        }
    }
}

impl Read for Uploaded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.piece.len() && !self.ended {
            match self.upload.blocking_recv() {
                Some(Some(piece)) => {
                    self.done += piece.len() as u64;
                    (self.piece, self.at) = (piece, 0);
                }
                Some(None) => self.ended = true,
                // The client has gone in the middle.
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
            if self.told.elapsed() >= TICK {
                self.told = Instant::now();
                (self.progress)(Progress::Bytes { done: self.done, total: self.total });
            }
        }
        let count = buffer.len().min(self.piece.len() - self.at);
        buffer[..count].copy_from_slice(&self.piece[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::split_layout;
    use std::path::Path;

    #[test]
    fn a_tag_is_what_follows_the_last_colon_of_no_directory() {
        let dir = tempfile::Builder::new().prefix("with:").tempdir().unwrap();
        let path = dir.path().display();
        let split = |text: &str| split_layout(text).unwrap();
        assert_eq!(split(&format!("oci:{path}")), (dir.path().to_owned(), None));
        assert_eq!(split(&format!("oci:{path}:a.b")), (dir.path().to_owned(), Some("a.b".to_owned())));
        assert_eq!(split("oci:/no:where/x"), (Path::new("/no:where/x").to_owned(), None));
        assert!(split_layout("oci:relative").is_err());
    }
}
