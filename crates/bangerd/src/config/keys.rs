//! Every key there is: what it takes, and what counts without it.
//!
//! A file is looked through before it is understood, so that whoever wrote it is told of each mistake in its words: the
//! line, the key, what was given and what is accepted. The same is done with a checkout's `.banger.toml`, which has few
//! keys and is written by somebody nobody knows.

use crate::daemon::{DEFAULT_DISK, DEFAULT_IMAGE, VCPU_MAX, default_memory, default_vcpu, ram};
use crate::loopback::{self, LoopbackRange};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::names::CacheName;
use banger_wire::size::Mebibytes;
use banger_wire::time::{AutoStop, parse_duration};
use serde_json::{Value, json};
use std::path::Path;
use toml::de::{DeTable, DeValue};

/// A key. `*` in its name is any name, and what is before `[]` is a list of tables.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Key {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// What counts when nobody says anything; null where that is nothing.
    pub(crate) default: fn() -> Value,
    /// A variable of the daemon's environment that is stronger than the file.
    pub(crate) variable: Option<&'static str>,
}

/// What a key takes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// A text, and what it means.
    Text(&'static str),
    /// `true` or `false`.
    Flag,
    /// An absolute path, or one below the owner's home.
    Path,
    /// A size of memory or disk.
    Size,
    /// A whole number, from and to.
    Number(u64, u64),
    /// One of these words.
    Word(&'static [&'static str]),
    /// A time.
    Time,
    /// A time, or `never`.
    TimeOrNever,
    /// Permission bits as an octal text.
    Mode,
    /// A host, or a list of them.
    Hosts,
    /// The name of a cache.
    Cache,
    /// Addresses of the loopback.
    LoopbackRange,
}

/// A size as the file may have it.
fn size(size: Mebibytes) -> Value {
    json!(size.to_string().replace(' ', ""))
}

const NET: Kind = Kind::Word(&["internet", "none", "full", "allow"]);
const NUMBER: Kind = Kind::Number(1, i64::MAX.unsigned_abs());

const fn key(name: &'static str, kind: Kind, default: fn() -> Value) -> Key {
    Key { name, kind, default, variable: None }
}

const fn unset(name: &'static str, kind: Kind) -> Key {
    key(name, kind, || Value::Null)
}

/// Those of `config.toml`, in the order they are shown in.
pub(crate) const CONFIG: &[Key] = &[
    Key {
        variable: Some("BANGER_LOG"),
        ..key("log_level", Kind::Word(&["error", "warn", "info", "debug", "trace"]), || json!("info"))
    },
    Key {
        variable: Some("BANGER_STATE_DIR"),
        ..key("state_dir", Kind::Path, || json!(crate::paths::default_state()))
    },
    key("default_image", Kind::Text("the name of an image, or a reference"), || json!(DEFAULT_IMAGE)),
    key("vmm", Kind::Word(&["auto", "firecracker", "qemu"]), || json!("auto")),
    unset("firecracker_bin", Kind::Path),
    unset("qemu_bin", Kind::Path),
    key("restore", Kind::Flag, || json!(true)),
    key("dns_listen", Kind::Text("an address and port of the loopback, or `off`"), || {
        json!("127.0.0.1:42069")
    }),
    key("loopback_cidr", Kind::LoopbackRange, || json!(LoopbackRange::default())),
    unset("ssh_key_path", Kind::Path),
    unset("disk_rate", Kind::Size),
    unset("net_rate", Kind::Size),
    key("boot_timeout", Kind::Time, || json!(format!("{}s", crate::plan::BOOT_TIMEOUT.as_secs()))),
    key("auto_stop_after", Kind::TimeOrNever, || json!("never")),
    Key { variable: Some("BANGER_DEBIAN_MIRROR"), ..unset("debian_mirror", Kind::Text("an address")) },
    key("pass_proxy", Kind::Flag, || json!(false)),
    unset("ca_file", Kind::Path),
    key("vm_defaults.vcpu", Kind::Number(1, VCPU_MAX as u64), || json!(default_vcpu())),
    key("vm_defaults.memory", Kind::Size, || size(default_memory(ram()))),
    key("vm_defaults.disk_size", Kind::Size, || size(DEFAULT_DISK)),
    key("vm_defaults.net", NET, || json!("internet")),
    key("limits.unpacked", Kind::Size, || {
        size(Mebibytes(banger_image::oci::Limits::default().unpacked_bytes >> 20))
    }),
    key("limits.entries", NUMBER, || json!(banger_image::oci::Limits::default().entries)),
    key("limits.ratio", NUMBER, || json!(banger_image::oci::Limits::default().ratio)),
    key("limits.layers", NUMBER, || json!(banger_image::oci::Limits::default().layers)),
    key("firecracker.version", Kind::Text("a version"), || json!(banger_image::firecracker::VERSION)),
    unset("firecracker.sha256", Kind::Text("a digest")),
    unset("firecracker.url", Kind::Text("an address")),
    unset("registry.*.mirror", Kind::Hosts),
    unset("registry.*.insecure", Kind::Flag),
    unset("registry.*.ca_file", Kind::Path),
    unset("file_sync[].host", Kind::Path),
    unset("file_sync[].guest", Kind::Path),
    unset("file_sync[].mode", Kind::Mode),
    unset("cache[].name", Kind::Cache),
    unset("cache[].path", Kind::Path),
];

