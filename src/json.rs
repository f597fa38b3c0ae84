//! JSON objects as the original system's services read them: member names match whatever their case, unknown members are
//! ignored, the last of two equal names counts, and every value keeps its text so that money never passes through a float.
//!
//! May import nothing of ours.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// The members of one JSON object, values unread.
#[derive(Debug)]
pub struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

/// Why a text is no JSON object.
#[derive(Debug, thiserror::Error)]
pub enum MembersError {
    /// Not JSON at all; the message says where.
    #[error("{0}")]
    Syntax(serde_json::Error),
    /// JSON, but no object.
    #[error("a JSON object was expected")]
    NotAnObject,
}

impl<'a> Members<'a> {
    pub fn parse(text: &'a [u8]) -> Result<Self, MembersError> {
        if text.trim_ascii_start().first() == Some(&b'{') {
            // As text each value's own need not be looked at again; what is no text is told by the reader of bytes.
            let members = std::str::from_utf8(text).map_or_else(|_| serde_json::from_slice(text), serde_json::from_str);
            return members.map_err(MembersError::Syntax);
        }
        serde_json::from_slice::<&RawValue>(text).map_err(MembersError::Syntax).and(Err(MembersError::NotAnObject))
    }

    pub fn of(raw: &'a RawValue) -> Result<Self, MembersError> {
        if !raw.get().starts_with('{') {
            return Err(MembersError::NotAnObject);
        }
        serde_json::from_str(raw.get()).map_err(MembersError::Syntax)
    }

    /// The member's value; `None` when it is absent or `null`.
    pub fn get(&self, name: &str) -> Option<&'a RawValue> {
        let found = self.0.iter().rev().find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, raw)| *raw).filter(|raw| raw.get() != "null")
    }

    /// The member as a string; `Some(Err(()))` when it is something else.
    pub fn string(&self, name: &str) -> Option<Result<Cow<'a, str>, ()>> {
        #[derive(serde::Deserialize)]
        struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
        let raw = self.get(name)?.get();
        // It has been read as JSON: what is quoted is a string, and without an escape its text stands there.
        let quoted = raw.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
        if let Some(text) = quoted.filter(|text| !text.contains('\\')) {
            return Some(Ok(text.into()));
        }
        Some(serde_json::from_str::<Text<'a>>(raw).map(|t| t.0).map_err(|_| ()))
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                #[derive(serde::Deserialize)]
                struct Name<'a>(#[serde(borrow)] Cow<'a, str>);
                let mut members = Vec::with_capacity(8);
                while let Some((Name(name), value)) = map.next_entry::<Name<'de>, &'de RawValue>()? {
                    members.push((name, value));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_match_whatever_their_case_and_the_last_counts() {
        let m = Members::parse(br#"{"UserId":"a","userid":"b\u0041","x":{"deep":[1]},"n":null,"amount":1.10}"#).unwrap();
        assert_eq!(m.string("userId").unwrap().unwrap(), "bA");
        assert_eq!(m.get("Amount").unwrap().get(), "1.10");
        assert!(m.get("n").is_none());
        assert!(m.get("missing").is_none());
        assert!(m.string("amount").unwrap().is_err());
    }

    /// As it was before anything was made fast: the whole as JSON, then its members, each read as JSON again.
    fn slowly(text: &[u8], name: &str) -> Option<Option<Result<String, ()>>> {
        let raw: &RawValue = serde_json::from_slice(text).ok()?;
        let members = Members::of(raw).ok()?;
        let value = members.get(name).map(|raw| serde_json::from_str::<String>(raw.get()).map_err(|_| ()));
        Some(value)
    }

    fn fast(text: &[u8], name: &str) -> Option<Option<Result<String, ()>>> {
        let members = Members::parse(text).ok()?;
        Some(members.string(name).map(|value| value.map(Cow::into_owned)))
    }

    proptest! {
        #[test]
        fn a_member_reads_the_same_at_first_sight_and_by_the_long_way(
            head in "[ \\t\\n\\r\\x0b\\x0c]{0,2}",
            value in "\"([a-zé\"{}]|\\\\[nu\"\\\\]|\\\\u00[04]1|\\\\ud83d|\\x01){0,6}\"?|[0-9.e]{1,3}|null|true|\\[\\]|\\{\"b\":1\\}",
            tail in "\\}| \\} |,\"A\":\"z\"\\}|,\\}|",
        ) {
            let text = format!("{head}{{\"a\":{value}{tail}");
            prop_assert_eq!(fast(text.as_bytes(), "a"), slowly(text.as_bytes(), "a"), "{}", text);
        }

        #[test]
        fn bytes_read_the_same_at_first_sight_and_by_the_long_way(bytes in proptest::collection::vec(any::<u8>(), 0..12)) {
            let text = [b"{\"a\":\"", &bytes[..], b"\"}"].concat();
            prop_assert_eq!(fast(&text, "a"), slowly(&text, "a"));
            prop_assert_eq!(fast(&bytes, "a"), slowly(&bytes, "a"));
        }
    }

    #[test]
    fn what_is_no_object_says_so() {
        assert!(matches!(Members::parse(b"[1]"), Err(MembersError::NotAnObject)));
        assert!(matches!(Members::parse(b"{\"a\":"), Err(MembersError::Syntax(_))));
        assert!(matches!(Members::parse(b""), Err(MembersError::Syntax(_))));
        assert!(matches!(Members::parse(b"{} x"), Err(MembersError::Syntax(_))));
    }
}
