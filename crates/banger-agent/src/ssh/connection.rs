//! The connection of somebody who is in (RFC 4254): channels, and what is asked of them.
//!
//! A channel gets more room once its bytes were passed on, so that each waits for its own reader and for nobody else's.

use super::fields::{Fields, Packet};
use super::forward::{self, Listening};
use super::session::{Program, Session, Voice};
use super::stream::{self, DATA_LEN_MAX, Ends, Event, Events, Grant, Reader, WINDOW, Writer};
use super::transport::{Broken, Transport};
use crate::command::Defaults;
use crate::users::User;
use std::collections::HashMap;
use std::rc::Rc;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

const GLOBAL_REQUEST: u8 = 80;
const REQUEST_SUCCESS: u8 = 81;
const REQUEST_FAILURE: u8 = 82;
const OPEN: u8 = 90;
const OPEN_CONFIRMATION: u8 = 91;
const OPEN_FAILURE: u8 = 92;
const WINDOW_ADJUST: u8 = 93;
const DATA: u8 = 94;
const EXTENDED_DATA: u8 = 95;
const EOF: u8 = 96;
const CLOSE: u8 = 97;
const REQUEST: u8 = 98;
const SUCCESS: u8 = 99;
const FAILURE: u8 = 100;

/// Reasons not to open a channel (RFC 4254, section 5.1).
const CONNECT_FAILED: u32 = 2;
const UNKNOWN_KIND: u32 = 3;
const NO_ROOM: u32 = 4;

/// Channels at a time. A browser that goes through `ssh -D` opens many.
const CHANNELS_MAX: usize = 512;
/// Places to listen at.
const LISTENING_MAX: usize = 64;

#[derive(Debug)]
enum Purpose {
    Session(Box<Session>),
    /// Bytes from and to somewhere.
    Stream,
}

/// How far a channel is.
enum Stage {
    /// Asked for by the client; what it is to be connected to is being connected.
    Connecting,
    /// Asked for by us; the client has not answered.
    Asked {
        streams: (Reader, Writer),
    },
    Open,
}

struct Channel {
    /// The client's number for it.
    remote: u32,
    stage: Stage,
    purpose: Purpose,
    grant: Rc<Grant>,
    /// Takes what is received, until the client says that that was all.
    input: Option<mpsc::UnboundedSender<Vec<u8>>>,
    /// What `input` leads to, until somebody takes it.
    queue: Option<mpsc::UnboundedReceiver<Vec<u8>>>,
    /// What the client may still send.
    room: u32,
    /// Passed on, and not granted anew yet.
    consumed: u32,
    /// We have said that it is closed.
    is_closing: bool,
    task: Option<AbortHandle>,
}

impl Channel {
    fn new(remote: u32, grant: Rc<Grant>, stage: Stage, purpose: Purpose) -> Self {
        let (input, queue) = mpsc::unbounded_channel();
        Self {
            remote,
            stage,
            purpose,
            grant,
            input: Some(input),
            queue: Some(queue),
            room: WINDOW,
            consumed: 0,
            is_closing: false,
            task: None,
        }
    }

    fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Open)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.task.iter().for_each(AbortHandle::abort);
        if let Purpose::Session(session) = &mut self.purpose {
            session.end();
        }
    }
}

/// A place the client has us listen at, as it named it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Place {
    Tcp(String, u32),
    Unix(String),
}

/// Everything of one user's connection.
pub(crate) struct Connection {
    user: User,
    defaults: Defaults,
    events: Events,
    channels: HashMap<u32, Channel>,
    next: u32,
    listening: HashMap<Place, Listening>,
    /// The client has said that it opens no more sessions.
    has_all_sessions: bool,
}

const UNREADABLE: Broken = Broken::Protocol("a packet that can't be read");

impl Connection {
    pub(crate) fn new(user: User, defaults: Defaults, events: Events) -> Self {
        let (channels, listening) = (HashMap::new(), HashMap::new());
        Self { user, defaults, events, channels, next: 0, listening, has_all_sessions: false }
    }

    /// Ends what runs for the client, which is gone.
    pub(crate) fn end(&mut self) {
        self.channels.clear();
        self.listening.clear();
    }

