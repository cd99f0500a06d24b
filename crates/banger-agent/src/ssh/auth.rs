//! Who comes in (RFC 4252): whoever has the one key, as a user of the image.

use super::fields::{Fields, Packet};
use super::transport::{is_signed, public_key};
use crate::users::{self, User};
use std::path::Path;

const SERVICE_REQUEST: u8 = 5;
const SERVICE_ACCEPT: u8 = 6;
const REQUEST: u8 = 50;
const FAILURE: u8 = 51;
const SUCCESS: u8 = 52;
const BANNER: u8 = 53;
const KEY_IS_FINE: u8 = 60;
const AUTH_SERVICE: &str = "ssh-userauth";
const CONNECTION_SERVICE: &str = "ssh-connection";
/// A client has some keys to try; one that goes on trying is broken.
const TRIES_MAX: u32 = 64;

/// What an answer leads to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Nothing yet.
    Answer(Vec<Packet>),
    /// This user is in.
    In(Box<User>, Packet),
}

/// The part of a connection in which nobody is in yet.
#[derive(Debug)]
pub(crate) struct Door {
    client_key: Vec<u8>,
    tries: u32,
}

impl Door {
    pub(crate) fn new(client_key: Vec<u8>) -> Self {
        Self { client_key, tries: 0 }
    }

    /// Answers a packet; none when there is no answer but the connection's end.
    pub(crate) fn answer(&mut self, packet: &[u8], session_id: &[u8; 32], root: &Path) -> Option<Outcome> {
        let mut fields = Fields::of(packet);
        match fields.byte()? {
            SERVICE_REQUEST if fields.text()? == AUTH_SERVICE => {
                Some(Outcome::Answer(vec![Packet::new(SERVICE_ACCEPT).bytes(AUTH_SERVICE)]))
            }
            REQUEST => {
                self.tries += 1;
                let (user, service) = (fields.text()?, fields.text()?);
                (self.tries <= TRIES_MAX && service == CONNECTION_SERVICE)
                    .then(|| self.request(packet, user, fields, session_id, root))
                    .flatten()
            }
            _ => None,
        }
    }

    fn request(
        &self,
        packet: &[u8],
        user: &str,
        mut fields: Fields<'_>,
        session_id: &[u8; 32],
        root: &Path,
    ) -> Option<Outcome> {
        let refused = Packet::new(FAILURE).bytes("publickey").flag(false);
        if fields.bytes()? != b"publickey" {
            return Some(Outcome::Answer(vec![refused]));
        }
        let (has_signature, algorithm, blob) = (fields.flag()?, fields.bytes()?, fields.bytes()?);
        let Some(key) = public_key(blob).filter(|&key| key == self.client_key) else {
            return Some(Outcome::Answer(vec![refused]));
        };
        if !has_signature {
            return Some(Outcome::Answer(vec![Packet::new(KEY_IS_FINE).bytes(algorithm).bytes(blob)]));
        }
        let before_signature = packet.len() - fields.rest().len();
        let signed = Packet::part().bytes(session_id).raw(&packet[..before_signature]);
        if !is_signed(key, &signed.0, fields.bytes()?) {
            return Some(Outcome::Answer(vec![refused]));
        }
        Some(match users::find(root, user) {
            Ok(user) => Outcome::In(Box::new(user), Packet::new(SUCCESS)),
            // Whoever has the key may know which users there are.
            Err(error) => {
                let banner = Packet::new(BANNER).bytes(format!("banger: {error}\r\n")).bytes("");
                Outcome::Answer(vec![banner, refused])
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring::signature::{Ed25519KeyPair, KeyPair as _};

    const ID: [u8; 32] = [3; 32];

    fn signed(pair: &Ed25519KeyPair, user: &str, id: &[u8]) -> Vec<u8> {
        let blob = Packet::part().bytes("ssh-ed25519").bytes(pair.public_key());
        let unsigned = Packet::new(REQUEST).bytes(user).bytes(CONNECTION_SERVICE).bytes("publickey");
        let unsigned = unsigned.flag(true).bytes("ssh-ed25519").bytes(blob.0);
        let signature = pair.sign(&Packet::part().bytes(id).raw(&unsigned.0).0);
        unsigned.bytes(Packet::part().bytes("ssh-ed25519").bytes(signature).0).0
    }

    #[test]
    fn one_key_opens_and_nothing_else() {
        let image = tempfile::tempdir().unwrap();
        let (right, wrong) = ([1; 32], [2; 32]);
        let [right, wrong] = [right, wrong].map(|seed| Ed25519KeyPair::from_seed_unchecked(&seed).unwrap());
        let mut door = Door::new(right.public_key().as_ref().to_vec());
        let mut try_it = |packet: &[u8]| door.answer(packet, &ID, image.path());
        let refused = || Some(Outcome::Answer(vec![Packet::new(FAILURE).bytes("publickey").flag(false)]));
        assert!(
            matches!(try_it(&signed(&right, "root", &ID)), Some(Outcome::In(user, _)) if user.name == "root")
        );
        assert_eq!(try_it(&signed(&wrong, "root", &ID)), refused());
        assert_eq!(try_it(&signed(&right, "root", &[4; 32])), refused(), "another connection's signature");
        let mut changed = signed(&right, "root", &ID);
        let last = changed.len() - 1;
        changed[last] ^= 1;
        assert_eq!(try_it(&changed), refused());
        for method in ["none", "password", "keyboard-interactive", "hostbased"] {
            let packet = Packet::new(REQUEST).bytes("root").bytes(CONNECTION_SERVICE).bytes(method);
            assert_eq!(try_it(&packet.0), refused(), "{method}");
        }
        let Some(Outcome::Answer(packets)) = try_it(&signed(&right, "nobody\u{1b}", &ID)) else {
            panic!("in")
        };
        let text = String::from_utf8_lossy(&packets[0].0).into_owned();
        assert!(text.contains("banger: no user `nobody\\u{1b}` in the image's /etc/passwd"), "{text}");
        // What belongs to a connection is nothing before.
        assert_eq!(try_it(&Packet::new(90).bytes("session").0), None);
    }

    #[test]
    fn trying_ends() {
        let mut door = Door::new(vec![0; 32]);
        let packet = Packet::new(REQUEST).bytes("root").bytes(CONNECTION_SERVICE).bytes("none").0;
        let tried = (0..200).take_while(|_| door.answer(&packet, &ID, Path::new("/")).is_some()).count();
        assert_eq!(tried, TRIES_MAX as usize);
    }
}
