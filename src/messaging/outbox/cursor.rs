//! Where a reader stands between two snapshots.

use crate::db::DbError;
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

/// The parts of a `pg_snapshot`'s text `xmin:xmax:open,open,...` that the cursor needs.
#[derive(Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub xmax: u64,
    /// Transactions that were open.
    pub open: Vec<Xid>,
}

impl Snapshot {
    pub fn parse(text: &str) -> Result<Self, DbError> {
        let odd = || DbError::Defect(format!("the outbox cursor holds no snapshot: {text:?}"));
        let mut parts = text.split(':');
        let (_, xmax, open) = (parts.next(), parts.next().ok_or_else(odd)?, parts.next().ok_or_else(odd)?);
        let xmax: u64 = xmax.parse().ok().filter(|xmax| *xmax > 0).ok_or_else(odd)?;
        let open = open.split(',').filter(|x| !x.is_empty()).map(|x| x.parse().map(Xid)).collect::<Result<_, _>>();
        Ok(Self { xmax, open: open.map_err(|_| odd())? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshots_text_is_read() {
        assert_eq!(Snapshot::parse("3:3:").unwrap(), Snapshot { xmax: 3, open: vec![] });
        assert_eq!(Snapshot::parse("10:20:10,14").unwrap(), Snapshot { xmax: 20, open: vec![Xid(10), Xid(14)] });
        for odd in ["", "1:2", "a:b:c", "0:0:", "1:2:x"] {
            assert!(Snapshot::parse(odd).is_err(), "{odd}");
        }
    }
}
