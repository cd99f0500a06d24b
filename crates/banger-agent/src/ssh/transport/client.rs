//! The other end, for tests: a client that has agreed on keys and sends what it is told to.

use super::*;

/// A client with keys.
pub(crate) struct Client {
    opening: cipher::OpeningKey,
    sealing: cipher::SealingKey,
    sent: u32,
    received: u32,
    input: Vec<u8>,
}

/// A packet as it is before there are keys.
pub(crate) fn plain(payload: &[u8]) -> Vec<u8> {
    let padding = 4 + (BLOCK - (5 + payload.len() + 4) % BLOCK) % BLOCK;
    let len = (1 + payload.len() + padding) as u32;
    [&len.to_be_bytes()[..], &[padding as u8], payload, &vec![0; padding]].concat()
}

/// A client's offer of these ways to agree on keys, and of everything else that the server has.
pub(crate) fn offer(kex: &str) -> Vec<u8> {
    let mut packet = Packet::new(KEXINIT).raw(&[0; 16]);
    for list in [kex, HOST_KEY, CIPHER, CIPHER, MAC, MAC, COMPRESSION, COMPRESSION, "", ""] {
        packet = packet.bytes(list);
    }
    packet.flag(false).number(0).0
}

/// Takes the content of the first plain packet off `bytes`.
fn take_plain(bytes: &mut Vec<u8>) -> Vec<u8> {
    let len = u32::from_be_bytes(*bytes.first_chunk().unwrap()) as usize;
    let packet: Vec<u8> = bytes.drain(..4 + len).collect();
    packet[5..packet.len() - usize::from(packet[4])].to_vec()
}

impl Client {
    /// Agrees on keys with a server that nobody has spoken to.
    pub(crate) fn meet(server: &mut Transport) -> Self {
        const GREETING: &[u8] = b"SSH-2.0-test";
        let ours = offer("curve25519-sha256,kex-strict-c-v00@openssh.com");
        let own = EphemeralPrivateKey::generate(&X25519, &SystemRandom::new()).unwrap();
        let half = own.compute_public_key().unwrap();
        server.push(&[GREETING, b"\r\n"].concat());
        server.push(&plain(&ours));
        server.push(&plain(&Packet::new(ECDH_INIT).bytes(half.as_ref()).0));
        server.push(&plain(&[NEWKEYS]));
        assert_eq!(server.next(), Ok(None));
        let mut said = std::mem::take(server.output());
        let end = said.iter().position(|&byte| byte == b'\n').unwrap();
        let greeting: Vec<u8> = said.drain(..=end).collect();
        let theirs = take_plain(&mut said);
        let reply = take_plain(&mut said);
        assert_eq!((reply[0], take_plain(&mut said)), (ECDH_REPLY, vec![NEWKEYS]));
        let mut fields = Fields::of(&reply[1..]);
        let (host_key, other_half) = (fields.bytes().unwrap(), fields.bytes().unwrap());
        let secret = agree_ephemeral(own, &UnparsedPublicKey::new(&X25519, other_half), integer).unwrap();
        let hash = sha256(&[
            &Packet::part()
                .bytes(GREETING)
                .bytes(greeting.trim_ascii_end())
                .bytes(&ours)
                .bytes(&theirs)
                .bytes(host_key)
                .bytes(half.as_ref())
                .bytes(other_half)
                .0,
            &secret,
        ]);
        assert!(is_signed(public_key(host_key).unwrap(), &hash, fields.bytes().unwrap()));
        let key = |letter: u8| -> [u8; cipher::KEY_LEN] {
            let first = sha256(&[&secret, &hash, &[letter], &hash]);
            let second = sha256(&[&secret, &hash, &first]);
            std::array::from_fn(|at| if at < 32 { first[at] } else { second[at - 32] })
        };
        let (opening, sealing) = (cipher::OpeningKey::new(&key(b'D')), cipher::SealingKey::new(&key(b'C')));
        Self { opening, sealing, sent: 0, received: 0, input: Vec::new() }
    }

    /// Sends a packet.
    pub(crate) fn send(&mut self, server: &mut Transport, payload: &[u8]) {
        let padding = 4 + (BLOCK - (1 + payload.len() + 4) % BLOCK) % BLOCK;
        let len = (1 + payload.len() + padding) as u32;
        let mut packet = [&len.to_be_bytes()[..], &[padding as u8], payload, &vec![0; padding]].concat();
        let mut tag = [0; cipher::TAG_LEN];
        self.sealing.seal_in_place(self.sent, &mut packet, &mut tag);
        self.sent += 1;
        server.push(&[&packet[..], &tag].concat());
    }

    /// Returns the packets that the server has to write.
    pub(crate) fn take(&mut self, server: &mut Transport) -> Vec<Vec<u8>> {
        self.input.append(server.output());
        let mut packets = Vec::new();
        while let Some(&first) = self.input.first_chunk() {
            let len = u32::from_be_bytes(self.opening.decrypt_packet_length(self.received, first)) as usize;
            let mut packet: Vec<u8> = self.input.drain(..4 + len).collect();
            let tag: Vec<u8> = self.input.drain(..cipher::TAG_LEN).collect();
            self.opening.open_in_place(self.received, &mut packet, tag.first_chunk().unwrap()).unwrap();
            self.received += 1;
            packets.push(packet[5..packet.len() - usize::from(packet[4])].to_vec());
        }
        packets
    }
}

#[test]
fn keys_are_not_used_for_too_long() {
    for wear in [
        |server: &mut Transport| server.opened = PACKETS_MAX,
        |server: &mut Transport| server.sealed = PACKETS_MAX + 1,
    ] {
        let mut server = Transport::new(&[7; KEY_LEN]).unwrap();
        let mut client = Client::meet(&mut server);
        client.send(&mut server, &[90, 1]);
        assert_eq!(server.next(), Ok(Some(vec![90, 1])));
        wear(&mut server);
        client.send(&mut server, &[90, 1]);
        assert_eq!(server.next(), Err(Broken::Protocol("keys that were used for too long")));
    }
}
