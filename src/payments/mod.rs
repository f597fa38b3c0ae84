//! Payments: accounts, deposits, and the decision on every order's payment.
//!
//! Owns the tables `account`, `transfer` and `payment`. Reads `order-payment-requests`, writes `payment-status-updates`
//! through the outbox. Never imports orders.

mod account;
mod at_once;
pub mod audit;
mod decide;
mod deposit;
mod document;
mod dto;
mod known;
mod on_order;
mod open;
mod routes;
mod schema;
mod store;
mod timeline;

pub use account::{Account, DepositError, OpenError, Transaction, TransactionKind};
pub use document::document;
pub use known::Known;
pub use on_order::OnOrder;
pub use routes::routes;

/// The rules without a database, for a simulation of one and for measuring them.
#[doc(hidden)]
pub mod rules {
    pub use super::decide::{Accounts, Held, Orders, decide};
    pub use super::on_order::{Effects, effects};
    pub use super::store::{Decided, Entry, Record};
}

use std::time::Duration;

use uuid::Uuid;

use crate::db::{self, Db, DbError, Schema};
use crate::http::idempotency::{Keyed, Settled};
use crate::http::timeline::Part;
use crate::money::Amount;
use crate::user_id::UserId;

/// The façade of the service; cheap to clone.
#[derive(Clone)]
pub struct Payments {
    db: Db,
    openings: open::Openings,
    deposits: deposit::Deposits,
    known: Known,
}

pub type Opened = Result<Account, OpenError>;
pub type Deposited = Result<Account, DepositError>;

/// `ce_source` of what payments writes.
pub const SOURCE: &str = "/shopd/payments";

/// One page of an account's ledger, newest first; `next` is the id to go on below.
#[derive(Debug)]
pub struct TransactionPage {
    pub transactions: Vec<Transaction>,
    pub next: Option<i64>,
}

impl Payments {
    pub fn new(db: Db) -> Self {
        let known = Known::default();
        Self { openings: open::openings(db.clone()), deposits: deposit::deposits(db.clone(), known.clone()), db, known }
    }

    /// What this process knows of accounts.
    pub fn known(&self) -> Known {
        self.known.clone()
    }

    /// Opens the user's one account (S10), with nothing in it; under `key` once, and answered alike ever after.
    pub async fn open_account(&self, user: UserId, key: Option<Keyed<Opened>>) -> Settled<Opened> {
        let opening = open::Opening { user, key };
        db::in_time(async { Ok(self.openings.submit(opening).await?) }).await.unwrap_or_else(|error: DbError| error.into())
    }

    /// Under `key` once, and answered alike ever after.
    pub async fn deposit(&self, user: UserId, amount: Amount, key: Option<Keyed<Deposited>>) -> Settled<Deposited> {
        let deposit = deposit::Deposit { user, amount, key };
        db::in_time(async { Ok(self.deposits.submit(deposit).await?) }).await.unwrap_or_else(|error: DbError| error.into())
    }

    pub async fn account(&self, user: &UserId) -> Result<Option<Account>, DbError> {
        db::in_time(async { store::find(&mut *self.db.get().await?, user).await }).await
    }

    /// `None` where the user has no account. `limit` 1..=500; only entries with an id below `before`.
    pub async fn transactions(&self, user: &UserId, limit: i64, before: Option<i64>) -> Result<Option<TransactionPage>, DbError> {
        db::in_time(async {
            let mut conn = self.db.get().await?;
            let Some(account) = store::find(&mut conn, user).await? else { return Ok(None) };
            store::transactions(&mut conn, account.id, limit, before).await.map(Some)
        })
        .await
    }

    /// What payments knows of an order's way; `None` where nothing is decided on it.
    pub async fn timeline(&self, order: Uuid) -> Result<Option<Part>, DbError> {
        db::in_time(async { timeline::read(&mut *self.db.get().await?, order).await }).await
    }

    /// What is missing for this service to do its work; empty when ready. Bounded to two seconds.
    pub async fn missing(&self) -> Vec<String> {
        db::missing(&self.db, Schema::Payments, Duration::from_secs(2)).await
    }
}
