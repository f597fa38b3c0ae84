//! The relay's side of the model database: the outbox and its cursor, behind the reader's own seam.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use shopd::db::DbError;
use shopd::messaging::outbox::{Claim, Cursor, Look, Purged, Rows, Session, Snapshot, Source};
use shopd::shutdown::Shutdown;
use tokio::sync::Notify;

use crate::postgres::Postgres;
use crate::tables::{Snap, passed};
use crate::world::{Guard, Process};

/// One database as one relay's process sees it.
#[derive(Clone)]
pub struct ProcessOutbox {
    pub db: Postgres,
    pub process: Process,
}

pub struct ProcessSession {
    outbox: ProcessOutbox,
    incarnation: u64,
}

#[async_trait]
impl Source for ProcessOutbox {
    type Session = ProcessSession;

    fn listen(&self, wake: Arc<Notify>, _stop: Shutdown) {
        self.db.listen(wake);
    }

    async fn claim(
        &self,
        owner: &str,
        lease: Duration,
        reaches_log: bool,
        wake: &Arc<Notify>,
    ) -> Result<Option<Claim<ProcessSession>>, DbError> {
        let now = self.db.world.now_ms();
        let (owner, guarded) = (owner.to_owned(), self.db.world.holds(Guard::CutOff));
        let claimed = self
            .db
            .statement(&self.process, |state| {
                let row = &mut state.tables.cursor;
                let free = row.owner.as_ref().is_none_or(|had| *had == owner) || row.lease_until_ms < now;
                let given_up = row.cut_off && reaches_log && guarded;
                if !free && !given_up {
                    return Ok(None);
                }
                row.owner = Some(owner);
                row.epoch += 1;
                row.cut_off = false;
                row.lease_until_ms = now + lease.as_millis() as u64;
                let claimed = (row.cursor.clone(), row.epoch);
                state.autocommit();
                Ok(Some(claimed))
            })
            .await?;
        let Some((cursor, epoch)) = claimed else { return Ok(None) };
        let incarnation = self.db.statement(&self.process, |_| Ok(())).await.map(|()| self.db.incarnation())?;
        self.db.listen(wake.clone());
        self.db.world.tell(self.process.number(), "outbox claimed", [epoch, 0, 0]);
        Ok(Some(Claim { session: ProcessSession { outbox: self.clone(), incarnation }, cursor, epoch }))
    }

    async fn release(&self, owner: &str, epoch: i64) -> Result<(), DbError> {
        self.db
            .statement(&self.process, |state| {
                let row = &mut state.tables.cursor;
                if row.epoch == epoch && row.owner.as_deref() == Some(owner) {
                    row.owner = None;
                    row.lease_until_ms = 0;
                }
                state.autocommit();
                Ok(())
            })
            .await?;
        self.db.notify();
        Ok(())
    }

    /// Only what the cursor is past: all or a part makes no difference here.
    async fn purge(&self, epoch: i64, snapshot: &str, _quiet: bool) -> Result<Purged, DbError> {
        let (world, kafka) = (self.db.world.clone(), self.db.kafka.clone());
        let snapshot = Snap::parse(snapshot);
        self.db
            .statement(&self.process, |state| {
                if state.tables.cursor.epoch != epoch {
                    return Err(DbError::Fenced("another relay has the outbox".into()));
                }
                let before = state.tables.outbox.len();
                state.tables.outbox.retain(|(xid, id), row| {
                    let keep = !snapshot.sees(*xid) || (*xid >= snapshot.xmin && !snapshot.open.is_empty());
                    let sent = keep || kafka.has_had(&row.event_id.to_string());
                    world.check(sent, || format!("S13: outbox row ({xid}, {id}) is dropped and was never on the log"));
                    keep
                });
                state.autocommit();
                let after = state.tables.outbox.len();
                Ok(match after {
                    0 => Purged::All,
                    _ if after == before => Purged::Nothing,
                    _ => Purged::Some,
                })
            })
            .await
    }
}

impl ProcessSession {
    async fn ask<T>(&self, work: impl FnOnce(&Postgres) -> T) -> Result<T, DbError> {
        let (db, process) = (&self.outbox.db, &self.outbox.process);
        process.gate().await;
        db.world.network().await;
        let alive = db.is_up(db.world.holds(Guard::CursorSession).then_some(self.incarnation));
        let done = alive.map(|()| work(db));
        db.world.network().await;
        process.gate().await;
        done
    }

    async fn rows(&self, look: &Look, rows_max: i64, of: impl Fn(u64) -> bool) -> Result<Rows, DbError> {
        let snapshot = Snap::parse(&look.snapshot);
        let after = (look.after.0.0, look.after.1);
        self.ask(|db| {
            let state = db.state();
            let rows = state.tables.outbox.range((std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded));
            let rows = rows.filter(|((xid, _), _)| of(*xid) && snapshot.sees(*xid));
            let rows: Vec<_> = rows.map(|(_, row)| row.clone()).take(rows_max as usize).collect();
            Rows { more: rows.len() as i64 == rows_max, rows }
        })
        .await
    }
}

#[async_trait]
impl Session for ProcessSession {
    async fn snapshot(&self) -> Result<String, DbError> {
        self.ask(Postgres::snapshot).await
    }

    async fn late_rows(&self, old: &Snapshot, look: &Look, rows_max: i64) -> Result<Rows, DbError> {
        let late = self.rows(look, rows_max, |xid| old.open.iter().any(|open| open.0 == xid)).await?;
        if !late.rows.is_empty() {
            self.outbox.db.world.tell(self.outbox.process.number(), "rows that committed late", [late.rows.len() as i64, 0, 0]);
        }
        Ok(late)
    }

    async fn fresh_rows(&self, look: &Look, rows_max: i64) -> Result<Rows, DbError> {
        self.rows(look, rows_max, |_| true).await
    }

    async fn save(&self, epoch: i64, cursor: &Cursor, lease: Duration, cut_off: bool) -> Result<bool, DbError> {
        let number = self.outbox.process.number();
        self.ask(|db| {
            let now = db.world.now_ms();
            let state = &mut *db.state();
            if state.tables.cursor.epoch != epoch {
                db.world.tell(number, "cursor fenced", [epoch, state.tables.cursor.epoch, 0]);
                return false;
            }
            for (position, row) in &state.tables.outbox {
                let sent = !passed(cursor, *position) || db.kafka.has_had(&row.event_id.to_string());
                db.world.check(sent, || format!("S13: the cursor is past outbox row {position:?}, which was never on the log"));
            }
            state.tables.cursor.cursor = cursor.clone();
            state.tables.cursor.cut_off = cut_off;
            state.tables.cursor.lease_until_ms = now + lease.as_millis() as u64;
            state.autocommit();
            db.world.tell(number, "cursor saved", [epoch, Snap::parse(&cursor.snapshot).xmax as i64, 0]);
            true
        })
        .await
    }
}
