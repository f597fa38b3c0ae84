//! Which records go into one produce request: as many as the broker's limit on a batch surely lets pass. Pure.

use std::collections::VecDeque;
use std::ops::Range;

use crate::messaging::log::Record;

/// The head of a record batch.
const BATCH_HEAD_BYTES: usize = 61;
/// A record's own fields, at their longest as variable-length numbers: length, attributes, timestamp, offset, key and
/// value lengths, number of headers.
const RECORD_HEAD_BYTES: usize = 5 + 1 + 10 + 5 + 5 + 5 + 5;
/// Two lengths.
const HEADER_HEAD_BYTES: usize = 5 + 5;

/// At most so many bytes does `record` take in an uncompressed batch.
pub(super) fn record_bytes(record: &Record) -> usize {
    let headers: usize = record.headers.iter().map(|(name, value)| HEADER_HEAD_BYTES + name.len() + value.len()).sum();
    let sized = |bytes: &Option<bytes::Bytes>| bytes.as_ref().map_or(0, bytes::Bytes::len);
    RECORD_HEAD_BYTES + sized(&record.key) + sized(&record.value) + headers
}

/// At most so many bytes does a batch of one such record take.
pub(super) fn alone_bytes(record_bytes: usize) -> usize {
    BATCH_HEAD_BYTES + record_bytes
}

/// Cuts records of these sizes into batches of at most `batch_bytes_max`, in order. One that is larger by itself is alone.
pub(super) fn cut(sizes: &[usize], batch_bytes_max: usize) -> VecDeque<Range<usize>> {
    let mut batches = VecDeque::new();
    let mut start = 0;
    let mut bytes = BATCH_HEAD_BYTES;
    for (index, size) in sizes.iter().enumerate() {
        if index > start && bytes + size > batch_bytes_max {
            batches.push_back(start..index);
            start = index;
            bytes = BATCH_HEAD_BYTES;
        }
        bytes += size;
    }
    if start < sizes.len() {
        batches.push_back(start..sizes.len());
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_record_above_the_limit_is_alone() {
        assert_eq!(cut(&[10, 5_000, 10, 10], 1_000), [0..1, 1..2, 2..4]);
        assert!(cut(&[], 1_000).is_empty());
    }

    proptest! {
        #[test]
        fn batches_keep_all_records_in_order_and_stay_below_the_limit(sizes in proptest::collection::vec(1..400_usize, 0..200)) {
            let batches = cut(&sizes, 1_000);
            let covered: Vec<usize> = batches.iter().cloned().flatten().collect();
            prop_assert_eq!(covered, (0..sizes.len()).collect::<Vec<_>>());
            for batch in batches {
                prop_assert!(sizes[batch].iter().sum::<usize>() + BATCH_HEAD_BYTES <= 1_000);
            }
        }
    }
}
