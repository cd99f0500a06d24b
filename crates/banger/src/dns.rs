//! `dns setup`: what has the machine's resolver ask banger for names of vms, and only for those.
//!
//! Nothing is run here: the files are written or removed, and the command that makes the resolver read them is said.

mod resolved;

use crate::args::{DnsSetupArgs, ResolverArg};
use crate::context::Context;
use crate::stop::{Ended, failed};
use banger_wire::error::{ErrorCode, WireError};
use std::io::{ErrorKind, Write as _};
use std::net::SocketAddr;
use std::path::Path;

/// How each file begins, so that nobody else's is removed.
const MARK: &str = " Written by `banger dns setup`, which also removes it.\n";
/// Longest file that is read to see whether it is ours.
const FILE_LEN_MAX: u64 = 4096;

/// What makes a resolver ask.
#[derive(Debug)]
struct Recipe {
    resolver: &'static str,
    /// Files and their contents after the mark.
    files: Vec<(&'static str, String)>,
    /// Has the resolver read them.
    reload: &'static str,
    /// Worth knowing.
    note: &'static str,
}

fn recipe(resolver: ResolverArg, at: SocketAddr) -> Recipe {
    // The addresses are this machine's own, which `stop-dns-rebind` has dnsmasq take out of answers elsewhere.
    let dnsmasq = format!("server=/vm/{}#{}\nrebind-domain-ok=/vm/\n", at.ip(), at.port());
    match resolver {
        ResolverArg::SystemdResolved => Recipe {
            resolver: "systemd-resolved",
            files: vec![
                ("/etc/systemd/resolved.conf.d/banger.conf", format!("[Resolve]\nDNS={at}\nDomains=~vm\n")),
                // The root zone proves that there is no `vm`, to those who ask it.
                ("/etc/dnssec-trust-anchors.d/banger.negative", "vm\n".to_owned()),
            ],
            reload: "sudo systemctl restart systemd-resolved",
            note: "systemd 246 or later",
        },
        ResolverArg::Dnsmasq => Recipe {
            resolver: "dnsmasq",
            files: vec![("/etc/dnsmasq.d/banger.conf", dnsmasq)],
            reload: "sudo systemctl restart dnsmasq",
            note: "where dnsmasq reads `/etc/dnsmasq.d`, as Debian's and Fedora's do",
        },
        ResolverArg::NetworkManager => Recipe {
            resolver: "NetworkManager",
            files: vec![("/etc/NetworkManager/dnsmasq.d/banger.conf", dnsmasq)],
            reload: "sudo systemctl reload NetworkManager",
            note: "where its configuration says `dns=dnsmasq`",
        },
    }
}

/// Finds out what resolves names, by what runs.
fn detect(root: &Path) -> Option<ResolverArg> {
    let has = |path: &str| root.join(path).exists();
    let other = if has("run/NetworkManager/dnsmasq.pid") {
        Some(ResolverArg::NetworkManager)
    } else if has("run/dnsmasq/dnsmasq.pid") || has("run/dnsmasq.pid") {
        Some(ResolverArg::Dnsmasq)
    } else {
        None
    };
    // Where both run, the one has the other behind it, or nobody asks it.
    let is_behind = other.is_some() && resolved::is_elsewheres(root);
    if resolved::runs(root) && !is_behind { Some(ResolverArg::SystemdResolved) } else { other }
}

/// Runs `banger dns setup`.
pub(crate) fn setup(context: &mut Context, args: &DnsSetupArgs) -> Ended {
    let text = run(Path::new("/"), args)?;
    context.ui.data(&text)?;
    Ok(0)
}

const ALL: [ResolverArg; 3] =
    [ResolverArg::SystemdResolved, ResolverArg::Dnsmasq, ResolverArg::NetworkManager];

fn run(root: &Path, args: &DnsSetupArgs) -> Result<String, WireError> {
    if args.uninstall {
        // Another resolver may run by now.
        let resolvers = args.resolver.map_or(ALL.to_vec(), |resolver| vec![resolver]);
        let recipes: Vec<_> = resolvers.into_iter().map(|resolver| recipe(resolver, args.listen)).collect();
        return uninstall(root, &recipes);
    }
    let Some(resolver) = args.resolver.or_else(|| detect(root)) else {
        let message = "neither systemd-resolved nor dnsmasq runs here";
        return Err(WireError::new(ErrorCode::Failed, message).hinted(
            "name the one there will be with `--resolver`, or use the addresses that `banger vm list` shows",
        ));
    };
    let recipe = recipe(resolver, args.listen);
    if let (ResolverArg::SystemdResolved, Some((ours, _))) = (resolver, recipe.files.first()) {
        resolved::check(root, ours)?;
    }
    if args.install { install(root, &recipe) } else { Ok(shown(&recipe)) }
}

/// The first line of a file: a comment, which lists of trust anchors begin with a semicolon.
fn mark(name: &str) -> String {
    format!("{}{MARK}", if name.ends_with(".negative") { ';' } else { '#' })
}

fn shown(recipe: &Recipe) -> String {
    let mut text = format!("# for {} ({})\n", recipe.resolver, recipe.note);
    for (path, content) in &recipe.files {
        text.push_str(&format!("sudo mkdir -p {}\n", path.rsplit_once('/').map_or("/", |(dir, _)| dir)));
        text.push_str(&format!("sudo tee {path} <<'END'\n{}{content}END\n", mark(path)));
    }
    text.push_str(recipe.reload);
    text.push('\n');
    text
}

fn cannot(what: &str, path: &str, error: &std::io::Error) -> WireError {
    let failure = failed(format!("could not {what} `{path}`"), error);
    if error.kind() == ErrorKind::PermissionDenied {
        return failure.hinted("run it with root's rights: `sudo banger dns setup …`");
    }
    failure
}

/// What is there under a name: nothing, a file of ours, or somebody else's.
fn is_ours(path: &Path, name: &str) -> Result<Option<()>, WireError> {
    match path.symlink_metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(cannot("read", name, &error)),
        Ok(found) if found.is_file() && found.len() <= FILE_LEN_MAX => {
            let text = std::fs::read(path).map_err(|error| cannot("read", name, &error))?;
            if text.starts_with(mark(name).as_bytes()) {
                return Ok(Some(()));
            }
        }
        Ok(_) => {}
    }
    Err(WireError::new(ErrorCode::Failed, format!("`{name}` is there, and banger has not written it"))
        .hinted("move it away, or put what `banger dns setup` shows where you want it"))
}

