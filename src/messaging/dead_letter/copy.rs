//! The copy of a dead letter on `<topic>.dlq`: the record as it came, and headers that say where from and why. Pure.

use bytes::Bytes;

use crate::contracts::Headers;

use super::super::consumer::Delivery;
use super::super::log::Record;

/// What a topic's name is followed by for its dead letters.
pub const SUFFIX: &str = ".dlq";

const TOPIC: &str = "dlq_topic";
const TRUNCATED: &str = "dlq_truncated";
/// Beside what a cut saves, the header that tells of it takes its place.
const TRUNCATED_BYTES: usize = 64;

/// The original headers, but for those of the names of ours, and ours behind them.
pub fn headers(delivery: &Delivery, reason: &str, attempts: i32) -> Headers {
    let position = &delivery.position;
    let [partition, offset, attempts] = [position.partition.to_string(), position.offset.to_string(), attempts.to_string()];
    let ours = [
        ("dlq_reason", reason),
        (TOPIC, &position.topic),
        ("dlq_partition", &partition),
        ("dlq_offset", &offset),
        ("dlq_attempts", &attempts),
    ];
    let theirs = delivery.headers.iter().filter(|(name, _)| ours.iter().all(|(own, _)| own != name));
    theirs.collect::<Headers>().with(ours.map(|(name, value)| (name, value.as_bytes())))
}

/// Whether this is a dead letter's copy, and no producer's own record.
pub fn is_copy(record: &Record) -> bool {
    record.topic.ends_with(SUFFIX) && record.headers.iter().any(|(name, _)| name == TOPIC)
}

/// Makes the copy of a dead letter smaller, because the log refused it with `bytes` above `bytes_max`; false where `record` is no
/// such copy or cannot become smaller. The letter itself is whole in the database.
pub fn shorten(record: &mut Record, bytes: usize, bytes_max: usize) -> bool {
    if !is_copy(record) {
        return false;
    }
    if let Some(value) = record.value.as_mut().filter(|value| !value.is_empty()) {
        let original = value.len();
        // The broker's own limit may be lower than ours: then nobody knows by how much.
        let surplus = if bytes > bytes_max { bytes - bytes_max + TRUNCATED_BYTES } else { original.div_ceil(2) };
        value.truncate(original.saturating_sub(surplus.max(1)));
        if !record.headers.iter().any(|(name, _)| name == TRUNCATED) {
            record.headers.push((TRUNCATED.into(), Bytes::from(original.to_string())));
        }
        return true;
    }
    // Another producer's headers, then its key: whatever is left is surely small.
    let headers = record.headers.len();
    record.headers.retain(|(name, _)| name.starts_with("dlq_"));
    headers != record.headers.len() || record.key.take().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn copy(value: usize, header: usize, key: usize) -> Record {
        let filled = |length: usize| Bytes::from(vec![b'x'; length]);
        Record {
            topic: "t.dlq".into(),
            key: Some(filled(key)),
            value: Some(filled(value)),
            headers: vec![(TOPIC.into(), Bytes::from_static(b"t")), ("theirs".into(), filled(header))],
            timestamp: Default::default(),
        }
    }

    fn size(record: &Record) -> usize {
        let part = |part: &Option<Bytes>| part.as_ref().map_or(0, Bytes::len);
        let headers: usize = record.headers.iter().map(|(name, value)| 10 + name.len() + value.len()).sum();
        97 + part(&record.key) + part(&record.value) + headers
    }

    fn truncated(record: &Record) -> Option<usize> {
        let (_, value) = record.headers.iter().find(|(name, _)| name == TRUNCATED)?;
        std::str::from_utf8(value).ok()?.parse().ok()
    }

    proptest! {
        #[test]
        fn every_copy_becomes_small_enough_and_says_how_long_it_was(
            value in 0usize..20_000, header in 0usize..9_000, key in 0usize..9_000, told in any::<bool>(),
        ) {
            let mut record = copy(value, header, key);
            let whole = record.clone();
            let mut rounds = 0;
            while size(&record) > 1_000 {
                // A broker that only says no, or our own limit.
                let (bytes, bytes_max) = if told { (size(&record), 1_000) } else { (0, 1_000) };
                prop_assert!(shorten(&mut record, bytes, bytes_max));
                rounds += 1;
                prop_assert!(rounds < 40);
            }
            let kept = record.value.as_ref().map_or(0, Bytes::len);
            // Where other producers' headers had to go the length is still told.
            prop_assert_eq!(truncated(&record), (kept < value).then_some(value));
            prop_assert!(rounds > 0 || record == whole);
        }
    }

    #[test]
    fn only_copies_are_cut() {
        let mut record = copy(5_000, 10, 10);
        record.topic = "t".into();
        assert!(!shorten(&mut record, 5_100, 1_000));
        let mut record = copy(5_000, 10, 10);
        record.headers.remove(0);
        assert!(!shorten(&mut record, 5_100, 1_000));
    }
}
