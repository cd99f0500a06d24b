//! Images and kernels as files: pulling, verifying, flattening, storing.
//!
//! Everything a vm boots from is made here and nothing here knows what a vm is. Input is untrusted (layers,
//! packages, indexes); output is a finished ext4 file or a kernel directory that becomes visible by rename.

pub mod blocking;
pub mod debian;
pub mod ext4;
pub mod filesystem;
pub mod firecracker;
mod hash;
pub mod kernel;
pub mod oci;
mod partial;
pub mod progress;
pub mod rootfs;
pub mod tar;
