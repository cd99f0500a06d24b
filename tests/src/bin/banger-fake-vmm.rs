//! What runs a vm in the simulation, in QEMU's place.
//!
//! It takes QEMU's arguments, makes the two sockets these name, and is on them what QEMU and the guest's agent are: it
//! greets, is configured, has every command succeed but those that end with `exit N`, and ends when it is asked to shut down. It has no
//! processor, no disk and no network; it holds the vm's disk open, as it was given it. What it is good for is the host's
//! side of a vm, thousands of times.
//!
//! With some sizes of memory it is a machine or a guest that is broken or means harm:
//!
//! | MiB | | what it does |
//! |---|---|---|
//! | 301 | ends | says something and ends with status 3, before anything else |
//! | 302 | panics | has a kernel that panics, and is reset |
//! | 303 | no-root | can't be configured |
//! | 304 | silent | the agent never says a word, the kernel does |
//! | 305 | garbage | once configured, sends bytes without meaning and without end |
//! | 306 | flood | once configured, sends messages and data without end |
//! | 307 | deaf | once configured, reads nothing any more |
//! | 308 | chatty | writes 64 MiB on the console before anything else |

use banger_wire::exec::{ExitStatus, SessionEvent};
use banger_wire::frame::{Decoder, Frame, Kind, MESSAGE_LEN_MAX, SYNC};
use banger_wire::guest::{GENERATION, GuestMessage, Hello, HostMessage, SessionKind};
use std::io::{self, BufRead as _, BufReader, Read as _, Write};
use std::os::unix::net::{UnixListener, UnixStream};

/// As much of QEMU's greeting as anybody reads.
const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": []}}"#;

fn main() -> io::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let value = |flag: &str| args.windows(2).find(|pair| pair[0] == flag).map(|pair| pair[1].as_str());
    let agent =
        value("-chardev").and_then(|text| text.split(',').find_map(|part| part.strip_prefix("path=")));
    let control = value("-qmp").and_then(|text| text.strip_prefix("unix:")?.split(',').next());
    let (Some(agent), Some(control)) = (agent, control) else {
        return Err(io::Error::other("arguments as for a vm, please"));
    };
    for old in [agent, control] {
        // Of a boot before.
        let _ = std::fs::remove_file(old);
    }
    let (agent, control) = (UnixListener::bind(agent)?, UnixListener::bind(control)?);
    let memory = value("-m").and_then(|text| text.parse::<usize>().ok()).unwrap_or(0);
    let behaviour = *BEHAVIOURS.get(memory.wrapping_sub(BEHAVIOURS_FROM)).unwrap_or(&"");
    let mut console = io::stdout();
    console.write_all(b"a machine that is none\n")?;
    match behaviour {
        "ends" => {
            console.write_all(b"out of luck\n")?;
            std::process::exit(3);
        }
        "panics" => {
            let (stream, _) = control.accept()?;
            console.write_all(b"[    0.1] Kernel panic - not syncing: no luck\n")?;
            writeln!(&stream, "{GREETING}\n{RESET}")?;
            return Ok(());
        }
        "chatty" => {
            for _ in 0..CHATTY_LINES {
                console.write_all(&[b'a'; 1023])?;
                console.write_all(b"\n")?;
            }
        }
        _ => {}
    }
    std::thread::spawn(move || control.accept().and_then(|(stream, _)| monitor(stream)));
    Guest { stream: agent.accept()?.0, behaviour }.run()
}

/// The smallest memory with a meaning, in MiB, and what each means.
const BEHAVIOURS_FROM: usize = 301;
const BEHAVIOURS: [&str; 8] = ["ends", "panics", "no-root", "silent", "garbage", "flood", "deaf", "chatty"];
/// Of 1 KiB.
const CHATTY_LINES: usize = 64 << 10;
/// What QEMU says of a guest that resets its machine.
const RESET: &str = r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}"#;

