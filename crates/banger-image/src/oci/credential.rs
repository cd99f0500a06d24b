//! Credentials, where docker's and podman's tools keep them.
//!
//! docker's `config.json` and podman's `auth.json` name them themselves, or a helper program for a registry, or one for all. A helper is a program of the user,
//! found on the path, that is given a registry's address and answers in json: the one place of this crate that starts a
//! process. Secrets are never part of a message or of `Debug` output.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// What docker calls its own registry here.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
/// The user name that marks a secret as an identity token.
const TOKEN_USER: &str = "<token>";
/// The longest `config.json` that is read.
const CONFIG_MAX: u64 = 4 << 20;
/// The longest answer of a helper.
const ANSWER_MAX: u64 = 1 << 20;
/// How long a helper may take; some ask their user.
const HELPER_TIMEOUT: Duration = Duration::from_secs(60);
/// What helpers say when they have nothing.
const NOT_FOUND: &str = "credentials not found";

/// Credentials could not be looked up.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// The file is there and can't be read.
    #[error("could not read `{}`", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file isn't what docker writes.
    #[error("`{}` is not a valid docker configuration", .path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
    /// The credentials in the file can't be decoded.
    #[error("the credentials for `{host}` in `{}` can't be decoded", .path.display())]
    Decode {
        /// The file.
        path: PathBuf,
        /// The registry.
        host: String,
    },
    /// The name of a helper is not the end of a program's name.
    #[error("`{}` is not the name of a credential helper", .0.escape_debug())]
    HelperName(String),
    /// A helper can't be started or talked to.
    #[error("could not run the credential helper `{helper}`")]
    Run {
        /// The program.
        helper: String,
        /// Why not.
        source: io::Error,
    },
    /// A helper failed.
    #[error("the credential helper `{helper}` failed: {}", .message.escape_debug())]
    Failed {
        /// The program.
        helper: String,
        /// What it said.
        message: String,
    },
    /// A helper answered something else than credentials.
    #[error("the credential helper `{helper}` gave an answer that is not understood")]
    Answer {
        /// The program.
        helper: String,
    },
    /// A helper didn't answer.
    #[error("the credential helper `{helper}` did not answer within {} s", HELPER_TIMEOUT.as_secs())]
    Timeout {
        /// The program.
        helper: String,
    },
}

/// What proves to a registry who we are.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credential {
    /// A user and a password.
    Basic { username: String, password: String },
    /// Exchanged for a token at the registry's token service.
    Identity(String),
    /// Sent as it is.
    Bearer(String),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credential")
    }
}

