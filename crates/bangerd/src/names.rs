//! Names of vms: an authoritative name server for `vm.`, on the loopback.
//!
//! `NAME.vm` has the address of the vm of that name while it runs. Everything else below `vm.` does not exist, and what is
//! not below it is refused, so that a resolver which asks here by mistake asks elsewhere. Answers are made anew for each
//! question and may be kept for seconds only: a vm can have another address at its next start.
//!
//! The messages are `hickory-proto`'s, the server is not: a zone of one kind of record needs none, and a library's would
//! bring its own cache, zones and tasks. Where the port is taken the daemon goes on without, and tries again.

use crate::config::Config;
use crate::daemon::Daemon;
use banger_wire::ports::CLAIM_PORT;
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, NS, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

/// The only zone.
const ZONE: &str = "vm.";
/// Seconds that an answer, or that there is none, may be kept.
const KEPT: u32 = 5;
/// Connections at a time, and how long each may take for a question.
const CONNECTIONS_MAX: usize = 64;
const QUESTION_TIME: Duration = Duration::from_secs(5);
/// How often a port that is taken is tried again. Nobody tells when it becomes free.
const TRY_AGAIN: Duration = Duration::from_secs(30);
/// The wait after an error that is no connection's own.
const PAUSE: Duration = Duration::from_millis(100);
/// Longest message of UDP that is read; a question with every option there is has less.
const QUESTION_LEN_MAX: usize = 4096;
/// What a client may send that has no room for more.
const EDNS_LEN: u16 = 1232;
/// How the config says that no names are to be answered.
const OFF: &str = "off";

/// How far the name server is, for `banger doctor`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum State {
    /// Not begun.
    #[default]
    Begins,
    /// The config says so.
    Off,
    /// It answers here.
    Answers(SocketAddr),
    /// It can't listen: where, why, and who does.
    Taken { at: SocketAddr, error: String, holder: Option<String> },
    /// The config names no place it could listen at.
    Wrong(String),
}

/// What is known of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    /// There is no such vm.
    Nothing,
    /// There is, and it has no address now.
    Name,
    Address(Ipv4Addr),
}

/// Answers until the daemon ends.
pub(crate) async fn serve(daemon: Arc<Daemon>) {
    let note = |state: State| *daemon.names.lock().unwrap_or_else(PoisonError::into_inner) = state;
    let asked = Config::load().ok().and_then(|config| config.dns_listen);
    let at = match place(asked.as_deref()) {
        Ok(Some(at)) => at,
        Ok(None) => return note(State::Off),
        Err(wrong) => return note(State::Wrong(wrong)),
    };
    let (udp, tcp) = loop {
        match bind(at).await {
            Ok(sockets) => break sockets,
            Err(error) => {
                let holder = banger_image::blocking::start(move || holder(at)).await.ok().flatten();
                note(State::Taken { at, error: error.to_string(), holder });
                tokio::time::sleep(TRY_AGAIN).await;
            }
        }
    };
    note(State::Answers(at));
    tokio::join!(serve_udp(&daemon, udp), serve_tcp(&daemon, tcp));
}

/// Where the server listens; none when it does not.
fn place(asked: Option<&str>) -> Result<Option<SocketAddr>, String> {
    let Some(text) = asked else { return Ok(Some(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), CLAIM_PORT))) };
    if text == OFF {
        return Ok(None);
    }
    // Others on the network have no use for addresses of this machine's loopback.
    let at = text.parse().ok().filter(|at: &SocketAddr| at.ip().is_loopback() && at.port() != 0);
    at.map(Some).ok_or_else(|| format!("`{text}` is not an address and port of the loopback"))
}

async fn bind(at: SocketAddr) -> io::Result<(UdpSocket, TcpListener)> {
    Ok((UdpSocket::bind(at).await?, TcpListener::bind(at).await?))
}

