//! How a record's headers lie in their column: name and value by turns, each after its length. Pure.

use std::ops::Range;

use bytes::{Buf, BufMut};

use crate::contracts::{Headers, Span};

/// The bytes of `headers`, in their order.
pub(super) fn encode<'h>(headers: impl IntoIterator<Item = (&'h str, &'h [u8])>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in headers {
        for part in [name.as_bytes(), value] {
            bytes.put_u32(part.len() as u32);
            bytes.put_slice(part);
        }
    }
    bytes
}

/// The headers in `bytes`. `None` where that is not what [`encode`] made.
pub(super) fn decode(bytes: Vec<u8>) -> Option<Headers> {
    let (mut rest, mut spans) = (bytes.as_slice(), Vec::new());
    while !rest.is_empty() {
        let (name, value) = (part(&bytes, &mut rest)?, part(&bytes, &mut rest)?);
        std::str::from_utf8(bytes.get(name.clone())?).ok()?;
        spans.push(Span::of(name, value)?);
    }
    Some(Headers::at(bytes.into(), spans))
}

/// Where the next one lies in `bytes`, of which `rest` is left.
fn part(bytes: &[u8], rest: &mut &[u8]) -> Option<Range<usize>> {
    let length = rest.try_get_u32().ok()? as usize;
    let start = bytes.len() - rest.len();
    *rest = rest.get(length..)?;
    Some(start..start + length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_come_back_as_they_were(headers in proptest::collection::btree_map(".{0,20}", proptest::collection::vec(any::<u8>(), 0..50), 0..8)) {
            let bytes = encode(headers.iter().map(|(name, value)| (name.as_str(), value.as_slice())));
            prop_assert_eq!(decode(bytes), Some(headers.into_iter().collect()));
        }

        #[test]
        fn other_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            decode(bytes);
        }
    }

    #[test]
    fn a_cut_column_is_no_headers() {
        let bytes = encode([("ce_id", b"1".as_slice())]);
        for length in 1..bytes.len() {
            assert_eq!(decode(bytes[..length].to_vec()), None, "{length}");
        }
    }
}
