//! The outbox: messages written in the transaction of their cause, read in the order of a cursor that loses none.
//!
//! The cursor is a pair of snapshots, not a number. A look takes a new snapshot and reads what is visible in it and was not
//! in the previous one: first the rows of transactions that were open then (`late`), then the rows of younger ones, by
//! (xid, id). A transaction held open anywhere on the server delays its own rows and nobody else's.
//!
//! Owns `outbox` and `outbox_cursor`. One relay owns an outbox by lease; its epoch fences every write to the cursor.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Binary, Bool, Nullable, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::RunQueryDsl;
use futures::FutureExt;
use uuid::Uuid;

use crate::db::types::{Xid, Xid8};
use crate::db::{Conn, Db, DbError, sql};

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

/// A row of the outbox as the relay reads it.
#[derive(Clone, Debug, QueryableByName)]
pub struct Row {
    #[diesel(sql_type = Xid8)]
    xid: Xid,
    #[diesel(sql_type = BigInt)]
    id: i64,
    #[diesel(sql_type = SqlUuid)]
    pub event_id: Uuid,
    #[diesel(sql_type = Text)]
    pub topic: String,
    #[diesel(sql_type = Text)]
    pub key: String,
    #[diesel(sql_type = Binary)]
    pub payload: Vec<u8>,
    #[diesel(sql_type = Text)]
    pub event_type: String,
    #[diesel(sql_type = Text)]
    pub source: String,
    #[diesel(sql_type = Text)]
    pub traceparent: String,
    #[diesel(sql_type = Text)]
    pub request_id: String,
    #[diesel(sql_type = Timestamptz)]
    pub created_at: DateTime<Utc>,
}

/// Writes messages in the caller's transaction, in one statement.
pub async fn append(mut conn: &Conn, messages: &[Message]) -> Result<(), DbError> {
    fn column<'m, T>(messages: &'m [Message], field: impl Fn(&'m Message) -> T) -> Vec<T> {
        messages.iter().map(field).collect()
    }
    if messages.is_empty() {
        return Ok(());
    }
    sql("insert into outbox (event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at)
         select unnest($1), unnest($2), unnest($3), unnest($4), unnest($5), unnest($6), unnest($7), unnest($8), unnest($9)")
    .bind::<Array<SqlUuid>, _>(column(messages, |m| m.event_id))
    .bind::<Array<Text>, _>(column(messages, |m| m.topic))
    .bind::<Array<Text>, _>(column(messages, |m| m.key.as_str()))
    .bind::<Array<Binary>, _>(column(messages, |m| m.payload.as_slice()))
    .bind::<Array<Text>, _>(column(messages, |m| m.kind))
    .bind::<Array<Text>, _>(column(messages, |m| m.source))
    .bind::<Array<Text>, _>(column(messages, |m| m.traceparent.as_str()))
    .bind::<Array<Text>, _>(column(messages, |m| m.request_id.as_str()))
    .bind::<Array<Timestamptz>, _>(column(messages, |m| m.created_at))
    .execute(&mut conn)
    .await?;
    Ok(())
}

/// How far an outbox was read.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cursor {
    /// Everything visible in it is on the log.
    snapshot: String,
    /// The look in progress.
    look: Option<Look>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Look {
    snapshot: String,
    /// Still among the rows of transactions that were open at the previous snapshot.
    late: bool,
    after: (Xid, i64),
}

/// A page of unpublished rows; [`Reader::published`] moves past it.
#[derive(Debug)]
pub struct Page {
    pub rows: Vec<Row>,
    next: Cursor,
}

/// What a purge dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purged {
    All,
    Rows(usize),
}

/// Reads one database's outbox under a lease.
pub struct Reader {
    db: Db,
    owner: String,
    lease: Duration,
    epoch: i64,
    cursor: Cursor,
    /// What [`Reader::published`] last wrote.
    saved: Cursor,
}

