//! What clients did and were told, and what is there in the end. Facts only; what they must agree in is in `model`.

use std::collections::HashMap;
use std::fmt;

use uuid::Uuid;

/// Microseconds since the Unix epoch, by the one clock that clients and database servers share here.
pub type Micros = i64;

pub fn now() -> Micros {
    chrono::Utc::now().timestamp_micros()
}

/// What makes two orders of one id the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fields {
    pub user: String,
    /// Minor units.
    pub amount: i64,
    pub description: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    pub id: Uuid,
    pub fields: Fields,
    pub status: String,
    pub reason: Option<String>,
}

impl Order {
    pub fn is_final(&self) -> bool {
        matches!(self.status.as_str(), "Finished" | "Cancelled")
    }

    /// Status and reason.
    pub fn end(&self) -> String {
        format!("{} {}", self.status, self.reason.as_deref().unwrap_or("-"))
    }
}

#[derive(Clone, Debug)]
pub enum Asked {
    Open {
        user: String,
    },
    /// `amount` is no other deposit's of the round, so the ledger tells which came through.
    Deposit {
        user: String,
        amount: i64,
        key: Option<String>,
    },
    Place {
        id: Uuid,
        fields: Fields,
    },
    Get {
        id: Uuid,
    },
    List {
        user: String,
    },
    Balance {
        user: String,
    },
}

#[derive(Clone, Debug)]
pub enum Outcome {
    /// The connection was refused: certainly no effect.
    NotSent,
    /// Timed out, cut off, or a 5xx that does not say: it may have happened, or may yet.
    Indefinite(String),
    Answered(Answer),
}

#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub status: u16,
    /// Of a problem.
    pub code: String,
    pub replayed: bool,
    pub orders: Vec<Order>,
    pub balance: Option<i64>,
}

#[derive(Clone, Debug)]
pub struct Call {
    pub begun: Micros,
    pub ended: Micros,
    pub asked: Asked,
    pub outcome: Outcome,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} +{} us: {:?}: ", self.begun, self.ended - self.begun, self.asked)?;
        match &self.outcome {
            Outcome::NotSent => f.write_str("not sent"),
            Outcome::Indefinite(why) => write!(f, "indefinite: {why}"),
            Outcome::Answered(answer) => write!(f, "{answer:?}"),
        }
    }
}

impl Call {
    pub fn answer(&self) -> Option<&Answer> {
        match &self.outcome {
            Outcome::Answered(answer) => Some(answer),
            _ => None,
        }
    }
}

/// A request for an order that orders never had, of a real account: payments pays it, as the contract says.
#[derive(Clone, Debug)]
pub struct ForeignDebit {
    pub order: Uuid,
    pub user: String,
    pub amount: i64,
}

#[derive(Default)]
pub struct History {
    pub calls: Vec<Call>,
    pub foreign: Vec<ForeignDebit>,
}

/// One line of an account's ledger.
#[derive(Clone, Debug)]
pub struct Entry {
    pub id: i64,
    /// Signed.
    pub amount: i64,
    pub balance_after: i64,
    pub order: Option<Uuid>,
    pub at: Micros,
}

#[derive(Clone, Debug, Default)]
pub struct Account {
    pub balance: i64,
    /// Oldest first.
    pub ledger: Vec<Entry>,
}

/// What the shop answers when all is quiet.
#[derive(Default)]
pub struct End {
    pub orders: HashMap<Uuid, Order>,
    pub accounts: HashMap<String, Account>,
}
