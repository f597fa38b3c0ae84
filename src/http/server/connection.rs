//! An HTTP/1 connection as the framework sees it: a socket whose waits are bounded, and on which the framework's bare refusals of
//! what is no request leave as problem+json.
//!
//! What has arrived is always read before time is looked at. So a process that was frozen for longer than a bound answers what was sent to
//! it meanwhile, and a connection on which nothing was sent ends without an answer that a proxy could take for the next request's.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::exchange::{Exchange, Waits};
use super::greeting::{Greeted, has_unread};
use super::refusal::{self, Refusal, Sending};

pub(super) struct Connection {
    socket: Greeted,
    pub exchange: Exchange,
    role: &'static str,
    /// One for all of its waits, moved only when it must fire earlier: nothing is set and taken back for each request.
    timer: Option<Pin<Box<Sleep>>>,
    sending: Option<Sending>,
    /// Something came that the framework has not looked at yet.
    unseen: bool,
    ended: bool,
}

impl Connection {
    pub(super) fn new(socket: Greeted, exchange: Exchange, role: &'static str) -> Self {
        Self { socket, exchange, role, timer: None, sending: None, unseen: false, ended: false }
    }

    /// Whether the wait is over; wakes the task when it will be.
    fn poll_expired(&mut self, cx: &mut Context<'_>) -> Poll<Waits> {
        loop {
            let Some((waits, until)) = self.exchange.deadline() else { return Poll::Pending };
            if Instant::now() >= until {
                return Poll::Ready(waits);
            }
            let until = tokio::time::Instant::from_std(until);
            let is_armed = self.timer.as_ref().is_some_and(|timer| !timer.is_elapsed() && timer.deadline() <= until);
            if is_armed {
                // It has this task's waker already: a connection is one task.
                return Poll::Pending;
            }
            let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
            timer.as_mut().reset(until);
            ready!(timer.as_mut().poll(cx));
        }
    }

    /// The client is told only where it began to ask.
    fn expire(&mut self, waits: Waits) {
        self.ended = true;
        if waits == Waits::Head {
            let refusal = Refusal::head_late();
            refusal.record(self.role);
            // Everything that came was read, so closing does not destroy it on its way; a socket that cannot take it is gone.
            let _ = self.socket.stream.try_write(&refusal.text());
        }
    }
}

impl AsyncRead for Connection {
    /// The end, also where the client has used up its time.
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(Ok(()));
        }
        // Whoever is to go sends no more, or sends for ever.
        if let Some((Waits::End, until)) = this.exchange.deadline()
            && Instant::now() >= until
        {
            this.ended = true;
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        if let Poll::Ready(read) = Pin::new(&mut this.socket).poll_read(cx, buf) {
            if buf.filled().len() > before {
                this.unseen = true;
                this.exchange.received(Instant::now());
            } else if buf.remaining() > 0 {
                this.exchange.left();
            }
            return Poll::Ready(read);
        }
        let unseen = std::mem::take(&mut this.unseen);
        let waits = ready!(this.poll_expired(cx));
        if unseen {
            // It reads until there is no more, and then looks at it; that may be all that was waited for.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if has_unread(&this.socket.stream) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        this.expire(waits);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.sending.is_none()
            && let Some((at, refusal)) = refusal::bare(buf)
        {
            if at > 0 {
                return Pin::new(&mut this.socket).poll_write(cx, &buf[..at]);
            }
            refusal.record(this.role);
            this.sending = Some(Sending::new(&refusal));
        }
        if let Some(sending) = &mut this.sending {
            ready!(sending.poll(cx, &mut this.socket))?;
            return Poll::Ready(Ok(buf.len()));
        }
        let written = ready!(Pin::new(&mut this.socket).poll_write(cx, buf))?;
        this.exchange.taken(Instant::now);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_shutdown(cx)
    }
}
