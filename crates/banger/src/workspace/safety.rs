//! Names and links that must not come out of a guest.

/// Code points that HFS+ ignores in names.
const IGNORED: [std::ops::RangeInclusive<char>; 4] =
    ['\u{200c}'..='\u{200f}', '\u{202a}'..='\u{202e}', '\u{206a}'..='\u{206f}', '\u{feff}'..='\u{feff}'];

/// Tells whether some filesystem takes this component for `.git`: other case, ends that Windows drops, its short name,
/// its streams, and characters that macOS drops.
pub(crate) fn is_git_name(component: &[u8]) -> bool {
    let text = String::from_utf8_lossy(component);
    let kept: String =
        text.chars().filter(|char| !IGNORED.iter().any(|range| range.contains(char))).collect();
    let first = kept.split([':', '\\']).next().unwrap_or_default();
    let name = first.trim_end_matches(['.', ' ']).to_ascii_lowercase();
    name == ".git" || name == "git~1"
}

/// Tells whether a link, under this name below its root, can lead out of the root.
pub(crate) fn leads_out(path: &[u8], target: &[u8]) -> bool {
    let mut depth = path.iter().filter(|&&byte| byte == b'/').count();
    if target.first() == Some(&b'/') {
        return true;
    }
    for component in target.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." if depth == 0 => return true,
            b".." => depth -= 1,
            // Into the repository itself is as bad as out of the tree.
            component if is_git_name(component) => return true,
            _ => depth += 1,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_git_is_known() {
        for name in [
            ".git",
            ".GIT",
            ".Git ",
            ".git.",
            ".git...",
            "git~1",
            "GIT~1",
            ".git::$INDEX_ALLOCATION",
            ".g\u{200c}it",
            "\u{feff}.git",
            ".git\\x",
        ] {
            assert!(is_git_name(name.as_bytes()), "{name}");
        }
        for name in [".gitignore", "git", ".github", "a.git", ".gi", "git~2", "..git"] {
            assert!(!is_git_name(name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn links_out_of_the_tree_are_known() {
        for (path, target, out) in [
            ("a", "b", false),
            ("a", "/etc/passwd", true),
            ("a", "..", true),
            ("d/a", "../b", false),
            ("d/a", "../../b", true),
            ("d/a", "x/../../b", false),
            ("d/a", "x/../../../b", true),
            ("a", ".git/config", true),
            ("d/a", "../.GIT/hooks", true),
        ] {
            assert_eq!(leads_out(path.as_bytes(), target.as_bytes()), out, "{path} -> {target}");
        }
    }
}
