//! Fetching one partition ahead of its consumer, and the waits between tries.

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::sync::mpsc;
use tokio::task::yield_now;

use crate::shutdown::Shutdown;
use crate::telemetry::SharedIncident;

use super::super::log::{LogError, SharedLog, StoredRecord};
use super::super::reach::Reach;
use super::batch::Decoded;
use super::inbox::Inbox;
use super::offsets::Owned;

/// Bytes of one fetch.
const FETCH_BYTES_MAX: i32 = 512 * 1024;

/// More records than these are decoded on a thread of their own: the threads of the runtime are there for those who wait for a server.
/// (Tried: on these threads the statements of the batch in hand were sent up to 50 ms late.)
const DECODED_AT_ONCE_MAX: usize = 64;

/// What is handed on in one piece, at most: all of it is applied in one transaction, which must end within the database's
/// timeouts. A fetch may bring any amount more, because other producers compress their batches.
const PIECE_RECORDS_MAX: usize = 2_000;
const PIECE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// What a fetcher brings, decoded: that is done side by side with the batch in hand.
pub enum Fetched<E> {
    Records {
        partition: i32,
        epoch: i64,
        from: i64,
        decoded: Decoded<E>,
        next_offset: i64,
        /// Of the log, when this was fetched.
        end_offset: i64,
    },
    /// The offset is not on the log (any more): go on at `to`.
    Reset { partition: i32, epoch: i64, from: i64, to: i64 },
}

impl<E> Fetched<E> {
    pub fn partition(&self) -> i32 {
        match self {
            Self::Records { partition, .. } | Self::Reset { partition, .. } => *partition,
        }
    }

    /// Where it goes on from, and to.
    pub fn span(&self) -> (i64, i64) {
        match self {
            Self::Records { from, next_offset, .. } => (*from, *next_offset),
            Self::Reset { from, to, .. } => (*from, *to),
        }
    }

    pub fn records(&self) -> usize {
        match self {
            Self::Records { decoded, .. } => decoded.count(),
            Self::Reset { .. } => 0,
        }
    }

    /// Of its records.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Records { decoded, .. } => decoded.bytes,
            Self::Reset { .. } => 0,
        }
    }

    /// Under which it was fetched; what an earlier owner's fetcher left is nobody's.
    pub fn epoch(&self) -> i64 {
        match self {
            Self::Records { epoch, .. } | Self::Reset { epoch, .. } => *epoch,
        }
    }
}

/// Where it comes from.
pub struct Source {
    pub log: SharedLog,
    pub reach: Arc<Reach>,
    pub topic: Arc<str>,
}

/// Fetches a partition from where it is owned; waits while the consumer is behind.
pub async fn fetch<I: Inbox>(
    source: Source,
    inbox: Arc<I>,
    owned: Owned,
    to: mpsc::Sender<Fetched<I::Event>>,
    incident: SharedIncident,
    stop: Shutdown,
) {
    let Source { log, reach, topic } = source;
    let Owned { partition, epoch, next_offset: mut from } = owned;
    let (mut delays, incident) = (backoff(), incident.worker(partition));
    loop {
        let fetched = tokio::select! {
            biased;
            fetched = log.fetch(&topic, partition, from, FETCH_BYTES_MAX) => fetched,
            () = stop.stopped() => return,
        };
        match fetched {
            Ok(fetched) => {
                incident.recovered();
                reach.heard();
                delays = backoff();
                if fetched.next_offset == from {
                    continue;
                }
                let end_offset = fetched.end_offset;
                for Piece { records, next_offset } in pieces(fetched.records, fetched.next_offset) {
                    let Some(decoded) = decode(&inbox, &topic, partition, records).await else { return };
                    let piece = Fetched::Records { partition, epoch, from, decoded, next_offset, end_offset };
                    if to.send(piece).await.is_err() {
                        return;
                    }
                    from = next_offset;
                }
                // What was handed on goes to the database before the broker is asked for more: both are slower at once, on few cores.
                yield_now().await;
            }
            Err(LogError::OutOfRange { start, .. }) if start != from => {
                if to.send(Fetched::Reset { partition, epoch, from, to: start }).await.is_err() {
                    return;
                }
                from = start;
            }
            Err(error) => {
                reach.doubted();
                incident.failed(&format_args!("{topic}: {error}"));
                pause(delays.next().unwrap_or(Duration::from_secs(2)), &stop).await;
            }
        }
    }
}

