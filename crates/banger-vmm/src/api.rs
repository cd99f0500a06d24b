//! The few words of HTTP that Firecracker's API speaks: a request with a JSON body, and the beginning of its answer.
//!
//! Nothing here connects; the supervisor does. Source: `src/firecracker/swagger/firecracker.yaml` of Firecracker, and what
//! its server, `micro-http`, understands: HTTP/1.1, no chunks, connections that stay open.

use serde::Deserialize;
use serde_json::Value;

/// Longest answer that is read, head and body; those of Firecracker have a few hundred bytes.
pub const ANSWER_LEN_MAX: usize = 64 * 1024;
/// What ends the head of an answer.
const HEAD_END: &[u8] = b"\r\n\r\n";

/// Something asked of the API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// `PUT` to make something, `PATCH` to change it.
    pub method: &'static str,
    /// What is made or changed.
    pub path: &'static str,
    /// How it shall be.
    pub body: Value,
}

impl Request {
    /// Returns it as the server reads it.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let body = self.body.to_string();
        let Self { method, path, .. } = self;
        let len = body.len();
        let head = "Host: localhost\r\nAccept: application/json\r\nContent-Type: application/json";
        format!("{method} {path} HTTP/1.1\r\n{head}\r\nContent-Length: {len}\r\n\r\n{body}").into_bytes()
    }
}

/// A whole answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The request was carried out.
    pub is_success: bool,
    /// What was said about it.
    pub body: Vec<u8>,
}

impl Answer {
    /// Returns why a request was refused, in Firecracker's words.
    #[must_use]
    pub fn fault(&self) -> String {
        #[derive(Deserialize)]
        struct Fault {
            fault_message: String,
        }
        let said = serde_json::from_slice(&self.body).map(|Fault { fault_message }| fault_message);
        said.unwrap_or_else(|_| "it does not say why".to_owned())
    }
}

/// The bytes are no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the VMM's API answered something that is not HTTP")]
pub struct AnswerError;

/// Returns the answer that the bytes are; none while it is not whole.
///
/// # Errors
/// When they are no answer, or one longer than [`ANSWER_LEN_MAX`].
pub fn parse(bytes: &[u8]) -> Result<Option<Answer>, AnswerError> {
    let Some(end) = bytes.windows(HEAD_END.len()).position(|window| window == HEAD_END) else {
        return if bytes.len() < ANSWER_LEN_MAX { Ok(None) } else { Err(AnswerError) };
    };
    let head = str::from_utf8(&bytes[..end]).map_err(|_| AnswerError)?;
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 ")).ok_or(AnswerError)?;
    let status: u16 = status.get(..3).and_then(|status| status.parse().ok()).ok_or(AnswerError)?;
    let len = lines.filter_map(|line| line.split_once(':'));
    let len =
        len.filter(|(name, _)| name.eq_ignore_ascii_case("content-length")).map(|(_, value)| value.trim());
    // Without a length there is no body, as with 204.
    let len = match { len }.next() {
        Some(len) => len.parse().ok().filter(|len| *len <= ANSWER_LEN_MAX).ok_or(AnswerError)?,
        None => 0,
    };
    let body = &bytes[end + HEAD_END.len()..];
    let body = body.get(..len).map(<[u8]>::to_vec);
    Ok(body.map(|body| Answer { is_success: (200..300).contains(&status), body }))
}

#[cfg(test)]
mod tests {
    use super::{ANSWER_LEN_MAX, Answer, AnswerError, Request, parse};
    use serde_json::json;

    #[test]
    fn a_request_is_as_the_server_reads_it() {
        let request = Request { method: "PATCH", path: "/vm", body: json!({ "state": "Paused" }) };
        let expected = "PATCH /vm HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\
                        Content-Type: application/json\r\nContent-Length: 18\r\n\r\n{\"state\":\"Paused\"}";
        assert_eq!(String::from_utf8(request.bytes()).unwrap(), expected);
    }

    #[test]
    fn answers_of_a_real_firecracker() {
        let done = b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";
        assert_eq!(parse(done), Ok(Some(Answer { is_success: true, body: Vec::new() })));
        let refused = b"HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
                        Content-Type: application/json\r\nContent-Length: 22\r\n\r\n{\"fault_message\":\"no\"}";
        let answer = parse(refused).unwrap().unwrap();
        assert_eq!((answer.is_success, answer.fault().as_str()), (false, "no"));
        // Whatever has come so far is no answer, and no error.
        for len in 0..refused.len() {
            assert_eq!(parse(&refused[..len]), Ok(None), "{len}");
        }
    }

    #[test]
    fn what_is_no_answer_is_an_error_and_bounded() {
        for bytes in [
            &b"HTTP/1.0 200 OK\r\n\r\n"[..],
            b"HTTP/1.1 2\r\n\r\n",
            b"\xff\xff\r\n\r\n",
            b"HTTP/1.1 200 \r\nContent-Length: x\r\n\r\n",
            b"HTTP/1.1 200 \r\nContent-Length: 99999999999\r\n\r\n",
            &[b'x'; ANSWER_LEN_MAX],
        ] {
            assert_eq!(parse(bytes), Err(AnswerError), "{}", String::from_utf8_lossy(&bytes[..20]));
        }
        let silent = Answer { is_success: false, body: b"{}".to_vec() };
        assert_eq!(silent.fault(), "it does not say why");
    }
}
