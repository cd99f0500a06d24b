//! What the documents promise about the tree.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "a test")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn sources(dir: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
    found
}

#[test]
fn dependencies_point_one_way() {
    let output = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let allowed = |name: &str| -> &[&str] {
        match name {
            "banger-vmm" | "banger-image" | "banger-copy" => &["banger-wire"],
            "banger" => &["banger-wire", "banger-copy"],
            "bangerd" => &["banger-wire", "banger-vmm", "banger-image", "banger-sys"],
            "banger-agent" => &["banger-wire", "banger-copy", "banger-sys"],
            // The VMM of the simulation talks as an agent does.
            "banger-tests" => &["banger-wire"],
            "xtask" => &["banger-tests", "banger-vmm", "banger-wire"],
            _ => &[],
        }
    };
    let mut seen = 0;
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        for dependency in package["dependencies"].as_array().unwrap() {
            let on = dependency["name"].as_str().unwrap();
            if on.starts_with("banger") {
                seen += 1;
                assert!(allowed(name).contains(&on), "{name} must not depend on {on}");
            }
        }
    }
    assert!(seen >= 3, "the test looked at {seen} dependencies");
}

#[test]
fn unsafe_code_lives_in_one_crate() {
    let mut inside = 0;
    // Put together here so that this file does not find itself.
    let word = concat!("unsafe", " {");
    for (path, text) in sources(&root().join("crates")) {
        let has = text.contains(word);
        if path.starts_with(root().join("crates/banger-sys")) {
            inside += usize::from(has);
        } else {
            assert!(!has && !text.contains("allow(unsafe_code"), "{}", path.display());
        }
    }
    assert!(inside > 0, "the search finds what is there");
}

#[test]
fn no_file_is_too_long_to_read() {
    for (path, text) in sources(&root().join("crates")) {
        assert!(text.lines().count() <= 800, "{} has {} lines", path.display(), text.lines().count());
    }
}

#[test]
fn documents_link_to_what_exists() {
    let mut links = BTreeSet::new();
    for document in ["README.md", "ARCHITECTURE.md", "STYLE.md", "SECURITY.md", "CHANGELOG.md"] {
        let text = std::fs::read_to_string(root().join(document)).unwrap();
        for part in text.split("](").skip(1) {
            let target = part.split(')').next().unwrap();
            if !target.starts_with("http") {
                assert!(root().join(target).exists(), "{document} links to {target}");
                links.insert(target.to_owned());
            }
        }
    }
    assert!(!links.is_empty());
}
