//! The guest's resolver: passes queries on to the host's resolvers, and nothing else.
//!
//! It listens in the vm's network namespace and asks from the host's, so the guest's names are the host's without a way
//! from the guest to whatever resolver the host has. Each query goes out of a socket of its own, connected (the kernel
//! then drops what others send), under a random number. Where the policy denies a name or an address, so does the
//! resolver, and writes it down. The vms of the guest's network it knows by itself. Where the policy opens addresses by name, they are open before the guest hears of them.
//!
//! Messages are not written anew: what passes is passed on as it came, under the guest's number. So little of DNS has to be
//! understood ([`dns`]) that a library for all of it would be more code to trust, not less.

use super::Order;
use super::dns::{self, Found, Parsed, Query, Rcode};
use super::member::Names;
use super::record::Record;
use crate::net::GATEWAY;
use crate::net::member::NAME_END;
use crate::net::policy::Policy;
use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;

/// Queries of one vm that wait for an answer; what comes on top is dropped, and asked again by the guest.
const IN_FLIGHT_MAX: usize = 128;
/// Connections of one vm.
const CONNECTIONS_MAX: usize = 16;
/// Resolvers of the host that are asked, as in the C library.
const SERVERS_MAX: usize = 3;
/// How long one of them may take.
const SERVER_WAIT: Duration = Duration::from_secs(3);
/// How long a connection may be silent.
const IDLE_MAX: Duration = Duration::from_secs(10);
/// Queries are small; larger ones are not passed on.
const QUERY_LEN_MAX: usize = 4096;
/// The largest answer there is.
const ANSWER_LEN_MAX: usize = 65535;
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// How a query came, and so how it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Udp,
    Tcp,
}

/// What the resolver has in common with the rest of the network.
#[derive(Clone)]
pub(super) struct Part {
    pub(super) policy: Rc<RefCell<Policy>>,
    pub(super) record: Rc<RefCell<Record>>,
    /// Where addresses are opened.
    pub(super) orders: mpsc::Sender<Order>,
    /// The vms of the guest's network.
    pub(super) names: Option<Rc<Names>>,
}

struct Resolver {
    part: Part,
    servers: Box<dyn Fn() -> Vec<SocketAddr>>,
}

/// Listens, in the caller's network namespace.
pub(crate) fn bind() -> io::Result<(std::net::UdpSocket, std::net::TcpListener)> {
    bind_at(SocketAddr::from((GATEWAY, 53)))
}

fn bind_at(address: SocketAddr) -> io::Result<(std::net::UdpSocket, std::net::TcpListener)> {
    let udp = std::net::UdpSocket::bind(address)?;
    let tcp = std::net::TcpListener::bind(udp.local_addr()?)?;
    udp.set_nonblocking(true)?;
    tcp.set_nonblocking(true)?;
    Ok((udp, tcp))
}

/// Serves the guest until the supervisor ends.
pub(super) fn serve(udp: std::net::UdpSocket, tcp: std::net::TcpListener, part: Part) -> io::Result<()> {
    let servers = || parse_resolv_conf(&std::fs::read_to_string(RESOLV_CONF).unwrap_or_default());
    serve_with(udp, tcp, Resolver { part, servers: Box::new(servers) })
}

fn serve_with(udp: std::net::UdpSocket, tcp: std::net::TcpListener, resolver: Resolver) -> io::Result<()> {
    let resolver = Rc::new(resolver);
    tokio::task::spawn_local(serve_udp(UdpSocket::from_std(udp)?, resolver.clone()));
    tokio::task::spawn_local(serve_tcp(TcpListener::from_std(tcp)?, resolver));
    Ok(())
}

async fn serve_udp(socket: UdpSocket, resolver: Rc<Resolver>) {
    let socket = Rc::new(socket);
    let permits = Arc::new(Semaphore::new(IN_FLIGHT_MAX));
    let mut buffer = vec![0; QUERY_LEN_MAX];
    loop {
        // Errors are those of earlier answers that found nobody.
        let Ok((len, peer)) = socket.recv_from(&mut buffer).await else { continue };
        let Ok(permit) = permits.clone().try_acquire_owned() else { continue };
        let (bytes, socket, resolver) = (buffer[..len].to_vec(), socket.clone(), resolver.clone());
        tokio::task::spawn_local(async move {
            if let Some(answer) = resolver.answer(&bytes, Transport::Udp).await {
                let _ = socket.send_to(&answer, peer).await;
            }
            drop(permit);
        });
    }
}

async fn serve_tcp(listener: TcpListener, resolver: Rc<Resolver>) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors: the connection still waits, and so does the next try.
            tokio::time::sleep(SERVER_WAIT).await;
            continue;
        };
        let resolver = resolver.clone();
        tokio::task::spawn_local(async move {
            // A guest that breaks off concerns nobody.
            let _ = serve_connection(stream, &resolver).await;
            drop(permit);
        });
    }
}

