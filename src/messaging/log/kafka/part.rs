//! What a partition's leader answers to a fetch, as records: whose transactions count, and what is done about bytes that are not what they
//! should be. Pure.

use std::collections::{HashSet, VecDeque};

use bytes::Bytes;
use chrono::Utc;

use super::decode::{self, Batch, PLAIN_BYTES_MAX};
use crate::messaging::log::{Fetched, StoredRecord, UNREADABLE};

/// Of an answer: what a damaged batch says of itself may be any number.
const UNREADABLE_MAX: i64 = 10_000;

/// Of one partition.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub topic: String,
    pub partition: i32,
    pub error: i16,
    /// Up to here the copies agree.
    pub end_offset: i64,
    /// Producer and first offset of the transactions that were aborted and lie among the records.
    pub aborted: Vec<(i64, i64)>,
    /// Record batches, the last one perhaps cut off.
    pub batches: Bytes,
}

impl Part {
    /// It tells neither of records nor of anything wrong.
    pub fn is_empty(&self) -> bool {
        self.error == 0 && self.batches.is_empty()
    }

    /// The records from `from` on. `None` where that is not plain: an error, a batch that cannot be read, nothing where there should be
    /// something.
    pub fn plain(self, from: i64) -> Option<Fetched> {
        if self.error != 0 {
            return None;
        }
        let fetched = self.read(from, false);
        fetched.filter(|fetched| fetched.next_offset > from || from == fetched.end_offset)
    }

    /// The same, when it was asked for by itself and without an error: what cannot be read becomes unreadable records, so that it is seen and
    /// holds nobody up. `None`: a batch that is cut off, and nothing else. An empty answer moves nothing, whatever end it names: offsets without
    /// records come as batches, and a broker that has to bring old records from elsewhere first answers with none.
    pub fn whatever_it_takes(self, from: i64) -> Option<Fetched> {
        let is_empty = self.batches.is_empty();
        let fetched = self.read(from, true)?;
        (is_empty || fetched.next_offset > from).then_some(fetched)
    }

    /// `None` where there is a batch that cannot be read, unless such are to be stepped over.
    fn read(self, from: i64, steps_over: bool) -> Option<Fetched> {
        let mut transactions = Transactions::new(self.aborted);
        let (mut records, mut next_offset, mut plain_bytes): (Vec<StoredRecord>, _, _) = (Vec::new(), from, 0);
        let batches = decode::batches(self.batches);
        for (index, batch) in batches.iter().enumerate() {
            let count = records.len();
            let read = match batch.is_whole() {
                // Not a word of it is to be believed: money hangs on it, and brokers do not look.
                false => Err("its checksum is not that of its bytes"),
                true if transactions.aborted(batch) || batch.is_control() || batch.end <= from => Ok(0),
                true => batch.read_into(&mut records),
            };
            let mut end = batch.end;
            match read {
                Ok(bytes) => plain_bytes += bytes,
                Err(reason) if steps_over => {
                    records.truncate(count);
                    let first = next_offset.max(batch.base_offset);
                    // What comes next tells better how far it went than it does itself, and may begin where we are.
                    let (least, behind) = match batches.get(index + 1) {
                        Some(next) => (first, next.base_offset),
                        None => (first + 1, end.min(self.end_offset)),
                    };
                    end = behind.clamp(least, first + UNREADABLE_MAX);
                    records.extend((first..end).map(|offset| unreadable(offset, reason)));
                }
                Err(_) => return None,
            }
            next_offset = next_offset.max(end);
            // The rest when it is asked for: it may be as large again.
            if plain_bytes >= PLAIN_BYTES_MAX || records.len() as i64 >= UNREADABLE_MAX && read.is_err() {
                break;
            }
        }
        // A batch is sent whole, and may begin before.
        records.retain(|record| record.offset >= from);
        Some(Fetched { records, next_offset, end_offset: self.end_offset.max(next_offset) })
    }
}

fn unreadable(offset: i64, reason: &str) -> StoredRecord {
    let headers = [(UNREADABLE, reason)].into_iter().collect();
    StoredRecord { offset, key: None, value: None, headers, timestamp: Utc::now() }
}

/// Which transactions are being read whose records do not count.
struct Transactions {
    /// Producer and first offset, by offset.
    aborted: VecDeque<(i64, i64)>,
    /// Producers inside of one.
    inside: HashSet<i64>,
}

impl Transactions {
    fn new(mut aborted: Vec<(i64, i64)>) -> Self {
        aborted.sort_unstable_by_key(|(_, first_offset)| *first_offset);
        Self { aborted: aborted.into(), inside: HashSet::new() }
    }

