//! The inbox in Postgres: what a service does with a batch, in the transaction that moves the offsets.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt;

use crate::db::{Conn, Db, DbError};
use crate::faults;

use super::super::dead_letter::{self, Poison};
use super::batch::Batch;
use super::delivery::{Delivery, Received};
use super::inbox::Inbox;
use super::offsets::{self, Owned, Standing};

/// What a service does with a topic.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    type Event: Clone + Send + Sync + 'static;

    /// Pure. A record that is refused here is a dead letter at once and holds nobody up.
    fn decode(&self, delivery: &Delivery) -> Result<Self::Event, Poison>;

    /// Applies a batch, in log order within each partition, in the transaction that moves the offsets. Must bear the same
    /// record twice.
    async fn apply(&self, conn: &mut Conn, batch: &[Received<Self::Event>]) -> Result<(), DbError>;

    /// After the commit.
    fn committed(&self) {}
}

/// A service's handler over its own database.
pub struct PgInbox<H> {
    db: Db,
    topic: Arc<str>,
    owner: String,
    lease: Duration,
    handler: Arc<H>,
}

impl<H: Handler> PgInbox<H> {
    pub fn new(db: Db, topic: &str, owner: String, lease: Duration, handler: H) -> Self {
        Self { db, topic: topic.into(), owner, lease, handler: Arc::new(handler) }
    }
}

#[async_trait]
impl<H: Handler> Inbox for PgInbox<H> {
    type Event = H::Event;

    fn decode(&self, delivery: &Delivery) -> Result<H::Event, Poison> {
        self.handler.decode(delivery)
    }

    async fn ensure(&self, partitions: i32) -> Result<(), DbError> {
        offsets::ensure(&self.db, &self.topic, partitions).await
    }

    async fn heartbeat(&self) -> Result<Standing, DbError> {
        faults::point!("lease.before_heartbeat")?;
        let standing = offsets::heartbeat(&self.db, &self.topic, &self.owner, self.lease).await?;
        faults::point!("lease.after_heartbeat")?;
        Ok(standing)
    }

    async fn acquire(&self, partitions: i32, at_most: usize) -> Result<Vec<Owned>, DbError> {
        faults::point!("lease.before_acquire")?;
        let owned = offsets::acquire(&self.db, &self.topic, &self.owner, self.lease, partitions, at_most).await?;
        faults::point!("lease.after_acquire")?;
        Ok(owned)
    }

    async fn release(&self, partitions: Option<&[i32]>) -> Result<(), DbError> {
        faults::point!("lease.before_release")?;
        offsets::release(&self.db, &self.topic, &self.owner, partitions).await?;
        faults::point!("lease.after_release")?;
        Ok(())
    }

    async fn leave(&self) -> Result<(), DbError> {
        offsets::leave(&self.db, &self.topic, &self.owner).await
    }

    /// Offsets first: the fence, and the first of the locks; then the effect, then the dead letters.
    async fn commit(&self, batch: &Arc<Batch<H::Event>>) -> Result<(), DbError> {
        faults::point!("consumer.before_commit")?;
        let (topic, handler, lease, batch) = (self.topic.clone(), self.handler.clone(), self.lease, batch.clone());
        self.db
            .transaction(move |conn| {
                let (topic, handler, batch) = (topic.clone(), handler.clone(), batch.clone());
                async move {
                    offsets::advance(conn, &topic, &batch.moves, lease).await?;
                    if !batch.received.is_empty() {
                        handler.apply(conn, &batch.received).await?;
                    }
                    let letters: Vec<_> = batch.poisoned.iter().map(|(delivery, poison)| (delivery, poison)).collect();
                    dead_letter::keep(conn, &letters).await
                }
                .boxed()
            })
            .await?;
        faults::point!("consumer.after_commit")?;
        self.handler.committed();
        Ok(())
    }
}
