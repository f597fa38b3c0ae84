//! A record on its way from the log to a service.

use std::sync::Arc;

use bytes::Bytes;
use chrono::{DateTime, Utc};

use crate::contracts::{Envelope, Headers};
use crate::trace::TraceContext;

/// Where a record stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    pub topic: Arc<str>,
    pub partition: i32,
    pub offset: i64,
}

/// A record as it came.
#[derive(Clone, Debug)]
pub struct Delivery {
    pub position: Position,
    pub key: Option<Bytes>,
    pub value: Option<Bytes>,
    pub headers: Headers,
    pub envelope: Envelope,
    /// Where the work for this record stands in its trace; a trace of its own where the record names none.
    pub trace: TraceContext,
    /// The record's own time on the log.
    pub published_at: DateTime<Utc>,
    pub received_at: DateTime<Utc>,
}

/// A decoded record, with the record as it came: one that cannot be applied is kept whole.
#[derive(Clone, Debug)]
pub struct Received<E> {
    pub event: E,
    pub delivery: Delivery,
}

#[cfg(test)]
impl Delivery {
    /// An empty record at this place.
    pub fn at(partition: i32, offset: i64) -> Self {
        Self {
            position: Position { topic: "t".into(), partition, offset },
            key: None,
            value: None,
            headers: Headers::default(),
            envelope: Envelope::default(),
            trace: TraceContext::new_root(),
            published_at: DateTime::UNIX_EPOCH,
            received_at: DateTime::UNIX_EPOCH,
        }
    }
}
