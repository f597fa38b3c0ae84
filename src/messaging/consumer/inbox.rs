//! The seam between the consumer's loop and its database.

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;

use crate::db::DbError;

use super::super::dead_letter::Poison;
use super::batch::Batch;
use super::delivery::Delivery;
use super::offsets::{Owned, Standing};

/// What became of a batch that was committed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Committed {
    /// Partitions that could take no more, each with where it goes on: the batch was applied up to there. Nothing of them is to be
    /// applied until [`Upkeep::full`] no longer names them.
    pub stopped: Vec<Owned>,
}

/// What waits beside the log, as of now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Upkeep {
    /// There is more to do at once.
    pub again: bool,
    /// Something waits for its time, or for an operator: it is to be looked at again soon.
    pub waits: bool,
    /// Partitions in which a key's queue holds as many as it may.
    pub full: BTreeSet<i32>,
}

/// One replica's view of its database: offsets, leases, and the transaction of a batch.
#[async_trait]
pub trait Inbox: Send + Sync + 'static {
    type Event: Send + Sync + 'static;

    /// Pure. A record that is refused here is a dead letter at once and holds nobody up.
    fn decode(&self, delivery: &Delivery) -> Result<Self::Event, Poison>;

    /// Makes a row for every partition that has none.
    async fn ensure(&self, partitions: i32) -> Result<(), DbError>;

    /// One more than the highest partition in which something waits beside the log: the topic may have been made anew with fewer.
    async fn partitions_in_use(&self) -> Result<i32, DbError> {
        Ok(0)
    }

    /// Counts this replica among the topic's, says whether it `reaches_log`, and renews its leases, also those that expired and nobody took.
    async fn heartbeat(&self, reaches_log: bool) -> Result<Standing, DbError>;

    /// Takes up to `at_most` of the partitions below `partitions` that are free or expired, each under a new epoch.
    async fn acquire(&self, partitions: i32, at_most: usize) -> Result<Vec<Owned>, DbError>;

    /// Gives partitions back, so that another replica takes them at once; `None`: all of them.
    async fn release(&self, partitions: Option<&[i32]>) -> Result<(), DbError>;

    /// Gives everything back and no longer counts among the topic's replicas.
    async fn leave(&self) -> Result<(), DbError>;

    /// One transaction: effect, dead letters and offsets, or nothing. A record that keeps failing is parked, and its key's later ones
    /// wait behind it; all others are applied.
    ///
    /// # Errors
    /// [`DbError::Fenced`] where an offset did not stand where the batch began, or its epoch is another's (S12).
    async fn commit(&self, batch: &Arc<Batch<Self::Event>>) -> Result<Committed, DbError>;

    /// One step of what waits beside the log: tries again what is parked and due, does what operators asked for. Called between two
    /// batches, each second while something waits and whenever [`Inbox::woken`] returns, and again as long as there is more to do; so
    /// nothing of these partitions is being applied meanwhile. Costs next to nothing where nothing waits.
    ///
    /// # Errors
    /// As [`Inbox::commit`].
    async fn maintain(&self, _owned: &[Owned]) -> Result<Upkeep, DbError> {
        Ok(Upkeep::default())
    }

    /// Returns when an operator asked for something, a batch left something beside the log, or another replica gave partitions back. May be
    /// dropped at any await.
    async fn woken(&self) {
        std::future::pending().await
    }
}
