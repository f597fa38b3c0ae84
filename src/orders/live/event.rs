//! An event on its way to whoever listens, rendered once for all of them.

use bytes::Bytes;
use uuid::Uuid;

use super::super::dto::OrderBody;
use super::position::Seen;
use super::store::Row;
use crate::db::DbError;
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
    /// `seen` is what a client has seen that has got this one; its text is the event's id.
    pub fn new(row: Row, seen: &Seen) -> Result<Self, DbError> {
        let (order_id, is_final) = (row.order.id, row.order.status.is_final());
        let json = serde_json::to_string(&OrderBody::from(row.order));
        let json = json.map_err(|error| DbError::Defect(format!("order {order_id}: {error}")))?;
        let (frame, data) = sse::event(&seen.to_string(), &json);
        Ok(Self { order_id, is_final, json: frame.slice(data), frame })
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
