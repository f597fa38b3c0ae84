//! Orders: accepts them, keeps them, and ends them when payments has decided.
//!
//! Owns the tables `orders`, `order_event`, `sweep_cursor` and `order_retry`. Writes `order-payment-requests` through the outbox, reads
//! `payment-status-updates`. Never imports payments.

pub mod audit;
mod document;
mod dto;
mod ends;
mod live;
mod on_payment;
mod order;
mod place_order;
mod routes;
mod schema;
mod store;
mod sweep;
mod timeline;

pub use document::document;
pub use ends::{ENDED_CHANNEL, Ends, Expected};
pub use live::{CHANNEL, Live, NoEventId, OrderStream, Reason, Seen, Update, Updates};
pub use on_payment::OnPayment;
pub use order::{FailureReason, NewOrder, Order, OrderStatus};
pub use place_order::{PlaceError, Placed};
pub use routes::routes;
pub use sweep::{Sweep, SweepRules, Sweeper, Swept, rules as sweep_rules, run as run_sweeper};

/// The rules without a database, for a simulation of one and for measuring them.
#[doc(hidden)]
pub mod rules {
    pub use super::dto::{OrderBody, PlaceOrder};
    pub use super::on_payment::settle;
    pub use super::store::Ending;
}

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, SubsecRound, Utc};
use uuid::Uuid;

use crate::db::{self, Db, DbError, Notifier, Schema};
use crate::http::idempotency::{Keyed, Settled};
use crate::http::timeline::Part;
use crate::shutdown::Shutdown;
use crate::trace::TraceContext;
use crate::user_id::UserId;

/// The façade of the service; cheap to clone.
#[derive(Clone)]
pub struct Orders {
    db: Db,
    intake: place_order::Intake,
    live: Live,
    ends: Ends,
}

pub type Placing = Result<Placed, PlaceError>;

/// `ce_source` of what orders writes.
pub const SOURCE: &str = "/shopd/orders";

/// Where a request came from: its trace and its `X-Request-Id`, carried into the outbox and the record's headers.
#[derive(Clone, Debug)]
pub struct Origin {
    pub trace: TraceContext,
    pub request_id: Arc<str>,
    /// Names the request over all its tries where no key does: the order keeps it, and another try is answered as the first.
    pub stamp: Option<Uuid>,
}

/// Which orders, newest first.
#[derive(Clone, Debug, Default)]
pub struct ListOrders {
    pub user_id: Option<UserId>,
    pub status: Option<OrderStatus>,
    /// 1..=500.
    pub limit: i64,
    /// Only orders before this position.
    pub before: Option<OrderPosition>,
}

/// A place in the list: creation time, then id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrderPosition {
    pub created_at: DateTime<Utc>,
    pub id: Uuid,
}

/// One page; `next` is set when there is more.
#[derive(Debug)]
pub struct OrderPage {
    pub orders: Vec<Order>,
    pub next: Option<OrderPosition>,
}

impl Orders {
    /// `notifier` is told after every commit that left something in the outbox.
    pub fn new(db: Db, notifier: Notifier) -> Self {
        let live = Live::new(db.clone(), Arc::default(), true, Shutdown::new());
        let ends = Ends::new(db.clone(), true, Shutdown::new());
        Self::with_live(db, notifier, live, ends)
    }

    /// With streams and waiting requests that hear of this process's commits without the database between, and end with it.
    pub fn with_live(db: Db, notifier: Notifier, live: Live, ends: Ends) -> Self {
        Self { intake: place_order::intake(db.clone(), notifier), db, live, ends }
    }

    /// The order's state, then its changes until it ends; after `seen` only what is not in it.
    pub async fn stream(&self, id: Uuid, seen: Option<Seen>) -> Result<OrderStream, DbError> {
        self.live.order(id, seen).await
    }

    /// The states of the user's latest orders, then every change of any.
    pub async fn stream_of(&self, user: UserId, seen: Option<Seen>) -> Result<Updates, DbError> {
        self.live.user(user, seen).await
    }

    /// From now on this order's end is waited for.
    pub fn expect_end(&self, id: Uuid) -> Result<Expected, DbError> {
        self.ends.expect(id)
    }

    /// What orders knows of an order's way.
    pub async fn timeline(&self, id: Uuid) -> Result<Option<Part>, DbError> {
        db::in_time(async { timeline::read(&mut *self.db.get().await?, id).await }).await
    }

    /// Accepts an order, or answers the stored one where the same id came with the same fields before; under `key` once, and
    /// answered alike ever after.
    pub async fn place(&self, order: NewOrder, origin: Origin, key: Option<Keyed<Placing>>) -> Settled<Placing> {
        // Postgres keeps microseconds; what is answered is what is stored.
        let placement = store::Placement { order, origin, at: Utc::now().trunc_subsecs(6), key };
        db::in_time(async { Ok(self.intake.submit(placement).await?) }).await.unwrap_or_else(|error: DbError| error.into())
    }

    pub async fn get(&self, id: Uuid) -> Result<Option<Order>, DbError> {
        db::in_time(async { Ok(store::find(&mut *self.db.get().await?, &[id]).await?.pop()) }).await
    }

    pub async fn list(&self, which: ListOrders) -> Result<OrderPage, DbError> {
        db::in_time(async { store::list(&mut *self.db.get().await?, which).await }).await
    }

    /// What is missing for this service to do its work; empty when ready. Bounded to two seconds.
    pub async fn missing(&self) -> Vec<String> {
        db::missing(&self.db, Schema::Orders, Duration::from_secs(2)).await
    }
}
