//! Fetch requests as brokers take them, for any number of partitions, and the plain case of what they answer. Pure.

use bytes::{Buf, BufMut, Bytes};

use super::decode;
use super::raw::{self, put_string, string};
use crate::messaging::log::Fetched;

const FETCH: (i16, i16) = (1, 4);
const READ_COMMITTED: i8 = 1;
/// One byte is enough to be answered at once.
const BYTES_MIN: i32 = 1;
/// Of a whole answer; a broker goes above it for one batch that is larger.
pub(super) const ANSWER_BYTES_MAX: i32 = 16 * 1024 * 1024;

/// Where a partition is read from, by the broker's name of its topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub topic: String,
    pub partition: i32,
    pub from: i64,
    pub bytes_max: i32,
}

impl Place {
    pub fn is_partition(&self, topic: &str, partition: i32) -> bool {
        self.partition == partition && self.topic == topic
    }
}

/// What a partition's leader answered.
#[derive(Debug)]
pub(super) struct Part {
    pub topic: String,
    pub partition: i32,
    pub error: i16,
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

    /// The records from `from` on. `None` where that is not plain: an error, a transaction, the broker's times, offsets without a
    /// record, another codec than ours, anything malformed.
    pub fn plain(self, from: i64) -> Option<Fetched> {
        if self.error != 0 || !self.aborted.is_empty() {
            return None;
        }
        let (mut records, mut next_offset) = (Vec::new(), from);
        for batch in decode::batches(self.batches) {
            if batch.is_control() || batch.is_transactional() || batch.has_append_time() || !batch.is_whole() {
                return None;
            }
            batch.read_into(&mut records).ok()?;
            next_offset = next_offset.max(batch.end);
        }
        // A batch is sent whole, and may begin before.
        records.retain(|record| record.offset >= from);
        let end_offset = self.end_offset.max(next_offset);
        (!records.is_empty() || from == end_offset).then_some(Fetched { records, next_offset, end_offset })
    }
}

/// The request for `places`, ordered by topic, with its length before it; answered when one of them has something, or after `wait_ms`.
pub(super) fn request(out: &mut Vec<u8>, places: &[&Place], wait_ms: i32) {
    let start = out.len();
    out.put_i32(0); // its length, below
    raw::put_head(out, FETCH);
    out.put_i32(-1); // no replica
    out.put_i32(wait_ms);
    out.put_i32(BYTES_MIN);
    out.put_i32(ANSWER_BYTES_MAX);
    out.put_i8(READ_COMMITTED);
    let topics = places.chunk_by(|a, b| a.topic == b.topic);
    out.put_i32(topics.clone().count() as i32);
    for places in topics {
        put_string(out, &places[0].topic);
        out.put_i32(places.len() as i32);
        for place in places {
            out.put_i32(place.partition);
            out.put_i64(place.from);
            out.put_i32(place.bytes_max);
        }
    }
    let length = (out.len() - start - 4) as i32;
    out[start..start + 4].copy_from_slice(&length.to_be_bytes());
}

/// What stands in an answer; `None` where it cannot be read.
pub(super) fn parts(answer: &mut Bytes) -> Option<Vec<Part>> {
    let _throttle = answer.try_get_i32().ok()?;
    let mut parts = Vec::new();
    for _ in 0..answer.try_get_i32().ok()? {
        let topic = string(answer)?;
        for _ in 0..answer.try_get_i32().ok()? {
            let (partition, error) = (answer.try_get_i32().ok()?, answer.try_get_i16().ok()?);
            let end_offset = answer.try_get_i64().ok()?;
            let _stable = answer.try_get_i64().ok()?;
            let mut aborted = Vec::new();
            for _ in 0..answer.try_get_i32().ok()? {
                aborted.push((answer.try_get_i64().ok()?, answer.try_get_i64().ok()?));
            }
            let length = usize::try_from(answer.try_get_i32().ok()?).unwrap_or_default();
            let batches = (length <= answer.len()).then(|| answer.split_to(length))?;
            parts.push(Part { topic: topic.clone(), partition, error, end_offset, aborted, batches });
        }
    }
    Some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messaging::log::Record;
    use proptest::prelude::*;

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

    proptest! {
        #[test]
        fn any_answer_ends_in_a_value(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for part in parts(&mut bytes.into()).into_iter().flatten() {
                let _ = part.plain(0);
            }
        }

        #[test]
        fn a_batch_that_was_damaged_is_not_plain(at in 0usize..200, compressed in any::<bool>()) {
            let mut batch = stored(5, &["one", "two", "three"], compressed);
            // The offset, the length and the leader's epoch are the broker's own words, outside of the checksum.
            let at = 17 + at % (batch.len() - 17);
            batch[at] ^= 0x10;
            prop_assert_eq!(part(batch, 8).plain(5), None);
        }
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
            assert_eq!(part(batches[whole..].to_vec(), 9).plain(8), None);
        }
        assert_eq!(part(Vec::new(), 9).plain(9).map(|fetched| fetched.next_offset), Some(9));
        assert_eq!(part(Vec::new(), 9).plain(8), None);
        assert_eq!(Part { error: 1, ..part(Vec::new(), 9) }.plain(9), None);
        assert_eq!(Part { aborted: vec![(1, 5)], ..part(stored(5, &["five"], false), 6) }.plain(5), None);
    }

    #[test]
    fn a_request_names_every_place_once_by_topic() {
        let place = |topic: &str, partition| Place { topic: topic.into(), partition, from: 3, bytes_max: 7 };
        let places = [place("a", 0), place("a", 2), place("b", 1)];
        let mut out = Vec::new();
        request(&mut out, &places.iter().collect::<Vec<_>>(), 500);
        let mut read = Bytes::from(out.clone());
        assert_eq!(read.get_i32() as usize, out.len() - 4);
        assert_eq!((read.get_i16(), read.get_i16(), read.get_i32(), string(&mut read)), (1, 4, 1, Some("shopd".into())));
        assert_eq!((read.get_i32(), read.get_i32(), read.get_i32(), read.get_i32()), (-1, 500, 1, ANSWER_BYTES_MAX));
        assert_eq!((read.get_i8(), read.get_i32(), string(&mut read), read.get_i32()), (1, 2, Some("a".into()), 2));
        assert_eq!((read.get_i32(), read.get_i64(), read.get_i32()), (0, 3, 7));
        assert_eq!((read.get_i32(), read.get_i64(), read.get_i32()), (2, 3, 7));
        assert_eq!((string(&mut read), read.get_i32()), (Some("b".into()), 1));
        assert_eq!((read.get_i32(), read.get_i64(), read.get_i32(), read.remaining()), (1, 3, 7, 0));
    }
}
