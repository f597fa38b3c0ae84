//! Which messages share a row of the outbox: as many as fit into a page of the table. Pure.
//!
//! A row costs the writer its header, its columns, a number and an entry in the index, whatever is in it; and a message that is cut out of an
//! array costs a walk to it, so that arrays are kept short as well (docs/adr/0013).

/// Messages in one statement at most.
pub(crate) const STATEMENT_MESSAGES_MAX: usize = 256;
/// In a row.
const ROW_MESSAGES_MAX: usize = 32;
/// Of a row's messages. A page holds 8 160; topic, type, source and the arrays' own headers are the rest.
const ROW_BYTES_MAX: usize = 7_400;
/// Of a message beside its texts: two numbers of fixed length, and of four texts the lengths and what aligns them.
const MESSAGE_BYTES: usize = 16 + 8 + 4 * 7;

/// Parts of a statement's arrays, a row each: from and to, inclusive, counted from 1 as Postgres does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Windows {
    pub from: Vec<i32>,
    pub to: Vec<i32>,
}

impl Windows {
    /// Of messages whose texts have these lengths, in bytes. Everyone is in one window, in order; one that is longer than a row may be stands
    /// alone, and the server cuts it.
    pub fn of(lengths: impl Iterator<Item = usize>) -> Self {
        let (mut windows, mut bytes) = (Self::default(), 0);
        for (n, length) in (1..).zip(lengths) {
            let length = length + MESSAGE_BYTES;
            let fits = |from: &i32| bytes + length <= ROW_BYTES_MAX && n - from < ROW_MESSAGES_MAX as i32;
            match (windows.from.last().is_some_and(fits), windows.to.last_mut()) {
                (true, Some(to)) => (*to, bytes) = (n, bytes + length),
                _ => {
                    windows.from.push(n);
                    windows.to.push(n);
                    bytes = length;
                }
            }
        }
        windows
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_message_is_in_one_row_in_order_and_a_row_fits_into_a_page(lengths in proptest::collection::vec(0usize..9_000, 0..300)) {
            let windows = Windows::of(lengths.iter().copied());
            prop_assert_eq!(windows.from.len(), windows.to.len());
            let covered: Vec<i32> = windows.from.iter().zip(&windows.to).flat_map(|(from, to)| *from..=*to).collect();
            prop_assert_eq!(covered, (1..=lengths.len() as i32).collect::<Vec<_>>());
            for (from, to) in windows.from.iter().zip(&windows.to) {
                let row = &lengths[*from as usize - 1..*to as usize];
                let bytes: usize = row.iter().map(|length| length + MESSAGE_BYTES).sum();
                prop_assert!(row.len() == 1 || (bytes <= ROW_BYTES_MAX && row.len() <= ROW_MESSAGES_MAX), "{:?}", row);
            }
        }
    }

    #[test]
    fn rows_are_filled() {
        let windows = Windows::of([200; 70].into_iter());
        assert_eq!((windows.from, windows.to), (vec![1, 30, 59], vec![29, 58, 70]));
        let windows = Windows::of([0; 70].into_iter());
        assert_eq!((windows.from, windows.to), (vec![1, 33, 65], vec![32, 64, 70]));
    }
}