async fn serve_udp(daemon: &Daemon, socket: UdpSocket) {
    let mut question = vec![0; QUESTION_LEN_MAX];
    loop {
        match socket.recv_from(&mut question).await {
            Ok((len, peer)) => {
                if let Some(answer) = answer(&question[..len], &|name| known(daemon, name)) {
                    let _ = socket.send_to(&answer, peer).await;
                }
            }
            // Of an earlier answer that nobody took.
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

async fn serve_tcp(daemon: &Arc<Daemon>, listener: TcpListener) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let daemon = Arc::clone(daemon);
                tokio::spawn(async move {
                    let _ = converse(&daemon, stream).await;
                    drop(permit);
                });
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// Answers questions of one connection, each with its length before it.
async fn converse(daemon: &Daemon, mut stream: TcpStream) -> io::Result<()> {
    loop {
        let question = async {
            let len = stream.read_u16().await?;
            let mut question = vec![0; usize::from(len)];
            stream.read_exact(&mut question).await?;
            Ok::<_, io::Error>(question)
        };
        let question = tokio::time::timeout(QUESTION_TIME, question).await??;
        let Some(answer) = answer(&question, &|name| known(daemon, name)) else { return Ok(()) };
        let len = u16::try_from(answer.len()).map_err(io::Error::other)?;
        let message = [len.to_be_bytes().as_slice(), &answer].concat();
        tokio::time::timeout(QUESTION_TIME, stream.write_all(&message)).await??;
    }
}

fn known(daemon: &Daemon, name: &str) -> Known {
    let rows = daemon.store.vms().unwrap_or_default();
    let Some(row) = rows.into_iter().find(|row| row.name.as_str() == name) else { return Known::Nothing };
    let address = daemon.running().get(row.id.as_str()).and_then(|status| status.address);
    address.map_or(Known::Name, Known::Address)
}

/// Answers a message; none for one that is no question.
fn answer(bytes: &[u8], known: &dyn Fn(&str) -> Known) -> Option<Vec<u8>> {
    let head = bytes.get(..12)?;
    // Two servers that answer answers keep each other busy.
    if head[2] & 0x80 != 0 {
        return None;
    }
    let id = u16::from_be_bytes([head[0], head[1]]);
    let answer = match Message::from_vec(bytes) {
        Ok(question) => respond(&question, known),
        Err(_) => Message::error_msg(id, OpCode::Query, ResponseCode::FormErr),
    };
    answer.to_vec().ok()
}

fn respond(question: &Message, known: &dyn Fn(&str) -> Known) -> Message {
    let mut answer = Message::response(question.metadata.id, question.metadata.op_code);
    answer.metadata.message_type = MessageType::Response;
    answer.metadata.recursion_desired = question.metadata.recursion_desired;
    if question.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(EDNS_LEN);
        answer.set_edns(edns);
    }
    answer.metadata.response_code = match question.queries.as_slice() {
        _ if question.metadata.op_code != OpCode::Query => ResponseCode::NotImp,
        _ if question.edns.as_ref().is_some_and(|edns| edns.version() != 0) => ResponseCode::BADVERS,
        [query] => {
            answer.add_query(query.clone());
            look_up(query, known, &mut answer)
        }
        _ => ResponseCode::FormErr,
    };
    answer
}

/// Adds what is known to an answer.
fn look_up(query: &Query, known: &dyn Fn(&str) -> Known, answer: &mut Message) -> ResponseCode {
    let labels: Vec<&[u8]> = query.name().iter().collect();
    let (Some((last, rest)), Ok(zone)) = (labels.split_last(), Name::from_ascii(ZONE)) else {
        return ResponseCode::Refused;
    };
    if !last.eq_ignore_ascii_case(b"vm") || query.query_class() != DNSClass::IN {
        return ResponseCode::Refused;
    }
    answer.metadata.authoritative = true;
    let kind = query.query_type();
    let is_asked = |of: RecordType| kind == of || kind == RecordType::ANY;
    let record = |data: RData| Record::from_rdata(query.name().clone(), KEPT, data);
    let code = match rest {
        // The zone itself.
        [] => {
            if is_asked(RecordType::SOA) {
                answer.add_answer(record(RData::SOA(soa(&zone))));
            }
            if is_asked(RecordType::NS) {
                answer.add_answer(record(RData::NS(NS(zone.clone()))));
            }
            ResponseCode::NoError
        }
        [name] => match std::str::from_utf8(name).map(|name| known(&name.to_ascii_lowercase())) {
            Ok(Known::Address(address)) => {
                if is_asked(RecordType::A) {
                    answer.add_answer(record(RData::A(A(address))));
                }
                ResponseCode::NoError
            }
            Ok(Known::Name) => ResponseCode::NoError,
            Ok(Known::Nothing) | Err(_) => ResponseCode::NXDomain,
        },
        _ => ResponseCode::NXDomain,
    };
    if answer.answers.is_empty() {
        // Says how long that may be believed.
        let soa = RData::SOA(soa(&zone));
        answer.add_authority(Record::from_rdata(zone, KEPT, soa));
    }
    code
}

fn soa(zone: &Name) -> SOA {
    let seconds = KEPT.cast_signed();
    SOA::new(zone.clone(), zone.clone(), 1, seconds, seconds, seconds, KEPT)
}

/// Who has a port, as far as this user can see.
fn holder(at: SocketAddr) -> Option<String> {
    let (mut uid, mut inode) = (None, None);
    for table in ["udp", "tcp", "udp6", "tcp6"] {
        let text = std::fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
        let found = text.lines().skip(1).find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (local, state) = (words.get(1)?, words.get(3)?);
            let (address, port) = local.split_once(':')?;
            let listens = matches!(*state, "0A" | "07");
            let is_ours = is_address(address, at.ip()) || address.bytes().all(|digit| digit == b'0');
            let is_port = u16::from_str_radix(port, 16) == Ok(at.port());
            (listens && is_ours && is_port)
                .then(|| Some((words.get(7)?.parse::<u32>().ok()?, words.get(9)?.to_string())))?
        });
        if let Some((user, socket)) = found {
            (uid, inode) = (Some(user), Some(socket));
            break;
        }
    }
    let wanted = format!("socket:[{}]", inode?);
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        // Not `self`, nor `thread-self`.
        if !process.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let descriptors = std::fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        let has_it = |descriptor: std::fs::DirEntry| {
            std::fs::read_link(descriptor.path()).is_ok_and(|target| target.as_os_str() == wanted.as_str())
        };
        if descriptors.into_iter().any(has_it) {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!(
                "`{}` (process {})",
                name.trim().escape_debug(),
                process.file_name().display()
            ));
        }
    }
    uid.map(|uid| format!("a process of user {uid}"))
}

