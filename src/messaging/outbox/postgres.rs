//! The outbox in Postgres: whose it is, and what of it is dropped.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use diesel::prelude::*;
use diesel::sql_types::{BigInt, Bool, Integer, Nullable, Text};
use diesel_async::RunQueryDsl;
use futures::FutureExt;
use tokio::sync::Notify;

use crate::db::types::{Xid, Xid8};
use crate::db::{Conn, Db, DbError, Listener, sql};
use crate::shutdown::Shutdown;

use super::cursor::{Cursor, Look};
use super::session::PgSession;
use super::source::{Claim, Purged, Source};
use super::{CHANNEL, segment};

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
struct Found {
    #[diesel(sql_type = Bool)]
    found: bool,
}

#[derive(QueryableByName)]
struct Filled {
    #[diesel(sql_type = Integer)]
    segment: i32,
}

#[async_trait]
impl Source for Db {
    type Session = PgSession;

    fn listen(&self, wake: Arc<Notify>, stop: Shutdown) {
        Listener::start(self.clone(), CHANNEL, wake, stop);
    }

    async fn claim(
        &self,
        owner: &str,
        lease: Duration,
        reaches_log: bool,
        wake: &Arc<Notify>,
    ) -> Result<Option<Claim<PgSession>>, DbError> {
        // One statement: a standby that is frozen while it asks must not hold the row.
        let claimed: Option<Claimed> = sql("update outbox_cursor
                set owner = $1, epoch = epoch + 1, lease_until = clock_timestamp() + $2 * interval '1 millisecond', cut_off = false
              where name = 'outbox' and (owner is null or owner = $1 or lease_until < clock_timestamp() or cut_off and $3)
          returning snapshot, look, late, after_xid, after_id, system_identifier, epoch,
                    (select system_identifier::text from pg_control_system()) as this_system")
        .bind::<Text, _>(owner)
        .bind::<BigInt, _>(lease.as_millis() as i64)
        .bind::<Bool, _>(reaches_log)
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
        let session = PgSession::open(self, wake.clone()).await?;
        Ok(Some(Claim { session, cursor, epoch: row.epoch }))
    }

    async fn release(&self, owner: &str, epoch: i64) -> Result<(), DbError> {
        let mut conn = self.get().await?;
        sql("with freed as (update outbox_cursor set owner = null, lease_until = '-infinity', cut_off = false
                             where name = 'outbox' and epoch = $1 and owner = $2 returning 1)
             select pg_notify($3, '') from freed")
        .bind::<BigInt, _>(epoch)
        .bind::<Text, _>(owner)
        .bind::<Text, _>(CHANNEL)
        .execute(&mut conn)
        .await?;
        Ok(())
    }

    async fn purge(&self, epoch: i64, snapshot: &str, quiet: bool) -> Result<Purged, DbError> {
        let mut conn = self.get().await?;
        let filled: Vec<Filled> = sql("select segment from filled_outbox_segments()").load(&mut conn).await?;
        let (mut dropped, mut left) = (0, 0);
        for Filled { segment } in filled {
            let emptied = (quiet || segment != segment::current()) && {
                // A statement each: between two of them nothing is locked. By no other snapshot than the one that is kept here: a server that
                // crashed may have lost it, and then gives the ids again that it knows of.
                sql("select case when exists (select 1 from outbox_cursor where name = 'outbox' and snapshot = $2)
                                 then purge_outbox_segment($1, $2::pg_snapshot, $3) else false end as emptied")
                .bind::<BigInt, _>(epoch)
                .bind::<Text, _>(snapshot)
                .bind::<Integer, _>(segment)
                .get_result::<Emptied>(&mut conn)
                .await?
                .emptied
            };
            if emptied { dropped += 1 } else { left += 1 }
        }
        Ok(match (dropped, left) {
            (_, 0) => Purged::All,
            (0, _) => Purged::Nothing,
            _ => Purged::Some,
        })
    }
}

/// Stamps the rows of another cluster anew, and begins with the first; in one transaction, under the epoch that was claimed.
async fn begin_in_this_cluster(db: &Db, claimed: &Claimed) -> Result<(), DbError> {
    let (claimed_elsewhere, this_system, epoch) = (claimed.system_identifier.is_some(), claimed.this_system.clone(), claimed.epoch);
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
            // However many wait: cut off in the middle it would begin again for ever.
            sql("set local statement_timeout = '1h'").execute(conn).await?;
            if claimed_elsewhere || is_of_the_future(conn).await? {
                tracing::warn!("this outbox came from another cluster; its rows are stamped and published anew");
                sql("update outbox set xid = pg_current_xact_id()").execute(conn).await?;
            }
            Ok(())
        }
        .boxed()
    })
    .await
}

/// Whether there are rows under ids that this cluster has not given yet: a dump of an outbox that no relay had claimed was restored here. What a
/// snapshot sees of this cluster's own is below its `xmax`.
async fn is_of_the_future(conn: &mut Conn) -> Result<bool, DbError> {
    let found: Found = sql("select exists (select 1 from outbox where xid >= pg_snapshot_xmax(pg_current_snapshot())) as found")
        .get_result(conn)
        .await?;
    Ok(found.found)
}
