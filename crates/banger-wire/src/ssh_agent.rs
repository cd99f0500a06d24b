//! The owner's ssh agent in a guest, for as long as a command runs that was to have it
//! ([`ExecSpec::forward_agent`](crate::exec::ExecSpec::forward_agent)).
//!
//! A connection that a program of the guest's makes is a channel of the command's session, one of [`CHANNELS`], with data
//! in both directions: messages as the agent's protocol has them (draft-ietf-sshm-ssh-agent), each after its length. The
//! guest sends a request only once the one before was answered, on whatever channel, so that there is one message under
//! way in a session and no need of windows. The host learns of a connection by its first request. Each side ends it with
//! one `Eof`; the channel is another connection's once both have.

use std::ops::Range;

/// Channels of connections, one each; what comes from a guest on another one is nothing.
pub const CHANNELS: Range<u8> = 16..48;
/// Longest message, without its length. OpenSSH's agent and its clients have the same.
pub const MESSAGE_LEN_MAX: usize = 256 * 1024;
/// Length of a message's length, four bytes in network order.
pub const PREFIX_LEN: usize = 4;

/// Returns the length of the first message of `bytes` with its prefix, once that is there.
///
/// # Errors
/// When it has nothing in it, or is longer than [`MESSAGE_LEN_MAX`].
pub fn framed_len(bytes: &[u8]) -> Result<Option<usize>, BadLength> {
    let Some(&prefix) = bytes.first_chunk::<PREFIX_LEN>() else { return Ok(None) };
    match u32::from_be_bytes(prefix) as usize {
        len @ 1..=MESSAGE_LEN_MAX => Ok(Some(PREFIX_LEN + len)),
        len => Err(BadLength(len)),
    }
}

/// A length that no message has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a message of {0} bytes to or from an ssh agent")]
pub struct BadLength(usize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_bounded() {
        assert_eq!(framed_len(&[0, 0, 0]), Ok(None));
        assert_eq!(framed_len(&[0, 0, 0, 1, 11, 0]), Ok(Some(5)));
        assert_eq!(framed_len(&[0, 0, 0, 0]), Err(BadLength(0)));
        assert_eq!(framed_len(&[0, 4, 0, 0]), Ok(Some(MESSAGE_LEN_MAX + PREFIX_LEN)));
        assert_eq!(framed_len(&[0, 4, 0, 1]), Err(BadLength(MESSAGE_LEN_MAX + 1)));
    }
}
