//! Reads one database's outbox under a lease, and drops what is published.

use std::time::Duration;

use crate::db::types::Xid;
use crate::db::{Db, DbError};
use crate::faults;

use super::Row;
use super::Snapshot;
use super::cursor::{Cursor, Look};
use super::source::{Claim, Purged, Session, Source};

/// A page of unpublished rows; [`Reader::published`] moves past it.
#[derive(Debug)]
pub struct Page {
    pub rows: Vec<Row>,
    next: Cursor,
}

/// Reads one database's outbox under a lease.
pub struct Reader<S: Source = Db> {
    db: S,
    /// Every look goes over this one session. What a look has learnt is kept in memory first, and after a crash the server gives
    /// transaction ids that were not on its disk yet to other transactions: a look from before a crash would hide the rows of
    /// one after it, for ever. No session outlives a crash, and what was committed over it, the saved cursor, is on the disk.
    session: S::Session,
    owner: String,
    lease: Duration,
    epoch: i64,
    cursor: Cursor,
    /// What [`Reader::published`] last wrote.
    saved: Cursor,
}

impl<S: Source> Reader<S> {
    /// Takes the outbox where it is free, expired, or `owner`'s already; `None` where another relay has it.
    ///
    /// Transaction ids do not survive dump and restore: where the cluster is another one, the rows are stamped anew and the
    /// cursor begins again, before anything is read. Consumers know repeats, so publishing some again is harmless.
    pub async fn acquire(db: &S, owner: &str, lease: Duration) -> Result<Option<Self>, DbError> {
        faults::point!("outbox.before_acquire")?;
        let Some(Claim { session, cursor, epoch }) = db.claim(owner, lease).await? else { return Ok(None) };
        faults::point!("outbox.after_acquire")?;
        Ok(Some(Self { db: db.clone(), session, owner: owner.to_owned(), lease, epoch, saved: cursor.clone(), cursor }))
    }

    /// The next rows that are not on the log yet; `None` when there are none now.
    ///
    /// # Errors
    /// [`DbError::Unavailable`] where the session is gone; this reader is of no more use then, the next one goes on from what
    /// was saved.
    pub async fn page(&mut self, rows_max: i64) -> Result<Option<Page>, DbError> {
        let look = match &self.cursor.look {
            Some(look) => look.clone(),
            None => {
                let snapshot = self.session.snapshot().await?;
                if snapshot == self.cursor.snapshot {
                    return Ok(None);
                }
                Look { snapshot, late: true, after: (Xid(0), 0) }
            }
        };
        self.cursor.look = Some(look.clone());
        let old = Snapshot::parse(&self.cursor.snapshot)?;
        if look.late {
            let rows = if old.open.is_empty() { Vec::new() } else { self.session.late_rows(&old, &look, rows_max).await? };
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
        let rows = self.session.fresh_rows(&look, rows_max).await?;
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
        if !self.session.save(self.epoch, &self.cursor, self.lease).await? {
            return Err(DbError::Fenced("another relay has the outbox".into()));
        }
        faults::point!("outbox.after_save")?;
        self.saved = self.cursor.clone();
        Ok(())
    }

    /// Gives the outbox back, and wakes the standby, which takes it at once.
    pub async fn release(&mut self) -> Result<(), DbError> {
        self.db.release(&self.owner, self.epoch).await
    }

    /// Drops published rows, all of them where the outbox is quiet and else about `rows_max`. Writers wait at most 50 ms for
    /// it, also where this process is frozen meanwhile. Call it between pages.
    pub async fn purge(&mut self, rows_max: i64) -> Result<Purged, DbError> {
        if self.saved != self.cursor {
            self.save().await?;
        }
        faults::point!("outbox.before_purge")?;
        self.db.purge(self.epoch, &self.cursor.snapshot, rows_max).await
    }
}
