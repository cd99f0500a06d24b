//! Relations between packages: `Depends`, `Conflicts`, `Provides` and their like.

use thiserror::Error;

use super::index::is_package_name;
use super::version::Version;

/// A relation field can't be read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{}` is not a package relation", .0.escape_debug())]
pub struct ParseRelationError(String);

/// How a version must compare to the stated one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    /// `<<`
    Earlier,
    /// `<=`
    EarlierOrEqual,
    /// `=`
    Equal,
    /// `>=`
    LaterOrEqual,
    /// `>>`
    Later,
}

/// One package named in a relation, with the versions it may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relation {
    /// Package or virtual package.
    pub name: String,
    /// The condition on its version.
    pub version: Option<(Operator, Version)>,
}

/// Alternatives, any of which will do (in `Conflicts` there is only one).
pub type Group = Vec<Relation>;

/// A virtual package and, where stated, the version it is provided at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provided {
    /// The virtual name.
    pub name: String,
    /// `Provides: name (= version)`.
    pub version: Option<Version>,
}

impl Relation {
    /// Whether a real package of this version meets the condition.
    pub fn accepts(&self, version: &Version) -> bool {
        match &self.version {
            None => true,
            Some((operator, wanted)) => match operator {
                Operator::Earlier => version < wanted,
                Operator::EarlierOrEqual => version <= wanted,
                Operator::Equal => version == wanted,
                Operator::LaterOrEqual => version >= wanted,
                Operator::Later => version > wanted,
            },
        }
    }

    /// Whether a provided name meets the condition: an unversioned one meets no versioned condition.
    pub fn accepts_provided(&self, provided: &Provided) -> bool {
        self.name == provided.name
            && match &provided.version {
                Some(version) => self.accepts(version),
                None => self.version.is_none(),
            }
    }
}

/// Parses a comma separated list of alternatives.
pub fn parse_groups(text: &str) -> Result<Vec<Group>, ParseRelationError> {
    text.split(',')
        .map(str::trim)
        .filter(|group| !group.is_empty())
        .map(|group| group.split('|').map(parse_relation).collect())
        .collect()
}

fn parse_relation(text: &str) -> Result<Relation, ParseRelationError> {
    let err = || ParseRelationError(text.trim().chars().take(200).collect());
    let (name, condition) = match text.split_once('(') {
        Some((name, rest)) => (name.trim(), Some(rest.trim().strip_suffix(')').ok_or_else(err)?.trim())),
        None => (text.trim(), None),
    };
    // `:any` and `:native` only matter where there is more than one architecture.
    let name = name.split_once(':').map_or(name, |(name, _)| name);
    if !is_package_name(name) {
        return Err(err());
    }
    let version = match condition {
        None => None,
        Some(condition) => {
            let end = condition.find(|c| !matches!(c, '<' | '>' | '=')).ok_or_else(err)?;
            let operator = match &condition[..end] {
                "<<" => Operator::Earlier,
                // The single forms are obsolete and mean "or equal".
                "<=" | "<" => Operator::EarlierOrEqual,
                "=" => Operator::Equal,
                ">=" | ">" => Operator::LaterOrEqual,
                ">>" => Operator::Later,
                _ => return Err(err()),
            };
            Some((operator, Version::parse(condition[end..].trim()).map_err(|_| err())?))
        }
    };
    Ok(Relation { name: name.to_owned(), version })
}

/// Parses a `Provides` field; parts that can't be read provide nothing.
pub fn parse_provides(text: &str) -> Vec<Provided> {
    text.split(',')
        .filter_map(|part| parse_relation(part).ok())
        .filter_map(|relation| match relation.version {
            None => Some(Provided { name: relation.name, version: None }),
            Some((Operator::Equal, version)) => {
                Some(Provided { name: relation.name, version: Some(version) })
            }
            Some(_) => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_groups() {
        let groups =
            parse_groups("libc6 (>= 2.36), debconf (>= 0.5) | debconf-2.0, perl:any,\n python3 (<<3.12)")
                .unwrap();
        assert_eq!(groups.len(), 4);
        assert_eq!(groups[1].len(), 2);
        assert_eq!(groups[2][0].name, "perl");
        assert!(groups[0][0].accepts(&Version::parse("2.36-9").unwrap()));
        assert!(!groups[3][0].accepts(&Version::parse("3.12").unwrap()));
        assert!(parse_groups("").unwrap().is_empty());
        for bad in ["a (", "a (1)", "a (=)", "A", "a b", "a (=> 1)", "|", "a (= 1 2)"] {
            assert!(parse_groups(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn unversioned_provides_meet_no_versioned_relation() {
        let provides = parse_provides("awk, editor (= 2), odd (>= 1)");
        assert_eq!(provides.len(), 2);
        let relation = |text| parse_groups(text).unwrap().remove(0).remove(0);
        assert!(relation("awk").accepts_provided(&provides[0]));
        assert!(!relation("awk (>= 1)").accepts_provided(&provides[0]));
        assert!(relation("editor (>= 1)").accepts_provided(&provides[1]));
        assert!(!relation("editor (>> 2)").accepts_provided(&provides[1]));
    }
}