/// `None` where the process ends.
async fn decode<I: Inbox>(
    inbox: &Arc<I>,
    topic: &Arc<str>,
    partition: i32,
    records: Vec<StoredRecord>,
) -> Option<Decoded<I::Event>> {
    if records.len() <= DECODED_AT_ONCE_MAX {
        return Some(Decoded::of(&**inbox, topic, partition, records));
    }
    let (inbox, topic) = (inbox.clone(), topic.clone());
    match tokio::task::spawn_blocking(move || Decoded::of(&*inbox, &topic, partition, records)).await {
        Ok(decoded) => Some(decoded),
        Err(ended) if ended.is_panic() => std::panic::resume_unwind(ended.into_panic()),
        Err(_) => None,
    }
}

/// Consecutive records that are handed on together.
struct Piece {
    records: Vec<StoredRecord>,
    /// Where the next one begins.
    next_offset: i64,
}

/// Cuts what was fetched; the pieces' offsets follow each other without a gap.
fn pieces(fetched: Vec<StoredRecord>, end: i64) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let (mut records, mut bytes) = (Vec::new(), 0);
    for record in fetched {
        let size = bytes_of(&record);
        if !records.is_empty() && (records.len() >= PIECE_RECORDS_MAX || bytes + size > PIECE_BYTES_MAX) {
            pieces.push(Piece { records: std::mem::take(&mut records), next_offset: record.offset });
            bytes = 0;
        }
        bytes += size;
        records.push(record);
    }
    pieces.push(Piece { records, next_offset: end });
    pieces
}

pub fn bytes_of(record: &StoredRecord) -> usize {
    let sized = |bytes: &Option<bytes::Bytes>| bytes.as_ref().map_or(0, bytes::Bytes::len);
    sized(&record.key) + sized(&record.value) + record.headers.size()
}

/// 50 ms, doubling to 2 s, with jitter, for ever.
pub fn backoff() -> backon::ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(50))
        .with_max_delay(Duration::from_secs(2))
        .with_jitter()
        .without_max_times()
        .build()
}

pub async fn pause(duration: Duration, stop: &Shutdown) {
    tokio::select! {
        biased;
        () = tokio::time::sleep(duration) => {}
        () = stop.stopped() => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(offset: i64, bytes: usize) -> StoredRecord {
        let value = Some(vec![0; bytes].into());
        StoredRecord { offset, key: None, value, headers: Default::default(), timestamp: Default::default() }
    }

    /// Where each piece ends, and its number of records.
    fn cut(records: Vec<StoredRecord>, end: i64) -> Vec<(i64, usize)> {
        pieces(records, end).into_iter().map(|piece| (piece.next_offset, piece.records.len())).collect()
    }

    #[test]
    fn a_fetch_that_is_too_large_for_one_transaction_is_cut_without_a_gap() {
        let records = |n: i64| (0..n).map(|i| record(5 + 2 * i, 1)).collect::<Vec<_>>();
        assert_eq!(cut(records(0), 9), [(9, 0)]);
        assert_eq!(cut(records(2_000), 5_000), [(5_000, 2_000)]);
        assert_eq!(cut(records(4_001), 9_000), [(4_005, 2_000), (8_005, 2_000), (9_000, 1)]);
        let large = vec![record(3, 3 << 20), record(4, 3 << 20), record(5, 9 << 20), record(6, 1), record(7, 1)];
        assert_eq!(cut(large, 8), [(4, 1), (5, 1), (6, 1), (8, 2)]);
    }
}
