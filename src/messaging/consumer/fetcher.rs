//! Fetching one partition ahead of its consumer, and the waits between tries.

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::sync::mpsc;

use crate::shutdown::Shutdown;
use crate::telemetry::SharedIncident;

use super::super::log::{LogError, SharedLog, StoredRecord};
use super::offsets::Owned;

/// Bytes of one fetch.
const FETCH_BYTES_MAX: i32 = 512 * 1024;

/// What is handed on in one piece, at most: all of it is applied in one transaction, which must end within the database's
/// timeouts. A fetch may bring any amount more, because other producers compress their batches.
const PIECE_RECORDS_MAX: usize = 2_000;
const PIECE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// What a fetcher brings.
pub enum Fetched {
    Records {
        partition: i32,
        epoch: i64,
        from: i64,
        records: Vec<StoredRecord>,
        next_offset: i64,
    },
    /// The offset is not on the log (any more): go on at `to`.
    Reset {
        partition: i32,
        epoch: i64,
        from: i64,
        to: i64,
    },
}

impl Fetched {
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

    /// Under which it was fetched; what an earlier owner's fetcher left is nobody's.
    pub fn epoch(&self) -> i64 {
        match self {
            Self::Records { epoch, .. } | Self::Reset { epoch, .. } => *epoch,
        }
    }
}

/// Fetches a partition from where it is owned; waits while the consumer is behind.
pub async fn fetch(
    log: SharedLog,
    topic: Arc<str>,
    owned: Owned,
    to: mpsc::Sender<Fetched>,
    incident: SharedIncident,
    stop: Shutdown,
) {
    let Owned { partition, epoch, next_offset: mut from } = owned;
    let mut delays = backoff();
    loop {
        let fetched = tokio::select! {
            biased;
            fetched = log.fetch(&topic, partition, from, FETCH_BYTES_MAX) => fetched,
            () = stop.stopped() => return,
        };
        let sends = match fetched {
            Ok(fetched) => {
                incident.recovered(partition);
                delays = backoff();
                if fetched.next_offset == from {
                    continue;
                }
                let sends = pieces(partition, epoch, from, fetched.records, fetched.next_offset);
                from = fetched.next_offset;
                sends
            }
            Err(LogError::OutOfRange { start, .. }) if start != from => {
                let reset = Fetched::Reset { partition, epoch, from, to: start };
                from = start;
                vec![reset]
            }
            Err(error) => {
                incident.failed(partition, &format_args!("{topic}: {error}"));
                pause(delays.next().unwrap_or(Duration::from_secs(2)), &stop).await;
                continue;
            }
        };
        for send in sends {
            if to.send(send).await.is_err() {
                return;
            }
        }
    }
}

/// Cuts what was fetched; the pieces' offsets follow each other without a gap.
fn pieces(partition: i32, epoch: i64, mut from: i64, fetched: Vec<StoredRecord>, end: i64) -> Vec<Fetched> {
    let mut pieces = Vec::new();
    let (mut records, mut bytes) = (Vec::new(), 0);
    for record in fetched {
        let size = bytes_of(&record);
        if !records.is_empty() && (records.len() >= PIECE_RECORDS_MAX || bytes + size > PIECE_BYTES_MAX) {
            let next_offset = record.offset;
            pieces.push(Fetched::Records { partition, epoch, from, records: std::mem::take(&mut records), next_offset });
            (from, bytes) = (next_offset, 0);
        }
        bytes += size;
        records.push(record);
    }
    pieces.push(Fetched::Records { partition, epoch, from, records, next_offset: end });
    pieces
}

fn bytes_of(record: &StoredRecord) -> usize {
    let headers: usize = record.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
    let sized = |bytes: &Option<bytes::Bytes>| bytes.as_ref().map_or(0, bytes::Bytes::len);
    sized(&record.key) + sized(&record.value) + headers
}

pub fn count(fetched: &[Fetched]) -> usize {
    let records = |one: &Fetched| match one {
        Fetched::Records { records, .. } => records.len(),
        Fetched::Reset { .. } => 0,
    };
    fetched.iter().map(records).sum()
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

    /// From, to and number of records of each piece.
    fn cut(records: Vec<StoredRecord>, end: i64) -> Vec<(i64, i64, usize)> {
        let piece = |one| match one {
            Fetched::Records { from, records, next_offset, .. } => (from, next_offset, records.len()),
            Fetched::Reset { .. } => unreachable!("nothing is reset here"),
        };
        pieces(0, 1, 3, records, end).into_iter().map(piece).collect()
    }

    #[test]
    fn a_fetch_that_is_too_large_for_one_transaction_is_cut_without_a_gap() {
        let records = |n: i64| (0..n).map(|i| record(5 + 2 * i, 1)).collect::<Vec<_>>();
        assert_eq!(cut(records(0), 9), [(3, 9, 0)]);
        assert_eq!(cut(records(2_000), 5_000), [(3, 5_000, 2_000)]);
        assert_eq!(cut(records(4_001), 9_000), [(3, 4_005, 2_000), (4_005, 8_005, 2_000), (8_005, 9_000, 1)]);
        let large = vec![record(3, 3 << 20), record(4, 3 << 20), record(5, 9 << 20), record(6, 1), record(7, 1)];
        assert_eq!(cut(large, 8), [(3, 4, 1), (4, 5, 1), (5, 6, 1), (6, 8, 2)]);
    }
}
