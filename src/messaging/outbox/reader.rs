//! Reads one database's outbox under a lease, and drops what is published.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Either, MaybeDone, maybe_done, select};
use tokio::sync::Notify;

use crate::db::types::Xid;
use crate::db::{Db, DbError};
use crate::faults;

use super::Row;
use super::Snapshot;
use super::cursor::{Cursor, Look};
use super::source::{Claim, Looked, Purged, Rows, Session, Source};

/// A page of unpublished rows; [`Reader::published`] moves past it.
#[derive(Debug)]
pub struct Page {
    pub rows: Vec<Row>,
    next: Cursor,
    /// Pages are published in the order in which they were read.
    number: u64,
}

/// How far was read, and the rows up to there; none where nothing waits.
type Read = Result<(Cursor, Vec<Row>), DbError>;

/// Reads one database's outbox under a lease.
pub struct Reader<S: Source = Db> {
    db: S,
    /// Every look goes over this one session. What a look has learnt is kept in memory first, and after a crash the server gives
    /// transaction ids that were not on its disk yet to other transactions: a look from before a crash would hide the rows of
    /// one after it, for ever. No session outlives a crash, and what was committed over it, the saved cursor, is on the disk or lost.
    session: Arc<S::Session>,
    owner: String,
    lease: Duration,
    epoch: i64,
    /// Behind the last page that was read.
    read: Cursor,
    /// The next page, on its way while the one before is being published.
    ahead: Option<MaybeDone<BoxFuture<'static, Read>>>,
    pages_read: u64,
    pages_published: u64,
    /// Everything before it is on the log.
    cursor: Cursor,
    /// As of the last [`Reader::save`].
    pages_saved: u64,
    saved: Cursor,
    /// The page in hand waits for a log that this relay cannot reach; saved with the lease.
    cut_off: bool,
}

impl<S: Source> Reader<S> {
    /// Takes the outbox where it is free, expired, or `owner`'s already, and for who `reaches_log` also where the one in charge is cut off from
    /// it; `None` where another relay has it. From then on `wake` is signalled when other processes have written.
    ///
    /// Transaction ids do not survive dump and restore: where the cluster is another one, the rows are stamped anew and the
    /// cursor begins again, before anything is read. Consumers know repeats, so publishing some again is harmless.
    pub async fn acquire(
        db: &S,
        owner: &str,
        lease: Duration,
        reaches_log: bool,
        wake: &Arc<Notify>,
    ) -> Result<Option<Self>, DbError> {
        faults::point!("outbox.before_acquire")?;
        let claimed = db.claim(owner, lease, reaches_log, wake).await?;
        let Some(Claim { session, cursor, epoch }) = claimed else { return Ok(None) };
        faults::point!("outbox.after_acquire")?;
        Ok(Some(Self {
            db: db.clone(),
            session: Arc::new(session),
            owner: owner.to_owned(),
            lease,
            epoch,
            read: cursor.clone(),
            ahead: None,
            pages_read: 0,
            pages_published: 0,
            pages_saved: 0,
            saved: cursor.clone(),
            cursor,
            cut_off: false,
        }))
    }

    /// The next rows that are not on the log yet; `None` when there are none now.
    ///
    /// # Errors
    /// [`DbError::Unavailable`] where the session is gone; this reader is of no more use then, the next one goes on from what
    /// was saved.
    pub async fn page(&mut self, rows_max: i64) -> Result<Option<Page>, DbError> {
        self.read_ahead(rows_max).await;
        let ahead = self.ahead.take().and_then(|mut ahead| Pin::new(&mut ahead).take_output());
        // Read just above: it is done.
        let (read, rows) = ahead.ok_or_else(|| DbError::Defect("a page was not read".into()))??;
        self.read = read.clone();
        if rows.is_empty() {
            if self.pages_read == self.pages_published {
                self.cursor = read;
            }
            return Ok(None);
        }
        self.pages_read += 1;
        Ok(Some(Page { rows, next: read, number: self.pages_read }))
    }

    /// Whether more is known to wait than was read, or was read ahead. Where not, whoever commits says so.
    pub fn has_more(&self) -> bool {
        self.ahead.is_some() || self.read.look.is_some()
    }

    /// Reads the next page before it is asked for. May be dropped at any await and goes on where it was.
    pub async fn read_ahead(&mut self, rows_max: i64) {
        let (session, read) = (&self.session, &self.read);
        let ahead = self.ahead.get_or_insert_with(|| maybe_done(next_page(session.clone(), read.clone(), rows_max).boxed()));
        ahead.await;
    }

