//! The server against packets of any kind and order, for a bounded time each: `BANGER_FUZZ_SECONDS`, 1 where it is not
//! set. Runs are the same unless `BANGER_FUZZ_SEED` says otherwise; a failure prints what repeats it.
//!
//! Nothing in here makes up commands or paths: what is run is from a list, and what is written is in directories of the
//! tests' own.

use super::auth::Door;
use super::connection::Connection;
use super::fields::{Fields, Packet};
use super::stream::{DATA_LEN_MAX, Event, WINDOW};
use super::transport::client::{Client, offer, plain};
use super::transport::{Broken, Transport};
use super::{EVENTS, Server, Stage};
use crate::command::Defaults;
use crate::users::User;
use banger_sys::child::Identity;
use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// What numbers in protocols go wrong at.
pub(super) const NUMBERS: [u64; 10] =
    [0, 1, 2, 0x7f, 0xff, 0x7fff, 0x7fff_ffff, 0xffff_ffff, i64::MAX as u64, u64::MAX];
/// No answer within a server may take this long.
const PATIENCE: Duration = Duration::from_secs(20);
/// What one packet of a client, of 64 KiB at most, may have the server say at once.
const ANSWERS_LEN_MAX: usize = 128 * 1024;
/// The client's number for the channel that has to go on working.
const WITNESS: u32 = 1_000_000;

/// Numbers that look random and are the same each time (xorshift).
pub(super) struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below this one.
    pub(super) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// A number that something may go wrong at.
    pub(super) fn number(&mut self) -> u64 {
        match self.below(3) {
            0 => self.next(),
            1 => self.below(20) as u64,
            _ => NUMBERS[self.below(NUMBERS.len())],
        }
    }

    fn bytes(&mut self, len_max: usize) -> Vec<u8> {
        (0..self.below(len_max + 1)).map(|_| self.next() as u8).collect()
    }

    fn pick<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.below(of.len())]
    }
}

/// Says which round it was that panicked.
struct Round<'a>(&'a str, u64);

impl Drop for Round<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: repeat with BANGER_FUZZ_SEED={}", self.0, self.1);
        }
    }
}

/// Repeats `work` for its time.
pub(super) fn rounds(name: &str, mut work: impl FnMut(&mut Rng)) {
    let var = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let time = Duration::from_secs(var("BANGER_FUZZ_SECONDS").unwrap_or(1));
    let first = var("BANGER_FUZZ_SEED").unwrap_or(0);
    let begun = Instant::now();
    let mut count = 0;
    while count == 0 || begun.elapsed() < time {
        let round = Round(name, first.wrapping_add(count));
        work(&mut Rng(round.1.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1));
        count += 1;
    }
    println!("{name}: {count} rounds");
}

#[test]
fn whatever_comes_before_the_keys_is_answered_or_the_end() {
    let ecdh = Packet::new(30).bytes([9; 32]).0;
    let packets =
        [offer("curve25519-sha256,kex-strict-c-v00@openssh.com"), offer("curve25519-sha256"), ecdh, vec![21]];
    rounds("before the keys", |rng| {
        let mut stream = b"SSH-2.0-fuzz\r\n".to_vec();
        for _ in 0..rng.below(6) {
            let packet = match rng.below(3) {
                0 => [vec![rng.below(256) as u8], rng.bytes(300)].concat(),
                _ => packets[rng.below(packets.len())].clone(),
            };
            stream.extend(plain(&packet));
        }
        for _ in 0..rng.below(4) {
            let at = rng.below(stream.len());
            match rng.below(4) {
                0 => stream[at] ^= 1 << rng.below(8),
                1 => stream.truncate(at + 1),
                2 => drop(stream.splice(at..at, rng.bytes(40))),
                _ => stream.splice(at.., (rng.number() as u32).to_be_bytes()).for_each(drop),
            }
        }
        let mut server = Transport::new(&[7; 32]).unwrap();
        let mut door = Door::new(vec![1; 32]);
        for part in stream.chunks(1 + rng.below(200)) {
            server.push(part);
            loop {
                match server.next() {
                    Err(_) => return,
                    Ok(None) => break,
                    Ok(Some(packet)) => {
                        // Nobody has a key to come in with.
                        let id = server.session_id().unwrap();
                        let answer = door.answer(&packet, &id, Path::new("/nonexistent"));
                        assert!(!matches!(answer, Some(super::auth::Outcome::In(..))));
                    }
                }
            }
            assert!(server.output().len() < ANSWERS_LEN_MAX);
        }
    });
}

fn user() -> User {
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let identity = Identity { uid, gid, groups: vec![gid] };
    User { name: uid.to_string(), identity, home: "/".to_owned(), shell: "/bin/sh".to_owned() }
}

