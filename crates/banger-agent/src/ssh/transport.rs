//! ssh's transport (RFC 4253): version, key exchange, packets. Bytes in, packets out and the other way round; no I/O.
//!
//! One algorithm for each purpose, the ones every OpenSSH since 6.5 has: `curve25519-sha256`, `ssh-ed25519`,
//! `chacha20-poly1305@openssh.com`. The client is the owner's own, started with exactly these, and the stream below is
//! private already, so there is nothing to negotiate about. The arithmetic is `ring`'s. The client alone begins to
//! exchange keys anew, which it does after a gigabyte.

use super::fields::{Fields, Packet};
use banger_wire::ssh::KEY_LEN;
use ring::aead::chacha20_poly1305_openssh as cipher;
use ring::agreement::{EphemeralPrivateKey, UnparsedPublicKey, X25519, agree_ephemeral};
use ring::digest::{Context, SHA256};
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use std::fmt;

const VERSION: &str = concat!("SSH-2.0-banger_", env!("CARGO_PKG_VERSION"));
const KEX: &str = "curve25519-sha256,curve25519-sha256@libssh.org,kex-strict-s-v00@openssh.com";
const HOST_KEY: &str = "ssh-ed25519";
const CIPHER: &str = "chacha20-poly1305@openssh.com";
/// Not used, as the cipher has its own; some clients insist on an agreement.
const MAC: &str = "hmac-sha2-256";
const COMPRESSION: &str = "none";
const STRICT_CLIENT: &str = "kex-strict-c-v00@openssh.com";

/// Longest version line (RFC 4253, section 4.2).
const VERSION_LEN_MAX: usize = 255;
/// Longest packet that is taken: the data of one, and room around it.
const PACKET_LEN_MAX: usize = 64 * 1024;
/// Packets of one direction that a key is good for (RFC 4344, section 3.1, has a new one after 2^31). Their numbers are
/// part of how they are enciphered, so there must not be 2^32. OpenSSH has a new key after as many at the latest.
const PACKETS_MAX: u32 = (1 << 31) + (1 << 20);
/// Packets are filled up to a multiple of this.
const BLOCK: usize = 8;
/// Least filling (RFC 4253, section 6).
const PADDING_MIN: usize = 4;

const DISCONNECT: u8 = 1;
const IGNORE: u8 = 2;
const UNIMPLEMENTED: u8 = 3;
const DEBUG: u8 = 4;
const KEXINIT: u8 = 20;
const NEWKEYS: u8 = 21;
const ECDH_INIT: u8 = 30;
const ECDH_REPLY: u8 = 31;

/// Why a connection ends early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broken {
    /// The client said that it leaves.
    Left,
    /// The client broke the protocol.
    Protocol(&'static str),
}

impl fmt::Display for Broken {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Left => to.write_str("the client left"),
            Self::Protocol(what) => to.write_str(what),
        }
    }
}

#[derive(Debug)]
enum Exchange {
    /// Keys are agreed on, or will be once the client asks.
    Idle,
    /// Both sides have said what they know.
    Begun { client: Vec<u8>, server: Vec<u8>, ignore_next: bool },
    /// What is received after the client's `NEWKEYS` has this key.
    Agreed([u8; cipher::KEY_LEN]),
}

/// One end of a connection, the server's.
pub(crate) struct Transport {
    host_key: Ed25519KeyPair,
    random: SystemRandom,
    /// Received and not understood yet.
    input: Vec<u8>,
    /// To be written.
    output: Vec<u8>,
    client_version: Option<Vec<u8>>,
    exchange: Exchange,
    /// Our `KEXINIT` that waits for the client's.
    offered: Option<Vec<u8>>,
    session_id: Option<[u8; 32]>,
    strict: bool,
    opening: Option<cipher::OpeningKey>,
    sealing: Option<cipher::SealingKey>,
    received: u32,
    sent: u32,
    /// Packets received and sent with the keys there are.
    opened: u32,
    sealed: u32,
}

