//! The agent against whatever its stream may have, for a bounded time: `BANGER_FUZZ_SECONDS`, 1 where it is not set. Runs
//! are the same unless `BANGER_FUZZ_SEED` says otherwise; a failure prints what repeats it.
//!
//! What is opened is from a list, whole, so that nothing is made up that runs or writes.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout, reason = "a test")]

mod support;

use banger_wire::bytes::ByteString;
use banger_wire::exec::{ExecSpec, STDIN, STDOUT, SessionEvent, TerminalSize};
use banger_wire::frame::{DATA_LEN_MAX, Decoder, Frame, GUEST_MESSAGE_LEN_MAX, Kind, SYNC};
use banger_wire::guest::{GuestMessage, HostMessage, SessionKind};
use banger_wire::ssh::{KEY_LEN, SshSpec};
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// No single answer may take longer.
const PATIENCE: Duration = Duration::from_secs(30);
/// The session that has to go on working.
const WITNESS: u32 = 1;
/// What the agent may take of this machine beside its programs, in the worst moment.
const MEMORY_MAX: u64 = 256 << 20;

/// Numbers that look random and are the same each time (xorshift).
struct Rng(u64);

impl Rng {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }

    fn bytes(&mut self, len_max: usize) -> Vec<u8> {
        (0..self.below(len_max + 1)).map(|_| self.below(256) as u8).collect()
    }
}

/// The agent's process, and what it says, which a thread reads so that neither side waits for the other.
struct Agent {
    process: std::process::Child,
    stream: UnixStream,
    said: mpsc::Receiver<Frame>,
    _dir: tempfile::TempDir,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Agent {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let listener = UnixListener::bind(&path).unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_banger-agent"));
        let process = command.arg("--socket").arg(&path).env("XDG_RUNTIME_DIR", dir.path()).spawn().unwrap();
        let (stream, _) = listener.accept().unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut reader = stream.try_clone().unwrap();
        let (say, said) = mpsc::channel();
        std::thread::spawn(move || {
            let mut decoder = Decoder::resyncing(GUEST_MESSAGE_LEN_MAX);
            let mut chunk = vec![0; DATA_LEN_MAX];
            while let Ok(len @ 1..) = reader.read(&mut chunk) {
                decoder.push(&chunk[..len]);
                // Whatever it is told, what it says is whole.
                while let Some(frame) = decoder.next_frame().expect("the agent's own frames") {
                    let _ = say.send(frame);
                }
            }
        });
        let mut agent = Self { process, stream, said, _dir: dir };
        agent.write(&SYNC);
        agent.send(
            &Frame::message(0, &HostMessage::Configure(Box::new(support::config(Vec::new())))).unwrap(),
        );
        agent.wait(|frame| matches!(frame.parse(), Ok(GuestMessage::Configured { .. })));
        agent
    }

    fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    fn send(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.write(&bytes);
    }

    fn open(&mut self, session: u32, what: SessionKind) {
        self.send(&Frame::message(0, &HostMessage::Open { session, what }).unwrap());
    }

    /// Waits for a frame.
    fn wait(&self, mut is_it: impl FnMut(&Frame) -> bool) -> Frame {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let frame = self.said.recv_timeout(left).expect("the agent answers");
            if is_it(&frame) {
                return frame;
            }
        }
    }

    /// Whether the agent, and the session that runs all the time, are as they should be.
    fn still_works(&mut self, seq: u64) {
        self.write(&SYNC);
        self.send(&Frame::message(0, &HostMessage::Ping { seq }).unwrap());
        let text = format!("round {seq}\n").into_bytes();
        self.send(&Frame::data(WITNESS, STDIN, text.clone()));
        let (mut echoed, mut answered) = (Vec::<u8>::new(), false);
        self.wait(|frame| {
            match (frame.session, frame.kind) {
                (WITNESS, Kind::Data) => echoed.extend(&frame.payload),
                (WITNESS, Kind::Message | Kind::Close | Kind::Eof) => panic!("the session ended: {frame:?}"),
                (0, Kind::Message) => {
                    answered |=
                        frame.parse::<GuestMessage>().is_ok_and(|said| said == GuestMessage::Pong { seq });
                }
                _ => {}
            }
            answered && echoed.len() >= text.len()
        });
        assert_eq!(echoed, text);
        self.send(&Frame::credit(WITNESS, STDOUT, u32::try_from(text.len()).unwrap()));
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        let bytes = kib.unwrap().parse::<u64>().unwrap() << 10;
        assert!(bytes < MEMORY_MAX, "the agent has {bytes} bytes");
    }
}