fn install(root: &Path, recipe: &Recipe) -> Result<String, WireError> {
    let inside = |name: &str| root.join(name.trim_start_matches('/'));
    // Nothing is written before everything can be.
    for (name, _) in &recipe.files {
        is_ours(&inside(name), name)?;
    }
    let mut text = String::new();
    for (name, content) in &recipe.files {
        let path = inside(name);
        let dir = path.parent().unwrap_or(root);
        let write = || -> std::io::Result<()> {
            std::fs::create_dir_all(dir)?;
            let mut file = tempfile::Builder::new().prefix(".banger-").tempfile_in(dir)?;
            file.write_all(mark(name).as_bytes())?;
            file.write_all(content.as_bytes())?;
            let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o644);
            file.as_file().set_permissions(everybody)?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            Ok(())
        };
        write().map_err(|error| cannot("write", name, &error))?;
        text.push_str(&format!("wrote {name}\n"));
    }
    text.push_str(&format!("left to do: {}\n", recipe.reload));
    Ok(text)
}

fn uninstall(root: &Path, recipes: &[Recipe]) -> Result<String, WireError> {
    let inside = |name: &str| root.join(name.trim_start_matches('/'));
    let mut found = Vec::new();
    // Nothing is removed before everything is known to be ours.
    for recipe in recipes {
        for (name, _) in &recipe.files {
            found.extend(is_ours(&inside(name), name)?.map(|()| (recipe.reload, *name)));
        }
    }
    let mut text = String::new();
    for (_, name) in &found {
        std::fs::remove_file(inside(name)).map_err(|error| cannot("remove", name, &error))?;
        text.push_str(&format!("removed {name}\n"));
    }
    for recipe in recipes.iter().filter(|recipe| found.iter().any(|(reload, _)| *reload == recipe.reload)) {
        text.push_str(&format!("left to do: {}\n", recipe.reload));
    }
    if text.is_empty() {
        let resolvers: Vec<_> = recipes.iter().map(|recipe| recipe.resolver).collect();
        return Ok(format!("nothing of banger's is there for {}\n", resolvers.join(", ")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn args(resolver: Option<ResolverArg>) -> DnsSetupArgs {
        DnsSetupArgs {
            install: false,
            uninstall: false,
            resolver,
            listen: "127.0.0.1:42069".parse().unwrap(),
        }
    }

    #[test]
    fn recipes_are_as_written_down() {
        let dir = tempfile::tempdir().unwrap();
        let all = ALL.map(|resolver| run(dir.path(), &args(Some(resolver))).unwrap());
        insta::assert_snapshot!(all.join("\n"), @r"
        # for systemd-resolved (systemd 246 or later)
        sudo mkdir -p /etc/systemd/resolved.conf.d
        sudo tee /etc/systemd/resolved.conf.d/banger.conf <<'END'
        # Written by `banger dns setup`, which also removes it.
        [Resolve]
        DNS=127.0.0.1:42069
        Domains=~vm
        END
        sudo mkdir -p /etc/dnssec-trust-anchors.d
        sudo tee /etc/dnssec-trust-anchors.d/banger.negative <<'END'
        ; Written by `banger dns setup`, which also removes it.
        vm
        END
        sudo systemctl restart systemd-resolved

        # for dnsmasq (where dnsmasq reads `/etc/dnsmasq.d`, as Debian's and Fedora's do)
        sudo mkdir -p /etc/dnsmasq.d
        sudo tee /etc/dnsmasq.d/banger.conf <<'END'
        # Written by `banger dns setup`, which also removes it.
        server=/vm/127.0.0.1#42069
        rebind-domain-ok=/vm/
        END
        sudo systemctl restart dnsmasq

        # for NetworkManager (where its configuration says `dns=dnsmasq`)
        sudo mkdir -p /etc/NetworkManager/dnsmasq.d
        sudo tee /etc/NetworkManager/dnsmasq.d/banger.conf <<'END'
        # Written by `banger dns setup`, which also removes it.
        server=/vm/127.0.0.1#42069
        rebind-domain-ok=/vm/
        END
        sudo systemctl reload NetworkManager
        ");
    }

    #[test]
    fn what_is_installed_is_removed_and_nothing_else() {
        for resolver in ALL {
            let dir = tempfile::tempdir().unwrap();
            let install = DnsSetupArgs { install: true, ..args(Some(resolver)) };
            let uninstall = DnsSetupArgs { uninstall: true, ..args(Some(resolver)) };
            let nothing = run(dir.path(), &uninstall).unwrap();
            assert!(nothing.starts_with("nothing of banger's is there for "), "{nothing}");
            let recipe = recipe(resolver, install.listen);
            for _ in 0..2 {
                run(dir.path(), &install).unwrap();
                for (name, content) in &recipe.files {
                    let path = dir.path().join(&name[1..]);
                    assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}{content}", mark(name)));
                    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o644);
                    assert_eq!(path.parent().unwrap().read_dir().unwrap().count(), 1);
                }
            }
            run(dir.path(), &uninstall).unwrap();
            let (name, _) = recipe.files.last().unwrap();
            let path = dir.path().join(&name[1..]);
            assert!(!path.exists());
            // Somebody else's stays as it is, and then nothing else is touched either.
            std::fs::write(&path, "mine\n").unwrap();
            for args in [&install, &uninstall] {
                let error = run(dir.path(), args).unwrap_err();
                assert_eq!(error.message, format!("`{name}` is there, and banger has not written it"));
            }
            assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine\n");
            let (first, _) = &recipe.files[0];
            assert!(recipe.files.len() == 1 || !dir.path().join(&first[1..]).exists());
        }
    }

    #[test]
    fn what_any_resolver_was_given_is_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let uninstall = DnsSetupArgs { uninstall: true, ..args(None) };
        let nothing = "nothing of banger's is there for systemd-resolved, dnsmasq, NetworkManager\n";
        assert_eq!(run(dir.path(), &uninstall).unwrap(), nothing);
        for resolver in [ResolverArg::Dnsmasq, ResolverArg::SystemdResolved] {
            run(dir.path(), &DnsSetupArgs { install: true, ..args(Some(resolver)) }).unwrap();
        }
        insta::assert_snapshot!(run(dir.path(), &uninstall).unwrap(), @r"
        removed /etc/systemd/resolved.conf.d/banger.conf
        removed /etc/dnssec-trust-anchors.d/banger.negative
        removed /etc/dnsmasq.d/banger.conf
        left to do: sudo systemctl restart systemd-resolved
        left to do: sudo systemctl restart dnsmasq
        ");
        assert_eq!(run(dir.path(), &uninstall).unwrap(), nothing);
    }

    #[test]
    fn the_resolver_is_found_by_what_runs() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(detect(dir.path()), None);
        let error = run(dir.path(), &args(None)).unwrap_err();
        assert_eq!(error.message, "neither systemd-resolved nor dnsmasq runs here");
        for (file, found) in [
            ("run/dnsmasq.pid", ResolverArg::Dnsmasq),
            ("run/NetworkManager/dnsmasq.pid", ResolverArg::NetworkManager),
            ("run/systemd/resolve/stub-resolv.conf", ResolverArg::SystemdResolved),
        ] {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
            assert_eq!(detect(dir.path()), Some(found), "{file}");
        }
        // What programs ask is not systemd-resolved.
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("etc/resolv.conf"), "nameserver 127.0.0.1\n").unwrap();
        assert_eq!(detect(dir.path()), Some(ResolverArg::NetworkManager));
    }
}