impl Transport {
    /// Returns a server of this host key, which greets first. None when the seed is no key.
    pub(crate) fn new(seed: &[u8]) -> Option<Self> {
        let host_key = Ed25519KeyPair::from_seed_unchecked(seed).ok()?;
        let mut transport = Self {
            host_key,
            random: SystemRandom::new(),
            input: Vec::new(),
            output: format!("{VERSION}\r\n").into_bytes(),
            client_version: None,
            exchange: Exchange::Idle,
            offered: None,
            session_id: None,
            strict: false,
            opening: None,
            sealing: None,
            received: 0,
            sent: 0,
            opened: 0,
            sealed: 0,
        };
        transport.offer();
        Some(transport)
    }

    /// Takes bytes of the client.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// What is to be written; the caller takes from its front what was.
    pub(crate) fn output(&mut self) -> &mut Vec<u8> {
        &mut self.output
    }

    /// The number of this connection, which a client signs; none before the first exchange.
    pub(crate) fn session_id(&self) -> Option<[u8; 32]> {
        self.session_id
    }

    /// True while nothing may be sent but what belongs to an exchange of keys.
    pub(crate) fn is_exchanging(&self) -> bool {
        self.session_id.is_none() || !matches!(self.exchange, Exchange::Idle)
    }

    /// Returns the next packet that is not the transport's own; none when more bytes are needed.
    pub(crate) fn next(&mut self) -> Result<Option<Vec<u8>>, Broken> {
        loop {
            if self.client_version.is_none() && !self.take_version()? {
                return Ok(None);
            }
            let Some(packet) = self.take_packet()? else { return Ok(None) };
            let kind = packet.first().copied().ok_or(Broken::Protocol("an empty packet"))?;
            let first_exchange = self.session_id.is_none() || matches!(self.exchange, Exchange::Agreed(_));
            match kind {
                DISCONNECT => return Err(Broken::Left),
                IGNORE | UNIMPLEMENTED | DEBUG if !(self.strict && first_exchange) => {}
                KEXINIT => self.begin(packet)?,
                ECDH_INIT => self.agree(&packet)?,
                NEWKEYS => self.use_new_keys()?,
                // The rest of what a transport has: nothing of it is for a server that has said what it knows.
                0..=4 | 7..=49 => return Err(Broken::Protocol("a packet out of order")),
                _ if self.is_exchanging() => {
                    return Err(Broken::Protocol("a packet amid the exchange of keys"));
                }
                _ => return Ok(Some(packet)),
            }
        }
    }

    /// Whether the keys may go on being used.
    ///
    /// # Errors
    /// When the client has not exchanged them for too long.
    pub(crate) fn check_keys(&self) -> Result<(), Broken> {
        match self.opened.max(self.sealed) {
            ..=PACKETS_MAX => Ok(()),
            _ => Err(Broken::Protocol("keys that were used for too long")),
        }
    }

    /// Says that the packet last received is not understood.
    pub(crate) fn refuse_unknown(&mut self) {
        let number = self.received.wrapping_sub(1);
        self.send(&Packet::new(UNIMPLEMENTED).number(number));
    }

    fn take_version(&mut self) -> Result<bool, Broken> {
        let Some(end) = self.input.iter().take(VERSION_LEN_MAX).position(|&byte| byte == b'\n') else {
            return match self.input.len() {
                ..VERSION_LEN_MAX => Ok(false),
                _ => Err(Broken::Protocol("no version")),
            };
        };
        let line: Vec<u8> = self.input.drain(..=end).collect();
        let line = line.strip_suffix(b"\r\n").unwrap_or(&line[..end]).to_vec();
        if !line.starts_with(b"SSH-2.0-") {
            return Err(Broken::Protocol("not a version of ssh"));
        }
        self.client_version = Some(line);
        Ok(true)
    }

    fn take_packet(&mut self) -> Result<Option<Vec<u8>>, Broken> {
        let Some(&first) = self.input.first_chunk::<4>() else { return Ok(None) };
        let plain = match &self.opening {
            Some(key) => key.decrypt_packet_length(self.received, first),
            None => first,
        };
        let len = u32::from_be_bytes(plain) as usize;
        if !(BLOCK..=PACKET_LEN_MAX).contains(&len) {
            return Err(Broken::Protocol("a packet of a length that can't be"));
        }
        let tag_len = if self.opening.is_some() { cipher::TAG_LEN } else { 0 };
        if self.input.len() < 4 + len + tag_len {
            return Ok(None);
        }
        let mut packet: Vec<u8> = self.input.drain(..4 + len).collect();
        let tag: Vec<u8> = self.input.drain(..tag_len).collect();
        if let (Some(key), Some(tag)) = (&self.opening, tag.first_chunk()) {
            key.open_in_place(self.received, &mut packet, tag)
                .map_err(|_| Broken::Protocol("a packet that was changed on its way"))?;
            self.opened += 1;
            self.check_keys()?;
        }
        self.received = self.received.wrapping_add(1);
        let padding = usize::from(packet[4]);
        let end = (4 + len).checked_sub(padding).filter(|&end| end > 5);
        let end = end.ok_or(Broken::Protocol("a packet without a content"))?;
        packet.truncate(end);
        packet.drain(..5);
        Ok(Some(packet))
    }

