//! `[[file_sync]]`: files of the owner's that every vm gets at each start.
//!
//! The host reads them, from within the owner's home only, and hands them to the agent in one stream. Nothing comes back
//! but whether it worked. A vm that boots again by itself has them on its disk.

use crate::config::{Config, FileSync, below_home, home, keys};
use crate::daemon::Daemon;
use crate::plan::GUEST_HOME;
use crate::vmsock;
use banger_wire::bytes::ByteString;
use banger_wire::channel::ChannelWriter;
use banger_wire::daemon::Event;
use banger_wire::guest::SessionKind;
use banger_wire::item::{Item, ItemWriter, is_relative};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;

/// All files of all entries: dotfiles, not data.
const BYTES_MAX: u64 = 64 << 20;
/// The same for their number.
const ENTRIES_MAX: usize = 10_000;
/// How deep a directory is looked into.
const DEPTH_MAX: usize = 32;
/// How long a guest may take for all of it. Until then whoever started the vm waits.
const TIME_MAX: Duration = Duration::from_secs(60);

/// Something that is to be written in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    /// On the host, without links.
    host: PathBuf,
    /// In the guest, below `/`.
    guest: Vec<u8>,
    mode: u32,
    is_dir: bool,
    len: u64,
}

/// What is to be written, and what was left out and why.
#[derive(Debug, Default)]
struct Collected {
    entries: Vec<Entry>,
    warnings: Vec<String>,
    bytes: u64,
}

impl Daemon {
    /// Gives a vm that is up the owner's files. What can't be given is said; the vm goes on.
    pub(crate) async fn sync_files(&self, dir: &Path, events: &UnboundedSender<Event>) {
        let warn = |text: String| {
            let _ = events.send(Event::Warning { text });
        };
        let syncs = match Config::load() {
            Ok(config) => config.file_sync,
            Err(error) => return warn(format!("`[[file_sync]]`: {error:#}")),
        };
        if syncs.is_empty() {
            return;
        }
        let Some(home) = home() else {
            return warn("`[[file_sync]]` needs `HOME`, which is not set".to_owned());
        };
        let collected =
            banger_image::blocking::start(move || collect(&syncs, &home)).await.unwrap_or_default();
        collected.warnings.into_iter().for_each(&warn);
        if collected.entries.is_empty() {
            return;
        }
        let _ = events.send(Event::Step { label: "copy files of `[[file_sync]]`".to_owned() });
        let entries = collected.entries;
        let sending = vmsock::feed(dir, SessionKind::Write, move |output| send(&entries, output));
        match tokio::time::timeout(TIME_MAX, sending).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => warn(format!("the files of `[[file_sync]]` are not all in the vm: {error:#}")),
            Err(_) => warn(format!(
                "the files of `[[file_sync]]` are not all in the vm: the guest has not taken them for {} s",
                TIME_MAX.as_secs()
            )),
        }
    }
}

fn send(entries: &[Entry], output: ChannelWriter) -> std::io::Result<()> {
    let mut writer = ItemWriter::new(std::io::BufWriter::new(output));
    for entry in entries {
        let path = ByteString(entry.guest.clone());
        if entry.is_dir {
            writer.item(&Item::Directory { path, mode: entry.mode })?;
            continue;
        }
        // It may have become something else since it was looked at.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::open(&entry.host, flags, Mode::empty())?);
        let found = file.metadata()?;
        if !found.is_file() || found.len() != entry.len {
            let text = format!("`{}` changed while it was copied", entry.host.display());
            return Err(std::io::Error::other(text));
        }
        let modified = found.mtime().saturating_mul(1_000_000_000).saturating_add(found.mtime_nsec());
        writer.file(&Item::File { path, mode: entry.mode, modified, len: entry.len }, &mut file)?;
    }
    writer.item(&Item::End)?;
    writer.flush()
}