impl Credential {
    /// The header of basic authentication.
    pub(crate) fn basic_header(&self) -> Option<String> {
        match self {
            Self::Basic { username, password } => {
                Some(format!("Basic {}", STANDARD.encode(format!("{username}:{password}"))))
            }
            _ => None,
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct DockerConfig {
    auths: BTreeMap<String, Auth>,
    #[serde(rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
    #[serde(rename = "credsStore")]
    store: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Auth {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

/// Looks up the credentials for a registry in files, in order; none is not an error.
pub(crate) async fn find(files: &[PathBuf], host: &str) -> Result<Option<Credential>, CredentialError> {
    for path in files {
        if let Some(found) = find_in(path, host).await? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

async fn find_in(path: &Path, host: &str) -> Result<Option<Credential>, CredentialError> {
    let path = path.to_owned();
    let Some(text) = read(&path)? else { return Ok(None) };
    let config: DockerConfig = serde_json::from_slice(&text)
        .map_err(|source| CredentialError::Parse { path: path.clone(), source })?;
    let keys = keys(host);
    let own = config.helpers.iter().find(|(key, _)| keys.contains(&normalised(key)));
    let helper = own.map(|(_, helper)| helper).or(Some(&config.store)).filter(|helper| !helper.is_empty());
    if let Some(helper) = helper {
        let address = if host == "docker.io" { DOCKER_HUB_KEY } else { host };
        if let Some(found) = ask(helper, address).await? {
            return Ok(Some(found));
        }
    }
    let auth = config.auths.iter().find(|(key, _)| keys.contains(&normalised(key)));
    match auth {
        Some((_, auth)) => decode(auth).map_err(|()| CredentialError::Decode { path, host: host.to_owned() }),
        None => Ok(None),
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, CredentialError> {
    use std::io::Read as _;
    let error = |source| CredentialError::Read { path: path.to_owned(), source };
    let file = match std::fs::File::open(path) {
        Err(err) if matches!(err.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        other => other.map_err(error)?,
    };
    let mut text = Vec::new();
    file.take(CONFIG_MAX + 1).read_to_end(&mut text).map_err(error)?;
    if text.len() as u64 > CONFIG_MAX {
        return Err(error(io::ErrorKind::FileTooLarge.into()));
    }
    Ok(Some(text))
}

/// A key without scheme and the path of the interface, which older versions wrote. One with another path is podman's, for
/// some of the registry's repositories; it is left as it is, so it is no registry's.
fn normalised(key: &str) -> String {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    match key.split_once('/') {
        Some((host, "" | "v1" | "v1/" | "v2" | "v2/")) => host.to_ascii_lowercase(),
        _ => key.to_ascii_lowercase(),
    }
}

fn keys(host: &str) -> Vec<String> {
    match host {
        "docker.io" => ["docker.io", "index.docker.io", "registry-1.docker.io"].map(str::to_owned).to_vec(),
        host => vec![host.to_owned()],
    }
}

fn decode(auth: &Auth) -> Result<Option<Credential>, ()> {
    if !auth.registrytoken.is_empty() {
        return Ok(Some(Credential::Bearer(auth.registrytoken.clone())));
    }
    if !auth.identitytoken.is_empty() {
        return Ok(Some(Credential::Identity(auth.identitytoken.clone())));
    }
    if !auth.auth.is_empty() {
        let text = auth.auth.trim();
        let bytes = STANDARD.decode(text).or_else(|_| STANDARD_NO_PAD.decode(text)).map_err(drop)?;
        let text = String::from_utf8(bytes).map_err(drop)?;
        let (username, password) = text.split_once(':').ok_or(())?;
        // Docker pads passwords with zero bytes.
        let password = password.trim_end_matches('\0').to_owned();
        return Ok(Some(Credential::Basic { username: username.to_owned(), password }));
    }
    if auth.username.is_empty() {
        return Ok(None);
    }
    let (username, password) = (auth.username.clone(), auth.password.clone());
    Ok(Some(Credential::Basic { username, password }))
}

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "Username")]
    username: String,
    #[serde(rename = "Secret")]
    secret: String,
}

async fn ask(name: &str, address: &str) -> Result<Option<Credential>, CredentialError> {
    // It becomes part of a program's name, never of a path.
    if name.len() > 64 || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        return Err(CredentialError::HelperName(name.chars().take(100).collect()));
    }
    let helper = format!("docker-credential-{name}");
    let run = |source| CredentialError::Run { helper: helper.clone(), source };
    let timeout = || CredentialError::Timeout { helper: helper.clone() };
    let (success, answer) = tokio::time::timeout(HELPER_TIMEOUT, talk(&helper, address))
        .await
        .map_err(|_| timeout())?
        .map_err(run)?;
    if !success {
        let message = String::from_utf8_lossy(&answer).trim().chars().take(200).collect::<String>();
        if message.contains(NOT_FOUND) {
            return Ok(None);
        }
        return Err(CredentialError::Failed { helper, message });
    }
    let Answer { username, secret } =
        serde_json::from_slice(&answer).map_err(|_| CredentialError::Answer { helper })?;
    Ok(Some(match username.as_str() {
        TOKEN_USER => Credential::Identity(secret),
        _ => Credential::Basic { username, password: secret },
    }))
}

async fn talk(helper: &str, address: &str) -> io::Result<(bool, Vec<u8>)> {
    let mut child = tokio::process::Command::new(helper)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that doesn't care may be gone already.
        let _ = stdin.write_all(address.as_bytes()).await;
    }
    let mut answer = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(ANSWER_MAX).read_to_end(&mut answer).await?;
    }
    Ok((child.wait().await?.success(), answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lookup(json: &str, host: &str) -> Result<Option<Credential>, CredentialError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), json).unwrap();
        find(&[dir.path().join("config.json")], host).await
    }

    fn basic(username: &str, password: &str) -> Option<Credential> {
        Some(Credential::Basic { username: username.to_owned(), password: password.to_owned() })
    }

    #[tokio::test]
    async fn entries_of_the_file() {
        // me:secret:x
        let json = r#"{"auths": {"https://index.docker.io/v1/": {"auth": "bWU6c2VjcmV0Ong="},
            "reg.example:5000": {"username": "u", "password": "p"}, "token.example": {"identitytoken": "t"},
            "empty.example": {}, "bad.example": {"auth": "?"}}, "unknown": [1]}"#;
        assert_eq!(lookup(json, "docker.io").await.unwrap(), basic("me", "secret:x"));
        assert_eq!(lookup(json, "reg.example:5000").await.unwrap(), basic("u", "p"));
        assert_eq!(lookup(json, "token.example").await.unwrap(), Some(Credential::Identity("t".to_owned())));
        assert_eq!(lookup(json, "empty.example").await.unwrap(), None);
        // Another port is another registry.
        assert_eq!(lookup(json, "reg.example").await.unwrap(), None);
        assert!(lookup(json, "bad.example").await.is_err());
        assert!(lookup("{", "x").await.is_err());
        assert_eq!(find(&["/nonexistent".into()], "x").await.unwrap(), None);
    }

    #[tokio::test]
    async fn the_first_file_that_has_some_counts() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, json: &str| {
            std::fs::write(dir.path().join(name), json).unwrap();
            dir.path().join(name)
        };
        let podman =
            r#"{"auths": {"a.example": {"auth": "bWU6b25l"}, "b.example/team": {"auth": "bWU6dGVhbQ=="}}}"#;
        let docker = r#"{"auths": {"a.example": {"auth": "bWU6dHdv"}, "b.example": {"auth": "bWU6dHdv"}}}"#;
        let files = [dir.path().join("missing"), file("auth.json", podman), file("config.json", docker)];
        assert_eq!(find(&files, "a.example").await.unwrap(), basic("me", "one"));
        assert_eq!(find(&files, "b.example").await.unwrap(), basic("me", "two"), "not a team's");
        assert_eq!(find(&files[..2], "b.example").await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_helper_is_a_name_and_must_exist() {
        let error = lookup(r#"{"credsStore": "../../bin/sh"}"#, "x").await.unwrap_err();
        assert!(matches!(error, CredentialError::HelperName(_)), "{error}");
        let error = lookup(r#"{"credHelpers": {"x": "surely-not-there"}}"#, "x").await.unwrap_err();
        assert!(error.to_string().contains("docker-credential-surely-not-there"), "{error}");
    }
}
