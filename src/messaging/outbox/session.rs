//! The reader's session in Postgres: statements prepared once, those that do not need one another on their way together.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use futures::StreamExt;
use tokio::sync::Notify;
use tokio_postgres::types::{FromSql, ToSql, Type};
use tokio_postgres::{Client, Row, RowStream, Statement};
use uuid::Uuid;

use crate::db::types::Xid;
use crate::db::{Db, DbError, Snapshot};

use super::CHANNEL;
use super::cursor::{Cursor, Look};
use super::row::{Columns, Maker};
use super::source::{Looked, Rows, Session};

/// What a page takes in memory at most, and one row more. Further rows are left for the next page.
const PAGE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Rows that are asked for at once: of the longest that are kept in the table some 75 MB.
const PAGE_TABLE_ROWS_MAX: i64 = 10_000;
/// Rows that are asked for before it is known how large they are: of the largest that a producer can make some hundred MB.
const ROWS_AT_FIRST: i64 = 16;

/// - A cursor that is lost in a crash of the server is an older one, which sends some rows again; nobody waits for the disk. It is there
///   before anything is dropped, because what is committed later and waited for is written after it.
/// - Always by the segments' indexes, merged: a plan is often made while they are empty.
/// - One after the other, not side by side: a look's snapshot comes first.
const SETTINGS: &str =
    "set synchronous_commit = off; set enable_seqscan = off; set enable_bitmapscan = off; set max_parallel_workers_per_gather = 0";

macro_rules! rows {
    ($which:literal) => {
        concat!(
            "select xid, id, event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at, raw_key, headers::text,
                    event_ids, keys, payloads, traceparents, request_ids, created_ats
               from outbox where ",
            $which
        )
    };
}

