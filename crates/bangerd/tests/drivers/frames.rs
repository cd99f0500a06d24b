//! Frames as a guest sends them.

use std::net::Ipv4Addr;

/// The guest's hardware address, which the packet filter insists on.
pub(crate) const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0xe7, 0x07, 0x02];
/// The other end's.
const GATEWAY_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0xe7, 0x07, 0x01];
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 231, 7, 2);
/// The other end, which is also the guest's resolver.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 231, 7, 1);
/// The longest payload of UDP in a frame.
pub(crate) const UDP_LEN_MAX: usize = 1500 - 28;

/// Who has the gateway's address?
pub(crate) fn who_has_gateway() -> Vec<u8> {
    let mut frame = [[0xff; 6], GUEST_MAC].concat();
    // Ethernet, IPv4, the lengths of their addresses, and that this is a question.
    frame.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend_from_slice(&GUEST_MAC);
    frame.extend_from_slice(&GUEST.octets());
    frame.extend_from_slice(&[0; 6]);
    frame.extend_from_slice(&GATEWAY.octets());
    frame
}

/// The answer to that, as far as nothing else has these bytes.
pub(crate) fn gateway_has() -> Vec<u8> {
    [&[0, 2][..], &GATEWAY_MAC, &GATEWAY.octets()].concat()
}

/// Packets from a hardware address, and an IPv4 address, to another.
pub(crate) fn udp(mac: [u8; 6], from: Ipv4Addr, to: Ipv4Addr, port: u16, data: &[u8]) -> Vec<u8> {
    let len = |headers: usize| u16::try_from(headers + data.len()).unwrap().to_be_bytes();
    let mut header =
        [&[0x45, 0][..], &len(28), &[0, 1, 0, 0, 64, 17, 0, 0], &from.octets(), &to.octets()].concat();
    let sum: u32 = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    // A sum of zero says that there is none.
    let udp = [4000u16.to_be_bytes(), port.to_be_bytes(), len(8), [0, 0]].concat();
    [&GATEWAY_MAC[..], &mac, &[8, 0], &header, &udp, data].concat()
}

/// Asks the resolver for the address of a vm of the network.
pub(crate) fn who_is(vm: &str) -> Vec<u8> {
    let question = [&[vm.len() as u8][..], vm.as_bytes(), b"\x02vm\0", &[0, 1, 0, 1]].concat();
    let query = [&[0x77, 0x77, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], &question].concat();
    udp(GUEST_MAC, GUEST, GATEWAY, 53, &query)
}
