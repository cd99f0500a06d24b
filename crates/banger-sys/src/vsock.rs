//! Sockets between a virtual machine and its host.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

/// The host's address, as its guests see it.
pub const HOST: u32 = libc::VMADDR_CID_HOST;

/// Connects to a port of another machine.
///
/// # Errors
/// When there is no vsock, or nobody listens there.
pub fn connect(cid: u32, port: u32) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::VSOCK,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: `sockaddr_vm` is plain data for which all zeroes is a valid value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the structure is the family's, of the length given, and outlives the call.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}
