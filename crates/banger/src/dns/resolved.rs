//! What systemd-resolved has to have besides, so that a server more for the whole machine is asked for its own names only.
//!
//! Servers of the whole machine are one list to it: it asks the one that answered last, whatever the name is, and takes
//! its word. So banger has to be alone in that list, and other names have to have servers of a network connection. Nothing
//! is asked of the program, only its files are read.

use banger_wire::error::{ErrorCode, WireError};
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// Where it is configured, as `resolved.conf(5)` has it; each beside a directory of parts.
const CONFIGS: [&str; 4] = [
    "etc/systemd/resolved.conf",
    "run/systemd/resolved.conf",
    "usr/local/lib/systemd/resolved.conf",
    "usr/lib/systemd/resolved.conf",
];
/// Its own files of the kind that `/etc/resolv.conf` is.
const OWN: [&str; 3] = [
    "run/systemd/resolve/stub-resolv.conf",
    "run/systemd/resolve/resolv.conf",
    "usr/lib/systemd/resolv.conf",
];
/// What it and systemd-networkd know of each network interface, and how a line with its servers begins. Meant for
/// themselves; a line that is called otherwise one day is a machine without servers.
const INTERFACES: [(&str, &str); 2] =
    [("run/systemd/resolve/netif", "SERVERS="), ("run/systemd/netif/links", "DNS=")];
/// Where it listens itself.
const STUBS: [&str; 2] = ["127.0.0.53", "127.0.0.54"];
/// Where it takes questions of programs here, since systemd 247.
const SOCKET: &str = "run/systemd/resolve/io.systemd.Resolve";
/// Longest file that is read.
const FILE_LEN_MAX: u64 = 256 * 1024;
const ELSEWHERE: &str = "name those servers in the settings of the network connection instead, or use the addresses that \
                         `banger vm list` shows";

/// Finds out whether it runs. Its files stay when it is stopped.
pub(super) fn runs(root: &Path) -> bool {
    match UnixStream::connect(root.join(SOCKET)) {
        Ok(_) => true,
        Err(error) if error.kind() == ErrorKind::NotFound => root.join(OWN[0]).exists(),
        Err(_) => false,
    }
}

/// Looks for servers that banger's would get in the way of; `ours` is the file that names banger's.
///
/// # Errors
/// When there are some.
pub(super) fn check(root: &Path, ours: &str) -> Result<(), WireError> {
    let ours = root.join(ours.trim_start_matches('/'));
    let shown = |path: &Path| Path::new("/").join(path.strip_prefix(root).unwrap_or(path));
    if let Some(path) = configs(root).iter().find(|path| **path != ours && has_setting(path, "DNS=")) {
        let message = format!(
            "`{}` gives systemd-resolved servers for the whole machine (`DNS=`), and for any name it would ask one of them or \
             banger, whichever it asked last",
            shown(path).display()
        );
        return Err(WireError::new(ErrorCode::Failed, message).hinted(ELSEWHERE));
    }
    if is_elsewheres(root) && !INTERFACES.iter().any(|(dir, key)| has_servers(&root.join(dir), key)) {
        let message =
            "systemd-resolved has its servers from `/etc/resolv.conf` alone, and would not ask them any more";
        return Err(WireError::new(ErrorCode::Failed, message).hinted(ELSEWHERE));
    }
    Ok(())
}