/// Something that belongs to some stage of a connection.
fn any_packet(rng: &mut Rng) -> Vec<u8> {
    match rng.below(7) {
        0 => Packet::new(5).bytes(rng.pick(&["ssh-userauth", "ssh-connection", ""])).0,
        1 | 2 => {
            let method = rng.pick(&["none", "password", "publickey", "hostbased", "keyboard-interactive"]);
            let packet = Packet::new(50).bytes(rng.pick(&["root", "", "0", "\u{1b}"]));
            let packet = packet.bytes(rng.pick(&["ssh-connection", "ssh-userauth"])).bytes(method);
            let blob = Packet::part().bytes("ssh-ed25519").bytes([1; 32]).0;
            let signature = Packet::part().bytes("ssh-ed25519").bytes(vec![2; rng.below(70)]).0;
            let packet = packet.flag(rng.below(2) == 0).bytes("ssh-ed25519").bytes(blob);
            if rng.below(2) == 0 { packet.bytes(signature).0 } else { packet.0 }
        }
        3 => vec![rng.pick(&[&[52_u8][..], &[51], &[60], &[53], &[6]])[0]],
        4 => Packet::new(90).bytes("session").number(1).number(1).number(1).0,
        5 => Packet::new(80).bytes("tcpip-forward").flag(true).bytes("localhost").number(0).0,
        _ => [vec![rng.below(256) as u8], rng.bytes(60)].concat(),
    }
}

#[test]
fn no_order_of_packets_lets_anybody_in() {
    rounds("at the door", |rng| {
        let mut transport = Transport::new(&[7; 32]).unwrap();
        let mut client = Client::meet(&mut transport);
        let (events, _told) = mpsc::channel(EVENTS);
        // A point that no private key is known of.
        let stage = Stage::Door(Door::new(vec![1; 32]), Defaults::default());
        let mut server = Server { transport, stage, events, root: Path::new("/nonexistent") };
        for _ in 0..80 {
            client.send(&mut server.transport, &any_packet(rng));
            let answered = loop {
                match server.transport.next() {
                    Ok(Some(packet)) => match server.answer(&packet) {
                        Ok(()) => {}
                        ended => break ended,
                    },
                    Ok(None) => break Ok(()),
                    Err(broken) => break Err(broken),
                }
            };
            assert!(matches!(server.stage, Stage::Door(..)), "somebody is in");
            assert!(server.transport.output().len() < ANSWERS_LEN_MAX);
            if answered.is_err() {
                return;
            }
        }
    });
}

/// What the client knows of its channels, each of which has a number of its own.
#[derive(Debug, PartialEq, Eq)]
enum Known {
    Asked,
    Open {
        local: u32,
    },
    /// The server has said that it is closed, or that there is none.
    Gone,
}

/// A client that is in, with a channel to a program that sends everything back.
struct Talk<'a> {
    server: Server<'a>,
    told: mpsc::Receiver<Event>,
    client: Client,
    known: HashMap<u32, Known>,
    echoed: Vec<u8>,
    answers: usize,
}