    /// Puts a packet where it will be written.
    pub(crate) fn send(&mut self, Packet(payload): &Packet) {
        // The length itself counts only where it is not enciphered apart.
        let counted = 1 + payload.len() + if self.sealing.is_some() { 0 } else { 4 };
        let mut padding = BLOCK - counted % BLOCK;
        if padding < PADDING_MIN {
            padding += BLOCK;
        }
        let len = 1 + payload.len() + padding;
        let start = self.output.len();
        self.output.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
        self.output.push(u8::try_from(padding).unwrap_or(u8::MAX));
        self.output.extend(payload);
        let filling = self.output.len();
        self.output.resize(filling + padding, 0);
        // Without random numbers the filling is zeroes, which gives nothing away.
        let _ = self.random.fill(&mut self.output[filling..]);
        if let Some(key) = &self.sealing {
            let mut tag = [0; cipher::TAG_LEN];
            key.seal_in_place(self.sent, &mut self.output[start..], &mut tag);
            self.output.extend(tag);
            self.sealed = self.sealed.saturating_add(1);
        }
        self.sent = self.sent.wrapping_add(1);
    }

    /// Says which algorithms there are.
    fn offer(&mut self) {
        let mut cookie = [0; 16];
        let _ = self.random.fill(&mut cookie);
        let mut packet = Packet::new(KEXINIT).raw(&cookie);
        for list in [KEX, HOST_KEY, CIPHER, CIPHER, MAC, MAC, COMPRESSION, COMPRESSION, "", ""] {
            packet = packet.bytes(list);
        }
        let packet = packet.flag(false).number(0);
        self.send(&packet);
        self.offered = Some(packet.0);
    }

    fn begin(&mut self, client: Vec<u8>) -> Result<(), Broken> {
        if !matches!(self.exchange, Exchange::Idle) {
            return Err(Broken::Protocol("keys are being exchanged already"));
        }
        let parsed = parse_offer(&client).ok_or(Broken::Protocol("an offer that can't be read"))?;
        let Offer { lists, guessed } = parsed;
        let ours = [KEX, HOST_KEY, CIPHER, CIPHER, MAC, MAC, COMPRESSION, COMPRESSION];
        let common = |theirs: &str, ours: &str| {
            theirs
                .split(',')
                .any(|name| !name.starts_with("kex-strict") && ours.split(',').any(|own| own == name))
        };
        // The cipher brings its own check, so there need be no agreement about another.
        let agreed = lists.iter().zip(ours).enumerate();
        if let Some((at, _)) =
            agreed.clone().find(|&(at, (theirs, ours))| !matches!(at, 4 | 5) && !common(theirs, ours))
        {
            return Err(Broken::Protocol(match at {
                0 => "no key exchange in common",
                1 => "no host key algorithm in common",
                2 | 3 => "no cipher in common",
                _ => "no compression in common",
            }));
        }
        let first = |list: &str| list.split(',').next().unwrap_or_default().to_owned();
        let guess_is_right = KEX.split(',').any(|own| own == first(lists[0])) && first(lists[1]) == HOST_KEY;
        if self.session_id.is_none() {
            self.strict = lists[0].split(',').any(|name| name == STRICT_CLIENT);
            if self.strict && self.received != 1 {
                return Err(Broken::Protocol("a packet before the exchange of keys"));
            }
        }
        if self.offered.is_none() {
            self.offer();
        }
        let server = self.offered.take().unwrap_or_default();
        self.exchange = Exchange::Begun { client, server, ignore_next: guessed && !guess_is_right };
        Ok(())
    }

