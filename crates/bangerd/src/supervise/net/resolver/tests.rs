use super::super::Order;
use super::super::dns::{
    self,
    tests::{answer, query},
};
use super::super::record::Record;
use super::{Part, Resolver, bind_at, parse_resolv_conf, read_message, serve_with, write_message};
use crate::net::host::Host;
use crate::net::policy::Policy;
use banger_wire::daemon::NetMode;
use banger_wire::net::NetRules;
use std::cell::RefCell;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::mpsc;

const PUBLIC: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 34);
const LAN: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);
const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test);
}

/// Starts a resolver that asks these servers, and returns its address.
fn start(mode: NetMode, servers: Vec<SocketAddr>) -> SocketAddr {
    start_with(Policy::new(mode, NetRules::default(), Host::default()), servers, true).0
}

/// The same with a policy. What is to be opened is written down, and is open when `opens`.
fn start_with(
    policy: Policy,
    servers: Vec<SocketAddr>,
    opens: bool,
) -> (SocketAddr, Part, Rc<RefCell<Vec<String>>>) {
    // A port that is free for UDP may be taken for TCP.
    let (udp, tcp) = (0..20).find_map(|_| bind_at(ANY).ok()).unwrap();
    let address = udp.local_addr().unwrap();
    let (orders, mut queue) = mpsc::channel(1);
    let part = Part {
        policy: Rc::new(RefCell::new(policy)),
        record: Rc::new(RefCell::new(Record::default())),
        orders,
        names: None,
    };
    let opened = Rc::new(RefCell::new(Vec::new()));
    let written = opened.clone();
    tokio::task::spawn_local(async move {
        while let Some(order) = queue.recv().await {
            let Order::Open { name, found, done } = order else { continue };
            written
                .borrow_mut()
                .extend(found.iter().map(|found| format!("{name} {} {}", found.address, found.ttl)));
            let _ = done.send(opens);
        }
    });
    serve_with(udp, tcp, Resolver { part: part.clone(), servers: Box::new(move || servers.clone()) })
        .unwrap();
    (address, part, opened)
}

fn allowing(name: &str) -> Policy {
    let rules = NetRules { allow: vec![name.parse().unwrap()], deny: Vec::new() };
    Policy::new(NetMode::Allow, rules, Host::default())
}

#[test]
fn only_allowed_names_are_answered_and_open_before_that() {
    run(async {
        let server = upstream(&[PUBLIC]).await;
        let (resolver, part, opened) = start_with(allowing("a.example:443"), vec![server], true);
        let bytes = query("A.example", 5);
        assert_eq!(ask_udp(resolver, &bytes).await, answer(&bytes, &[PUBLIC]));
        assert_eq!(*opened.borrow(), ["a.example 93.184.216.34 60"]);
        for name in ["b.example", "x.a.example", "34.216.184.93.in-addr.arpa"] {
            assert_eq!(dns::rcode(&ask_tcp(resolver, &query(name, 6)).await), 3, "{name}");
        }
        let denials = part.record.borrow().denials(&[], 0);
        let names: Vec<_> = denials.iter().map(|denial| denial.name.as_deref().unwrap()).collect();
        assert_eq!(names, ["34.216.184.93.in-addr.arpa", "x.a.example", "b.example"]);
        assert_eq!(opened.borrow().len(), 1);
        let (resolver, _, _) = start_with(allowing("a.example"), vec![server], false);
        assert_eq!(dns::rcode(&ask_udp(resolver, &bytes).await), 2, "not open, so not told");
    });
}

#[test]
fn an_allowed_name_that_leads_inside_does_not_exist() {
    run(async {
        let server = upstream(&[PUBLIC, LAN]).await;
        let (resolver, part, opened) = start_with(allowing("a.example"), vec![server], true);
        assert_eq!(dns::rcode(&ask_udp(resolver, &query("a.example", 5)).await), 3);
        assert!(opened.borrow().is_empty());
        let denials = part.record.borrow().denials(&[], 0);
        assert_eq!((denials[0].name.as_deref(), denials[0].address), (Some("a.example"), Some(LAN.into())));
    });
}

/// A server that answers every query with `addresses`, by way of UDP and TCP, after some forgeries.
async fn upstream(addresses: &'static [Ipv4Addr]) -> SocketAddr {
    let (udp, tcp) = (0..20).find_map(|_| bind_at(ANY).ok()).unwrap();
    let (socket, listener) = (UdpSocket::from_std(udp).unwrap(), TcpListener::from_std(tcp).unwrap());
    let address = socket.local_addr().unwrap();
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
