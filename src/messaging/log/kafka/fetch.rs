//! Fetch requests as brokers take them, for any number of partitions, and their answers. Pure.

use bytes::{Buf, BufMut, Bytes};

use super::part::Part;
use super::raw::{self, put_string, string};

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
            let _stable_offset = answer.try_get_i64().ok()?;
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
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_answer_ends_in_a_value(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for part in parts(&mut bytes.into()).into_iter().flatten() {
                let _ = (part.clone().plain(0), part.whatever_it_takes(0));
            }
        }
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
