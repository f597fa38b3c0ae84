//! The outbox: messages written in the transaction of their cause, read in the order of a cursor that loses none.
//!
//! The cursor is a pair of snapshots, not a number. A look takes a new snapshot and reads what is visible in it and was not
//! in the previous one: first the rows of transactions that were open then (`late`), then the rows of younger ones, by
//! (xid, id). A transaction held open anywhere on the server delays its own rows and nobody else's.
//!
//! A row holds several messages where they were written together ([`windows`]); they are read and published as one. `outbox_message` is a view
//! of them one by one. The rows lie in a few tables, the segments: a writer names one by its clock ([`segment`]), and what is published is dropped by emptying
//! whole ones. Whoever reads or changes `outbox` does so in all of them.
//!
//! Owns `outbox` with its segments and `outbox_cursor`. One relay owns an outbox by lease; its epoch fences every write to the cursor.

mod cursor;
mod depth;
mod postgres;
mod reader;
mod row;
pub(crate) mod segment;
mod sent;
mod session;
mod source;
mod unsent;
mod windows;

use chrono::{DateTime, Utc};
use diesel::sql_types::{Array, Binary, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::RunQueryDsl;
use futures::future::join_all;
use uuid::Uuid;

use crate::db::{Binds, Conn, DbError, Sql, sql};

pub use crate::db::Snapshot;
pub use cursor::{Cursor, Look};
pub use depth::{Depth, depth, watch_depth};
pub use reader::{Page, Reader};
pub use row::Row;
pub(crate) use segment::in_segment;
pub use sent::sent;
pub use source::{Claim, Looked, Purged, Rows, Session, Source};
pub use unsent::{Unsent, unsent, unsent_by_anyone};
pub(crate) use windows::{STATEMENT_MESSAGES_MAX, Windows};

/// The channel on which other processes hear of new rows.
pub const CHANNEL: &str = "shopd_outbox";

/// One message to be published; keeps the order of its key with those of the same writer.
#[derive(Clone, Debug)]
pub struct Message {
    pub event_id: Uuid,
    pub topic: &'static str,
    pub key: String,
    pub payload: Vec<u8>,
    /// `ce_type`
    pub kind: &'static str,
    /// `ce_source`
    pub source: &'static str,
    pub traceparent: String,
    pub request_id: String,
    pub created_at: DateTime<Utc>,
}

impl Message {
    /// Of its texts.
    fn bytes(&self) -> usize {
        self.key.len() + self.payload.len() + self.traceparent.len() + self.request_id.len()
    }
}

/// A record that goes out as it came, with headers of its own.
#[derive(Clone, Debug)]
pub struct Copy<'r> {
    pub topic: String,
    pub key: Option<&'r [u8]>,
    pub value: Option<&'r [u8]>,
    /// JSON, as dead letters keep theirs.
    pub headers: String,
}

/// Writes copies in the caller's transaction, in one statement.
pub async fn append_copies(mut conn: &Conn, copies: &[Copy<'_>]) -> Result<(), DbError> {
    if copies.is_empty() {
        return Ok(());
    }
    sql(in_segment!(
        "insert into ",
        " (event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at, raw_key, headers)
         select unnest($1), unnest($2), '', unnest($3), '', '', '', '', clock_timestamp(), unnest($4), unnest($5)::jsonb"
    ))
    .bind::<Array<SqlUuid>, _>(copies.iter().map(|_| Uuid::now_v7()).collect::<Vec<_>>())
    .bind::<Array<Text>, _>(copies.iter().map(|c| c.topic.as_str()).collect::<Vec<_>>())
    .bind::<Array<Nullable<Binary>>, _>(copies.iter().map(|c| c.value).collect::<Vec<_>>())
    .bind::<Array<Nullable<Binary>>, _>(copies.iter().map(|c| c.key).collect::<Vec<_>>())
    .bind::<Array<Text>, _>(copies.iter().map(|c| c.headers.as_str()).collect::<Vec<_>>())
    .execute(&mut conn)
    .await?;
    Ok(())
}

/// Writes messages in the caller's transaction, in their order; those of one topic, type and source together.
pub async fn append(conn: &Conn, messages: &[Message]) -> Result<(), DbError> {
    // What is the same in every row is sent once: in a batch of one service's that is all of them. The statements are on their way together,
    // and the server takes them in this order.
    let alike = messages.chunk_by(|a, b| (a.topic, a.kind, a.source) == (b.topic, b.kind, b.source));
    let statements = alike.flat_map(|alike| alike.chunks(STATEMENT_MESSAGES_MAX)).map(|some| append_alike(conn, some));
    join_all(statements).await.into_iter().collect()
}

/// The first one's topic, type and source are those of all.
async fn append_alike(mut conn: &Conn, messages: &[Message]) -> Result<(), DbError> {
    if messages.is_empty() {
        return Ok(());
    }
    bind_alike(
        sql(in_segment!(
            "insert into ",
            " (event_id, topic, key, event_type, source, traceparent, request_id, created_at,
               event_ids, keys, payloads, traceparents, request_ids, created_ats)
             select $1[f], $2, '', $5, $6, '', '', $9[f], $1[f:t], $3[f:t], $4[f:t], $7[f:t], $8[f:t], $9[f:t]
               from (select unnest($10) as f, unnest($11) as t) one"
        )),
        messages,
    )
    .execute(&mut conn)
    .await?;
    Ok(())
}

/// The next eleven binds of a statement that writes these messages: event ids, topic, keys, payloads, type, source, trace contexts, request ids,
/// times, and where each row's messages begin and end. The first one's topic, type and source are those of all.
pub(crate) fn bind_alike<'m, B: Binds + Send>(statement: Sql<B>, messages: &'m [Message]) -> Sql<impl Binds + Send + use<'m, B>> {
    fn column<'m, T>(messages: &'m [Message], field: impl Fn(&'m Message) -> T) -> Vec<T> {
        messages.iter().map(field).collect()
    }
    let (topic, kind, source) = messages.first().map(|m| (m.topic, m.kind, m.source)).unwrap_or_default();
    let rows = Windows::of(messages.iter().map(Message::bytes));
    statement
        .bind::<Array<SqlUuid>, _>(column(messages, |m| m.event_id))
        .bind::<Text, _>(topic)
        .bind::<Array<Text>, _>(column(messages, |m| m.key.as_str()))
        .bind::<Array<Binary>, _>(column(messages, |m| m.payload.as_slice()))
        .bind::<Text, _>(kind)
        .bind::<Text, _>(source)
        .bind::<Array<Text>, _>(column(messages, |m| m.traceparent.as_str()))
        .bind::<Array<Text>, _>(column(messages, |m| m.request_id.as_str()))
        .bind::<Array<Timestamptz>, _>(column(messages, |m| m.created_at))
        .bind::<Array<Integer>, _>(rows.from)
        .bind::<Array<Integer>, _>(rows.to)
}
