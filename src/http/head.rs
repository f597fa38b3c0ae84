//! The answer to `HEAD`: the head of the answer to `GET`, its length included, and no body.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use actix_web::body::{BodySize, MessageBody};
use bytes::Bytes;

/// Announces a body's size and sends nothing; so an endless stream ends at once.
pub(super) struct HeadOf(BodySize);

impl HeadOf {
    pub(super) fn of(body: &impl MessageBody) -> Self {
        Self(body.size())
    }
}

impl MessageBody for HeadOf {
    type Error = Infallible;

    fn size(&self) -> BodySize {
        self.0
    }

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Bytes, Infallible>>> {
        Poll::Ready(None)
    }
}
