//! Where the Debian archive is: the host's own apt sources, or the address the user configured.
//!
//! No mirror's address is built in. The host's sources are read as apt reads them (one-line and deb822 files), and only
//! to learn base addresses; which suites we then ask for is our business. A third party's repository can look just like
//! Debian's, so this module returns candidates in order and the archive client takes the first whose Release file carries
//! Debian's signature and origin.

use std::fs;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::control::paragraphs;

/// Codenames whose main archive also carries the suite we use.
const CODENAMES: [&str; 8] =
    ["buster", "bullseye", "bookworm", "trixie", "forky", "duke", "sid", "experimental"];
/// The aliases that sources may use instead of a codename.
const ALIASES: [&str; 5] = ["oldoldstable", "oldstable", "stable", "testing", "unstable"];
/// Candidates kept for each archive; a host with more than this many mirrors has the good ones first.
const CANDIDATES_MAX: usize = 4;

/// The addresses to fetch from, without a trailing slash, best first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirrors {
    /// Bases of the main archive.
    pub main: Vec<String>,
    /// Bases of the security archive.
    pub security: Vec<String>,
    /// The proxy apt uses for plain http, if it is told to use one.
    pub proxy: Option<String>,
    /// False when the host's apt was told to accept expired Release files (a frozen mirror).
    pub check_valid_until: bool,
}

/// No mirror can be used.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum MirrorError {
    /// Neither the host nor the user names one.
    #[error(
        "no Debian mirror is known: the host has no apt sources for Debian; set `debian_mirror` in the config or \
         BANGER_DEBIAN_MIRROR to a mirror's address"
    )]
    Unknown,
    /// The configured text is not an address we can use.
    #[error("`{}` is not a mirror's address: `debian_mirror` (BANGER_DEBIAN_MIRROR) takes an http or https address, or two (main and security) with a space between", .0.escape_debug())]
    Invalid(String),
}

impl Mirrors {
    /// Decides where to fetch from: `configured` when given, else the apt sources below `root`.
    ///
    /// `configured` is one base address, from which that of the security archive is derived as Debian's mirrors lay them
    /// out (`…/debian` and `…/debian-security`), or both with a space between.
    pub fn find(root: &Path, configured: Option<&str>) -> Result<Self, MirrorError> {
        let apt = AptSettings::load(root);
        let (main, security) = match configured.map(str::trim).filter(|text| !text.is_empty()) {
            Some(text) => {
                let uris: Vec<_> = text.split_whitespace().filter_map(base_uri).collect();
                match (uris.as_slice(), text.split_whitespace().count()) {
                    ([main], 1) => (vec![main.clone()], vec![]),
                    ([main, security], 2) => (vec![main.clone()], vec![security.clone()]),
                    _ => return Err(MirrorError::Invalid(text.to_owned())),
                }
            }
            None => from_sources(root),
        };
        if main.is_empty() {
            return Err(MirrorError::Unknown);
        }
        let mut mirrors = Self {
            main: dedup(main),
            security: dedup(security),
            proxy: apt.proxy,
            check_valid_until: apt.check_valid_until,
        };
        for base in &mirrors.main {
            let derived = derive_security(base);
            if !mirrors.security.contains(&derived) && mirrors.security.len() < CANDIDATES_MAX {
                mirrors.security.push(derived);
            }
        }
        Ok(mirrors)
    }
}

/// Where a mirror of the main archive at `base` usually has the security archive.
fn derive_security(base: &str) -> String {
    format!("{base}-security")
}

fn dedup(uris: Vec<String>) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for uri in uris {
        if !out.contains(&uri) && out.len() < CANDIDATES_MAX {
            out.push(uri);
        }
    }
    out
}

/// Accepts an http or https address and removes trailing slashes.
fn base_uri(uri: &str) -> Option<String> {
    let rest = uri.strip_prefix("http://").or_else(|| uri.strip_prefix("https://"))?;
    let plain =
        uri.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'"' | b'<' | b'>' | b'\\' | b'?' | b'#'));
    (plain && !rest.is_empty() && !rest.starts_with('/')).then(|| uri.trim_end_matches('/').to_owned())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Archive {
    Main,
    Security,
}

/// Tells by suite and components which archive a source entry belongs to, if it can be Debian's.
fn classify(suite: &str, components: &[&str]) -> Option<Archive> {
    let suite = suite.trim_end_matches('/');
    if let Some(base) = suite.strip_suffix("-security").or_else(|| suite.strip_suffix("/updates")) {
        let main = components.iter().any(|c| *c == "main" || *c == "updates/main");
        return (is_release(base) && main).then_some(Archive::Security);
    }
    let base = ["-updates", "-backports", "-proposed-updates"]
        .iter()
        .find_map(|suffix| suite.strip_suffix(suffix))
        .unwrap_or(suite);
    (is_release(base) && components.contains(&"main")).then_some(Archive::Main)
}

