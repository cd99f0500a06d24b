//! Files and trees as a stream of [items](banger_wire::item): both ends of `vm cp`, on the host and in the guest.
//!
//! ```text
//! Directory top, Directory top/a, Parts top/a/f, Part, Part, Whole top/a/f, Whole top/a, Link top/l, Whole top, End
//! ```
//!
//! The same rules hold in both directions, so the same code does. What is copied is called [`TOP`] in the stream,
//! whatever its name is: only the receiving end decides where it goes. The receiver trusts nothing: it creates things in
//! directories that it created or found in this stream, resolved by the kernel beneath the first of them and through no
//! link, and nothing but directories, plain files and symbolic links, without setuid bits.
//!
//! Owners, hard links and extended attributes are not kept; devices, pipes and sockets are left out and named.

mod receive;
mod send;

pub use receive::{Target, receive, receive_into};
pub use send::{send, send_stream};

use std::io::Error;
use std::path::Path;

/// What the copied file or directory itself is called in a stream.
pub const TOP: &str = "top";
/// Bits of a mode that travel: who may read, write and execute.
const PERMISSIONS: u32 = 0o777;
const NANOSECONDS: i64 = 1_000_000_000;

/// Names what an error is about.
fn about(path: &Path, error: impl Into<Error>) -> Error {
    let error = error.into();
    Error::new(error.kind(), format!("`{}`: {error}", path.display().to_string().escape_debug()))
}
