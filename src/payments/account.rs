//! An account and its ledger: pure rules, no async, no SQL.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::db::DbError;
use crate::money::Minor;
use crate::user_id::UserId;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    pub id: i64,
    pub user_id: UserId,
    pub balance: Minor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransactionKind {
    Deposit,
    Payment,
}

impl TransactionKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deposit => "deposit",
            Self::Payment => "payment",
        }
    }
}

/// One line of an account's ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    pub id: i64,
    pub kind: TransactionKind,
    /// Signed: a payment is negative.
    pub amount: Minor,
    pub balance_after: Minor,
    /// Of a payment.
    pub order_id: Option<Uuid>,
    pub created_at: DateTime<Utc>,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum OpenError {
    #[error("Account already exists for this user")]
    Exists,
    #[error(transparent)]
    Db(#[from] DbError),
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum DepositError {
    #[error("no account for this user")]
    NoAccount,
    /// The balance would leave the range of the books (±9.2e18 minor units).
    #[error("the balance would be more than the books can hold")]
    BalanceTooLarge,
    #[error(transparent)]
    Db(#[from] DbError),
}