fn is_release(name: &str) -> bool {
    CODENAMES.contains(&name) || ALIASES.contains(&name)
}

fn from_sources(root: &Path) -> (Vec<String>, Vec<String>) {
    let (mut main, mut security) = (Vec::new(), Vec::new());
    let mut add = |suite: &str, components: &[&str], uri: &str| {
        if let (Some(archive), Some(uri)) = (classify(suite, components), base_uri(uri)) {
            match archive {
                Archive::Main => main.push(uri),
                Archive::Security => security.push(uri),
            }
        }
    };
    for path in source_files(root) {
        let Some(text) = read_text(&path) else { continue };
        if path.extension().is_some_and(|ext| ext == "sources") {
            read_deb822(&text, &mut add);
        } else {
            read_one_line(&text, &mut add);
        }
    }
    (main, security)
}

fn source_files(root: &Path) -> Vec<PathBuf> {
    let dir = root.join("etc/apt");
    let mut files = vec![dir.join("sources.list")];
    files.extend(sorted_files(&dir.join("sources.list.d"), &["list", "sources"]));
    files
}

fn sorted_files(dir: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let extension = path.extension().and_then(|ext| ext.to_str()).unwrap_or("");
            extensions.contains(&extension)
        })
        .collect();
    files.sort();
    files
}

/// A file as text; one that can't be read (permissions, another encoding) is as good as absent.
fn read_text(path: &Path) -> Option<String> {
    /// A source list longer than this is not one.
    const SIZE_MAX: u64 = 1 << 20;
    if fs::metadata(path).ok()?.len() > SIZE_MAX {
        return None;
    }
    fs::read(path).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn read_one_line(text: &str, add: &mut dyn FnMut(&str, &[&str], &str)) {
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or("");
        let Some(rest) = line.trim().strip_prefix("deb").filter(|r| r.starts_with([' ', '\t', '['])) else {
            continue;
        };
        let rest = rest.trim_start();
        let rest = match rest.strip_prefix('[') {
            Some(options) => match options.split_once(']') {
                Some((_, rest)) => rest,
                None => continue,
            },
            None => rest,
        };
        let words: Vec<&str> = rest.split_whitespace().collect();
        if let [uri, suite, components @ ..] = words.as_slice() {
            add(suite, components, uri);
        }
    }
}

fn read_deb822(text: &str, add: &mut dyn FnMut(&str, &[&str], &str)) {
    for stanza in paragraphs(text) {
        let words = |name| stanza.get(name).unwrap_or("").split_whitespace().collect::<Vec<_>>();
        let disabled = stanza.get("Enabled").is_some_and(|v| ["no", "false", "0", "off"].contains(&v));
        if disabled || !words("Types").contains(&"deb") {
            continue;
        }
        for suite in words("Suites") {
            for uri in words("URIs") {
                add(suite, &words("Components"), uri);
            }
        }
    }
}

/// The few settings of apt.conf that concern us.
#[derive(Debug)]
struct AptSettings {
    proxy: Option<String>,
    check_valid_until: bool,
}

impl AptSettings {
    fn load(root: &Path) -> Self {
        let dir = root.join("etc/apt");
        let mut files = sorted_files(&dir.join("apt.conf.d"), &["", "conf"]);
        files.push(dir.join("apt.conf"));
        let mut settings = Self { proxy: None, check_valid_until: true };
        for text in files.iter().filter_map(|path| read_text(path)) {
            for (name, value) in apt_options(&text) {
                match name.to_ascii_lowercase().as_str() {
                    "acquire::http::proxy" => settings.proxy = base_uri(&value),
                    "acquire::check-valid-until" => {
                        settings.check_valid_until =
                            !["false", "no", "0", "off"].contains(&value.to_ascii_lowercase().as_str());
                    }
                    _ => {}
                }
            }
        }
        settings
    }
}

/// Reads `A::B "value";` and `A { B "value"; };` as flat names and values.
fn apt_options(text: &str) -> Vec<(String, String)> {
    let mut out = Vec::new();
    let mut scopes: Vec<String> = Vec::new();
    let mut words: Vec<String> = Vec::new();
    for token in apt_tokens(text) {
        match token.as_str() {
            "{" => scopes.push(words.drain(..).next().unwrap_or_default()),
            "}" => {
                scopes.pop();
                words.clear();
            }
            ";" => {
                if let [name, value] = words.as_slice() {
                    let mut path = scopes.clone();
                    path.push(name.clone());
                    out.push((path.join("::"), value.clone()));
                }
                words.clear();
            }
            _ => words.push(token),
        }
    }
    out
}

