//! Gives every build of the workspace one identity: the commit when there is one.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=BANGER_BUILD");
    let build = std::env::var("BANGER_BUILD").unwrap_or_else(|_| "dev".to_owned());
    println!("cargo::rustc-env=BANGER_BUILD={build}");
}
