//! Names of images in registries, as people write them.

use std::fmt;
use std::str::FromStr;

use super::digest::Digest;

/// The registry that is meant when none is named.
const DEFAULT_REGISTRY: &str = "docker.io";
/// Its other names.
const DEFAULT_ALIASES: [&str; 2] = ["index.docker.io", "registry-1.docker.io"];
/// The longest name of a repository, as registries have it.
const REPOSITORY_MAX: usize = 255;
/// The longest tag, as registries have it.
const TAG_MAX: usize = 128;

/// The text is no image reference.
#[derive(Debug, thiserror::Error)]
#[error("`{}` is not an image reference: {reason}", .text.escape_debug())]
pub struct ReferenceError {
    text: String,
    reason: &'static str,
}

/// An image in a registry: `debian`, `ghcr.io/owner/image:tag`, `localhost:5000/image@sha256:...`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Returns the registry's host, with its port when one was named.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Returns the path within the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Returns the tag. There may be none when there is a digest.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// Returns the digest, which counts more than the tag.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What to ask the registry for.
    pub(crate) fn selector(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let error = |reason| ReferenceError { text: text.chars().take(300).collect(), reason };
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => {
                let digest = digest.parse();
                (
                    name,
                    Some(digest.map_err(|_| {
                        error("the digest is not `sha256:` and 64 hex digits, or `sha512:` and 128")
                    })?),
                )
            }
            None => (text, None),
        };
        // A colon before the last slash is a port.
        let (name, tag) = match name.rfind(':').filter(|at| !name[*at..].contains('/')) {
            Some(at) => (&name[..at], Some(&name[at + 1..])),
            None => (name, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(error(
                "the tag has other characters than letters, digits, `_`, `.` and `-`, or too many",
            ));
        }
        let (registry, path) = match name.split_once('/') {
            Some((first, rest)) if is_host(first) => (first, rest),
            _ => (DEFAULT_REGISTRY, name),
        };
        if !is_valid_host(registry) {
            return Err(error("the registry is not a host name with an optional port"));
        }
        let registry = registry.to_ascii_lowercase();
        let registry =
            if DEFAULT_ALIASES.contains(&registry.as_str()) { DEFAULT_REGISTRY.to_owned() } else { registry };
        let repository = if registry == DEFAULT_REGISTRY && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        if path.is_empty() || !repository.split('/').all(is_component) || repository.len() > REPOSITORY_MAX {
            return Err(error(
                "the name must be lower-case letters and digits, with `.`, `_`, `-` and `/` between them",
            ));
        }
        let tag = match (tag, &digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(Self { registry, repository, tag, digest })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

fn is_host(first: &str) -> bool {
    first.eq_ignore_ascii_case("localhost") || first.contains(['.', ':'])
}

fn is_valid_host(host: &str) -> bool {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, rest)) if address.parse::<std::net::Ipv6Addr>().is_ok() => {
                ("x", rest.strip_prefix(':'))
            }
            _ => return false,
        },
        None => host.split_once(':').map_or((host, None), |(name, port)| (name, Some(port))),
    };
    let label = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    let named_whole = !host.starts_with('[') || host.ends_with(']') || port.is_some();
    named_whole
        && name.split('.').all(label)
        && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|p| p > 0))
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= TAG_MAX
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'))
}

fn is_component(part: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let separator = |run: &str| matches!(run, "." | "_" | "__") || run.bytes().all(|b| b == b'-');
    let (first, last) = (part.bytes().next(), part.bytes().last());
    part.bytes().all(|b| alphanumeric(b) || matches!(b, b'.' | b'_' | b'-'))
        && first.is_some_and(alphanumeric)
        && last.is_some_and(alphanumeric)
        && part.split(|c: char| c.is_ascii_alphanumeric()).all(|run| run.is_empty() || separator(run))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn texts_are_normalised() {
        let digest = format!("sha256:{}", "ab".repeat(32));
        for (text, expected) in [
            ("debian", "docker.io/library/debian:latest".to_owned()),
            ("debian:12-slim", "docker.io/library/debian:12-slim".to_owned()),
            ("grafana/loki", "docker.io/grafana/loki:latest".to_owned()),
            ("docker.io/debian", "docker.io/library/debian:latest".to_owned()),
            ("index.docker.io/a/b:c", "docker.io/a/b:c".to_owned()),
            ("localhost/x", "localhost/x:latest".to_owned()),
            ("localhost:5000/debian:test", "localhost:5000/debian:test".to_owned()),
            ("127.0.0.1:80/a__b/c-d.e", "127.0.0.1:80/a__b/c-d.e:latest".to_owned()),
            ("[::1]:5000/x", "[::1]:5000/x:latest".to_owned()),
            ("GHCR.io/o/i:V1", "ghcr.io/o/i:V1".to_owned()),
            (&format!("x@{digest}"), format!("docker.io/library/x@{digest}")),
            (&format!("h:1/x:t@{digest}"), format!("h:1/x:t@{digest}")),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference.to_string(), expected, "{text}");
            assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
        }
    }

    #[test]
    fn what_is_none_is_named() {
        for text in [
            "",
            ":",
            "@",
            "Debian",
            "A/x",
            "a//b",
            "/a",
            "a/",
            "a:",
            "a:-",
            "a..b",
            "a___b",
            "-a",
            "a@sha256:12",
            "a b",
            "../etc",
            "a/../b",
            "localhost:0/x",
            "localhost:99999/x",
            "ex ample.com/x",
            "[::1/x",
            "[::1]x/x",
            "h./x",
            "a:b:c",
            "a@sha512:00",
            "docker.io/",
            "a\0",
        ] {
            let error = text.parse::<Reference>().unwrap_err().to_string();
            assert!(error.contains(&text.escape_debug().to_string()), "{error}");
        }
        assert!("a".repeat(300).parse::<Reference>().is_err());
        assert!(format!("a:{}", "t".repeat(129)).parse::<Reference>().is_err());
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_is_stable(text in "[a-zA-Z0-9./:@_-]{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
            }
        }
    }
}
