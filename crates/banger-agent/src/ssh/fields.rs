//! Fields of ssh's packets (RFC 4251, section 5), read and written.

/// Reads fields one after the other; none when there is no such field.
#[derive(Debug, Clone)]
pub(crate) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn of(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    pub(crate) fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    pub(crate) fn flag(&mut self) -> Option<bool> {
        self.byte().map(|byte| byte != 0)
    }

    pub(crate) fn number(&mut self) -> Option<u32> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_be_bytes(*bytes))
    }

    pub(crate) fn long(&mut self) -> Option<u64> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_be_bytes(*bytes))
    }

    pub(crate) fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = self.number()?;
        self.take(len as usize)
    }

    pub(crate) fn text(&mut self) -> Option<&'a str> {
        std::str::from_utf8(self.bytes()?).ok()
    }

    /// What has not been read yet.
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.0
    }
}

/// A packet, or a part of one, that is being written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packet(pub(crate) Vec<u8>);

impl Packet {
    pub(crate) fn new(kind: u8) -> Self {
        Self(vec![kind])
    }

    /// Fields without a kind in front.
    pub(crate) fn part() -> Self {
        Self(Vec::new())
    }

    pub(crate) fn byte(mut self, byte: u8) -> Self {
        self.0.push(byte);
        self
    }

    pub(crate) fn flag(self, flag: bool) -> Self {
        self.byte(u8::from(flag))
    }

    pub(crate) fn number(mut self, number: u32) -> Self {
        self.0.extend(number.to_be_bytes());
        self
    }

    pub(crate) fn long(mut self, number: u64) -> Self {
        self.0.extend(number.to_be_bytes());
        self
    }

    /// A string of bytes; no caller has one of 4 GiB.
    pub(crate) fn bytes(mut self, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        self.0.extend(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
        self.0.extend(bytes);
        self
    }

    /// Bytes as they are.
    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::{Fields, Packet};

    #[test]
    fn what_is_written_is_read() {
        let packet = Packet::new(7).flag(true).number(0x0102_0304).bytes("name").long(9).raw(b"rest");
        let mut fields = Fields::of(&packet.0);
        assert_eq!((fields.byte(), fields.flag(), fields.number()), (Some(7), Some(true), Some(0x0102_0304)));
        assert_eq!((fields.text(), fields.long(), fields.rest()), (Some("name"), Some(9), &b"rest"[..]));
    }

    #[test]
    fn a_string_longer_than_its_packet_is_none() {
        let mut fields = Fields::of(b"\xff\xff\xff\xffabc");
        assert_eq!(fields.bytes(), None);
        assert_eq!(Fields::of(b"\0\0").number(), None);
    }
}
