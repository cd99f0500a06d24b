//! What banger's programs say to each other: names, sizes, frames and messages.
//!
//! Four conversations share one frame codec ([`frame`]): CLI and daemon ([`daemon`]), CLI or daemon and a vm's
//! supervisor ([`vm`]), supervisor and guest agent ([`guest`]). They are private to one build of banger, except
//! the guest's side, which carries a generation number because a vm keeps the agent it was born with.
//!
//! No I/O here beyond reading and writing frames on one stream.

pub mod bytes;
#[cfg(feature = "tokio")]
pub mod channel;
pub mod config;
pub mod daemon;
pub mod doctor;
pub mod error;
pub mod exec;
pub mod frame;
pub mod guest;
pub mod item;
pub mod names;
pub mod net;
pub mod ports;
pub mod size;
pub mod ssh;
pub mod ssh_agent;
pub mod stats;
#[cfg(feature = "tokio")]
pub mod stream;
pub mod time;
pub mod vm;

/// Identifies one build: CLI, daemon and supervisor compare it in their greeting.
pub const BUILD: &str = concat!(env!("CARGO_PKG_VERSION"), "-", env!("BANGER_BUILD"));
