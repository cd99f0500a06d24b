//! Speaking to a registry: where it is, who we are to it, and what its answers mean.
//!
//! This is a client of our own on `reqwest` and not a library for three reasons: a blob is continued where it broke off,
//! also by another process, into a cache we own; several arrive at a time while earlier ones are unpacked; and the rules on
//! where credentials may go are ours to state and test:
//!
//! - Redirects are followed by hand. Credentials go to the origin they are for and never to another one, and nothing leads
//!   from https to http.
//! - A token service is reached by https, or is the registry itself. It is asked for reading one repository, whatever the
//!   registry says the scope should be.
//! - A mirror is another registry: it gets its own credentials, not those of the one it stands for. What it serves under a
//!   digest is verified like everything else.

use std::time::Duration;

use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue, RANGE, RETRY_AFTER};
use reqwest::{Response, StatusCode};

use super::config::RegistryConfig;
use super::credential::CredentialError;
use super::digest::Digest;
use super::endpoint::{Endpoint, Transport};
use super::manifest::MANIFEST_TYPES;
use super::reference::Reference;
use crate::hash::Algorithm;

/// Tries for each request.
const ATTEMPTS: u32 = 4;
/// The wait before the second try; it doubles each time.
const BACKOFF: Duration = Duration::from_millis(500);
/// The longest wait a registry may ask for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);
/// How much of an error's text is shown.
const DETAIL_MAX: usize = 300;

/// A registry could not be used.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The client could not be made, for example because of a bad proxy address.
    #[error("could not set up the http client")]
    Client(#[source] reqwest::Error),
    /// Certificates to trust can't be read.
    #[error("could not read the certificates in `{}`", .path.display())]
    CaFile {
        /// The file.
        path: std::path::PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file has no certificates.
    #[error("`{}` has no certificates in PEM form", .0.display())]
    CaFormat(std::path::PathBuf),
    /// An address in the configuration, or made of it.
    #[error("`{}` is not the address of a registry", .0.escape_debug())]
    Address(String),
    /// Credentials can't be looked up.
    #[error("could not look up credentials for `{host}`")]
    Credential {
        /// The registry.
        host: String,
        /// Why not.
        source: CredentialError,
    },
    /// No answer, or it broke off.
    #[error("could not get `{url}`")]
    Request {
        /// What was asked for.
        url: String,
        /// Why not.
        source: reqwest::Error,
    },
    /// The registry answered with an error.
    #[error("could not get `{url}`: the registry answered {status}{}", detail(.message))]
    Status {
        /// What was asked for.
        url: String,
        /// The answer.
        status: StatusCode,
        /// What the registry says.
        message: String,
        /// How long it wants to be left alone.
        retry_after: Option<Duration>,
    },
    /// It isn't there.
    #[error("`{url}` is not in the registry")]
    NotFound {
        /// What was asked for.
        url: String,
    },
    /// Not without credentials, or not with these.
    #[error("registry `{host}` {}", if *.known { "refused the credentials" } else { "wants credentials, and there are none for it" })]
    Unauthorized {
        /// The registry.
        host: String,
        /// Whether there were credentials.
        known: bool,
    },
    /// A token service that must not be asked.
    #[error("registry `{host}` sends to the token service `{}`, which is neither https nor the registry itself", .realm.escape_debug())]
    Realm {
        /// The registry.
        host: String,
        /// Where it sends to.
        realm: String,
    },
    /// The token service's answer has no token.
    #[error("the token service `{url}` gave no token")]
    Token {
        /// What was asked.
        url: String,
    },
    /// A redirect that must not be followed.
    #[error("`{url}` leads to `{}`, {reason}", .to.escape_debug())]
    Redirect {
        /// What was asked for.
        url: String,
        /// Where it leads.
        to: String,
        /// Why that is wrong.
        reason: &'static str,
    },
    /// A document larger than any real one.
    #[error("`{url}` is larger than {limit} bytes")]
    TooLarge {
        /// What was asked for.
        url: String,
        /// The limit.
        limit: u64,
    },
    /// Something else than was asked for.
    #[error("`{url}` has the digest {found}")]
    Digest {
        /// What was asked for.
        url: String,
        /// What came.
        found: Digest,
    },
}

fn detail(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": {}", message.escape_debug()) }
}

impl RegistryError {
    /// Whether the same request may succeed a moment later.
    fn is_transient(&self) -> bool {
        match self {
            Self::Request { source, .. } => !source.is_builder(),
            Self::Status { status, .. } => {
                status.is_server_error()
                    || matches!(*status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS)
            }
            _ => false,
        }
    }
}

/// Waits before the next of several tries.
pub(crate) struct Retry {
    attempt: u32,
}

impl Retry {
    pub(crate) fn new() -> Self {
        Self { attempt: 1 }
    }

    /// Waits and returns true, or returns false when another try makes no sense.
    pub(crate) async fn after(&mut self, err: &RegistryError) -> bool {
        if !err.is_transient() {
            return false;
        }
        self.wait(if let RegistryError::Status { retry_after, .. } = err { *retry_after } else { None }).await
    }

    /// Waits at least so long and returns true, or returns false when there were enough tries.
    pub(crate) async fn wait(&mut self, at_least: Option<Duration>) -> bool {
        if self.attempt >= ATTEMPTS {
            return false;
        }
        let own = BACKOFF * 2u32.pow(self.attempt - 1);
        tokio::time::sleep(own.max(at_least.unwrap_or_default().min(RETRY_AFTER_MAX))).await;
        self.attempt += 1;
        true
    }
}

