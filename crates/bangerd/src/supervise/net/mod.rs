//! A vm's network: made, guarded, and told about.
//!
//! ```text
//! create   thread "net": namespace, tap0, link address, net0     before the VMM starts
//! raise    nft (policy) -> forwarding -> resolver -> thread      while the guest boots
//!          "member", which carries packets of net0 -> pasta
//! watch    pasta's end, the host's addresses, orders             until the vm ends
//! ```
//!
//! Whatever fails leaves the vm without a way out and a sentence that says so, never with a way out and no policy:
//! forwarding is turned on only after the policy is in force. Nothing is ever taken down; it goes with the namespace.

mod dns;
pub(crate) mod member;
mod record;
mod resolver;
pub(crate) mod starter;
mod thread;

use crate::net::member::MemberPlan;
use crate::net::pasta::NETNS_FILE;
use crate::net::policy::Policy;
use crate::net::{
    GATEWAY, GATEWAY_MAC, GATEWAY6, GUEST_MAC, NetPlan, PREFIX_LEN, PREFIX_LEN6, TAP, host, nft,
};
use anyhow::{Context as _, bail};
use banger_sys::namespace;
use banger_sys::netif::{self, Inet4};
use banger_sys::netlink::{self, RouteKind};
use banger_vmm::{Driver, MachinePlan, NetDevice, NetLink};
use banger_wire::net::{NetReport, NetRules};
use dns::Found;
use member::{Member, Names};
use record::{Record, unix_s};
use resolver::Part;
use starter::Starter;
use std::cell::RefCell;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;
use thread::readable;
pub(crate) use thread::{Child, NetThread};
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};

/// How long the network may take before the vm counts as ready without it: on a machine that is very busy, `nft`'s first
/// start alone, which loads ten modules of the kernel, takes 5 s.
const RAISE_WAIT: Duration = Duration::from_secs(20);
/// Changes of the host's addresses come in bursts; they are looked at once.
const SETTLE: Duration = Duration::from_millis(200);

/// Orders that wait for the network.
pub(crate) const ORDERS_MAX: usize = 16;

/// What is wanted of a network that is up.
#[derive(Debug)]
pub(crate) enum Order {
    /// That the addresses a name led to are open, where the name is allowed. Told once they are, or can't be.
    Open { name: String, found: Vec<Found>, done: oneshot::Sender<bool> },
    /// Other rules. Told once they are in force, or why they are not.
    SetRules { rules: NetRules, done: oneshot::Sender<Result<(), String>> },
    /// What is open, and what was refused.
    Report { done: oneshot::Sender<NetReport> },
}

/// A vm's network. It and everything in it ends with the vm's processes.
pub(crate) struct Network {
    plan: NetPlan,
    /// Runs things within the namespace.
    pub(crate) thread: Rc<NetThread>,
    link: Option<Link>,
    /// The way to the other vms of its network, until the network is raised.
    member: Option<Member>,
    /// Whether the guest has IPv6: decided once, by what the host has when the vm starts.
    ipv6: bool,
    /// Until the network is raised.
    starter: Option<Starter>,
    /// Sender and receiver of orders, until the network is raised.
    orders: Option<Orders>,
    raising: bool,
    state: watch::Sender<State>,
}

pub(crate) type Orders = (mpsc::Sender<Order>, mpsc::Receiver<Order>);

/// The guest's link, which is there.
enum Link {
    /// A tap for the VMM to inherit.
    Open(OwnedFd),
    /// A tap that the VMM opens, and that stays in the namespace until then.
    Named,
}

/// What the vm's life has to know of its network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct State {
    /// It is as up as it will be for now.
    pub(crate) settled: bool,
    /// Why there is no way out, when there should be one.
    pub(crate) warning: Option<String>,
    /// Why the other vms of its network are not reached, when it should be in one.
    pub(crate) member_warning: Option<String>,
}