/// The state row as `acquire` returns it.
#[derive(QueryableByName)]
struct Claimed {
    #[diesel(sql_type = Text)]
    snapshot: String,
    #[diesel(sql_type = Nullable<Text>)]
    look: Option<String>,
    #[diesel(sql_type = Bool)]
    late: bool,
    #[diesel(sql_type = Xid8)]
    after_xid: Xid,
    #[diesel(sql_type = BigInt)]
    after_id: i64,
    #[diesel(sql_type = Nullable<Text>)]
    system_identifier: Option<String>,
    #[diesel(sql_type = Text)]
    this_system: String,
    #[diesel(sql_type = BigInt)]
    epoch: i64,
}

#[derive(QueryableByName)]
struct SnapshotRow {
    #[diesel(sql_type = Text)]
    snapshot: String,
}

impl Reader {
    /// Takes the outbox where it is free, expired, or `owner`'s already; `None` where another relay has it.
    ///
    /// Transaction ids do not survive dump and restore: where the cluster is another one, the rows are stamped anew and the
    /// cursor begins again, before anything is read. Consumers know repeats, so publishing some again is harmless.
    pub async fn acquire(db: &Db, owner: &str, lease: Duration) -> Result<Option<Self>, DbError> {
        let owner = owner.to_owned();
        let (claimer, lease_ms) = (owner.clone(), lease.as_millis() as i64);
        let claimed = db
            .transaction::<_, DbError, _>(move |conn| {
                let claimer = claimer.clone();
                async move {
                    let claimed: Option<Claimed> = sql("update outbox_cursor
                            set owner = $1, epoch = epoch + 1, lease_until = clock_timestamp() + $2 * interval '1 millisecond'
                          where name = 'outbox' and (owner is null or owner = $1 or lease_until < clock_timestamp())
                      returning snapshot, look, late, after_xid, after_id, system_identifier, epoch,
                                (select system_identifier::text from pg_control_system()) as this_system")
                    .bind::<Text, _>(claimer)
                    .bind::<BigInt, _>(lease_ms)
                    .get_result(conn)
                    .await
                    .optional()?;
                    let Some(mut claimed) = claimed else { return Ok(None) };
                    if claimed.system_identifier.as_deref() != Some(&claimed.this_system) {
                        if claimed.system_identifier.is_some() {
                            tracing::warn!("this outbox came from another cluster; its rows are stamped and published anew");
                            sql("update outbox set xid = pg_current_xact_id()").execute(conn).await?;
                        }
                        sql(
                            "update outbox_cursor set system_identifier = $1, snapshot = '3:3:', look = null where name = 'outbox'",
                        )
                        .bind::<Text, _>(&claimed.this_system)
                        .execute(conn)
                        .await?;
                        (claimed.snapshot, claimed.look) = ("3:3:".into(), None);
                    }
                    Ok(Some(claimed))
                }
                .boxed()
            })
            .await?;
        Ok(claimed.map(|row| {
            let after = (row.after_xid, row.after_id);
            let look = row.look.map(|snapshot| Look { snapshot, late: row.late, after });
            let cursor = Cursor { snapshot: row.snapshot, look };
            Self { db: db.clone(), owner, lease, epoch: row.epoch, saved: cursor.clone(), cursor }
        }))
    }

    /// The next rows that are not on the log yet; `None` when there are none now.
    pub async fn page(&mut self, rows_max: i64) -> Result<Option<Page>, DbError> {
        let mut conn = self.db.get().await?;
        let look = match &self.cursor.look {
            Some(look) => look.clone(),
            None => {
                let new: SnapshotRow = sql("select pg_current_snapshot()::text as snapshot").get_result(&mut conn).await?;
                if new.snapshot == self.cursor.snapshot {
                    return Ok(None);
                }
                Look { snapshot: new.snapshot, late: true, after: (Xid(0), 0) }
            }
        };
        self.cursor.look = Some(look.clone());
        let old = Snapshot::parse(&self.cursor.snapshot)?;
        if look.late {
            let rows = if old.open.is_empty() { Vec::new() } else { late_rows(&mut conn, &old, &look, rows_max).await? };
            let fresh = Look { late: false, after: (Xid(old.xmax - 1), i64::MAX), ..look.clone() };
            if (rows.len() as i64) < rows_max {
                if rows.is_empty() {
                    self.cursor.look = Some(fresh);
                } else {
                    let next = Cursor { look: Some(fresh), ..self.cursor.clone() };
                    return Ok(Some(Page { rows, next }));
                }
            } else {
                return Ok(Some(self.page_of(rows, look)));
            }
        }
        // Set just above, or by an earlier page.
        let look = self.cursor.look.clone().unwrap_or(look);
        let rows = fresh_rows(&mut conn, &look, rows_max).await?;
        if (rows.len() as i64) == rows_max {
            return Ok(Some(self.page_of(rows, look)));
        }
        let next = Cursor { snapshot: look.snapshot, look: None };
        if rows.is_empty() {
            self.cursor = next;
            return Ok(None);
        }
        Ok(Some(Page { rows, next }))
    }

    /// A full page: the look goes on after its last row.
    fn page_of(&self, rows: Vec<Row>, look: Look) -> Page {
        let after = rows.last().map_or(look.after, |row| (row.xid, row.id));
        let next = Cursor { look: Some(Look { after, ..look }), ..self.cursor.clone() };
        Page { rows, next }
    }

    /// The broker has acknowledged the page's rows (S13): moves the cursor past them and renews the lease.
    ///
    /// # Errors
    /// [`DbError::Fenced`] where another relay has taken the outbox meanwhile.
    pub async fn published(&mut self, page: Page) -> Result<(), DbError> {
        self.cursor = page.next;
        self.save().await
    }

    /// Renews the lease, and keeps what idle looks have learnt.
    pub async fn renew(&mut self) -> Result<(), DbError> {
        self.save().await
    }

    async fn save(&mut self) -> Result<(), DbError> {
        let look = self.cursor.look.as_ref();
        let (late, after) = look.map_or((true, (Xid(0), 0)), |look| (look.late, look.after));
        let mut conn = self.db.get().await?;
        let moved = sql("update outbox_cursor
                            set snapshot = $2, look = $3, late = $4, after_xid = $5, after_id = $6,
                                lease_until = clock_timestamp() + $7 * interval '1 millisecond'
                          where name = 'outbox' and epoch = $1")
        .bind::<BigInt, _>(self.epoch)
        .bind::<Text, _>(&self.cursor.snapshot)
        .bind::<Nullable<Text>, _>(look.map(|look| &look.snapshot))
        .bind::<Bool, _>(late)
        .bind::<Xid8, _>(after.0)
        .bind::<BigInt, _>(after.1)
        .bind::<BigInt, _>(self.lease.as_millis() as i64)
        .execute(&mut conn)
        .await?;
        if moved != 1 {
            return Err(DbError::Fenced("another relay has the outbox".into()));
        }
        self.saved = self.cursor.clone();
        Ok(())
    }

    /// Gives the outbox back; the standby takes it at once.
    pub async fn release(&mut self) -> Result<(), DbError> {
        let mut conn = self.db.get().await?;
        sql("update outbox_cursor set owner = null, lease_until = '-infinity' where name = 'outbox' and epoch = $1 and owner = $2")
            .bind::<BigInt, _>(self.epoch)
            .bind::<Text, _>(&self.owner)
            .execute(&mut conn)
            .await?;
        Ok(())
    }

    /// Drops published rows, all of them where the outbox is quiet and else about `rows_max`. Writers wait at most 50 ms for
    /// it. Call it between pages.
    ///
    /// Truncating alone loses rows: it would wait for an open insert and then remove its row. So the exclusive lock is taken
    /// first, and then looked again that nothing lies beyond the cursor.
    pub async fn purge(&mut self, rows_max: i64) -> Result<Purged, DbError> {
        if self.saved != self.cursor {
            self.save().await?;
        }
        let (snapshot, epoch) = (self.cursor.snapshot.clone(), self.epoch);
        let db = self.db.clone();
        let truncated = db
            .transaction::<_, DbError, _>(move |conn| {
                let snapshot = snapshot.clone();
                async move {
                    sql("set local lock_timeout = '50ms'").execute(conn).await?;
                    let mine = sql("select 1 from outbox_cursor where name = 'outbox' and epoch = $1 for update");
                    if mine.bind::<BigInt, _>(epoch).execute(conn).await? != 1 {
                        return Err(DbError::Fenced("another relay has the outbox".into()));
                    }
                    sql("lock table outbox in access exclusive mode").execute(conn).await?;
                    let beyond = sql("select 1 from outbox where xid >= pg_snapshot_xmin($1::pg_snapshot)
                                         and not pg_visible_in_snapshot(xid, $1::pg_snapshot) limit 1");
                    if beyond.bind::<Text, _>(&snapshot).execute(conn).await? > 0 {
                        return Ok(false);
                    }
                    sql("truncate outbox").execute(conn).await?;
                    Ok(true)
                }
                .boxed()
            })
            .await;
        match truncated {
            Ok(true) => return Ok(Purged::All),
            Ok(false) => {}
            // A writer was busy for longer than we may make others wait.
            Err(DbError::Unavailable(text)) if text.contains("lock timeout") => {}
            Err(error) => return Err(error),
        }
        let mut conn = self.db.get().await?;
        let dropped = sql("delete from outbox where xid < coalesce(
                              (select xid from outbox where xid < pg_snapshot_xmin($1::pg_snapshot)
                                order by xid, id offset $2 limit 1),
                              pg_snapshot_xmin($1::pg_snapshot))")
        .bind::<Text, _>(&self.cursor.snapshot)
        .bind::<BigInt, _>(rows_max)
        .execute(&mut conn)
        .await?;
        Ok(Purged::Rows(dropped))
    }
}

async fn late_rows(conn: &mut Conn, old: &Snapshot, look: &Look, rows_max: i64) -> Result<Vec<Row>, DbError> {
    let rows = sql("select xid, id, event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at
                      from outbox
                     where xid = any($1) and (xid, id) > ($2, $3) and pg_visible_in_snapshot(xid, $4::pg_snapshot)
                     order by outbox.xid, outbox.id limit $5")
    .bind::<Array<Xid8>, _>(&old.open)
    .bind::<Xid8, _>(look.after.0)
    .bind::<BigInt, _>(look.after.1)
    .bind::<Text, _>(&look.snapshot)
    .bind::<BigInt, _>(rows_max)
    .load(conn)
    .await?;
    Ok(rows)
}

async fn fresh_rows(conn: &mut Conn, look: &Look, rows_max: i64) -> Result<Vec<Row>, DbError> {
    let rows = sql("select xid, id, event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at
                      from outbox
                     where (xid, id) > ($1, $2) and xid < pg_snapshot_xmax($3::pg_snapshot)
                       and pg_visible_in_snapshot(xid, $3::pg_snapshot)
                     order by outbox.xid, outbox.id limit $4")
    .bind::<Xid8, _>(look.after.0)
    .bind::<BigInt, _>(look.after.1)
    .bind::<Text, _>(&look.snapshot)
    .bind::<BigInt, _>(rows_max)
    .load(conn)
    .await?;
    Ok(rows)
}

/// The parts of a `pg_snapshot`'s text `xmin:xmax:open,open,...` that the cursor needs.
#[derive(Debug, PartialEq, Eq)]
struct Snapshot {
    xmax: u64,
    /// Transactions that were open.
    open: Vec<Xid>,
}

impl Snapshot {
    fn parse(text: &str) -> Result<Self, DbError> {
        let odd = || DbError::Defect(format!("the outbox cursor holds no snapshot: {text:?}"));
        let mut parts = text.split(':');
        let (_, xmax, open) = (parts.next(), parts.next().ok_or_else(odd)?, parts.next().ok_or_else(odd)?);
        let xmax: u64 = xmax.parse().ok().filter(|xmax| *xmax > 0).ok_or_else(odd)?;
        let open = open.split(',').filter(|x| !x.is_empty()).map(|x| x.parse().map(Xid)).collect::<Result<_, _>>();
        Ok(Self { xmax, open: open.map_err(|_| odd())? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshots_text_is_read() {
        assert_eq!(Snapshot::parse("3:3:").unwrap(), Snapshot { xmax: 3, open: vec![] });
        assert_eq!(Snapshot::parse("10:20:10,14").unwrap(), Snapshot { xmax: 20, open: vec![Xid(10), Xid(14)] });
        for odd in ["", "1:2", "a:b:c", "0:0:", "1:2:x"] {
            assert!(Snapshot::parse(odd).is_err(), "{odd}");
        }
    }
}
