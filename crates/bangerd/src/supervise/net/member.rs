//! The supervisor's part of a network of vms: it carries packets between its guest and the supervisors of the others.
//!
//! ```text
//! networks/NAME/   1/s   2/s   …        each member's directory, with the socket it listens at
//!                  web.vm -> 1   …      names, links that the daemon makes
//! ```
//!
//! Nobody is in the middle, and nobody has to be told who comes and goes: a packet for a member is sent to the socket in
//! the directory of its number, over a connection made when there is the first. Connections carry packets one way, each
//! as one message. Whoever takes one checks that it is from the member that the connection's first one was from, and for
//! itself; whoever sends checks that it is from itself. What a peer does not take at once is lost, as on any network.
//!
//! The directory is reached by a descriptor from before the private root, so that neither the VMM nor anything else that
//! is started finds a way to it.

use super::thread::NetThread;
use crate::net::member::{
    MemberPlan, NAME_END, NET, PACKET_LEN_MAX, RANGE, RANGE_LEN, SOCKET, address, ends, is_number,
};
use crate::net::{GUEST, TAP};
use anyhow::Context as _;
use banger_sys::namespace;
use banger_sys::netif;
use banger_sys::netlink::{NewRoute, add_route};
use banger_sys::process::peer_uid;
use banger_wire::names::VmName;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect,
    listen, recv, send, socket_with,
};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use tokio::sync::oneshot;

/// Connections of each direction. The one unused for longest makes room for another, so a member can have more peers than
/// this, and only loses time with them.
const CONNECTIONS_MAX: usize = 128;
/// Connections that wait to be taken.
const BACKLOG: i32 = 64;
/// Packets of one descriptor that are carried before the others have their turn.
const BURST: usize = 64;
/// Beyond what a packet may have, so that a longer one shows.
const BUFFER_LEN: usize = 2 * PACKET_LEN_MAX;

/// Opens a network's directory, which has to be done before the private root hides it.
pub(crate) fn open(plan: &MemberPlan) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(&plan.dir, flags, Mode::empty())?)
}

/// The way to one's network that is there, but leads nowhere yet.
pub(super) struct Member {
    tun: OwnedFd,
    listener: OwnedFd,
    peers: Peers,
    is_alone: bool,
}

impl Member {
    /// Makes the interface and listens. `is_alone` when all members are one user's, whom nobody else may send for;
    /// otherwise each has a user of its own.
    pub(super) async fn create(
        plan: &MemberPlan,
        dir: OwnedFd,
        is_alone: bool,
        thread: &NetThread,
    ) -> anyhow::Result<Self> {
        let own = plan.address();
        let tun = thread.run(move || create_interface(own)).await??;
        let peers = Peers { dir: Arc::new(dir), own: plan.number };
        let place = peers.place(plan.number);
        let label = || format!("listen at member {} of `{}`", plan.number, plan.dir.display());
        // CRASH: stays; nobody listens there then, and the vm's next start or its removal removes it.
        let _ = std::fs::remove_file(&place);
        let listener = seqpacket().with_context(label)?;
        bind(&listener, &SocketAddrUnix::new(&*place)?).with_context(label)?;
        if !is_alone {
            std::fs::set_permissions(&place, PermissionsExt::from_mode(0o666)).with_context(label)?;
        }
        listen(&listener, BACKLOG).with_context(label)?;
        Ok(Self { tun, listener, peers, is_alone })
    }

    /// Who else there is.
    pub(super) fn names(&self) -> Names {
        Names(self.peers.clone())
    }

    /// Carries packets from now on, in a thread of its own: a flood of them holds up nothing else. Returns why it came to
    /// an end.
    pub(super) async fn carry(self) -> anyhow::Error {
        let (tell, told) = oneshot::channel();
        let carrier = Carrier::new(self);
        let thread = std::thread::Builder::new().name("member".to_owned());
        if let Err(error) = thread.spawn(move || drop(tell.send(carrier.run()))) {
            return anyhow::Error::new(error).context("start a thread");
        }
        match told.await {
            Ok(error) => anyhow::Error::new(error).context("carry packets"),
            Err(_) => anyhow::anyhow!("the thread that carries packets has ended"),
        }
    }
}