fn configs(root: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for name in CONFIGS {
        found.insert(root.join(name));
        found.extend(
            entries(&root.join(format!("{name}.d"))).filter(|path| path.extension() == Some("conf".as_ref())),
        );
    }
    found
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn text(path: &Path) -> String {
    let is_read = path.metadata().is_ok_and(|found| found.is_file() && found.len() <= FILE_LEN_MAX);
    let bytes = if is_read { std::fs::read(path).unwrap_or_default() } else { Vec::new() };
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Tells whether a line sets this to something.
fn has_setting(path: &Path, key: &str) -> bool {
    let value = |line: &str| {
        let (name, value) = line.split_once('=')?;
        (name.trim() == key.trim_end_matches('=')).then(|| !value.trim().is_empty())
    };
    text(path).lines().any(|line| value(line) == Some(true))
}

fn has_servers(dir: &Path, key: &str) -> bool {
    entries(dir).any(|path| has_setting(&path, key))
}

/// Tells whether `/etc/resolv.conf` is somebody else's and names servers: it reads that then, unless it has others.
pub(super) fn is_elsewheres(root: &Path) -> bool {
    let path = root.join("etc/resolv.conf");
    let id = |path: &Path| path.metadata().ok().map(|found| (found.dev(), found.ino()));
    let Some(found) = id(&path) else { return false };
    let server = |line: &str| {
        line.strip_prefix("nameserver").map(str::trim).filter(|at| !STUBS.contains(at)).is_some()
    };
    !OWN.iter().any(|own| id(&root.join(own)) == Some(found)) && text(&path).lines().any(server)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    const OURS: &str = "/etc/systemd/resolved.conf.d/banger.conf";

    fn write(root: &Path, name: &str, text: &str) {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn it_runs_when_somebody_is_at_its_socket() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!runs(dir.path()));
        // Older versions have no such socket.
        write(dir.path(), OWN[0], "");
        assert!(runs(dir.path()));
        let socket = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
        assert!(runs(dir.path()));
        drop(socket);
        assert!(!runs(dir.path()), "what it left is there");
    }

    #[test]
    fn servers_of_the_whole_machine_are_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let check = || check(dir.path(), OURS);
        write(
            dir.path(),
            "etc/systemd/resolved.conf",
            "[Resolve]\n#DNS=192.0.2.1\nDNS=\nFallbackDNS=192.0.2.2\n",
        );
        write(dir.path(), &OURS[1..], "[Resolve]\nDNS=127.0.0.1:42069\nDomains=~vm\n");
        write(dir.path(), "etc/systemd/resolved.conf.d/note.txt", "DNS=192.0.2.1\n");
        check().unwrap();
        write(dir.path(), "run/systemd/resolved.conf.d/own.conf", "[Resolve]\n DNS = 192.0.2.1\n");
        insta::assert_snapshot!(check().unwrap_err().message, @"`/run/systemd/resolved.conf.d/own.conf` gives systemd-resolved servers for the whole machine (`DNS=`), and for any name it would ask one of them or banger, whichever it asked last");
        std::fs::remove_file(dir.path().join("run/systemd/resolved.conf.d/own.conf")).unwrap();
        write(dir.path(), "etc/systemd/resolved.conf", "[Resolve]\nDNS=192.0.2.1\n");
        let error = check().unwrap_err();
        assert!(error.message.starts_with("`/etc/systemd/resolved.conf` gives "), "{}", error.message);
        assert_eq!(error.hint.as_deref(), Some(ELSEWHERE));
    }

    #[test]
    fn servers_that_it_would_forget_are_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let (check, path) = (|| check(dir.path(), OURS), dir.path().join("etc/resolv.conf"));
        write(dir.path(), "etc/resolv.conf", "# none\nsearch lan\nnameserver 127.0.0.53\n");
        check().unwrap();
        write(dir.path(), "etc/resolv.conf", "nameserver 192.0.2.1\n");
        insta::assert_snapshot!(check().unwrap_err().message, @"systemd-resolved has its servers from `/etc/resolv.conf` alone, and would not ask them any more");
        // A connection has some.
        write(dir.path(), "run/systemd/resolve/netif/2", "# private\nLLMNR=yes\nSERVERS=\n");
        assert!(check().is_err());
        write(dir.path(), "run/systemd/resolve/netif/2", "# private\nLLMNR=yes\nSERVERS=192.0.2.1\n");
        check().unwrap();
        std::fs::remove_file(dir.path().join("run/systemd/resolve/netif/2")).unwrap();
        write(dir.path(), "run/systemd/netif/links/3", "OPER_STATE=routable\nDNS=192.0.2.1\n");
        check().unwrap();
        std::fs::remove_file(dir.path().join("run/systemd/netif/links/3")).unwrap();
        // It writes the file itself.
        write(dir.path(), OWN[1], "nameserver 192.0.2.1\n");
        std::fs::remove_file(&path).unwrap();
        check().unwrap();
        std::os::unix::fs::symlink(format!("../{}", OWN[1]), &path).unwrap();
        check().unwrap();
    }
}
