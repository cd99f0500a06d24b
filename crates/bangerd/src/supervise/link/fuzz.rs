//! A guest that says anything, for a bounded time: `BANGER_FUZZ_SECONDS`, 1 where it is not set. Runs are the same unless
//! `BANGER_FUZZ_SEED` says otherwise; a failure prints what repeats it.

use super::*;
use banger_wire::exec::STDOUT;
use banger_wire::frame::SYNC;
use std::time::Instant;
use tokio::io::AsyncWriteExt as _;

/// Frames of one round.
const FRAMES: usize = 600;
const PATIENCE: Duration = Duration::from_secs(20);

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

/// A frame of one of these sessions, or of none.
fn some_frame(rng: &mut Rng, sessions: &[u32]) -> Frame {
    let session = match rng.below(8) {
        0 => 0,
        1 => u32::MAX - rng.below(10) as u32,
        _ => sessions[rng.below(sessions.len())],
    };
    let channel = [0, 1, 2, 3, 16, 47, 255][rng.below(7)];
    match rng.below(6) {
        0 => Frame::data(session, channel, vec![b'x'; DATA_LEN_MAX]),
        1 => Frame::data(session, channel, rng.bytes(100)),
        2 => Frame::credit(session, channel, u32::MAX >> rng.below(32)),
        3 => Frame::eof(session, channel),
        4 => {
            let texts: [&[u8]; 6] =
                [b"{}", b"null", b"\"init-ready\"", b"{\"exited\":{\"code\":0}}", b"\xff", b""];
            let payload = texts[rng.below(texts.len())].to_vec();
            Frame { session, kind: Kind::Message, channel, payload }
        }
        _ => Frame {
            session,
            kind: Kind::Message,
            channel,
            payload: vec![b'['; rng.below(GUEST_MESSAGE_LEN_MAX)],
        },
    }
}

fn encoded(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    bytes
}

/// Whether no session has more waiting than it may.
fn is_bounded(link: &Link) -> bool {
    link.sessions.borrow().open.values().all(|inbox| *inbox.pending.borrow() <= PENDING_MAX)
}

async fn round(rng: &mut Rng) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent");
    let listener = UnixListener::bind(&path).unwrap();
    let (link, mut messages) = Link::through(Source::Dial(path));
    let (mut guest, _) = listener.accept().await.unwrap();
    // What the guest says about itself is somebody else's to judge.
    tokio::task::spawn_local(async move { while messages.recv().await.is_some() {} });
    let mut witness = link.open(SessionKind::Stats).await.unwrap();
    let mut others = Vec::new();
    for _ in 0..3 {
        others.push(link.open(SessionKind::Stats).await.unwrap());
    }
    let sessions: Vec<u32> = others.iter().map(|session| session.id).collect();

    guest.write_all(&SYNC).await.unwrap();
    // In whole frames it can say what it likes of the others, which nobody reads.
    for number in 0..FRAMES {
        guest.write_all(&encoded(&some_frame(rng, &sessions))).await.unwrap();
        if number % 8 == 0 {
            let said = Frame::data(witness.id, STDOUT, number.to_string().into_bytes());
            guest.write_all(&encoded(&said)).await.unwrap();
            let heard = tokio::time::timeout(PATIENCE, witness.next()).await.expect("it goes on");
            assert_eq!(heard, Some(said));
        }
        assert!(is_bounded(&link));
    }

    // A stream that is damaged itself goes on after the next mark, or ends everything.
    let mut stream = Vec::new();
    for _ in 0..rng.below(6) {
        stream.extend(encoded(&some_frame(rng, &sessions)));
    }
    for _ in 0..=rng.below(6) {
        let at = rng.below(stream.len() + 1);
        match rng.below(4) {
            0 => stream.truncate(at),
            1 if at < stream.len() => stream[at] ^= 1 << rng.below(8),
            2 => stream.splice(at..at, SYNC).for_each(drop),
            _ => {
                let bytes = rng.bytes(64);
                stream.splice(at..at, bytes).for_each(drop);
            }
        }
    }
    let _ = guest.write_all(&stream).await;
    drop(guest);
    let ended = async { while witness.next().await.is_some() {} };
    tokio::time::timeout(PATIENCE, ended).await.expect("the end is told");
    assert!(is_bounded(&link));
}

#[test]
fn a_guest_that_says_anything_is_bounded_and_touches_no_other_session() {
    let var = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let time = Duration::from_secs(var("BANGER_FUZZ_SECONDS").unwrap_or(1));
    let first = var("BANGER_FUZZ_SEED").unwrap_or(0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let begun = Instant::now();
    let mut count = 0;
    while count == 0 || begun.elapsed() < time {
        let seed = first.wrapping_add(count);
        let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            tokio::task::LocalSet::new().block_on(&runtime, round(&mut rng));
        }));
        assert!(played.is_ok(), "repeat with BANGER_FUZZ_SEED={seed}");
        count += 1;
    }
}
