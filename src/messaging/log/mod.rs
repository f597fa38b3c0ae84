//! The log: topics of partitions, each an ordered row of records with offsets. One contract, [`Log`], two
//! implementations: [`KafkaLog`] for a cluster, [`PostgresLog`] for the embedded default. The same tests run against both.
//!
//! What a caller may rely on, whichever it is:
//! - A record's partition is Kafka's default: murmur2 of its key ([`partitioner`]).
//! - Within a partition a reader sees records in offset order, and never passes one that commits late.
//! - Records of one key keep the order in which one `append` was given them, and in which appends were awaited.
//! - An appended record is on the log when `append` says so, with all the acknowledgements the log can give. When it does
//!   not say so, the record may be there all the same: duplicates are allowed, losses are not.
//! - Every call ends within a bound, whatever the broker or the database does; no constructor waits.
//!
//! May import config and db. Knows no event: what headers and payloads say is the caller's.

mod kafka;
pub mod partitioner;
mod postgres;

pub use kafka::KafkaLog;
#[doc(hidden)]
pub use postgres::PostgresLog;

use std::borrow::Cow;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};

use crate::contracts::Headers;
use crate::faults::Injected;

/// A record to append.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The logical name, without any prefix.
    pub topic: Arc<str>,
    /// Without one the record goes where its value would.
    pub key: Option<Bytes>,
    pub value: Option<Bytes>,
    /// Names are unique; where one comes twice the last counts.
    pub headers: Vec<(Cow<'static, str>, Bytes)>,
    /// Kept in milliseconds.
    pub timestamp: DateTime<Utc>,
}

impl Record {
    /// What chooses its partition.
    fn partition_key(&self) -> &[u8] {
        self.key.as_deref().or(self.value.as_deref()).unwrap_or_default()
    }
}

/// A record as it lies on the log; it may be any other producer's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRecord {
    pub offset: i64,
    pub key: Option<Bytes>,
    pub value: Option<Bytes>,
    pub headers: Headers,
    pub timestamp: DateTime<Utc>,
}

impl StoredRecord {
    /// Why this record's bytes could not be read at all. Key and value are absent then; it is a dead letter.
    pub fn unreadable(&self) -> Option<&[u8]> {
        self.headers.get(UNREADABLE)
    }
}

/// The one header of a record whose bytes could not be read; its value is the reason.
pub const UNREADABLE: &str = "log_unreadable";

/// What one `fetch` brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fetched {
    /// By offset, strictly ascending.
    pub records: Vec<StoredRecord>,
    /// Where to go on; also past offsets that hold no record.
    pub next_offset: i64,
    /// The offset that the next appended record will get, as of this fetch.
    pub end_offset: i64,
}

/// Why the log did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// Away, restarting, electing or overloaded: the same call may succeed later.
    #[error("log unavailable: {0}")]
    Unavailable(String),
    /// The partition holds `start..end`, and the offset asked for is neither in it nor its end.
    #[error("offset out of range, the partition holds {start}..{end}")]
    OutOfRange { start: i64, end: i64 },
    /// The broker does not let us in, or is not who it should be: credentials or certificates are wrong.
    #[error("not let in by the broker: {0}")]
    Refused(String),
    #[error("topic {0} is not there, or this user may not see it")]
    UnknownTopic(String),
    /// The record can never be appended. `index` is its place in [`AppendError::unacknowledged`].
    #[error("record of {bytes} bytes is above the limit of {bytes_max}")]
    RecordTooLarge { index: usize, bytes: usize, bytes_max: usize },
    /// A defect of ours or of the settings; trying again does not help.
    #[error("log error: {0}")]
    Defect(String),
}

impl LogError {
    /// Whether the same call may succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(self, LogError::Unavailable(_))
    }
}

impl From<Injected> for LogError {
    fn from(injected: Injected) -> Self {
        LogError::Unavailable(injected.to_string())
    }
}

/// An `append` that was not acknowledged in full. Some of `unacknowledged` may be on the log all the same.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{} records not acknowledged: {cause}", unacknowledged.len())]
pub struct AppendError {
    /// In the order in which they were given; all others of the call are on the log.
    pub unacknowledged: Vec<Record>,
    pub cause: LogError,
}

/// See the module's documentation for what every implementation promises.
#[async_trait]
pub trait Log: Send + Sync + 'static {
    /// Creates the topics that are missing, with `partitions` each; existing ones stay as they are.
    async fn create_topics(&self, topics: &[&str], partitions: i32) -> Result<(), LogError>;

    /// How many partitions `topic` has, numbered from 0. May be half a minute old.
    async fn partitions(&self, topic: &str) -> Result<i32, LogError>;

    /// Appends, all acknowledgements awaited. Partitions go side by side, with one request in flight each; where a batch
    /// of a partition fails, its later ones are not tried.
    async fn append(&self, records: Vec<Record>) -> Result<(), AppendError>;

    /// Reads from `from` on, at most about `bytes_max` but at least one record. With none there it waits for the first,
    /// up to the configured time, and then returns empty. May be dropped at any await.
    async fn fetch(&self, topic: &str, partition: i32, from: i64, bytes_max: i32) -> Result<Fetched, LogError>;

    /// The offset of the first record and the one after the last.
    async fn bounds(&self, topic: &str, partition: i32) -> Result<(i64, i64), LogError>;

    /// Removes the records below `offset`; [`LogError::OutOfRange`] if that is beyond the end.
    async fn delete_records_before(&self, topic: &str, partition: i32, offset: i64) -> Result<(), LogError>;

    /// Whether the log answers, within about a second. For readiness.
    async fn ping(&self) -> Result<(), LogError>;

    /// Removes what is older than the retention, a bounded amount of it, and says how many records that were; 0 when
    /// nothing more is due. A broker does this itself: always 0.
    async fn prune(&self) -> Result<u64, LogError>;
}

pub type SharedLog = Arc<dyn Log>;