/// In the vm's namespace: the interface to the others, and routes there and back.
fn create_interface(own: Ipv4Addr) -> anyhow::Result<OwnedFd> {
    let label = || format!("make `{NET}`");
    let tun = namespace::open_tun(NET).with_context(label)?;
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{NET}/disable_ipv6"), "1");
    let _ = std::fs::write(format!("/proc/sys/net/ipv4/conf/{NET}/rp_filter"), "1");
    netif::set_up(NET, true).with_context(label)?;
    let (net, tap) = (netif::index(NET).with_context(label)?, netif::index(TAP).with_context(label)?);
    let there = NewRoute { to: RANGE, prefix_len: RANGE_LEN, gateway: None, source: None, interface: net };
    // By way of the guest's own address, so that the kernel looks for one neighbour.
    let back = NewRoute { to: own, prefix_len: 32, gateway: Some(GUEST), source: None, interface: tap };
    add_route(&there).with_context(label)?;
    add_route(&back).with_context(label)?;
    Ok(tun)
}

fn seqpacket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// The directory of a network.
#[derive(Clone)]
struct Peers {
    dir: Arc<OwnedFd>,
    own: u16,
}

impl Peers {
    /// The path of something in the directory, in this process, whatever its root is.
    fn path(&self, name: &str) -> String {
        format!("/proc/self/fd/{}/{name}", self.dir.as_raw_fd())
    }

    /// Where a member listens.
    fn place(&self, number: u16) -> String {
        self.path(&format!("{number}/{SOCKET}"))
    }
}

/// The names of a network's members.
pub(super) struct Names(Peers);

impl Names {
    /// Returns the address of the member of this name, with or without the final part, if it is up.
    pub(super) fn find(&self, name: &str) -> Option<Ipv4Addr> {
        let name: VmName = name.strip_suffix(NAME_END).unwrap_or(name).parse().ok()?;
        let link = self.0.path(&format!("{name}{NAME_END}"));
        let number = std::fs::read_link(link).ok()?.to_str()?.parse().ok()?;
        let is_there = is_number(number) && (number == self.0.own || is_up(&self.0.place(number)));
        is_there.then(|| address(number))
    }
}

/// Whether somebody listens there, who is not bothered by the question: sockets of different kinds don't connect, and
/// that is only said where there is one.
fn is_up(place: &str) -> bool {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let Ok(address) = SocketAddrUnix::new(place) else { return false };
    socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)
        .is_ok_and(|socket| connect(&socket, &address) == Err(Errno::PROTOTYPE))
}

/// A connection.
struct Connection {
    socket: OwnedFd,
    /// Whom it leads to or comes from; none before the first packet has come.
    peer: Option<u16>,
    /// When it was last of use.
    used: u64,
}

/// What carries packets.
struct Carrier {
    tun: OwnedFd,
    listener: OwnedFd,
    peers: Peers,
    is_alone: bool,
    /// Connections that packets are sent on, and heard on.
    sent: Vec<Connection>,
    heard: Vec<Connection>,
    /// Counts what has been carried.
    clock: u64,
}

impl Carrier {
    fn new(Member { tun, listener, peers, is_alone }: Member) -> Self {
        Self { tun, listener, peers, is_alone, sent: Vec::new(), heard: Vec::new(), clock: 0 }
    }

    /// Goes on until there is no interface any more.
    fn run(mut self) -> io::Error {
        let mut buffer = vec![0; BUFFER_LEN];
        loop {
            let (sends, takes, ready) = match self.wait() {
                Ok(ready) => ready,
                Err(error) => return error,
            };
            if sends && let Err(error) = self.send_burst(&mut buffer) {
                return error;
            }
            // Before others are taken, which may make room for themselves.
            self.hear(&ready, &mut buffer);
            if takes {
                self.take();
            }
        }
    }

    /// Waits until the guest has sent something, somebody connects, or one of those who have says something.
    fn wait(&self) -> io::Result<(bool, bool, Vec<bool>)> {
        let own = [&self.tun, &self.listener].into_iter();
        let fds = own.chain(self.heard.iter().map(|of| &of.socket));
        let mut fds: Vec<PollFd<'_>> = fds.map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let (sends, takes) = (ready.next() == Some(true), ready.next() == Some(true));
        Ok((sends, takes, ready.collect()))
    }