impl Talk<'_> {
    fn new() -> Self {
        let mut transport = Transport::new(&[7; 32]).unwrap();
        let client = Client::meet(&mut transport);
        let (events, told) = mpsc::channel(EVENTS);
        let connection = Connection::new(user(), Defaults::default(), events.clone());
        let server =
            Server { transport, stage: Stage::In(Box::new(connection)), events, root: Path::new("/") };
        let (known, echoed) = (HashMap::new(), Vec::new());
        Self { server, told, client, known, echoed, answers: 0 }
    }

    fn send(&mut self, packet: &[u8]) -> Result<(), Broken> {
        self.client.send(&mut self.server.transport, packet);
        while let Some(packet) = self.server.transport.next()? {
            self.server.answer(&packet)?;
        }
        let len = self.server.transport.output().len();
        assert!(len < ANSWERS_LEN_MAX, "{len} bytes of answers to one packet");
        self.listen();
        Ok(())
    }

    /// Does what channels have to tell.
    async fn turn(&mut self) {
        for _ in 0..4 {
            tokio::task::yield_now().await;
        }
        if self.server.transport.is_exchanging() {
            return;
        }
        while let (Ok(event), Stage::In(connection)) = (self.told.try_recv(), &mut self.server.stage) {
            connection.tell(event, &mut self.server.transport);
            assert!(connection.is_bounded());
        }
        self.listen();
    }

    /// Hears what the server says, all of which has to be about what the client knows.
    fn listen(&mut self) {
        for packet in self.client.take(&mut self.server.transport) {
            let mut fields = Fields::of(&packet);
            match fields.byte().unwrap() {
                3 | 20 => {}
                81 | 82 => self.answers += 1,
                90 => {}
                kind @ 91..=100 => {
                    let number = fields.number().unwrap();
                    let known = self.known.get_mut(&number).expect("a channel of the client's");
                    match (kind, &known) {
                        (91, Known::Asked) => *known = Known::Open { local: fields.number().unwrap() },
                        (92 | 97, Known::Asked) | (97, Known::Open { .. }) => *known = Known::Gone,
                        (94, Known::Open { .. }) if number == WITNESS => {
                            self.echoed.extend(fields.bytes().unwrap());
                        }
                        (93..=96 | 98..=100, Known::Open { .. }) => {}
                        about => panic!("packet {about:?} for channel {number}"),
                    }
                }
                kind => panic!("a packet of the kind {kind}"),
            }
        }
    }

    /// Whether the program that sends everything back does so still, and the server answers.
    async fn still_works(&mut self, text: &[u8]) -> Result<(), Broken> {
        let Some(&Known::Open { local }) = self.known.get(&WITNESS) else {
            panic!("the witness is not open")
        };
        self.send(&Packet::new(94).number(local).bytes(text).0)?;
        let before = self.answers;
        self.send(&Packet::new(80).bytes("keepalive@openssh.com").flag(true).0)?;
        assert_eq!(self.answers, before + 1);
        let deadline = Instant::now() + PATIENCE;
        while self.echoed.len() < text.len() {
            assert!(Instant::now() < deadline, "another channel does not go on");
            self.turn().await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(std::mem::take(&mut self.echoed), text);
        Ok(())
    }

    fn open(&mut self, number: u32, kind: &str, rest: &[u8], window: u32, piece: u32) -> Result<(), Broken> {
        self.known.insert(number, Known::Asked);
        self.send(&Packet::new(90).bytes(kind).number(number).number(window).number(piece).raw(rest).0)
    }

    /// Some channel's number at the server, never that of the witness.
    fn some_channel(&self, rng: &mut Rng) -> u32 {
        let mut numbers: Vec<u32> = self
            .known
            .iter()
            .filter(|(number, _)| **number != WITNESS)
            .filter_map(|(_, known)| match known {
                Known::Open { local } => Some(*local),
                _ => None,
            })
            .collect();
        numbers.sort_unstable();
        if numbers.is_empty() || rng.below(8) == 0 {
            1 + rng.number() as u32 % 0x7fff_ffff
        } else {
            numbers[rng.below(numbers.len())]
        }
    }

    /// Says one thing, sensible or not.
    fn say(&mut self, rng: &mut Rng, number: u32, dir: &Path) -> Result<(), Broken> {
        let inside = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        let channel = self.some_channel(rng);
        match rng.below(24) {
            0..=3 => {
                let window = rng.pick(&[&0, &1, &100, &WINDOW, &u32::MAX]);
                let piece = rng.pick(&[&0, &1, &100, &(DATA_LEN_MAX as u32), &u32::MAX]);
                self.open(number, "session", &[], *window, *piece)
            }
            4 => {
                // Nobody listens there.
                let host = rng.pick(&["127.0.0.1", "--help", "::1", ""]);
                let rest = Packet::part().bytes(host).number(rng.pick(&[&1, &70_000]).to_owned());
                let rest = rest.bytes("127.0.0.1").number(1);
                if host.is_empty() {
                    return Ok(());
                }
                self.open(number, "direct-tcpip", &rest.0, WINDOW, 100)
            }
            5 => {
                let rest = Packet::part().bytes(inside("nobody")).bytes("").number(0);
                self.open(number, "direct-streamlocal@openssh.com", &rest.0, WINDOW, 100)
            }
            6 => self.open(
                number,
                rng.pick(&["x11", "", "forwarded-tcpip", "auth-agent@openssh.com"]),
                &rng.bytes(30),
                1,
                1,
            ),
            7 | 8 => self.send(&Packet::new(93).number(channel).number(rng.number() as u32).0),
            9..=11 => {
                let len = *rng.pick(&[&0, &1, &1000, &DATA_LEN_MAX, &40_000]);
                self.send(&Packet::new(94).number(channel).bytes(vec![b'x'; len]).0)
            }
            12 => self.send(&Packet::new(96).number(channel).0),
            13 | 14 => self.send(&Packet::new(97).number(channel).0),
            15..=17 => {
                let command =
                    rng.pick(&["true", "cat", "exit 3", "head -c 300000 /dev/zero", "sleep 1", "kill -9 $$"]);
                self.send(
                    &Packet::new(98).number(channel).bytes("exec").flag(rng.below(2) == 0).bytes(command).0,
                )
            }
            18 => {
                let (kind, rest) = match rng.below(6) {
                    0 => ("env", Packet::part().bytes(rng.bytes(20)).bytes(rng.bytes(2000)).0),
                    1 => (
                        "pty-req",
                        Packet::part()
                            .bytes("vt")
                            .number(rng.number() as u32)
                            .number(1)
                            .number(1)
                            .number(1)
                            .bytes(rng.bytes(60))
                            .0,
                    ),
                    2 => ("window-change", rng.bytes(20)),
                    3 => ("signal", Packet::part().bytes(rng.pick(&["KILL", "TERM", "NONE", ""])).0),
                    4 => ("auth-agent-req@openssh.com", Vec::new()),
                    _ => ("x11-req", rng.bytes(40)),
                };
                self.send(&Packet::new(98).number(channel).bytes(kind).flag(rng.below(2) == 0).raw(&rest).0)
            }
            19 => {
                let (kind, rest) = match rng.below(6) {
                    0 => (
                        "tcpip-forward",
                        Packet::part().bytes(rng.pick(&["localhost", "127.0.0.1", "no address"])).number(0).0,
                    ),
                    1 => (
                        "streamlocal-forward@openssh.com",
                        Packet::part().bytes(inside(rng.pick(&["l1", "l2", "no/l3"]))).0,
                    ),
                    2 => (
                        "cancel-streamlocal-forward@openssh.com",
                        Packet::part().bytes(inside(rng.pick(&["l1", "l2"]))).0,
                    ),
                    3 => ("cancel-tcpip-forward", rng.bytes(30)),
                    // Seldom, as the next session is the end.
                    4 if rng.below(20) == 0 => ("no-more-sessions@openssh.com", rng.bytes(10)),
                    _ => ("hostkeys-prove-00@openssh.com", rng.bytes(10)),
                };
                self.send(&Packet::new(80).bytes(kind).flag(rng.below(2) == 0).raw(&rest).0)
            }
            20 => self.send(
                &[vec![rng.pick(&[&2_u8, &4, &99, &100, &127, &200, &255]).to_owned()], rng.bytes(40)]
                    .concat(),
            ),
            // Seldom, as most of these are the end.
            21 if rng.below(20) == 0 => match any_packet(rng) {
                // The client has to know of its channels.
                packet if packet[0] == 90 => Ok(()),
                packet => self.send(&packet),
            },
            22 if rng.below(20) == 0 => self.send(&[vec![91 + rng.below(10) as u8], rng.bytes(20)].concat()),
            23 if rng.below(30) == 0 => self.send(&offer("curve25519-sha256")),
            _ => Ok(()),
        }
    }
}

