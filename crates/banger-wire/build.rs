//! Gives every build of the workspace one identity. A release names itself in `BANGER_BUILD`; otherwise it is a
//! fingerprint of what the programs say to each other, so that two builds that would not understand one another know it.

use std::path::PathBuf;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-env-changed=BANGER_BUILD");
    let build = std::env::var("BANGER_BUILD").unwrap_or_else(|_| format!("dev.{:08x}", fingerprint()));
    println!("cargo::rustc-env=BANGER_BUILD={build}");
}

/// FNV-1a of this crate's sources.
fn fingerprint() -> u32 {
    let entries = std::fs::read_dir("src").into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    files.sort();
    let bytes = files.iter().flat_map(|file| std::fs::read(file).unwrap_or_default());
    bytes.fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}
