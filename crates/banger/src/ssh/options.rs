//! What `ssh` is told: banger's settings, and which of the user's words are whose.

use super::keys::Keys;
use crate::paths::{STATE_DIR_VARIABLE, StateDir};
use crate::stop::failed;
use banger_wire::error::{ErrorCode, WireError};
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// Settings of OpenSSH 10.1 and later, for its command line: in a file, one that `ssh` does not know is an error for every
/// host there is, and what may be unknown can only be said once for all. The stream does not leave this machine, so there is
/// nothing to record for later.
pub(super) const NEWER: [&str; 2] = ["IgnoreUnknown=*", "WarnWeakCrypto=no-pq-kex"];
/// Options of `ssh` that take a value (OpenSSH 10).
const WITH_VALUE: &[u8] = b"BbcDEeFIiJLlmOoPpQRSWw";

/// Splits what follows the vm into options of `ssh`, and the command.
pub(super) fn split(args: Vec<OsString>) -> (Vec<OsString>, Vec<OsString>) {
    let mut args = args.into_iter().peekable();
    let mut options = Vec::new();
    while let Some(word) = args.next_if(|word| word.len() > 1 && word.as_bytes()[0] == b'-') {
        if word == "--" {
            break;
        }
        let letters = &word.as_bytes()[1..];
        let takes_next =
            letters.iter().position(|letter| WITH_VALUE.contains(letter)) == Some(letters.len() - 1);
        options.push(word);
        options.extend(if takes_next { args.next() } else { None });
    }
    (options, args.collect())
}

/// Returns the settings that make `ssh` speak to vms; `vm` is which one, as a word of a `ProxyCommand`.
///
/// # Errors
/// When a path can't be written in a file of settings.
pub(super) fn pinned(
    keys: &Keys,
    state: &StateDir,
    vm: &str,
) -> Result<Vec<(&'static str, String)>, WireError> {
    let program =
        std::env::current_exe().map_err(|error| failed("could not tell where banger is", &error))?;
    let proxy = format!(
        "env {STATE_DIR_VARIABLE}={} {} vm ssh-proxy '{vm}'",
        shell_word(state.path())?,
        shell_word(&program)?
    );
    let fixed = |name, value: &str| (name, value.to_owned());
    Ok(vec![
        ("ProxyCommand", proxy),
        fixed("ProxyUseFdpass", "no"),
        fixed("Port", "22"),
        ("IdentityFile", quoted(&keys.client_key())?),
        fixed("IdentitiesOnly", "yes"),
        fixed("PubkeyAuthentication", "yes"),
        fixed("PreferredAuthentications", "publickey"),
        fixed("AddKeysToAgent", "no"),
        ("UserKnownHostsFile", quoted(&keys.known_hosts())?),
        fixed("GlobalKnownHostsFile", "/dev/null"),
        fixed("StrictHostKeyChecking", "yes"),
        fixed("CheckHostIP", "no"),
        fixed("UpdateHostKeys", "no"),
        // The ones the guest's side has.
        fixed("KexAlgorithms", "curve25519-sha256"),
        fixed("HostKeyAlgorithms", "ssh-ed25519"),
        fixed("Ciphers", "chacha20-poly1305@openssh.com"),
    ])
}

fn text(path: &Path) -> Result<&str, WireError> {
    let text = path.to_str().filter(|text| !text.contains(['"', '\n', '\r']));
    text.ok_or_else(|| {
        let message = format!("`{}` can't be named in ssh's settings", path.display());
        WireError::new(ErrorCode::Failed, message)
            .hinted(format!("choose another directory with `{STATE_DIR_VARIABLE}`"))
    })
}

/// A path as a value of a setting.
pub(super) fn quoted(path: &Path) -> Result<String, WireError> {
    Ok(format!("\"{}\"", text(path)?.replace('%', "%%")))
}

/// A path as a word of a `ProxyCommand`, which a shell reads. A plain one has no quotes: some editors that read ssh's
/// settings by themselves split the line without a shell.
fn shell_word(path: &Path) -> Result<String, WireError> {
    let text = text(path)?;
    if text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-+,@".contains(&byte)) {
        return Ok(text.to_owned());
    }
    Ok(format!("'{}'", text.replace('%', "%%").replace('\'', "'\\''")))
}

/// Takes the quotes off a host that [`pinned`] has in a `ProxyCommand`, where no shell did. There they have to be: what a
/// host is called may come from elsewhere, such as the address of a repository.
pub(super) fn unquoted(host: &str) -> &str {
    host.strip_prefix('\'').and_then(|rest| rest.strip_suffix('\'')).unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_sshs_and_the_rest_is_the_command() {
        for (line, options, command) in [
            ("uname -a", "", "uname -a"),
            ("-- uname -a", "", "uname -a"),
            ("-v -A -- uname -a", "-v -A", "uname -a"),
            ("-L 80:localhost:80 -N", "-L 80:localhost:80 -N", ""),
            ("-L80:localhost:80 ls -l", "-L80:localhost:80", "ls -l"),
            ("-NfL 80:localhost:80 ls", "-NfL 80:localhost:80", "ls"),
            ("-l web id", "-l web", "id"),
            ("-oUser=web id", "-oUser=web", "id"),
            ("-o User=web -t -- -x --", "-o User=web -t", "-x --"),
            ("-p", "-p", ""),
            ("- x", "", "- x"),
        ] {
            let (got, words) = split(line.split(' ').map(OsString::from).collect());
            let join = |words: Vec<OsString>| words.join("".as_ref() as &std::ffi::OsStr);
            let joined = |text: &str| OsString::from(text.replace(' ', ""));
            assert_eq!((join(got), join(words)), (joined(options), joined(command)), "{line}");
        }
    }

    #[test]
    fn paths_are_one_word() {
        assert_eq!(shell_word(Path::new("/a b/it's 100%")).unwrap(), r"'/a b/it'\''s 100%%'");
        assert_eq!(shell_word(Path::new("/home/a.b/bin_1/banger-2")).unwrap(), "/home/a.b/bin_1/banger-2");
        for special in ["/a;b", "/a$b", "/a*", "/~a", "/a`b", "/a&b", "/ä", "/a\\b", "/a=b"] {
            assert!(shell_word(Path::new(special)).unwrap().starts_with('\''), "{special}");
        }
        assert_eq!(["web.vm", "'web.vm'", "'web", "'"].map(unquoted), ["web.vm", "web.vm", "'web", "'"]);
        assert_eq!(quoted(Path::new("/a b/100%")).unwrap(), "\"/a b/100%%\"");
        assert!(quoted(Path::new("/a\"b")).is_err() && shell_word(Path::new("/a\nb")).is_err());
    }
}
