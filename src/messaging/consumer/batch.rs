//! All that one transaction does: what several partitions brought, decoded.

use std::sync::Arc;

use chrono::{DateTime, Utc};

use crate::contracts::Envelope;
use crate::telemetry;
use crate::trace::TraceContext;

use super::super::dead_letter::Poison;
use super::super::log::StoredRecord;
use super::delivery::{Delivery, Position, Received};
use super::fetcher::{Fetched, bytes_of};
use super::inbox::Inbox;
use super::offsets::Move;

/// The last time that is kept as it is.
const TIME_MAX: DateTime<Utc> = match DateTime::from_timestamp_millis(253_402_300_799_999) {
    Some(end_of_9999) => end_of_9999,
    None => DateTime::<Utc>::MAX_UTC,
};

/// Kept until it commits or the lease is lost.
#[derive(Debug)]
pub struct Batch<E> {
    /// By partition.
    pub moves: Vec<Move>,
    /// In log order within each partition.
    pub received: Vec<Received<E>>,
    pub poisoned: Vec<(Delivery, Poison)>,
}

impl<E> Default for Batch<E> {
    fn default() -> Self {
        Self { moves: Vec::new(), received: Vec::new(), poisoned: Vec::new() }
    }
}

/// The records of one piece, in log order, each decoded or refused.
#[derive(Debug)]
pub struct Decoded<E> {
    pub received: Vec<Received<E>>,
    pub poisoned: Vec<(Delivery, Poison)>,
    /// Of its records as they lie on the log.
    pub bytes: usize,
}

impl<E> Decoded<E> {
    pub fn of<I: Inbox<Event = E>>(inbox: &I, topic: &Arc<str>, partition: i32, records: Vec<StoredRecord>) -> Self {
        let bytes = records.iter().map(bytes_of).sum();
        let mut decoded = Self { received: Vec::with_capacity(records.len()), poisoned: Vec::new(), bytes };
        let received_at = Utc::now();
        for record in records {
            let position = Position { topic: topic.clone(), partition, offset: record.offset };
            let envelope = Envelope::read(&record.headers);
            let StoredRecord { key, value, headers, timestamp, .. } = record;
            // Any producer's, and the broker checks little: the database's times do not reach as far.
            let published_at = timestamp.clamp(DateTime::UNIX_EPOCH, TIME_MAX);
            let trace = envelope.trace.map_or_else(telemetry::new_trace, TraceContext::child);
            let delivery = Delivery { position, key, value, headers, envelope, trace, published_at, received_at };
            match inbox.decode(&delivery) {
                Ok(event) => decoded.received.push(Received { event, delivery }),
                Err(poison) => decoded.poisoned.push((delivery, poison)),
            }
        }
        decoded
    }

    pub fn count(&self) -> usize {
        self.received.len() + self.poisoned.len()
    }
}

impl<E> Batch<E> {
    /// What comes after that of its partition.
    pub(super) fn add(&mut self, topic: &str, one: Fetched<E>) {
        let (partition, epoch) = (one.partition(), one.epoch());
        let (from, to) = one.span();
        match one {
            Fetched::Records { decoded: Decoded { received, poisoned, .. }, .. } => {
                self.received.extend(received);
                self.poisoned.extend(poisoned);
            }
            Fetched::Reset { .. } => {
                tracing::error!(%topic, partition, from, to, "the offset is not on the log; going on where the log begins");
                metrics::counter!("shopd_consumer_offset_resets_total", "topic" => topic.to_owned()).increment(1);
            }
        }
        match self.moves.iter_mut().find(|m| m.partition == partition) {
            Some(earlier) => earlier.to = to,
            None => self.moves.push(Move { partition, from, to, epoch }),
        }
    }

    pub(super) fn committed(&self, topic: &str) {
        metrics::counter!("shopd_consumer_records_total", "topic" => topic.to_owned()).increment(self.received.len() as u64);
    }
}
