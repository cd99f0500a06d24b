//! A vm's ports on the host: its address, what the agent reports, and a listener for each port.
//!
//! ```text
//! open    claim an address, listen at what is published        before the VMM starts, or the vm does not
//! serve   Listeners session: the guest's ports ── reconcile ──> listeners come and go
//!         accept ── whose is it? ── permit ── forward           owner and root; [`forward`]
//! ```
//!
//! All of it is in the supervisor: listeners, connections and address end with the vm, and a daemon that is killed
//! changes nothing. The supervisor is in the host's network, and connections go by the agent's channel, so that neither
//! the guest's network nor a server in it has to work.

mod forward;

use super::link::Link;
use super::vm::Shared;
use crate::ports::{self, PortsPlan};
use anyhow::{Context as _, bail};
use banger_sys::sock_diag::SockDiag;
use banger_wire::frame::{Frame, Kind};
use banger_wire::guest::SessionKind;
use banger_wire::ports::{
    CLAIM_PORT, FORWARDS_MAX, Forward, LISTENERS_MAX, Listener, Listeners, PROCESS_LEN_MAX, Publish, VmPorts,
};
use banger_wire::vm::Phase;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// Connections that are carried at once, each a session with the agent. More wait to be accepted.
const CONNECTIONS_MAX: usize = 256;
/// Connections that wait for that, at each port.
const BACKLOG: u32 = 4096;
/// The wait after a connection could not be accepted, for want of descriptors for example, and before a guest that broke
/// the conversation is asked again.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// How often a port that is taken on the host is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// A vm's place on the host.
pub(crate) struct Ports {
    plan: PortsPlan,
    /// Who may come in; none where nobody can be told apart.
    gate: Option<Rc<Gate>>,
    /// Listens where nobody is answered: that is what claims the address.
    claim: Option<TcpListener>,
    published: Vec<(Publish, TcpListener)>,
    problem: Option<String>,
}

/// Decides who may connect.
struct Gate {
    diag: SockDiag,
    owner: u32,
}

impl Gate {
    /// The owner and root. A socket that was closed already could have been anybody's.
    fn admits(&self, stream: &TcpStream) -> bool {
        let (Ok(own), Ok(peer)) = (stream.local_addr(), stream.peer_addr()) else { return false };
        let uid = self.diag.owner(peer, own).ok().flatten();
        uid.is_some_and(|uid| uid == self.owner || uid == 0)
    }
}

impl Ports {
    /// Finds a free address and listens at what is published. `diag` was opened before this process left the host's user
    /// namespace: in its own one, everybody else is nobody.
    ///
    /// # Errors
    /// When something can't be published. Without an address, or a kernel that tells users apart, nothing opens by itself.
    pub(crate) async fn open(plan: &PortsPlan, diag: Option<SockDiag>) -> anyhow::Result<Self> {
        let claim = ports::addresses(plan.range, plan.first)
            .find_map(|address| listen(SocketAddr::new(address.into(), CLAIM_PORT)).ok());
        let mut ports = Self { plan: plan.clone(), gate: None, claim, published: Vec::new(), problem: None };
        match (&ports.claim, diag) {
            (None, _) => ports.problem = Some(format!("no free address was found in {}", plan.range)),
            (Some(claim), Some(diag)) if tells_users(&diag, claim.local_addr()?).await => {
                ports.gate = Some(Rc::new(Gate { diag, owner: plan.owner }));
            }
            _ => {
                let text =
                    "this kernel does not tell whose a connection is; load it with `sudo modprobe tcp_diag`";
                ports.problem = Some(text.to_owned());
            }
        }
        for publish in &plan.publish {
            let at = SocketAddr::new(publish.address, publish.host_port);
            if publish.address.is_loopback() && ports.gate.is_none() {
                bail!("publish {at}: {}", ports.problem.unwrap_or_default());
            }
            let listener =
                listen(at).with_context(|| format!("publish port {} at {at}", publish.guest_port))?;
            ports.published.push((*publish, listener));
        }
        Ok(ports)
    }

    /// The vm's own address.
    pub(crate) fn address(&self) -> Option<Ipv4Addr> {
        match self.claim.as_ref()?.local_addr().ok()?.ip() {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        }
    }