    /// Answers a packet.
    ///
    /// # Errors
    /// When the client broke the protocol.
    pub(crate) fn answer(&mut self, packet: &[u8], to: &mut Transport) -> Result<(), Broken> {
        let mut fields = Fields::of(packet);
        match fields.byte().ok_or(UNREADABLE)? {
            GLOBAL_REQUEST => self.global_request(fields, to).ok_or(UNREADABLE),
            OPEN if self.has_all_sessions && fields.clone().text() == Some("session") => {
                // Whoever asks is not the client as it was begun, which OpenSSH's server takes for an attack as well.
                Err(Broken::Protocol("a session more than the client said it would open"))
            }
            OPEN => self.open(fields, to).ok_or(UNREADABLE),
            kind @ OPEN_CONFIRMATION..=FAILURE => {
                let number = fields.number().ok_or(UNREADABLE)?;
                // A channel that was closed meanwhile may still be spoken of.
                let Some(channel) = self.channels.get_mut(&number) else { return Ok(()) };
                match kind {
                    OPEN_CONFIRMATION if !matches!(channel.stage, Stage::Asked { .. }) => {
                        Err(Broken::Protocol("a channel that was not asked for"))
                    }
                    OPEN_CONFIRMATION => self.confirmed(number, fields).ok_or(UNREADABLE),
                    OPEN_FAILURE if matches!(channel.stage, Stage::Asked { .. }) => {
                        self.channels.remove(&number);
                        Ok(())
                    }
                    WINDOW_ADJUST => {
                        channel.grant.add(fields.number().ok_or(UNREADABLE)?);
                        Ok(())
                    }
                    DATA => received(channel, fields.bytes().ok_or(UNREADABLE)?),
                    // A client has no second stream.
                    EXTENDED_DATA => Err(Broken::Protocol("extended data of a client")),
                    EOF => {
                        channel.input = None;
                        Ok(())
                    }
                    CLOSE => {
                        self.close(number, to);
                        Ok(())
                    }
                    REQUEST if channel.is_open() && !channel.is_closing => {
                        self.request(number, fields, to).ok_or(UNREADABLE)
                    }
                    _ => Ok(()),
                }
            }
            // Somebody who is in is not asked again.
            50..=79 => Ok(()),
            _ => {
                to.refuse_unknown();
                Ok(())
            }
        }
    }

    /// Does what a channel's task has to tell.
    pub(crate) fn tell(&mut self, event: Event, to: &mut Transport) {
        match event {
            Event::Send { channel, packet } => {
                if self.channels.get(&channel).is_some_and(|channel| !channel.is_closing) {
                    to.send(&packet);
                }
            }
            Event::Consumed { channel, len } => {
                let Some(channel) = self.channels.get_mut(&channel).filter(|channel| !channel.is_closing)
                else {
                    return;
                };
                channel.consumed += u32::try_from(len).unwrap_or(0);
                if channel.consumed >= WINDOW / 2 && channel.input.is_some() {
                    to.send(&Packet::new(WINDOW_ADJUST).number(channel.remote).number(channel.consumed));
                    channel.room += std::mem::take(&mut channel.consumed);
                }
            }
            Event::Ended { channel } => {
                if let Some(channel) = self.channels.get_mut(&channel)
                    && !channel.is_closing
                {
                    channel.is_closing = true;
                    to.send(&Packet::new(CLOSE).number(channel.remote));
                }
            }
            Event::Connected { channel: number, streams } => {
                let Some(channel) = self.channels.get_mut(&number) else { return };
                match streams {
                    Ok(streams) => {
                        channel.stage = Stage::Open;
                        to.send(&confirmation(number, channel.remote));
                        self.carry(number, streams);
                    }
                    Err(why) => {
                        to.send(&refusal(channel.remote, CONNECT_FAILED, &why));
                        self.channels.remove(&number);
                    }
                }
            }
            Event::Accepted { kind, details, streams } => {
                // Without room for it, the streams are closed.
                if self.channels.len() < CHANNELS_MAX {
                    let channel =
                        Channel::new(0, Grant::new(0, 0), Stage::Asked { streams }, Purpose::Stream);
                    let number = self.add(channel);
                    let open = Packet::new(OPEN).bytes(kind).number(number).number(WINDOW);
                    to.send(&open.number(DATA_LEN_MAX as u32).raw(&details.0));
                }
            }
        }
    }

