//! The packages that exist: the merged indexes of all suites, searched by name.
//!
//! An index is 50 MB of text of which a build reads some hundred paragraphs, so the text is kept as it came and only names
//! are indexed; a package is parsed when it is asked for. Of several versions of a package the highest wins, which is
//! how updates and security fixes replace what the release had.

use std::collections::HashMap;

use thiserror::Error;

use super::control::{Paragraph, blocks};
use super::dependency::{Group, Provided, parse_groups, parse_provides};
use super::release::parse_sha256;
use super::version::Version;

/// Entry of an index that can't be used.
#[derive(Debug, Error)]
#[error("the archive's entry of package `{}` has no valid `{field}`", .package.escape_debug())]
pub struct EntryError {
    package: String,
    field: &'static str,
}

/// One binary package as the archive's index describes it.
#[derive(Debug, Clone)]
pub struct Package {
    /// Name, `[a-z0-9][a-z0-9+.-]*`.
    pub name: String,
    /// Version.
    pub version: Version,
    /// Debian's architecture name, or `all`.
    pub architecture: String,
    /// Whether the archive marks it `Essential: yes`.
    pub essential: bool,
    /// `required`, `important`, `standard`, `optional` or `extra`.
    pub priority: String,
    /// `Pre-Depends` and `Depends`, each group a list of alternatives.
    pub depends: Vec<Group>,
    /// `Conflicts` and `Breaks`.
    pub conflicts: Vec<Group>,
    /// `Replaces`: whose files this package may take over.
    pub replaces: Vec<Group>,
    /// `Provides`.
    pub provides: Vec<Provided>,
    /// Address of the .deb.
    pub url: String,
    /// Digest of the .deb.
    pub sha256: String,
    /// Size of the .deb in bytes.
    pub size: u64,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    document: usize,
    start: usize,
    end: usize,
}

#[derive(Debug)]
struct Document {
    /// Address below which `Filename` is found.
    base: String,
    text: String,
}

/// All packages of all suites.
#[derive(Debug, Default)]
pub struct Index {
    documents: Vec<Document>,
    by_name: HashMap<String, Vec<Entry>>,
    /// Virtual name to the names of packages that provide it.
    providers: HashMap<String, Vec<String>>,
}

impl Index {
    /// Adds the text of a suite's package index; its files are below `base`.
    pub fn add(&mut self, base: &str, text: String) {
        let document = self.documents.len();
        for block in blocks(&text) {
            let start = block.as_ptr() as usize - text.as_ptr() as usize;
            let Some(name) = line_value(block, "Package:") else { continue };
            let entry = Entry { document, start, end: start + block.len() };
            self.by_name.entry(name.to_owned()).or_default().push(entry);
            for provided in line_value(block, "Provides:").map(parse_provides).unwrap_or_default() {
                let names = self.providers.entry(provided.name).or_default();
                if !names.iter().any(|have| have == name) {
                    names.push(name.to_owned());
                }
            }
        }
        self.documents.push(Document { base: base.to_owned(), text });
    }

    /// Returns the highest version of a package, or nothing when there is none of that name.
    pub fn best(&self, name: &str) -> Result<Option<Package>, EntryError> {
        let mut best: Option<Package> = None;
        for entry in self.by_name.get(name).map(Vec::as_slice).unwrap_or(&[]) {
            let package = self.parse(entry, name)?;
            if best.as_ref().is_none_or(|have| package.version > have.version) {
                best = Some(package);
            }
        }
        Ok(best)
    }

    /// Returns the names of packages that provide a virtual name, sorted.
    pub fn providers(&self, name: &str) -> Vec<&str> {
        let mut names: Vec<&str> = self
            .providers
            .get(name)
            .map(|names| names.iter().map(String::as_str).collect())
            .unwrap_or_default();
        names.sort_unstable();
        names
    }

    /// Returns the names of all packages marked essential, sorted.
    pub fn essential(&self) -> Vec<&str> {
        let is_essential = |entry: &Entry| {
            let block = &self.documents[entry.document].text[entry.start..entry.end];
            line_value(block, "Essential:") == Some("yes")
        };
        let mut names: Vec<&str> = self
            .by_name
            .iter()
            .filter(|(_, entries)| entries.iter().any(is_essential))
            .map(|(name, _)| name.as_str())
            .collect();
        names.sort_unstable();
        names
    }

