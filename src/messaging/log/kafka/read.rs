//! Reading a partition: what lies there may be any producer's, so offsets without a record and batches that cannot be
//! decoded are stepped over, never waited at.
//!
//! First the plain way ([`super::polls::LongPolls`]), together with whatever else is waited for; what is not plain goes through the client
//! library.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use chrono::Utc;
use rskafka::client::error::{Error, ProtocolError, RequestError};
use rskafka::client::partition::OffsetAt;
use rskafka::record::RecordAndOffset;

use super::connections::{bounded, meaning};
use super::decode::{self, Batch};
use super::fetch::Place;
use super::{KafkaLog, Log, LogError, raw};
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
        let place = Place { topic: self.name(topic).into_owned(), partition, from, bytes_max };
        if let Some(fetched) = self.polls.fetch(place).await? {
            return Ok(fetched);
        }
        match self.fetch_once(topic, partition, from, bytes_max, self.fetch_wait).await {
            Ok((records, end)) if records.is_empty() && from < end => {
                self.step_over_hole(topic, partition, from, bytes_max, end).await
            }
            Ok((records, end)) => Ok(fetched(records, from, end)),
            Err(Missed::OutOfRange) => Err(self.out_of_range(topic, partition, from).await),
            Err(Missed::Unreadable(_)) => self.step_over_unreadable(topic, partition, from, bytes_max).await,
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
                Err(Missed::Unreadable(_)) => return self.step_over_unreadable(topic, partition, next, bytes_max).await,
                Err(Missed::For(cause)) => return Err(cause),
            }
        }
        Ok(Fetched { records: Vec::new(), next_offset: next, end_offset: end.max(next) })
    }

    /// Something in an answer could not be decoded by the client library. Markers and aborted records are stepped over,
    /// what can be decoded here is; the rest becomes unreadable records, so that they are seen and hold nobody up.
    async fn step_over_unreadable(&self, topic: &str, partition: i32, from: i64, bytes_max: i32) -> Result<Fetched, LogError> {
        let name = self.name(topic);
        let place = Place { topic: name.into_owned(), partition, from, bytes_max };
        let asked = raw::fetch(self.connections.dialer(), self.connections.servers(), &place);
        let answer = bounded(self.request_timeout, "fetching by hand", asked).await?;
        let answer = answer.map_err(|error| LogError::Unavailable(error.to_string()))?;
        let mut transactions = Transactions::new(answer.aborted);
        let mut records = Vec::new();
        let mut next = from;
        for batch in decode::batches(answer.batches) {
            let aborted = transactions.aborted(&batch);
            if batch.end <= next || batch.is_control() || aborted {
                next = next.max(batch.end);
                continue;
            }
            if batch.is_compressed() {
                if next > from {
                    // The client library may well read it, from here on.
                    break;
                }
                match self.fetch_once(topic, partition, next, ONE_BATCH, NO_WAIT).await {
                    Ok((good, end)) => return Ok(fetched(good, next, end)),
                    Err(Missed::Unreadable(reason)) => {
                        records.extend((next.max(batch.base_offset)..batch.end).map(|offset| unreadable(offset, &reason)));
                    }
                    Err(Missed::OutOfRange) => return Err(self.out_of_range(topic, partition, next).await),
                    Err(Missed::For(cause)) => return Err(cause),
                }
            } else {
                match batch.records() {
                    Ok(some) => records.extend(some.into_iter().filter(|record| record.offset >= from)),
                    Err(reason) => {
                        records.extend((next.max(batch.base_offset)..batch.end).map(|offset| unreadable(offset, reason)));
                    }
                }
            }
            next = batch.end;
        }
        if next == from {
            return Err(LogError::Unavailable("an answer that cannot be read, and by hand there is nothing".into()));
        }
        if let Some(reason) = records.iter().find_map(StoredRecord::unreadable) {
            let reason = String::from_utf8_lossy(reason);
            tracing::error!(topic, partition, from, next, %reason, "records on the log cannot be decoded");
        }
        Ok(Fetched { records, next_offset: next, end_offset: answer.end_offset.max(next) })
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

/// A record of the client library's as one of ours.
pub fn from_kafka(stored: RecordAndOffset) -> StoredRecord {
    let record = stored.record;
    StoredRecord {
        offset: stored.offset,
        key: record.key.map(Bytes::from),
        value: record.value.map(Bytes::from),
        headers: record.headers.into_iter().collect(),
        timestamp: record.timestamp,
    }
}

fn unreadable(offset: i64, reason: &str) -> StoredRecord {
    let headers = [(UNREADABLE, reason)].into_iter().collect();
    StoredRecord { offset, key: None, value: None, headers, timestamp: Utc::now() }
}

/// Which transactions are being read whose records do not count.
struct Transactions {
    /// Producer and first offset, by offset.
    aborted: VecDeque<(i64, i64)>,
    /// Producers inside of one.
    inside: HashSet<i64>,
}

impl Transactions {
    fn new(mut aborted: Vec<(i64, i64)>) -> Self {
        aborted.sort_unstable_by_key(|(_, first_offset)| *first_offset);
        Self { aborted: aborted.into(), inside: HashSet::new() }
    }

    /// Whether `batch`, the next on the log, belongs to one.
    fn aborted(&mut self, batch: &Batch) -> bool {
        while let Some((producer_id, _)) = self.aborted.pop_front_if(|(_, first_offset)| *first_offset < batch.end) {
            self.inside.insert(producer_id);
        }
        if batch.is_abort() {
            self.inside.remove(&batch.producer_id);
        }
        batch.is_transactional() && self.inside.contains(&batch.producer_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_aborted_transactions_do_not_count_and_all_others_do() {
        let batches = [
            (Batch::of_transaction(1, 0..3), false),
            (Batch::of_transaction(2, 3..5), true),
            (Batch::marker(1, 5, false), false),
            (Batch::of_transaction(2, 6..7), true),
            (Batch::marker(2, 7, true), false),
            (Batch::of_transaction(2, 8..9), false),
            (Batch::marker(2, 9, false), false),
            (Batch::of_transaction(1, 10..11), true),
            (Batch::marker(1, 11, true), false),
        ];
        let mut transactions = Transactions::new(vec![(1, 10), (2, 3)]);
        for (batch, aborted) in batches {
            assert_eq!(transactions.aborted(&batch), aborted, "{batch:?}");
        }
    }
}