/// Answers every command with nothing.
fn monitor(mut stream: UnixStream) -> io::Result<()> {
    writeln!(stream, "{GREETING}")?;
    let lines = BufReader::new(stream.try_clone()?).lines();
    for line in lines {
        line?;
        writeln!(stream, "{{\"return\": {{}}}}")?;
    }
    Ok(())
}

struct Guest {
    stream: UnixStream,
    behaviour: &'static str,
}

impl Guest {
    fn run(mut self) -> io::Result<()> {
        let hello =
            Hello { generation: GENERATION, kernel: "none".to_owned(), uptime_ms: 0, timings: Vec::new() };
        if self.behaviour != "silent" {
            self.say(&GuestMessage::Hello(hello))?;
        }
        let mut decoder = Decoder::resyncing(MESSAGE_LEN_MAX);
        let mut bytes = [0; 4096];
        loop {
            while let Some(frame) = decoder.next_frame().map_err(io::Error::other)? {
                if frame.session == 0 && frame.kind == Kind::Message {
                    let message = frame.parse().map_err(io::Error::other)?;
                    if !self.answer(message)? {
                        return Ok(());
                    }
                }
            }
            let len = self.stream.read(&mut bytes)?;
            if len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            decoder.push(&bytes[..len]);
        }
    }

    /// Returns false when that was the last word.
    fn answer(&mut self, message: HostMessage) -> io::Result<bool> {
        match message {
            HostMessage::Configure(_) if self.behaviour == "no-root" => {
                let (stage, message) = ("mount image".to_owned(), "no root".to_owned());
                self.say(&GuestMessage::ConfigureFailed { stage, message })?;
            }
            HostMessage::Configure(_) => {
                let (timings, warnings) = (Vec::new(), Vec::new());
                self.say(&GuestMessage::Configured { boot_id: "none".to_owned(), timings, warnings })?;
                self.say(&GuestMessage::InitReady)?;
                self.misbehave()?;
            }
            HostMessage::Open { session, what: SessionKind::Exec(spec) } => {
                let last = spec.argv.last().map(|word| String::from_utf8_lossy(&word.0).into_owned());
                let code =
                    last.as_deref().and_then(|word| word.strip_prefix("exit ")?.parse().ok()).unwrap_or(0);
                for event in [SessionEvent::Started { pid: 1 }, SessionEvent::Exited(ExitStatus::Code(code))]
                {
                    self.send(&Frame::message(session, &event).map_err(io::Error::other)?)?;
                }
                self.send(&Frame::close(session))?;
            }
            HostMessage::Ping { seq } => self.say(&GuestMessage::Pong { seq })?,
            HostMessage::Sync => self.say(&GuestMessage::Synced)?,
            HostMessage::Shutdown { reboot } => {
                self.say(&GuestMessage::GoingDown { reboot })?;
                return Ok(false);
            }
            HostMessage::Open { .. }
            | HostMessage::Heartbeat { .. }
            | HostMessage::Signal { .. }
            | HostMessage::Console { .. } => {}
        }
        Ok(true)
    }

    /// Does not return, unless it is well.
    fn misbehave(&mut self) -> io::Result<()> {
        match self.behaviour {
            "garbage" => loop {
                self.stream.write_all(&[0x5a; 4096])?;
            },
            "flood" => loop {
                self.say(&GuestMessage::Pong { seq: 0 })?;
                self.say(&GuestMessage::InitReady)?;
                for session in 0..4 {
                    self.send(&Frame::data(session, 1, vec![b'a'; 60_000]))?;
                }
            },
            "deaf" => loop {
                std::thread::park();
            },
            _ => Ok(()),
        }
    }

    fn say(&mut self, message: &GuestMessage) -> io::Result<()> {
        self.stream.write_all(&SYNC)?;
        self.send(&Frame::message(0, message).map_err(io::Error::other)?)
    }

    fn send(&mut self, frame: &Frame) -> io::Result<()> {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.stream.write_all(&bytes)
    }
}