fn is_address(text: &str, address: IpAddr) -> bool {
    let IpAddr::V4(address) = address else { return false };
    u32::from_str_radix(text, 16).is_ok_and(|number| Ipv4Addr::from(number.to_ne_bytes()) == address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn question(name: &str, kind: RecordType) -> Message {
        let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message
    }

    fn vms(name: &str) -> Known {
        match name {
            "web" => Known::Address(Ipv4Addr::new(127, 77, 1, 2)),
            "off" => Known::Name,
            _ => Known::Nothing,
        }
    }

    fn ask(message: &Message) -> Message {
        Message::from_vec(&answer(&message.to_vec().unwrap(), &vms).unwrap()).unwrap()
    }

    fn said(name: &str, kind: RecordType) -> String {
        let answer = ask(&question(name, kind));
        let data = |records: &[Record]| {
            records.iter().map(|record| format!(" {}", record.record_type())).collect::<String>()
        };
        let address = answer.answers.iter().find_map(|record| match &record.data {
            RData::A(A(address)) => Some(format!(" {address}")),
            _ => None,
        });
        let authoritative = if answer.metadata.authoritative { " aa" } else { "" };
        format!(
            "{name} {kind}: {:?}{authoritative};{}{};{}",
            answer.metadata.response_code,
            data(&answer.answers),
            address.unwrap_or_default(),
            data(&answer.authorities)
        )
    }

    #[test]
    fn names_of_vms_have_addresses_and_others_do_not_exist() {
        let all = [
            said("web.vm.", RecordType::A),
            said("WeB.Vm.", RecordType::A),
            said("web.vm.", RecordType::ANY),
            said("web.vm.", RecordType::AAAA),
            said("off.vm.", RecordType::A),
            said("none.vm.", RecordType::A),
            said("a.web.vm.", RecordType::A),
            said("vm.", RecordType::SOA),
            said("vm.", RecordType::NS),
            said("vm.", RecordType::A),
            said("example.com.", RecordType::A),
            said(".", RecordType::NS),
        ];
        insta::assert_snapshot!(all.join("\n"), @r"
        web.vm. A: NoError aa; A 127.77.1.2;
        WeB.Vm. A: NoError aa; A 127.77.1.2;
        web.vm. ANY: NoError aa; A 127.77.1.2;
        web.vm. AAAA: NoError aa;; SOA
        off.vm. A: NoError aa;; SOA
        none.vm. A: NXDomain aa;; SOA
        a.web.vm. A: NXDomain aa;; SOA
        vm. SOA: NoError aa; SOA;
        vm. NS: NoError aa; NS;
        vm. A: NoError aa;; SOA
        example.com. A: Refused;;
        . NS: Refused;;
        ");
    }

    #[test]
    fn what_is_no_plain_question_is_told_so_or_ignored() {
        let asked = question("web.vm.", RecordType::A);
        let answered = ask(&asked);
        assert_eq!(
            (answered.metadata.id, answered.queries.len(), answered.metadata.recursion_available),
            (4711, 1, false)
        );
        let mut status = asked.clone();
        status.metadata.op_code = OpCode::Status;
        assert_eq!(ask(&status).metadata.response_code, ResponseCode::NotImp);
        let mut two = asked.clone();
        two.add_query(Query::query(Name::from_ascii("off.vm.").unwrap(), RecordType::A));
        assert_eq!(ask(&two).metadata.response_code, ResponseCode::FormErr);
        let mut later = asked.clone();
        later.set_edns(Edns::new().set_version(7).clone());
        // The same number; the library reads its other meaning.
        assert_eq!(ask(&later).metadata.response_code, ResponseCode::BADSIG);
        assert_eq!(answer(&answered.to_vec().unwrap(), &vms), None, "an answer is not answered");
        assert_eq!(answer(b"short", &vms), None);
    }

    #[test]
    fn it_listens_on_the_loopback_or_not_at_all() {
        let text = |asked| match place(asked) {
            Ok(at) => at.map_or("off".to_owned(), |at| at.to_string()),
            Err(wrong) => wrong,
        };
        assert_eq!(text(None), "127.0.0.1:42069");
        assert_eq!(text(Some("127.0.0.53:5353")), "127.0.0.53:5353");
        assert_eq!(text(Some("off")), "off");
        for wrong in ["0.0.0.0:53", "localhost:53", "127.0.0.1", "127.0.0.1:0", ""] {
            assert_eq!(text(Some(wrong)), format!("`{wrong}` is not an address and port of the loopback"));
        }
    }

    #[test]
    fn who_has_the_port_is_found() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let found = holder(socket.local_addr().unwrap()).unwrap();
        assert!(found.ends_with(&format!("(process {})", std::process::id())), "{found}");
        assert_eq!(holder("127.0.0.1:1".parse().unwrap()), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered_or_ignored(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), plausible in any::<bool>()) {
            if plausible && bytes.len() > 12 {
                bytes[2..12].copy_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 1]);
            }
            let _ = answer(&bytes, &vms);
        }
    }
}
