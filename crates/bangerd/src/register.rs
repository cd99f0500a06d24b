//! Images and kernels of files that are on this machine already.

use crate::daemon::{Daemon, now, own_kernel_version};
use crate::files::copy_sparse;
use crate::initramfs::INITRD_FILE;
use crate::pull::{kernel_row, staging};
use crate::store::{ImageRow, KernelRow};
use anyhow::Context as _;
use banger_image::debian::archive::architecture;
use banger_image::filesystem::{Filesystem, FilesystemError};
use banger_image::kernel::{KernelError, import};
use banger_image::oci::ImageConfig;
use banger_wire::daemon::{Event, ImageFiles, KernelFiles};
use banger_wire::error::{ErrorCode, WireError};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use tokio::sync::mpsc::UnboundedSender;

/// The longest initrd; the fullest of distributions have a tenth.
const INITRD_MAX: u64 = 1 << 30;
/// How an initrd can begin: an archive in one of cpio's two forms, or that compressed with gzip, xz, zstd, lz4, bzip2 or
/// lzma.
const INITRD_MAGICS: [&[u8]; 8] = [
    b"070701",
    b"070702",
    b"\x1f\x8b",
    b"\xfd7zXZ\0",
    b"\x28\xb5\x2f\xfd",
    b"\x02\x21\x4c\x18",
    b"BZh",
    b"\x5d\0\0",
];

impl Daemon {
    /// Makes an image of a filesystem, and where they are given of a kernel, its modules, and an initrd.
    pub(crate) async fn register(
        &self,
        files: ImageFiles,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<ImageRow> {
        let name = files.name.to_string();
        let paths = [&Some(files.rootfs.clone()), &files.kernel, &files.initrd, &files.modules];
        check_absolute(paths.into_iter().flatten())?;
        if files.kernel.is_none() && files.modules.is_some() {
            let text = "`--modules` are those of a kernel given with `--kernel`";
            return Err(WireError::new(ErrorCode::Invalid, text)
                .hinted("a kernel of the catalog has its own; leave `--modules` out")
                .into());
        }
        if let Some(kernel) = &files.kernel_ref {
            self.ensure_kernel(kernel.as_str(), events).await?;
        }
        let _one = self.pulling.lock().await;
        refuse_taken("image", &name, self.store.images()?.iter().any(|row| row.name == name))?;
        if files.kernel.is_some() {
            refuse_taken("kernel", &name, self.store.kernels()?.iter().any(|row| row.name == name))?;
        }
        let _ = events.send(Event::Step { label: format!("copy {}", files.rootfs) });
        let dir = staging(&self.paths.state.join("images"))?;
        let (place, rootfs) = (dir.path().to_owned(), PathBuf::from(&files.rootfs));
        let has_initrd = files.initrd.is_some();
        let copying = banger_image::blocking::start(move || copy_rootfs(&rootfs, &place, has_initrd));
        let filesystem = copying.await.context("copy the filesystem")??;
        if let Some(initrd) = &files.initrd {
            copy_initrd(Path::new(initrd), &dir.path().join(INITRD_FILE))?;
        }
        let mut kernel = files.kernel_ref.map(String::from);
        let mut lone = LoneKernel(self, None);
        if let Some(path) = files.kernel {
            let _ = events.send(Event::Step { label: format!("unpack {path}") });
            let found =
                import::KernelFiles { kernel: path.into(), modules: files.modules.map(PathBuf::from) };
            let (staging, mut row) = self.make_kernel(&name, found).await?;
            row.version = own_kernel_version(&name);
            // CRASH: a kernel without its image is removed at the next start.
            self.publish_kernel(staging, row)?;
            lone.1 = Some(name.clone());
            kernel = Some(name.clone());
        }
        let row = ImageRow {
            source: files.rootfs,
            name,
            digest: String::new(),
            arch: architecture().to_owned(),
            created: now(),
            size_bytes: 0,
            init: None,
            config: ImageConfig::default(),
            kernel,
            sha256: String::new(),
            filesystem: filesystem.name().to_owned(),
            blobs: Vec::new(),
            initrd: has_initrd,
        };
        let row = self.publish_image(dir, row, events).await?;
        lone.1 = None;
        Ok(row)
    }

    /// Makes a kernel of a file or of what is in a directory.
    pub(crate) async fn import_kernel(
        &self,
        files: KernelFiles,
        events: &UnboundedSender<Event>,
    ) -> anyhow::Result<KernelRow> {
        check_absolute([&files.from, &files.vmlinux, &files.modules].into_iter().flatten())?;
        let name = files.name.to_string();
        let _one = self.pulling.lock().await;
        refuse_taken("kernel", &name, self.store.kernels()?.iter().any(|row| row.name == name))?;
        let _ = events.send(Event::Step { label: format!("import kernel {name}") });
        let release = files.release;
        let mut found = match (files.from, files.vmlinux) {
            (Some(dir), None) => {
                // Of several kernels of a host the one it runs is meant.
                let running = rustix::system::uname().release().to_string_lossy().into_owned();
                let wanted = release.as_deref().unwrap_or(&running);
                let found = import::KernelFiles::find(Path::new(&dir), Some(wanted));
                found.map_err(|error| explain(&dir, &error))?
            }
            (None, Some(file)) => import::KernelFiles { kernel: file.into(), modules: None },
            _ => {
                let text = "a kernel is imported from a directory or from one file";
                return Err(WireError::new(ErrorCode::Invalid, text)
                    .hinted("use `--from DIR` or `--vmlinux FILE`")
                    .into());
            }
        };
        if let Some(modules) = files.modules {
            found.modules = Some(modules.into());
        }
        let (staging, row) = self.make_kernel(&name, found).await?;
        if let Some(release) = release.filter(|release| *release != row.release) {
            let text = format!("the kernel is of release `{}`, not `{release}`", row.release);
            return Err(WireError::new(ErrorCode::Invalid, text).into());
        }
        self.publish_kernel(staging, row)
    }

    async fn make_kernel(
        &self,
        name: &str,
        found: import::KernelFiles,
    ) -> anyhow::Result<(tempfile::TempDir, KernelRow)> {
        let staging = staging(&self.paths.state.join("kernels"))?;
        let (place, own_name) = (staging.path().to_owned(), name.to_owned());
        let shown = found.kernel.display().to_string();
        let made = banger_image::blocking::start(move || found.import(&own_name, &place));
        let meta = made.await.context("unpack the kernel")?.map_err(|error| explain(&shown, &error))?;
        Ok((staging, kernel_row(meta)))
    }
}

/// A kernel that came with an image which is not there yet, and may never be: then it goes again.
struct LoneKernel<'a>(&'a Daemon, Option<String>);

