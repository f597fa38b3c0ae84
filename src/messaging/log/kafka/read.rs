//! Reading a partition: what lies there may be any producer's, so offsets without a record and batches that cannot be
//! decoded are stepped over, never waited at.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use chrono::Utc;
use rskafka::client::error::{Error, ProtocolError, RequestError};
use rskafka::client::partition::OffsetAt;
use rskafka::record::RecordAndOffset;

use super::connections::{bounded, meaning};
use super::{KafkaLog, Log, LogError};
use crate::messaging::log::{Fetched, StoredRecord, UNREADABLE};

/// The broker then sends the one batch that holds the offset, however large.
const ONE_BATCH: i32 = 1;
const NO_WAIT: Duration = Duration::ZERO;
/// Offsets that one call steps over at most, a round trip each.
const STEPS_MAX: i64 = 500;

/// Why one fetch brought nothing.
enum Missed {
    OutOfRange,
    /// The answer came, and something in it could not be decoded.
    Unreadable(String),
    For(LogError),
}

impl KafkaLog {
    pub(super) async fn read(&self, topic: &str, partition: i32, from: i64, bytes_max: i32) -> Result<Fetched, LogError> {
        match self.fetch_once(topic, partition, from, bytes_max, self.fetch_wait).await {
            Ok((records, end)) if records.is_empty() && from < end => {
                self.step_over_hole(topic, partition, from, bytes_max, end).await
            }
            Ok((records, end)) => Ok(fetched(records, from, end)),
            Err(Missed::OutOfRange) => Err(self.out_of_range(topic, partition, from).await),
            Err(Missed::Unreadable(reason)) => self.step_over_unreadable(topic, partition, from, reason).await,
            Err(Missed::For(cause)) => Err(cause),
        }
    }

    /// Nothing is readable at `from` although the log goes on: an open transaction, or offsets without records (a
    /// transaction's marker, compaction).
    async fn step_over_hole(&self, topic: &str, partition: i32, from: i64, bytes_max: i32, end: i64) -> Result<Fetched, LogError> {
        // Up to here every record can be read; asked after the empty answer, so each offset is looked at once more.
        let readable_to = self.offset(topic, partition, OffsetAt::Latest).await?;
        let mut next = from;
        while next < readable_to.min(from + STEPS_MAX) {
            match self.fetch_once(topic, partition, next, bytes_max, NO_WAIT).await {
                Ok((records, _)) if records.is_empty() => next += 1,
                Ok((records, end)) => return Ok(fetched(records, next, end)),
                // What is wrong at the next offset is told when that is asked for.
                Err(_) if next > from => break,
                Err(Missed::OutOfRange) => return Err(self.out_of_range(topic, partition, next).await),
                Err(Missed::Unreadable(reason)) => return self.step_over_unreadable(topic, partition, next, reason).await,
                Err(Missed::For(cause)) => return Err(cause),
            }
        }
        Ok(Fetched { records: Vec::new(), next_offset: next, end_offset: end.max(next) })
    }

    /// Something in an answer could not be decoded. The batches before it are read one by one; the offsets of the batch
    /// itself become unreadable records, so that they are seen and hold nobody up.
    async fn step_over_unreadable(&self, topic: &str, partition: i32, from: i64, reason: String) -> Result<Fetched, LogError> {
        let end = self.offset(topic, partition, OffsetAt::Latest).await?;
        let mut records = Vec::new();
        let mut next = from;
        while next < end.min(from + STEPS_MAX) {
            match self.fetch_once(topic, partition, next, ONE_BATCH, NO_WAIT).await {
                Err(Missed::Unreadable(reason)) => {
                    records.push(unreadable(next, reason));
                    next += 1;
                }
                Ok((good, end)) if records.is_empty() => return Ok(fetched(good, next, end)),
                Err(Missed::For(cause)) if records.is_empty() => return Err(cause),
                Err(Missed::OutOfRange) if records.is_empty() => return Err(self.out_of_range(topic, partition, next).await),
                _ => break,
            }
        }
        tracing::error!(topic, partition, from, next, reason, "records on the log cannot be decoded");
        Ok(Fetched { records, next_offset: next, end_offset: end.max(next) })
    }

    async fn out_of_range(&self, topic: &str, partition: i32, from: i64) -> LogError {
        match self.bounds(topic, partition).await {
            Ok((start, end)) if (start..=end).contains(&from) => LogError::Unavailable("the partition's bounds moved".into()),
            Ok((start, end)) => LogError::OutOfRange { start, end },
            Err(error) => error,
        }
    }

    async fn fetch_once(
        &self,
        topic: &str,
        partition: i32,
        from: i64,
        bytes_max: i32,
        wait: Duration,
    ) -> Result<(Vec<RecordAndOffset>, i64), Missed> {
        let loan = self.reader(topic, partition).await.map_err(Missed::For)?;
        let wait_ms = i32::try_from(wait.as_millis()).unwrap_or(i32::MAX);
        // The client's range excludes its end.
        let bytes = 1..bytes_max.max(ONE_BATCH).saturating_add(1);
        let answer = bounded(wait + self.request_timeout, "fetching", loan.client.fetch_records(from, bytes, wait_ms)).await;
        let missed = match answer {
            Ok(Ok(answer)) => {
                self.connections.give_back(loan);
                return Ok(answer);
            }
            Ok(Err(error)) => missed(topic, error),
            Err(late) => Missed::For(late),
        };
        match &missed {
            Missed::For(_) => self.connections.give_up(loan).await,
            Missed::OutOfRange | Missed::Unreadable(_) => self.connections.give_back(loan),
        }
        Err(missed)
    }
}

fn missed(topic: &str, error: Error) -> Missed {
    match error {
        Error::ServerError { protocol_error: ProtocolError::OffsetOutOfRange, .. } => Missed::OutOfRange,
        // The frame came in whole, so it is its content that this client cannot read.
        Error::Request(RequestError::ReadError(_) | RequestError::ReadVersionedError(_)) => Missed::Unreadable(error.to_string()),
        Error::InvalidResponse(reason) if reason.contains("imestamp") => Missed::Unreadable(reason),
        error => Missed::For(meaning(topic, &error)),
    }
}

fn fetched(records: Vec<RecordAndOffset>, from: i64, end: i64) -> Fetched {
    let next_offset = records.last().map_or(from, |last| last.offset + 1);
    Fetched { records: records.into_iter().map(from_kafka).collect(), next_offset, end_offset: end.max(next_offset) }
}

fn from_kafka(stored: RecordAndOffset) -> StoredRecord {
    let record = stored.record;
    StoredRecord {
        offset: stored.offset,
        key: record.key.map(Bytes::from),
        value: record.value.map(Bytes::from),
        headers: record.headers.into_iter().map(|(name, value)| (name, Bytes::from(value))).collect(),
        timestamp: record.timestamp,
    }
}

fn unreadable(offset: i64, reason: String) -> StoredRecord {
    let headers = BTreeMap::from([(UNREADABLE.to_owned(), Bytes::from(reason))]);
    StoredRecord { offset, key: None, value: None, headers, timestamp: Utc::now() }
}
