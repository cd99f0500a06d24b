use super::{CONNECTIONS_MAX, Carrier, Member, Names, Peers, bind, is_up, listen, seqpacket};
use crate::net::member::tests::packet;
use crate::net::member::{PACKET_LEN_MAX, address};
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, send, socketpair,
    sockopt,
};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A network's directory, in which tests are members.
struct Network(tempfile::TempDir);

/// Nothing that may not come has come after this time.
const QUIET: Duration = Duration::from_millis(200);

impl Network {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn peers(&self, own: u16) -> Peers {
        std::fs::create_dir_all(self.0.path().join(own.to_string())).unwrap();
        let dir = std::fs::File::open(self.0.path()).unwrap();
        Peers { dir: Arc::new(dir.into()), own }
    }

    /// Listens as a member, in the place of whoever did.
    fn listen(&self, own: u16) -> OwnedFd {
        let peers = self.peers(own);
        let place = peers.place(own);
        let _ = std::fs::remove_file(&place);
        let listener = seqpacket().unwrap();
        bind(&listener, &SocketAddrUnix::new(&*place).unwrap()).unwrap();
        listen(&listener, 64).unwrap();
        listener
    }

    /// Starts a member; returns what its guest has in the place of an interface.
    fn start(&self, own: u16) -> Guest {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (tun, guest) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let member = Member { tun, listener: self.listen(own), peers: self.peers(own), is_alone: true };
        std::thread::spawn(move || Carrier::new(member).run());
        Guest(guest)
    }

    /// Connects to a member as anybody who could.
    fn connect(&self, to: u16) -> OwnedFd {
        let (socket, peers) = (seqpacket().unwrap(), self.peers(to));
        connect(&socket, &SocketAddrUnix::new(peers.place(to)).unwrap()).unwrap();
        socket
    }
}

struct Guest(OwnedFd);

impl Guest {
    fn sends(&self, packet: &[u8]) {
        send(&self.0, packet, SendFlags::empty()).unwrap();
    }

    /// The next packet within this time.
    fn hears(&self, time: Duration) -> Option<Vec<u8>> {
        received(&self.0, time)
    }
}

fn received(socket: &OwnedFd, time: Duration) -> Option<Vec<u8>> {
    use rustix::event::{PollFd, PollFlags, poll};
    let time = rustix::time::Timespec { tv_sec: 0, tv_nsec: i64::from(time.subsec_nanos()) };
    poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&time)).unwrap();
    let mut buffer = vec![0; 4096];
    let (len, _) = recv(socket, buffer.as_mut_slice(), rustix::net::RecvFlags::empty()).ok()?;
    buffer.truncate(len);
    Some(buffer)
}

/// Sends until it arrives: who has just started may not have been there for the first.
fn arrives(from: &Guest, to: &Guest, packet: &[u8]) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        from.sends(packet);
        match to.hears(QUIET) {
            Some(heard) => return assert_eq!(heard, packet),
            None => assert!(Instant::now() < deadline),
        }
    }
}

#[test]
fn packets_go_to_whom_they_are_for_and_come_back() {
    let network = Network::new();
    let (one, two, three) = (network.start(1), network.start(2), network.start(3));
    let there = packet(address(1), address(2), 100);
    let back = packet(address(2), address(1), PACKET_LEN_MAX);
    for _ in 0..3 {
        arrives(&one, &two, &there);
        arrives(&two, &one, &back);
    }
    assert_eq!(three.hears(QUIET), None);
    // Each is a message, however many come at once.
    let many: Vec<Vec<u8>> = (100..140).map(|len| packet(address(3), address(2), len)).collect();
    many.iter().for_each(|packet| three.sends(packet));
    for packet in &many {
        assert_eq!(two.hears(Duration::from_millis(900)).as_ref(), Some(packet));
    }
}

