//! The seam between the reader and its database.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Notify;

use crate::db::DbError;
use crate::db::types::Xid;
use crate::shutdown::Shutdown;

use super::Row;
use super::Snapshot;
use super::cursor::{Cursor, Look};

/// What a purge left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purged {
    /// Nothing.
    All,
    /// Something was dropped, something is still there.
    Some,
    /// Everything that was there.
    Nothing,
}

/// Rows in order, and whether there may be more of them behind the last.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    pub rows: Vec<Row>,
    pub more: bool,
}

impl Rows {
    /// Without those that a snapshot does not see.
    pub fn seen_in(mut self, snapshot: &Snapshot) -> Self {
        self.rows.retain(|row| snapshot.sees(row.xid));
        self
    }

    pub(super) fn last(&self) -> Option<(Xid, i64)> {
        self.rows.last().map(|row| (row.xid, row.id))
    }
}

/// A new snapshot, and the first rows of either kind that are visible in it.
#[derive(Debug)]
pub struct Looked {
    pub snapshot: String,
    pub late: Rows,
    pub fresh: Rows,
}

/// An outbox that was taken.
pub struct Claim<S> {
    pub session: S,
    /// As it was last saved.
    pub cursor: Cursor,
    pub epoch: i64,
}

/// One database's outbox and its cursor.
#[async_trait]
pub trait Source: Clone + Send + Sync + 'static {
    type Session: Session;

    /// Signals `wake` until `stop` when other processes have written, or gave the outbox back.
    fn listen(&self, wake: Arc<Notify>, stop: Shutdown);

    /// Takes the outbox under a new epoch where it is free, expired, or `owner`'s already, and for who `reaches_log` also where the one in charge
    /// says that it is cut off. Its session signals `wake` when other processes have written, as long as it lives.
    async fn claim(
        &self,
        owner: &str,
        lease: Duration,
        reaches_log: bool,
        wake: &Arc<Notify>,
    ) -> Result<Option<Claim<Self::Session>>, DbError>;

    /// Gives it back, if `epoch` still is `owner`'s, and wakes every listener.
    async fn release(&self, owner: &str, epoch: i64) -> Result<(), DbError>;

    /// Drops segments of which everything is visible in `snapshot`; only where `quiet` also the one that writers are filling.
    ///
    /// # Errors
    /// [`DbError::Fenced`] where the epoch is another's.
    async fn purge(&self, epoch: i64, snapshot: &str, quiet: bool) -> Result<Purged, DbError>;
}

/// One session: what it has seen holds only as long as it lives, because no session outlives a crash of its server.
#[async_trait]
pub trait Session: Send + Sync + 'static {
    /// A new snapshot, as the text of a `pg_snapshot`.
    async fn snapshot(&self) -> Result<String, DbError>;

    /// The next rows of the transactions that were open in `old` and are visible in the look.
    async fn late_rows(&self, old: &Snapshot, look: &Look, rows_max: i64) -> Result<Rows, DbError>;

    /// The next rows behind the look's position that are visible in it.
    async fn fresh_rows(&self, look: &Look, rows_max: i64) -> Result<Rows, DbError>;

    /// Begins a look: the three above in one.
    async fn look(&self, old: &Snapshot, rows_max: i64) -> Result<Looked, DbError> {
        let snapshot = self.snapshot().await?;
        let look = Look { snapshot, late: true, after: (Xid(0), 0) };
        let late = if old.open.is_empty() { Rows::default() } else { self.late_rows(old, &look, rows_max).await? };
        let look = look.fresh(old);
        let fresh = self.fresh_rows(&look, rows_max).await?;
        Ok(Looked { snapshot: look.snapshot, late, fresh })
    }

    /// Saves the cursor and renews the lease, and says whether this one is `cut_off` from the log; `false` where the epoch is another's.
    async fn save(&self, epoch: i64, cursor: &Cursor, lease: Duration, cut_off: bool) -> Result<bool, DbError>;
}