    fn agree(&mut self, packet: &[u8]) -> Result<(), Broken> {
        let Exchange::Begun { client, server, ignore_next } = &mut self.exchange else {
            return Err(Broken::Protocol("half a key without an offer"));
        };
        if std::mem::take(ignore_next) {
            return Ok(());
        }
        let (client, server) = (std::mem::take(client), std::mem::take(server));
        let theirs =
            Fields::of(&packet[1..]).bytes().ok_or(Broken::Protocol("half a key that can't be read"))?;
        let failed = Broken::Protocol("keys could not be agreed on");
        let own = EphemeralPrivateKey::generate(&X25519, &self.random).map_err(|_| failed)?;
        let ours = own.compute_public_key().map_err(|_| failed)?;
        let secret =
            agree_ephemeral(own, &UnparsedPublicKey::new(&X25519, theirs), integer).map_err(|_| failed)?;
        let host_key = Packet::part().bytes(HOST_KEY).bytes(self.host_key.public_key());
        let hash = sha256(&[
            &Packet::part()
                .bytes(self.client_version.as_deref().unwrap_or_default())
                .bytes(VERSION)
                .bytes(client)
                .bytes(server)
                .bytes(&host_key.0)
                .bytes(theirs)
                .bytes(ours.as_ref())
                .0,
            &secret,
        ]);
        let signature = Packet::part().bytes(HOST_KEY).bytes(self.host_key.sign(&hash));
        let session_id = *self.session_id.get_or_insert(hash);
        self.send(&Packet::new(ECDH_REPLY).bytes(&host_key.0).bytes(ours.as_ref()).bytes(&signature.0));
        self.send(&Packet::new(NEWKEYS));
        let key = |letter: u8| -> [u8; cipher::KEY_LEN] {
            let first = sha256(&[&secret, &hash, &[letter], &session_id]);
            let second = sha256(&[&secret, &hash, &first]);
            std::array::from_fn(|at| if at < 32 { first[at] } else { second[at - 32] })
        };
        self.sealing = Some(cipher::SealingKey::new(&key(b'D')));
        self.sealed = 0;
        if self.strict {
            self.sent = 0;
        }
        self.exchange = Exchange::Agreed(key(b'C'));
        Ok(())
    }

    fn use_new_keys(&mut self) -> Result<(), Broken> {
        let Exchange::Agreed(key) = std::mem::replace(&mut self.exchange, Exchange::Idle) else {
            return Err(Broken::Protocol("new keys that were not agreed on"));
        };
        self.opening = Some(cipher::OpeningKey::new(&key));
        self.opened = 0;
        if self.strict {
            self.received = 0;
        }
        Ok(())
    }
}

struct Offer<'a> {
    lists: Vec<&'a str>,
    /// The client's next packet is a guess.
    guessed: bool,
}

fn parse_offer(packet: &[u8]) -> Option<Offer<'_>> {
    let mut fields = Fields::of(packet.get(17..)?);
    let lists = (0..10).map(|_| fields.text()).collect::<Option<Vec<_>>>()?;
    Some(Offer { lists, guessed: fields.flag()? })
}

fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    parts.iter().for_each(|part| context.update(part));
    let digest = context.finish();
    std::array::from_fn(|at| digest.as_ref()[at])
}

/// A positive number as a field: without leading zeroes, with one where its first bit would look like a sign.
fn integer(bytes: &[u8]) -> Vec<u8> {
    let start = bytes.iter().position(|&byte| byte != 0).unwrap_or(bytes.len());
    let mut number = bytes[start..].to_vec();
    if number.first().is_some_and(|&byte| byte & 0x80 != 0) {
        number.insert(0, 0);
    }
    Packet::part().bytes(number).0
}

/// Returns the public key in a field of an Ed25519 key; none when it is one of another kind.
pub(crate) fn public_key(blob: &[u8]) -> Option<&[u8]> {
    let mut fields = Fields::of(blob);
    (fields.bytes()? == HOST_KEY.as_bytes())
        .then(|| fields.bytes())
        .flatten()
        .filter(|key| key.len() == KEY_LEN)
}

