//! A registry on a loopback port that does what a test tells it to.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use banger_image::oci::Digest;

/// What a client asked.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// With its query.
    pub(crate) path: String,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// What it gets.
#[derive(Debug, Clone)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// Ends the connection after so many bytes of the body.
    pub(crate) cut: Option<usize>,
}

impl Response {
    pub(crate) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), cut: None }
    }

    pub(crate) fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

type Handler = dyn Fn(&Request) -> Response + Send + Sync;

/// A server; it ends when it is dropped.
pub(crate) struct Registry {
    pub(crate) address: SocketAddr,
    log: Arc<Mutex<Vec<Request>>>,
    stopped: Arc<AtomicBool>,
}

impl Registry {
    pub(crate) fn start(handler: impl Fn(&Request) -> Response + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (log, stopped) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let handler: Arc<Handler> = Arc::new(handler);
        let (log_there, stopped_there) = (Arc::clone(&log), Arc::clone(&stopped));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped_there.load(Ordering::SeqCst) {
                    return;
                }
                let (handler, log) = (Arc::clone(&handler), Arc::clone(&log_there));
                std::thread::spawn(move || serve(&stream.unwrap(), &*handler, &log));
            }
        });
        Self { address, log, stopped }
    }

    /// Every request so far.
    pub(crate) fn log(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    pub(crate) fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(mut stream: &TcpStream, handler: &Handler, log: &Mutex<Vec<Request>>) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    if reader.read_line(&mut line).unwrap_or(0) == 0 {
        return;
    }
    let mut words = line.split_whitespace();
    let (Some(method), Some(path)) = (words.next(), words.next()) else { return };
    let mut request = Request {
        method: method.to_owned(),
        path: path.to_owned(),
        headers: BTreeMap::new(),
        body: String::new(),
    };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        request.headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = request.header("content-length").parse().unwrap_or(0);
    reader.take(length).read_to_string(&mut request.body).unwrap();
    log.lock().unwrap().push(request.clone());
    let response = handler(&request);
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", response.status);
    if !response.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-length")) {
        head.push_str(&format!("Content-Length: {}\r\n", response.body.len()));
    }
    for (name, value) in &response.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let body = &response.body[..response.cut.unwrap_or(usize::MAX).min(response.body.len())];
    // A client that has seen enough closes early.
    let _ = stream
        .write_all(head.as_bytes())
        .and_then(|()| stream.write_all(b"\r\n"))
        .and_then(|()| stream.write_all(body));
}

/// The content of a registry, by path below `/v2/NAME/`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Content {
    pub(crate) blobs: BTreeMap<String, Vec<u8>>,
    pub(crate) manifests: BTreeMap<String, (String, Vec<u8>)>,
}

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

impl Content {
    pub(crate) fn blob(&mut self, bytes: Vec<u8>) -> String {
        let digest = Digest::of(&bytes).to_string();
        self.blobs.insert(digest.clone(), bytes);
        digest
    }

    pub(crate) fn manifest(&mut self, tag: &str, media_type: &str, json: &serde_json::Value) -> String {
        let bytes = serde_json::to_vec(json).unwrap();
        let digest = Digest::of(&bytes).to_string();
        for name in [tag, &digest] {
            self.manifests.insert(name.to_owned(), (media_type.to_owned(), bytes.clone()));
        }
        digest
    }

    /// Adds an image of layers, given as their content and as what is stored of it. Returns the manifest's digest.
    pub(crate) fn image(&mut self, tag: &str, layers: &[(Vec<u8>, Vec<u8>)]) -> String {
        let diff_ids: Vec<String> = layers.iter().map(|(tar, _)| Digest::of(tar).to_string()).collect();
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux",
            "config": {"Env": ["A=b"], "WorkingDir": "/w", "User": "1:2", "Entrypoint": ["/e"], "Cmd": null},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = serde_json::to_vec(&config).unwrap();
        let config_size = config.len();
        let config = self.blob(config);
        let layers: Vec<serde_json::Value> = layers
            .iter()
            .map(|(_, stored)| {
                let size = stored.len();
                let digest = self.blob(stored.clone());
                let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
                serde_json::json!({"mediaType": media_type, "digest": digest, "size": size})
            })
            .collect();
        let json = serde_json::json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_size},
            "layers": layers,
        });
        self.manifest(tag, OCI_MANIFEST, &json)
    }

    /// Answers as a registry without surprises.
    pub(crate) fn answer(&self, request: &Request) -> Response {
        let path = request.path.split('?').next().unwrap();
        if path == "/v2/" {
            return Response::new(200, "{}");
        }
        if let Some((_, name)) = path.split_once("/manifests/") {
            return match self.manifests.get(name) {
                Some((media_type, bytes)) => {
                    Response::new(200, bytes.clone()).with("Content-Type", media_type)
                }
                None => Response::new(404, "{}"),
            };
        }
        let Some(bytes) = path.split_once("/blobs/").and_then(|(_, digest)| self.blobs.get(digest)) else {
            return Response::new(404, "{}");
        };
        let from = request
            .header("range")
            .strip_prefix("bytes=")
            .and_then(|range| range.trim_end_matches('-').parse().ok());
        match from {
            Some(from) if from >= bytes.len() => Response::new(416, ""),
            Some(from) => {
                let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
                Response::new(206, &bytes[from..]).with("Content-Range", range)
            }
            None => Response::new(200, bytes.clone()),
        }
    }
}