impl Drop for LoneKernel<'_> {
    fn drop(&mut self) {
        if self.1.take().is_some()
            && let Err(error) = self.0.remove_lone_kernels()
        {
            tracing::error!("remove a kernel without its image: {error:#}");
        }
    }
}

fn explain(path: &str, error: &KernelError) -> WireError {
    let mut wire = WireError::new(ErrorCode::Failed, format!("could not use the kernel in `{path}`"));
    let cause = WireError::from_error(ErrorCode::Failed, error);
    wire.causes = std::iter::once(cause.message).chain(cause.causes).collect();
    match error {
        KernelError::Several(_) => {
            wire.hinted("say which with `--release`, or name its file with `--vmlinux`")
        }
        KernelError::OtherModules { .. } | KernelError::NoModules(_) => {
            wire.hinted("name the directory `lib/modules/RELEASE` of this kernel with `--modules`")
        }
        KernelError::NoDriver(_) => {
            wire.hinted("a kernel for vms has virtio, ext4 and overlayfs, as modules or built in")
        }
        KernelError::Read { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
            wire.hinted("distributions close `/boot` to users; copy the file and make it yours")
        }
        _ => wire,
    }
}

fn check_absolute<'a>(paths: impl Iterator<Item = &'a String>) -> anyhow::Result<()> {
    for path in paths {
        if !path.starts_with('/') {
            let text = format!("`{}` is not an absolute path", path.escape_debug());
            return Err(WireError::new(ErrorCode::Invalid, text).into());
        }
    }
    Ok(())
}

fn refuse_taken(kind: &str, name: &str, is_taken: bool) -> anyhow::Result<()> {
    if !is_taken {
        return Ok(());
    }
    Err(WireError::new(ErrorCode::Invalid, format!("there is {} `{name}` already", with_article(kind)))
        .hinted(format!("choose another name, or delete it with `banger {kind} delete {name}`"))
        .into())
}

fn with_article(kind: &str) -> String {
    let article = if kind.starts_with('i') { "an" } else { "a" };
    format!("{article} {kind}")
}

/// Copies a filesystem under the name of its kind, which is looked for in the copy: nobody changes that meanwhile.
fn copy_rootfs(from: &Path, dir: &Path, has_initrd: bool) -> anyhow::Result<Filesystem> {
    let shown = from.display();
    let place = dir.join("rootfs");
    let file = copy_sparse(from, &place).with_context(|| format!("could not copy `{shown}`"))?;
    let filesystem = Filesystem::detect(&file).map_err(|error| {
        let mut wire =
            WireError::new(ErrorCode::Invalid, format!("`{shown}` can't be an image's root filesystem"));
        let cause = WireError::from_error(ErrorCode::Invalid, &error);
        wire.causes = std::iter::once(cause.message).chain(cause.causes).collect();
        match error {
            FilesystemError::Journal => {
                wire.hinted(format!("unmount it, or replay it with `e2fsck -f {shown}`"))
            }
            FilesystemError::Damaged { .. } | FilesystemError::Short { .. } => {
                wire.hinted("it was not copied as a whole, or has to be repaired first")
            }
            _ => wire,
        }
    })?;
    if has_initrd && filesystem != Filesystem::Ext4 {
        let text = format!("`{shown}` is {filesystem}, which can't be written");
        return Err(WireError::new(ErrorCode::Invalid, text)
            .hinted("with an initrd of its own an image boots on a writable copy, so it has to be ext4; leave `--initrd` out")
            .into());
    }
    std::fs::rename(place, dir.join(format!("rootfs.{filesystem}")))?;
    Ok(filesystem)
}

fn copy_initrd(from: &Path, to: &Path) -> anyhow::Result<()> {
    let shown = from.display();
    let file = copy_sparse(from, to).with_context(|| format!("could not copy `{shown}`"))?;
    let mut begin = Vec::new();
    File::open(to)?.take(8).read_to_end(&mut begin)?;
    let is_one = INITRD_MAGICS.iter().any(|magic| begin.starts_with(magic));
    if !is_one || file.metadata()?.len() > INITRD_MAX {
        let text = format!("`{shown}` is not an initrd: a cpio archive, compressed or not, of at most 1 GiB");
        return Err(WireError::new(ErrorCode::Invalid, text).into());
    }
    Ok(())
}