    /// Whether `batch`, the next on the log, belongs to one.
    fn aborted(&mut self, batch: &Batch) -> bool {
        while let Some((producer_id, _)) = self.aborted.pop_front_if(|(_, first_offset)| *first_offset < batch.end) {
            self.inside.insert(producer_id);
        }
        if batch.is_abort() {
            self.inside.remove(&batch.producer_id);
        }
        batch.is_transactional() && self.inside.contains(&batch.producer_id)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::messaging::log::Record;

    fn part(batches: Vec<u8>, end_offset: i64) -> Part {
        Part { topic: "t".into(), partition: 0, error: 0, end_offset, aborted: Vec::new(), batches: batches.into() }
    }

    /// As a broker stores it: with the offset of its first record.
    fn stored(base: i64, values: &[&str], compressed: bool) -> Vec<u8> {
        let records: Vec<Record> = values
            .iter()
            .map(|value| Record {
                topic: "t".into(),
                key: None,
                value: Some(Bytes::copy_from_slice(value.as_bytes())),
                headers: vec![("name".into(), Bytes::from_static(b"value"))],
                timestamp: chrono::DateTime::UNIX_EPOCH,
            })
            .collect();
        let mut batch = Vec::new();
        super::super::encode::batch(&mut batch, &mut Vec::new(), records.iter(), compressed).unwrap();
        batch[..8].copy_from_slice(&base.to_be_bytes());
        batch
    }

    /// Changes what stands at `at` of a batch, and the checksum with it.
    fn with(mut batch: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
        batch[at..at + bytes.len()].copy_from_slice(bytes);
        let sum = crc32c::crc32c(&batch[21..]);
        batch[17..21].copy_from_slice(&sum.to_be_bytes());
        batch
    }

    /// Of a producer's transaction.
    fn transactional(batch: Vec<u8>, producer_id: i64) -> Vec<u8> {
        with(with(batch, 21, &[0, 0b1_0000]), 43, &producer_id.to_be_bytes())
    }

    fn offsets(fetched: &Fetched) -> Vec<(i64, bool)> {
        fetched.records.iter().map(|record| (record.offset, record.unreadable().is_some())).collect()
    }

    proptest! {
        /// Red where a batch is believed whose checksum is wrong: a bit of an amount may be another one.
        #[test]
        fn a_batch_that_was_damaged_is_not_plain_and_not_a_record_of_it_is_believed(
            at in any::<prop::sample::Index>(), flip in 1u8.., compressed in any::<bool>(),
        ) {
            let mut batch = stored(5, &["one", "two", "three"], compressed);
            // The offset, the length and the leader's epoch are the broker's own words, outside of the checksum.
            let at = 16 + at.index(batch.len() - 16);
            batch[at] ^= flip;
            batch.extend(stored(8, &["eight"], compressed));
            let part = part(batch, 9);
            prop_assert_eq!(part.clone().plain(5), None);
            let (mut from, mut all) = (5, Vec::new());
            while from < 9 {
                let fetched = part.clone().whatever_it_takes(from).unwrap();
                prop_assert!(fetched.next_offset > from);
                all.extend(offsets(&fetched));
                from = fetched.next_offset;
            }
            prop_assert_eq!(all, [(5, true), (6, true), (7, true), (8, false)]);
        }
    }

    #[test]
    fn what_a_damaged_batch_says_of_its_length_is_not_believed_either() {
        let mut batch = stored(5, &["one"], false);
        batch[23..27].copy_from_slice(&i32::MAX.to_be_bytes());
        let fetched = part(batch.clone(), 6).whatever_it_takes(5).unwrap();
        assert_eq!((offsets(&fetched), fetched.next_offset), (vec![(5, true)], 6));
        let fetched = part(batch.clone(), i64::from(i32::MAX)).whatever_it_takes(5).unwrap();
        assert_eq!((fetched.records.len() as i64, fetched.next_offset), (UNREADABLE_MAX, 5 + UNREADABLE_MAX));
        batch[23..27].copy_from_slice(&(-7i32).to_be_bytes());
        assert_eq!(part(batch, 6).whatever_it_takes(5).map(|fetched| fetched.next_offset), Some(6));
    }

    /// A broker finds batches by what they say of themselves, so it may send one again that was stepped over.
    #[test]
    fn a_damaged_batch_that_is_sent_again_costs_nothing_of_the_next_one() {
        let mut batch = stored(5, &["five", "six"], false);
        batch[30] ^= 1;
        batch.extend(stored(7, &["seven"], false));
        let fetched = part(batch, 8).whatever_it_takes(7).unwrap();
        assert_eq!((offsets(&fetched), fetched.next_offset), (vec![(7, false)], 8));
    }

    #[test]
    fn records_are_read_from_the_offset_on_compressed_or_not() {
        for compressed in [false, true] {
            let mut batches = stored(5, &["five", "six"], compressed);
            batches.extend(stored(7, &["seven"], !compressed));
            let whole = batches.len();
            batches.extend(&stored(8, &["eight"], false)[..30]);
            let fetched = part(batches.clone(), 9).plain(6).unwrap();
            let values: Vec<_> = fetched.records.iter().map(|r| (r.offset, r.value.clone().unwrap())).collect();
            assert_eq!(values, [(6, Bytes::from_static(b"six")), (7, Bytes::from_static(b"seven"))]);
            assert_eq!(fetched.records[0].headers.get("name"), Some(b"value".as_slice()));
            assert_eq!((fetched.next_offset, fetched.end_offset), (8, 9));
            // Only the cut off one: somebody must look what is there.
            let cut = part(batches[whole..].to_vec(), 9);
            assert_eq!((cut.clone().plain(8), cut.whatever_it_takes(8)), (None, None));
        }
        assert_eq!(part(Vec::new(), 9).plain(9).map(|fetched| fetched.next_offset), Some(9));
        assert_eq!(part(Vec::new(), 9).plain(8), None);
        assert_eq!(Part { error: 1, ..part(Vec::new(), 9) }.plain(9), None);
    }

    #[test]
    fn records_have_the_brokers_time_where_that_is_what_the_topic_keeps() {
        let batch = with(stored(5, &["five"], false), 21, &[0, 0b1000]);
        let fetched = part(with(batch, 35, &86_400_000i64.to_be_bytes()), 6).plain(5).unwrap();
        assert_eq!(fetched.records[0].timestamp.timestamp(), 86_400);
    }

    /// Red where only a marker tells: it may lie beyond what one answer holds.
    #[test]
    fn records_of_an_aborted_transaction_do_not_count_though_its_marker_is_not_in_the_answer() {
        let batches = [transactional(stored(5, &["never", "happened"], false), 7), stored(7, &["did"], false)].concat();
        let fetched = Part { aborted: vec![(7, 5)], ..part(batches.clone(), 8) }.plain(5).unwrap();
        assert_eq!((offsets(&fetched), fetched.next_offset), (vec![(7, false)], 8));
        let only = Part { aborted: vec![(7, 5)], ..part(transactional(stored(5, &["never"], false), 7), 8) };
        let fetched = only.plain(5).unwrap();
        assert_eq!((offsets(&fetched), fetched.next_offset), (vec![], 6));
        let committed = part(batches, 8).plain(5).unwrap();
        assert_eq!(committed.records.len(), 3);
    }

    #[test]
    fn offsets_without_records_are_stepped_over_where_a_batch_says_so_and_an_empty_answer_moves_nothing() {
        // A transaction is open, or what lies there is not brought yet.
        let open = part(Vec::new(), 12);
        assert_eq!(open.clone().plain(8), None);
        let waits = open.whatever_it_takes(8).unwrap();
        assert_eq!((waits.records.len(), waits.next_offset, waits.end_offset), (0, 8, 12));
        // A marker, as the end of a transaction leaves one.
        let marker = with(stored(8, &["x"], false), 21, &[0, 0b11_0000]);
        let stepped = part(marker, 12).plain(8).unwrap();
        assert_eq!((stepped.records.len(), stepped.next_offset), (0, 9));
    }

    #[test]
    fn what_was_decompressed_ends_an_answer_and_the_rest_comes_with_the_next() {
        let large = "x".repeat(PLAIN_BYTES_MAX / 2);
        let batches: Vec<u8> = (0..5).flat_map(|offset| stored(offset, &[&large], true)).collect();
        let (mut from, mut counts) = (0, Vec::new());
        while from < 5 {
            let fetched = part(batches.clone(), 5).plain(from).unwrap();
            counts.push(fetched.records.len());
            from = fetched.next_offset;
        }
        assert_eq!(counts, [2, 2, 1]);
    }

    #[test]
    fn records_of_aborted_transactions_do_not_count_and_all_others_do() {
        let batches = [
            (Batch::of_transaction(1, 0..3), false),
            (Batch::of_transaction(2, 3..5), true),
            (Batch::marker(1, 5, false), false),
            (Batch::of_transaction(2, 6..7), true),
            (Batch::marker(2, 7, true), false),
            (Batch::of_transaction(2, 8..9), false),
            (Batch::marker(2, 9, false), false),
            (Batch::of_transaction(1, 10..11), true),
            (Batch::marker(1, 11, true), false),
        ];
        let mut transactions = Transactions::new(vec![(1, 10), (2, 3)]);
        for (batch, aborted) in batches {
            assert_eq!(transactions.aborted(&batch), aborted, "{batch:?}");
        }
    }
}
