//! An event on its way to whoever listens, rendered once for all of them.

use bytes::Bytes;
use uuid::Uuid;

use super::super::dto::OrderBody;
use super::super::order::Order;
use super::position::Seen;
use crate::http::sse;

/// The order as it was then.
#[derive(Clone, Debug)]
pub struct Event {
    pub order_id: Uuid,
    pub is_final: bool,
    /// As a stream of server-sent events has it.
    pub frame: Bytes,
    /// The order alone, as GET answers it; a part of `frame`.
    pub json: Bytes,
}

impl Event {
    /// `seen` is what a client has seen that has got this one; its text is the event's id. `None` where it cannot be said: no other event
    /// waits for it.
    pub fn of(order: Order, seen: &Seen) -> Option<Self> {
        let (order_id, is_final) = (order.id, order.status.is_final());
        let json = serde_json::to_string(&OrderBody::from(order));
        let json = json.inspect_err(|error| tracing::error!(%order_id, %error, "an event was passed over")).ok()?;
        let (frame, data) = sse::event(&seen.to_string(), &json);
        Some(Self { order_id, is_final, json: frame.slice(data), frame })
    }
}

/// Why a stream ended that was not over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Its client reads slower than events come.
    SlowReader,
    /// The process stops.
    Stopping,
    /// The database is another one than before, or the reader of events has failed.
    Interrupted,
}

impl Reason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SlowReader => "slow_reader",
            Self::Stopping => "stopping",
            Self::Interrupted => "interrupted",
        }
    }
}

/// What a stream brings.
#[derive(Clone, Debug)]
pub enum Update {
    Event(std::sync::Arc<Event>),
    /// The last one.
    Ended(Reason),
}