    fn add(&mut self, channel: Channel) -> u32 {
        while self.channels.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        self.channels.insert(number, channel);
        number
    }

    fn open(&mut self, mut fields: Fields<'_>, to: &mut Transport) -> Option<()> {
        let kind = fields.text()?;
        let remote = fields.number()?;
        let (window, piece_len_max) = (fields.number()?, fields.number()?);
        if self.channels.len() >= CHANNELS_MAX {
            to.send(&refusal(remote, NO_ROOM, "too many channels"));
            return Some(());
        }
        let grant = Grant::new(window, piece_len_max);
        let begin = |connection: &mut Self, stage, purpose| {
            connection.add(Channel::new(remote, Rc::clone(&grant), stage, purpose))
        };
        match kind {
            "session" => {
                let number = begin(self, Stage::Open, Purpose::Session(Box::default()));
                to.send(&confirmation(number, remote));
            }
            "direct-tcpip" => {
                let (host, port) = (fields.text()?.to_owned(), fields.number()?);
                let number = begin(self, Stage::Connecting, Purpose::Stream);
                self.connect(number, async move { forward::connect_tcp(&host, port).await });
            }
            "direct-streamlocal@openssh.com" => {
                let path = fields.text()?.to_owned();
                let number = begin(self, Stage::Connecting, Purpose::Stream);
                self.connect(number, async move { forward::connect_unix(&path).await });
            }
            _ => to.send(&refusal(remote, UNKNOWN_KIND, "there are no such channels here")),
        }
        Some(())
    }

    fn connect(
        &mut self,
        number: u32,
        work: impl Future<Output = Result<(Reader, Writer), String>> + 'static,
    ) {
        let events = self.events.clone();
        let task = async move {
            let streams = work.await;
            let _ = events.send(Event::Connected { channel: number, streams }).await;
        };
        self.work(number, tokio::task::spawn_local(task).abort_handle());
    }

    fn work(&mut self, number: u32, task: AbortHandle) {
        if let Some(channel) = self.channels.get_mut(&number) {
            channel.task = Some(task);
        }
    }

    fn confirmed(&mut self, number: u32, mut fields: Fields<'_>) -> Option<()> {
        let (remote, window, piece_len_max) = (fields.number()?, fields.number()?, fields.number()?);
        let channel = self.channels.get_mut(&number)?;
        if let Stage::Asked { streams } = std::mem::replace(&mut channel.stage, Stage::Open) {
            channel.remote = remote;
            channel.grant = Grant::new(window, piece_len_max);
            self.carry(number, streams);
        }
        Some(())
    }

    /// Carries bytes between a channel and the streams it is for, until both directions have ended.
    fn carry(&mut self, number: u32, (reader, writer): (Reader, Writer)) {
        let Some(channel) = self.channels.get_mut(&number) else { return };
        let Some(queue) = channel.queue.take() else { return };
        let ends = Ends { local: number, remote: channel.remote };
        let (grant, events) = (Rc::clone(&channel.grant), self.events.clone());
        let task = async move {
            let out = async {
                stream::pump(reader, ends, None, grant, events.clone()).await;
                let packet = Packet::new(EOF).number(ends.remote);
                let _ = events.send(Event::Send { channel: number, packet }).await;
            };
            tokio::join!(out, stream::feed(writer, queue, number, events.clone(), &[]));
            let _ = events.send(Event::Ended { channel: number }).await;
        };
        self.work(number, tokio::task::spawn_local(task).abort_handle());
    }

    fn close(&mut self, number: u32, to: &mut Transport) {
        if let Some(channel) = self.channels.remove(&number)
            && !channel.is_closing
        {
            to.send(&Packet::new(CLOSE).number(channel.remote));
        }
    }