    /// Opens and closes ports until the vm ends.
    pub(crate) async fn serve(self, shared: Rc<Shared>) {
        let door =
            Rc::new(Door { shared: shared.clone(), permits: Arc::new(Semaphore::new(CONNECTIONS_MAX)) });
        let address = self.address();
        let mut table = Table {
            unprivileged_from: self.plan.unprivileged_from,
            address: address.filter(|_| self.gate.is_some()),
            gate: self.gate.clone(),
            door: door.clone(),
            open: BTreeMap::new(),
            blocked: BTreeMap::new(),
        };
        let mut published = Vec::new();
        for (publish, listener) in self.published {
            let gate = self.gate.clone().filter(|_| publish.address.is_loopback());
            let loopback = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), publish.guest_port);
            let target = Rc::new(Cell::new(loopback));
            tokio::task::spawn_local(accept(listener, gate, target.clone(), door.clone()));
            published.push((publish, target));
        }
        let tell = |listeners: Option<Vec<Listener>>, table: &Table| {
            let asked_for = published.iter().map(|(publish, _)| Forward {
                guest_port: publish.guest_port,
                address: publish.address,
                port: publish.host_port,
                published: true,
                problem: None,
            });
            let forwards = table.forwards().into_iter().chain(asked_for).collect();
            let problem = self.problem.clone();
            *shared.ports.borrow_mut() = VmPorts { address, listeners, forwards, problem };
        };
        loop {
            tell(None, &table);
            let Some(link) = ready(&shared).await else { return };
            let Ok(mut session) = link.open(SessionKind::Listeners).await else {
                tokio::time::sleep(ASK_AGAIN).await;
                continue;
            };
            let mut listeners: Option<Vec<Listener>> = None;
            loop {
                let again = tokio::time::sleep(TRY_AGAIN);
                let frame = tokio::select! {
                    frame = session.next() => frame,
                    () = again, if !table.blocked.is_empty() => {
                        table.reconcile(listeners.as_deref().unwrap_or_default());
                        tell(listeners.clone(), &table);
                        continue;
                    }
                };
                let Some(frame) = frame.filter(|frame| frame.kind != Kind::Close) else { break };
                let Some(reported) = parse(&frame) else { break };
                let targets = ports::targets(&reported);
                for (publish, target) in &published {
                    if let Some(found) = targets.get(&publish.guest_port) {
                        target.set(*found);
                    }
                }
                table.reconcile(&reported);
                tell(Some(reported.clone()), &table);
                listeners = Some(reported);
            }
            link.send_later(Frame::close(session.id));
            drop(session);
            table.reconcile(&[]);
            tell(None, &table);
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }
}

/// Asks of a connection of this process's own, which also has the kernel load what is missing.
async fn tells_users(diag: &SockDiag, listener: SocketAddr) -> bool {
    let Ok(stream) = TcpStream::connect(listener).await else { return false };
    let (Ok(own), Ok(peer)) = (stream.local_addr(), stream.peer_addr()) else { return false };
    diag.owner(own, peer).is_ok_and(|owner| owner.is_some())
}

/// Waits for a guest that sessions can be opened with.
async fn ready(shared: &Shared) -> Option<Link> {
    let mut status = shared.status.subscribe();
    let is_ready = |phase: &Phase| matches!(phase, Phase::Ready | Phase::InitReady);
    status.wait_for(|status| is_ready(&status.phase) && shared.link.borrow().is_some()).await.ok()?;
    shared.link.borrow().clone()
}

/// Reads what a guest reports, as far as it is bounded and sound.
fn parse(frame: &Frame) -> Option<Vec<Listener>> {
    if frame.kind != Kind::Message {
        return None;
    }
    let Listeners { mut sockets } = frame.parse().ok()?;
    sockets.truncate(LISTENERS_MAX);
    sockets.retain(|listener| listener.port != 0);
    for listener in &mut sockets {
        let short = |name: &String| name.chars().take(PROCESS_LEN_MAX).collect();
        listener.process = listener.process.as_ref().map(short);
    }
    Some(sockets)
}

/// Listens at an address that nobody else listens at.
fn listen(at: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if at.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // Connections that have ended do not keep the port; what listens does.
    socket.set_reuseaddr(true)?;
    socket.bind(at)?;
    socket.listen(BACKLOG)
}

/// What all connections go through.
struct Door {
    shared: Rc<Shared>,
    permits: Arc<Semaphore>,
}

