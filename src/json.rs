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
        let raw: &RawValue = serde_json::from_slice(text).map_err(MembersError::Syntax)?;
        Self::of(raw)
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
        self.get(name).map(|raw| serde_json::from_str::<Text<'a>>(raw.get()).map(|t| t.0).map_err(|_| ()))
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

    #[test]
    fn names_match_whatever_their_case_and_the_last_counts() {
        let m = Members::parse(br#"{"UserId":"a","userid":"b\u0041","x":{"deep":[1]},"n":null,"amount":1.10}"#).unwrap();
        assert_eq!(m.string("userId").unwrap().unwrap(), "bA");
        assert_eq!(m.get("Amount").unwrap().get(), "1.10");
        assert!(m.get("n").is_none());
        assert!(m.get("missing").is_none());
        assert!(m.string("amount").unwrap().is_err());
    }

    #[test]
    fn what_is_no_object_says_so() {
        assert!(matches!(Members::parse(b"[1]"), Err(MembersError::NotAnObject)));
        assert!(matches!(Members::parse(b"{\"a\":"), Err(MembersError::Syntax(_))));
        assert!(matches!(Members::parse(b""), Err(MembersError::Syntax(_))));
        assert!(matches!(Members::parse(b"{} x"), Err(MembersError::Syntax(_))));
    }
}
