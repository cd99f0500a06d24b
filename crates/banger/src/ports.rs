//! `vm ports`: what listens in vms, and where that is reached from here.

use crate::args::PortsArgs;
use crate::context::{Context, expect_outcome};
use crate::run::not_running;
use crate::session;
use crate::stop::{Ended, Stop};
use crate::table::Table;
use crate::vm::NOTHING;
use banger_wire::daemon::{Request, VmState, VmView};
use banger_wire::frame::Kind;
use banger_wire::names::{VmId, VmName};
use banger_wire::ports::{Forward, Listener, Protocol, VmPorts};
use banger_wire::vm::{VmEvent, VmRequest};
use serde::Serialize;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// How long a port may take to say that it speaks HTTP.
const PROBE_TIME: Duration = Duration::from_secs(1);
/// As little as a server answers to, which most others take for a mistake and nothing else.
const PROBE: &[u8] = b"HEAD / HTTP/1.0\r\n\r\n";
/// How an answer begins.
const HTTP: &[u8] = b"HTTP/";
/// Ports that speak TLS before they speak HTTP, by custom.
const TLS_PORTS: [u16; 2] = [443, 8443];

/// What of a vm listens and where; also the shape of `--json`.
#[derive(Debug, Serialize)]
struct Ports {
    id: VmId,
    name: VmName,
    /// Its own address on the host.
    address: Option<Ipv4Addr>,
    ports: Vec<Port>,
    /// Why nothing opens by itself.
    problem: Option<String>,
}

/// One port.
#[derive(Debug, Serialize)]
struct Port {
    protocol: Protocol,
    /// In the guest.
    port: u16,
    /// What it listens at in the guest; none when nothing does.
    guest_address: Option<IpAddr>,
    process: Option<String>,
    pid: Option<u32>,
    /// Where it is reached on the host.
    host: Option<SocketAddr>,
    /// The same for a browser, where it speaks HTTP.
    url: Option<String>,
    published: bool,
    /// Why it is not reached.
    problem: Option<String>,
}

/// Runs `banger vm ports`.
pub(crate) async fn ports(context: &mut Context, args: PortsArgs) -> Ended {
    let mut all = Vec::new();
    let references: BTreeSet<String> = args.vms.into_iter().collect();
    for reference in references {
        let vm = expect_outcome!(context.ask(Request::VmShow { vm: reference }).await?, Vm)?;
        if matches!(vm.state, VmState::Created | VmState::Stopped) {
            return Err(not_running(&vm).into());
        }
        let known = context.signals.unless(ask(&vm)).await?;
        let mut found = combine(&vm, known);
        if !args.no_probe {
            let probing = async {
                probe(&mut found.ports).await;
                Ok(())
            };
            context.signals.unless(probing).await?;
        }
        all.push(found);
    }
    if args.json {
        context.ui.json(&all)?;
        return Ok(0);
    }
    for vm in &all {
        if let Some(problem) = &vm.problem {
            context.ui.warning(&format!("ports of `{}` do not open here: {problem}", vm.name));
        }
    }
    context.ui.data(&table(&all))?;
    Ok(0)
}

async fn ask(vm: &VmView) -> Result<VmPorts, Stop> {
    let name = vm.name.as_str();
    let (mut reader, _writer) = session::request(name, Path::new(&vm.socket), VmRequest::Ports).await?;
    loop {
        let frame = reader.next().await.map_err(|error| session::lost_by(name, error))?;
        let frame = frame.ok_or_else(|| session::lost(name))?;
        if frame.kind == Kind::Message {
            match frame.parse() {
                Ok(VmEvent::Ports(ports)) => return Ok(*ports),
                Ok(VmEvent::Refused(error)) => return Err(error.into()),
                _ => {}
            }
        }
    }
}

/// Puts together what listens and what is open. A published port is there whether anything listens or not.
fn combine(vm: &VmView, known: VmPorts) -> Ports {
    let port = |listener: Option<&Listener>, forward: Option<&Forward>| {
        let at = forward.filter(|forward| forward.problem.is_none());
        let host = at.map(|forward| SocketAddr::new(forward.address, forward.port));
        Port {
            protocol: listener.map_or(Protocol::Tcp, |listener| listener.protocol),
            port: listener
                .map(|listener| listener.port)
                .or(forward.map(|forward| forward.guest_port))
                .unwrap_or(0),
            guest_address: listener.map(|listener| listener.address),
            process: listener.and_then(|listener| listener.process.clone()),
            pid: listener.and_then(|listener| listener.pid),
            url: host.filter(|host| TLS_PORTS.contains(&host.port())).map(|host| format!("https://{host}")),
            host,
            published: forward.is_some_and(|forward| forward.published),
            problem: forward.and_then(|forward| forward.problem.clone()),
        }
    };
    let listeners = known.listeners.unwrap_or_default();
    let mut ports = Vec::new();
    let of = |listener: &Listener, forward: &&Forward| {
        listener.protocol == Protocol::Tcp && forward.guest_port == listener.port
    };
    for listener in &listeners {
        let mut forwards = known.forwards.iter().filter(|forward| of(listener, forward)).peekable();
        if forwards.peek().is_none() {
            ports.push(port(Some(listener), None));
        }
        ports.extend(forwards.map(|forward| port(Some(listener), Some(forward))));
    }
    let silent = |forward: &&Forward| !listeners.iter().any(|listener| of(listener, forward));
    ports.extend(known.forwards.iter().filter(silent).map(|forward| port(None, Some(forward))));
    Ports { id: vm.id.clone(), name: vm.name.clone(), address: known.address, ports, problem: known.problem }
}

