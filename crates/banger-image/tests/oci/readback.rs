//! A filesystem as the reference implementation reads it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use banger_image::oci::Digest;

/// What is under a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// `regular`, `directory`, `symlink`, ...
    pub(crate) kind: String,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) size: u64,
    pub(crate) links: u32,
    pub(crate) mtime: (i64, u32),
    /// Target, content's digest, or device number.
    pub(crate) content: String,
    /// Names and lower-case hex.
    pub(crate) xattrs: BTreeMap<String, String>,
    pub(crate) inode: u32,
}

/// Files longer than this are not read: debugfs writes their holes as zeroes.
const SIZE_MAX: u64 = 64 << 20;

pub(crate) type Tree = BTreeMap<Vec<u8>, Found>;

/// Whether the tools are here; says so when not.
pub(crate) fn have(tool: &str) -> bool {
    let found = Command::new(tool).arg("-V").output().is_ok();
    if !found {
        println!("skipped: {tool} is not installed");
    }
    found
}

#[track_caller]
pub(crate) fn check(path: &Path) {
    let output = Command::new("e2fsck").arg("-fn").arg(path).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
}

/// Runs commands in one process and returns the output of each.
fn debugfs(image: &Path, commands: &[String]) -> Vec<Vec<u8>> {
    if commands.is_empty() {
        return Vec::new();
    }
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("script");
    std::fs::write(&script, commands.join("\n") + "\n").unwrap();
    let output = Command::new("debugfs").arg("-f").arg(&script).arg(image).output().unwrap();
    let prompt = b"debugfs: ";
    let mut parts = Vec::new();
    let mut rest = &output.stdout[..];
    for command in commands {
        let line = [prompt, command.as_bytes(), b"\n"].concat();
        assert!(rest.starts_with(&line), "`{command}` in {}", String::from_utf8_lossy(rest));
        rest = &rest[line.len()..];
        let next = rest.windows(prompt.len() + 1).position(|w| w[0] == b'\n' && &w[1..] == prompt);
        let end = if rest.starts_with(prompt) { 0 } else { next.map_or(rest.len(), |at| at + 1) };
        parts.push(rest[..end].to_vec());
        rest = &rest[end..];
    }
    parts
}

/// Reads everything. `lost+found` is not made by the writer, so nothing is left out.
pub(crate) fn read(image: &Path) -> Tree {
    let mut paths: BTreeMap<Vec<u8>, u32> = BTreeMap::from([(Vec::new(), 2)]);
    let mut todo = vec![(Vec::new(), 2)];
    while !todo.is_empty() {
        let commands: Vec<String> = todo.iter().map(|(_, inode)| format!("ls -p <{inode}>")).collect();
        let outputs = debugfs(image, &commands);
        let mut below = Vec::new();
        for ((parent, _), output) in todo.iter().zip(outputs) {
            for line in output.split(|byte| *byte == b'\n').filter(|line| line.starts_with(b"/")) {
                let fields: Vec<&[u8]> = line[1..].split(|byte| *byte == b'/').collect();
                let [inode, mode, _, _, name, ..] = fields[..] else { panic!("{}", line.escape_ascii()) };
                if matches!(name, b"." | b"..") {
                    continue;
                }
                let inode = std::str::from_utf8(inode).unwrap().trim().parse().unwrap();
                let path = [parent.as_slice(), b"/", name].concat();
                paths.insert(path.clone(), inode);
                if mode.starts_with(b"04") {
                    below.push((path, inode));
                }
            }
        }
        todo = below;
    }
    let mut inodes: Vec<u32> = paths.values().copied().collect();
    inodes.sort_unstable();
    inodes.dedup();
    let stats = debugfs(image, &inodes.iter().map(|inode| format!("stat <{inode}>")).collect::<Vec<_>>());
    let mut found: BTreeMap<u32, Found> =
        inodes.iter().copied().zip(stats.iter().map(|stat| parse_stat(stat))).collect();
    add_contents(image, &mut found);
    paths.into_iter().map(|(path, inode)| (path, Found { inode, ..found[&inode].clone() })).collect()
}

