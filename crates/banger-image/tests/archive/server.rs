//! A mirror on a loopback port: files by path, and the one failure a test asks for.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// What a client asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) path: String,
    /// Where it wants to continue.
    pub(crate) from: Option<usize>,
}

#[derive(Debug, Default)]
struct Site {
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Paths whose next answer breaks off after so many bytes of the body.
    cuts: Mutex<BTreeMap<String, usize>>,
    log: Mutex<Vec<Request>>,
    stopped: AtomicBool,
}

/// A server; it ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    site: Arc<Site>,
}

impl Server {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let site = Arc::new(Site::default());
        let there = Arc::clone(&site);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if there.stopped.load(Ordering::SeqCst) {
                    return;
                }
                let site = Arc::clone(&there);
                std::thread::spawn(move || serve(&stream.unwrap(), &site));
            }
        });
        Self { address, site }
    }

    pub(crate) fn put(&self, path: &str, bytes: impl Into<Vec<u8>>) {
        self.site.files.lock().unwrap().insert(path.to_owned(), bytes.into());
    }

    pub(crate) fn remove(&self, path: &str) {
        self.site.files.lock().unwrap().remove(path).unwrap();
    }

    pub(crate) fn get(&self, path: &str) -> Vec<u8> {
        self.site.files.lock().unwrap().get(path).unwrap().clone()
    }

    /// Hangs up once, after so many bytes of the file.
    pub(crate) fn cut(&self, path: &str, after: usize) {
        self.site.cuts.lock().unwrap().insert(path.to_owned(), after);
    }

    /// Every request since the last call.
    pub(crate) fn take_log(&self) -> Vec<Request> {
        std::mem::take(&mut self.site.log.lock().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.site.stopped.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(mut stream: &TcpStream, site: &Site) {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let Some(path) = lines.next().and_then(|line| Some(line.split(' ').nth(1)?.to_owned())) else { return };
    let mut from = None;
    for line in lines.take_while(|line| !line.is_empty()) {
        if let Some(range) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
            from = Some(range.trim_end_matches('-').parse().unwrap());
        }
    }
    site.log.lock().unwrap().push(Request { path: path.clone(), from });
    let file = site.files.lock().unwrap().get(&path).cloned();
    let (status, range, body) = match (&file, from) {
        (None, _) => ("404 Not Found", String::new(), &[][..]),
        (Some(file), Some(from)) if from < file.len() => {
            let range = format!("Content-Range: bytes {from}-{}/{}\r\n", file.len() - 1, file.len());
            ("206 Partial Content", range, &file[from..])
        }
        (Some(_), Some(_)) => ("416 Range Not Satisfiable", String::new(), &[][..]),
        (Some(file), None) => ("200 OK", String::new(), &file[..]),
    };
    let head =
        format!("HTTP/1.1 {status}\r\nConnection: close\r\n{range}Content-Length: {}\r\n\r\n", body.len());
    let cut = site.cuts.lock().unwrap().remove(&path).unwrap_or(usize::MAX);
    // A client that has seen enough closes early.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body[..cut.min(body.len())]));
}
