//! The listening socket.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

/// Connections that wait to be accepted; the kernel's own limit (`net.core.somaxconn`) may be lower.
const BACKLOG: i32 = 4_096;
/// A client that takes nothing of its answer for so long loses its connection: the kernel ends it when what was sent stays
/// unacknowledged, or does not fit in the client's window. Longer than a mobile client's change of network, shorter than anyone waits.
const UNREAD_TIME_MAX: Duration = Duration::from_secs(30);

pub(super) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // What was served before and still lingers in the kernel does not keep a new process from its port.
    socket.set_reuse_address(true)?;
    // What is accepted inherits it.
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(UNREAD_TIME_MAX))?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}