/// Accepts connections and carries them on. Those under way stay when this is ended.
async fn accept(listener: TcpListener, gate: Option<Rc<Gate>>, target: Rc<Cell<SocketAddr>>, door: Rc<Door>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_AGAIN).await;
            continue;
        };
        // At once, while its owner still has it.
        if !gate.as_ref().is_none_or(|gate| gate.admits(&stream)) {
            forward::reset(stream);
            continue;
        }
        let Ok(permit) = door.permits.clone().acquire_owned().await else { return };
        let (link, target) = (door.shared.link.borrow().clone(), target.get());
        let Some(link) = link else {
            forward::reset(stream);
            continue;
        };
        let shared = door.shared.clone();
        tokio::task::spawn_local(async move {
            let _used = shared.use_it();
            forward::carry(stream, &link, target).await;
            drop(permit);
        });
    }
}

/// A port that is open.
struct Open {
    port: u16,
    target: Rc<Cell<SocketAddr>>,
    accepting: JoinHandle<()>,
}

/// The ports that open by themselves, by their numbers in the guest.
struct Table {
    unprivileged_from: u16,
    address: Option<Ipv4Addr>,
    gate: Option<Rc<Gate>>,
    door: Rc<Door>,
    open: BTreeMap<u16, Open>,
    /// What could not be opened, and why.
    blocked: BTreeMap<u16, String>,
}

impl Table {
    /// Opens what listens and is not open, and closes what does not listen any more.
    fn reconcile(&mut self, listeners: &[Listener]) {
        let Some(address) = self.address else { return };
        let targets = ports::targets(listeners);
        self.open.retain(|guest, open| {
            let target = targets.get(guest);
            match target {
                Some(target) => open.target.set(*target),
                // The listener goes with the task.
                None => open.accepting.abort(),
            }
            target.is_some()
        });
        self.blocked.clear();
        // Those that keep their number come first, so that no other one takes it.
        let (own, moved): (Vec<_>, Vec<_>) =
            targets.into_iter().partition(|(guest, _)| *guest >= self.unprivileged_from);
        for (guest, target) in own.into_iter().chain(moved) {
            if self.open.contains_key(&guest) {
                continue;
            }
            if self.open.len() >= FORWARDS_MAX {
                self.blocked.insert(guest, format!("{FORWARDS_MAX} ports of this vm are open already"));
                continue;
            }
            match self.open_one(address, guest, target) {
                Ok(open) => drop(self.open.insert(guest, open)),
                Err(problem) => drop(self.blocked.insert(guest, problem)),
            }
        }
    }

    fn open_one(&self, address: Ipv4Addr, guest: u16, target: SocketAddr) -> Result<Open, String> {
        let mut problem = "no port of the host stands for it".to_owned();
        for port in ports::host_ports(guest, self.unprivileged_from) {
            let at = SocketAddr::new(address.into(), port);
            match listen(at) {
                Ok(listener) => {
                    let target = Rc::new(Cell::new(target));
                    let accepting = accept(listener, self.gate.clone(), target.clone(), self.door.clone());
                    return Ok(Open { port, target, accepting: tokio::task::spawn_local(accepting) });
                }
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                    problem = format!("{at} is taken by another program on the host");
                }
                Err(error) => problem = format!("{at}: {error}"),
            }
        }
        Err(problem)
    }

    fn forwards(&self) -> Vec<Forward> {
        let Some(address) = self.address else { return Vec::new() };
        let forward = |guest_port: u16, port: u16, problem: Option<String>| Forward {
            guest_port,
            address: address.into(),
            port,
            published: false,
            problem,
        };
        let open = self.open.iter().map(|(guest, open)| forward(*guest, open.port, None));
        let blocked =
            self.blocked.iter().map(|(guest, problem)| forward(*guest, *guest, Some(problem.clone())));
        open.chain(blocked).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use banger_wire::ports::Protocol;

    #[test]
    fn what_a_guest_reports_is_bounded() {
        let socket = |port: u16| Listener {
            protocol: Protocol::Tcp,
            port,
            address: Ipv4Addr::LOCALHOST.into(),
            process: Some("\u{1b}x".repeat(100)),
            pid: None,
        };
        let reported = Listeners { sockets: (0..600).map(socket).collect() };
        let parsed = parse(&Frame::message(7, &reported).unwrap()).unwrap();
        assert_eq!(parsed.len(), LISTENERS_MAX - 1, "no more than that, and port 0 is none");
        assert!(parsed.iter().all(|one| one.process.as_ref().unwrap().chars().count() == PROCESS_LEN_MAX));
        assert_eq!(parse(&Frame::data(7, 1, b"{}".to_vec())), None);
        let nonsense =
            Frame { kind: Kind::Message, ..Frame::data(7, 0, b"{\"sockets\":[{\"port\":70000}]}".to_vec()) };
        assert_eq!(parse(&nonsense), None);
    }
}
