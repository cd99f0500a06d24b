//! From a list of wanted packages to everything that must be installed with them.
//!
//! Deliberately simple: for each package the archive's highest version, for each dependency the first alternative that is
//! already chosen, else the first that exists, no recommendations, no backtracking. A stable release is consistent
//! enough for that, and where it is not the result is an error rather than a surprise.

use std::collections::{BTreeMap, VecDeque};

use thiserror::Error;

use super::dependency::{Group, Relation};
use super::index::{EntryError, Index, Package};

/// Packages chosen before we believe the archive is broken; the largest image needs below 300.
const PACKAGES_MAX: usize = 5_000;

/// The wanted packages can't be installed together.
#[derive(Debug, Error)]
pub enum ResolveError {
    /// A wanted package doesn't exist.
    #[error("the Debian archive has no package `{0}`")]
    Unknown(String),
    /// A dependency can't be met.
    #[error("package `{package}` needs `{needs}`, which the archive doesn't have")]
    Unmet {
        /// The package.
        package: String,
        /// The dependency, as the archive writes it.
        needs: String,
    },
    /// Two chosen packages exclude each other.
    #[error("packages `{package}` and `{other}` can't be installed together")]
    Conflict {
        /// The package that says so.
        package: String,
        /// The other one.
        other: String,
    },
    /// There is no end to it.
    #[error("more than {PACKAGES_MAX} packages would be needed")]
    TooMany,
    /// An entry of the index is broken.
    #[error("the package index is damaged")]
    Entry(#[from] EntryError),
}

/// Returns the wanted packages and everything they need, sorted by name.
pub fn resolve(index: &Index, wanted: &[&str]) -> Result<Vec<Package>, ResolveError> {
    let mut resolver = Resolver { index, chosen: BTreeMap::new(), queue: VecDeque::new() };
    for name in wanted {
        let package = index.best(name)?.ok_or_else(|| ResolveError::Unknown((*name).to_owned()))?;
        resolver.choose(package)?;
    }
    while let Some(name) = resolver.queue.pop_front() {
        let depends = resolver.chosen.get(&name).map(|package| package.depends.clone()).unwrap_or_default();
        for group in depends {
            resolver.satisfy(&name, &group)?;
        }
    }
    let chosen: Vec<Package> = resolver.chosen.into_values().collect();
    check_conflicts(&chosen)?;
    Ok(chosen)
}

struct Resolver<'a> {
    index: &'a Index,
    chosen: BTreeMap<String, Package>,
    queue: VecDeque<String>,
}

impl Resolver<'_> {
    fn choose(&mut self, package: Package) -> Result<(), ResolveError> {
        if self.chosen.len() >= PACKAGES_MAX {
            return Err(ResolveError::TooMany);
        }
        if !self.chosen.contains_key(&package.name) {
            self.queue.push_back(package.name.clone());
            self.chosen.insert(package.name.clone(), package);
        }
        Ok(())
    }

    fn satisfy(&mut self, package: &str, group: &Group) -> Result<(), ResolveError> {
        if group.iter().any(|relation| self.chosen.values().any(|have| meets(have, relation))) {
            return Ok(());
        }
        for relation in group {
            if let Some(candidate) = self.candidate(relation)? {
                return self.choose(candidate);
            }
        }
        Err(ResolveError::Unmet { package: package.to_owned(), needs: render(group) })
    }

    /// The real package of that name, else the best of those that provide it.
    fn candidate(&self, relation: &Relation) -> Result<Option<Package>, ResolveError> {
        if let Some(real) = self.index.best(&relation.name)?.filter(|real| relation.accepts(&real.version)) {
            return Ok(Some(real));
        }
        let mut best: Option<Package> = None;
        for name in self.index.providers(&relation.name) {
            let Some(provider) = self.index.best(name)? else { continue };
            // Providers come sorted by name, so of equal priority the first stays.
            let better = best.as_ref().is_none_or(|have| rank(&provider) < rank(have));
            if meets(&provider, relation) && better {
                best = Some(provider);
            }
        }
        Ok(best)
    }
}

fn rank(package: &Package) -> usize {
    let order = ["required", "important", "standard"];
    order.iter().position(|priority| *priority == package.priority).unwrap_or(order.len())
}

