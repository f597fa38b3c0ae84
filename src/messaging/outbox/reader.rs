//! Reads one database's outbox under a lease, and drops what is published.

use std::time::Duration;

use diesel::prelude::*;
use diesel::sql_types::{BigInt, Bool, Nullable, Text};
use diesel_async::RunQueryDsl;
use futures::FutureExt;

use crate::db::types::{Xid, Xid8};
use crate::db::{Conn, Db, DbError, sql};
use crate::faults;

use super::Row;
use super::cursor::{Cursor, Look, Snapshot, fresh_rows, late_rows};

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
    /// Every look goes over this one session. What a look has learnt is kept in memory first, and after a crash the server gives
    /// transaction ids that were not on its disk yet to other transactions: a look from before a crash would hide the rows of
    /// one after it, for ever. No session outlives a crash, and what was committed over it, the saved cursor, is on the disk.
    session: Conn,
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
        faults::point!("outbox.before_acquire")?;
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
        faults::point!("outbox.after_acquire")?;
        let session = db.dedicated().await?;
        Ok(Some(Self { db: db.clone(), session, owner, lease, epoch: row.epoch, saved: cursor.clone(), cursor }))
    }

    /// The next rows that are not on the log yet; `None` when there are none now.
    ///
    /// # Errors
    /// [`DbError::Unavailable`] where the session is gone; this reader is of no more use then, the next one goes on from what
    /// was saved.
    pub async fn page(&mut self, rows_max: i64) -> Result<Option<Page>, DbError> {
        let conn = &mut self.session;
        let look = match &self.cursor.look {
            Some(look) => look.clone(),
            None => {
                let new: SnapshotRow = sql("select pg_current_snapshot()::text as snapshot").get_result(conn).await?;
                if new.snapshot == self.cursor.snapshot {
                    return Ok(None);
                }
                Look { snapshot: new.snapshot, late: true, after: (Xid(0), 0) }
            }
        };
        self.cursor.look = Some(look.clone());
        let old = Snapshot::parse(&self.cursor.snapshot)?;
        if look.late {
            let rows = if old.open.is_empty() { Vec::new() } else { late_rows(conn, &old, &look, rows_max).await? };
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
        let rows = fresh_rows(conn, &look, rows_max).await?;
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

    /// How often the lease is to be renewed.
    pub fn heartbeat(&self) -> Duration {
        self.lease / 4
    }

    /// Renews the lease, and keeps what idle looks have learnt.
    pub async fn renew(&mut self) -> Result<(), DbError> {
        self.save().await
    }

    async fn save(&mut self) -> Result<(), DbError> {
        faults::point!("outbox.before_save")?;
        let look = self.cursor.look.as_ref();
        let (late, after) = look.map_or((true, (Xid(0), 0)), |look| (look.late, look.after));
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
        .execute(&mut self.session)
        .await?;
        if moved != 1 {
            return Err(DbError::Fenced("another relay has the outbox".into()));
        }
        faults::point!("outbox.after_save")?;
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
        faults::point!("outbox.before_purge")?;
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
