//! Every value in force, and where it comes from.

use super::keys::{CONFIG, Found, Key};
use banger_wire::daemon::{ConfigSource, ConfigValue, ConfigView};
use serde_json::Value;
use std::path::Path;

/// Puts together what is in the file, in the environment, and built in.
pub(crate) fn show(
    path: Option<&Path>,
    exists: bool,
    found: &[Found],
    variable: impl Fn(&str) -> Option<String>,
) -> ConfigView {
    let mut values = Vec::new();
    for key in CONFIG {
        let of_file = found.iter().filter(|found| found.name == key.name).map(|found| ConfigValue {
            key: found.key.clone(),
            value: found.value.clone(),
            source: ConfigSource::File,
            line: Some(found.line),
            variable: None,
        });
        let before = values.len();
        values.extend(of_file);
        if let Some((name, value)) = key.variable.and_then(|name| Some((name, variable(name)?))) {
            values.truncate(before);
            values.push(ConfigValue {
                key: key.name.to_owned(),
                value: Value::String(value),
                source: ConfigSource::Environment,
                line: None,
                variable: Some(name.to_owned()),
            });
        }
        if values.len() == before && !is_repeated(key) {
            values.push(ConfigValue {
                key: key.name.to_owned(),
                value: (key.default)(),
                source: ConfigSource::Default,
                line: None,
                variable: None,
            });
        }
    }
    ConfigView { path: path.map(|path| path.display().to_string()), exists, values }
}

/// A key that there is as often as somebody names it, which may be never.
fn is_repeated(key: &Key) -> bool {
    key.name.contains(['*', '['])
}

#[cfg(test)]
mod tests {
    use super::super::keys::look_through;
    use super::*;

    #[test]
    fn the_environment_is_stronger_than_the_file_and_that_than_what_is_built_in() {
        let text = "debian_mirror = 'a'\nlog_level = 'warn'\n[registry.'r']\nmirror = 'm'\n";
        let found = look_through(text, CONFIG, "", "").unwrap();
        let variable = |name: &str| (name == "BANGER_DEBIAN_MIRROR").then(|| "b".to_owned());
        let view = show(Some(Path::new("/c")), true, &found, variable);
        let of = |key: &str| {
            let value = view.values.iter().find(|value| value.key == key).unwrap();
            (value.value.to_string(), value.source, value.line, value.variable.clone())
        };
        let name = Some("BANGER_DEBIAN_MIRROR".to_owned());
        assert_eq!(of("debian_mirror"), ("\"b\"".to_owned(), ConfigSource::Environment, None, name));
        assert_eq!(of("log_level"), ("\"warn\"".to_owned(), ConfigSource::File, Some(2), None));
        assert_eq!(of("registry.r.mirror"), ("\"m\"".to_owned(), ConfigSource::File, Some(4), None));
        assert_eq!(of("vmm"), ("\"auto\"".to_owned(), ConfigSource::Default, None, None));
        assert_eq!(of("qemu_bin"), ("null".to_owned(), ConfigSource::Default, None, None));
        assert!(view.values.iter().all(|value| !value.key.starts_with("cache")));
    }
}
