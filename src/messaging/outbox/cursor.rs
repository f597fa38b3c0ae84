//! Where a reader stands between two snapshots.

use crate::db::Snapshot;
use crate::db::types::Xid;

/// How far an outbox was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Everything visible in it is on the log.
    pub snapshot: String,
    /// The look in progress.
    pub look: Option<Look>,
}

/// A snapshot being worked through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    pub snapshot: String,
    /// Still among the rows of transactions that were open at the previous snapshot.
    pub late: bool,
    /// The last row of it that is on the log, by (xid, id).
    pub after: (Xid, i64),
}

impl Look {
    /// Goes on with the rows of transactions that are younger than `old`.
    pub fn fresh(self, old: &Snapshot) -> Self {
        Self { late: false, after: (Xid(old.xmax - 1), i64::MAX), ..self }
    }
}