impl Network {
    /// Makes the namespace and, when there is to be a network, the guest's link. `dir` is the directory of the network
    /// of vms it is in, `is_alone` says that all vms there are one user's.
    ///
    /// # Errors
    /// When there can be no namespace. A missing link is told by the state instead.
    pub(crate) async fn create(
        plan: &NetPlan,
        driver: Driver,
        starter: Option<Starter>,
        orders: Orders,
        dir: Option<std::io::Result<OwnedFd>>,
        is_alone: bool,
    ) -> anyhow::Result<Self> {
        let thread = NetThread::start().await?;
        let ipv6 = plan.leads_out() && host::read().is_ok_and(|host| host.has_ipv6);
        let made = if plan.has_link() {
            thread.run(move || create_link(driver, ipv6)).await?.map(Some)
        } else {
            Ok(None)
        };
        // Without a link nobody takes orders, and whoever gives one is told so.
        let orders = Some(orders).filter(|_| matches!(made, Ok(Some(_))));
        let mut state = State { settled: !matches!(made, Ok(Some(_))), ..State::default() };
        let (link, member) = match made {
            Ok(link) => (link, join(plan, dir, is_alone, &thread).await),
            Err(error) => {
                state.no_way_out(plan, &error);
                state.no_member(plan, &error);
                (None, Ok(None))
            }
        };
        let member = member.unwrap_or_else(|error| {
            state.no_member(plan, &error);
            None
        });
        Ok(Self {
            plan: plan.clone(),
            thread: Rc::new(thread),
            link,
            member,
            ipv6,
            starter,
            orders,
            raising: false,
            state: watch::channel(state).0,
        })
    }

    /// Whether the guest has a link.
    pub(crate) fn has_link(&self) -> bool {
        self.link.is_some()
    }

    /// Whether the guest has IPv6.
    pub(crate) fn has_ipv6(&self) -> bool {
        self.ipv6
    }

    /// Follows the state.
    pub(crate) fn subscribe(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// The tap, where the VMM is to inherit it.
    pub(crate) fn tap(&self) -> Option<RawFd> {
        match &self.link {
            Some(Link::Open(tap)) => Some(tap.as_raw_fd()),
            Some(Link::Named) | None => None,
        }
    }

    /// The machine with its network device.
    ///
    /// The VMM finds the tap under the number it has here. Moving it to one chosen beforehand could hit a descriptor
    /// that the start of a process itself needs.
    pub(crate) fn machine(&self, plan: &MachinePlan) -> MachinePlan {
        let link = self.link.as_ref().map(|link| match link {
            Link::Open(tap) => NetLink::Open(tap.as_raw_fd()),
            Link::Named => NetLink::Named(TAP.to_owned()),
        });
        let device = |link| NetDevice { mac: GUEST_MAC.to_owned(), link };
        MachinePlan { net: link.map(device).or_else(|| plan.net.clone()), ..plan.clone() }
    }

    /// Bytes that went to the guest, and that came from it.
    pub(crate) async fn moved(&self) -> Option<(u64, u64)> {
        self.link.as_ref()?;
        // Of the namespace of the thread that reads it.
        let read = || std::fs::read_to_string("/proc/thread-self/net/dev").ok();
        let text = self.thread.run(read).await.ok()??;
        let line = text.lines().find_map(|line| line.trim().strip_prefix(TAP)?.strip_prefix(':'))?;
        let mut numbers = line.split_whitespace().map(|number| number.parse::<u64>().ok());
        // What the interface has received came from the guest; of each way there are eight numbers.
        let from = numbers.next()??;
        Some((numbers.nth(7)??, from))
    }

    /// Puts the policy in force and then opens the way out, beside whatever else happens. A second call changes nothing.
    pub(crate) fn raise(&mut self) {
        if self.link.is_none() || std::mem::replace(&mut self.raising, true) {
            return;
        }
        let (plan, thread, state) = (self.plan.clone(), self.thread.clone(), self.state.clone());
        let Some(orders) = self.orders.take() else { return };
        let (ipv6, starter, member) = (self.ipv6, self.starter.take(), self.member.take());
        tokio::task::spawn_local(async move {
            let warn = |error: &anyhow::Error| {
                state.send_modify(|state| {
                    state.settled = true;
                    state.no_way_out(&plan, error);
                });
            };
            let names = member.as_ref().map(Member::names);
            let raise = Raised::raise(plan.clone(), thread, ipv6, starter, orders, names);
            let mut raised = match within("the policy", raise).await {
                Ok(raised) => raised,
                Err(error) => {
                    // Nothing is forwarded, and nobody shall think otherwise.
                    drop(member);
                    state.send_modify(|state| state.no_member(&plan, &error));
                    return warn(&error);
                }
            };
            if let Some(member) = member {
                tokio::task::spawn_local(carry(member, plan.clone(), state.clone()));
            }
            loop {
                let opened =
                    if plan.leads_out() { within("`pasta`", raised.open_way()).await } else { Ok(()) };
                match opened {
                    Ok(()) => state.send_modify(|state| (state.settled, state.warning) = (true, None)),
                    Err(error) => {
                        raised.give_up();
                        warn(&error);
                    }
                }
                // Returns when it is worth trying again.
                if let Err(error) = raised.watch(&warn).await {
                    return warn(&error);
                }
            }
        });
    }
}

impl State {
    fn no_way_out(&mut self, plan: &NetPlan, error: &anyhow::Error) {
        self.warning = plan.leads_out().then(|| format!("no way out to the network: {error:#}"));
    }

