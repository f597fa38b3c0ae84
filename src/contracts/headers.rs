//! A record's headers, left where they lie: what a batch of records costs is mostly what is copied and allocated for each.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use bytes::Bytes;

/// Name and value of one of ours.
const HEADER_BYTES_USUAL: usize = 40;

/// A record's headers by name, in their order; of two equal names the last counts.
#[derive(Clone, Default)]
pub struct Headers {
    /// Holds all of them, and whatever else lies between them.
    bytes: Bytes,
    spans: Vec<Span>,
}

/// Where one header lies.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    name: (u32, u32),
    value: (u32, u32),
}

impl Span {
    /// `None` beyond 4 GiB, where no record reaches.
    pub fn of(name: Range<usize>, value: Range<usize>) -> Option<Self> {
        let narrow = |range: Range<usize>| Some((u32::try_from(range.start).ok()?, u32::try_from(range.end).ok()?));
        Some(Self { name: narrow(name)?, value: narrow(value)? })
    }
}

impl Headers {
    pub fn new() -> Self {
        Self::default()
    }

    /// Those that lie in `bytes` at `spans`; one that lies outside is empty.
    pub fn at(bytes: Bytes, spans: Vec<Span>) -> Self {
        Self { bytes, spans }
    }

    pub fn get(&self, name: &str) -> Option<&[u8]> {
        let span = self.spans.iter().rfind(|span| self.part(span.name) == name.as_bytes())?;
        Some(self.part(span.value))
    }

    /// Each of them, also those of one name. What is no UTF-8 in a name is replaced.
    pub fn iter(&self) -> impl Iterator<Item = (Cow<'_, str>, &[u8])> {
        self.parts().map(|(name, value)| (String::from_utf8_lossy(name), value))
    }

    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Bytes of the names and values.
    pub fn size(&self) -> usize {
        self.parts().map(|(name, value)| name.len() + value.len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// These, and `more` after them.
    pub fn with<'h>(&'h self, more: impl IntoIterator<Item = (&'h str, &'h [u8])>) -> Self {
        let mut gathered = Gathered::with_room(self.len());
        self.parts().for_each(|(name, value)| gathered.put(name, value));
        more.into_iter().for_each(|(name, value)| gathered.put(name.as_bytes(), value));
        gathered.done()
    }

    fn parts(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.spans.iter().map(|span| (self.part(span.name), self.part(span.value)))
    }

    fn part(&self, (start, end): (u32, u32)) -> &[u8] {
        self.bytes.get(start as usize..end as usize).unwrap_or_default()
    }
}

/// Headers that are copied into one piece.
struct Gathered {
    bytes: Vec<u8>,
    spans: Vec<Span>,
}

impl Gathered {
    /// With room for so many of ours.
    fn with_room(count: usize) -> Self {
        Self { bytes: Vec::with_capacity(count * HEADER_BYTES_USUAL), spans: Vec::with_capacity(count) }
    }

    fn put(&mut self, name: &[u8], value: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(name);
        let middle = self.bytes.len();
        self.bytes.extend_from_slice(value);
        self.spans.extend(Span::of(start..middle, middle..self.bytes.len()));
    }

    fn done(self) -> Headers {
        Headers { bytes: self.bytes.into(), spans: self.spans }
    }
}

impl<N: AsRef<str>, V: AsRef<[u8]>> FromIterator<(N, V)> for Headers {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(headers: I) -> Self {
        let headers = headers.into_iter();
        let mut gathered = Gathered::with_room(headers.size_hint().0);
        headers.for_each(|(name, value)| gathered.put(name.as_ref().as_bytes(), value.as_ref()));
        gathered.done()
    }
}

/// Whatever their order, and whatever an equal name hides.
impl PartialEq for Headers {
    fn eq(&self, other: &Self) -> bool {
        let by_name = |headers| Self::parts(headers).collect::<BTreeMap<_, _>>();
        by_name(self) == by_name(other)
    }
}

impl Eq for Headers {}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter().map(|(name, value)| (name, String::from_utf8_lossy(value)))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn some() -> impl Strategy<Value = Vec<(String, Vec<u8>)>> {
        proptest::collection::vec(("[ab]{0,2}", proptest::collection::vec(any::<u8>(), 0..4)), 0..9)
    }

    proptest! {
        #[test]
        fn they_are_read_as_a_map_to_which_they_are_added_in_their_order(some in some(), more in some()) {
            let headers: Headers = some.iter().map(|(name, value)| (name, value)).collect();
            let headers = headers.with(more.iter().map(|(name, value)| (name.as_str(), value.as_slice())));
            let all: Vec<_> = some.into_iter().chain(more).collect();
            let read: Vec<_> = headers.iter().map(|(name, value)| (name.into_owned(), value.to_vec())).collect();
            prop_assert_eq!(&read, &all);
            prop_assert_eq!(headers.len(), all.len());
            prop_assert_eq!(headers.size(), all.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>());
            let map: BTreeMap<String, Vec<u8>> = all.into_iter().collect();
            for name in ["", "a", "b", "aa", "ab", "ba", "bb", "c"] {
                prop_assert_eq!(headers.get(name), map.get(name).map(Vec::as_slice));
            }
            prop_assert_eq!(headers, map.into_iter().collect());
        }

        #[test]
        fn they_are_equal_when_their_maps_are(one in some(), other in some()) {
            let map = |some: &[(String, Vec<u8>)]| some.iter().cloned().collect::<BTreeMap<_, _>>();
            let equal = map(&one) == map(&other);
            prop_assert_eq!(one.into_iter().collect::<Headers>() == other.into_iter().collect(), equal);
        }
    }

    #[test]
    fn what_lies_outside_is_empty_and_what_is_no_text_is_replaced() {
        let spans = [Span::of(0..2, 2..9), Span::of(5..9, 8..9)].into_iter().flatten().collect();
        let headers = Headers::at(Bytes::from_static(b"\xffa1"), spans);
        let read: Vec<_> = headers.iter().map(|(name, value)| (name.into_owned(), value.to_vec())).collect();
        assert_eq!(read, [("\u{fffd}a".to_owned(), vec![]), (String::new(), vec![])]);
        assert_eq!((headers.get(""), headers.get("b")), (Some(b"".as_slice()), None));
    }
}
