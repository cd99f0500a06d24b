//! Builds the agent as a static program, to be embedded: one build, and the agent always fits its host.
#![allow(clippy::disallowed_methods, reason = "a build script runs cargo")]

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let manifest = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let crates = manifest.parent().map(Path::to_path_buf).unwrap_or_default();
    for part in ["banger-agent", "banger-copy", "banger-wire", "banger-sys"] {
        println!("cargo::rerun-if-changed={}", crates.join(part).join("src").display());
        println!("cargo::rerun-if-changed={}", crates.join(part).join("Cargo.toml").display());
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    let arch = std::env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    // musl where its standard library is installed; else the C library of the ordinary target, linked statically.
    let musl = format!("{arch}-unknown-linux-musl");
    let gnu = format!("{arch}-unknown-linux-gnu");
    let target = if has_std(&musl) { &musl } else { &gnu };
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--package", "banger-agent", "--profile", "agent", "--target", target]);
    cargo.arg("--target-dir").arg(out.join("agent")).current_dir(&manifest);
    // What the outer build was told concerns the host's programs, not the guest's.
    for name in [
        "CARGO_ENCODED_RUSTFLAGS",
        "RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
    ] {
        cargo.env_remove(name);
    }
    if target == &gnu {
        cargo.env("RUSTFLAGS", "-C target-feature=+crt-static");
    }
    let built = cargo.status().is_ok_and(|status| status.success());
    assert!(built, "the agent could not be built for {target}");
    let agent = out.join("agent").join(target).join("agent/banger-agent");
    println!("cargo::rustc-env=BANGER_AGENT={}", agent.display());
}

fn has_std(target: &str) -> bool {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).args(["--print", "target-libdir", "--target", target]).output();
    let dir =
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default();
    !dir.is_empty() && Path::new(&dir).is_dir()
}
