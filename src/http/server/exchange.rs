//! Where a connection stands between its requests: what it waits for, since when, and until when it may. Pure but for the cells in which
//! the socket and the layer around the handlers share it; one thread has both.

use std::cell::Cell;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use actix_web::HttpRequest;
use actix_web::body::{BodySize, BoxBody, MessageBody};
use bytes::Bytes;

use crate::config::HttpConfig;

/// How long a connection that closes after its answer takes in what its client still sends.
const CLOSING_TIME_MAX: Duration = Duration::from_secs(2);

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waits {
    /// Its next request; nothing of it is there.
    Request,
    /// The rest of a request's head.
    Head,
    /// Us.
    Answer,
    /// Its end: it was answered for the last time.
    End,
}

/// The bounds of the waits of [`Waits`].
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    pub head: Duration,
    pub keep_alive: Duration,
}

impl Bounds {
    pub(super) fn of(config: &HttpConfig) -> Self {
        Self { head: config.header_timeout, keep_alive: config.keep_alive }
    }
}

struct State {
    bounds: Bounds,
    waits: Cell<Waits>,
    since: Cell<Instant>,
    in_progress: Cell<u32>,
    /// Nothing more comes from the client.
    left: Cell<bool>,
}

/// One connection's; clones share it.
#[derive(Clone)]
pub(in super::super) struct Exchange(Rc<State>);

impl Exchange {
    pub(super) fn new(bounds: Bounds, now: Instant) -> Self {
        let (waits, since) = (Cell::new(Waits::Head), Cell::new(now));
        Self(Rc::new(State { bounds, waits, since, in_progress: Cell::new(0), left: Cell::new(false) }))
    }

    /// A request's; `None` where its connection keeps its own time.
    pub(in super::super) fn of(request: &HttpRequest) -> Option<Self> {
        request.conn_data::<Self>().cloned()
    }

    /// A request's head is there whole. Until the guard is dropped the connection waits for us.
    pub(in super::super) fn begin(self) -> InProgress {
        self.0.in_progress.set(self.0.in_progress.get() + 1);
        if self.0.waits.get() != Waits::End {
            self.0.waits.set(Waits::Answer);
        }
        InProgress(self)
    }

    /// The answer that comes is the last one.
    pub(in super::super) fn closes(&self) {
        self.set(Waits::End, Instant::now());
    }

    /// Something came from the client.
    pub(super) fn received(&self, now: Instant) {
        if self.0.waits.get() == Waits::Request {
            self.set(Waits::Head, now);
        }
    }

    /// The client took something of an answer.
    pub(super) fn taken(&self, now: impl FnOnce() -> Instant) {
        if self.0.waits.get() == Waits::Request {
            self.0.since.set(now());
        }
    }

    /// The client sends no more. It may still read what it asked for, but nobody asks so for what has no end.
    pub(super) fn left(&self) {
        self.0.left.set(true);
    }

    /// For what, and until when; `None` where it is up to us.
    pub(super) fn deadline(&self) -> Option<(Waits, Instant)> {
        let waits = self.0.waits.get();
        let bound = match waits {
            Waits::Request => self.0.bounds.keep_alive,
            Waits::Head => self.0.bounds.head,
            Waits::End => CLOSING_TIME_MAX,
            Waits::Answer => return None,
        };
        Some((waits, self.0.since.get() + bound))
    }

    fn set(&self, waits: Waits, since: Instant) {
        self.0.waits.set(waits);
        self.0.since.set(since);
    }
}

/// A request that is being answered.
pub(in super::super) struct InProgress(Exchange);

impl InProgress {
    /// Answered: at the guard's end, but of a body without a length only at that body's end. One that is `endless` ends also when its client
    /// leaves.
    pub(in super::super) fn answered(self, body: BoxBody, endless: bool) -> BoxBody {
        match body.size() {
            BodySize::Stream => BoxBody::new(Streaming { body, endless, until: self }),
            _ => body,
        }
    }

