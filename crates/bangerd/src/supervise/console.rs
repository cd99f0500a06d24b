//! The serial console, kept in a file of bounded size: a guest decides what is in it, and how much.

use banger_vmm::firecracker;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// The file never grows beyond this; the older half then goes.
const LEN_MAX: u64 = 1 << 20;

/// Characters of a line that are shown in an error.
const SHOWN_MAX: usize = 200;

/// Longest line of a halting kernel.
const KERNEL_LINE_MAX: usize = 128;

/// How much of the end is searched: a panic prints 4 KiB after its first line.
const TAIL_LEN: u64 = 16 * 1024;

/// The file of one vm's console, begun anew at every start.
#[derive(Debug)]
pub(crate) struct Console {
    path: PathBuf,
    file: File,
    len: u64,
}

impl Console {
    /// Begins the file.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        Ok(Self { path: path.to_owned(), file, len: 0 })
    }

    /// Appends what the guest wrote.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let bytes = &bytes[bytes.len().saturating_sub(LEN_MAX as usize / 2)..];
        if self.len + bytes.len() as u64 > LEN_MAX {
            // A new file under the same name, so that a reader that follows the old one notices.
            let keep = LEN_MAX / 2;
            let mut tail = vec![0; keep.min(self.len) as usize];
            let from = self.len - tail.len() as u64;
            self.file.read_exact_at(&mut tail, from)?;
            let new = self.path.with_extension("new");
            self.file = File::options().read(true).write(true).create(true).truncate(true).open(&new)?;
            self.file.write_all_at(&tail, 0)?;
            self.len = tail.len() as u64;
            std::fs::rename(new, &self.path)?;
        }
        self.file.write_all_at(bytes, self.len)?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Returns the last line that has something in it, made printable.
    pub(crate) fn last_line(&self) -> Option<String> {
        self.last_line_with("")
    }

    /// Returns what follows `words` in the last line that has them, made printable.
    pub(crate) fn last_after(&self, words: &str) -> Option<String> {
        let line = self.tail_line(words)?;
        let (_, text) = line.split_once(words)?;
        Some(printable(text))
    }

    /// Returns the last line with `words` in it, made printable. Looks at the end of the console only.
    pub(crate) fn last_line_with(&self, words: &str) -> Option<String> {
        Some(printable(&self.tail_line(words)?))
    }

    /// Returns the last lines as they are, at most 16 KiB.
    pub(crate) fn last_lines(&self, lines: usize) -> Vec<u8> {
        let Some(mut tail) = self.tail() else { return Vec::new() };
        // The last byte ends the last line, if it is a line's end.
        let ends = tail.iter().enumerate().rev().skip(1).filter(|(_, byte)| **byte == b'\n');
        let start = ends.map(|(index, _)| index + 1).nth(lines.saturating_sub(1)).unwrap_or(0);
        tail.split_off(start)
    }

    fn tail(&self) -> Option<Vec<u8>> {
        let mut tail = vec![0; self.len.min(TAIL_LEN) as usize];
        let from = self.len - tail.len() as u64;
        self.file.read_exact_at(&mut tail, from).ok()?;
        Some(tail)
    }

    fn tail_line(&self, words: &str) -> Option<String> {
        let tail = self.tail()?;
        let text = String::from_utf8_lossy(&tail);
        let line = text.lines().rev().find(|line| !line.trim().is_empty() && line.contains(words))?;
        Some(line.to_owned())
    }
}

fn printable(text: &str) -> String {
    text.trim().escape_debug().take(SHOWN_MAX).collect()
}

/// Watches a console for the last line of a kernel whose machine can't be switched off.
#[derive(Debug, Default)]
pub(crate) struct HaltWatch {
    line: Vec<u8>,
}

impl HaltWatch {
    /// Takes more of the console; tells whether that line ended in it.
    pub(crate) fn sees(&mut self, bytes: &[u8]) -> bool {
        for &byte in bytes {
            if byte != b'\n' {
                // One byte more tells that it is too long.
                if self.line.len() <= KERNEL_LINE_MAX {
                    self.line.push(byte);
                }
                continue;
            }
            let line = std::mem::take(&mut self.line);
            if line.len() <= KERNEL_LINE_MAX && firecracker::says_halted(&String::from_utf8_lossy(&line)) {
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::{Console, HaltWatch, LEN_MAX};

    #[test]
    fn a_flood_leaves_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut console = Console::create(&path).unwrap();
        for number in 0..40_000 {
            console.write(format!("line {number} of a guest that writes without end\n").as_bytes()).unwrap();
        }
        console.write(&vec![b'x'; 3 << 20]).unwrap();
        console.write(b"\nlast \x1b[31m\n").unwrap();
        let text = std::fs::read(&path).unwrap();
        assert!(text.len() as u64 <= LEN_MAX);
        assert!(text.ends_with(b"last \x1b[31m\n"));
        assert_eq!(console.last_line().unwrap(), "last \\u{1b}[31m");
        assert_eq!(console.last_after("la").unwrap(), "st \\u{1b}[31m");
        assert_eq!(console.last_after("first"), None);
        assert_eq!(console.last_lines(1), b"last \x1b[31m\n");
        assert_eq!(
            console.last_lines(2).len(),
            super::TAIL_LEN as usize,
            "the other line is longer than that"
        );
    }

    #[test]
    fn the_last_lines_may_be_all_there_are() {
        let dir = tempfile::tempdir().unwrap();
        let mut console = Console::create(&dir.path().join("console.log")).unwrap();
        assert_eq!(console.last_lines(5), b"");
        console.write(b"one\r\ntwo\r\nprompt# ").unwrap();
        assert_eq!(console.last_lines(5), b"one\r\ntwo\r\nprompt# ");
        assert_eq!(console.last_lines(2), b"two\r\nprompt# ");
    }

    #[test]
    fn a_halt_is_seen_however_the_line_arrives() {
        let mut watch = HaltWatch::default();
        let text = format!("{}\n[    1.000000] reboot: System halted\r\n", "x".repeat(100_000));
        let (last, rest) = text.as_bytes().split_last().unwrap();
        assert!(rest.iter().all(|byte| !watch.sees(&[*byte])));
        assert!(watch.sees(&[*last]));
        let padded = format!("[    1.000000] reboot: System halted{}or not\n", " ".repeat(200));
        assert!(!watch.sees(padded.as_bytes()));
    }
}
