//! The bytes of a connection, with an account of what was asked of the server and what it answered. By its own word the driver never
//! tells, and a server whose processes stand still while its kernel acknowledges whatever is sent says nothing else.
//!
//! The messages are those of the protocol's version 3 (the server's manual, "Message Formats").

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};

/// Each of these a server answers with one [`READY`] behind everything else.
const QUERY: u8 = b'Q';
const SYNC: u8 = b'S';
const READY: u8 = b'Z';

/// Before a message: what it is, and its length.
const HEAD_BYTES: u8 = 5;
/// The length counts itself.
const LENGTH_BYTES: u32 = 4;

/// What went over a line since it was let in; shared with who watches it.
#[derive(Default)]
pub(super) struct Traffic {
    counts: AtomicBool,
    /// Requests that went out whole.
    asked: AtomicU64,
    /// A part of another one went out.
    asking: AtomicBool,
    answered: AtomicU64,
    heard_bytes: AtomicU64,
}

/// How a line stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stand {
    /// The server has not answered everything.
    pub owes: bool,
    pub heard_bytes: u64,
}

impl Traffic {
    /// From here on messages are counted: those of the handshake have another form, and a bound of their own. Nothing is on its way.
    pub fn begin(&self) {
        self.counts.store(true, Ordering::Relaxed);
    }

    pub fn stand(&self) -> Stand {
        let owes =
            self.asking.load(Ordering::Relaxed) || self.asked.load(Ordering::Relaxed) > self.answered.load(Ordering::Relaxed);
        Stand { owes, heard_bytes: self.heard_bytes.load(Ordering::Relaxed) }
    }

    fn is_counted(&self) -> bool {
        self.counts.load(Ordering::Relaxed)
    }

    /// Only the line itself adds.
    fn add(counter: &AtomicU64, more: u64) {
        if more > 0 {
            counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
        }
    }
}

/// Messages that go by in pieces of any size.
#[derive(Default)]
struct Messages {
    what: u8,
    head: u8,
    length: u32,
    /// Bytes of it that are still to come.
    rest: usize,
}

impl Messages {
    /// Tells of each message that is whole now.
    fn pass(&mut self, mut bytes: &[u8], mut whole: impl FnMut(u8)) {
        loop {
            while self.head < HEAD_BYTES {
                let Some((next, rest)) = bytes.split_first() else { return };
                bytes = rest;
                if self.head == 0 {
                    (self.what, self.length) = (*next, 0);
                } else {
                    self.length = self.length << 8 | u32::from(*next);
                }
                self.head += 1;
                if self.head == HEAD_BYTES {
                    self.rest = self.length.saturating_sub(LENGTH_BYTES) as usize;
                }
            }
            let here = self.rest.min(bytes.len());
            self.rest -= here;
            bytes = &bytes[here..];
            if self.rest > 0 {
                return;
            }
            self.head = 0;
            whole(self.what);
        }
    }
}

/// A stream that is counted.
pub(super) struct Line<S> {
    stream: S,
    traffic: Arc<Traffic>,
    out: Messages,
    back: Messages,
}

impl<S> Line<S> {
    pub fn new(stream: S, traffic: Arc<Traffic>) -> Self {
        Self { stream, traffic, out: Messages::default(), back: Messages::default() }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Line<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let line = &mut *self;
        let before = to.filled().len();
        ready!(Pin::new(&mut line.stream).poll_read(context, to))?;
        if line.traffic.is_counted() {
            let (heard, mut answered) = (&to.filled()[before..], 0);
            line.back.pass(heard, |what| answered += u64::from(what == READY));
            Traffic::add(&line.traffic.answered, answered);
            Traffic::add(&line.traffic.heard_bytes, heard.len() as u64);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Line<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        let line = &mut *self;
        let written = ready!(Pin::new(&mut line.stream).poll_write(context, bytes))?;
        if line.traffic.is_counted() {
            let (mut asked, mut last) = (0, None);
            line.out.pass(&bytes[..written], |what| {
                asked += u64::from(matches!(what, QUERY | SYNC));
                last = Some(what);
            });
            Traffic::add(&line.traffic.asked, asked);
            let at_end = line.out.head == 0 && last.is_none_or(|what| matches!(what, QUERY | SYNC));
            line.traffic.asking.store(!at_end, Ordering::Relaxed);
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl<S: TlsStream + Unpin> TlsStream for Line<S> {
    fn channel_binding(&self) -> ChannelBinding {
        self.stream.channel_binding()
    }
}

/// Puts the account on top of TLS: below it there is nothing to be read.
pub(super) struct Above<T>(pub T);

impl<S, T> TlsConnect<Line<S>> for Above<T>
where
    T: TlsConnect<S>,
    T::Stream: Unpin,
    T::Future: Send + 'static,
{
    type Stream = Line<T::Stream>;
    type Error = T::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Stream, T::Error>> + Send>>;

    fn connect(self, line: Line<S>) -> Self::Future {
        let Line { stream, traffic, .. } = line;
        let secured = self.0.connect(stream);
        Box::pin(async move { Ok(Line::new(secured.await?, traffic)) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn message(what: u8, body: usize) -> Vec<u8> {
        let length = u32::try_from(body).unwrap() + LENGTH_BYTES;
        [&[what][..], &length.to_be_bytes(), &vec![READY; body]].concat()
    }

    proptest! {
        #[test]
        fn every_message_is_told_of_once_however_it_is_cut(
            messages in prop::collection::vec((any::<u8>(), 0usize..40), 0..30), cuts in prop::collection::vec(0usize..2_000, 0..30),
        ) {
            let bytes: Vec<u8> = messages.iter().flat_map(|(what, body)| message(*what, *body)).collect();
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| *cut < bytes.len()).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let (mut passing, mut told) = (Messages::default(), Vec::new());
            for piece in cuts.windows(2) {
                passing.pass(&bytes[piece[0]..piece[1]], |what| told.push(what));
            }
            prop_assert_eq!(told, messages.iter().map(|(what, _)| *what).collect::<Vec<_>>());
            prop_assert_eq!(passing.head, 0);
        }
    }

    #[tokio::test]
    async fn a_server_owes_until_the_last_of_what_was_asked_together_is_answered() {
        let (ours, mut server) = tokio::io::duplex(1_000);
        let traffic = Arc::new(Traffic::default());
        let mut line = Line::new(ours, traffic.clone());
        let stand = |owes: bool, heard_bytes: u64| assert_eq!(traffic.stand(), Stand { owes, heard_bytes });
        // The handshake is not counted.
        line.write_all(&[0, 0, 0, 8, 4, 210, 22, 47]).await.unwrap();
        stand(false, 0);
        traffic.begin();
        let bind = message(b'B', 7);
        line.write_all(&bind[..3]).await.unwrap();
        stand(true, 0);
        line.write_all(&bind[3..]).await.unwrap();
        stand(true, 0);
        line.write_all(&message(SYNC, 0)).await.unwrap();
        line.write_all(&message(QUERY, 9)).await.unwrap();
        stand(true, 0);
        let (answer, row) = (message(READY, 1), message(b'D', 20));
        let mut heard = 0;
        for (message, owes) in [(&row, true), (&answer, true), (&row, true), (&answer, false)] {
            server.write_all(message).await.unwrap();
            line.read_exact(&mut vec![0; message.len()]).await.unwrap();
            heard += message.len() as u64;
            stand(owes, heard);
        }
        // What the server says of itself changes nothing.
        server.write_all(&row).await.unwrap();
        line.read_exact(&mut vec![0; row.len()]).await.unwrap();
        stand(false, heard + row.len() as u64);
    }
}