/// Looks at what is to be copied. Only reads.
fn collect(syncs: &[FileSync], home: &Path) -> Collected {
    let mut collected = Collected::default();
    let Ok(home) = home.canonicalize() else {
        collected.warnings.push(format!("`[[file_sync]]`: there is no `{}`", home.display()));
        return collected;
    };
    for sync in syncs {
        let (entries, bytes) = (collected.entries.len(), collected.bytes);
        if let Err(why) = collected.add(sync, &home) {
            // All of it or nothing: half a directory would look like a whole one.
            collected.entries.truncate(entries);
            collected.bytes = bytes;
            collected
                .warnings
                .push(format!("`[[file_sync]]`: `{}` is not copied: {why}", sync.host.escape_debug()));
        }
    }
    collected
}

impl Collected {
    fn add(&mut self, sync: &FileSync, home: &Path) -> Result<(), String> {
        let guest = guest_path(sync.guest.as_deref().unwrap_or(&sync.host), home)?;
        let mode = sync.mode.as_deref().and_then(keys::parse_mode);
        let host = resolve(&below_home_of(&sync.host, home), home)?;
        self.walk(host, guest, mode, home, 0)
    }

    fn walk(
        &mut self,
        host: PathBuf,
        guest: Vec<u8>,
        mode: Option<u32>,
        home: &Path,
        depth: usize,
    ) -> Result<(), String> {
        let shown = host.display().to_string();
        let failed = |error: std::io::Error| format!("`{}`: {error}", shown.escape_debug());
        let found = std::fs::symlink_metadata(&host).map_err(failed)?;
        if self.entries.len() >= ENTRIES_MAX {
            return Err(format!("all entries together have more than {ENTRIES_MAX} files"));
        }
        let own = found.mode() & 0o777;
        if found.is_file() {
            self.bytes = self.bytes.saturating_add(found.len());
            if self.bytes > BYTES_MAX {
                return Err(format!("all entries together have more than {} MiB", BYTES_MAX >> 20));
            }
            let mode = mode.unwrap_or(own);
            self.entries.push(Entry { host, guest, mode, is_dir: false, len: found.len() });
            return Ok(());
        }
        if !found.is_dir() {
            return Err(format!("`{}` is neither a file nor a directory", shown.escape_debug()));
        }
        if depth >= DEPTH_MAX {
            return Err(format!("it is more than {DEPTH_MAX} directories deep"));
        }
        self.entries.push(Entry {
            host: host.clone(),
            guest: guest.clone(),
            mode: own,
            is_dir: true,
            len: 0,
        });
        let mut names: Vec<_> =
            std::fs::read_dir(&host).map_err(failed)?.flatten().map(|entry| entry.file_name()).collect();
        names.sort();
        for name in names {
            let path = host.join(&name);
            let below = [guest.as_slice(), b"/", name.as_bytes()].concat();
            let left_out = |why: &str| {
                format!("`[[file_sync]]`: `{}` is left out: {why}", path.display().to_string().escape_debug())
            };
            let Ok(found) = std::fs::symlink_metadata(&path) else { continue };
            if found.is_symlink() {
                match resolve(&path, home) {
                    Ok(target) if target.is_file() => self.walk(target, below, mode, home, depth + 1)?,
                    Ok(_) => self.warnings.push(left_out("it is a link to a directory")),
                    Err(why) => self.warnings.push(left_out(&why)),
                }
            } else if found.is_dir() || found.is_file() {
                self.walk(path, below, mode, home, depth + 1)?;
            } else {
                self.warnings.push(left_out("it is neither a file nor a directory"));
            }
        }
        Ok(())
    }
}

/// Follows links to where a file really is, which has to be in the owner's home.
fn resolve(path: &Path, home: &Path) -> Result<PathBuf, String> {
    let real = path.canonicalize().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "it is not there".to_owned(),
        _ => format!("it can't be read: {error}"),
    })?;
    if real.starts_with(home) && real != home {
        return Ok(real);
    }
    let shown = real.display().to_string();
    Err(format!("it leads to `{}`, which is not in your home directory", shown.escape_debug()))
}

fn below_home_of(path: &str, home: &Path) -> PathBuf {
    match path.strip_prefix("~/") {
        Some(below) => home.join(below),
        None => below_home(Path::new(path)),
    }
}

