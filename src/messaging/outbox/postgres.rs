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

use super::Snapshot;
use super::cursor::{Cursor, Look};
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
struct Emptied {
    #[diesel(sql_type = Bool)]
    emptied: bool,
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
        // One statement: a standby that is frozen while it asks must not hold the row.
        let claimed: Option<Claimed> = sql("update outbox_cursor
                set owner = $1, epoch = epoch + 1, lease_until = clock_timestamp() + $2 * interval '1 millisecond'
              where name = 'outbox' and (owner is null or owner = $1 or lease_until < clock_timestamp())
          returning snapshot, look, late, after_xid, after_id, system_identifier, epoch,
                    (select system_identifier::text from pg_control_system()) as this_system")
        .bind::<Text, _>(owner)
        .bind::<BigInt, _>(lease.as_millis() as i64)
        .get_result(&mut self.get().await?)
        .await
        .optional()?;
        let Some(mut row) = claimed else { return Ok(None) };
        if row.system_identifier.as_deref() != Some(&row.this_system) {
            begin_in_this_cluster(self, &row).await?;
            (row.snapshot, row.look) = ("3:3:".into(), None);
        }
        let after = (row.after_xid, row.after_id);
        let look = row.look.map(|snapshot| Look { snapshot, late: row.late, after });
        let cursor = Cursor { snapshot: row.snapshot, look };
        let session = self.dedicated().await?;
        Ok(Some(Claim { session, cursor, epoch: row.epoch }))
    }

    async fn release(&self, owner: &str, epoch: i64) -> Result<(), DbError> {
        let mut conn = self.get().await?;
        sql("with freed as (update outbox_cursor set owner = null, lease_until = '-infinity'
                             where name = 'outbox' and epoch = $1 and owner = $2 returning 1)
             select pg_notify($3, '') from freed")
        .bind::<BigInt, _>(epoch)
        .bind::<Text, _>(owner)
        .bind::<Text, _>(CHANNEL)
        .execute(&mut conn)
        .await?;
        Ok(())
    }

    async fn purge(&self, epoch: i64, snapshot: &str, rows_max: i64) -> Result<Purged, DbError> {
        let mut conn = self.get().await?;
        let all: Emptied = sql("select purge_outbox($1, $2::pg_snapshot) as emptied")
            .bind::<BigInt, _>(epoch)
            .bind::<Text, _>(snapshot)
            .get_result(&mut conn)
            .await?;
        if all.emptied {
            return Ok(Purged::All);
        }
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
        let rows = sql("select xid, id, event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at,
                                raw_key, headers::text as headers
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
        let rows = sql("select xid, id, event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at,
                                raw_key, headers::text as headers
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

/// Stamps the rows of another cluster anew, and begins with the first; in one transaction, under the epoch that was claimed.
async fn begin_in_this_cluster(db: &Db, claimed: &Claimed) -> Result<(), DbError> {
    let (restored, this_system, epoch) = (claimed.system_identifier.is_some(), claimed.this_system.clone(), claimed.epoch);
    if restored {
        tracing::warn!("this outbox came from another cluster; its rows are stamped and published anew");
    }
    db.transaction(move |conn| {
        let this_system = this_system.clone();
        async move {
            let begun = sql("update outbox_cursor set system_identifier = $1, snapshot = '3:3:', look = null
                              where name = 'outbox' and epoch = $2")
            .bind::<Text, _>(&this_system)
            .bind::<BigInt, _>(epoch)
            .execute(conn)
            .await?;
            if begun != 1 {
                return Err(DbError::Fenced("another relay has the outbox".into()));
            }
            if restored {
                // However many wait: cut off in the middle it would begin again for ever.
                sql("set local statement_timeout = '1h'").execute(conn).await?;
                sql("update outbox set xid = pg_current_xact_id()").execute(conn).await?;
            }
            Ok(())
        }
        .boxed()
    })
    .await
}