fn apt_tokens(text: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut chars = text.chars().peekable();
    let mut word = String::new();
    while let Some(c) = chars.next() {
        let comment = (c == '/' && matches!(chars.peek(), Some('/' | '*')) && word.is_empty())
            || (c == '#' && word.is_empty());
        if comment {
            if c == '/' && chars.peek() == Some(&'*') {
                let mut last = ' ';
                chars
                    .by_ref()
                    .skip(1)
                    .take_while(|c| !(std::mem::replace(&mut last, *c) == '*' && *c == '/'))
                    .for_each(drop);
            } else {
                chars.by_ref().take_while(|c| *c != '\n').for_each(drop);
            }
        } else if c == '"' {
            tokens.push(chars.by_ref().take_while(|c| *c != '"').collect());
        } else if c.is_whitespace() || matches!(c, '{' | '}' | ';') {
            if !word.is_empty() {
                tokens.push(std::mem::take(&mut word));
            }
            if !c.is_whitespace() {
                tokens.push(c.to_string());
            }
        } else {
            word.push(c);
        }
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    #[test]
    fn one_line_sources() {
        let list = "# comment\n\
            deb cdrom:[Debian 12]/ bookworm main\n\
            deb [arch=amd64 signed-by=/x] http://mirror.example/debian/ bookworm main non-free # trailing\n\
            deb-src http://src.example/debian bookworm main\n\
            deb http://sec.example/debian-security bookworm-security main\n\
            deb http://vendor.example/apt stable vendor\n\
            deb https://other.example/apt cloud-bookworm main\n";
        let dir = root(&[("etc/apt/sources.list", list)]);
        let found = Mirrors::find(dir.path(), None).unwrap();
        assert_eq!(found.main, ["http://mirror.example/debian"]);
        assert_eq!(
            found.security,
            ["http://sec.example/debian-security", "http://mirror.example/debian-security"]
        );
        assert!(found.check_valid_until);
        assert_eq!(found.proxy, None);
    }

    #[test]
    fn deb822_sources_of_another_release() {
        let main = "Types: deb deb-src\nURIs: https://a.example/debian\n http://b.example/debian/\nSuites: trixie trixie-updates\n\
            Components: main\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n -----END PGP PUBLIC KEY BLOCK-----\n\n\
            Enabled: no\nTypes: deb\nURIs: http://off.example/debian\nSuites: trixie\nComponents: main\n";
        let security =
            "Types: deb\nURIs: http://s.example/debian-security\nSuites: trixie-security\nComponents: main\n";
        let dir = root(&[
            ("etc/apt/sources.list.d/debian.sources", main),
            ("etc/apt/sources.list.d/security.sources", security),
            ("etc/apt/sources.list.d/old.list.save", "deb http://save.example/debian trixie main\n"),
        ]);
        let found = Mirrors::find(dir.path(), None).unwrap();
        assert_eq!(found.main, ["https://a.example/debian", "http://b.example/debian"]);
        assert_eq!(found.security[0], "http://s.example/debian-security");
    }

    #[test]
    fn ubuntu_is_not_debian() {
        let dir = root(&[("etc/apt/sources.list", "deb http://u.example/ubuntu noble main universe\n")]);
        let err = Mirrors::find(dir.path(), None).unwrap_err();
        assert_eq!(err, MirrorError::Unknown);
        let text = err.to_string();
        assert!(text.contains("`debian_mirror`") && text.contains("BANGER_DEBIAN_MIRROR"), "{text}");
    }

    #[test]
    fn configured_address_wins_and_is_checked() {
        let dir = root(&[("etc/apt/sources.list", "deb http://apt.example/debian bookworm main\n")]);
        let found = Mirrors::find(dir.path(), Some(" http://mine.example/debian/ ")).unwrap();
        assert_eq!(found.main, ["http://mine.example/debian"]);
        assert_eq!(found.security, ["http://mine.example/debian-security"]);
        let found = Mirrors::find(dir.path(), Some("http://m.example/d https://s.example/x")).unwrap();
        assert_eq!(found.security[0], "https://s.example/x");
        for bad in ["ftp://x/debian", "mirror", "http://", "http://a b c", "http:///x", "http://x/\u{1b}[0m"]
        {
            assert!(matches!(Mirrors::find(dir.path(), Some(bad)), Err(MirrorError::Invalid(_))), "{bad}");
        }
        assert_eq!(Mirrors::find(dir.path(), Some("")).unwrap().main, ["http://apt.example/debian"]);
    }

    #[test]
    fn apt_proxy_and_frozen_mirrors() {
        let conf = "// note\nAcquire::http::Proxy \"http://proxy.example:3128/\"; # tail\n/* Acquire::http::Proxy \"http://no/\"; */\n\
            Acquire { Check-Valid-Until \"false\"; Languages { \"none\"; }; };\n";
        let dir = root(&[
            ("etc/apt/sources.list", "deb http://apt.example/debian bookworm main\n"),
            ("etc/apt/apt.conf.d/10local", conf),
        ]);
        let found = Mirrors::find(dir.path(), None).unwrap();
        assert_eq!(found.proxy.as_deref(), Some("http://proxy.example:3128"));
        assert!(!found.check_valid_until);
    }
}
