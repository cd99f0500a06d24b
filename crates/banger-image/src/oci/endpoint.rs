//! One place where a repository is served: its address, its connection, its authorization.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION, WWW_AUTHENTICATE};
use reqwest::{Method, Response, StatusCode, Url};

use super::challenge::Challenge;
use super::client::{RegistryError, shown, status_error};
use super::config::RegistryConfig;
use super::credential::{self, Credential};
use super::reference::Reference;

/// How long a registry may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// How long it may be silent in the middle of an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Redirects followed for one request.
const REDIRECTS_MAX: usize = 8;
/// The longest answer of a token service.
const TOKEN_MAX: usize = 1 << 20;
/// Where docker's own registry really is.
const DOCKER_HUB_HOST: &str = "registry-1.docker.io";

/// Connections: one pool for each set of settings.
#[derive(Debug)]
pub(crate) struct Transport {
    ca_files: HashMap<String, PathBuf>,
    clients: Mutex<HashMap<ClientKey, reqwest::Client>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct ClientKey {
    ca_file: Option<PathBuf>,
    is_local: bool,
}

impl Transport {
    pub(crate) fn new(config: &RegistryConfig) -> Arc<Self> {
        // An error only says that the process has a provider already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let ca_files = config
            .hosts
            .iter()
            .filter_map(|(host, settings)| Some((address_host(host).to_owned(), settings.ca_file.clone()?)))
            .collect();
        Arc::new(Self { ca_files, clients: Mutex::default() })
    }

    fn client(&self, url: &Url) -> Result<reqwest::Client, RegistryError> {
        let host = authority(url);
        let key = ClientKey { ca_file: self.ca_files.get(&host).cloned(), is_local: is_local(url) };
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&key) {
            return Ok(client.clone());
        }
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("banger/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none());
        if key.is_local {
            // A proxy is elsewhere and would mean another machine.
            builder = builder.no_proxy();
        }
        if let Some(path) = &key.ca_file {
            let pem =
                std::fs::read(path).map_err(|source| RegistryError::CaFile { path: path.clone(), source })?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem)
                .ok()
                .filter(|certificates| !certificates.is_empty())
                .ok_or_else(|| RegistryError::CaFormat(path.clone()))?;
            builder = builder.tls_certs_merge(certificates);
        }
        let client = builder.build().map_err(RegistryError::Client)?;
        clients.insert(key, client.clone());
        Ok(client)
    }
}

/// A registry or a mirror of it, for one repository.
#[derive(Debug)]
pub(crate) struct Endpoint {
    transport: Arc<Transport>,
    /// `https://host/v2/repository/`
    base: Url,
    repository: String,
    /// What the registry is called in configurations.
    host: String,
    is_mirror: bool,
    auth_files: Vec<PathBuf>,
    /// The header that worked last. Whoever finds it stale holds the lock while asking for another.
    authorization: tokio::sync::Mutex<Option<HeaderValue>>,
}

impl Endpoint {
    /// Returns the registry that a reference names.
    pub(crate) async fn registry(
        transport: &Arc<Transport>,
        config: &RegistryConfig,
        reference: &Reference,
    ) -> Result<Self, RegistryError> {
        let host = reference.registry();
        let address = if host == "docker.io" { DOCKER_HUB_HOST } else { host };
        let mut endpoint =
            Self::new(transport, config, host, &format!("https://{address}/"), reference, false)?;
        let settings = config.hosts.get(host).cloned().unwrap_or_default();
        if settings.plain_http || (settings.ca_file.is_none() && endpoint.speaks_http_locally().await?) {
            endpoint.be_plain();
        }
        Ok(endpoint)
    }

    /// Returns a mirror of it.
    pub(crate) async fn mirror(
        transport: &Arc<Transport>,
        config: &RegistryConfig,
        address: &str,
        reference: &Reference,
    ) -> Result<Self, RegistryError> {
        let bad = || RegistryError::Address(address.to_owned());
        let with_scheme =
            if address.contains("://") { address.to_owned() } else { format!("https://{address}") };
        let url: Url = with_scheme.parse().map_err(|_| bad())?;
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() || url.query().is_some() {
            return Err(bad());
        }
        let host = address_host(address);
        let mut endpoint = Self::new(transport, config, host, &with_scheme, reference, true)?;
        let settings = config.hosts.get(host).cloned().unwrap_or_default();
        let open_question = !address.contains("://") && settings.ca_file.is_none();
        if settings.plain_http || (open_question && endpoint.speaks_http_locally().await?) {
            endpoint.be_plain();
        }
        Ok(endpoint)
    }

