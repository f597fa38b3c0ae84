//! Record batches as they lie on the log, whoever wrote them. Format: message version 2 of Kafka's protocol. Pure; any bytes end in a value,
//! never in a panic, and in no more memory than [`PLAIN_BYTES_MAX`] beside what came.

use std::ops::Range;

use bytes::{Buf, Bytes};
use chrono::{DateTime, Utc};

use super::codec;
use crate::contracts::{Headers, Span};
use crate::messaging::log::StoredRecord;

/// Attributes of a batch.
const CODEC: i16 = 0b111;
const APPEND_TIME: i16 = 1 << 3;
const TRANSACTIONAL: i16 = 1 << 4;
const CONTROL: i16 = 1 << 5;
const MAGIC: i8 = 2;
/// What a batch may become when it is decompressed; others' compress as they like.
pub(super) const PLAIN_BYTES_MAX: usize = 32 * 1024 * 1024;
/// A marker's key is its version and then this for "aborted".
const ABORT: i16 = 0;
/// Ours have so many.
const HEADERS_USUAL: usize = 8;

/// One batch, its records still encoded.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    pub base_offset: i64,
    /// The offset after its last.
    pub end: i64,
    pub producer_id: i64,
    first_timestamp: i64,
    max_timestamp: i64,
    attributes: i16,
    count: i32,
    /// Not what it says of itself.
    damaged: bool,
    records: Bytes,
}

/// The whole batches in `bytes`; one that is cut off at the end is left out, as brokers cut.
pub(super) fn batches(mut bytes: Bytes) -> Vec<Batch> {
    let mut batches = Vec::new();
    while let Some(batch) = batch(&mut bytes) {
        batches.push(batch);
    }
    batches
}

fn batch(bytes: &mut Bytes) -> Option<Batch> {
    let base_offset = bytes.try_get_i64().ok()?;
    let length = usize::try_from(bytes.try_get_i32().ok()?).ok()?;
    let mut batch = (length <= bytes.len()).then(|| bytes.split_to(length))?;
    let _leader_epoch = batch.try_get_i32().ok()?;
    let magic = batch.try_get_i8().ok()?;
    let damaged = magic != MAGIC || batch.try_get_u32().ok()? != crc32c::crc32c(&batch);
    let attributes = batch.try_get_i16().ok()?;
    let last_offset_delta = batch.try_get_i32().ok()?;
    let first_timestamp = batch.try_get_i64().ok()?;
    let max_timestamp = batch.try_get_i64().ok()?;
    let producer_id = batch.try_get_i64().ok()?;
    let _producer_epoch = batch.try_get_i16().ok()?;
    let _base_sequence = batch.try_get_i32().ok()?;
    let count = batch.try_get_i32().ok()?;
    // One that is damaged holds an offset at least, whatever it says: it must be stepped over.
    let end = base_offset.checked_add(i64::from(last_offset_delta).max(0))?.checked_add(1)?;
    let damaged = damaged || last_offset_delta < 0;
    Some(Batch { base_offset, end, producer_id, first_timestamp, max_timestamp, attributes, count, damaged, records: batch })
}

impl Batch {
    /// It holds a transaction's marker and no record.
    pub fn is_control(&self) -> bool {
        self.attributes & CONTROL != 0
    }

    pub fn is_transactional(&self) -> bool {
        self.attributes & TRANSACTIONAL != 0
    }

    /// A marker that says: aborted.
    pub fn is_abort(&self) -> bool {
        let abort = || {
            let mut records = Vec::new();
            self.read_into(&mut records).ok()?;
            let key = records.into_iter().next()?.key?;
            Some((&mut key.get(2..4)?).get_i16() == ABORT)
        };
        self.is_control() && abort().unwrap_or(false)
    }

    /// It is of this format, and its checksum is right.
    pub fn is_whole(&self) -> bool {
        !self.damaged
    }

