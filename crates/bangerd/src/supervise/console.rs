//! The serial console, kept in a file of bounded size: a guest decides what is in it, and how much.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// The file never grows beyond this; the older half then goes.
const LEN_MAX: u64 = 1 << 20;

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

    /// Returns the last line with `words` in it, made printable. Looks at the end of the console only.
    pub(crate) fn last_line_with(&self, words: &str) -> Option<String> {
        let mut tail = vec![0; self.len.min(TAIL_LEN) as usize];
        let from = self.len - tail.len() as u64;
        self.file.read_exact_at(&mut tail, from).ok()?;
        let text = String::from_utf8_lossy(&tail);
        let line = text.lines().rev().find(|line| !line.trim().is_empty() && line.contains(words))?;
        Some(line.trim().escape_debug().take(200).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::{Console, LEN_MAX};

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
    }
}
