//! Unpacks packages into a tree the way `dpkg --unpack` would leave them, database included.
//!
//! No maintainer script runs. What dpkg keeps beside the files is written from what the packages say: the status entries
//! (`install ok unpacked`), file lists, checksums, scripts, trigger interests. A later `dpkg --configure -a`, inside a vm,
//! finds what it expects. `/bin`, `/lib` and `/sbin` are links into `/usr`, so files that packages ship below them are
//! put in their place right away.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{self, Cursor, Read};
use std::path::PathBuf;

use md5::{Digest, Md5};
use thiserror::Error;

use super::control::Paragraph;
use super::deb::{ControlFile, DebError};
use super::index::Package;
use super::pipeline::{self, Incoming};
use super::tree::{Attributes, Special, Tree};
use crate::partial::hex;
use crate::progress::{Progress, Sink};
use crate::tar::{Entry, Kind, TarError, TarReader, clean_path};

/// Directories of the root that are links into `/usr`.
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];
/// dpkg's database.
const DATABASE: &str = "var/lib/dpkg";
/// The package that goes first: it has the directories all others need.
const FIRST: &str = "base-files";

/// Paths that are not installed, in the form of dpkg's `path-exclude` and `path-include`, which the image also gets as a
/// file, so that packages installed later are treated alike.
pub const EXCLUDES: &str = "\
path-exclude=/usr/share/doc/*
path-include=/usr/share/doc/*/copyright
path-exclude=/usr/share/man/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/groff/*
path-exclude=/usr/share/lintian/*
path-exclude=/usr/share/locale/*
path-include=/usr/share/locale/locale.alias
";

/// Packages could not be unpacked.
#[derive(Debug, Error)]
pub enum UnpackError {
    /// A package can't be opened.
    #[error("could not open a package")]
    Deb(#[from] DebError),
    /// Decompression failed.
    #[error("could not decompress a package")]
    Decompress(#[from] io::Error),
    /// A package's data is damaged.
    #[error("could not unpack package `{package}`")]
    Archive {
        /// The package.
        package: String,
        /// Why not.
        source: TarError,
    },
    /// The package in the file isn't the one that was resolved.
    #[error("the file of package `{0}` contains another package or version")]
    WrongPackage(String),
    /// A control file isn't text.
    #[error("the control data of package `{0}` is damaged")]
    Control(String),
    /// Two packages have the same file and neither replaces the other.
    #[error("`{}` is in package `{package}` and in `{other}`", .path.escape_debug())]
    SharedFile {
        /// The file.
        path: String,
        /// The package being unpacked.
        package: String,
        /// The package that had it first.
        other: String,
    },
    /// The tree can't take it.
    #[error("could not write `/{}`", .path.escape_debug())]
    Write {
        /// The path.
        path: String,
        /// Why not.
        source: io::Error,
    },
}

/// Unpacks packages (with their files in the same order) into a tree. Returns the newest time found in them, for what the
/// caller generates: the same packages make the same tree.
pub fn unpack(
    packages: &[Package],
    debs: &[PathBuf],
    tree: &mut dyn Tree,
    sink: Sink<'_>,
) -> Result<i64, UnpackError> {
    let mut order: Vec<usize> = (0..packages.len().min(debs.len())).collect();
    order.sort_by_key(|at| (packages[*at].name != FIRST, &packages[*at].name));
    let ordered: Vec<&Package> = order.iter().map(|at| &packages[*at]).collect();
    let paths: Vec<PathBuf> = order.iter().map(|at| debs[*at].clone()).collect();
    let mut unpacker = Unpacker::new(ordered, tree);
    unpacker.merge_usr()?;
    let total = unpacker.packages.iter().map(|package| package.size).sum();
    let mut done = 0;
    pipeline::for_each(&paths, |at, incoming| {
        unpacker.package(at, incoming)?;
        done += unpacker.packages[at].size;
        sink(Progress::Bytes { done, total: Some(total) });
        Ok::<_, UnpackError>(())
    })?;
    unpacker.write_database()?;
    Ok(unpacker.newest)
}

/// What dpkg's database says of one package.
#[derive(Default)]
struct Record {
    /// File name stem in `info/`: with the architecture for packages that may be installed for several.
    stem: String,
    status: String,
    /// Paths as packaged, with a leading slash.
    list: Vec<Vec<u8>>,
    control: Vec<ControlFile>,
}

struct Unpacker<'a> {
    packages: Vec<&'a Package>,
    tree: &'a mut dyn Tree,
    records: Vec<Record>,
    /// Which package has a path (as it is in the tree) that isn't a directory.
    owners: HashMap<Vec<u8>, usize>,
    newest: i64,
}

impl<'a> Unpacker<'a> {
    fn new(packages: Vec<&'a Package>, tree: &'a mut dyn Tree) -> Self {
        Self { packages, tree, records: Vec::new(), owners: HashMap::new(), newest: 0 }
    }

    /// Makes the directories and links that must be there before the first file.
    fn merge_usr(&mut self) -> Result<(), UnpackError> {
        let attributes = Attributes { mode: 0o755, uid: 0, gid: 0, mtime: 0 };
        for dir in ["", "usr"] {
            self.tree
                .directory(dir.as_bytes(), &attributes)
                .map_err(|err| write_error(dir.as_bytes(), err))?;
        }
        for name in MERGED {
            let target = format!("usr/{name}");
            self.tree
                .directory(target.as_bytes(), &attributes)
                .and_then(|()| self.tree.symlink(name.as_bytes(), target.as_bytes(), &attributes))
                .map_err(|err| write_error(name.as_bytes(), err))?;
        }
        Ok(())
    }

    fn package(&mut self, at: usize, incoming: Incoming) -> Result<(), UnpackError> {
        let package = self.packages[at];
        let mut record = self.record(package, incoming.control)?;
        let conffiles = conffiles(&record.control);
        let mut checksums = BTreeMap::new();
        let mut reader = TarReader::new(incoming.data);
        let archive = |source| UnpackError::Archive { package: package.name.clone(), source };
        while let Some(entry) = reader.next_entry().map_err(archive)? {
            record.list.push([b"/", entry.path.as_slice()].concat());
            self.newest = self.newest.max(entry.mtime);
            let path = merged(&entry.path);
            if is_excluded(&path, entry.kind) || !self.claim(at, &path, entry.kind, &mut record)? {
                continue;
            }
            let sum = self.add(&path, &entry, &mut reader, conffiles.contains(&path))?;
            if let Some(sum) = sum {
                checksums.insert(path, sum);
            }
        }
        reader.drain().map_err(archive)?;
        if let Some(first) = record.list.first_mut().filter(|first| *first == b"/") {
            *first = b"/.".to_vec();
        }
        if !checksums.is_empty() {
            record.status.push_str("Conffiles:\n");
            for (path, sum) in checksums {
                record.status.push_str(&format!(" /{} {sum}\n", String::from_utf8_lossy(&path)));
            }
        }
        self.records.push(record);
        Ok(())
    }

    /// Starts a package's record from its control file, which must be of the package that was resolved.
    fn record(&self, package: &Package, control: Vec<ControlFile>) -> Result<Record, UnpackError> {
        let broken = || UnpackError::Control(package.name.clone());
        let text = control.iter().find(|file| file.name == "control").ok_or_else(broken)?;
        let text = std::str::from_utf8(&text.data).map_err(|_| broken())?.trim_end();
        if text.lines().any(|line| line.trim().is_empty()) || text.contains('\r') {
            return Err(broken());
        }
        let fields = Paragraph::parse(text);
        let same = fields.get("Package") == Some(&package.name)
            && fields.get("Version") == Some(package.version.as_str())
            && fields.get("Architecture") == Some(&package.architecture);
        if !same {
            return Err(UnpackError::WrongPackage(package.name.clone()));
        }
        let stem = if fields.get("Multi-Arch") == Some("same") {
            format!("{}:{}", package.name, package.architecture)
        } else {
            package.name.clone()
        };
        let mut status = String::new();
        for line in text.lines() {
            status.push_str(line);
            status.push('\n');
            if line.starts_with("Package:") {
                status.push_str("Status: install ok unpacked\n");
            }
        }
        let control = control.into_iter().filter(|file| file.name != "control").collect();
        Ok(Record { stem, status, list: Vec::new(), control })
    }

    /// Decides who gets a path that two packages have; false when the other one keeps it.
    fn claim(
        &mut self,
        at: usize,
        path: &[u8],
        kind: Kind,
        record: &mut Record,
    ) -> Result<bool, UnpackError> {
        if kind == Kind::Directory {
            return Ok(true);
        }
        let Some(&other) = self.owners.get(path) else {
            self.owners.insert(path.to_vec(), at);
            return Ok(true);
        };
        let replaces = |new: &Package, old: &Package| {
            new.replaces.iter().flatten().any(|r| r.name == old.name && r.accepts(&old.version))
        };
        let (package, owner) = (self.packages[at], self.packages[other]);
        if other == at || replaces(package, owner) {
            self.records.get_mut(other).into_iter().for_each(|r| r.list.retain(|p| merged(&p[1..]) != path));
            self.owners.insert(path.to_vec(), at);
            Ok(true)
        } else if replaces(owner, package) {
            record.list.pop();
            Ok(false)
        } else {
            Err(UnpackError::SharedFile {
                path: String::from_utf8_lossy(path).into_owned(),
                package: package.name.clone(),
                other: owner.name.clone(),
            })
        }
    }

    /// Adds one entry to the tree; returns the checksum of a configuration file.
    fn add(
        &mut self,
        path: &[u8],
        entry: &Entry,
        data: &mut dyn Read,
        is_conffile: bool,
    ) -> Result<Option<String>, UnpackError> {
        let attributes = Attributes { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: entry.mtime };
        let mut sum = None;
        let result = match entry.kind {
            // The links into /usr are there already, and where a package still has a directory it must not replace one.
            Kind::Directory | Kind::Symlink if MERGED.iter().any(|name| path == name.as_bytes()) => Ok(()),
            Kind::Directory => self.tree.directory(path, &attributes),
            Kind::Symlink => self.tree.symlink(path, &entry.link, &attributes),
            Kind::File if is_conffile => {
                let mut reader = Summing { inner: data, hash: Md5::new() };
                let result = self.tree.file(path, &attributes, entry.size, &mut reader);
                sum = Some(hex(reader.hash.finalize()));
                result
            }
            Kind::File => self.tree.file(path, &attributes, entry.size, data),
            // dpkg has none either.
            Kind::SparseFile => Err(io::ErrorKind::Unsupported.into()),
            Kind::HardLink => match clean_path(&entry.link) {
                Ok(existing) => self.tree.hard_link(path, &merged(&existing)),
                Err(_) => Err(io::ErrorKind::InvalidData.into()),
            },
            Kind::CharDevice => {
                self.tree.special(path, Special::Char(entry.device.0, entry.device.1), &attributes)
            }
            Kind::BlockDevice => {
                self.tree.special(path, Special::Block(entry.device.0, entry.device.1), &attributes)
            }
            Kind::Fifo => self.tree.special(path, Special::Fifo, &attributes),
        };
        result.map_err(|err| write_error(path, err))?;
        Ok(sum)
    }

    fn write_database(&mut self) -> Result<(), UnpackError> {
        let mut records = std::mem::take(&mut self.records);
        records.sort_by(|a, b| a.stem.cmp(&b.stem));
        for dir in ["", "/info", "/triggers", "/updates", "/alternatives", "/parts"] {
            let path = format!("{DATABASE}{dir}");
            let attributes = Attributes { mode: 0o755, uid: 0, gid: 0, mtime: self.newest };
            self.tree
                .directory(path.as_bytes(), &attributes)
                .map_err(|err| write_error(path.as_bytes(), err))?;
        }
        let status: String = records.iter().map(|record| record.status.clone() + "\n").collect();
        let triggers = Triggers::collect(&records);
        self.database_file("status", status.as_bytes(), false)?;
        for name in ["available", "diversions", "statoverride", "triggers/Unincorp"] {
            self.database_file(name, b"", false)?;
        }
        self.database_file("triggers/File", triggers.files.as_bytes(), false)?;
        for (name, packages) in triggers.named {
            self.database_file(&format!("triggers/{name}"), packages.as_bytes(), false)?;
        }
        self.database_file("info/format", b"1\n", false)?;
        for record in records {
            let list = [record.list.join(&b'\n'), b"\n".to_vec()].concat();
            self.database_file(&format!("info/{}.list", record.stem), &list, false)?;
            for file in record.control {
                let name = format!("info/{}.{}", record.stem, file.name);
                self.database_file(&name, &file.data, file.executable)?;
            }
        }
        Ok(())
    }

    fn database_file(&mut self, name: &str, data: &[u8], executable: bool) -> Result<(), UnpackError> {
        let path = format!("{DATABASE}/{name}");
        let mode = if executable { 0o755 } else { 0o644 };
        let attributes = Attributes { mode, uid: 0, gid: 0, mtime: self.newest };
        self.tree
            .file(path.as_bytes(), &attributes, data.len() as u64, &mut Cursor::new(data))
            .map_err(|err| write_error(path.as_bytes(), err))
    }
}

fn write_error(path: &[u8], source: io::Error) -> UnpackError {
    UnpackError::Write { path: String::from_utf8_lossy(path).into_owned(), source }
}

/// Where a packaged path is in the tree: below the links into `/usr`, in `/usr`.
fn merged(path: &[u8]) -> Vec<u8> {
    let below = |name: &&str| path.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.starts_with(b"/"));
    if MERGED.iter().any(below) { [b"usr/", path].concat() } else { path.to_vec() }
}

/// Whether `EXCLUDES` leaves a path out. Directories stay where packages later put links into them.
fn is_excluded(path: &[u8], kind: Kind) -> bool {
    let Some(rest) = path.strip_prefix(b"usr/share/") else { return false };
    let (top, below) = match rest.iter().position(|b| *b == b'/') {
        Some(slash) => rest.split_at(slash),
        None => return false,
    };
    match top {
        b"doc" => !below.ends_with(b"/copyright") && kind != Kind::Directory,
        b"man" | b"info" => kind != Kind::Directory,
        b"locale" => below != b"/locale.alias",
        b"groff" | b"lintian" => true,
        _ => false,
    }
}

/// The configuration files a package lists, as they are in the tree.
fn conffiles(control: &[ControlFile]) -> BTreeSet<Vec<u8>> {
    let listed = control.iter().find(|file| file.name == "conffiles").map_or(&[][..], |file| &file.data);
    listed
        .split(|b| *b == b'\n')
        // Lines that begin otherwise carry a flag for files that are no longer shipped.
        .filter_map(|line| line.strip_prefix(b"/"))
        .map(|path| merged(path.trim_ascii_end()))
        .collect()
}

struct Summing<'a> {
    inner: &'a mut dyn Read,
    hash: Md5,
}

impl Read for Summing<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        Ok(count)
    }
}

/// dpkg's records of who wants to hear of what.
#[derive(Default)]
struct Triggers {
    /// Lines of `File`: a path and a package.
    files: String,
    /// For each named trigger the packages interested in it.
    named: BTreeMap<String, String>,
}

impl Triggers {
    fn collect(records: &[Record]) -> Self {
        let mut triggers = Self::default();
        for record in records {
            let Some(file) = record.control.iter().find(|file| file.name == "triggers") else { continue };
            for line in String::from_utf8_lossy(&file.data).lines() {
                triggers.add(line, &record.stem);
            }
        }
        triggers
    }

    fn add(&mut self, line: &str, stem: &str) {
        let mut words = line.split_whitespace();
        let (Some(directive), Some(name)) = (words.next(), words.next()) else { return };
        let suffix = match directive {
            "interest" | "interest-await" => "",
            "interest-noawait" => "/noawait",
            _ => return,
        };
        if name.starts_with('/') {
            self.files.push_str(&format!("{name} {stem}{suffix}\n"));
        } else if name.bytes().all(|b| b.is_ascii_graphic() && b != b'/') && !name.starts_with('.') {
            self.named.entry(name.to_owned()).or_default().push_str(&format!("{stem}{suffix}\n"));
        }
    }
}
