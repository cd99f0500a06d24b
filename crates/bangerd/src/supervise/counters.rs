//! The pipe into which Firecracker writes what it has counted, a line at a time: each says what is new since the one before.

use banger_vmm::Counters;
use banger_vmm::firecracker;
use banger_vmm::qmp::Event;
use rustix::fs::{FileType, Mode};
use std::io;
use std::path::Path;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::net::unix::pipe::{OpenOptions, Receiver};
use tokio::sync::mpsc;

/// Longest line that is read; they have some thousand bytes, and a few hundred more for each device.
const LINE_LEN_MAX: u64 = 64 * 1024;

/// Makes the pipe, in the place of that of an earlier boot, and opens the end that is read.
pub(crate) fn open(path: &Path) -> io::Result<Receiver> {
    super::link::remove_socket(path)?;
    let mode = Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, path, FileType::Fifo, mode, 0)?;
    // Writing as well, so that it does not end before the VMM has opened it.
    OpenOptions::new().read_write(true).open_receiver(path)
}

/// Tells of sums until nobody listens. What is no line of counters is left out.
pub(crate) async fn read(pipe: Receiver, tell: mpsc::Sender<Event>) {
    let mut pipe = BufReader::new(pipe);
    let (mut line, mut sum) = (Vec::new(), Counters::default());
    loop {
        line.clear();
        tokio::select! {
            read = async { (&mut pipe).take(LINE_LEN_MAX).read_until(b'\n', &mut line).await } => {
                if !read.is_ok_and(|len| len > 0) {
                    return;
                }
            }
            () = tell.closed() => return,
        }
        if let Some(more) = firecracker::counted(&line) {
            sum.read = sum.read.saturating_add(more.read);
            sum.written = sum.written.saturating_add(more.written);
            let _ = tell.send(Event::Counted(sum)).await;
        }
    }
}