#[test]
fn channels_go_on_beside_whatever_a_client_says() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    rounds("channels", |rng| {
        let dir = tempfile::tempdir().unwrap();
        let tasks = tokio::task::LocalSet::new();
        let talking = async {
            let mut talk = Talk::new();
            talk.open(WITNESS, "session", &[], u32::MAX, DATA_LEN_MAX as u32)?;
            let Some(&Known::Open { local }) = talk.known.get(&WITNESS) else { panic!("no channel") };
            talk.send(&Packet::new(98).number(local).bytes("exec").flag(false).bytes("exec cat").0)?;
            for number in 0..150 {
                talk.say(rng, number, dir.path())?;
                if rng.below(3) == 0 {
                    talk.turn().await;
                }
            }
            // Keys that the client has begun to exchange, and then nothing more of it, hold up what it asked for.
            if !talk.server.transport.is_exchanging() {
                talk.still_works(b"and this comes back").await?;
            }
            if let Stage::In(connection) = &mut talk.server.stage {
                connection.end();
            }
            Ok::<_, Broken>(())
        };
        let _ = tasks.block_on(&runtime, talking);
    });
}

#[test]
fn whoever_does_not_come_in_is_not_waited_for() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let ((input, _open), (_read, output)) = (pipe(), pipe());
        let mut input = tokio::net::unix::pipe::Receiver::from_owned_fd(input).unwrap();
        let mut output = tokio::net::unix::pipe::Sender::from_owned_fd(output).unwrap();
        let (events, told) = mpsc::channel(EVENTS);
        let stage = Stage::Door(Door::new(vec![1; 32]), Defaults::default());
        let transport = Transport::new(&[7; 32]).unwrap();
        let mut server = Server { transport, stage, events, root: Path::new("/nonexistent") };
        let patience = Duration::from_millis(50);
        let ended = server.exchange((&mut input, &mut output), told, patience).await;
        assert_eq!(ended, Err(Broken::Protocol("nobody came in")));
    });
}