/// Whether a package meets a relation by its name or by what it provides.
fn meets(package: &Package, relation: &Relation) -> bool {
    (package.name == relation.name && relation.accepts(&package.version))
        || package.provides.iter().any(|provided| relation.accepts_provided(provided))
}

/// Renders alternatives as the archive writes them, without versions.
fn render(group: &Group) -> String {
    group.iter().map(|relation| relation.name.as_str()).collect::<Vec<_>>().join(" | ")
}

fn check_conflicts(chosen: &[Package]) -> Result<(), ResolveError> {
    for package in chosen {
        for relation in package.conflicts.iter().flatten() {
            let other = chosen.iter().find(|other| other.name != package.name && meets(other, relation));
            if let Some(other) = other {
                let (package, other) = (package.name.clone(), other.name.clone());
                return Err(ResolveError::Conflict { package, other });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(entries: &[&str]) -> Index {
        let mut index = Index::default();
        let text: String = entries
            .iter()
            .map(|entry| {
                let (head, more) = entry.split_once('\n').unwrap_or((entry, ""));
                let (name, version) = head.split_once(' ').unwrap();
                let more = if more.is_empty() { String::new() } else { format!("{more}\n") };
                format!(
                    "Package: {name}\nVersion: {version}\nArchitecture: all\n{more}Filename: p/{name}.deb\nSize: 1\nSHA256: {}\n\n",
                    "0".repeat(64)
                )
            })
            .collect();
        index.add("http://m", text);
        index
    }

    #[track_caller]
    fn check(entries: &[&str], wanted: &[&str], expected: &[&str]) {
        let found = resolve(&index(entries), wanted).unwrap();
        assert_eq!(found.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn closure_with_cycles() {
        check(
            &["a 1\nDepends: b", "b 1\nPre-Depends: c (>= 1)\nDepends: a", "c 2", "d 1"],
            &["a"],
            &["a", "b", "c"],
        );
    }

    #[test]
    fn alternatives() {
        // The first that exists.
        check(&["a 1\nDepends: x | b | c", "b 1", "c 1"], &["a"], &["a", "b"]);
        // One that is chosen anyway.
        check(&["a 1\nDepends: b | c", "b 1", "c 1"], &["a", "c"], &["a", "c"]);
        // The version decides.
        check(&["a 1\nDepends: b (>= 2) | c", "b 1", "c 1"], &["a"], &["a", "c"]);
    }

    #[test]
    fn virtual_packages() {
        let providers = ["m 1\nProvides: awk\nPriority: required", "g 1\nProvides: awk\nPriority: optional"];
        check(&["a 1\nDepends: awk", providers[0], providers[1]], &["a"], &["a", "m"]);
        check(&["a 1\nDepends: awk", providers[0], providers[1]], &["a", "g"], &["a", "g"]);
        check(&["a 1\nDepends: v (>= 2)", "o 1\nProvides: v", "p 9\nProvides: v (= 2)"], &["a"], &["a", "p"]);
    }

    #[test]
    fn errors_name_the_packages() {
        let err = resolve(&index(&["a 1\nDepends: b (>= 2) | c", "b 1"]), &["a"]).unwrap_err();
        assert_eq!(err.to_string(), "package `a` needs `b | c`, which the archive doesn't have");
        assert!(matches!(resolve(&index(&[]), &["zz"]), Err(ResolveError::Unknown(name)) if name == "zz"));
        let err = resolve(&index(&["a 1\nConflicts: b", "b 1"]), &["a", "b"]).unwrap_err();
        assert_eq!(err.to_string(), "packages `a` and `b` can't be installed together");
        assert!(resolve(&index(&["a 1\nBreaks: b (<< 2)", "b 2"]), &["a", "b"]).is_ok());
    }

    #[test]
    fn a_package_does_not_conflict_with_what_it_provides() {
        check(&["a 1\nProvides: mta\nConflicts: mta"], &["a"], &["a"]);
        let both = index(&["a 1\nProvides: mta\nConflicts: mta", "b 1\nProvides: mta"]);
        assert!(matches!(resolve(&both, &["a", "b"]), Err(ResolveError::Conflict { .. })));
    }
}
