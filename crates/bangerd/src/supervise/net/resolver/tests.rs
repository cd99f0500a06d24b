use super::super::dns::{
    self,
    tests::{answer, query},
};
use super::{Resolver, bind_at, parse_resolv_conf, read_message, serve_with, write_message};
use crate::net::policy::Policy;
use banger_wire::daemon::NetMode;
use std::cell::RefCell;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use tokio::net::{TcpListener, TcpStream, UdpSocket};

const PUBLIC: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 34);
const LAN: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);
const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test);
}

/// Starts a resolver that asks these servers, and returns its address.
fn start(mode: NetMode, servers: Vec<SocketAddr>) -> SocketAddr {
    let (udp, tcp) = bind_at(ANY).unwrap();
    let address = udp.local_addr().unwrap();
    let policy = Rc::new(RefCell::new(Policy::new(mode, Vec::new())));
    serve_with(udp, tcp, Resolver { policy, servers: Box::new(move || servers.clone()) }).unwrap();
    address
}

/// A server that answers every query with `addresses`, by way of UDP and TCP, after some forgeries.
async fn upstream(addresses: &'static [Ipv4Addr]) -> SocketAddr {
    let socket = UdpSocket::bind(ANY).await.unwrap();
    let address = socket.local_addr().unwrap();
    let listener = TcpListener::bind(address).await.unwrap();
    tokio::task::spawn_local(async move {
        let mut buffer = [0; 1000];
        loop {
            let (len, peer) = socket.recv_from(&mut buffer).await.unwrap();
            let good = answer(&buffer[..len], addresses);
            let mut wrong_number = answer(&buffer[..len], &[Ipv4Addr::new(6, 6, 6, 6)]);
            wrong_number[0] ^= 1;
            let wrong_name = answer(&query("other.example", u16::from_be_bytes([buffer[0], buffer[1]])), &[]);
            for message in [&wrong_number[..], &wrong_name, b"junk", &good] {
                socket.send_to(message, peer).await.unwrap();
            }
        }
    });
    tokio::task::spawn_local(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let query = read_message(&mut stream, 1000).await.unwrap().unwrap();
            write_message(&mut stream, &answer(&query, addresses)).await.unwrap();
        }
    });
    address
}

async fn ask_udp(resolver: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let socket = UdpSocket::bind(ANY).await.unwrap();
    socket.send_to(bytes, resolver).await.unwrap();
    let mut buffer = [0; 1000];
    let (len, from) = socket.recv_from(&mut buffer).await.unwrap();
    assert_eq!(from, resolver);
    buffer[..len].to_vec()
}

async fn ask_tcp(resolver: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(resolver).await.unwrap();
    write_message(&mut stream, bytes).await.unwrap();
    read_message(&mut stream, 1000).await.unwrap().unwrap()
}

#[test]
fn queries_are_passed_on_and_forgeries_are_not() {
    run(async {
        let resolver = start(NetMode::Internet, vec![upstream(&[PUBLIC]).await]);
        let bytes = query("a.example", 4711);
        for given in [ask_udp(resolver, &bytes).await, ask_tcp(resolver, &bytes).await] {
            assert_eq!(given, answer(&bytes, &[PUBLIC]));
        }
    });
}

#[test]
fn names_that_lead_inside_do_not_exist() {
    run(async {
        let server = upstream(&[PUBLIC, LAN]).await;
        let bytes = query("rebinding.example", 1);
        let internet = start(NetMode::Internet, vec![server]);
        for given in [ask_udp(internet, &bytes).await, ask_tcp(internet, &bytes).await] {
            assert_eq!((dns::rcode(&given), dns::addresses(&given)), (3, Some(Vec::new())));
        }
        let full = start(NetMode::Full, vec![server]);
        assert_eq!(dns::addresses(&ask_udp(full, &bytes).await).unwrap().len(), 2);
    });
}

#[test]
fn names_of_inner_addresses_are_not_asked_for() {
    run(async {
        let resolver = start(NetMode::Internet, vec![upstream(&[PUBLIC]).await]);
        let given = ask_udp(resolver, &query("7.1.168.192.in-addr.arpa", 1)).await;
        assert_eq!(dns::rcode(&given), 3);
    });
}

#[test]
fn the_next_server_is_asked_when_one_is_gone() {
    run(async {
        let gone = UdpSocket::bind(ANY).await.unwrap().local_addr().unwrap();
        let resolver = start(NetMode::Internet, vec![gone, upstream(&[PUBLIC]).await]);
        let bytes = query("a.example", 2);
        assert_eq!(ask_udp(resolver, &bytes).await, answer(&bytes, &[PUBLIC]));
    });
}

#[test]
fn without_a_server_failure_comes_at_once() {
    run(async {
        let resolver = start(NetMode::Internet, Vec::new());
        let begun = std::time::Instant::now();
        let given = ask_udp(resolver, &query("a.example", 3)).await;
        assert_eq!(dns::rcode(&given), 2);
        assert!(begun.elapsed() < super::SERVER_WAIT);
    });
}

#[test]
fn servers_are_read_from_the_hosts_file() {
    let text = "# nameserver 9.9.9.9\nsearch lan\nnameserver 10.0.0.1\n nameserver\t::1 \nnameserver fe80::1%eth0\n\
                nameserver x\nnameserver 1.1.1.1\nnameserver 1.1.1.2\n";
    let servers = parse_resolv_conf(text).iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(servers, ["10.0.0.1:53", "[::1]:53", "1.1.1.1:53"]);
    assert!(parse_resolv_conf("").is_empty());
}
