//! What a handler leaves of a request's body is read and dropped before the answer goes out, so that the answer reaches a client
//! that is still sending: closing a socket with unread bytes would destroy it on the way. Within a bound of bytes and time; beyond
//! it the connection closes after the answer.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use actix_web::HttpMessage;
use actix_web::dev::{Payload, ServiceRequest};
use actix_web::error::PayloadError;
use bytes::Bytes;
use futures::{Stream, future::poll_fn};

const BYTES_MAX: usize = 1 << 20;
const TIME_MAX: Duration = Duration::from_secs(2);

/// A body that the handler and the layer above it both can read.
pub(super) struct Shared {
    payload: RefCell<Payload>,
    ended: Cell<bool>,
}

impl Shared {
    fn poll(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, PayloadError>>> {
        if self.ended.get() {
            return Poll::Ready(None);
        }
        let polled = Pin::new(&mut *self.payload.borrow_mut()).poll_next(cx);
        if let Poll::Ready(None | Some(Err(_))) = polled {
            self.ended.set(true);
        }
        polled
    }
}

struct Handlers(Rc<Shared>);

impl Stream for Handlers {
    type Item = Result<Bytes, PayloadError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll(cx)
    }
}

/// Puts a shared body in the request; `None` where it has none.
pub(super) fn share(req: &mut ServiceRequest) -> Option<Rc<Shared>> {
    let payload = req.take_payload();
    if matches!(payload, Payload::None) {
        return None;
    }
    let shared = Rc::new(Shared { payload: RefCell::new(payload), ended: Cell::new(false) });
    let stream: Pin<Box<dyn Stream<Item = Result<Bytes, PayloadError>>>> = Box::pin(Handlers(shared.clone()));
    req.set_payload(Payload::from(stream));
    Some(shared)
}

/// Reads the rest; false when the bound was reached first.
pub(super) async fn rest(body: &Shared) -> bool {
    if body.ended.get() {
        return true;
    }
    let read = async {
        let mut bytes = 0;
        while let Some(chunk) = poll_fn(|cx| body.poll(cx)).await {
            bytes += chunk.map_or(BYTES_MAX, |chunk| chunk.len());
            if bytes >= BYTES_MAX {
                return false;
            }
        }
        true
    };
    tokio::time::timeout(TIME_MAX, read).await.unwrap_or(false)
}
