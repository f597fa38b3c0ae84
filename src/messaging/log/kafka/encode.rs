//! Record batches as a broker takes them, written straight from where the records' bytes lie. Pure.

use std::io::{Result, Write};

use bytes::BufMut;
use lz4::ContentChecksum;
use lz4::EncoderBuilder;
use lz4::liblz4::BlockMode;

use crate::messaging::log::Record;

/// Base offset, length, leader's epoch, magic, checksum.
const BEFORE_CHECKED: usize = 8 + 4 + 4 + 1 + 4;
const MAGIC: i8 = 2;
/// Neither idempotent nor in a transaction.
const NO_PRODUCER: (i64, i16, i32) = (-1, -1, -1);
const LZ4: i16 = 3;

/// Appends one batch of these records to `out`; `scratch` is for what is compressed.
pub(super) fn batch<'r>(
    out: &mut Vec<u8>,
    scratch: &mut Vec<u8>,
    records: impl ExactSizeIterator<Item = &'r Record> + Clone,
    compressed: bool,
) -> Result<()> {
    let times = records.clone().map(|record| record.timestamp.timestamp_millis());
    let (first, last) = (times.clone().next().unwrap_or_default(), times.max().unwrap_or_default());
    let count = records.len() as i32;
    let start = out.len();
    out.put_i64(0); // the broker gives offsets
    out.put_i32(0); // its length, below
    out.put_i32(-1);
    out.put_i8(MAGIC);
    out.put_u32(0); // its checksum, below
    out.put_i16(if compressed { LZ4 } else { 0 });
    out.put_i32(count - 1);
    out.put_i64(first);
    out.put_i64(last);
    out.put_i64(NO_PRODUCER.0);
    out.put_i16(NO_PRODUCER.1);
    out.put_i32(NO_PRODUCER.2);
    out.put_i32(count);
    if compressed {
        scratch.clear();
        put_records(scratch, records, first);
        // The only mode that Kafka reads; the batch has a checksum of its own.
        let frame = EncoderBuilder::new().block_mode(BlockMode::Independent).checksum(ContentChecksum::NoChecksum).clone();
        let mut encoder = frame.build(&mut *out)?;
        encoder.write_all(scratch)?;
        encoder.finish().1?;
    } else {
        put_records(out, records, first);
    }
    let length = (out.len() - start - 12) as i32;
    out[start + 8..start + 12].copy_from_slice(&length.to_be_bytes());
    let checked = start + BEFORE_CHECKED;
    let checksum = crc32c::crc32c(&out[checked..]);
    out[checked - 4..checked].copy_from_slice(&checksum.to_be_bytes());
    Ok(())
}

fn put_records<'r>(out: &mut Vec<u8>, records: impl Iterator<Item = &'r Record>, first: i64) {
    for (offset, record) in records.enumerate() {
        let (time, offset) = (record.timestamp.timestamp_millis() - first, offset as i64);
        let headers = record.headers.iter();
        let length = 1
            + varint_bytes(time)
            + varint_bytes(offset)
            + sized_bytes(record.key.as_deref())
            + sized_bytes(record.value.as_deref())
            + varint_bytes(record.headers.len() as i64)
            + headers.clone().map(|(name, value)| sized_bytes(Some(name.as_bytes())) + sized_bytes(Some(value))).sum::<usize>();
        put_varint(out, length as i64);
        out.put_i8(0);
        put_varint(out, time);
        put_varint(out, offset);
        put_sized(out, record.key.as_deref());
        put_sized(out, record.value.as_deref());
        put_varint(out, record.headers.len() as i64);
        for (name, value) in headers {
            put_sized(out, Some(name.as_bytes()));
            put_sized(out, Some(value));
        }
    }
}

fn zigzag(number: i64) -> u64 {
    ((number << 1) ^ (number >> 63)).cast_unsigned()
}

fn varint_bytes(number: i64) -> usize {
    (64 - (zigzag(number) | 1).leading_zeros() as usize).div_ceil(7)
}

fn put_varint(out: &mut Vec<u8>, number: i64) {
    let mut rest = zigzag(number);
    while rest >= 0x80 {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

fn sized_bytes(bytes: Option<&[u8]>) -> usize {
    bytes.map_or(1, |bytes| varint_bytes(bytes.len() as i64) + bytes.len())
}

/// Bytes after their length; null is a negative one.
fn put_sized(out: &mut Vec<u8>, bytes: Option<&[u8]>) {
    match bytes {
        None => put_varint(out, -1),
        Some(bytes) => {
            put_varint(out, bytes.len() as i64);
            out.extend_from_slice(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::decode;
    use super::*;
    use bytes::Bytes;
    use chrono::DateTime;
    use proptest::prelude::*;

    fn some_bytes(length: usize) -> impl Strategy<Value = Bytes> {
        proptest::collection::vec(any::<u8>(), 0..length).prop_map(Bytes::from)
    }

    prop_compose! {
        fn some_record()(
            key in proptest::option::of(some_bytes(40)),
            value in proptest::option::of(some_bytes(300)),
            headers in proptest::collection::btree_map("[a-z]{0,9}", some_bytes(80), 0..9),
            millis in 1_749_723_072_000_i64..1_749_724_072_000,
        ) -> Record {
            let headers = headers.into_iter().map(|(name, value)| (name.into(), value)).collect();
            Record { topic: "t".into(), key, value, headers, timestamp: DateTime::from_timestamp_millis(millis).unwrap_or_default() }
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_as_it_was(records in proptest::collection::vec(some_record(), 1..40)) {
            let mut out = b"before".to_vec();
            batch(&mut out, &mut Vec::new(), records.iter(), false).unwrap();
            let batches = decode::batches(Bytes::from(out).slice(6..));
            prop_assert_eq!(batches.len(), 1);
            let mut read = Vec::new();
            batches[0].read_into(&mut read).unwrap();
            prop_assert_eq!(read.len(), records.len());
            for (offset, (read, record)) in read.into_iter().zip(&records).enumerate() {
                prop_assert_eq!(read.offset, offset as i64);
                prop_assert_eq!(&read.key, &record.key);
                prop_assert_eq!(&read.value, &record.value);
                prop_assert_eq!(read.timestamp, record.timestamp);
                let headers: Vec<_> = read.headers.iter().map(|(name, value)| (name, Bytes::copy_from_slice(value))).collect();
                prop_assert_eq!(&headers, &record.headers);
            }
        }

        #[test]
        fn a_numbers_length_is_known_before_it_is_written(number in any::<i64>()) {
            let mut out = Vec::new();
            put_varint(&mut out, number);
            prop_assert_eq!(out.len(), varint_bytes(number));
        }
    }
}
