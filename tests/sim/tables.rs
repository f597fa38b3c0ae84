//! What the model's databases hold. One type for both services; each uses its own part. Holds only what is committed.

use std::collections::{BTreeMap, BTreeSet};

use chrono::DateTime;
use shopd::messaging::outbox::{Cursor, Row};
use shopd::orders::OrderStatus;
use shopd::orders::sweep_rules::Walked;
use uuid::Uuid;

pub struct OrderRow {
    pub user: String,
    pub amount: i64,
    pub status: OrderStatus,
    /// `ce_source` of the result that ended it.
    pub ended_by: Option<String>,
    pub created_ms: u64,
    /// The transaction that wrote its first request.
    pub xid: u64,
}

/// An order that is asked for again.
#[derive(Clone, Default)]
pub struct RetryRow {
    pub asks: u32,
    pub due_ms: u64,
    /// The transaction that wrote its last request.
    pub asked_xid: Option<u64>,
}

/// The sweeper's.
pub struct SweepRow {
    pub walked: Walked,
    pub next_walk_ms: u64,
    pub next_sweep_ms: u64,
    pub retries: BTreeMap<Uuid, RetryRow>,
}

pub struct AccountRow {
    pub id: i64,
    pub balance: i64,
}

#[derive(Clone, Debug)]
pub struct TransferRow {
    pub user: String,
    pub amount: i64,
    pub order: Option<Uuid>,
    pub balance_after: i64,
    /// Of a deposit; only the checks look at it.
    pub key: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PaymentRow {
    pub user: String,
    pub amount: i64,
    pub status: String,
    pub failure_reason: Option<String>,
    pub result_event_id: Uuid,
    pub source: Option<String>,
}

#[derive(Default)]
pub struct OffsetRow {
    pub next_offset: i64,
    pub owner: Option<String>,
    pub lease_until_ms: u64,
    pub epoch: i64,
}

pub struct CursorRow {
    pub cursor: Cursor,
    pub owner: Option<String>,
    pub lease_until_ms: u64,
    pub epoch: i64,
    /// Its owner cannot reach the log.
    pub cut_off: bool,
}

/// A replica of a consumer.
pub struct MemberRow {
    /// It counts until then.
    pub seen_until_ms: u64,
    pub reaches_log: bool,
    pub reaches_since_ms: u64,
}

/// The answer kept for an idempotency key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptAnswer {
    pub user: String,
    pub amount: i64,
    pub balance: i64,
}

pub struct Tables {
    pub orders: BTreeMap<Uuid, OrderRow>,
    pub sweep: SweepRow,
    pub accounts: BTreeMap<String, AccountRow>,
    pub transfers: Vec<TransferRow>,
    pub payments: BTreeMap<Uuid, PaymentRow>,
    pub answers: BTreeMap<u64, KeptAnswer>,
    pub outbox: BTreeMap<(u64, i64), Row>,
    pub cursor: CursorRow,
    pub offsets: BTreeMap<i32, OffsetRow>,
    /// Of this database's consumer, by name.
    pub members: BTreeMap<String, MemberRow>,
    pub letters: BTreeSet<(i32, i64)>,
    /// Debits by order, for the checks.
    pub debits: BTreeMap<Uuid, Vec<TransferRow>>,
    /// Of each user, the landing number of the last decided request; for the checks.
    pub decided_last: BTreeMap<String, i64>,
    /// Every result written, by order; for the checks.
    pub results: BTreeMap<Uuid, BTreeSet<Uuid>>,
    pub deposited: i64,
    pub paid: i64,
}

impl Tables {
    pub fn new() -> Self {
        let cursor = Cursor { snapshot: "3:3:".into(), look: None };
        Self {
            orders: BTreeMap::new(),
            sweep: SweepRow {
                walked: Walked { to: DateTime::UNIX_EPOCH, id: Uuid::nil() },
                next_walk_ms: 0,
                next_sweep_ms: 0,
                retries: BTreeMap::new(),
            },
            accounts: BTreeMap::new(),
            transfers: Vec::new(),
            payments: BTreeMap::new(),
            answers: BTreeMap::new(),
            outbox: BTreeMap::new(),
            cursor: CursorRow { cursor, owner: None, lease_until_ms: 0, epoch: 0, cut_off: false },
            offsets: BTreeMap::new(),
            members: BTreeMap::new(),
            letters: BTreeSet::new(),
            debits: BTreeMap::new(),
            decided_last: BTreeMap::new(),
            results: BTreeMap::new(),
            deposited: 0,
            paid: 0,
        }
    }
}

/// A `pg_snapshot`.
pub struct Snap {
    pub xmin: u64,
    pub xmax: u64,
    pub open: Vec<u64>,
}

impl Snap {
    pub fn parse(text: &str) -> Self {
        let mut parts = text.split(':');
        let mut number = || parts.next().and_then(|part| part.parse().ok()).expect("a snapshot of the model's own");
        let (xmin, xmax) = (number(), number());
        let open = text.rsplit(':').next().unwrap_or_default();
        Self { xmin, xmax, open: open.split(',').filter_map(|x| x.parse().ok()).collect() }
    }

    pub fn sees(&self, xid: u64) -> bool {
        xid < self.xmax && !self.open.contains(&xid)
    }
}

/// Whether a cursor is past a row.
pub fn passed(cursor: &Cursor, (xid, id): (u64, i64)) -> bool {
    let old = Snap::parse(&cursor.snapshot);
    if old.sees(xid) {
        return true;
    }
    let Some(look) = &cursor.look else { return false };
    if !Snap::parse(&look.snapshot).sees(xid) {
        return false;
    }
    let behind = (xid, id) <= (look.after.0.0, look.after.1);
    if xid < old.xmax { !look.late || behind } else { !look.late && behind }
}