/// A manifest or index as it came.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) body: Vec<u8>,
    pub(crate) content_type: String,
    pub(crate) digest: Digest,
}

/// One repository of a registry, with its mirrors.
#[derive(Debug)]
pub(crate) struct Client {
    endpoints: Vec<Endpoint>,
    document_bytes: u64,
}

impl Client {
    /// Finds out how the registry of a reference is reached. Nothing is asked yet, except of a registry on this machine,
    /// whether it speaks http or https.
    pub(crate) async fn open(config: &RegistryConfig, reference: &Reference) -> Result<Self, RegistryError> {
        let transport = Transport::new(config);
        let own = config.hosts.get(reference.registry());
        let mut endpoints = Vec::new();
        for mirror in own.iter().flat_map(|host| &host.mirrors) {
            endpoints.push(Endpoint::mirror(&transport, config, mirror, reference).await?);
        }
        endpoints.push(Endpoint::registry(&transport, config, reference).await?);
        Ok(Self { endpoints, document_bytes: config.limits.document_bytes })
    }

    /// Gets a manifest or an index, by tag or digest.
    pub(crate) async fn manifest(&self, selector: &str) -> Result<Fetched, RegistryError> {
        let path = format!("manifests/{selector}");
        self.first_of(|endpoint| self.manifest_from(endpoint, &path, selector)).await
    }

    async fn manifest_from(
        &self,
        endpoint: &Endpoint,
        path: &str,
        selector: &str,
    ) -> Result<Fetched, RegistryError> {
        let mut headers = HeaderMap::new();
        for media_type in MANIFEST_TYPES {
            headers.append(ACCEPT, HeaderValue::from_static(media_type));
        }
        let mut retry = Retry::new();
        loop {
            let result = async {
                let response = endpoint.get(path, &headers).await?;
                self.document(response, selector).await
            };
            match result.await {
                // The registry itself is the second try of a mirror.
                Err(err) if !endpoint.is_mirror() && retry.after(&err).await => {}
                result => return result,
            }
        }
    }

    async fn document(&self, mut response: Response, selector: &str) -> Result<Fetched, RegistryError> {
        let (url, limit) = (shown(response.url()), self.document_bytes);
        let content_type =
            response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
        let content_type = content_type.split(';').next().unwrap_or("").trim().to_owned();
        let mut body = Vec::new();
        let request = |source: reqwest::Error| RegistryError::Request {
            url: url.clone(),
            source: source.without_url(),
        };
        while let Some(chunk) = response.chunk().await.map_err(request)? {
            if body.len() as u64 + chunk.len() as u64 > limit {
                return Err(RegistryError::TooLarge { url, limit });
            }
            body.extend_from_slice(&chunk);
        }
        // A digest says what must come; a tag says nothing.
        let wanted = selector.parse::<Digest>().ok();
        let algorithm = wanted.as_ref().map_or(Algorithm::Sha256, Digest::algorithm);
        let digest = Digest::of_as(algorithm, &body);
        if wanted.is_some_and(|wanted| wanted != digest) {
            return Err(RegistryError::Digest { url, found: digest });
        }
        Ok(Fetched { body, content_type, digest })
    }

    /// Begins to read a blob, from a byte on. The answer may begin at its first byte all the same.
    pub(crate) async fn blob(&self, digest: &Digest, from: u64) -> Result<Response, RegistryError> {
        let path = format!("blobs/{digest}");
        let mut headers = HeaderMap::new();
        if from > 0
            && let Ok(range) = HeaderValue::try_from(format!("bytes={from}-"))
        {
            headers.insert(RANGE, range);
        }
        self.first_of(|endpoint| endpoint.get(&path, &headers)).await
    }

    /// Asks the mirrors and then the registry, whose error counts.
    async fn first_of<'a, T, F: Future<Output = Result<T, RegistryError>>>(
        &'a self,
        ask: impl Fn(&'a Endpoint) -> F,
    ) -> Result<T, RegistryError> {
        let mut last = None;
        for endpoint in &self.endpoints {
            match ask(endpoint).await {
                Ok(found) => return Ok(found),
                Err(err) => last = Some(err),
            }
        }
        Err(last.unwrap_or_else(|| RegistryError::Address(String::new())))
    }
}

/// An address without what may be secret in it.
pub(crate) fn shown(url: &reqwest::Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    // Fails only for addresses that have no user.
    let _ = (url.set_username(""), url.set_password(None));
    url.to_string()
}

/// Turns an answer that is no success into an error, with what the registry says about it.
pub(crate) async fn status_error(mut response: Response) -> RegistryError {
    let (url, status) = (shown(response.url()), response.status());
    if status == StatusCode::NOT_FOUND {
        return RegistryError::NotFound { url };
    }
    let retry_after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        body.extend_from_slice(&chunk);
        if body.len() > 16 << 10 {
            break;
        }
    }
    let parsed: Option<serde_json::Value> = serde_json::from_slice(&body).ok();
    let message = parsed.as_ref().and_then(|json| json["errors"][0]["message"].as_str()).unwrap_or("");
    RegistryError::Status {
        url,
        status,
        message: message.chars().take(DETAIL_MAX).collect(),
        retry_after: retry_after.map(Duration::from_secs),
    }
}