fn exec(argv: &[&str], tty: bool, forward_agent: bool) -> SessionKind {
    let argv = argv.iter().map(|word| ByteString::from(*word)).collect();
    let tty = tty.then_some(TerminalSize { rows: 1, cols: 1 });
    SessionKind::Exec(Box::new(ExecSpec { argv, tty, forward_agent, ..ExecSpec::default() }))
}

/// Something to open that harms nobody, whatever is sent to it.
fn some_session(rng: &mut Rng, dir: &std::path::Path) -> SessionKind {
    let path = || ByteString::from(dir.as_os_str().to_owned());
    let key = || ByteString(vec![1; KEY_LEN]);
    match rng.below(11) {
        0 => exec(&["true"], false, rng.below(2) == 0),
        1 => exec(&["cat"], rng.below(2) == 0, rng.below(2) == 0),
        2 => exec(&["head", "-c", "3000000", "/dev/zero"], false, false),
        3 => exec(&["no-such-program"], false, true),
        4 => SessionKind::Stats,
        5 => SessionKind::Listeners,
        // Nobody listens there.
        6 => SessionKind::Connect { address: "127.0.0.1:1".parse().unwrap() },
        7 => SessionKind::Ssh(Box::new(SshSpec { host_key: key(), client_key: key() })),
        8 => SessionKind::Ssh(Box::new(SshSpec { host_key: ByteString(Vec::new()), client_key: key() })),
        9 => SessionKind::Collect { path: path() },
        _ => SessionKind::CopyOut { path: path(), follow: rng.below(2) == 0 },
    }
}

/// A frame of any kind for a session that may be there; never one that opens anything.
fn some_frame(rng: &mut Rng, sessions: u32) -> Frame {
    let session = WITNESS + 1 + rng.below(sessions as usize + 2) as u32;
    let channel = [0, 1, 2, 3, 16, 30, 47, 48, 255][rng.below(9)];
    match rng.below(8) {
        0 => Frame::data(session, channel, vec![b'x'; DATA_LEN_MAX]),
        1 | 2 => Frame::data(session, channel, rng.bytes(300)),
        3 => Frame::credit(session, channel, u32::MAX >> rng.below(32)),
        4 => Frame::eof(session, channel),
        5 => Frame::close(session),
        6 => {
            let texts: [&[u8]; 6] = [
                b"{\"signal\":15}",
                b"{\"signal\":-1}",
                b"{\"resize\":{\"rows\":0,\"cols\":65535}}",
                b"{}",
                b"[[",
                b"\xff",
            ];
            Frame { session, kind: Kind::Message, channel, payload: texts[rng.below(texts.len())].to_vec() }
        }
        _ => Frame { session, kind: Kind::Credit, channel, payload: rng.bytes(8) },
    }
}

fn play(agent: &mut Agent, rng: &mut Rng, next: &mut u32, dir: &std::path::Path) {
    for _ in 0..rng.below(30) {
        if rng.below(4) == 0 {
            agent.open(WITNESS + 1 + *next, some_session(rng, dir));
            *next += 1;
        } else {
            let frame = some_frame(rng, *next);
            agent.send(&frame);
        }
    }
    // A damaged stream: what it had is lost up to the next mark, if that was not swallowed as well. No longer than this
    // one's length says, so that what follows is read as what it is.
    match rng.below(3) {
        0 => agent.write(&rng.bytes(3000)),
        1 => {
            let mut bytes = Vec::new();
            some_frame(rng, *next).encode(&mut bytes);
            bytes[rng.below(8)] ^= 1 << rng.below(8);
            agent.write(&bytes);
        }
        _ => {}
    }
}

#[test]
fn a_session_goes_on_beside_whatever_the_stream_has() {
    let var = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let time = Duration::from_secs(var("BANGER_FUZZ_SECONDS").unwrap_or(1));
    let first = var("BANGER_FUZZ_SEED").unwrap_or(0);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "content").unwrap();
    let begun = Instant::now();
    let mut count = 0;
    while count == 0 || begun.elapsed() < time {
        let seed = first.wrapping_add(count);
        let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        println!("BANGER_FUZZ_SEED={seed} repeats this round");
        let mut agent = Agent::start();
        agent.open(WITNESS, exec(&["cat"], false, false));
        agent.wait(|frame| matches!(frame.parse(), Ok(SessionEvent::Started { .. })));
        let mut next = 0;
        for step in 0..20 {
            play(&mut agent, &mut rng, &mut next, dir.path());
            agent.still_works(step);
        }
        count += 1;
    }
    println!("{count} rounds");
}
