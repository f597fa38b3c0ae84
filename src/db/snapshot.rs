//! What a snapshot of the server says about transactions; a cursor over what they wrote is a pair of these.

use super::error::DbError;
use super::types::Xid;

/// The parts of a `pg_snapshot`'s text `xmin:xmax:open,open,...` that a cursor needs.
#[derive(Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub xmax: u64,
    /// Transactions that were open, in order.
    pub open: Vec<Xid>,
}

impl Snapshot {
    pub fn parse(text: &str) -> Result<Self, DbError> {
        let odd = || DbError::Defect(format!("this is no snapshot: {text:?}"));
        let mut parts = text.split(':');
        let (_, xmax, open) = (parts.next(), parts.next().ok_or_else(odd)?, parts.next().ok_or_else(odd)?);
        let xmax: u64 = xmax.parse().ok().filter(|xmax| *xmax > 0).ok_or_else(odd)?;
        let open = open.split(',').filter(|x| !x.is_empty()).map(|x| x.parse().map(Xid)).collect::<Result<_, _>>();
        Ok(Self { xmax, open: open.map_err(|_| odd())? })
    }

    /// `pg_visible_in_snapshot`
    pub fn sees(&self, xid: Xid) -> bool {
        xid.0 < self.xmax && self.open.binary_search(&xid).is_err()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshots_text_is_read() {
        assert_eq!(Snapshot::parse("3:3:").unwrap(), Snapshot { xmax: 3, open: vec![] });
        assert_eq!(Snapshot::parse("10:20:10,14").unwrap(), Snapshot { xmax: 20, open: vec![Xid(10), Xid(14)] });
        let snapshot = Snapshot::parse("10:20:10,14").unwrap();
        let seen: Vec<u64> = (8..22).filter(|xid| snapshot.sees(Xid(*xid))).collect();
        assert_eq!(seen, [8, 9, 11, 12, 13, 15, 16, 17, 18, 19]);
        for odd in ["", "1:2", "a:b:c", "0:0:", "1:2:x"] {
            assert!(Snapshot::parse(odd).is_err(), "{odd}");
        }
    }
}