/// Those of a checkout's own file.
pub(crate) const PROJECT: &[Key] = &[
    unset("image", Kind::Text("the name of an image, or a reference")),
    unset("vcpu", Kind::Number(1, VCPU_MAX as u64)),
    unset("memory", Kind::Size),
    unset("disk_size", Kind::Size),
    unset("net", NET),
];

/// A value that was found.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Found {
    /// Its key as it would be written, such as `registry."a.example".mirror`.
    pub(crate) key: String,
    /// The name of the [`Key`].
    pub(crate) name: &'static str,
    pub(crate) value: Value,
    pub(crate) line: usize,
}

/// Looks through a file. `what` is what it is called in messages, as in `the config`.
///
/// # Errors
/// When it is no TOML, or has a key that means nothing or a value that can't be; all such keys, with their lines.
pub(crate) fn look_through(
    text: &str,
    keys: &'static [Key],
    what: &str,
    path: &str,
) -> Result<Vec<Found>, WireError> {
    let table = DeTable::parse(text).map_err(|error| no_toml(text, &error, what, path))?;
    let mut walk = Walk { text, keys, found: Vec::new(), wrong: Vec::new() };
    walk.table(table.get_ref(), "", "");
    walk.found.sort_by_key(|found| found.line);
    if walk.wrong.is_empty() {
        return Ok(walk.found);
    }
    walk.wrong.sort();
    let causes = walk.wrong.into_iter().map(|(line, text)| format!("line {line}: {text}"));
    Err(unusable(what, path, causes.collect()))
}

/// The error of a file that is no TOML, or that can't be understood.
pub(crate) fn no_toml(text: &str, error: &toml::de::Error, what: &str, path: &str) -> WireError {
    let line = error.span().map_or(1, |span| line_at(text, span.start));
    unusable(what, path, vec![format!("line {line}: {}", error.message())])
}

fn unusable(what: &str, path: &str, causes: Vec<String>) -> WireError {
    let mut error = WireError::new(ErrorCode::Invalid, format!("{what} `{path}` can't be used"));
    let (lines, them) = if causes.len() == 1 { ("that line", "it") } else { ("those lines", "them") };
    error.causes = causes;
    error.hinted(format!("correct {lines} of `{path}`, or take {them} out"))
}

fn line_at(text: &str, offset: usize) -> usize {
    text.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count() + 1
}

struct Walk<'t> {
    text: &'t str,
    keys: &'static [Key],
    found: Vec<Found>,
    wrong: Vec<(usize, String)>,
}

