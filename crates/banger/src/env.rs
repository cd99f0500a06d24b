//! Variables for the guest, from `--env` and `--env-file`.

use crate::stop::{failed, invalid};
use crate::text::escape;
use banger_wire::bytes::ByteString;
use banger_wire::error::{ErrorCode, WireError};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

/// One variable.
pub(crate) type Variable = (ByteString, ByteString);

/// Returns the variables of the files, then of the flags; the last of one name wins.
///
/// # Errors
/// When a file can't be read or a line is not a variable.
pub(crate) fn collect(files: &[PathBuf], flags: &[OsString]) -> Result<Vec<Variable>, WireError> {
    let own = |name: &OsStr| std::env::var_os(name);
    let mut variables = Vec::new();
    for file in files {
        let text = std::fs::read(file)
            .map_err(|error| failed(format!("could not read `{}`", file.display()), &error))
            .map_err(|error| WireError { code: ErrorCode::Invalid, ..error })?;
        // Some editors begin a file with it.
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&text);
        for (line, number) in text.split(|&byte| byte == b'\n').zip(1..) {
            let line = line.trim_ascii_start().strip_suffix(b"\r").unwrap_or(line.trim_ascii_start());
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            let variable = parse(line, &own).map_err(|mut error| {
                error.causes.push(format!("in line {number} of `{}`", file.display()));
                error
            })?;
            set(&mut variables, variable);
        }
    }
    for flag in flags {
        set(&mut variables, parse(flag.as_bytes(), &own)?);
    }
    Ok(variables)
}

/// What programs look for to find a proxy.
const PROXY: [&str; 5] = ["http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy"];

/// Returns those variables of this process that name proxies, in small and in capital letters.
pub(crate) fn proxy_variables() -> Vec<Variable> {
    let names = PROXY.iter().flat_map(|name| [(*name).to_owned(), name.to_uppercase()]);
    names.filter_map(|name| Some((name.as_str().into(), std::env::var_os(&name)?.into()))).collect()
}

fn set(variables: &mut Vec<Variable>, variable: Option<Variable>) {
    if let Some(variable) = variable {
        variables.retain(|(name, _)| *name != variable.0);
        variables.push(variable);
    }
}

/// Parses `K=V`, or `K` with the value from here; a `K` that is not set here is none.
fn parse(text: &[u8], own: &dyn Fn(&OsStr) -> Option<OsString>) -> Result<Option<Variable>, WireError> {
    let (name, value) = match text.iter().position(|&byte| byte == b'=') {
        Some(at) => (&text[..at], Some(text[at + 1..].to_vec())),
        None => (text, None),
    };
    // In a file, a space there is a mistake, and it would be part of the name.
    let is_odd = name.is_empty() || name.iter().any(u8::is_ascii_whitespace);
    if is_odd || text.contains(&0) {
        let shown = escape(&String::from_utf8_lossy(text));
        return Err(invalid(format!(
            "`{shown}` is not a variable: use `NAME=VALUE`, or `NAME` to pass yours on"
        )));
    }
    let name = ByteString(name.to_vec());
    let value = value.map(ByteString).or_else(|| own(name.as_os_str()).map(ByteString::from));
    Ok(value.map(|value| (name, value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_exact_and_may_come_from_here() {
        let own = |name: &OsStr| (name == "HERE").then(|| OsString::from("there"));
        let some = |name: &str, value: &[u8]| Ok(Some((name.into(), ByteString(value.to_vec()))));
        assert_eq!(parse(b"A=b=c", &own), some("A", b"b=c"));
        assert_eq!(parse(b"A=", &own), some("A", b""));
        assert_eq!(parse(b"A=\xff", &own), some("A", b"\xff"));
        assert_eq!(parse(b"HERE", &own), some("HERE", b"there"));
        assert_eq!(parse(b"ELSEWHERE", &own), Ok(None));
        assert!(parse(b"=x", &own).is_err());
        assert!(parse(b"A =x", &own).is_err() && parse(b"export A=x", &own).is_err());
        assert!(parse(b"", &own).is_err());
    }

    #[test]
    fn files_have_comments_and_flags_win() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("env");
        std::fs::write(&file, "\u{feff}# note\n\nA=1\r\n  B=two words \nA=2\n").unwrap();
        let got = collect(&[file], &["B=3".into()]).unwrap();
        assert_eq!(got, [("A".into(), "2".into()), ("B".into(), "3".into())]);
        assert!(collect(&[dir.path().join("none")], &[]).is_err());
    }
}
