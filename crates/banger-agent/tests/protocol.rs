//! The agent as the host sees it, over a Unix socket on an ordinary machine: no vm needed.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "a test")]

mod support;

use banger_wire::bytes::ByteString;
use banger_wire::error::ErrorCode;
use banger_wire::exec::{
    ExecSpec, ExitStatus, STDIN, STDOUT, SessionControl, SessionEvent, TerminalSize, WINDOW,
};
use banger_wire::frame::{DATA_LEN_MAX, Decoder, Frame, GUEST_MESSAGE_LEN_MAX, Kind, SYNC};
use banger_wire::guest::{GENERATION, GuestMessage, HostMessage, SessionKind};
use banger_wire::ssh::{KEY_LEN, SshSpec};
use banger_wire::stats::{GUEST_STATS_LEN_MAX, GuestStats};
use sha2::{Digest as _, Sha256};
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

/// No single answer may take longer.
const PATIENCE: Duration = Duration::from_secs(30);

struct Agent {
    process: std::process::Child,
    stream: UnixStream,
    decoder: Decoder,
    _dir: tempfile::TempDir,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[derive(Debug, Default)]
struct Ran {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    event: Option<SessionEvent>,
}

impl Agent {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let listener = UnixListener::bind(&path).unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_banger-agent"));
        let process = command.arg("--socket").arg(&path).env("XDG_RUNTIME_DIR", dir.path()).spawn().unwrap();
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { process, stream, decoder: Decoder::resyncing(GUEST_MESSAGE_LEN_MAX), _dir: dir }
    }

    /// Past the greeting, ready for sessions.
    fn configured() -> Self {
        let mut agent = Self::start();
        let hello = agent.next();
        assert!(matches!(hello.parse(), Ok(GuestMessage::Hello(hello)) if hello.generation == GENERATION));
        agent.stream.write_all(&SYNC).unwrap();
        agent.send(
            &Frame::message(
                0,
                &HostMessage::Configure(Box::new(support::config(vec![("FROM_IMAGE".into(), "1".into())]))),
            )
            .unwrap(),
        );
        while !matches!(agent.next().parse(), Ok(GuestMessage::Configured { .. })) {}
        agent
    }

    fn send(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.stream.write_all(&bytes).unwrap();
    }

    fn next(&mut self) -> Frame {
        let mut chunk = vec![0; DATA_LEN_MAX];
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return frame;
            }
            let len = self.stream.read(&mut chunk).unwrap();
            assert!(len > 0, "the agent closed the connection");
            self.decoder.push(&chunk[..len]);
        }
    }

    fn open(&mut self, spec: ExecSpec) {
        let what = SessionKind::Exec(Box::new(spec));
        self.send(&Frame::message(0, &HostMessage::Open { session: 1, what }).unwrap());
    }

    /// Takes the session's frames until it is closed; `seen` may answer to what was printed so far.
    fn finish(&mut self, mut seen: impl FnMut(&mut Self, &[u8])) -> Ran {
        let mut ran = Ran::default();
        loop {
            let frame = self.next();
            match (frame.session, frame.kind) {
                (1, Kind::Data) => {
                    let to = if frame.channel == STDOUT { &mut ran.stdout } else { &mut ran.stderr };
                    to.extend_from_slice(&frame.payload);
                    let len = u32::try_from(frame.payload.len()).unwrap();
                    self.send(&Frame::credit(1, frame.channel, len));
                    seen(self, &ran.stdout);
                }
                (1, Kind::Message) => ran.event = Some(frame.parse().unwrap()),
                (1, Kind::Close) => return ran,
                _ => {}
            }
        }
    }

    fn run(&mut self, argv: &[&[u8]]) -> Ran {
        self.open(spec(argv));
        self.send(&Frame::eof(1, STDIN));
        self.finish(|_, _| {})
    }
}

fn spec(argv: &[&[u8]]) -> ExecSpec {
    ExecSpec { argv: argv.iter().map(|arg| ByteString(arg.to_vec())).collect(), ..ExecSpec::default() }
}

fn exited(code: u8) -> Option<SessionEvent> {
    Some(SessionEvent::Exited(ExitStatus::Code(code)))
}

