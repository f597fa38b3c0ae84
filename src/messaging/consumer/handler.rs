//! The seam between the consumer and the service whose records it applies.

use async_trait::async_trait;

use crate::db::{Conn, DbError};

use super::super::dead_letter::{Keys, Poison};
use super::delivery::{Delivery, Received};
use super::offsets::Fence;

/// What a service does with a topic.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    type Event: Clone + Send + Sync + 'static;

    /// Pure. A record that is refused here is a dead letter at once and holds nobody up.
    fn decode(&self, delivery: &Delivery) -> Result<Self::Event, Poison>;

    /// Pure. Whose records keep their order: while one fails, the later ones of its ordering key wait. And what a repeat is known by:
    /// of those that wait, each business key's first stands for all.
    fn keys(&self, event: &Self::Event) -> Keys;

    /// Applies a batch, in log order within each partition, in the transaction that moves the offsets. Must bear the same
    /// record twice.
    /// Its statements may be sent without waiting for each other: those of a transaction that failed fail too, the first one says why.
    async fn apply(&self, conn: &Conn, batch: &[Received<Self::Event>]) -> Result<(), DbError>;

    /// As [`Handler::apply`], for records in whose partitions nothing is parked, and with the fence: all that is written is one statement,
    /// a transaction by itself, so there is no BEGIN and no COMMIT to wait for. Tells others itself: [`Handler::committed`] is not called
    /// then. `false` where nothing was done, because this batch is not worth it.
    ///
    /// # Errors
    /// [`DbError::Fenced`] as any batch. Where a record is refused, or a race is lost, the batch is applied in a transaction instead.
    async fn apply_at_once(&self, _conn: &Conn, _fence: &Fence<'_>, _batch: &[Received<Self::Event>]) -> Result<bool, DbError> {
        Ok(false)
    }

    /// After the commit of these: to say so in the log, at `debug`, and to who waits for one of them in this process.
    fn tell(&self, _batch: &[Received<Self::Event>]) {}

    /// After the commit of so many records.
    fn committed(&self, _records: usize) {}
}
