//! The grammar of `banger vm cp`.

use clap::Args;
use std::ffi::OsString;

/// Shown before everything else of its help.
pub(crate) const EXAMPLES: &str = "\
banger vm cp notes.txt web:/srv/           a file, into a directory
banger vm cp web:/var/log ./log            a tree, out of it
tar c . | banger vm cp - web:/tmp/x.tar    what comes on stdin
banger vm cp web:/etc/os-release -         to stdout
";

/// `banger vm cp`.
#[derive(Debug, Args)]
pub(crate) struct CopyArgs {
    /// Follow links that are named here; links within trees are copied as such.
    #[arg(short = 'L', long)]
    pub(crate) follow_link: bool,
    /// What is copied: `PATH`, `REF:PATH` in a vm, or `-` for stdin. `DIR/.` is the content of a directory. In a vm, what
    /// is not absolute is below root's home.
    #[arg(value_name = "SRC", required = true)]
    pub(crate) sources: Vec<OsString>,
    /// Where to; `-` is stdout.
    #[arg(value_name = "DST")]
    pub(crate) target: OsString,
}
