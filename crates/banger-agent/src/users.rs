//! Users and groups from the image's own files.
//!
//! Read directly: the C library's look-up would load the guest's NSS modules into a static program.

use banger_sys::child::Identity;
use std::collections::HashMap;
use std::path::Path;

/// Largest `/etc/passwd` or `/etc/group` read; far beyond any real one.
const FILE_LEN_MAX: u64 = 4 * 1024 * 1024;

/// Who a command runs as, and what a login would give it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) identity: Identity,
    pub(crate) home: String,
    pub(crate) shell: String,
}

/// Finds `user` or `user:group`, each a name or a number, in the files under `root`.
///
/// A number needs no entry; a name does.
pub(crate) fn find(root: &Path, spec: &str) -> Result<User, String> {
    let (user, group) = spec.split_once(':').map_or((spec, None), |(user, group)| (user, Some(group)));
    let passwd = read(&root.join("etc/passwd"))?;
    let groups = read(&root.join("etc/group"))?;
    let mut found = passwd
        .lines()
        .filter_map(parse_passwd)
        .find(|entry| entry.name == user || user.parse() == Ok(entry.identity.uid))
        .or_else(|| by_number(user))
        .ok_or_else(|| format!("no user `{}` in the image's /etc/passwd", user.escape_debug()))?;
    match group {
        Some(group) => {
            found.identity.gid = find_group(&groups, group)
                .ok_or_else(|| format!("no group `{}` in the image's /etc/group", group.escape_debug()))?;
            found.identity.groups = vec![found.identity.gid];
        }
        None => found.identity.groups = memberships(&groups, &found),
    }
    Ok(found)
}

/// Returns the names in `passwd` or `group` under `root`, by their numbers; none where it can't be read.
pub(crate) fn names(root: &Path, file: &str) -> HashMap<u32, String> {
    let mut names = HashMap::new();
    for line in read(&root.join("etc").join(file)).unwrap_or_default().lines() {
        let mut fields = line.split(':');
        // The first line counts, as for those who look one up.
        if let (Some(name), Some(Ok(id))) = (fields.next(), fields.nth(1).map(str::parse)) {
            names.entry(id).or_insert_with(|| name.to_owned());
        }
    }
    names
}

fn by_number(user: &str) -> Option<User> {
    let uid: u32 = user.parse().ok()?;
    let root = uid == 0;
    Some(User {
        name: if root { "root".to_owned() } else { user.to_owned() },
        identity: Identity { uid, gid: 0, groups: Vec::new() },
        home: if root { "/root".to_owned() } else { "/".to_owned() },
        shell: String::new(),
    })
    .filter(|_| uid != u32::MAX)
}

fn read(path: &Path) -> Result<String, String> {
    let describe = |error: std::io::Error| format!("read {}: {error}", path.display());
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.len() > FILE_LEN_MAX => Err(format!("{} is too large", path.display())),
        Ok(_) => Ok(String::from_utf8_lossy(&std::fs::read(path).map_err(describe)?).into_owned()),
        // An image of one static binary has no users; root then goes by number.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok("root:x:0:0::/root:".to_owned()),
        Err(error) => Err(describe(error)),
    }
}

fn parse_passwd(line: &str) -> Option<User> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let home = fields.nth(1)?;
    let shell = fields.next().unwrap_or_default();
    Some(User {
        name: name.to_owned(),
        identity: Identity { uid, gid, groups: Vec::new() },
        home: if home.is_empty() { "/".to_owned() } else { home.to_owned() },
        shell: shell.to_owned(),
    })
}

fn find_group(groups: &str, wanted: &str) -> Option<u32> {
    let named = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == wanted).then(|| fields.nth(1)?.parse().ok()).flatten()
    });
    named.or_else(|| wanted.parse().ok().filter(|&gid| gid != u32::MAX))
}

fn memberships(groups: &str, user: &User) -> Vec<u32> {
    let mut gids = vec![user.identity.gid];
    for line in groups.lines() {
        let mut fields = line.split(':').skip(2);
        let (Some(gid), Some(members)) = (fields.next(), fields.next()) else { continue };
        if members.split(',').any(|member| member == user.name)
            && let Ok(gid) = gid.parse()
            && !gids.contains(&gid)
        {
            gids.push(gid);
        }
    }
    gids
}

#[cfg(test)]
mod tests {
    use super::find;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbad line\n\
                          web:x:1000:1001:Web,,,:/srv/web:/bin/sh\nnohome:x:7:7:::\n";
    const GROUP: &str = "root:x:0:\nstaff:x:50:web,other\nweb:x:1001:\ndocker:x:99:web\n";

    fn image() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("etc/passwd"), PASSWD).unwrap();
        std::fs::write(dir.path().join("etc/group"), GROUP).unwrap();
        dir
    }

    #[test]
    fn users_by_name_and_number() {
        let dir = image();
        for (spec, uid, gid, groups, home) in [
            ("root", 0, 0, vec![0], "/root"),
            ("web", 1000, 1001, vec![1001, 50, 99], "/srv/web"),
            ("1000", 1000, 1001, vec![1001, 50, 99], "/srv/web"),
            ("web:staff", 1000, 50, vec![50], "/srv/web"),
            ("web:4711", 1000, 4711, vec![4711], "/srv/web"),
            ("4242", 4242, 0, vec![0], "/"),
            ("nohome", 7, 7, vec![7], "/"),
        ] {
            let user = find(dir.path(), spec).unwrap();
            assert_eq!((user.identity.uid, user.identity.gid), (uid, gid), "{spec}");
            assert_eq!(user.identity.groups, groups, "{spec}");
            assert_eq!(user.home, home, "{spec}");
        }
    }

    #[test]
    fn an_unknown_name_is_refused_and_escaped() {
        let dir = image();
        let error = find(dir.path(), "no\u{1b}body").unwrap_err();
        assert_eq!(error, "no user `no\\u{1b}body` in the image's /etc/passwd");
        assert_eq!(find(dir.path(), "web:none").unwrap_err(), "no group `none` in the image's /etc/group");
        assert!(find(dir.path(), "4294967295").is_err(), "the number that means `unchanged` to setuid");
    }

    #[test]
    fn an_image_without_users_has_root() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(find(dir.path(), "root").unwrap().home, "/root");
        assert!(find(dir.path(), "web").is_err());
    }
}