    pub(in super::super) fn closes(&self) {
        self.0.closes();
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        let state = &self.0.0;
        state.in_progress.set(state.in_progress.get().saturating_sub(1));
        if state.in_progress.get() == 0 && state.waits.get() == Waits::Answer {
            self.0.set(Waits::Request, Instant::now());
        }
    }
}

struct Streaming {
    body: BoxBody,
    endless: bool,
    until: InProgress,
}

impl MessageBody for Streaming {
    type Error = Box<dyn std::error::Error>;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Self::Error>>> {
        let this = self.get_mut();
        // The framework asks for more of an answer whenever it has read, so nobody has to be woken. It goes on with the answer of a client
        // that has left until a write fails: that of the second heartbeat.
        if this.endless && this.until.0.0.left.get() {
            return Poll::Ready(None);
        }
        Pin::new(&mut this.body).poll_next(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { head: Duration::from_secs(10), keep_alive: Duration::from_secs(75) };

    #[test]
    fn a_head_has_its_time_from_its_first_byte_and_an_idle_connection_from_its_last_answer() {
        let began = Instant::now();
        let exchange = Exchange::new(BOUNDS, began);
        assert_eq!(exchange.deadline(), Some((Waits::Head, began + BOUNDS.head)));
        // Dribbling does not prolong it.
        exchange.received(began + BOUNDS.head / 2);
        assert_eq!(exchange.deadline(), Some((Waits::Head, began + BOUNDS.head)));
        let request = exchange.clone().begin();
        assert_eq!(exchange.deadline(), None);
        drop(request);
        let (waits, until) = exchange.deadline().unwrap();
        assert!(waits == Waits::Request && until >= began + BOUNDS.keep_alive);
        let later = Instant::now() + Duration::from_secs(5);
        exchange.taken(|| later);
        assert_eq!(exchange.deadline(), Some((Waits::Request, later + BOUNDS.keep_alive)));
        exchange.received(later);
        assert_eq!(exchange.deadline(), Some((Waits::Head, later + BOUNDS.head)));
    }

    #[test]
    fn after_the_last_answer_the_end_is_waited_for_only_shortly() {
        let exchange = Exchange::new(BOUNDS, Instant::now());
        let request = exchange.clone().begin();
        request.closes();
        drop(request);
        let (waits, until) = exchange.deadline().unwrap();
        assert!(waits == Waits::End && until <= Instant::now() + CLOSING_TIME_MAX);
        exchange.received(Instant::now());
        assert_eq!(exchange.deadline().unwrap().0, Waits::End);
    }

    #[test]
    fn a_stream_is_in_progress_until_its_body_is_gone() {
        let exchange = Exchange::new(BOUNDS, Instant::now());
        let endless = actix_web::body::BodyStream::new(futures::stream::pending::<Result<Bytes, std::io::Error>>());
        let body = exchange.clone().begin().answered(BoxBody::new(endless), false);
        assert_eq!(exchange.deadline(), None);
        drop(body);
        assert_eq!(exchange.deadline().unwrap().0, Waits::Request);
        drop(exchange.clone().begin().answered(BoxBody::new("short"), false));
        assert_eq!(exchange.deadline().unwrap().0, Waits::Request);
    }

    #[test]
    fn a_client_that_has_sent_all_it_will_gets_what_it_asked_for_but_no_stream_without_an_end() {
        for (endless, ends) in [(true, true), (false, false)] {
            let exchange = Exchange::new(BOUNDS, Instant::now());
            let stream = actix_web::body::BodyStream::new(futures::stream::pending::<Result<Bytes, std::io::Error>>());
            let mut body = exchange.clone().begin().answered(BoxBody::new(stream), endless);
            let mut cx = Context::from_waker(std::task::Waker::noop());
            assert!(Pin::new(&mut body).poll_next(&mut cx).is_pending());
            exchange.left();
            assert_eq!(Pin::new(&mut body).poll_next(&mut cx).is_ready(), ends);
        }
    }
}