    /// Appends its records and answers how many bytes they are decompressed. The error says what is wrong with them; what was appended of
    /// such a batch is not to be used.
    pub fn read_into(&self, records: &mut Vec<StoredRecord>) -> Result<usize, &'static str> {
        let plain = match self.attributes & CODEC {
            0 => self.records.clone(),
            codec => codec::decompress(codec, &self.records, PLAIN_BYTES_MAX)?.into(),
        };
        let bytes = plain.len();
        self.read(plain, records)?;
        Ok(bytes)
    }

    fn read(&self, bytes: Bytes, records: &mut Vec<StoredRecord>) -> Result<(), &'static str> {
        let mut rest: &[u8] = &bytes;
        for _ in 0..self.count {
            records.push(self.record(&bytes, &mut rest).ok_or("malformed record")?);
        }
        Ok(())
    }

    /// The next record in `rest`, the end of `bytes`.
    fn record(&self, bytes: &Bytes, rest: &mut &[u8]) -> Option<StoredRecord> {
        let Range { start, end } = sized(rest, bytes.len())??;
        let mut rest = bytes.get(start..end)?;
        let _attributes = rest.try_get_i8().ok()?;
        let created = self.first_timestamp.checked_add(varint(&mut rest)?)?;
        let timestamp = if self.attributes & APPEND_TIME != 0 { self.max_timestamp } else { created };
        let offset = self.base_offset.checked_add(varint(&mut rest)?)?;
        let (key, value) = (sized(&mut rest, end)?, sized(&mut rest, end)?);
        let mut headers = Vec::with_capacity(HEADERS_USUAL);
        for _ in 0..varint(&mut rest)? {
            // No value is as good as an empty one.
            headers.push(Span::of(sized(&mut rest, end)??, sized(&mut rest, end)?.unwrap_or_default())?);
        }
        let timestamp: DateTime<Utc> = DateTime::from_timestamp_millis(timestamp).unwrap_or_default();
        let [key, value] = [key, value].map(|part| part.map(|part| bytes.slice(part)));
        Some(StoredRecord { offset, key, value, headers: Headers::at(bytes.clone(), headers), timestamp })
    }
}

/// Goes past a length and so many bytes, and says where these lie when `rest` ends at `end`; a negative length is null.
fn sized(rest: &mut &[u8], end: usize) -> Option<Option<Range<usize>>> {
    let Ok(length) = usize::try_from(varint(rest)?) else { return Some(None) };
    *rest = rest.get(length..)?;
    let end = end - rest.len();
    Some(Some(end - length..end))
}

fn varint(bytes: &mut &[u8]) -> Option<i64> {
    let mut zigzag = 0_u64;
    for shift in (0..64).step_by(7) {
        let byte = bytes.try_get_u8().ok()?;
        zigzag |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some((zigzag >> 1).cast_signed() ^ -(zigzag & 1).cast_signed());
        }
    }
    None
}

#[cfg(test)]
impl Batch {
    /// A transaction's records, without the records.
    pub fn of_transaction(producer_id: i64, offsets: std::ops::Range<i64>) -> Self {
        Self {
            base_offset: offsets.start,
            end: offsets.end,
            producer_id,
            first_timestamp: 0,
            max_timestamp: 0,
            attributes: TRANSACTIONAL,
            count: 0,
            damaged: false,
            records: Bytes::new(),
        }
    }

    /// A transaction's end.
    pub fn marker(producer_id: i64, offset: i64, aborted: bool) -> Self {
        // Length 16: attributes, timestamp, offset, a key of 4 bytes, a value of 6, no headers.
        let records = vec![32, 0, 0, 0, 8, 0, 0, 0, if aborted { 0 } else { 1 }, 12, 0, 0, 0, 0, 0, 0, 0];
        let attributes = TRANSACTIONAL | CONTROL;
        Self { attributes, count: 1, records: records.into(), ..Self::of_transaction(producer_id, offset..offset + 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_end_in_a_value(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for batch in batches(bytes.into()) {
                let _ = (batch.read_into(&mut Vec::new()), batch.is_abort());
            }
        }

        #[test]
        fn any_records_end_in_a_value(bytes in proptest::collection::vec(any::<u8>(), 0..300), count in -1..20, codec in 0i16..8) {
            let batch = Batch {
                base_offset: 5, end: 6, producer_id: 1, first_timestamp: 0, max_timestamp: 0, attributes: CONTROL | codec, count, damaged: false, records: bytes.into(),
            };
            let _ = (batch.read_into(&mut Vec::new()), batch.is_abort());
        }
    }

    #[test]
    fn numbers_of_variable_length_are_read() {
        let read = |mut bytes: &[u8]| varint(&mut bytes);
        assert_eq!([read(&[0]), read(&[1]), read(&[2]), read(&[0xac, 0x02])], [Some(0), Some(-1), Some(1), Some(150)]);
        assert_eq!([read(&[]), read(&[0x80]), read(&[0xff; 11])], [None; 3]);
    }
}