impl Walk<'_> {
    /// `pattern` and `shown` are the name of the table, as keys have it and as it was written, with a dot at the end.
    fn table(&mut self, table: &DeTable<'_>, pattern: &str, shown: &str) {
        // The names that may follow, each once.
        let mut level: Vec<&'static str> = Vec::new();
        for key in self.keys {
            if let Some(segment) = key.name.strip_prefix(pattern).and_then(|rest| rest.split('.').next())
                && !level.contains(&segment)
            {
                level.push(segment);
            }
        }
        for (key, value) in table {
            let line = line_at(self.text, key.span().start);
            let name = key.get_ref().as_ref();
            let label = format!("{shown}{}", quoted(name));
            let segment =
                level.iter().find(|segment| **segment == "*" || segment.trim_end_matches("[]") == name);
            let Some(segment) = segment else {
                self.wrong.push((line, self.unknown(name, &label, &level, shown)));
                continue;
            };
            let pattern = format!("{pattern}{segment}");
            if let Some(key) = self.keys.iter().find(|key| key.name == pattern) {
                self.value(key, label, value.get_ref(), line);
            } else if let (true, DeValue::Array(tables)) = (segment.ends_with("[]"), value.get_ref())
                && tables.iter().all(|of| of.get_ref().is_table())
            {
                for (number, of) in tables.iter().enumerate() {
                    if let DeValue::Table(of) = of.get_ref() {
                        self.table(of, &format!("{pattern}."), &format!("{label}[{number}]."));
                    }
                }
            } else if let (false, DeValue::Table(of)) = (segment.ends_with("[]"), value.get_ref()) {
                self.table(of, &format!("{pattern}."), &format!("{label}."));
            } else {
                let written =
                    if segment.ends_with("[]") { format!("[[{label}]]") } else { format!("[{label}]") };
                self.wrong
                    .push((line, format!("`{label}` is a table, which begins with a line `{written}`")));
            }
        }
    }

    fn value(&mut self, key: &Key, shown: String, value: &DeValue<'_>, line: usize) {
        let json = to_json(value);
        if key.kind.takes(&json) {
            self.found.push(Found { key: shown, name: key.name, value: json, line });
        } else {
            let given: String = json.to_string().chars().take(80).collect();
            self.wrong.push((line, format!("`{shown}` can't be {given}: it is {}", key.kind.accepts())));
        }
    }

    fn unknown(&self, name: &str, label: &str, level: &[&'static str], shown: &str) -> String {
        let names = level.iter().map(|segment| segment.trim_end_matches("[]"));
        let near = names
            .clone()
            .map(|known| (distance(name, known), format!("{shown}{known}")))
            .filter(|(distance, known)| *distance <= 1 + known.len().min(name.len()) / 4)
            .min();
        // It may be known in another table.
        let moved = || {
            let same =
                |key: &&Key| key.name.rsplit('.').next() == Some(name) && !key.name.contains(['*', '[']);
            self.keys.iter().find(same).map(|key| key.name.to_owned())
        };
        let text = format!("there is no key `{label}`");
        match near.map(|(_, known)| known).or_else(moved) {
            Some(known) => format!("{text}; did you mean `{known}`?"),
            None => {
                let names: Vec<String> = names.map(|known| format!("`{shown}{known}`")).collect();
                format!("{text}; there are {}", names.join(", "))
            }
        }
    }
}

/// A name as TOML writes it.
fn quoted(name: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !name.is_empty() && name.chars().all(bare) { name.to_owned() } else { json!(name).to_string() }
}

fn to_json(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => json!(text),
        DeValue::Integer(number) => {
            let digits = number.as_str().replace('_', "");
            i64::from_str_radix(&digits, number.radix())
                .map_or_else(|_| json!(digits), |number| json!(number))
        }
        DeValue::Float(number) => number.as_str().parse::<f64>().map_or(Value::Null, |number| json!(number)),
        DeValue::Boolean(flag) => json!(flag),
        DeValue::Datetime(time) => json!(time.to_string()),
        DeValue::Array(values) => values.iter().map(|value| to_json(value.get_ref())).collect(),
        DeValue::Table(table) => {
            let entry = |(key, value): (&toml::Spanned<_>, &toml::Spanned<DeValue<'_>>)| {
                let key: &toml::de::DeString<'_> = key.get_ref();
                (key.to_string(), to_json(value.get_ref()))
            };
            Value::Object(table.iter().map(entry).collect())
        }
    }
}