#[test]
fn a_member_that_starts_again_is_reached_again() {
    let network = Network::new();
    let (one, two) = (network.start(1), network.start(2));
    let there = packet(address(1), address(2), 100);
    arrives(&one, &two, &there);
    // Its interface goes, so it ends.
    drop(two);
    let deadline = Instant::now() + Duration::from_secs(20);
    let peers = network.peers(2);
    while is_up(&peers.place(2)) {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    one.sends(&there);
    let two = network.start(2);
    arrives(&one, &two, &there);
}

#[test]
fn a_guest_sends_as_itself_to_members_and_nothing_else() {
    let network = Network::new();
    let (one, two) = (network.start(1), network.start(2));
    let good = packet(address(1), address(2), 100);
    arrives(&one, &two, &good);
    let outside = Ipv4Addr::new(10, 231, 7, 2);
    for bad in [
        packet(address(3), address(2), 100),
        packet(outside, address(2), 100),
        packet(address(1), outside, 100),
        packet(address(1), Ipv4Addr::new(10, 231, 255, 255), 100),
        packet(address(1), Ipv4Addr::BROADCAST, 100),
        packet(address(1), address(2), PACKET_LEN_MAX + 1),
        [&good[..], b"more"].concat(),
        good[..30].to_vec(),
    ] {
        one.sends(&bad);
        assert_eq!(two.hears(QUIET), None, "{bad:?}");
    }
    // It is still there, and what it has to say still arrives.
    one.sends(&good);
    assert_eq!(two.hears(Duration::from_millis(900)), Some(good));
}

#[test]
fn a_peer_says_only_what_it_may() {
    let network = Network::new();
    let two = network.start(2);
    let good = packet(address(1), address(2), 100);
    let long = vec![0; 100_000];
    for bad in [
        // From another one than before, for another one, from nobody, too long.
        packet(address(3), address(2), 100),
        packet(address(1), address(3), 100),
        packet(address(2), address(2), 100),
        packet(Ipv4Addr::new(10, 231, 7, 1), address(2), 100),
        packet(address(1), address(2), PACKET_LEN_MAX + 1),
        long,
    ] {
        let peer = network.connect(2);
        send(&peer, &good, SendFlags::NOSIGNAL).unwrap();
        assert_eq!(two.hears(Duration::from_millis(900)), Some(good.clone()));
        sockopt::set_socket_send_buffer_size(&peer, 1 << 20).unwrap();
        send(&peer, &bad, SendFlags::NOSIGNAL).unwrap();
        assert_eq!(two.hears(QUIET), None);
        // Who says such a thing is not heard any more.
        assert!(send(&peer, &good, SendFlags::NOSIGNAL).is_err());
        assert_eq!(two.hears(QUIET), None);
    }
}

#[test]
fn connections_are_bounded_and_the_last_ones_count() {
    let network = Network::new();
    let two = network.start(2);
    let peers: Vec<OwnedFd> = (0..CONNECTIONS_MAX + 10)
        .map(|number| {
            let peer = network.connect(2);
            let packet = packet(address(number as u16 + 3), address(2), 40);
            send(&peer, &packet, SendFlags::NOSIGNAL).unwrap();
            assert_eq!(two.hears(Duration::from_millis(900)), Some(packet));
            peer
        })
        .collect();
    let last = peers.len() - 1;
    let packet = |number: usize| packet(address(number as u16 + 3), address(2), 40);
    assert!(send(&peers[0], &packet(0), SendFlags::NOSIGNAL).is_err());
    send(&peers[last], &packet(last), SendFlags::NOSIGNAL).unwrap();
    assert_eq!(two.hears(Duration::from_millis(900)), Some(packet(last)));
}

#[test]
fn a_peer_that_takes_nothing_holds_up_nobody() {
    let network = Network::new();
    let (one, two) = (network.start(1), network.start(2));
    // Takes no connection and reads nothing.
    let _three = network.listen(3);
    let deadline = Instant::now() + Duration::from_secs(20);
    for _ in 0..2000 {
        let lost = packet(address(1), address(3), PACKET_LEN_MAX);
        while send(&one.0, &lost, SendFlags::empty()).is_err() {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
    }
    arrives(&one, &two, &packet(address(1), address(2), 100));
}

#[test]
fn names_are_those_of_members_that_are_up() {
    let network = Network::new();
    let names = Names(network.peers(1));
    for (name, number) in [("one", "1"), ("two", "2"), ("three", "3"), ("liar", "../2"), ("none", "0")] {
        std::os::unix::fs::symlink(number, network.0.path().join(format!("{name}.vm"))).unwrap();
    }
    let two = network.listen(2);
    let three = network.listen(3);
    drop(three);
    for (name, number) in
        [("one", Some(1)), ("two", Some(2)), ("two.vm", Some(2)), ("three", None), ("three.vm", None)]
    {
        assert_eq!(names.find(name), number.map(address), "{name}");
    }
    for name in ["", "four", "two.vm.vm", "a.two", "../two", "2", "liar", "none", "TWO"] {
        assert_eq!(names.find(name), None, "{name}");
    }
    // The question left no trace.
    assert!(rustix::net::accept(&two).is_err());
}