/// Where something goes in the guest, below `/`.
fn guest_path(text: &str, home: &Path) -> Result<Vec<u8>, String> {
    let home = home.display().to_string();
    let below = text.strip_prefix("~/").or_else(|| text.strip_prefix(&home)?.strip_prefix('/'));
    let whole = match below {
        Some(below) => format!("{GUEST_HOME}/{below}"),
        None => text.to_owned(),
    };
    let relative = whole.strip_prefix('/').unwrap_or_default().trim_end_matches('/');
    if is_relative(relative.as_bytes()) {
        return Ok(relative.as_bytes().to_vec());
    }
    Err(format!("`{}` can't be a path in the guest", text.escape_debug()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    fn sync(host: &str, guest: Option<&str>, mode: Option<&str>) -> FileSync {
        FileSync { host: host.to_owned(), guest: guest.map(str::to_owned), mode: mode.map(str::to_owned) }
    }

    /// Names in the guest with their modes, and the warnings without the home's path.
    fn looked_at(home: &Path, syncs: &[FileSync]) -> (Vec<String>, Vec<String>) {
        let collected = collect(syncs, home);
        let show = |entry: &Entry| format!("{} {:o}", String::from_utf8_lossy(&entry.guest), entry.mode);
        let real = home.canonicalize().unwrap().display().to_string();
        let warnings = collected.warnings.iter().map(|text| text.replace(&real, "HOME"));
        (collected.entries.iter().map(show).collect(), warnings.collect())
    }

    #[test]
    fn files_and_directories_of_the_home_are_found() {
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        std::fs::create_dir_all(at("dir/sub")).unwrap();
        for (name, mode) in [("file", 0o640), ("dir/a", 0o755), ("dir/sub/b", 0o600)] {
            std::fs::write(at(name), name).unwrap();
            std::fs::set_permissions(at(name), std::fs::Permissions::from_mode(mode)).unwrap();
        }
        symlink("../file", at("dir/link")).unwrap();
        for dir in ["dir", "dir/sub"] {
            std::fs::set_permissions(at(dir), std::fs::Permissions::from_mode(0o750)).unwrap();
        }
        let syncs = [
            sync("~/file", None, None),
            sync("~/file", Some("/etc/x"), Some("600")),
            sync(at("dir").to_str().unwrap(), Some("~/.d"), None),
        ];
        let (found, warnings) = looked_at(home.path(), &syncs);
        let expected = [
            "root/file 640",
            "etc/x 600",
            "root/.d 750",
            "root/.d/a 755",
            "root/.d/link 640",
            "root/.d/sub 750",
            "root/.d/sub/b 600",
        ];
        assert_eq!(found, expected);
        assert!(warnings.is_empty(), "{warnings:?}");
    }

    #[test]
    fn what_leads_out_of_the_home_is_left_out_and_said() {
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        std::fs::create_dir_all(at("dir/sub")).unwrap();
        symlink("/etc/hostname", at("link")).unwrap();
        symlink("/etc", at("dir/etc")).unwrap();
        symlink("sub", at("dir/loop")).unwrap();
        symlink("nowhere", at("dir/dangling")).unwrap();
        symlink(home.path(), at("self")).unwrap();
        let syncs = [
            sync("~/link", None, None),
            sync("/etc/passwd", None, None),
            sync("~/../x", None, None),
            sync("~/missing", None, None),
            sync("~/self", None, None),
            sync("~/dir", Some("relative"), None),
            sync("~/dir", Some("~/../etc"), None),
            sync("~/dir", None, None),
        ];
        let (found, warnings) = looked_at(home.path(), &syncs);
        assert_eq!(found, ["root/dir 755", "root/dir/sub 755"]);
        insta::assert_snapshot!(warnings.join("\n"));
    }

    #[test]
    fn more_than_there_may_be_is_nothing() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("dir")).unwrap();
        std::fs::write(home.path().join("dir/small"), "x").unwrap();
        File::create(home.path().join("dir/large")).unwrap().set_len(BYTES_MAX + 1).unwrap();
        let syncs = [sync("~/dir", None, None), sync("~/dir/small", None, Some("600"))];
        let (found, warnings) = looked_at(home.path(), &syncs);
        assert_eq!(found, ["root/dir/small 600"]);
        assert_eq!(
            warnings,
            ["`[[file_sync]]`: `~/dir` is not copied: all entries together have more than 64 MiB"]
        );
    }
}