    fn no_member(&mut self, plan: &NetPlan, error: &anyhow::Error) {
        let text = |plan: &MemberPlan| format!("no way to the vms of network `{}`: {error:#}", plan.network);
        self.member_warning = plan.member.as_ref().map(text);
    }
}

/// Makes the way to the other vms of the network the vm is in, if it is in one.
async fn join(
    plan: &NetPlan,
    dir: Option<std::io::Result<OwnedFd>>,
    is_alone: bool,
    thread: &NetThread,
) -> anyhow::Result<Option<Member>> {
    let (Some(plan), Some(dir)) = (&plan.member, dir) else { return Ok(None) };
    let dir = dir.with_context(|| format!("open `{}`", plan.dir.display()))?;
    Member::create(plan, dir, is_alone, thread).await.map(Some)
}

/// Carries packets between the guest and the others until that can't be done any more.
async fn carry(member: Member, plan: NetPlan, state: watch::Sender<State>) {
    let error = member.carry().await;
    state.send_modify(|state| state.no_member(&plan, &error));
}

async fn within<T>(what: &str, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let late = |_| anyhow::anyhow!("{what} is not up after {} s", RAISE_WAIT.as_secs());
    tokio::time::timeout(RAISE_WAIT, work).await.map_err(late)?
}

/// In the vm's namespace: what the VMM needs to start.
fn create_link(driver: Driver, ipv6: bool) -> anyhow::Result<Link> {
    for name in ["all", "default"] {
        // Without IPv6 it is switched off here, and dropped by the policy in case it could not be. With it, an address is
        // usable at once (nobody else is on these links, so nothing can collide) and nobody announces routes.
        let settings: &[(&str, &str)] =
            if ipv6 { &[("accept_dad", "0"), ("accept_ra", "0")] } else { &[("disable_ipv6", "1")] };
        for (setting, value) in settings {
            let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/{setting}"), value);
        }
    }
    let tap = namespace::open_tap(TAP).map_err(|error| {
        let hint = match error.kind() {
            std::io::ErrorKind::PermissionDenied => "; allow it with `sudo chmod 0666 /dev/net/tun`",
            std::io::ErrorKind::NotFound => "; load it with `sudo modprobe tun`",
            _ => "",
        };
        anyhow::anyhow!("open `/dev/net/tun`: {error}{hint}")
    })?;
    let label = || format!("configure `{TAP}`");
    netif::set_mac(TAP, GATEWAY_MAC).with_context(label)?;
    netif::set_address(TAP, Inet4 { address: GATEWAY, prefix_len: PREFIX_LEN }).with_context(label)?;
    if ipv6 {
        let index = netif::index(TAP).with_context(label)?;
        netif::set_address6(index, GATEWAY6, PREFIX_LEN6).with_context(label)?;
    }
    netif::set_up(TAP, true).with_context(label)?;
    // The guest could make the kernel remember as many neighbours as it has names for, in a table that all of the host
    // shares. Questions from addresses that are not on this link are not answered.
    let _ = std::fs::write(format!("/proc/sys/net/ipv4/conf/{TAP}/rp_filter"), "1");
    let file = Path::new(NETNS_FILE);
    std::fs::create_dir_all(file.parent().unwrap_or(file)).context("make the namespace's directory")?;
    std::fs::write(file, "").context("make the namespace's file")?;
    rustix::mount::mount_bind("/proc/thread-self/ns/net", file).context("keep the namespace as a file")?;
    if driver == Driver::Firecracker {
        // It opens a tap by its name, and only one process at a time can have it open.
        namespace::keep_tap(&tap).with_context(label)?;
        return Ok(Link::Named);
    }
    Ok(Link::Open(tap))
}

/// A network with its policy in force.
struct Raised {
    plan: NetPlan,
    thread: Rc<NetThread>,
    nft: std::path::PathBuf,
    ipv6: bool,
    policy: Rc<RefCell<Policy>>,
    record: Rc<RefCell<Record>>,
    orders: mpsc::Receiver<Order>,
    /// Word of changes on the host.
    changes: AsyncFd<netlink::Changes>,
    starter: Option<Starter>,
    /// pasta has opened the way out.
    open: bool,
}

impl Raised {
    async fn raise(
        plan: NetPlan,
        thread: Rc<NetThread>,
        ipv6: bool,
        starter: Option<Starter>,
        (sender, orders): Orders,
        names: Option<Names>,
    ) -> anyhow::Result<Self> {
        let Some(nft) = plan.nft.clone() else {
            bail!("`nft` is not installed; install it with `sudo apt-get install nftables`");
        };
        // Listening begins before the first look, so that no change falls between the two.
        let changes = netlink::Changes::open().context("listen to changes of the host's network")?;
        let changes = readable(changes)?;
        let policy = Policy::new(plan.mode, plan.rules.clone(), host::read()?).limited(ipv6, plan.rate);
        let policy = policy.joined(plan.member.as_ref().filter(|_| names.is_some()).map(MemberPlan::address));
        let (program, text) = (nft.clone(), policy.render());
        let (udp, tcp) = thread
            .run(move || {
                nft::apply(&program, &text)?;
                std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("turn forwarding on")?;
                if ipv6 {
                    std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")
                        .context("turn forwarding of IPv6 on")?;
                }
                resolver::bind().context("listen as the guest's resolver")
            })
            .await??;
        let (policy, record) = (Rc::new(RefCell::new(policy)), Rc::new(RefCell::new(Record::default())));
        let names = names.map(Rc::new);
        let part = Part { policy: policy.clone(), record: record.clone(), orders: sender, names };
        resolver::serve(udp, tcp, part)?;
        Ok(Self { plan, thread, nft, ipv6, policy, record, orders, changes, starter, open: false })
    }