/// Returns true when the field `signature` is one of `key` on `signed`.
pub(crate) fn is_signed(key: &[u8], signed: &[u8], signature: &[u8]) -> bool {
    let mut fields = Fields::of(signature);
    let of_kind = fields.bytes() == Some(HOST_KEY.as_bytes());
    let key = ring::signature::UnparsedPublicKey::new(&ring::signature::ED25519, key);
    of_kind && fields.bytes().is_some_and(|signature| key.verify(signed, signature).is_ok())
}

#[cfg(test)]
pub(super) mod client;

#[cfg(test)]
mod tests {
    use super::client::{offer, plain};
    use super::*;
    use proptest::prelude::*;

    fn server() -> Transport {
        Transport::new(&[7; KEY_LEN]).unwrap()
    }

    #[test]
    fn numbers_have_no_sign_and_no_zeroes() {
        for (bytes, field) in [
            (&[0, 0, 1][..], &[0, 0, 0, 1, 1][..]),
            (&[0x80], &[0, 0, 0, 2, 0, 0x80]),
            (&[0, 0], &[0, 0, 0, 0]),
        ] {
            assert_eq!(integer(bytes), field);
        }
    }

    #[test]
    fn what_is_out_of_order_ends_the_connection() {
        let after_version = |payloads: &[&[u8]]| {
            let mut server = server();
            server.push(b"SSH-2.0-test\r\n");
            payloads.iter().for_each(|payload| server.push(&plain(payload)));
            server.next()
        };
        let strict = offer("curve25519-sha256,kex-strict-c-v00@openssh.com");
        for (payloads, why) in [
            (vec![&[NEWKEYS][..]], "new keys that were not agreed on"),
            (vec![&[ECDH_INIT, 0, 0, 0, 0]], "half a key without an offer"),
            (vec![&[5, 0, 0, 0, 0]], "a packet amid the exchange of keys"),
            (vec![&[90, 0, 0, 0, 0]], "a packet amid the exchange of keys"),
            (vec![&[IGNORE, 0, 0, 0, 0], &strict], "a packet before the exchange of keys"),
            (vec![&strict, &[IGNORE, 0, 0, 0, 0]], "a packet out of order"),
            (vec![&strict, &strict], "keys are being exchanged already"),
            (vec![&offer("diffie-hellman-group14-sha256")], "no key exchange in common"),
            (vec![&offer("kex-strict-s-v00@openssh.com")], "no key exchange in common"),
            (vec![&[KEXINIT, 1, 2]], "an offer that can't be read"),
        ] {
            assert_eq!(after_version(&payloads), Err(Broken::Protocol(why)));
        }
        // A key of zeroes would make a secret that everybody knows.
        let zeroes = Packet::new(ECDH_INIT).bytes([0; 32]).0;
        assert_eq!(after_version(&[&strict, &zeroes]), Err(Broken::Protocol("keys could not be agreed on")));
        assert_eq!(after_version(&[&[DISCONNECT, 0, 0, 0, 2]]), Err(Broken::Left));
    }

    #[test]
    fn nothing_is_kept_of_what_is_too_long() {
        let mut first = server();
        first.push(&vec![b'x'; VERSION_LEN_MAX]);
        assert_eq!(first.next(), Err(Broken::Protocol("no version")));
        let mut second = server();
        second.push(b"SSH-2.0-x\n\0\x01\0\x01....");
        assert_eq!(second.next(), Err(Broken::Protocol("a packet of a length that can't be")));
        let mut third = server();
        third.push(b"GET / HTTP/1.1\r\n");
        assert_eq!(third.next(), Err(Broken::Protocol("not a version of ssh")));
    }

    proptest! {
        #[test]
        fn any_bytes_are_packets_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..2048), greets in any::<bool>()) {
            let mut server = server();
            if greets {
                server.push(b"SSH-2.0-x\r\n");
            }
            for part in bytes.chunks(97) {
                server.push(part);
                while let Ok(Some(_)) = server.next() {}
            }
        }

        #[test]
        fn any_packets_are_taken_apart(packets in proptest::collection::vec((0_u8..40, proptest::collection::vec(any::<u8>(), 0..200)), 0..8)) {
            let mut server = server();
            server.push(b"SSH-2.0-x\r\n");
            server.push(&plain(&offer("curve25519-sha256")));
            for (kind, mut rest) in packets {
                rest.insert(0, kind);
                server.push(&plain(&rest));
                while let Ok(Some(_)) = server.next() {}
            }
        }
    }
}