impl Kind {
    fn takes(self, value: &Value) -> bool {
        let text = value.as_str().filter(|text| !text.is_empty());
        match self {
            Self::Text(_) => text.is_some(),
            Self::Flag => value.is_boolean(),
            Self::Path => text.is_some_and(|text| text.starts_with("~/") || Path::new(text).is_absolute()),
            Self::Size => match text {
                Some(text) => text.parse().is_ok_and(|size: Mebibytes| size.0 > 0),
                None => value.as_u64().is_some_and(|number| number > 0),
            },
            Self::Number(from, to) => value.as_u64().is_some_and(|number| (from..=to).contains(&number)),
            Self::Word(words) => text.is_some_and(|text| words.contains(&text)),
            Self::Time => text.is_some_and(|text| parse_duration(text).is_ok()),
            Self::TimeOrNever => text.is_some_and(|text| text.parse::<AutoStop>().is_ok()),
            Self::Mode => text.is_some_and(|text| parse_mode(text).is_some()),
            Self::Hosts => {
                let list = value.as_array().is_some_and(|list| list.iter().all(Value::is_string));
                text.is_some() || list
            }
            Self::Cache => text.is_some_and(|text| text.parse::<CacheName>().is_ok()),
            Self::LoopbackRange => text.is_some_and(|text| text.parse::<LoopbackRange>().is_ok()),
        }
    }

    fn accepts(self) -> String {
        match self {
            Self::Text(what) => format!("{what}, as a text in quotes"),
            Self::Flag => "`true` or `false`".to_owned(),
            Self::Path => "an absolute path, or one that begins with `~/`".to_owned(),
            Self::Size => "a size such as `\"512M\"` or `\"2G\"`, or a number of MiB".to_owned(),
            Self::Number(from, to) if to < u64::from(u32::MAX) => {
                format!("a whole number from {from} to {to}")
            }
            Self::Number(from, _) => format!("a whole number, {from} or more"),
            Self::Word(words) => {
                let words: Vec<String> = words.iter().map(|word| format!("`\"{word}\"`")).collect();
                format!("one of {}", words.join(", "))
            }
            Self::Time => "a time such as `\"30s\"` or `\"5m\"`".to_owned(),
            Self::TimeOrNever => "a time such as `\"30m\"` or `\"2h\"`, or `\"never\"`".to_owned(),
            Self::Mode => "an octal mode as a text, such as `\"600\"`".to_owned(),
            Self::Hosts => "a host, or a list of hosts".to_owned(),
            Self::LoopbackRange => loopback::ACCEPTED.to_owned(),
            Self::Cache => "1 to 128 lower-case letters, digits, `.`, `_` and `-`".to_owned(),
        }
    }
}

/// Understands permission bits.
pub(crate) fn parse_mode(text: &str) -> Option<u32> {
    let octal = (3..=4).contains(&text.len()) && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
    octal.then(|| u32::from_str_radix(text, 8).ok()).flatten().filter(|mode| *mode <= 0o777)
}