const SNAPSHOT: &str = "select pg_current_snapshot()::text";
/// Where a look's snapshot stands in its first row.
const SNAPSHOT_AT: usize = 12;
/// The snapshot in the place of a row's headers, and the rows that are visible in it. Of two statements together the first answer would wake this
/// process in vain, often on the core on which the server works on the second.
const LOOK: &str = concat!(
    "select null as xid, null, null, null, null, null, null, null, null, null, null, null, pg_current_snapshot()::text,
            null, null, null, null, null, null
     union all (",
    rows!("(xid, id) > ($1, 9223372036854775807) order by outbox.xid, outbox.id limit $2"),
    ")"
);
// The snapshot's text is read once, not once a row.
const LATE: &str = rows!(
    "xid = any($1) and (xid, id) > ($2, $3) and pg_visible_in_snapshot(xid, (select $4::text::pg_snapshot))
     order by outbox.xid, outbox.id limit $5"
);
const LATE_NOW: &str = rows!("xid = any($1) order by outbox.xid, outbox.id limit $2");
const FRESH: &str = rows!(
    "(xid, id) > ($1, $2) and xid < (select pg_snapshot_xmax($3::text::pg_snapshot))
     and pg_visible_in_snapshot(xid, (select $3::text::pg_snapshot))
     order by outbox.xid, outbox.id limit $4"
);
const SAVE: &str = "update outbox_cursor
                       set snapshot = $2, look = $3, late = $4, after_xid = $5, after_id = $6,
                           lease_until = clock_timestamp() + $7::bigint * interval '1 millisecond', cut_off = $8
                     where name = 'outbox' and epoch = $1";

pub struct PgSession {
    client: Client,
    snapshot: Statement,
    look: Statement,
    late_now: Statement,
    late: Statement,
    fresh: Statement,
    save: Statement,
    sizes: Sizes,
}

/// How many rows of the table a page takes, as the last ones had them. What is asked for beyond it the server sends all the same, before it
/// answers anything else on this session.
struct Sizes {
    /// Messages in a row.
    together: AtomicI64,
    /// Rows that fit into a page's bytes; few, until there was a page.
    fit: AtomicI64,
}

impl Sizes {
    const fn new() -> Self {
        Self { together: AtomicI64::new(1), fit: AtomicI64::new(ROWS_AT_FIRST) }
    }

    /// Rows of the table to ask for, so that about so many messages come.
    fn limit(&self, messages: i64) -> i64 {
        let wanted = messages / self.together.load(Ordering::Relaxed);
        wanted.min(self.fit.load(Ordering::Relaxed)).clamp(1, PAGE_TABLE_ROWS_MAX)
    }

    /// There was a page of `rows` with so many messages and bytes.
    fn learn(&self, rows: i64, messages: i64, bytes: usize) {
        if rows == 0 {
            return;
        }
        self.together.store((messages / rows).max(1), Ordering::Relaxed);
        let fit = self.fit.load(Ordering::Relaxed);
        let fit = if bytes >= PAGE_BYTES_MAX { rows } else { fit.max(rows) * 2 };
        self.fit.store(fit.min(PAGE_TABLE_ROWS_MAX), Ordering::Relaxed);
    }
}

impl PgSession {
    pub(super) async fn open(db: &Db, wake: Arc<Notify>) -> Result<Self, DbError> {
        let client = db.session(wake).await?;
        client.batch_execute(SETTINGS).await?;
        // On this one: the server process that hears of a row has just run when it is asked for it.
        client.batch_execute(&format!("listen {CHANNEL}")).await?;
        let (snapshot, look, late_now, late, fresh, save) = tokio::try_join!(
            client.prepare(SNAPSHOT),
            client.prepare(LOOK),
            client.prepare(LATE_NOW),
            client.prepare(LATE),
            client.prepare(FRESH),
            client.prepare(SAVE),
        )?;
        Ok(Self { client, snapshot, look, late_now, late, fresh, save, sizes: Sizes::new() })
    }

    async fn rows(
        &self,
        statement: &Statement,
        params: &[&(dyn ToSql + Sync)],
        limit: i64,
        messages_max: i64,
    ) -> Result<Rows, DbError> {
        let stream = self.client.query_raw(statement, params.iter().copied()).await?;
        self.page(pin!(stream), limit, messages_max).await
    }

    /// Whole rows: all of one's messages are in the page. It ends with that by which it has `messages_max`; what the server sends beyond
    /// is thrown away, and not asked for the next time.
    async fn page(&self, mut stream: Pin<&mut RowStream>, limit: i64, messages_max: i64) -> Result<Rows, DbError> {
        let (mut rows, mut bytes, mut count, mut full) = (Vec::new(), 0, 0, false);
        let mut maker = Maker::default();
        while let Some(row) = stream.next().await {
            let row = row?;
            let single = Columns {
                xid: row.try_get(0)?,
                id: row.try_get(1)?,
                event_id: row.try_get::<_, Id>(2)?.0,
                topic: row.try_get(3)?,
                key: row.try_get(4)?,
                payload: row.try_get(5)?,
                event_type: row.try_get(6)?,
                source: row.try_get(7)?,
                traceparent: row.try_get(8)?,
                request_id: row.try_get(9)?,
                created_at: row.try_get::<_, At>(10)?.0,
                raw_key: row.try_get(11)?,
                headers: row.try_get(12)?,
            };
            let first = rows.len();
            match Several::of(&row)? {
                None => rows.push(maker.row(&single)),
                Some(several) => rows.extend(several.messages(&single)?.map(|columns| maker.row(&columns))),
            }
            bytes += rows[first..].iter().map(super::Row::bytes).sum::<usize>();
            count += 1;
            full = bytes >= PAGE_BYTES_MAX || rows.len() as i64 >= messages_max;
            if full {
                break;
            }
        }
        self.sizes.learn(count, rows.len() as i64, bytes);
        Ok(Rows { rows, more: full || count >= limit })
    }
}

#[async_trait]
impl Session for PgSession {
    async fn snapshot(&self) -> Result<String, DbError> {
        Ok(self.client.query_one(&self.snapshot, &[]).await?.try_get(0)?)
    }

    async fn late_rows(&self, old: &Snapshot, look: &Look, rows_max: i64) -> Result<Rows, DbError> {
        let limit = self.sizes.limit(rows_max);
        self.rows(&self.late, &[&old.open, &look.after.0, &look.after.1, &look.snapshot, &limit], limit, rows_max).await
    }

    async fn fresh_rows(&self, look: &Look, rows_max: i64) -> Result<Rows, DbError> {
        let limit = self.sizes.limit(rows_max);
        self.rows(&self.fresh, &[&look.after.0, &look.after.1, &look.snapshot, &limit], limit, rows_max).await
    }

    /// One round trip. The statement for the late rows comes after the one for the snapshot and may see more than it: that is left out, as is a fresh
    /// row with a transaction id that the server has not come to yet, which somebody wrote there: no look would ever be past it.
    async fn look(&self, old: &Snapshot, rows_max: i64) -> Result<Looked, DbError> {
        let (below, limit) = (Xid(old.xmax - 1), self.sizes.limit(rows_max));
        let fresh: [&(dyn ToSql + Sync); 2] = [&below, &limit];
        let late_now: [&(dyn ToSql + Sync); 2] = [&old.open, &limit];
        let fresh = async {
            let mut stream = pin!(self.client.query_raw(&self.look, fresh).await?);
            let snapshot = match stream.next().await {
                Some(row) => row?.try_get::<_, String>(SNAPSHOT_AT)?,
                None => return Err(DbError::Defect("a look without a snapshot".into())),
            };
            Ok((snapshot, self.page(stream, limit, rows_max).await?))
        };
        let late = async {
            if old.open.is_empty() { Ok(Rows::default()) } else { self.rows(&self.late_now, &late_now, limit, rows_max).await }
        };
        let ((snapshot, fresh), late) = tokio::try_join!(biased; fresh, late)?;
        let seen = Snapshot::parse(&snapshot)?;
        Ok(Looked { late: late.seen_in(&seen), fresh: fresh.seen_in(&seen), snapshot })
    }

    async fn save(&self, epoch: i64, cursor: &Cursor, lease: Duration, cut_off: bool) -> Result<bool, DbError> {
        let look = cursor.look.as_ref();
        let (late, after) = look.map_or((true, (Xid(0), 0)), |look| (look.late, look.after));
        let snapshot = look.map(|look| &look.snapshot);
        let lease_ms = lease.as_millis() as i64;
        let saved: [&(dyn ToSql + Sync); 8] = [&epoch, &cursor.snapshot, &snapshot, &late, &after.0, &after.1, &lease_ms, &cut_off];
        Ok(self.client.execute(&self.save, &saved).await? == 1)
    }
}

/// The arrays of a row of several messages.
struct Several<'r> {
    event_ids: Vec<Id>,
    keys: Vec<&'r str>,
    payloads: Vec<Option<&'r [u8]>>,
    traceparents: Vec<&'r str>,
    request_ids: Vec<&'r str>,
    created_ats: Vec<At>,
}

