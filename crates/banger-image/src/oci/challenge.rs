//! `WWW-Authenticate`: how a registry wants to be spoken to.

/// One way to authenticate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// A user and a password.
    Basic,
    /// A token from a token service.
    Bearer { realm: String, service: Option<String> },
}

impl Challenge {
    /// Finds the best of the ways in the values of the header.
    pub(crate) fn best<'a>(values: impl Iterator<Item = &'a str>) -> Option<Self> {
        let mut best = None;
        for (scheme, parameters) in values.flat_map(parse) {
            let get =
                |name: &str| parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
            match scheme.as_str() {
                "bearer" => {
                    if let Some(realm) = get("realm") {
                        return Some(Self::Bearer { realm, service: get("service") });
                    }
                }
                "basic" => best = Some(Self::Basic),
                _ => {}
            }
        }
        best
    }
}

type Parsed = Vec<(String, Vec<(String, String)>)>;

/// Splits `Scheme a="b", c=d, Other e="f"`. What doesn't fit is left out.
fn parse(value: &str) -> Parsed {
    let mut found: Parsed = Vec::new();
    let mut rest = value.trim();
    while !rest.is_empty() {
        let end = rest.find(|c: char| c == '=' || c == ',' || c.is_whitespace()).unwrap_or(rest.len());
        let (word, behind) = rest.split_at(end);
        if let Some(behind) = behind.trim_start().strip_prefix('=') {
            let (text, behind) = parameter(behind.trim_start());
            if let Some((_, parameters)) = found.last_mut() {
                parameters.push((word.to_ascii_lowercase(), text));
            }
            rest = behind;
        } else {
            if !word.is_empty() {
                found.push((word.to_ascii_lowercase(), Vec::new()));
            }
            rest = behind;
        }
        rest = rest.trim_start_matches(|c: char| c == ',' || c.is_whitespace());
    }
    found
}

/// Reads a value, quoted or not, and returns what is behind it.
fn parameter(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let (mut out, mut escaped) = (String::new(), false);
    for (at, c) in quoted.char_indices() {
        match c {
            _ if escaped => {
                out.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => return (out, &quoted[at + 1..]),
            _ => out.push(c),
        }
    }
    (out, "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_better_way_is_taken() {
        let bearer = |realm: &str, service: Option<&str>| {
            Some(Challenge::Bearer { realm: realm.to_owned(), service: service.map(str::to_owned) })
        };
        for (values, expected) in [
            (&["Basic realm=\"x\""][..], Some(Challenge::Basic)),
            (
                &["Bearer realm=\"https://a/t\",service=\"s\",scope=\"repository:a,b:pull\""],
                bearer("https://a/t", Some("s")),
            ),
            (
                &["basic realm=x, BEARER Realm = \"https://a?b=\\\"c\" , error=x"],
                bearer("https://a?b=\"c", None),
            ),
            (&["Basic realm=\"x\"", "Bearer realm=y"], bearer("y", None)),
            (&["Bearer", "Digest realm=\"x\""], None),
            (&[], None),
            (&[",,= \"", "=", "a=\"b"], None),
        ] {
            assert_eq!(Challenge::best(values.iter().copied()), expected, "{values:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(value in "[Bbearsic=\", \\\\é]{0,40}") {
            let _ = Challenge::best([value.as_str()].into_iter());
        }
    }
}
