//! An order and its life: pure rules, no async, no SQL.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::money::Amount;
use crate::user_id::UserId;

/// `New` -> (`Processing`) -> `Finished` | `Cancelled`; a final status never changes (S5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OrderStatus {
    New,
    /// Reserved: read, never written by us.
    Processing,
    Finished,
    Cancelled,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FailureReason {
    InsufficientFunds,
    AccountNotFound,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    pub id: Uuid,
    pub user_id: UserId,
    pub amount: Amount,
    pub description: Option<String>,
    pub status: OrderStatus,
    pub failure_reason: Option<FailureReason>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}

/// An order as a client asks for it, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewOrder {
    /// The client's, or a UUIDv7 made at the edge.
    pub id: Uuid,
    pub user_id: UserId,
    pub amount: Amount,
    /// At most 1000 characters, no NUL.
    pub description: Option<String>,
}

impl OrderStatus {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::New => "New",
            Self::Processing => "Processing",
            Self::Finished => "Finished",
            Self::Cancelled => "Cancelled",
        }
    }

    /// `None` for any other text.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::New, Self::Processing, Self::Finished, Self::Cancelled].into_iter().find(|s| s.as_str() == text)
    }

    pub fn is_final(self) -> bool {
        matches!(self, Self::Finished | Self::Cancelled)
    }
}

impl FailureReason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InsufficientFunds => "insufficient_funds",
            Self::AccountNotFound => "account_not_found",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        [Self::InsufficientFunds, Self::AccountNotFound].into_iter().find(|r| r.as_str() == text)
    }
}
