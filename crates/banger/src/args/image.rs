//! Images and kernels.

use banger_wire::names::{ImageName, KernelName};
use clap::{Args, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;

/// `banger image`.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Pull an image by its catalog name or OCI reference.
    Pull {
        /// Catalog name, OCI reference, `oci:DIR[:TAG]` or `docker-archive:FILE[:REF]`.
        #[arg(value_name = "NAME|OCI-REF|oci:DIR|docker-archive:FILE")]
        reference: String,
        /// Its name here; made from the reference when absent.
        #[arg(long)]
        name: Option<ImageName>,
        /// The kernel its vms boot with, unless they name another.
        #[arg(long, value_name = "NAME")]
        kernel_ref: Option<KernelName>,
        /// What it is for, such as `linux/arm64`; this machine when absent.
        #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
        platform: Option<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Load the images that `docker save` or another tool wrote into an archive.
    Load {
        /// The archive, plain or compressed with gzip or zstd; `-` is stdin.
        #[arg(short, long, value_name = "FILE", default_value = "-")]
        input: PathBuf,
        /// What its image is called here; made from its own name when absent.
        #[arg(long)]
        name: Option<ImageName>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Make an image of files on this machine.
    Register(Box<RegisterArgs>),
    /// Write an image as an OCI layout or an archive, which other tools and `image load` read.
    Export {
        /// Its name or reference.
        #[arg(value_name = "NAME")]
        image: String,
        /// Where to: a file, `-` for stdout, or `oci:DIR` for a layout in a new directory.
        #[arg(short, long, value_name = "FILE|-|oci:DIR", default_value = "-")]
        output: OsString,
    },
    /// Make an image of a stopped vm.
    Commit {
        /// Name, id or the beginning of an id.
        #[arg(value_name = "VM")]
        vm: String,
        /// What the image is called.
        #[arg(value_name = "NAME")]
        name: ImageName,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Read images, kernels and downloads, and compare them with what was written down about them.
    Verify {
        /// Only this image and its kernel.
        #[arg(value_name = "NAME")]
        image: Option<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// What was downloaded for images.
    #[command(subcommand)]
    Cache(ImageCacheCommand),
    /// List images.
    #[command(alias = "ls")]
    List(CatalogArgs),
    /// Show an image.
    Show {
        /// Its name or reference.
        #[arg(value_name = "NAME")]
        image: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Delete images no vm uses.
    #[command(alias = "rm")]
    Delete {
        /// Name or reference.
        #[arg(value_name = "NAME", required = true)]
        images: Vec<String>,
    },
}

/// `banger image cache`.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageCacheCommand {
    /// Remove downloads that no image here was made of; what is needed again is downloaded again.
    Prune {
        /// Only say what would be removed.
        #[arg(long)]
        dry_run: bool,
        /// Everything, also what a newer version of an image here would share.
        #[arg(long)]
        all: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// `banger image register`.
#[derive(Debug, Args)]
pub(crate) struct RegisterArgs {
    /// What the image is called.
    #[arg(long)]
    pub(crate) name: ImageName,
    /// A file with an ext4, erofs or squashfs filesystem.
    #[arg(long, value_name = "FILE")]
    pub(crate) rootfs: PathBuf,
    /// A kernel of the store or the catalog [default: the default kernel].
    #[arg(long, value_name = "NAME", conflicts_with = "kernel")]
    pub(crate) kernel_ref: Option<KernelName>,
    /// A vmlinux or bzImage, which becomes a kernel of the image's name.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// What the image boots with by itself; its vms then boot on writable copies of the filesystem.
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Modules of that kernel: `lib/modules/RELEASE`, or a directory with that in it.
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub(crate) modules: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `banger kernel import`.
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// What the kernel is called.
    pub(crate) name: KernelName,
    /// A directory with a kernel: `/boot`, or the root of a tree that has one.
    #[arg(long, value_name = "DIR", required_unless_present = "vmlinux", conflicts_with = "vmlinux")]
    pub(crate) from: Option<PathBuf>,
    /// Which of several kernels there [default: the one this machine runs].
    #[arg(long, requires = "from")]
    pub(crate) release: Option<String>,
    /// A vmlinux or bzImage.
    #[arg(long, value_name = "FILE")]
    pub(crate) vmlinux: Option<PathBuf>,
    /// Its modules: `lib/modules/RELEASE`, or a directory with that in it [default: found beside `--from`].
    #[arg(long, value_name = "DIR")]
    pub(crate) modules: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Lists of what is here or could be.
#[derive(Debug, Args)]
pub(crate) struct CatalogArgs {
    /// What can be pulled by name, instead of what is here.
    #[arg(long)]
    pub(crate) available: bool,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `banger kernel`.
#[derive(Debug, Subcommand)]
pub(crate) enum KernelCommand {
    /// Pull a kernel by its catalog name.
    Pull {
        /// Catalog name.
        name: KernelName,
        /// Replace an older version; running vms keep theirs until they stop.
        #[arg(long)]
        upgrade: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Make a kernel of files on this machine.
    Import(Box<ImportArgs>),
    /// List kernels.
    #[command(alias = "ls")]
    List(CatalogArgs),
    /// Show a kernel.
    Show {
        /// Its name.
        name: KernelName,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Delete kernels no vm uses.
    #[command(alias = "rm")]
    Delete {
        /// Name.
        #[arg(value_name = "NAME", required = true)]
        names: Vec<KernelName>,
    },
}