    fn request(&mut self, number: u32, mut fields: Fields<'_>, to: &mut Transport) -> Option<()> {
        let (kind, wants_answer) = (fields.text()?, fields.flag()?);
        let channel = self.channels.get_mut(&number)?;
        let remote = channel.remote;
        let program = match kind {
            "shell" => Some(Program::Shell),
            "exec" => Some(Program::Command(fields.bytes()?.to_vec())),
            "subsystem" => (fields.bytes()? == b"sftp").then_some(Program::Files),
            _ => None,
        };
        let Purpose::Session(session) = &mut channel.purpose else { return Some(()) };
        let done = match (kind, &program) {
            (_, Some(_)) => (!session.has_begun() && channel.queue.is_some()).then_some(()),
            ("env", _) => session.set_env(&mut fields),
            ("pty-req", _) => session.set_terminal(&mut fields),
            ("window-change", _) => session.resize(&mut fields),
            ("signal", _) => session.signal(&mut fields),
            ("auth-agent-req@openssh.com", _) => {
                session.agent = forward::listen_agent(&self.events).ok();
                session.agent.is_some().then_some(())
            }
            _ => None,
        };
        if wants_answer {
            to.send(&Packet::new(if done.is_some() { SUCCESS } else { FAILURE }).number(remote));
        }
        if let (Some(()), Some(program)) = (done, program)
            && let Some(input) = channel.queue.take()
        {
            let (grant, events) = (Rc::clone(&channel.grant), self.events.clone());
            let voice = Voice { ends: Ends { local: number, remote }, grant, events };
            channel.task = Some(session.start(&program, (&self.user, &self.defaults), input, voice));
        }
        Some(())
    }

    fn global_request(&mut self, mut fields: Fields<'_>, to: &mut Transport) -> Option<()> {
        let (kind, wants_answer) = (fields.text()?, fields.flag()?);
        let answer = match kind {
            "tcpip-forward" => {
                let place = Place::Tcp(fields.text()?.to_owned(), fields.number()?);
                self.listen(place)
            }
            "streamlocal-forward@openssh.com" => self.listen(Place::Unix(fields.text()?.to_owned())),
            "cancel-tcpip-forward" => self.cancel(&Place::Tcp(fields.text()?.to_owned(), fields.number()?)),
            "cancel-streamlocal-forward@openssh.com" => self.cancel(&Place::Unix(fields.text()?.to_owned())),
            // Of clients that are nobody's control master (OpenSSH's `PROTOCOL`, section 2.2). OpenSSH's own says it only to
            // servers of its kind.
            "no-more-sessions@openssh.com" => {
                self.has_all_sessions = true;
                Some(Packet::new(REQUEST_SUCCESS))
            }
            // That somebody answers is all that a client wants to know that asks whether anybody is there.
            _ => None,
        };
        if wants_answer {
            to.send(&answer.unwrap_or_else(|| Packet::new(REQUEST_FAILURE)));
        }
        Some(())
    }

    fn listen(&mut self, place: Place) -> Option<Packet> {
        if self.listening.len() >= LISTENING_MAX || self.listening.contains_key(&place) {
            return None;
        }
        let (place, listening, answer) = match place {
            Place::Tcp(host, asked) => {
                let (listening, port) = forward::listen_tcp(&host, asked, &self.events).ok()?;
                let answer = Packet::new(REQUEST_SUCCESS);
                let answer = if asked == 0 { answer.number(port.into()) } else { answer };
                (Place::Tcp(host, port.into()), listening, answer)
            }
            Place::Unix(path) => {
                let listening = forward::listen_unix(&path, &self.events).ok()?;
                (Place::Unix(path), listening, Packet::new(REQUEST_SUCCESS))
            }
        };
        self.listening.insert(place, listening);
        Some(answer)
    }

    fn cancel(&mut self, place: &Place) -> Option<Packet> {
        self.listening.remove(place).map(|_| Packet::new(REQUEST_SUCCESS))
    }
}

fn received(channel: &mut Channel, bytes: &[u8]) -> Result<(), Broken> {
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    channel.room = channel.room.checked_sub(len).ok_or(Broken::Protocol("more data than was granted"))?;
    // Nothing takes no room, so there may be any number of it.
    if let Some(input) = channel.input.as_ref().filter(|_| len > 0) {
        // A channel whose reader has gone keeps its room used, which stops the client.
        let _ = input.send(bytes.to_vec());
    }
    Ok(())
}

