//! A vm's network: made, guarded, and told about.
//!
//! ```text
//! create   thread "net": namespace, tap0, link address           before the VMM starts
//! raise    nft (policy) -> forwarding -> resolver -> pasta       while the guest boots
//! watch    pasta's end, changes of the host's addresses          until the vm ends
//! ```
//!
//! Whatever fails leaves the vm without a way out and a sentence that says so, never with a way out and no policy:
//! forwarding is turned on only after the policy is in force. Nothing is ever taken down; it goes with the namespace.

mod dns;
mod resolver;
pub(crate) mod starter;
mod thread;

use crate::net::pasta::NETNS_FILE;
use crate::net::policy::Policy;
use crate::net::{GATEWAY, GATEWAY_MAC, GUEST_MAC, NetPlan, PREFIX_LEN, TAP, host, nft};
use anyhow::{Context as _, bail};
use banger_sys::namespace;
use banger_sys::netif::{self, Inet4};
use banger_sys::netlink;
use banger_vmm::{Driver, MachinePlan, NetDevice, NetLink};
use banger_wire::daemon::NetMode;
use starter::Starter;
use std::cell::RefCell;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;
use thread::readable;
pub(crate) use thread::{Child, NetThread};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

/// How long the network may take before the vm counts as ready without it.
const RAISE_WAIT: Duration = Duration::from_secs(5);
/// Changes of the host's addresses come in bursts; they are looked at once.
const SETTLE: Duration = Duration::from_millis(200);

/// A vm's network. It and everything in it ends with the vm's processes.
pub(crate) struct Network {
    plan: NetPlan,
    /// Runs things within the namespace.
    pub(crate) thread: Rc<NetThread>,
    link: Option<Link>,
    /// Until the network is raised.
    starter: Option<Starter>,
    raising: bool,
    state: watch::Sender<State>,
}

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
}

impl Network {
    /// Makes the namespace and, when there is to be a network, the guest's link.
    ///
    /// # Errors
    /// When there can be no namespace. A missing link is told by the state instead.
    pub(crate) async fn create(
        plan: &NetPlan,
        driver: Driver,
        starter: Option<Starter>,
    ) -> anyhow::Result<Self> {
        let thread = NetThread::start().await?;
        let wanted = plan.mode != NetMode::None;
        let made = if wanted { thread.run(move || create_link(driver)).await?.map(Some) } else { Ok(None) };
        let (link, warning) = match made {
            Ok(link) => (link, None),
            Err(error) => (None, Some(sentence(&error))),
        };
        let state = State { settled: link.is_none(), warning };
        Ok(Self {
            plan: plan.clone(),
            thread: Rc::new(thread),
            link,
            starter,
            raising: false,
            state: watch::channel(state).0,
        })
    }

    /// Whether the guest has a link.
    pub(crate) fn has_link(&self) -> bool {
        self.link.is_some()
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
        let starter = self.starter.take();
        tokio::task::spawn_local(async move {
            let warn = |error: &anyhow::Error| {
                let text = sentence(error);
                state.send_replace(State { settled: true, warning: Some(text) });
            };
            let mut raised = match within("the policy", Raised::raise(plan, thread, starter)).await {
                Ok(raised) => raised,
                Err(error) => return warn(&error),
            };
            loop {
                match within("`pasta`", raised.open_way()).await {
                    Ok(()) => drop(state.send_replace(State { settled: true, warning: None })),
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

async fn within<T>(what: &str, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let late = |_| anyhow::anyhow!("{what} is not up after {} s", RAISE_WAIT.as_secs());
    tokio::time::timeout(RAISE_WAIT, work).await.map_err(late)?
}

/// One line for the person who started the vm.
fn sentence(error: &anyhow::Error) -> String {
    format!("no way out to the network: {error:#}")
}

/// In the vm's namespace: what the VMM needs to start.
fn create_link(driver: Driver) -> anyhow::Result<Link> {
    let tap = namespace::open_tap(TAP).map_err(|error| {
        let hint = match error.kind() {
            std::io::ErrorKind::PermissionDenied => "; allow it with `sudo chmod 0666 /dev/net/tun`",
            std::io::ErrorKind::NotFound => "; load it with `sudo modprobe tun`",
            _ => "",
        };
        anyhow::anyhow!("open `/dev/net/tun`: {error}{hint}")
    })?;
    // No IPv6 yet: it is switched off here, and dropped by the policy in case it could not be.
    for name in ["all", "default"] {
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    }
    let label = || format!("configure `{TAP}`");
    netif::set_mac(TAP, GATEWAY_MAC).with_context(label)?;
    netif::set_address(TAP, Inet4 { address: GATEWAY, prefix_len: PREFIX_LEN }).with_context(label)?;
    netif::set_up(TAP, true).with_context(label)?;
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
    policy: Rc<RefCell<Policy>>,
    /// Word of changes on the host.
    changes: AsyncFd<netlink::Changes>,
    starter: Option<Starter>,
    /// pasta has opened the way out.
    open: bool,
}

impl Raised {
    async fn raise(plan: NetPlan, thread: Rc<NetThread>, starter: Option<Starter>) -> anyhow::Result<Self> {
        let Some(nft) = plan.nft.clone() else {
            bail!("`nft` is not installed; install it with `sudo apt-get install nftables`");
        };
        // Listening begins before the first look, so that no change falls between the two.
        let changes = netlink::Changes::open().context("listen to changes of the host's network")?;
        let changes = readable(changes)?;
        let policy = Policy::new(plan.mode, host::read()?.nets).limited(plan.rate);
        let (program, text) = (nft.clone(), policy.render());
        let (udp, tcp) = thread
            .run(move || {
                nft::apply(&program, &text)?;
                std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("turn forwarding on")?;
                resolver::bind().context("listen as the guest's resolver")
            })
            .await??;
        let policy = Rc::new(RefCell::new(policy));
        resolver::serve(udp, tcp, policy.clone())?;
        Ok(Self { plan, thread, nft, policy, changes, starter, open: false })
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
        if !host::read()?.has_default_route {
            bail!("the host has no default route");
        }
        let inner = self.thread.run(netlink::Changes::open).await?.context("listen to the vm's namespace")?;
        let inner = readable(inner)?;
        starter.start().await?;
        loop {
            if self.thread.run(has_way_out).await? {
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
            let policy = Policy::new(self.plan.mode, host.nets).limited(self.plan.rate);
            if policy != *self.policy.borrow() {
                let (program, text) = (self.nft.clone(), policy.render_host());
                self.thread.run(move || nft::apply(&program, &text)).await??;
                *self.policy.borrow_mut() = policy;
            }
            if !self.open && host.has_default_route {
                return Ok(());
            }
        }
    }
}

async fn ended(starter: Option<&mut Starter>) -> anyhow::Result<std::process::ExitStatus> {
    match starter {
        Some(starter) => starter.ended().await,
        None => std::future::pending().await,
    }
}

/// Whether pasta has configured its interface: its route is the last thing it makes.
fn has_way_out() -> bool {
    netlink::routes().is_ok_and(|routes| routes.iter().any(|route| route.to.prefix_len == 0))
}
