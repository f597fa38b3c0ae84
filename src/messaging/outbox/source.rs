//! The seam between the reader and its database.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Notify;

use crate::db::DbError;
use crate::shutdown::Shutdown;

use super::Row;
use super::Snapshot;
use super::cursor::{Cursor, Look};

/// What a purge dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purged {
    All,
    Rows(usize),
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

    /// Signals `wake` until `stop` when other processes have written.
    fn listen(&self, wake: Arc<Notify>, stop: Shutdown);

    /// Takes the outbox under a new epoch where it is free, expired, or `owner`'s already.
    async fn claim(&self, owner: &str, lease: Duration) -> Result<Option<Claim<Self::Session>>, DbError>;

    /// Gives it back, if `epoch` still is `owner`'s, and wakes every listener.
    async fn release(&self, owner: &str, epoch: i64) -> Result<(), DbError>;

    /// Drops rows that are visible in `snapshot`: all where nothing else is there, else about `rows_max`.
    ///
    /// # Errors
    /// [`DbError::Fenced`] where the epoch is another's.
    async fn purge(&self, epoch: i64, snapshot: &str, rows_max: i64) -> Result<Purged, DbError>;
}

/// One session: what it has seen holds only as long as it lives, because no session outlives a crash of its server.
#[async_trait]
pub trait Session: Send {
    /// A new snapshot, as the text of a `pg_snapshot`.
    async fn snapshot(&mut self) -> Result<String, DbError>;

    /// The next rows of the transactions that were open in `old` and are visible in the look.
    async fn late_rows(&mut self, old: &Snapshot, look: &Look, rows_max: i64) -> Result<Vec<Row>, DbError>;

    /// The next rows behind the look's position that are visible in it.
    async fn fresh_rows(&mut self, look: &Look, rows_max: i64) -> Result<Vec<Row>, DbError>;

    /// Saves the cursor and renews the lease; `false` where the epoch is another's.
    async fn save(&mut self, epoch: i64, cursor: &Cursor, lease: Duration) -> Result<bool, DbError>;
}