    /// Carries what the guest has sent.
    fn send_burst(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        for _ in 0..BURST {
            let len = match rustix::io::read(&self.tun, &mut *buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => len,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            // The filter lets nothing else through, and is asked by nobody whether it does.
            if let Some((from, to)) = ends(&buffer[..len])
                && from == self.peers.own
            {
                self.send(to, &buffer[..len]);
            }
        }
        Ok(())
    }

    /// Sends a packet to a member; one that is not there, or does not take it, does not get it.
    fn send(&mut self, to: u16, packet: &[u8]) {
        self.clock += 1;
        if let Some(at) = self.sent.iter().position(|of| of.peer == Some(to)) {
            self.sent[at].used = self.clock;
            match send(&self.sent[at].socket, packet, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                // It may have ended and be there again.
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => drop(self.sent.swap_remove(at)),
                Ok(_) | Err(_) => return,
            }
        }
        let Ok(socket) = self.connect(to) else { return };
        let _ = send(&socket, packet, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
        add(&mut self.sent, Connection { socket, peer: Some(to), used: self.clock });
    }

    fn connect(&self, to: u16) -> io::Result<OwnedFd> {
        let socket = seqpacket()?;
        connect(&socket, &SocketAddrUnix::new(self.peers.place(to))?)?;
        Ok(socket)
    }

    /// Takes everybody who connects and may.
    fn take(&mut self) {
        for _ in 0..BURST {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            // Out of descriptors: those who use one least give theirs.
            let socket = match accept_with(&self.listener, flags) {
                Ok(socket) => socket,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) => {
                    return drop_oldest(&mut self.heard);
                }
                Err(_) => return,
            };
            let owner = rustix::process::getuid().as_raw();
            if self.is_alone && !peer_uid(&socket).is_ok_and(|uid| uid == owner) {
                continue;
            }
            self.clock += 1;
            add(&mut self.heard, Connection { socket, peer: None, used: self.clock });
        }
    }

    /// Carries what those have said who are `ready`, and forgets those who have gone or say what they may not.
    fn hear(&mut self, ready: &[bool], buffer: &mut [u8]) {
        let Self { tun, peers, heard, clock, .. } = self;
        let mut at = 0;
        heard.retain_mut(|connection| {
            let is_ready = ready.get(at).copied().unwrap_or(false);
            at += 1;
            !is_ready || {
                *clock += 1;
                connection.used = *clock;
                hear_from(connection, tun, peers.own, buffer)
            }
        });
    }
}

/// Whether there is more to expect of a peer.
fn hear_from(connection: &mut Connection, tun: &OwnedFd, own: u16, buffer: &mut [u8]) -> bool {
    for _ in 0..BURST {
        let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
        let len = match recv(&connection.socket, &mut *buffer, flags) {
            Ok((_, 0)) => return false,
            Ok((_, len)) => len,
            Err(Errno::AGAIN | Errno::INTR) => return true,
            Err(_) => return false,
        };
        let packet = buffer.get(..len).unwrap_or_default();
        match ends(packet) {
            Some((from, to)) if to == own && connection.peer.is_none_or(|peer| peer == from) => {
                connection.peer = Some(from);
                // The guest's queue is full: lost, as on any network.
                let _ = rustix::io::write(tun, packet);
            }
            // Its supervisor sends nothing of this kind, so this is none.
            _ => return false,
        }
    }
    true
}

/// Adds a connection, in the place of the one unused for longest where there is no room.
fn add(connections: &mut Vec<Connection>, connection: Connection) {
    if connections.len() >= CONNECTIONS_MAX {
        drop_oldest(connections);
    }
    connections.push(connection);
}

fn drop_oldest(connections: &mut Vec<Connection>) {
    let oldest = (0..connections.len()).min_by_key(|at| connections[*at].used);
    if let Some(at) = oldest {
        drop(connections.swap_remove(at));
    }
}

#[cfg(test)]
mod tests;
