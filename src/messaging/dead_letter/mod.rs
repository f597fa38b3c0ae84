//! Dead letters: records that could not be applied, kept whole in the consumer's database. They are written with the offset in the
//! batch's own transaction, so one is neither lost nor written without being passed. Owns `dead_letter`.
//!
//! - A record that cannot be decoded is *dead*: it holds nobody up and stays until an operator acts.
//! - One that decodes but keeps failing is *parked*: the head of its key's queue, tried again with back-off a few times and then
//!   only when an operator says so. Its key's later records are *waiting* behind it, each business key once. A queue always has a
//!   head: where one is applied or discarded, the first that waits takes its place.
//! - A *resolved* one was dead and was applied after all, out of its order; its position is kept for audits, nothing else of it.
//!
//! Only the partition's owner writes here, in transactions that are fenced by the partition's offset. [`operate`] is what the
//! commands do: they read, and ask the owner by a mark.

mod copy;
mod headers;
mod keep;
pub mod operate;
mod replay;

use std::sync::Arc;

use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Binary, Bool, Integer, Nullable, Text, Timestamptz};
use diesel_async::RunQueryDsl;

use chrono::{DateTime, Utc};

use crate::contracts::Envelope;
use crate::db::{Conn, DbError, sql};
use crate::telemetry;
use crate::trace::TraceContext;

use super::consumer::{Delivery, Position};

pub use copy::{is_copy, shorten};
pub use headers::{bytes_json, from_json as headers_from_json, to_json as headers_json};
pub use keep::{Keep, Keys, heads, keep, members};
pub use replay::{Fate, Stored, discarded, due, followers, forget, pending, record, settle};

/// The channel on which a database's consumers hear that an operator asked for something, or that another replica gave partitions back.
pub const CHANNEL: &str = "shopd_dead_letter";

/// Why a record can never be applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Poison(pub String);

/// Characters of a reason that are kept.
const REASON_CHARS_MAX: usize = 1_000;

/// Bytes of a key or a value that a log line shows.
const SHOWN_BYTES_MAX: usize = 64 * 1024;

/// Of a key or a value, for a log line: the text, else base64; nothing where there is none.
fn shown(bytes: Option<&[u8]>) -> String {
    let bytes = bytes.unwrap_or_default();
    match headers::bytes_json(&bytes[..bytes.len().min(SHOWN_BYTES_MAX)]) {
        serde_json::Value::String(text) => text,
        encoded => encoded.to_string(),
    }
}

/// Says all of a letter that is gone.
pub fn tell_gone(row: &Row, why: &str) {
    let Row { topic, partition, log_offset: offset, reason, attempts, state, headers, .. } = row;
    let (key, value) = (shown(row.key.as_deref()), shown(row.value.as_deref()));
    tracing::warn!(topic, partition, offset, state, reason, attempts, %key, %value, headers, "{why}");
}

/// As Postgres can hold it, and no longer than anybody reads.
fn reason_text(reason: &str) -> String {
    reason.chars().filter(|c| *c != '\0').take(REASON_CHARS_MAX).collect()
}

/// A letter as it lies in its table.
#[derive(Clone, Debug, QueryableByName)]
pub struct Row {
    #[diesel(sql_type = Text)]
    pub topic: String,
    #[diesel(sql_type = Integer)]
    pub partition: i32,
    #[diesel(sql_type = BigInt)]
    pub log_offset: i64,
    #[diesel(sql_type = Nullable<Binary>)]
    pub key: Option<Vec<u8>>,
    #[diesel(sql_type = Nullable<Binary>)]
    pub value: Option<Vec<u8>>,
    /// JSON; see [`headers_from_json`].
    #[diesel(sql_type = Text)]
    pub headers: String,
    #[diesel(sql_type = Text)]
    pub reason: String,
    #[diesel(sql_type = Integer)]
    pub attempts: i32,
    #[diesel(sql_type = Timestamptz)]
    pub at: DateTime<Utc>,
    #[diesel(sql_type = Text)]
    pub state: String,
    #[diesel(sql_type = Bool)]
    pub undecodable: bool,
    #[diesel(sql_type = Nullable<Text>)]
    pub ordering_key: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    pub business_key: Option<String>,
    #[diesel(sql_type = Integer)]
    pub followers: i32,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub published_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub received_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<Text>)]
    pub requested: Option<String>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub next_attempt_at: Option<DateTime<Utc>>,
}

/// The columns of a [`Row`], of the table `d`.
macro_rules! row_columns {
    () => {
        row_columns!("d.value")
    };
    ($value:literal) => {
        concat!(
            $value,
            ", d.topic, d.partition, d.log_offset, d.key, d.headers::text as headers, d.reason, d.attempts, d.at, d.state,
             d.undecodable, d.ordering_key, d.business_key, d.followers, d.published_at, d.received_at, d.requested,
             d.next_attempt_at"
        )
    };
}
use row_columns;

impl Row {
    /// The record as it once came.
    pub fn delivery(&self, topic: &Arc<str>) -> Delivery {
        let headers = headers_from_json(&self.headers);
        let envelope = Envelope::read(&headers);
        Delivery {
            position: Position { topic: topic.clone(), partition: self.partition, offset: self.log_offset },
            key: self.key.clone().map(Into::into),
            value: self.value.clone().map(Into::into),
            trace: envelope.trace.map_or_else(telemetry::new_trace, TraceContext::child),
            envelope,
            headers,
            published_at: self.published_at.unwrap_or(self.at),
            received_at: self.received_at.unwrap_or(self.at),
        }
    }

    /// Of one that could be decoded once.
    pub fn keys(&self) -> Option<Keys> {
        Some(Keys { ordering: self.ordering_key.clone()?, business: self.business_key.clone()? })
    }
}

/// One more than the highest partition of `topic` with a letter that somebody must be able to act on.
pub async fn partitions_in_use(conn: &mut Conn, topic: &str) -> Result<i32, DbError> {
    #[derive(QueryableByName)]
    struct Highest {
        #[diesel(sql_type = Integer)]
        partitions: i32,
    }
    let highest: Highest = sql("select coalesce((select partition + 1 from dead_letter where topic = $1 and state <> 'resolved'
                                                 order by partition desc, log_offset desc limit 1), 0) as partitions")
    .bind::<Text, _>(topic)
    .get_result(conn)
    .await?;
    Ok(highest.partitions)
}

/// The values of the letters of `topic` under these keys.
pub async fn letters(conn: &mut Conn, topic: &str, keys: &[&str]) -> Result<Vec<Vec<u8>>, DbError> {
    #[derive(QueryableByName)]
    struct Letter {
        #[diesel(sql_type = Binary)]
        value: Vec<u8>,
    }
    let letters: Vec<Letter> = sql("select value from dead_letter
                                     where topic = $1 and key = any($2) and value is not null and state <> 'resolved'")
    .bind::<Text, _>(topic)
    .bind::<Array<Binary>, _>(keys.iter().map(|key| key.as_bytes()).collect::<Vec<_>>())
    .load(conn)
    .await?;
    Ok(letters.into_iter().map(|letter| letter.value).collect())
}