    fn new(
        transport: &Arc<Transport>,
        config: &RegistryConfig,
        host: &str,
        address: &str,
        reference: &Reference,
        is_mirror: bool,
    ) -> Result<Self, RegistryError> {
        let repository = reference.repository().to_owned();
        let text = format!("{}/v2/{repository}/", address.trim_end_matches('/'));
        let base = text.parse().map_err(|_| RegistryError::Address(address.to_owned()))?;
        Ok(Self {
            transport: Arc::clone(transport),
            base,
            repository,
            host: host.to_owned(),
            is_mirror,
            auth_files: config.auth_files.clone(),
            authorization: tokio::sync::Mutex::new(None),
        })
    }

    /// Whether this only stands for a registry.
    pub(crate) fn is_mirror(&self) -> bool {
        self.is_mirror
    }

    fn be_plain(&mut self) {
        let port = self.base.port();
        // Fails only for addresses without a host.
        let _ = self.base.set_scheme("http");
        let _ = self.base.set_port(port);
    }

    /// Whether this is a registry on this machine that speaks http. One that speaks https answers nothing, or 400.
    async fn speaks_http_locally(&self) -> Result<bool, RegistryError> {
        if !is_local(&self.base) {
            return Ok(false);
        }
        let mut url = self.base.clone();
        let _ = url.set_scheme("http");
        url.set_path("/v2/");
        match self.transport.client(&url)?.get(url).send().await {
            Ok(response) => Ok(response.status() != StatusCode::BAD_REQUEST),
            // Nobody there: the request that follows says so, in words that name what was meant.
            Err(err) => Ok(err.is_connect()),
        }
    }

    /// Asks for something below the repository and authenticates when that is wanted.
    pub(crate) async fn get(&self, path: &str, headers: &HeaderMap) -> Result<Response, RegistryError> {
        let url = self.base.join(path).map_err(|_| RegistryError::Address(path.to_owned()))?;
        let mut used = self.authorization.lock().await.clone();
        let mut challenged = false;
        loop {
            let request = Outgoing { method: Method::GET, headers, body: None };
            let (response, is_own) = self.follow(request, url.clone(), used.as_ref()).await?;
            if response.status().is_success() {
                return Ok(response);
            }
            if response.status() != StatusCode::UNAUTHORIZED || !is_own {
                return Err(status_error(response).await);
            }
            if challenged {
                return Err(RegistryError::Unauthorized { host: self.host.clone(), known: true });
            }
            challenged = true;
            let mut current = self.authorization.lock().await;
            // Another request may have got a new one while this one waited.
            if *current == used {
                *current = Some(self.authenticate(&response).await?);
            }
            used = current.clone();
        }
    }

    /// Sends a request and follows where it leads. Says whether the answer is from the first origin.
    async fn follow(
        &self,
        request: Outgoing<'_>,
        url: Url,
        authorization: Option<&HeaderValue>,
    ) -> Result<(Response, bool), RegistryError> {
        let origin = url.origin();
        let (mut at, mut is_own) = (url, true);
        for _ in 0..REDIRECTS_MAX {
            let client = self.transport.client(&at)?;
            let mut builder =
                client.request(request.method.clone(), at.clone()).headers(request.headers.clone());
            if let Some(authorization) = authorization.filter(|_| is_own) {
                builder = builder.header(AUTHORIZATION, authorization);
            }
            if let Some(body) = request.body {
                builder =
                    builder.header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(body.to_owned());
            }
            let sent = builder.send().await;
            let response = sent
                .map_err(|source| RegistryError::Request { url: shown(&at), source: source.without_url() })?;
            if !response.status().is_redirection() {
                return Ok((response, is_own));
            }
            let location =
                response.headers().get(LOCATION).and_then(|value| value.to_str().ok()).unwrap_or("");
            let refuse =
                |to: &str, reason| RegistryError::Redirect { url: shown(&at), to: to.to_owned(), reason };
            let mut next = at.join(location).map_err(|_| refuse(location, "which is no address"))?;
            if !matches!(next.scheme(), "http" | "https") || !next.has_host() {
                return Err(refuse(&shown(&next), "which is no address of the web"));
            }
            if at.scheme() == "https" && next.scheme() != "https" {
                return Err(refuse(&shown(&next), "which is not encrypted"));
            }
            if request.method != Method::GET {
                return Err(refuse(&shown(&next), "where secrets must not follow"));
            }
            let _ = (next.set_username(""), next.set_password(None));
            // Once elsewhere, a way back is not ours any more.
            is_own &= next.origin() == origin;
            at = next;
        }
        let reason = "after more redirects than are followed";
        Err(RegistryError::Redirect { url: shown(&self.base), to: shown(&at), reason })
    }

