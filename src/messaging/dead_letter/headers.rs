//! A record's headers as `jsonb`, and back without a loss. Pure.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::contracts::Headers;

/// Stands before a name that Postgres cannot hold as text.
const ENCODED: &str = "base64:";

/// `{"name":"text"}`, and `{"name":{"base64":"..."}}` where the value is no text that Postgres can hold.
pub fn to_json(headers: &Headers) -> Value {
    Value::Object(headers.iter().map(|(name, value)| (name_of(&name), bytes_json(value))).collect())
}

/// The text, or `{"base64":"..."}`.
pub fn bytes_json(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Value::from(text),
        _ => serde_json::json!({ "base64": STANDARD.encode(bytes) }),
    }
}

/// What [`to_json`] made; anything else is left out.
pub fn from_json(json: &str) -> Headers {
    let Ok(Value::Object(entries)) = serde_json::from_str(json) else { return Headers::new() };
    entries.into_iter().filter_map(|(name, value)| Some((name_from(name)?, value_from(&value)?))).collect()
}

fn name_of(name: &str) -> String {
    let plain = !name.contains('\0') && !name.starts_with(ENCODED);
    if plain { name.to_owned() } else { format!("{ENCODED}{}", STANDARD.encode(name)) }
}

fn name_from(name: String) -> Option<String> {
    match name.strip_prefix(ENCODED) {
        None => Some(name),
        Some(encoded) => String::from_utf8(STANDARD.decode(encoded).ok()?).ok(),
    }
}

fn value_from(value: &Value) -> Option<Vec<u8>> {
    match value {
        Value::String(text) => Some(text.as_bytes().to_vec()),
        Value::Object(object) => STANDARD.decode(object.get("base64")?.as_str()?).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_come_back_as_they_were(
            headers in proptest::collection::btree_map("(base64:)?[\u{0}a-zé]{0,8}", proptest::collection::vec(any::<u8>(), 0..20), 0..8),
        ) {
            let headers = headers.into_iter().collect();
            let json = to_json(&headers).to_string();
            prop_assert!(!json.contains("\\u0000"), "Postgres refuses it: {json}");
            prop_assert_eq!(from_json(&json), headers);
        }

        #[test]
        fn no_text_makes_the_reader_panic(json in ".{0,60}") {
            from_json(&json);
        }
    }
}
