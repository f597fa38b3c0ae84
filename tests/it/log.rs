//! The contract of the log, as one suite that runs against both implementations, and what each has beside it.

mod kafka;
mod postgres;
pub mod suite;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use shopd::messaging::log::{Log, Record, SharedLog, StoredRecord};

use crate::support::shop::{PATIENCE, poll};

/// Nothing in these tests takes longer, on the slowest machine.
const LONG: Duration = Duration::from_secs(30);
const BYTES_MAX: i32 = 1 << 20;

/// A log, empty at first, and as many processes on it as a test likes.
pub struct Subject {
    open: Box<dyn Fn(Duration) -> SharedLog + Send + Sync>,
}

impl Subject {
    /// `open` is told how long an idle fetch waits.
    pub fn new(open: impl Fn(Duration) -> SharedLog + Send + Sync + 'static) -> Self {
        Self { open: Box::new(open) }
    }

    /// Another process's handle: it shares nothing with the handles before but the log.
    pub fn open(&self) -> SharedLog {
        self.open_waiting(FETCH_WAIT)
    }

    /// The same, for a test in which an idle fetch ends.
    pub fn open_waiting(&self, fetch_wait: Duration) -> SharedLog {
        (self.open)(fetch_wait)
    }
}

/// How long an idle fetch waits in tests that do not wait for its end: beyond what they allow for anything else.
pub const FETCH_WAIT: Duration = Duration::from_secs(10);

pub fn record(topic: &str, key: &str, value: impl Into<Bytes>) -> Record {
    Record {
        topic: Arc::from(topic),
        key: Some(Bytes::copy_from_slice(key.as_bytes())),
        value: Some(value.into()),
        headers: vec![
            (Cow::Borrowed("ce_id"), Bytes::from(format!("id of {key}"))),
            (Cow::Borrowed("binary"), Bytes::from_static(&[0, 255, 10])),
        ],
        timestamp: now(),
    }
}

/// To the millisecond, which is what a log keeps.
pub fn now() -> DateTime<Utc> {
    DateTime::from_timestamp_millis(Utc::now().timestamp_millis()).expect("a time of today")
}

/// Reads a partition from `from` until `count` records came.
pub async fn read(log: &dyn Log, topic: &str, partition: i32, from: i64, count: usize) -> Vec<StoredRecord> {
    let mut records: Vec<StoredRecord> = Vec::new();
    let mut next = from;
    let reading = async {
        while records.len() < count {
            let fetched = log.fetch(topic, partition, next, BYTES_MAX).await.expect("a fetch");
            assert!(fetched.next_offset >= next && fetched.end_offset >= fetched.next_offset, "{fetched:?}");
            next = fetched.next_offset;
            records.extend(fetched.records);
        }
    };
    tokio::time::timeout(LONG, reading).await.unwrap_or_else(|_| panic!("{topic}/{partition}: {count} records wanted"));
    records
}

/// Waits until the log answers a ping: it has a second for that, which a busy machine may take away.
pub async fn until_it_answers(log: &dyn Log) {
    let since = Instant::now();
    while let Err(error) = log.ping().await {
        assert!(error.is_transient() && since.elapsed() < PATIENCE, "{error:?}");
        poll().await;
    }
}

pub fn offsets(records: &[StoredRecord]) -> Vec<i64> {
    records.iter().map(|record| record.offset).collect()
}

pub fn values(records: &[StoredRecord]) -> Vec<String> {
    let text = |record: &StoredRecord| String::from_utf8_lossy(record.value.as_deref().unwrap_or_default()).into_owned();
    records.iter().map(text).collect()
}
