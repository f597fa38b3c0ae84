//! The outbox in Postgres: the statements behind the reader.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Bool, Nullable, Text};
use diesel_async::RunQueryDsl;
use futures::FutureExt;
use tokio::sync::Notify;

use crate::db::types::{Xid, Xid8};
use crate::db::{Conn, Db, DbError, Listener, sql};
use crate::shutdown::Shutdown;

use super::cursor::{Cursor, Look, Snapshot};
use super::source::{Claim, Purged, Session, Source};
use super::{CHANNEL, Row};

/// The state row as `claim` returns it.
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

#[async_trait]
impl Source for Db {
    type Session = Conn;

    fn listen(&self, wake: Arc<Notify>, stop: Shutdown) {
        Listener::start(self.clone(), CHANNEL, wake, stop);
    }

    async fn claim(&self, owner: &str, lease: Duration) -> Result<Option<Claim<Conn>>, DbError> {
        let (claimer, lease_ms) = (owner.to_owned(), lease.as_millis() as i64);
        let claimed = self
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
                            // However many wait: cut off in the middle it would begin again for ever.
                            sql("set local statement_timeout = '1h'").execute(conn).await?;
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
        let Some(row) = claimed else { return Ok(None) };
        let after = (row.after_xid, row.after_id);
        let look = row.look.map(|snapshot| Look { snapshot, late: row.late, after });
        let cursor = Cursor { snapshot: row.snapshot, look };
        let session = self.dedicated().await?;
        Ok(Some(Claim { session, cursor, epoch: row.epoch }))
    }

    async fn release(&self, owner: &str, epoch: i64) -> Result<(), DbError> {
        let mut conn = self.get().await?;
        sql("update outbox_cursor set owner = null, lease_until = '-infinity' where name = 'outbox' and epoch = $1 and owner = $2")
            .bind::<BigInt, _>(epoch)
            .bind::<Text, _>(owner)
            .execute(&mut conn)
            .await?;
        Ok(())
    }

    /// Truncating alone loses rows: it would wait for an open insert and then remove its row. So the exclusive lock is taken
    /// first, and then looked again that nothing lies beyond the cursor.
    async fn purge(&self, epoch: i64, snapshot: &str, rows_max: i64) -> Result<Purged, DbError> {
        let of = snapshot.to_owned();
        let truncated = self
            .transaction::<_, DbError, _>(move |conn| {
                let snapshot = of.clone();
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
        let mut conn = self.get().await?;
        let dropped = sql("delete from outbox where xid < coalesce(
                              (select xid from outbox where xid < pg_snapshot_xmin($1::pg_snapshot)
                                order by xid, id offset $2 limit 1),
                              pg_snapshot_xmin($1::pg_snapshot))")
        .bind::<Text, _>(snapshot)
        .bind::<BigInt, _>(rows_max)
        .execute(&mut conn)
        .await?;
        Ok(Purged::Rows(dropped))
    }
}

#[async_trait]
impl Session for Conn {
    async fn snapshot(&mut self) -> Result<String, DbError> {
        let new: SnapshotRow = sql("select pg_current_snapshot()::text as snapshot").get_result(self).await?;
        Ok(new.snapshot)
    }

    async fn late_rows(&mut self, old: &Snapshot, look: &Look, rows_max: i64) -> Result<Vec<Row>, DbError> {
        let rows = sql("select xid, id, event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at
                          from outbox
                         where xid = any($1) and (xid, id) > ($2, $3) and pg_visible_in_snapshot(xid, $4::pg_snapshot)
                         order by outbox.xid, outbox.id limit $5")
        .bind::<Array<Xid8>, _>(&old.open)
        .bind::<Xid8, _>(look.after.0)
        .bind::<BigInt, _>(look.after.1)
        .bind::<Text, _>(&look.snapshot)
        .bind::<BigInt, _>(rows_max)
        .load(self)
        .await?;
        Ok(rows)
    }

    async fn fresh_rows(&mut self, look: &Look, rows_max: i64) -> Result<Vec<Row>, DbError> {
        let rows = sql("select xid, id, event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at
                          from outbox
                         where (xid, id) > ($1, $2) and xid < pg_snapshot_xmax($3::pg_snapshot)
                           and pg_visible_in_snapshot(xid, $3::pg_snapshot)
                         order by outbox.xid, outbox.id limit $4")
        .bind::<Xid8, _>(look.after.0)
        .bind::<BigInt, _>(look.after.1)
        .bind::<Text, _>(&look.snapshot)
        .bind::<BigInt, _>(rows_max)
        .load(self)
        .await?;
        Ok(rows)
    }

    async fn save(&mut self, epoch: i64, cursor: &Cursor, lease: Duration) -> Result<bool, DbError> {
        let look = cursor.look.as_ref();
        let (late, after) = look.map_or((true, (Xid(0), 0)), |look| (look.late, look.after));
        let moved = sql("update outbox_cursor
                            set snapshot = $2, look = $3, late = $4, after_xid = $5, after_id = $6,
                                lease_until = clock_timestamp() + $7 * interval '1 millisecond'
                          where name = 'outbox' and epoch = $1")
        .bind::<BigInt, _>(epoch)
        .bind::<Text, _>(&cursor.snapshot)
        .bind::<Nullable<Text>, _>(look.map(|look| &look.snapshot))
        .bind::<Bool, _>(late)
        .bind::<Xid8, _>(after.0)
        .bind::<BigInt, _>(after.1)
        .bind::<BigInt, _>(lease.as_millis() as i64)
        .execute(self)
        .await?;
        Ok(moved == 1)
    }
}