    /// Starts pasta, unless it runs, and returns when the way out is there.
    async fn open_way(&mut self) -> anyhow::Result<()> {
        if self.open {
            return Ok(());
        }
        let starter = match (&mut self.starter, &self.plan.pasta) {
            (Some(starter), _) => starter,
            (None, None) => bail!("`pasta` is not installed; install it with `sudo apt-get install passt`"),
            (None, Some(_)) => bail!("this `pasta` is too old; install a newer `passt`"),
        };
        let host = host::read()?;
        let has_a_way = host.has_ipv4 || (host.has_ipv6 && self.ipv6);
        if !has_a_way {
            bail!("the host has no default route");
        }
        let inner = self.thread.run(netlink::Changes::open).await?.context("listen to the vm's namespace")?;
        let inner = readable(inner)?;
        starter.start(!self.ipv6).await?;
        loop {
            if self.thread.run(move || has_way_out(host.has_ipv4)).await? {
                self.open = true;
                return Ok(());
            }
            tokio::select! {
                status = starter.ended() => bail!("`pasta` ended at once ({})", status?),
                ready = inner.readable() => {
                    let mut ready = ready?;
                    inner.get_ref().drain();
                    ready.clear_ready();
                }
            }
        }
    }

    /// Ends a pasta that has not opened the way.
    fn give_up(&self) {
        if let Some(starter) = &self.starter {
            starter.end();
        }
    }

