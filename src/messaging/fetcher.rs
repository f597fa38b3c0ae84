//! Fetching one partition ahead of its consumer, and the waits between tries.

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::sync::mpsc;

use crate::shutdown::Shutdown;
use crate::telemetry::SharedIncident;

use super::log::{LogError, SharedLog, StoredRecord};

/// Bytes of one fetch.
const FETCH_BYTES_MAX: i32 = 512 * 1024;

/// What a fetcher brings.
pub enum Fetched {
    Records {
        partition: i32,
        from: i64,
        records: Vec<StoredRecord>,
        next_offset: i64,
    },
    /// The offset is not on the log (any more): go on at `to`.
    Reset {
        partition: i32,
        from: i64,
        to: i64,
    },
}

/// Fetches one partition from `from` on; waits while the consumer is behind.
pub async fn fetch(
    log: SharedLog,
    topic: Arc<str>,
    partition: i32,
    mut from: i64,
    to: mpsc::Sender<Fetched>,
    incident: SharedIncident,
    stop: Shutdown,
) {
    let mut delays = backoff();
    loop {
        let fetched = tokio::select! {
            fetched = log.fetch(&topic, partition, from, FETCH_BYTES_MAX) => fetched,
            () = stop.stopped() => return,
        };
        let send = match fetched {
            Ok(fetched) => {
                incident.recovered(partition);
                delays = backoff();
                if fetched.next_offset == from {
                    continue;
                }
                let (records, next_offset) = (fetched.records, fetched.next_offset);
                let send = Fetched::Records { partition, from, records, next_offset };
                from = next_offset;
                send
            }
            Err(LogError::OutOfRange { start, .. }) if start != from => {
                let send = Fetched::Reset { partition, from, to: start };
                from = start;
                send
            }
            Err(error) => {
                incident.failed(partition, &format_args!("{topic}: {error}"));
                pause(delays.next().unwrap_or(Duration::from_secs(2)), &stop).await;
                continue;
            }
        };
        if to.send(send).await.is_err() {
            return;
        }
    }
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
        () = tokio::time::sleep(duration) => {}
        () = stop.stopped() => {}
    }
}