    fn parse(&self, entry: &Entry, name: &str) -> Result<Package, EntryError> {
        let document = &self.documents[entry.document];
        let fields = Paragraph::parse(&document.text[entry.start..entry.end]);
        let err = |field| EntryError { package: name.to_owned(), field };
        let text = |field| fields.get(field).ok_or(err(field));
        let groups = |field| parse_groups(fields.get(field).unwrap_or("")).map_err(|_| err(field));
        if !is_package_name(name) {
            return Err(err("Package"));
        }
        let filename = text("Filename")?;
        if !is_plain_path(filename) {
            return Err(err("Filename"));
        }
        let architecture = text("Architecture")?;
        if !is_package_name(architecture) {
            return Err(err("Architecture"));
        }
        let mut depends = groups("Pre-Depends")?;
        depends.extend(groups("Depends")?);
        let mut conflicts = groups("Conflicts")?;
        conflicts.extend(groups("Breaks")?);
        Ok(Package {
            name: name.to_owned(),
            version: Version::parse(text("Version")?).map_err(|_| err("Version"))?,
            architecture: architecture.to_owned(),
            essential: fields.get("Essential") == Some("yes"),
            priority: fields.get("Priority").unwrap_or("optional").to_owned(),
            depends,
            conflicts,
            replaces: groups("Replaces")?,
            provides: fields.get("Provides").map(parse_provides).unwrap_or_default(),
            url: format!("{}/{filename}", document.base),
            sha256: parse_sha256(text("SHA256")?).ok_or(err("SHA256"))?,
            size: text("Size")?.parse().map_err(|_| err("Size"))?,
        })
    }
}

/// Finds a one-line field without parsing the whole paragraph.
fn line_value<'a>(block: &'a str, field: &str) -> Option<&'a str> {
    block.lines().find_map(|line| line.strip_prefix(field)).map(str::trim)
}

/// Whether a name follows the archive's rules; it becomes part of file names.
pub fn is_package_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'+' | b'-' | b'.');
    name.bytes().all(plain)
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name.len() < 128
}

/// Whether a path from an index stays below the mirror's base address.
fn is_plain_path(path: &str) -> bool {
    let plain = |b: u8| {
        b.is_ascii_alphanumeric() || matches!(b, b'/' | b'+' | b'-' | b'.' | b'_' | b'~' | b'%' | b':')
    };
    !path.is_empty()
        && path.bytes().all(plain)
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, version: &str, more: &str) -> String {
        format!(
            "Package: {name}\nVersion: {version}\nArchitecture: amd64\n{more}Filename: pool/{name}.deb\nSize: 9\nSHA256: {}\n\n",
            "0".repeat(64)
        )
    }

    #[test]
    fn highest_version_of_all_suites_wins() {
        let mut index = Index::default();
        index.add(
            "http://m/debian",
            entry("a", "1.0-1", "Provides: virt\n") + &entry("b", "1", "Essential: yes\n"),
        );
        index.add("http://m/debian-security", entry("a", "1.0-1+deb12u1", "Provides: virt, other (= 2)\n"));
        index.add("http://m/updates", entry("a", "1.0-1~pre", ""));
        let best = index.best("a").unwrap().unwrap();
        assert_eq!(best.version.as_str(), "1.0-1+deb12u1");
        assert_eq!(best.url, "http://m/debian-security/pool/a.deb");
        assert_eq!(index.providers("virt"), ["a"]);
        assert_eq!(index.providers("other"), ["a"]);
        assert_eq!(index.essential(), ["b"]);
        assert!(index.best("c").unwrap().is_none());
    }

    #[test]
    fn refuses_entries_that_could_leave_their_place() {
        for (from, to) in [
            ("pool/a.deb", "../a.deb"),
            ("pool/a.deb", "/etc/passwd"),
            ("pool/a.deb", "pool//a.deb"),
            ("pool/a.deb", "pool/a.deb?x"),
            ("Version: 1", "Version: "),
            ("Size: 9", "Size: -1"),
            ("Architecture: amd64", "Architecture: ../x"),
        ] {
            let mut index = Index::default();
            index.add("http://m", entry("a", "1", "").replace(from, to));
            assert!(index.best("a").is_err(), "{to}");
        }
        let mut index = Index::default();
        index.add("http://m", entry("../a", "1", ""));
        assert!(index.best("../a").is_err());
    }
}