/// How many letters have to be added, dropped, changed or swapped with their neighbour to make one of the other.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<usize>>()];
    for (i, &from) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, &to) in b.iter().enumerate() {
            let mut best = (rows[i][j] + usize::from(from != to)).min(rows[i][j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && from == b[j - 1] && a[i - 1] == to {
                best = best.min(rows[i - 1][j - 1] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::{CONFIG, PROJECT, Value, distance, look_through};
    use insta::assert_snapshot;

    fn wrong(text: &str) -> String {
        let error = look_through(text, CONFIG, "the config", "/c.toml").unwrap_err();
        assert_eq!(error.message, "the config `/c.toml` can't be used");
        format!("{}\nhint: {}", error.causes.join("\n"), error.hint.unwrap())
    }

    #[test]
    fn every_mistake_is_told_with_line_key_value_and_what_is_accepted() {
        let text = "debian_miror = 'x'\nmemory = '2G'\nnonsense = 1\n\u{7}x = 1\nvmm = 'xen'\nrestore = 'yes'\n\
                    auto_stop_after = 'soon'\nfirecracker_bin = 'fc'\n[vm_defaults]\nvcpus = 2\nvcpu = 0\n\
                    memory = '1.5G'\n[registry.'a.example']\nmirror = [1]\ninsecur = true\n[file_sync]\n\
                    host = 'x'\n[[cache]]\nname = 'Not OK'\n";
        assert_snapshot!(wrong(&text.replace('\u{7}', "\"a b\".")));
        assert_snapshot!(wrong("vmm = 'qemu'\nvmm = 'auto'\n"));
        assert_snapshot!(wrong("[[file_sync]]\nhost = 'a/b'\nmode = '999'\n"));
        assert_snapshot!(wrong("vmm =\n"));
        assert_snapshot!(wrong("loopback_cidr = '127.0.0.0/16'\nssh_key_path = 'id_ed25519'\n"), @r#"
        line 1: `loopback_cidr` can't be "127.0.0.0/16": it is a range such as `"127.77.0.0/16"`: in 127.0.0.0/8, from /9 to /28, without 127.0.0.0/24
        line 2: `ssh_key_path` can't be "id_ed25519": it is an absolute path, or one that begins with `~/`
        hint: correct those lines of `/c.toml`, or take them out
        "#);
    }

    #[test]
    fn what_is_found_has_its_line() {
        let text = "# a comment\nvmm = 'qemu'\n\n[registry.'a.example:5000']\nmirror = 'b'\n[[cache]]\nname = 'c'\n\
                    path = '/c'\n[vm_defaults]\nmemory = 0x200\n";
        let found = look_through(text, CONFIG, "", "").unwrap();
        let shown: Vec<String> =
            found.iter().map(|found| format!("{} {} = {}", found.line, found.key, found.value)).collect();
        assert_eq!(
            shown,
            [
                "2 vmm = \"qemu\"",
                "5 registry.\"a.example:5000\".mirror = \"b\"",
                "7 cache[0].name = \"c\"",
                "8 cache[0].path = \"/c\"",
                "10 vm_defaults.memory = 512"
            ]
        );
    }

    #[test]
    fn a_checkout_may_say_little() {
        for text in ["vmm = 'qemu'", "env = {A = '1'}", "[[file_sync]]\nhost = '~/.ssh'", "[a.b.c]"] {
            assert!(look_through(text, PROJECT, "", "").is_err(), "{text}");
        }
        assert_eq!(look_through("image = 'a'\nnet = 'none'", PROJECT, "", "").unwrap().len(), 2);
    }

    #[test]
    fn depth_is_no_way_to_end_the_daemon() {
        let len = usize::try_from(banger_wire::daemon::ProjectFile::LEN_MAX).unwrap();
        for text in [
            format!("image{} = 1", ".a".repeat(len / 2 - 5)),
            format!("[image{}]", ".a".repeat(len / 2 - 5)),
            format!("image = {}", "[".repeat(len - 10)),
            format!("image = {}1{}", "[".repeat(len / 2 - 10), "]".repeat(len / 2 - 10)),
            format!("image = {}", "{a=".repeat(len / 3 - 10)),
            format!("{} = 1", vec!["a"; len / 2 - 5].join(".")),
        ] {
            // On a stack as the daemon's threads have.
            assert!(look_through(&text, PROJECT, "", "").is_err(), "{}", &text[..20]);
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_values_or_an_error(text in "([a-z_.\"'=\\[\\]{}\n,0-9#-]|image|cache|net|\\PC){0,60}") {
            for keys in [CONFIG, PROJECT] {
                let _ = look_through(&text, keys, "", "");
            }
        }
    }

    #[test]
    fn every_key_is_in_its_reference() {
        let page = include_str!("../../../../docs/config.md");
        for key in CONFIG.iter().chain(PROJECT) {
            let name = key.name.replace("*", "\"HOST\"").replace("[]", "");
            assert!(page.contains(&format!("`{name}`")), "docs/config.md lacks `{name}`");
            if let Some(variable) = key.variable {
                assert!(page.contains(variable), "docs/config.md lacks `{variable}`");
            }
        }
    }

    #[test]
    fn defaults_are_values_their_keys_take() {
        for key in CONFIG {
            let default = (key.default)();
            assert!(default == Value::Null || key.kind.takes(&default), "{} {default}", key.name);
        }
    }

    #[test]
    fn distances_count_mistakes_of_typing() {
        for (a, b, expected) in [("", "abc", 3), ("vcpu", "vcpus", 1), ("memroy", "memory", 1), ("a", "b", 1)]
        {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
    }
}
