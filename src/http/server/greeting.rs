//! The first bytes of a connection: HTTP/2 with prior knowledge, or HTTP/1. They are read, not peeked at, so that a part of the preface is
//! waited for like anything else; whoever serves the connection gets them again.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout_at;

/// As far as it differs from anything that HTTP/1 begins with (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FIRST_BYTES: usize = 8 * 1024;
/// Until the runtime hears of what lies there.
const UNHEARD_TIME_MAX: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    Http1,
    Http2,
}

/// Which protocol begins so; `None` while it can be either.
fn protocol(first: &[u8]) -> Option<Protocol> {
    let seen = first.len().min(PREFACE.len());
    match first[..seen] == PREFACE[..seen] {
        false => Some(Protocol::Http1),
        true => (seen == PREFACE.len()).then_some(Protocol::Http2),
    }
}

/// A socket with what was read of it already.
pub(super) struct Greeted {
    pub stream: TcpStream,
    first: BytesMut,
}

/// Whether something lies in a socket that the runtime may not have heard of yet: a process that goes on after it was frozen hears of its
/// timers first.
pub(super) fn has_unread(stream: &TcpStream) -> bool {
    SockRef::from(stream).peek(&mut [MaybeUninit::uninit()]).is_ok()
}

/// Reads until the protocol is known; `None` where the client left first, or said too little until `until`.
pub(super) async fn greet(mut stream: TcpStream, until: Instant) -> io::Result<Option<(Protocol, Greeted)>> {
    let mut first = BytesMut::with_capacity(FIRST_BYTES);
    let mut until = until;
    loop {
        match timeout_at(until.into(), stream.read_buf(&mut first)).await {
            Ok(Ok(0)) => return Ok(None),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(error),
            Err(_) if has_unread(&stream) => {
                until = Instant::now() + UNHEARD_TIME_MAX;
                continue;
            }
            Err(_) => return Ok(None),
        }
        if let Some(protocol) = protocol(&first) {
            return Ok(Some((protocol, Greeted { stream, first })));
        }
    }
}

impl AsyncRead for Greeted {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.first.is_empty() {
            return Pin::new(&mut this.stream).poll_read(cx, buf);
        }
        let length = this.first.len().min(buf.remaining());
        buf.put_slice(&this.first[..length]);
        this.first.advance(length);
        if this.first.is_empty() {
            this.first = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Greeted {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.get_mut().stream).poll_write(cx, buf))?;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_preface_is_http_2_and_only_a_part_of_it_is_waited_for() {
        for length in 1..PREFACE.len() {
            assert_eq!(protocol(&PREFACE[..length]), None, "{length}");
            let mut other = PREFACE[..length].to_vec();
            other[length - 1] ^= 1;
            assert_eq!(protocol(&other), Some(Protocol::Http1), "{length}");
        }
        assert_eq!(protocol(PREFACE), Some(Protocol::Http2));
        assert_eq!(protocol(&[PREFACE, b"\0\0\0\x04"].concat()), Some(Protocol::Http2));
        assert_eq!(protocol(b"P"), None);
        assert_eq!(protocol(b"POST / HTTP/1.1\r\n"), Some(Protocol::Http1));
        assert_eq!(protocol(b"PRI / HTTP/1.1\r\n"), Some(Protocol::Http1));
    }
}
