//! Payments: accounts, deposits, and the decision on every order's payment.
//!
//! Owns the tables `account`, `transfer` and `payment`. Reads `order-payment-requests`, writes `payment-status-updates`
//! through the outbox. Never imports orders.

mod account;

pub use account::{Account, DepositError, OpenError, Transaction, TransactionKind};

use crate::db::DbError;
use crate::money::Amount;
use crate::user_id::UserId;

/// The façade of the service; cheap to clone.
#[derive(Clone)]
pub struct Payments {}

/// One page of an account's ledger, newest first; `next` is the id to go on below.
#[derive(Debug)]
pub struct TransactionPage {
    pub transactions: Vec<Transaction>,
    pub next: Option<i64>,
}

impl Payments {
    /// Opens the user's one account, with nothing in it.
    pub async fn open_account(&self, _user: UserId) -> Result<Account, OpenError> {
        unimplemented!()
    }

    pub async fn deposit(&self, _user: UserId, _amount: Amount) -> Result<Account, DepositError> {
        unimplemented!()
    }

    pub async fn account(&self, _user: &UserId) -> Result<Option<Account>, DbError> {
        unimplemented!()
    }

    /// `None` where the user has no account. `limit` 1..=500; only entries with an id below `before`.
    pub async fn transactions(
        &self,
        _user: &UserId,
        _limit: i64,
        _before: Option<i64>,
    ) -> Result<Option<TransactionPage>, DbError> {
        unimplemented!()
    }

    /// What is missing for this service to do its work; empty when ready. Bounded to two seconds.
    pub async fn missing(&self) -> Vec<String> {
        unimplemented!()
    }
}