async fn serve_connection(mut stream: TcpStream, resolver: &Resolver) -> io::Result<()> {
    loop {
        let Some(bytes) = timeout(IDLE_MAX, read_message(&mut stream, QUERY_LEN_MAX)).await?? else {
            return Ok(());
        };
        let Some(answer) = resolver.answer(&bytes, Transport::Tcp).await else { return Ok(()) };
        timeout(IDLE_MAX, write_message(&mut stream, &answer)).await??;
    }
}

/// Reads a message with its length in front; none at the end.
async fn read_message(stream: &mut TcpStream, len_max: usize) -> io::Result<Option<Vec<u8>>> {
    let len = match stream.read_u16().await {
        Ok(len) => usize::from(len),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    if len > len_max {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).await?;
    Ok(Some(bytes))
}

async fn write_message(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    let len = u16::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    stream.write_all(&[&len.to_be_bytes(), bytes].concat()).await
}

impl Resolver {
    /// The answer to what the guest sent; none when there is nothing to say.
    async fn answer(&self, bytes: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let query = match dns::parse(bytes) {
            Parsed::Query(query) => query,
            Parsed::Refuse(answer) => return Some(answer),
            Parsed::Ignore => return None,
        };
        let name = query.name();
        if let Some(names) = &self.part.names {
            if let Some(address) = names.find(&name) {
                return Some(query.answer(address));
            }
            if name.ends_with(NAME_END) {
                return Some(query.fail(Rcode::NoSuchName));
            }
        }
        if !self.part.policy.borrow().allows_name(&name) {
            self.part.record.borrow_mut().deny(&name, None);
            return Some(query.fail(Rcode::NoSuchName));
        }
        // Asking for the names of the LAN's addresses is looking around in it.
        if query.reverse().is_some_and(|address| self.part.policy.borrow().withholds(address)) {
            return Some(query.fail(Rcode::NoSuchName));
        }
        let mut failed = None;
        for server in (self.servers)() {
            let asked = timeout(SERVER_WAIT, ask(server, &query, transport)).await;
            let Ok(Ok(mut answer)) = asked else { continue };
            answer[..2].copy_from_slice(&query.id());
            if dns::rcode(&answer) == Rcode::ServerFailure as u8 {
                failed = Some(answer);
                continue;
            }
            return Some(self.checked(&query, &name, answer).await);
        }
        Some(failed.unwrap_or_else(|| query.fail(Rcode::ServerFailure)))
    }

    /// An answer the guest may have.
    async fn checked(&self, query: &Query, name: &str, answer: Vec<u8>) -> Vec<u8> {
        let Some(found) = dns::addresses(&answer) else { return query.fail(Rcode::ServerFailure) };
        let withheld = {
            let policy = self.part.policy.borrow();
            found.iter().find(|found| policy.withholds(found.address)).copied()
        };
        if let Some(found) = withheld {
            self.part.record.borrow_mut().deny(name, Some(found.address));
            return query.fail(Rcode::NoSuchName);
        }
        let found: Vec<Found> = found.into_iter().filter(|found| found.is_answer).collect();
        self.part.record.borrow_mut().note(name, found.iter().map(|found| found.address));
        if found.is_empty() || !self.part.policy.borrow().opens_by_name() {
            return answer;
        }
        let (done, opened) = oneshot::channel();
        let order = Order::Open { name: name.to_owned(), found, done };
        match self.part.orders.send(order).await {
            Ok(()) if opened.await.unwrap_or(false) => answer,
            _ => query.fail(Rcode::ServerFailure),
        }
    }
}

/// Puts a query to one server and returns its answer.
async fn ask(server: SocketAddr, query: &Query, transport: Transport) -> io::Result<Vec<u8>> {
    let mut id = [0; 2];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
    let bytes = query.with_id(id);
    if transport == Transport::Tcp {
        let mut stream = TcpStream::connect(server).await?;
        write_message(&mut stream, &bytes).await?;
        let answer = read_message(&mut stream, ANSWER_LEN_MAX).await?;
        return answer
            .filter(|answer| query.is_answered_by(answer, id))
            .ok_or_else(|| io::ErrorKind::InvalidData.into());
    }
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(&bytes).await?;
    let mut buffer = vec![0; ANSWER_LEN_MAX];
    loop {
        let len = socket.recv(&mut buffer).await?;
        if query.is_answered_by(&buffer[..len], id) {
            buffer.truncate(len);
            return Ok(buffer);
        }
    }
}

/// The servers a `resolv.conf` names. Scoped IPv6 addresses are left out: their scope is the name of an interface.
fn parse_resolv_conf(text: &str) -> Vec<SocketAddr> {
    let address = |line: &str| -> Option<SocketAddr> {
        let mut words = line.split_ascii_whitespace();
        (words.next() == Some("nameserver")).then_some(())?;
        Some(SocketAddr::new(words.next()?.parse().ok()?, 53))
    };
    text.lines().filter_map(address).take(SERVERS_MAX).collect()
}

#[cfg(test)]
mod tests;