    /// Does what an answer of 401 asks for and returns the header that should satisfy it.
    async fn authenticate(&self, response: &Response) -> Result<HeaderValue, RegistryError> {
        let values = response.headers().get_all(WWW_AUTHENTICATE);
        let challenge = Challenge::best(values.iter().filter_map(|value| value.to_str().ok()));
        let credential = credential::find(&self.auth_files, &self.host)
            .await
            .map_err(|source| RegistryError::Credential { host: self.host.clone(), source })?;
        let known = credential.is_some();
        let unauthorized = || RegistryError::Unauthorized { host: self.host.clone(), known };
        let header = match (challenge, &credential) {
            (_, Some(Credential::Bearer(token))) => format!("Bearer {token}"),
            (Some(Challenge::Bearer { realm, service }), _) => {
                let token = self.token(&realm, service.as_deref(), credential.as_ref()).await?;
                format!("Bearer {token}")
            }
            (Some(Challenge::Basic), Some(credential)) => {
                credential.basic_header().ok_or_else(unauthorized)?
            }
            _ => return Err(unauthorized()),
        };
        let mut header = HeaderValue::try_from(header).map_err(|_| unauthorized())?;
        header.set_sensitive(true);
        Ok(header)
    }

    /// Asks a token service.
    async fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        credential: Option<&Credential>,
    ) -> Result<String, RegistryError> {
        let bad =
            || RegistryError::Realm { host: self.host.clone(), realm: realm.chars().take(300).collect() };
        let mut url: Url = realm.parse().map_err(|_| bad())?;
        let is_allowed = url.scheme() == "https" || url.origin() == self.base.origin();
        if !is_allowed || !url.has_host() || !url.username().is_empty() || url.password().is_some() {
            return Err(bad());
        }
        let scope = format!("repository:{}:pull", self.repository);
        let mut form = vec![("scope", scope.as_str())];
        form.extend(service.map(|service| ("service", service)));
        let no_headers = HeaderMap::new();
        let (response, _) = if let Some(Credential::Identity(token)) = credential {
            form.extend([("grant_type", "refresh_token"), ("client_id", "banger"), ("refresh_token", token)]);
            let body = encoded(&form);
            let request = Outgoing { method: Method::POST, headers: &no_headers, body: Some(&body) };
            self.follow(request, url.clone(), None).await?
        } else {
            url.query_pairs_mut().extend_pairs(&form);
            let basic = credential.and_then(Credential::basic_header);
            let basic = basic.and_then(|header| HeaderValue::try_from(header).ok());
            let request = Outgoing { method: Method::GET, headers: &no_headers, body: None };
            self.follow(request, url.clone(), basic.as_ref()).await?
        };
        let url = shown(&url);
        match response.status() {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err(RegistryError::Unauthorized { host: self.host.clone(), known: credential.is_some() })
            }
            status if status.is_success() => read_token(response, url).await,
            _ => Err(status_error(response).await),
        }
    }
}

struct Outgoing<'a> {
    method: Method,
    headers: &'a HeaderMap,
    body: Option<&'a str>,
}

fn encoded(form: &[(&str, &str)]) -> String {
    // The only encoder at hand is the one of addresses.
    let url = Url::parse_with_params("http://form/", form);
    url.ok().and_then(|url| url.query().map(str::to_owned)).unwrap_or_default()
}

async fn read_token(mut response: Response, url: String) -> Result<String, RegistryError> {
    let mut body = Vec::new();
    let request =
        |source: reqwest::Error| RegistryError::Request { url: url.clone(), source: source.without_url() };
    while let Some(chunk) = response.chunk().await.map_err(request)? {
        body.extend_from_slice(&chunk);
        if body.len() > TOKEN_MAX {
            return Err(RegistryError::TooLarge { url, limit: TOKEN_MAX as u64 });
        }
    }
    let json: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
    let token = json["token"].as_str().or(json["access_token"].as_str()).filter(|token| !token.is_empty());
    token.map(str::to_owned).ok_or(RegistryError::Token { url })
}

/// The host and port of an address that may have a scheme and a path.
fn address_host(address: &str) -> &str {
    let behind = address.split_once("://").map_or(address, |(_, behind)| behind);
    behind.split('/').next().unwrap_or(behind)
}

/// Host and port as in a reference.
fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or("");
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

/// Whether an address is of this machine, by its own words.
fn is_local(url: &Url) -> bool {
    let host = url.host_str().unwrap_or("").trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}