impl<'r> Several<'r> {
    /// `None` of a row that is one message.
    fn of(row: &'r Row) -> Result<Option<Self>, DbError> {
        let Some(event_ids) = row.try_get(13)? else { return Ok(None) };
        Ok(Some(Self {
            event_ids,
            keys: row.try_get(14)?,
            payloads: row.try_get(15)?,
            traceparents: row.try_get(16)?,
            request_ids: row.try_get(17)?,
            created_ats: row.try_get(18)?,
        }))
    }

    /// Each with what `row` says of all.
    fn messages(self, row: &Columns<'r>) -> Result<impl Iterator<Item = Columns<'r>>, DbError> {
        let length = self.event_ids.len();
        let lengths =
            [self.keys.len(), self.payloads.len(), self.traceparents.len(), self.request_ids.len(), self.created_ats.len()];
        if length == 0 || lengths.iter().any(|other| *other != length) {
            return Err(DbError::Defect(format!("row {} of the outbox has arrays of different lengths", row.id)));
        }
        let texts = self.keys.into_iter().zip(self.payloads).zip(self.traceparents).zip(self.request_ids);
        let row = *row;
        Ok(self.event_ids.into_iter().zip(texts).zip(self.created_ats).map(
            move |((event_id, (((key, payload), traceparent), request_id)), created_at)| Columns {
                event_id: event_id.0,
                key,
                payload,
                traceparent,
                request_id,
                created_at: created_at.0,
                ..row
            },
        ))
    }
}

type Odd = Box<dyn std::error::Error + Sync + Send>;

struct Id(Uuid);

impl FromSql<'_> for Id {
    fn from_sql(_: &Type, raw: &[u8]) -> Result<Self, Odd> {
        Ok(Self(Uuid::from_slice(raw)?))
    }

    fn accepts(of: &Type) -> bool {
        *of == Type::UUID
    }
}

struct At(DateTime<Utc>);

/// Postgres counts from the year 2000.
const EPOCH_MICROS: i64 = 946_684_800_000_000;

impl FromSql<'_> for At {
    fn from_sql(_: &Type, raw: &[u8]) -> Result<Self, Odd> {
        let micros = i64::from_be_bytes(raw.try_into()?).saturating_add(EPOCH_MICROS);
        Ok(Self(DateTime::from_timestamp_micros(micros).ok_or("a time out of range")?))
    }

    fn accepts(of: &Type) -> bool {
        *of == Type::TIMESTAMPTZ
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Red where only messages are counted: of rows as large as a page thousands would be sent for each that is taken.
    #[test]
    fn no_more_rows_are_asked_for_than_fitted_into_the_last_page() {
        let sizes = Sizes::new();
        assert_eq!(sizes.limit(2_000), ROWS_AT_FIRST);
        sizes.learn(3, 3, PAGE_BYTES_MAX);
        assert_eq!(sizes.limit(2_000), 3);
        sizes.learn(0, 0, 0);
        assert_eq!(sizes.limit(2_000), 3, "no rows say nothing");
        let pages = (1..).find(|_| {
            let limit = sizes.limit(2_000);
            sizes.learn(limit, limit, 1_000);
            sizes.limit(2_000) == 2_000
        });
        assert_eq!(pages, Some(10), "small ones are as many as ever soon");
        sizes.learn(20, 2_000, 1_000);
        assert_eq!(sizes.limit(2_000), 20, "of a hundred messages each");
    }
}
