//! What is in the store and the cache: does it still have the content that was written down, and is it still needed?

use crate::daemon::{Daemon, KERNEL_FILE};
use crate::doctor::leftovers;
use crate::pull::sha256_of;
use crate::store::ImageRow;
use anyhow::Context as _;
use banger_image::filesystem::Filesystem;
use banger_image::kernel::KernelMeta;
use banger_image::oci::Digest;
use banger_wire::daemon::{CachePruned, Event, Outcome};
use banger_wire::doctor::{Check, Verdict};
use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use tokio::sync::mpsc::UnboundedSender;

/// The cache's directories with what is named by its digest: blobs of images, Debian's packages.
const BLOBS: [&str; 2] = ["blobs/sha256", "blobs/sha512"];
const PACKAGES: &str = "debian/sha256";
/// Those of downloads that were broken off.
const PARTIAL: [&str; 2] = ["blobs/partial", "debian/partial"];

impl Daemon {
    /// Reads everything, or one image and its kernel. What is wrong is part of the answer, not a failure.
    pub(crate) async fn verify(
        &self,
        image: Option<ImageRow>,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<Vec<Check>> {
        // Nobody replaces what is being read.
        let _one = self.pulling.lock().await;
        let everything = image.is_none();
        let images = match image {
            Some(image) => vec![image],
            None => self.store.images()?,
        };
        let mut kernels: Vec<String> = self.store.kernels()?.into_iter().map(|row| row.name).collect();
        if !everything {
            kernels.retain(|kernel| images.iter().any(|image| image.kernel.as_ref() == Some(kernel)));
        }
        let mut checks = Vec::new();
        for image in images {
            let _ = events.send(Event::Step { label: format!("read image {}", image.name) });
            let (name, dir) = (image.name.clone(), self.paths.image(&image.name));
            let found = blocking(move || verify_image(&image, &dir)).await?;
            let hint = format!("delete it with `banger image delete {name}`, then pull or register it again");
            checks.push(check(format!("image {name}"), found, &hint));
        }
        for kernel in kernels {
            let _ = events.send(Event::Step { label: format!("read kernel {kernel}") });
            let dir = self.paths.kernel(&kernel);
            let found = blocking(move || verify_kernel(&dir)).await?;
            let hint =
                format!("delete it with `banger kernel delete {kernel}`, then pull or import it again");
            checks.push(check(format!("kernel {kernel}"), found, &hint));
        }
        if everything {
            let _ = events.send(Event::Step { label: "read the cache".to_owned() });
            let dirs = BLOBS.into_iter().chain([PACKAGES]).map(|dir| self.paths.cache.join(dir));
            let dirs: Vec<PathBuf> = dirs.collect();
            let found = blocking(move || verify_named(&dirs)).await?;
            checks.push(check(
                "downloads".to_owned(),
                found,
                "remove them with `banger image cache prune --all`",
            ));
            let left = leftovers::of_store(self)?;
            let found = match &left[..] {
                [] => Ok("nothing is left over".to_owned()),
                [first, ..] => Err(format!("{} left over, such as `{}`", left.len(), first.display())),
            };
            checks.push(check("directories".to_owned(), found, "remove them with `banger doctor --fix`"));
        }
        Ok(checks)
    }

    /// Removes downloads that nothing in the store was made of, or all of them.
    pub(crate) async fn prune_cache(&self, dry_run: bool, all: bool) -> anyhow::Result<Outcome> {
        // A pull may be about to use what looks unused.
        let _one = self.pulling.lock().await;
        let used: HashSet<String> = if all {
            HashSet::new()
        } else {
            self.store.images()?.into_iter().flat_map(|row| row.blobs).collect()
        };
        let mut pruned = CachePruned { files: 0, freed_bytes: 0, kept_bytes: 0 };
        let mut dirs: Vec<(PathBuf, bool)> = BLOBS.map(|dir| (self.paths.cache.join(dir), false)).to_vec();
        // Which packages an image was made of is not written down.
        dirs.push((self.paths.cache.join(PACKAGES), !all));
        dirs.extend(PARTIAL.map(|dir| (self.paths.cache.join(dir), false)));
        for (dir, keep) in dirs {
            for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
                let Ok(metadata) = entry.metadata() else { continue };
                let bytes = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
                let digest = named(&entry.path());
                if keep || used.contains(&digest) || leftovers::is_locked(&entry.path()) {
                    pruned.kept_bytes += bytes;
                    continue;
                }
                if !dry_run {
                    let path = entry.path();
                    std::fs::remove_file(&path).with_context(|| format!("remove `{}`", path.display()))?;
                }
                pruned.files += 1;
                pruned.freed_bytes += bytes;
            }
        }
        Ok(Outcome::CachePruned(pruned))
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> anyhow::Result<T> {
    banger_image::blocking::start(work).await.context("read the store")
}

fn check(name: String, found: Result<String, String>, hint: &str) -> Check {
    let (verdict, detail) = match found {
        Ok(detail) => (Verdict::Pass, detail),
        Err(detail) => (Verdict::Fail, detail),
    };
    let hint = (verdict == Verdict::Fail).then(|| hint.to_owned());
    Check { name, verdict, detail, hint }
}

/// The filesystem: is it there, of the right kind and length, and has it the digest that was written down?
fn verify_image(image: &ImageRow, dir: &Path) -> Result<String, String> {
    let path = dir.join(image.rootfs_file());
    let shown = path.display();
    let text = |error: &dyn std::error::Error| {
        let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
        format!("`{shown}`: {error}{cause}")
    };
    let file = File::open(&path).map_err(|error| text(&error))?;
    let filesystem = Filesystem::detect(&file).map_err(|error| text(&error))?;
    if filesystem.name() != image.filesystem {
        return Err(format!("`{shown}` is {filesystem}, not {}", image.filesystem));
    }
    let length = file.metadata().map_err(|error| text(&error))?.len();
    if length != image.size_bytes {
        return Err(format!("`{shown}` is {length} bytes long, not {}", image.size_bytes));
    }
    if image.initrd && !dir.join(crate::initramfs::INITRD_FILE).is_file() {
        return Err(format!("its initrd in `{}` is missing", dir.display()));
    }
    if image.sha256.is_empty() {
        return Ok(format!(
            "a whole {filesystem} superblock; its digest was not written down when it was made"
        ));
    }
    let found = sha256_of(&path).map_err(|error| text(&error))?;
    if found != image.sha256 {
        return Err(format!("the sha256 of `{shown}` is {found}, not {}", image.sha256));
    }
    Ok(format!("{filesystem}, sha256 {found}"))
}

/// The files of a kernel, against the digests in its own list.
fn verify_kernel(dir: &Path) -> Result<String, String> {
    let list = dir.join(KERNEL_FILE);
    let text = std::fs::read(&list).map_err(|error| format!("`{}`: {error}", list.display()))?;
    let meta: KernelMeta =
        serde_json::from_slice(&text).map_err(|error| format!("`{}`: {error}", list.display()))?;
    for (name, expected) in &meta.sha256 {
        let path = dir.join(name);
        let found = sha256_of(&path).map_err(|error| format!("`{}`: {error}", path.display()))?;
        if found != *expected {
            return Err(format!("the sha256 of `{}` is {found}, not {expected}", path.display()));
        }
    }
    Ok(format!("{}, {} files", meta.release, meta.sha256.len()))
}

/// The digest that a file is named by: its directory is called as the algorithm.
fn named(path: &Path) -> String {
    let part = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
    format!("{}:{}", part(path.parent().and_then(Path::file_name)), part(path.file_name()))
}

/// Files that are called by the digest of their content.
fn verify_named(dirs: &[PathBuf]) -> Result<String, String> {
    let (mut count, mut damaged) = (0, Vec::new());
    for entry in dirs.iter().flat_map(|dir| std::fs::read_dir(dir).into_iter().flatten().flatten()) {
        let path = entry.path();
        let good = named(&path).parse::<Digest>().ok().map(|digest| digest.is_of_file(&path)).transpose();
        let good = good.map_err(|error| format!("`{}`: {error}", path.display()))?;
        count += 1;
        if good != Some(true) {
            damaged.push(path.display().to_string());
        }
    }
    match &damaged[..] {
        [] => Ok(format!("{count} files have the content they are named by")),
        [first, ..] => Err(format!(
            "{} of {count} have other content than their names say, such as `{first}`",
            damaged.len()
        )),
    }
}