/// Asks each port that is open whether it speaks HTTP, all at once.
async fn probe(ports: &mut [Port]) {
    let mut asked = JoinSet::new();
    let open: BTreeSet<SocketAddr> = ports
        .iter()
        .filter(|port| port.url.is_none() && port.guest_address.is_some())
        .filter_map(|port| port.host)
        .collect();
    for host in open {
        asked.spawn(async move {
            let speaks = tokio::time::timeout(PROBE_TIME, speaks_http(reachable(host))).await;
            (host, matches!(speaks, Ok(Ok(true))))
        });
    }
    while let Some(Ok((host, speaks))) = asked.join_next().await {
        for port in ports.iter_mut().filter(|port| speaks && port.host == Some(host)) {
            port.url = Some(format!("http://{}", reachable(host)));
        }
    }
}

/// What is open at all addresses is open at the loopback's.
fn reachable(host: SocketAddr) -> SocketAddr {
    match host.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), host.port()),
        _ => host,
    }
}

async fn speaks_http(host: SocketAddr) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect(host).await?;
    stream.write_all(PROBE).await?;
    let mut beginning = [0; HTTP.len()];
    stream.read_exact(&mut beginning).await?;
    Ok(beginning == HTTP)
}

fn table(all: &[Ports]) -> String {
    let mut table = Table::new(&["NAME", "PROTO", "PORT", "LISTENS AT", "PROCESS", "HERE"]);
    for vm in all {
        for port in &vm.ports {
            let protocol = match port.protocol {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
            };
            let nothing = || NOTHING.to_owned();
            let here = port.problem.clone().or_else(|| port.url.clone());
            table.row([
                vm.name.to_string(),
                protocol.to_owned(),
                port.port.to_string(),
                port.guest_address.map_or_else(nothing, |address| address.to_string()),
                port.process.clone().unwrap_or_else(nothing),
                here.or_else(|| port.host.map(|host| host.to_string())).unwrap_or_else(nothing),
            ]);
        }
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_listens_and_what_is_open_are_one_table() {
        let vm = json!({
            "id": "0123456789ab", "name": "web", "state": "running", "image": "i", "kernel": "k", "vcpu": 1,
            "memory": 1, "disk_size": 1, "disk_used_bytes": 0, "net": "none", "vmm": "qemu", "emulated": true,
            "created": 0, "rm": false, "dir": "/", "socket": "/s", "watchdog_restarts": 0
        });
        let listener = |protocol: &str, port: u16, address: &str, process: Option<&str>| json!({"protocol": protocol, "port": port, "address": address, "process": process, "pid": 7});
        let forward = |guest: u16, address: &str, port: u16, published: bool, problem: Option<&str>| json!({"guest_port": guest, "address": address, "port": port, "published": published, "problem": problem});
        let known = json!({
            "address": "127.77.1.2",
            "listeners": [
                listener("tcp", 22, "0.0.0.0", Some("sshd")),
                listener("tcp", 80, "::", Some("\u{1b}[2Jnginx")),
                listener("tcp", 443, "::", None),
                listener("udp", 68, "10.231.7.2", Some("dhclient")),
                listener("tcp", 3000, "127.0.0.1", Some("node")),
            ],
            "forwards": [
                forward(22, "127.77.1.2", 20022, false, None),
                forward(80, "127.77.1.2", 8080, false, None),
                forward(443, "127.77.1.2", 8443, false, None),
                forward(3000, "127.77.1.2", 3000, false, Some("127.77.1.2:3000 is taken by another program on the host")),
                forward(80, "0.0.0.0", 8000, true, None),
                forward(9000, "127.0.0.1", 9000, true, None),
            ]
        });
        let mut found = combine(&serde_json::from_value(vm).unwrap(), serde_json::from_value(known).unwrap());
        found.ports[1].url = Some("http://127.77.1.2:8080".to_owned());
        insta::assert_snapshot!(table(&[found]), @r"
        NAME  PROTO  PORT  LISTENS AT  PROCESS       HERE
        web   tcp    22    0.0.0.0     sshd          127.77.1.2:20022
        web   tcp    80    ::          \x1b[2Jnginx  http://127.77.1.2:8080
        web   tcp    80    ::          \x1b[2Jnginx  0.0.0.0:8000
        web   tcp    443   ::          -             https://127.77.1.2:8443
        web   udp    68    10.231.7.2  dhclient      -
        web   tcp    3000  127.0.0.1   node          127.77.1.2:3000 is taken by another program on the host
        web   tcp    9000  -           -             127.0.0.1:9000
        ");
    }
}