fn add_contents(image: &Path, found: &mut BTreeMap<u32, Found>) {
    let dir = tempfile::tempdir().unwrap();
    let wanted: Vec<u32> = found
        .iter()
        .filter(|(_, f)| f.size <= SIZE_MAX)
        .filter(|(_, f)| f.kind == "regular" || (f.kind == "symlink" && f.content.is_empty()))
        .map(|(inode, _)| *inode)
        .collect();
    let commands: Vec<String> = wanted
        .iter()
        .map(|inode| format!("dump <{inode}> {}", dir.path().join(inode.to_string()).display()))
        .collect();
    debugfs(image, &commands);
    for inode in wanted {
        let data = std::fs::read(dir.path().join(inode.to_string())).unwrap_or_default();
        let entry = found.get_mut(&inode).unwrap();
        entry.content = match entry.kind.as_str() {
            "symlink" => data.escape_ascii().to_string(),
            _ => Digest::of(&data).to_string(),
        };
        if entry.kind == "regular" {
            assert_eq!(data.len() as u64, entry.size, "inode {inode}");
        }
    }
}

fn parse_stat(output: &[u8]) -> Found {
    let text = String::from_utf8_lossy(output);
    let after = |label: &str| {
        let at = text.find(label).unwrap_or_else(|| panic!("no {label} in {text}")) + label.len();
        text[at..].split_whitespace().next().unwrap_or("")
    };
    let (seconds, extra) = after("mtime: 0x").split_once(':').unwrap();
    let (seconds, extra) =
        (u32::from_str_radix(seconds, 16).unwrap(), u32::from_str_radix(extra, 16).unwrap());
    let mtime = i64::from(seconds as i32) + (i64::from(extra & 3) << 32);
    let kind = after("Type:").to_owned();
    let content = if let Some((_, rest)) = text.split_once("Fast link dest: \"") {
        rest.as_bytes()[..rest.rfind('"').unwrap()].escape_ascii().to_string()
    } else if kind == "character" || kind == "block" {
        after("major/minor number:").to_owned()
    } else {
        String::new()
    };
    Found {
        mode: u32::from_str_radix(after("Mode:"), 8).unwrap(),
        owner: (after("User:").parse().unwrap(), after("Group:").parse().unwrap()),
        size: text.split("Size:").nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap(),
        links: after("Links:").parse().unwrap(),
        mtime: (mtime, extra >> 2),
        content,
        xattrs: parse_xattrs(&text),
        inode: 0,
        kind,
    }
}

/// `  name (length) = 01 02 03` or `= "text"`.
fn parse_xattrs(text: &str) -> BTreeMap<String, String> {
    let lines = text.lines().skip_while(|line| !line.starts_with("Extended attributes:")).skip(1);
    lines
        .take_while(|line| line.starts_with("  "))
        .filter_map(|line| {
            let (name, rest) = line.trim_start().split_once(" (")?;
            let value = rest.split_once(") = ").map_or("", |(_, value)| value).trim();
            let hex: String = match value.strip_prefix('"') {
                Some(text) => hex(&unescaped(text.strip_suffix('"').unwrap_or(text).as_bytes())),
                None => value.split_whitespace().collect(),
            };
            let hex = if name.starts_with("system.posix_acl_") { acl(&hex) } else { hex };
            Some((name.to_owned(), hex))
        })
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// debugfs writes the bytes of a text that can't be printed as three octal digits.
fn unescaped(mut text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some((first, rest)) = text.split_first() {
        let digits = rest.get(..3).filter(|digits| *first == b'\\' && digits.iter().all(u8::is_ascii_digit));
        let octal = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(octal.unwrap_or(*first));
        text = if octal.is_some() { &rest[3..] } else { rest };
    }
    bytes
}

/// An access control list as programs see it, of the one on the disk: there only entries of a named user or group say
/// whose they are.
fn acl(disk: &str) -> String {
    let bytes: Vec<u8> = disk
        .as_bytes()
        .chunks(2)
        .map(|b| u8::from_str_radix(std::str::from_utf8(b).unwrap(), 16).unwrap())
        .collect();
    if bytes.get(..4) != Some(&[1, 0, 0, 0]) {
        return disk.to_owned();
    }
    let mut list = vec![2, 0, 0, 0];
    let mut rest = &bytes[4..];
    while let Some((entry, tail)) = rest.split_first_chunk::<4>() {
        let is_named = matches!(entry[0], 2 | 8);
        let id = if is_named { tail[..4].to_vec() } else { vec![255; 4] };
        list.extend(entry.iter().chain(&id));
        rest = if is_named { &tail[4..] } else { tail };
    }
    hex(&list)
}
