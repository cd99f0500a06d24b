//! Connections beside the sessions: to what listens in the guest, and from what the client has us listen on.

use super::fields::Packet;
use super::stream::{Event, Events, Reader, Writer};
use std::fs::DirBuilder;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::AbortHandle;

/// How long a connection may take to come about; the kernel's own limit is minutes.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(30);
/// The wait after a connection could not be taken, for want of descriptors for example.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// Where sockets for a forwarded agent are made.
const TEMPORARY: &str = "/tmp";

fn tcp(stream: TcpStream) -> (Reader, Writer) {
    // A keystroke is not to wait for the answer to the one before.
    let _ = stream.set_nodelay(true);
    let (reader, writer) = stream.into_split();
    (Box::new(reader), Box::new(writer))
}

fn unix(stream: UnixStream) -> (Reader, Writer) {
    let (reader, writer) = stream.into_split();
    (Box::new(reader), Box::new(writer))
}

/// Connects to a port in, or as seen from, the guest.
///
/// # Errors
/// With a sentence for the client.
pub(crate) async fn connect_tcp(host: &str, port: u32) -> Result<(Reader, Writer), String> {
    let port = u16::try_from(port).map_err(|_| format!("{port} is no port"))?;
    let connected = async {
        let mut last = format!("no address of `{}` is known", host.escape_debug());
        for address in addresses(host).await? {
            match TcpStream::connect(SocketAddr::new(address, port)).await {
                Ok(stream) => return Ok(tcp(stream)),
                Err(error) => last = error.to_string(),
            }
        }
        Err(last)
    };
    tokio::time::timeout(CONNECT_TIME_MAX, connected).await.map_err(|_| "no answer".to_owned())?
}

/// Connects to a Unix socket in the guest.
///
/// # Errors
/// With a sentence for the client.
pub(crate) async fn connect_unix(path: &str) -> Result<(Reader, Writer), String> {
    UnixStream::connect(path).await.map(unix).map_err(|error| error.to_string())
}

/// Names are looked up by the guest's own program: this one must not load the guest's libraries.
async fn addresses(host: &str) -> Result<Vec<IpAddr>, String> {
    if host == "localhost" {
        return Ok(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]);
    }
    if let Ok(address) = host.parse() {
        return Ok(vec![address]);
    }
    if host.starts_with('-') {
        return Err(format!("`{}` is no name", host.escape_debug()));
    }
    let mut command = banger_sys::child::command("getent".as_ref());
    command.args(["ahosts", host]).stdin(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let mut command = tokio::process::Command::from(command);
    command.kill_on_drop(true);
    let output = command.output().await;
    let output = output.map_err(|error| format!("look up `{}` with getent: {error}", host.escape_debug()))?;
    Ok(parse_hosts(&String::from_utf8_lossy(&output.stdout)))
}

/// The addresses of `getent ahosts`, once each.
fn parse_hosts(text: &str) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for address in text.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()) {
        if !found.contains(&address) {
            found.push(address);
        }
    }
    found
}

/// A place the client has us listen at; not any more once this is dropped.
#[derive(Debug)]
pub(crate) struct Listening {
    accepting: Vec<AbortHandle>,
    /// What goes with it: a socket, or the directory it is alone in.
    made: Option<PathBuf>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.accepting.iter().for_each(AbortHandle::abort);
        if let Some(made) = &self.made {
            let _ = if made.is_dir() { std::fs::remove_dir_all(made) } else { std::fs::remove_file(made) };
        }
    }
}

/// Listens on a port; returns its number, which the kernel chooses for 0.
pub(crate) fn listen_tcp(host: &str, port: u32, events: &Events) -> io::Result<(Listening, u16)> {
    let port = u16::try_from(port).map_err(|_| io::ErrorKind::InvalidInput)?;
    let address = match host {
        "localhost" => Ipv4Addr::LOCALHOST.into(),
        // What stands for every address (RFC 4254, section 7.1).
        "" | "*" => Ipv4Addr::UNSPECIFIED.into(),
        other => other.parse::<IpAddr>().map_err(|_| io::ErrorKind::InvalidInput)?,
    };
    let listener = bind(address, port)?;
    let port = listener.local_addr()?.port();
    let mut accepting = vec![accept_tcp(listener, host.to_owned(), port, events.clone())];
    // Where there is IPv6, `localhost` may mean that.
    if host == "localhost"
        && let Ok(listener) = bind(Ipv6Addr::LOCALHOST.into(), port)
    {
        accepting.push(accept_tcp(listener, host.to_owned(), port, events.clone()));
    }
    Ok((Listening { accepting, made: None }, port))
}

fn bind(address: IpAddr, port: u16) -> io::Result<TcpListener> {
    let listener = std::net::TcpListener::bind(SocketAddr::new(address, port))?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

fn accept_tcp(listener: TcpListener, host: String, port: u16, events: Events) -> AbortHandle {
    let accepting = async move {
        loop {
            let Ok((stream, from)) = listener.accept().await else {
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            };
            let details = Packet::part().bytes(&host).number(port.into());
            let details = details.bytes(from.ip().to_string()).number(from.port().into());
            let accepted = Event::Accepted { kind: "forwarded-tcpip", details, streams: tcp(stream) };
            if events.send(accepted).await.is_err() {
                return;
            }
        }
    };
    tokio::task::spawn_local(accepting).abort_handle()
}

/// Listens on a Unix socket.
pub(crate) fn listen_unix(path: &str, events: &Events) -> io::Result<Listening> {
    let listener = UnixListener::bind(path)?;
    let details = Packet::part().bytes(path).bytes("");
    let kind = "forwarded-streamlocal@openssh.com";
    let accepting = vec![accept_unix(listener, kind, details, events.clone())];
    Ok(Listening { accepting, made: Some(path.into()) })
}

/// Listens for programs that ask the client's agent; returns the socket's path.
pub(crate) fn listen_agent(events: &Events) -> io::Result<(Listening, PathBuf)> {
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let dir = Path::new(TEMPORARY).join(format!("banger-ssh-{:016x}", u64::from_ne_bytes(random)));
    DirBuilder::new().mode(0o700).create(&dir)?;
    let path = dir.join("agent");
    let mut listening = Listening { accepting: Vec::new(), made: Some(dir) };
    let listener = UnixListener::bind(&path)?;
    listening.accepting.push(accept_unix(listener, "auth-agent@openssh.com", Packet::part(), events.clone()));
    Ok((listening, path))
}

fn accept_unix(listener: UnixListener, kind: &'static str, details: Packet, events: Events) -> AbortHandle {
    let accepting = async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            };
            let accepted = Event::Accepted { kind, details: details.clone(), streams: unix(stream) };
            if events.send(accepted).await.is_err() {
                return;
            }
        }
    };
    tokio::task::spawn_local(accepting).abort_handle()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_name_is_no_flag_of_a_program() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let error = runtime.block_on(super::addresses("--service=files")).unwrap_err();
        assert_eq!(error, "`--service=files` is no name");
    }

    #[test]
    fn getents_answer_is_addresses_once_each() {
        let text = "127.0.0.1 STREAM localhost\n127.0.0.1 DGRAM\nfe80::1 STREAM\nnonsense\n\n";
        assert_eq!(
            super::parse_hosts(text),
            ["127.0.0.1", "fe80::1"].map(|text| text.parse::<std::net::IpAddr>().unwrap())
        );
    }
}
