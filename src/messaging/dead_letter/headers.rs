//! A record's headers as `jsonb`, and back without a loss. Pure.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

use crate::contracts::Headers;

/// Stands before a name that Postgres cannot hold as text.
const ENCODED: &str = "base64:";

/// `{"name":"text"}`, and `{"name":{"base64":"..."}}` where the value is no text that Postgres can hold. Where a name comes more than once it is
/// `[["name","text"],...]`, all of them in their order.
pub fn to_json(headers: &Headers) -> Value {
    let pairs = || headers.iter().map(|(name, value)| (name_of(&name), bytes_json(value)));
    let by_name: Map<String, Value> = pairs().collect();
    if by_name.len() == headers.len() {
        return Value::Object(by_name);
    }
    pairs().map(|(name, value)| Value::from(vec![Value::from(name), value])).collect()
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
    let header = |name: &str, value: &Value| Some((name_from(name)?, value_from(value)?));
    match serde_json::from_str(json) {
        Ok(Value::Object(by_name)) => by_name.iter().filter_map(|(name, value)| header(name, value)).collect(),
        Ok(Value::Array(pairs)) => pairs.iter().filter_map(|pair| header(pair.get(0)?.as_str()?, pair.get(1)?)).collect(),
        _ => Headers::new(),
    }
}

fn name_of(name: &str) -> String {
    let plain = !name.contains('\0') && !name.starts_with(ENCODED);
    if plain { name.to_owned() } else { format!("{ENCODED}{}", STANDARD.encode(name)) }
}

fn name_from(name: &str) -> Option<String> {
    match name.strip_prefix(ENCODED) {
        None => Some(name.to_owned()),
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
            headers in proptest::collection::vec(("(base64:)?[\u{0}a-cé]{0,2}", proptest::collection::vec(any::<u8>(), 0..20)), 0..8),
        ) {
            let mut names: Vec<&str> = headers.iter().map(|(name, _)| name.as_str()).collect();
            names.sort_unstable();
            let is_by_name = names.windows(2).all(|two| two[0] != two[1]);
            let json = to_json(&headers.iter().map(|(name, value)| (name, value)).collect());
            prop_assert_eq!(json.is_object(), is_by_name);
            prop_assert!(!json.to_string().contains("\\u0000"), "Postgres refuses it: {json}");
            let back = from_json(&json.to_string());
            let mut back: Vec<(String, Vec<u8>)> = back.iter().map(|(name, value)| (name.into_owned(), value.to_vec())).collect();
            let mut headers = headers;
            if is_by_name {
                // Postgres keeps an object's names in an order of its own.
                back.sort();
                headers.sort();
            }
            prop_assert_eq!(back, headers);
        }

        #[test]
        fn no_text_makes_the_reader_panic(json in ".{0,60}") {
            from_json(&json);
        }
    }
}
