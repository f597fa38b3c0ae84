//! Orders: accepts them, keeps them, and ends them when payments has decided.
//!
//! Owns the tables `orders` and `order_event`. Writes `order-payment-requests` through the outbox, reads
//! `payment-status-updates`. Never imports payments.

mod order;
mod place_order;

pub use order::{FailureReason, NewOrder, Order, OrderStatus};
pub use place_order::{PlaceError, Placed};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::db::DbError;
use crate::trace::TraceContext;
use crate::user_id::UserId;

/// The façade of the service; cheap to clone.
#[derive(Clone)]
pub struct Orders {}

/// Where a request came from: its trace and its `X-Request-Id`, carried into the outbox and the record's headers.
#[derive(Clone, Debug)]
pub struct Origin {
    pub trace: TraceContext,
    pub request_id: String,
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
    /// Accepts an order, or answers the stored one where the same id came with the same fields before.
    pub async fn place(&self, _order: NewOrder, _origin: Origin) -> Result<Placed, PlaceError> {
        unimplemented!()
    }

    pub async fn get(&self, _id: Uuid) -> Result<Option<Order>, DbError> {
        unimplemented!()
    }

    pub async fn list(&self, _which: ListOrders) -> Result<OrderPage, DbError> {
        unimplemented!()
    }

    /// What is missing for this service to do its work; empty when ready. Bounded to two seconds.
    pub async fn missing(&self) -> Vec<String> {
        unimplemented!()
    }
}
