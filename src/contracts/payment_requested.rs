//! `order-payment-requests`: an order was accepted and wants its payment.

use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;
use uuid::Uuid;

use crate::json::Members;
use crate::money::Amount;
use crate::user_id::UserId;

use super::{Malformed, unwrap_twice_encoded};

/// The payload; field names as the original wrote them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PaymentRequested {
    pub order_id: Uuid,
    pub user_id: UserId,
    pub amount: Amount,
    pub description: Option<String>,
    pub timestamp: DateTime<Utc>,
}

impl PaymentRequested {
    pub const TYPE: &'static str = "shopd.order.payment_requested.v1";

    /// Reads a record's value, ours or the original's. The timestamp decides nothing and may be missing or odd.
    pub fn decode(value: &[u8]) -> Result<Self, Malformed> {
        let value = unwrap_twice_encoded(value)?;
        let members = Members::parse(&value).map_err(|error| Malformed(error.to_string()))?;
        let text = |name: &str| match members.string(name) {
            Some(Ok(text)) => Ok(Some(text)),
            Some(Err(())) => Err(Malformed::field(name, "a string was expected")),
            None => Ok(None),
        };
        let order_id = text("OrderId")?.ok_or_else(|| Malformed::field("OrderId", "missing"))?;
        let order_id = Uuid::parse_str(&order_id).map_err(|error| Malformed::field("OrderId", error))?;
        if order_id.is_nil() {
            return Err(Malformed::field("OrderId", "all zeros"));
        }
        let user_id = text("UserId")?.ok_or_else(|| Malformed::field("UserId", "missing"))?;
        let user_id = UserId::new(user_id).map_err(|error| Malformed::field("UserId", error))?;
        let amount = members.get("Amount").ok_or_else(|| Malformed::field("Amount", "missing"))?;
        let amount = Amount::from_json(amount.get()).map_err(|error| Malformed::field("Amount", error))?;
        let description = text("Description")?.map(String::from);
        let timestamp = text("Timestamp").ok().flatten().and_then(|t| DateTime::parse_from_rfc3339(&t).ok());
        let timestamp = timestamp.map_or(DateTime::UNIX_EPOCH, |t| t.with_timezone(&Utc));
        Ok(Self { order_id, user_id, amount, description, timestamp })
    }

    /// By hand: only the user and the description can hold what must be escaped.
    pub fn encode(&self) -> Vec<u8> {
        fn put(json: &mut Vec<u8>, name: &str, value: &impl Serialize) {
            json.extend_from_slice(name.as_bytes());
            // Cannot fail: strings and a number, into memory.
            serde_json::to_writer(json, value).expect("strings and a number");
        }
        let mut json = Vec::with_capacity(192 + self.description.as_ref().map_or(0, String::len));
        json.extend_from_slice(b"{\"OrderId\":\"");
        json.extend_from_slice(self.order_id.hyphenated().encode_lower(&mut Uuid::encode_buffer()).as_bytes());
        put(&mut json, "\",\"UserId\":", &self.user_id);
        put(&mut json, ",\"Amount\":", &self.amount);
        put(&mut json, ",\"Description\":", &self.description);
        json.extend_from_slice(b",\"Timestamp\":\"");
        json.extend_from_slice(self.timestamp.to_rfc3339_opts(SecondsFormat::Micros, true).as_bytes());
        json.extend_from_slice(b"\"}");
        json
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_originals_records_are_read() {
        let text = r#"{"OrderId":"3f2504e0-4f89-11d3-9a0c-0305e82c3301","UserId":"u1","Amount":100.50,"Description":"\u043A\u043D\u0438\u0433\u0430","Timestamp":"2025-06-12T10:11:12.1234567Z"}"#;
        let twice = serde_json::to_string(text).unwrap();
        for value in [text, &twice] {
            let event = PaymentRequested::decode(value.as_bytes()).unwrap();
            assert_eq!(event.order_id.to_string(), "3f2504e0-4f89-11d3-9a0c-0305e82c3301");
            assert_eq!(event.amount.minor(), 10_050);
            assert_eq!(event.description.as_deref(), Some("книга"));
            assert_eq!(event.user_id.as_str(), "u1");
        }
    }

    #[test]
    fn what_breaks_a_rule_is_malformed_and_says_why() {
        for (value, why) in [
            ("", "EOF"),
            ("[]", "object"),
            ("{}", "OrderId"),
            (r#"{"OrderId":"x","UserId":"u","Amount":1}"#, "OrderId"),
            (r#"{"OrderId":"00000000-0000-0000-0000-000000000000","UserId":"u","Amount":1}"#, "OrderId"),
            (r#"{"OrderId":"3f2504e0-4f89-11d3-9a0c-0305e82c3301","Amount":1}"#, "UserId"),
            (r#"{"OrderId":"3f2504e0-4f89-11d3-9a0c-0305e82c3301","UserId":"a\u0000b","Amount":1}"#, "UserId"),
            (r#"{"OrderId":"3f2504e0-4f89-11d3-9a0c-0305e82c3301","UserId":"u","Amount":-1}"#, "Amount"),
            (r#"{"OrderId":"3f2504e0-4f89-11d3-9a0c-0305e82c3301","UserId":"u","Amount":0.001}"#, "Amount"),
            (r#"{"OrderId":"3f2504e0-4f89-11d3-9a0c-0305e82c3301","UserId":"u"}"#, "Amount"),
            (r#"{"OrderId":7,"UserId":"u","Amount":1}"#, "OrderId"),
        ] {
            let error = PaymentRequested::decode(value.as_bytes()).unwrap_err();
            assert!(error.0.contains(why), "{value}: {error}");
        }
    }

    #[derive(Serialize)]
    #[serde(rename_all = "PascalCase")]
    struct Wire<'a> {
        order_id: Uuid,
        user_id: &'a str,
        amount: Amount,
        description: Option<&'a str>,
        timestamp: String,
    }

    proptest! {
        #[test]
        fn what_is_written_is_what_serde_writes_and_is_read_back(minor in 1..=crate::money::AMOUNT_MAX_MINOR, user in "[^\\p{C}]{1,20}", description in proptest::option::of("[^\0]{0,40}")) {
            let event = PaymentRequested {
                order_id: Uuid::now_v7(),
                user_id: UserId::new(user).unwrap(),
                amount: Amount::from_minor(minor).unwrap(),
                description,
                timestamp: DateTime::from_timestamp_micros(1_749_723_072_123_456).unwrap(),
            };
            let wire = Wire {
                order_id: event.order_id,
                user_id: event.user_id.as_str(),
                amount: event.amount,
                description: event.description.as_deref(),
                timestamp: event.timestamp.to_rfc3339_opts(SecondsFormat::Micros, true),
            };
            prop_assert_eq!(event.encode(), serde_json::to_vec(&wire).unwrap());
            prop_assert_eq!(PaymentRequested::decode(&event.encode()), Ok(event));
        }

        #[test]
        fn no_bytes_make_the_reader_panic(value in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = PaymentRequested::decode(&value);
        }
    }
}