fn confirmation(number: u32, remote: u32) -> Packet {
    Packet::new(OPEN_CONFIRMATION).number(remote).number(number).number(WINDOW).number(DATA_LEN_MAX as u32)
}

fn refusal(remote: u32, reason: u32, why: &str) -> Packet {
    Packet::new(OPEN_FAILURE).number(remote).number(reason).bytes(why).bytes("")
}

#[cfg(test)]
impl Connection {
    /// Whether everything that is counted is within its limits.
    pub(super) fn is_bounded(&self) -> bool {
        let room = |channel: &Channel| channel.room <= WINDOW && channel.consumed <= WINDOW;
        self.channels.len() <= CHANNELS_MAX
            && self.listening.len() <= LISTENING_MAX
            && self.channels.values().all(room)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use banger_sys::child::Identity;

    fn connection() -> (Connection, Transport, mpsc::Receiver<Event>) {
        let (events, told) = mpsc::channel(1);
        let identity = Identity { uid: 0, gid: 0, groups: Vec::new() };
        let user = User { name: "root".into(), identity, home: "/".into(), shell: String::new() };
        let transport = Transport::new(&[1; 32]).unwrap();
        (Connection::new(user, Defaults::default(), events), transport, told)
    }

    /// What was answered, before there are keys, so that it can be read.
    fn said(to: &mut Transport) -> Vec<u8> {
        std::mem::take(to.output())
    }

    fn open() -> Vec<u8> {
        Packet::new(OPEN).bytes("session").number(7).number(1000).number(1000).0
    }

    #[test]
    fn room_is_given_when_bytes_were_passed_on_and_not_before() {
        let (mut connection, mut to, _told) = connection();
        connection.answer(&open(), &mut to).unwrap();
        let data = Packet::new(DATA).number(0).bytes(vec![0; DATA_LEN_MAX]).0;
        said(&mut to);
        for _ in 0..WINDOW as usize / DATA_LEN_MAX {
            connection.answer(&data, &mut to).unwrap();
        }
        assert!(said(&mut to).is_empty());
        assert_eq!(connection.answer(&data, &mut to), Err(Broken::Protocol("more data than was granted")));
        connection.tell(Event::Consumed { channel: 0, len: WINDOW as usize / 2 - 1 }, &mut to);
        assert!(said(&mut to).is_empty(), "a little is not worth a packet");
        connection.tell(Event::Consumed { channel: 0, len: 1 }, &mut to);
        let grant = Packet::new(WINDOW_ADJUST).number(7).number(WINDOW / 2).0;
        assert!(said(&mut to).windows(grant.len()).any(|part| part == grant));
        for _ in 0..WINDOW as usize / 2 / DATA_LEN_MAX {
            connection.answer(&data, &mut to).unwrap();
        }
        assert!(connection.answer(&data, &mut to).is_err());
    }

    #[test]
    fn channels_and_their_number_end() {
        let (mut connection, mut to, _told) = connection();
        for _ in 0..2 * CHANNELS_MAX {
            connection.answer(&open(), &mut to).unwrap();
        }
        assert_eq!(connection.channels.len(), CHANNELS_MAX);
        for number in 0..2 * CHANNELS_MAX as u32 {
            connection.answer(&Packet::new(CLOSE).number(number).0, &mut to).unwrap();
        }
        assert!(connection.channels.is_empty());
        // Of a channel that has gone, or was never there, nothing is heard any more.
        for kind in OPEN_CONFIRMATION..=FAILURE {
            assert_eq!(connection.answer(&Packet::new(kind).number(3).0, &mut to), Ok(()));
        }
    }

    #[test]
    fn a_channel_that_has_gone_says_nothing_more() {
        let (mut connection, mut to, _told) = connection();
        let late = || Event::Send { channel: 0, packet: Packet::new(DATA).number(7).bytes("late") };
        connection.answer(&open(), &mut to).unwrap();
        said(&mut to);
        connection.tell(late(), &mut to);
        assert!(!said(&mut to).is_empty());
        // The client's number may be another channel's by now.
        connection.answer(&Packet::new(CLOSE).number(0).0, &mut to).unwrap();
        said(&mut to);
        connection.tell(late(), &mut to);
        assert!(said(&mut to).is_empty());
        connection.answer(&open(), &mut to).unwrap();
        connection.tell(Event::Ended { channel: 1 }, &mut to);
        said(&mut to);
        connection.tell(Event::Send { channel: 1, packet: Packet::new(EOF).number(7) }, &mut to);
        let request = Packet::new(REQUEST).number(1).bytes("signal").flag(true).bytes("TERM").0;
        connection.answer(&request, &mut to).unwrap();
        assert!(said(&mut to).is_empty());
    }

    #[test]
    fn no_session_is_opened_after_the_last_one() {
        let (mut connection, mut to, _told) = connection();
        connection.answer(&open(), &mut to).unwrap();
        let no_more =
            |answer| Packet::new(GLOBAL_REQUEST).bytes("no-more-sessions@openssh.com").flag(answer).0;
        said(&mut to);
        connection.answer(&no_more(false), &mut to).unwrap();
        assert!(said(&mut to).is_empty());
        connection.answer(&no_more(true), &mut to).unwrap();
        assert!(said(&mut to).contains(&REQUEST_SUCCESS));
        let why = Broken::Protocol("a session more than the client said it would open");
        assert_eq!(connection.answer(&open(), &mut to), Err(why));
        assert_eq!(connection.channels.len(), 1);
        // Its forwards go on, and so does the session that it has.
        let socket = Packet::new(OPEN).bytes("direct-streamlocal@openssh.com").number(8).number(9).number(9);
        let socket = socket.bytes("/nonexistent").0;
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let forwarding = async { connection.answer(&socket, &mut to) };
        assert_eq!(tokio::task::LocalSet::new().block_on(&runtime, forwarding), Ok(()));
        assert_eq!(connection.channels.len(), 2);
        let signal = Packet::new(REQUEST).number(0).bytes("signal").flag(true).bytes("TERM").0;
        said(&mut to);
        connection.answer(&signal, &mut to).unwrap();
        assert!(!said(&mut to).is_empty());
    }

    #[test]
    fn what_was_not_asked_for_is_not_confirmed() {
        let (mut connection, mut to, _told) = connection();
        connection.answer(&open(), &mut to).unwrap();
        let confirmation = Packet::new(OPEN_CONFIRMATION).number(0).number(1).number(1).number(1).0;
        let why = Broken::Protocol("a channel that was not asked for");
        assert_eq!(connection.answer(&confirmation, &mut to), Err(why));
    }

    #[test]
    fn what_takes_no_room_is_not_kept() {
        let (mut connection, mut to, _told) = connection();
        connection.answer(&open(), &mut to).unwrap();
        let nothing = Packet::new(DATA).number(0).bytes("").0;
        (0..1000).for_each(|_| connection.answer(&nothing, &mut to).unwrap());
        let queue = connection.channels[&0].queue.as_ref().unwrap();
        assert_eq!(queue.len(), 0);
        // Variables are bounded, too, all of them together.
        let variable =
            Packet::new(REQUEST).number(0).bytes("env").flag(true).bytes("A").bytes([b'a'; 50_000]).0;
        let taken = (0..20).filter(|_| {
            said(&mut to);
            connection.answer(&variable, &mut to).unwrap();
            let answer = Packet::new(SUCCESS).number(7).0;
            said(&mut to).windows(answer.len()).any(|part| part == answer)
        });
        assert_eq!(taken.count(), 5);
    }

    proptest::proptest! {
        // Requests that start something are left out: any bytes may be a command.
        #[test]
        fn any_packets_have_an_answer_or_are_the_end(
            packets in proptest::collection::vec(
                (80_u8..98, proptest::collection::vec(0_u8..4, 0..40)),
                0..20,
            ),
        ) {
            let (mut connection, mut to, _told) = connection();
            connection.answer(&open(), &mut to).unwrap();
            for (kind, rest) in packets {
                let _ = connection.answer(&Packet::new(kind).raw(&rest).0, &mut to);
            }
        }
    }
}