#[test]
fn hello_repeats_until_the_host_answers() {
    let mut agent = Agent::start();
    let first = agent.next();
    assert_eq!(agent.next(), first, "the same greeting");
}

#[test]
fn a_ping_is_greeted_at_once() {
    let mut agent = Agent::start();
    let hello = agent.next();
    let begun = Instant::now();
    for seq in 0..20 {
        agent.stream.write_all(&SYNC).unwrap();
        agent.send(&Frame::message(0, &HostMessage::Ping { seq }).unwrap());
        assert_eq!(agent.next(), hello);
    }
    // Unasked, it would have taken 5 s.
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
}

#[test]
fn exit_status_and_separate_streams() {
    let ran = Agent::configured().run(&[b"sh", b"-c", b"echo out; echo err >&2; exit 42"]);
    assert_eq!((&ran.stdout[..], &ran.stderr[..], ran.event), (&b"out\n"[..], &b"err\n"[..], exited(42)));
}

#[test]
fn arguments_arrive_exactly() {
    let ran = Agent::configured().run(&[b"printf", b"%s|", b"a b", b"c'd", b"", b"\xff\n*"]);
    assert_eq!(ran.stdout, b"a b|c'd||\xff\n*|");
}

#[test]
fn death_by_signal() {
    let ran = Agent::configured().run(&[b"sh", b"-c", b"kill -9 $$"]);
    assert_eq!(ran.event, Some(SessionEvent::Exited(ExitStatus::Signal(9))));
}