    /// Keeps the policy up to the host's addresses. Returns when opening the way out may work where it did not.
    async fn watch(&mut self, warn: &dyn Fn(&anyhow::Error)) -> anyhow::Result<()> {
        loop {
            let status = tokio::select! {
                status = ended(self.starter.as_mut().filter(|_| self.open)) => Some(status?),
                order = self.orders.recv() => {
                    if let Some(order) = order {
                        self.obey(order).await;
                    }
                    continue;
                }
                ready = self.changes.readable() => {
                    let mut ready = ready?;
                    tokio::time::sleep(SETTLE).await;
                    self.changes.get_ref().drain();
                    ready.clear_ready();
                    None
                }
            };
            if let Some(status) = status {
                self.open = false;
                warn(&anyhow::anyhow!("`pasta` ended ({status})"));
                continue;
            }
            let host = host::read()?;
            let has_default_route = host.has_default_route();
            let policy = self.policy.borrow().on(host);
            if policy != *self.policy.borrow() {
                self.put_in_force(policy).await?;
            }
            if !self.open && has_default_route && self.plan.leads_out() {
                return Ok(());
            }
        }
    }
}

impl Raised {
    async fn apply(&self, text: String) -> anyhow::Result<()> {
        let program = self.nft.clone();
        self.thread.run(move || nft::apply(&program, &text)).await?
    }

    async fn put_in_force(&self, policy: Policy) -> anyhow::Result<()> {
        let pins = self.record.borrow().pins();
        self.apply(policy.render_change(&pins)).await?;
        *self.policy.borrow_mut() = policy;
        Ok(())
    }

    /// Whoever gave the order may have left.
    async fn obey(&self, order: Order) {
        match order {
            Order::Open { name, found, done } => {
                let opened = self.open(&name, &found).await;
                if !opened {
                    self.record.borrow_mut().unpin(&name);
                }
                let _ = done.send(opened);
            }
            Order::SetRules { rules, done } => {
                let policy = self.policy.borrow().with(rules);
                let set = self.put_in_force(policy).await;
                let _ = done.send(set.map_err(|error| format!("{error:#}")));
            }
            Order::Report { done } => {
                let program = self.nft.clone();
                let table = self.thread.run(move || nft::read(&program)).await;
                let table = table.and_then(|table| table).unwrap_or_default();
                let (record, policy) = (self.record.borrow(), self.policy.borrow());
                let open = record.open(|name| policy.opens_by_name() && policy.allows_name(name));
                let _ = done.send(NetReport { open, denials: record.denials(&table, unix_s()) });
            }
        }
    }

    /// Whether the addresses that a name led to are open now.
    async fn open(&self, name: &str, found: &[Found]) -> bool {
        // Between question and answer the rules may have changed.
        if !self.policy.borrow().allows_name(name) {
            return false;
        }
        let mut is_news = false;
        for found in found {
            match self.record.borrow_mut().pin(name, found.address, found.ttl) {
                Some(news) => is_news |= news,
                None => return false,
            }
        }
        if !is_news {
            return true;
        }
        let text = self.policy.borrow().render_pins(&self.record.borrow().pins());
        self.apply(text).await.is_ok()
    }
}

async fn ended(starter: Option<&mut Starter>) -> anyhow::Result<std::process::ExitStatus> {
    match starter {
        Some(starter) => starter.ended().await,
        None => std::future::pending().await,
    }
}

/// Whether pasta has configured its interface: its routes are the last things it makes, that of IPv6 after the other.
fn has_way_out(has_ipv4: bool) -> bool {
    let leads_out = |route: &netlink::Route| {
        route.to.prefix_len == 0 && route.kind == RouteKind::Unicast && route.to.address.is_ipv4() == has_ipv4
    };
    netlink::routes().is_ok_and(|routes| routes.iter().any(leads_out))
}