    /// The broker has acknowledged the page's rows (S13): moves past them. What is not saved yet is published again after a crash.
    ///
    /// # Errors
    /// [`DbError::Defect`] where an earlier page is not published yet.
    pub fn published(&mut self, page: Page) -> Result<(), DbError> {
        if page.number != self.pages_published + 1 {
            return Err(DbError::Defect(format!("page {} was published after page {}", page.number, self.pages_published)));
        }
        self.pages_published = page.number;
        self.cursor = page.next;
        self.cut_off = false;
        Ok(())
    }

    /// Says with each renewal of the lease that another relay which reaches the log may take the outbox at once, until a page is published.
    pub fn set_cut_off(&mut self, cut_off: bool) {
        self.cut_off = cut_off;
    }

    /// Whether everything that is published is saved. What idle looks have learnt does not count: saving it is a transaction, which the next
    /// look would learn of, without an end.
    pub fn is_saved(&self) -> bool {
        self.pages_saved == self.pages_published
    }

    /// Under which the outbox is ours.
    pub fn epoch(&self) -> i64 {
        self.epoch
    }

    /// How often the lease is to be renewed.
    pub fn heartbeat(&self) -> Duration {
        self.lease / 4
    }

    /// Renews the lease, and keeps how far was published and what idle looks have learnt.
    ///
    /// # Errors
    /// [`DbError::Fenced`] where another relay has taken the outbox meanwhile.
    pub async fn save(&mut self) -> Result<(), DbError> {
        faults::point!("outbox.before_save")?;
        let saving = self.session.save(self.epoch, &self.cursor, self.lease, self.cut_off);
        let moved = match &mut self.ahead {
            None => saving.await,
            // The answers come one after the other: this one is behind the rows that are on their way, and would wait for them for ever
            // if nobody took them.
            Some(ahead) => match select(saving, ahead).await {
                Either::Left((moved, _)) => moved,
                Either::Right(((), saving)) => saving.await,
            },
        };
        if !moved? {
            return Err(DbError::Fenced("another relay has the outbox".into()));
        }
        faults::point!("outbox.after_save")?;
        self.saved = self.cursor.clone();
        self.pages_saved = self.pages_published;
        Ok(())
    }

    /// Gives the outbox back, and wakes the standby, which takes it at once and publishes nothing again.
    pub async fn release(&mut self) -> Result<(), DbError> {
        if !self.is_saved() {
            self.save().await?;
        }
        self.db.release(&self.owner, self.epoch).await
    }

    /// Drops published segments, and only where the outbox is `quiet` also the one that writers are filling. Writers wait at most 50 ms
    /// for it, also where this process is frozen meanwhile. Call it between pages.
    pub async fn purge(&mut self, quiet: bool) -> Result<Purged, DbError> {
        if self.saved != self.cursor {
            self.save().await?;
        }
        faults::point!("outbox.before_purge")?;
        self.db.purge(self.epoch, &self.cursor.snapshot, quiet).await
    }
}

/// Reads on from `read` to the next rows, or to the end of the look.
async fn next_page<S: Session>(session: Arc<S>, mut read: Cursor, rows_max: i64) -> Read {
    loop {
        let (next, rows) = read_on(&*session, read, rows_max).await?;
        if !rows.is_empty() || next.look.is_none() {
            return Ok((next, rows));
        }
        read = next;
    }
}

/// One step of a look; it may bring no rows and not be the last one.
async fn read_on(session: &impl Session, mut read: Cursor, rows_max: i64) -> Read {
    let old = Snapshot::parse(&read.snapshot)?;
    let (look, found) = match read.look.take() {
        None => {
            let Looked { snapshot, late, fresh } = session.look(&old, rows_max).await?;
            if snapshot == read.snapshot {
                return Ok((read, Vec::new()));
            }
            let look = Look { snapshot, late: true, after: (Xid(0), 0) };
            // The fresh rows come after all of the late ones, and are read again then.
            if late.more || !late.rows.is_empty() { (look, late) } else { (look.fresh(&old), fresh) }
        }
        Some(look) if !look.late => {
            let found = session.fresh_rows(&look, rows_max).await?;
            (look, found)
        }
        Some(look) => {
            let found = if old.open.is_empty() { Rows::default() } else { session.late_rows(&old, &look, rows_max).await? };
            (look, found)
        }
    };
    Ok(past(read, look, found, &old))
}

/// The cursor past these rows of a look.
fn past(read: Cursor, look: Look, found: Rows, old: &Snapshot) -> (Cursor, Vec<Row>) {
    let next = if found.more {
        let after = found.last().unwrap_or(look.after);
        Cursor { look: Some(Look { after, ..look }), ..read }
    } else if look.late {
        Cursor { look: Some(look.fresh(old)), ..read }
    } else {
        Cursor { snapshot: look.snapshot, look: None }
    };
    (next, found.rows)
}