#[test]
fn missing_and_unusable_programs_are_told_apart() {
    for (program, code) in [
        (&b"no-such-program"[..], ErrorCode::CommandNotFound),
        (b"", ErrorCode::CommandNotFound),
        (b"/etc/passwd", ErrorCode::CommandNotExecutable),
    ] {
        match Agent::configured().run(&[program]).event {
            Some(SessionEvent::Failed(error)) => assert_eq!(error.code, code, "{error}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_images_environment_is_the_base() {
    let mut agent = Agent::configured();
    let env = vec![("MINE".into(), "2".into())];
    agent.open(ExecSpec { env, ..spec(&[b"sh", b"-c", b"echo $FROM_IMAGE $MINE $CARGO"]) });
    assert_eq!(agent.finish(|_, _| {}).stdout, b"1 2\n");
}

#[test]
fn a_missing_directory_is_refused() {
    let mut agent = Agent::configured();
    agent.open(ExecSpec { workdir: Some("/no/such/dir".into()), ..spec(&[b"true"]) });
    match agent.finish(|_, _| {}).event {
        Some(SessionEvent::Failed(error)) => {
            assert_eq!(error.message, "no directory `/no/such/dir` in the guest");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn sixty_four_mebibytes_through_cat_are_exact() {
    const LEN: usize = 64 << 20;
    let mut agent = Agent::configured();
    agent.open(spec(&[b"cat"]));
    let (mut sent, mut window, mut received) = (0, WINDOW as usize, 0);
    let (mut there, mut back) = (Sha256::new(), Sha256::new());
    loop {
        while sent < LEN && window > 0 {
            let len = window.min(DATA_LEN_MAX).min(LEN - sent);
            let bytes: Vec<u8> =
                (sent..sent + len).map(|at| (at.wrapping_mul(0x9e37_79b1) >> 13) as u8).collect();
            there.update(&bytes);
            agent.send(&Frame::data(1, STDIN, bytes));
            (sent, window) = (sent + len, window - len);
            if sent == LEN {
                agent.send(&Frame::eof(1, STDIN));
            }
        }
        let frame = agent.next();
        match (frame.session, frame.kind) {
            (1, Kind::Credit) => {
                window += frame.parse_credit().unwrap() as usize;
                assert!(window <= WINDOW as usize, "granted more than was sent");
            }
            (1, Kind::Data) => {
                back.update(&frame.payload);
                received += frame.payload.len();
                agent.send(&Frame::credit(1, STDOUT, u32::try_from(frame.payload.len()).unwrap()));
            }
            (1, Kind::Close) => break,
            _ => {}
        }
    }
    assert_eq!((received, there.finalize()), (LEN, back.finalize()));
}

#[test]
fn output_stops_at_the_window() {
    let mut agent = Agent::configured();
    agent.open(spec(&[b"cat", b"/dev/zero"]));
    let mut received = 0;
    while received < WINDOW as usize {
        let frame = agent.next();
        received += if frame.kind == Kind::Data { frame.payload.len() } else { 0 };
    }
    assert_eq!(received, WINDOW as usize);
    // The program has more to say, and nothing of it may come before the answer to a ping.
    agent.send(&Frame::message(0, &HostMessage::Ping { seq: 7 }).unwrap());
    assert_eq!(agent.next().parse::<GuestMessage>().unwrap(), GuestMessage::Pong { seq: 7 });
}

#[test]
fn a_background_process_does_not_hold_the_session() {
    let begun = Instant::now();
    let ran = Agent::configured().run(&[b"sh", b"-c", b"sleep 20 & echo done"]);
    assert_eq!((&ran.stdout[..], ran.event), (&b"done\n"[..], exited(0)));
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn closing_a_session_ends_its_processes() {
    let mut agent = Agent::configured();
    agent.open(spec(&[b"sh", b"-c", b"echo $$; trap '' HUP; while :; do sleep 0.1; done"]));
    let pid = loop {
        let frame = agent.next();
        if frame.kind == Kind::Data {
            break String::from_utf8(frame.payload).unwrap().trim().to_owned();
        }
    };
    agent.send(&Frame::close(1));
    let deadline = Instant::now() + PATIENCE;
    while std::path::Path::new("/proc").join(&pid).exists() {
        assert!(Instant::now() < deadline, "process {pid} lives on");
        std::thread::yield_now();
    }
}

#[test]
fn a_terminal_has_its_size_and_takes_a_new_one() {
    let mut agent = Agent::configured();
    let tty = Some(TerminalSize { rows: 33, cols: 77 });
    let script = b"trap 'stty size; exit 0' WINCH; stty size; while :; do sleep 0.05; done";
    agent.open(ExecSpec { tty, ..spec(&[b"sh", b"-c", script]) });
    let ran = agent.finish(|agent, shown| {
        if shown == b"33 77\r\n" {
            let size = SessionControl::Resize(TerminalSize { rows: 50, cols: 132 });
            agent.send(&Frame::message(1, &size).unwrap());
        }
    });
    assert_eq!(String::from_utf8(ran.stdout).unwrap(), "33 77\r\n50 132\r\n");
}

#[test]
fn signals_reach_the_whole_group() {
    let mut agent = Agent::configured();
    agent.open(spec(&[b"sh", b"-c", b"trap 'echo got; exit 3' TERM; sleep 60 & echo up; wait"]));
    let ran = agent.finish(|agent, shown| {
        if shown == b"up\n" {
            agent.send(&Frame::message(1, &SessionControl::Signal(15)).unwrap());
        }
    });
    assert_eq!((&ran.stdout[..], ran.event), (&b"up\ngot\n"[..], exited(3)));
}

#[test]
fn garbage_is_survived_after_a_sync() {
    let mut agent = Agent::configured();
    agent.stream.write_all(&[0xa5; 5000]).unwrap();
    agent.stream.write_all(&SYNC).unwrap();
    assert_eq!(agent.run(&[b"true"]).event, exited(0));
}

#[test]
fn a_client_of_ssh_that_speaks_nonsense_harms_nobody() {
    let mut agent = Agent::configured();
    let key = || ByteString(vec![1; KEY_LEN]);
    let mut nonsense = Vec::new();
    let mut state = 1_u32;
    for round in 0..40 {
        let spec = SshSpec { host_key: key(), client_key: key() };
        let what = SessionKind::Ssh(Box::new(spec));
        agent.send(&Frame::message(0, &HostMessage::Open { session: 1, what }).unwrap());
        nonsense.clear();
        if round % 2 == 1 {
            nonsense.extend(b"SSH-2.0-nonsense\r\n");
        }
        for _ in 0..round * 97 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            nonsense.push((state >> 24) as u8);
        }
        agent.send(&Frame::data(1, STDIN, nonsense.clone()));
        agent.send(&Frame::eof(1, STDIN));
        let ran = agent.finish(|_, _| {});
        // It may end before it could greet.
        assert!(ran.stdout.is_empty() || ran.stdout.starts_with(b"SSH-2.0-banger"), "round {round}");
        assert!(matches!(ran.event, Some(SessionEvent::Exited(ExitStatus::Code(0 | 1)))), "{:?}", ran.event);
    }
    // Keys that are none are no end of the agent either.
    let spec = SshSpec { host_key: ByteString(Vec::new()), client_key: key() };
    let what = SessionKind::Ssh(Box::new(spec));
    agent.send(&Frame::message(0, &HostMessage::Open { session: 1, what }).unwrap());
    assert_eq!(agent.finish(|_, _| {}).event, exited(1));
    assert_eq!(agent.run(&[b"true"]).event, exited(0));
}

#[test]
fn what_is_used_is_told_in_numbers() {
    let mut agent = Agent::configured();
    agent.send(&Frame::message(0, &HostMessage::Open { session: 1, what: SessionKind::Stats }).unwrap());
    let ran = agent.finish(|_, _| {});
    assert_eq!(ran.event, Some(SessionEvent::Exited(ExitStatus::Code(0))));
    assert!(ran.stdout.len() < GUEST_STATS_LEN_MAX);
    let stats: GuestStats = serde_json::from_slice(&ran.stdout).unwrap();
    assert!(stats.uptime_ms > 0 && stats.memory_used_bytes < stats.memory_bytes, "{stats:?}");
    // What is for a machine as a whole is not for this one.
    agent.send(&Frame::message(0, &HostMessage::Signal { number: 15 }).unwrap());
    agent
        .send(&Frame::message(0, &HostMessage::Console { size: TerminalSize { rows: 1, cols: 1 } }).unwrap());
    assert_eq!(agent.run(&[b"true"]).event, Some(SessionEvent::Exited(ExitStatus::Code(0))));
}

/// Asks the ssh agent which keys it has.
const IDENTITIES: [u8; 5] = [0, 0, 0, 1, 11];

#[test]
fn the_ssh_agent_of_the_client_is_there_for_one_command() {
    let mut agent = Agent::configured();
    let script = b"stat -c '%a %u' $SSH_AUTH_SOCK; echo $SSH_AUTH_SOCK; read line";
    agent.open(ExecSpec { forward_agent: true, ..spec(&[b"sh", b"-c", script]) });
    let (mut said, mut path) = (String::new(), None);
    while path.is_none() {
        let frame = agent.next();
        if frame.kind == Kind::Data {
            said.push_str(std::str::from_utf8(&frame.payload).unwrap());
            path = said.strip_suffix('\n').and_then(|said| said.lines().nth(1)).map(str::to_owned);
        }
    }
    let path = path.unwrap();
    let uid = rustix::process::getuid().as_raw();
    assert_eq!(said.lines().next(), Some(&*format!("600 {uid}")));

    // One request is under way at a time, whoever asks.
    let connect = || UnixStream::connect(&path).unwrap();
    let (mut first, mut second) = (connect(), connect());
    first.write_all(&IDENTITIES).unwrap();
    assert_eq!(agent.next(), Frame::data(1, 16, IDENTITIES.to_vec()));
    second.write_all(&IDENTITIES).unwrap();
    agent.send(&Frame::message(0, &HostMessage::Ping { seq: 7 }).unwrap());
    assert_eq!(agent.next().parse::<GuestMessage>().unwrap(), GuestMessage::Pong { seq: 7 });
    agent.send(&Frame::data(1, 16, vec![0, 0, 0]));
    agent.send(&Frame::data(1, 16, vec![2, 12, 34]));
    let mut answer = [0; 6];
    first.read_exact(&mut answer).unwrap();
    assert_eq!(answer, [0, 0, 0, 2, 12, 34]);
    assert_eq!(agent.next(), Frame::data(1, 17, IDENTITIES.to_vec()));
    // One without an answer ends, and gives its channel back once both sides have said so.
    agent.send(&Frame::eof(1, 17));
    assert_eq!(second.read(&mut answer).unwrap(), 0);
    assert_eq!(agent.next(), Frame::eof(1, 17));
    drop(first);
    assert_eq!(agent.next(), Frame::eof(1, 16));
    let mut third = connect();
    third.write_all(&IDENTITIES).unwrap();
    assert_eq!(agent.next(), Frame::data(1, 17, IDENTITIES.to_vec()));
    agent.send(&Frame::eof(1, 16));
    agent.send(&Frame::data(1, 17, vec![0, 0, 0, 1, 5]));
    third.read_exact(&mut answer[..5]).unwrap();

    // The longest message arrives whole, a longer one not at all.
    let mut long = vec![7; 4 + 256 * 1024];
    long[..4].copy_from_slice(&[0, 4, 0, 0]);
    third.write_all(&long).unwrap();
    let mut received = Vec::new();
    while received.len() < long.len() {
        let frame = agent.next();
        assert_eq!((frame.kind, frame.channel), (Kind::Data, 17));
        received.extend(frame.payload);
    }
    assert!(received == long);
    agent.send(&Frame::data(1, 17, vec![0, 0, 0, 1, 5]));
    third.read_exact(&mut answer[..5]).unwrap();
    third.write_all(&[0, 4, 0, 1]).unwrap();
    assert_eq!(third.read(&mut answer).unwrap(), 0);
    assert_eq!(agent.next(), Frame::eof(1, 17));

    // It ends with the command, and so does what uses it.
    let mut last = connect();
    last.write_all(&IDENTITIES).unwrap();
    assert_eq!(agent.next().kind, Kind::Data);
    agent.send(&Frame::eof(1, STDIN));
    assert_eq!(agent.finish(|_, _| {}).event, exited(1));
    assert_eq!(last.read(&mut answer).unwrap(), 0);
    assert!(!std::path::Path::new(&path).parent().unwrap().exists());
}

#[test]
fn more_connections_to_the_ssh_agent_than_there_are_channels_wait() {
    let mut agent = Agent::configured();
    let script = b"printf %s $SSH_AUTH_SOCK; read line";
    agent.open(ExecSpec { forward_agent: true, ..spec(&[b"sh", b"-c", script]) });
    let path = loop {
        let frame = agent.next();
        if frame.kind == Kind::Data {
            break String::from_utf8(frame.payload).unwrap();
        }
    };
    let mut connections: Vec<_> = (0..40).map(|_| UnixStream::connect(&path).unwrap()).collect();
    for connection in &mut connections {
        connection.write_all(&IDENTITIES).unwrap();
    }
    let mut served = 0;
    while served < connections.len() {
        let frame = agent.next();
        assert!((16..48).contains(&frame.channel), "{frame:?}");
        if frame.kind == Kind::Data {
            agent.send(&Frame::data(1, frame.channel, vec![0, 0, 0, 1, 5]));
            // Only with its end another one gets the channel.
            connections[served].read_exact(&mut [0; 5]).unwrap();
            connections[served].shutdown(std::net::Shutdown::Both).unwrap();
            served += 1;
        } else {
            agent.send(&Frame::eof(1, frame.channel));
        }
    }
    agent.send(&Frame::eof(1, STDIN));
    assert_eq!(agent.finish(|_, _| {}).event, exited(1));
}

#[test]
fn without_being_asked_for_there_is_no_ssh_agent() {
    let mut agent = Agent::configured();
    agent.open(spec(&[b"sh", b"-c", b"echo \"<$SSH_AUTH_SOCK>\"; read line"]));
    // Frames for one are nothing.
    agent.send(&Frame::data(1, 16, IDENTITIES.to_vec()));
    let mut seen = false;
    while !seen {
        let frame = agent.next();
        seen = frame.kind == Kind::Data && frame.payload == b"<>\n";
        assert!(!(16..48).contains(&frame.channel));
    }
    agent.send(&Frame::eof(1, STDIN));
    assert_eq!(agent.finish(|_, _| {}).event, exited(1));
}
