//! `payment-status-updates`: payments has decided on an order.

use uuid::Uuid;

use crate::json::Members;

use super::{Malformed, unwrap_twice_encoded};

/// What a result says of its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// `New` or `Processing`: not final, changes nothing.
    Pending,
    Finished,
    Cancelled,
}

/// The payload; field names as the original wrote them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PaymentStatusUpdated {
    pub order_id: Uuid,
    pub outcome: Outcome,
    /// Of a cancelled order: why; texts that we do not know are read as they are.
    pub failure_reason: Option<String>,
}

impl PaymentStatusUpdated {
    pub const TYPE: &'static str = "shopd.payment.status_updated.v1";

    /// Reads a record's value, ours or the original's (whose status may be the enum's number).
    pub fn decode(value: &[u8]) -> Result<Self, Malformed> {
        let value = unwrap_twice_encoded(value)?;
        let members = Members::parse(&value).map_err(|error| Malformed(error.to_string()))?;
        let order_id = match members.string("OrderId") {
            Some(Ok(text)) => Uuid::parse_str(&text).map_err(|error| Malformed::field("OrderId", error))?,
            _ => return Err(Malformed::field("OrderId", "a string was expected")),
        };
        let status = members.get("Status").ok_or_else(|| Malformed::field("Status", "missing"))?;
        // Its letters may be escaped.
        let escaped = || members.string("Status")?.ok().and_then(|text| outcome(&format!("\"{text}\"")));
        let unknown = || Malformed::field("Status", "none of New, Processing, Finished, Cancelled");
        let outcome = outcome(status.get()).or_else(escaped).ok_or_else(unknown)?;
        let failure_reason = match members.string("FailureReason") {
            Some(Ok(text)) => Some(text.into_owned()),
            Some(Err(())) => return Err(Malformed::field("FailureReason", "a string was expected")),
            None => None,
        };
        Ok(Self { order_id, outcome, failure_reason })
    }

    /// By hand: only the reason can hold what must be escaped.
    pub fn encode(&self) -> Vec<u8> {
        let status = match self.outcome {
            Outcome::Pending => "Processing",
            Outcome::Finished => "Finished",
            Outcome::Cancelled => "Cancelled",
        };
        let mut json = Vec::with_capacity(128);
        json.extend_from_slice(b"{\"OrderId\":\"");
        json.extend_from_slice(self.order_id.hyphenated().encode_lower(&mut Uuid::encode_buffer()).as_bytes());
        json.extend_from_slice(b"\",\"Status\":\"");
        json.extend_from_slice(status.as_bytes());
        json.extend_from_slice(b"\",\"FailureReason\":");
        // Cannot fail: a string, into memory.
        serde_json::to_writer(&mut json, &self.failure_reason).expect("a string");
        json.push(b'}');
        json
    }
}

/// By the name, in its quotes, or the number of the original's enum.
fn outcome(json: &str) -> Option<Outcome> {
    match json {
        "\"New\"" | "\"Processing\"" | "0" | "1" => Some(Outcome::Pending),
        "\"Finished\"" | "2" => Some(Outcome::Finished),
        "\"Cancelled\"" | "3" => Some(Outcome::Cancelled),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_originals_results_are_read() {
        for (value, outcome) in [
            (r#"{"OrderId":"3f2504e0-4f89-11d3-9a0c-0305e82c3301","Status":2}"#, Outcome::Finished),
            (r#""{\"OrderId\":\"3f2504e0-4f89-11d3-9a0c-0305e82c3301\",\"Status\":2}""#, Outcome::Finished),
            (r#"{"OrderId":"3f2504e0-4f89-11d3-9a0c-0305e82c3301","Status":3}"#, Outcome::Cancelled),
            (r#"{"OrderId":"3f2504e0-4f89-11d3-9a0c-0305e82c3301","Status":"Processing"}"#, Outcome::Pending),
            (r#"{"OrderId":"3f2504e0-4f89-11d3-9a0c-0305e82c3301","Status":"\u0046in\u0069shed"}"#, Outcome::Finished),
            (r#"{"OrderId":"3f2504e0-4f89-11d3-9a0c-0305e82c3301","Status":"Cancelled","FailureReason":"x"}"#, Outcome::Cancelled),
        ] {
            assert_eq!(PaymentStatusUpdated::decode(value.as_bytes()).unwrap().outcome, outcome, "{value}");
        }
    }

    #[test]
    fn an_unknown_status_is_malformed() {
        for status in ["4", "\"2\"", "\"Paid\"", "null", "-1", "{}"] {
            let value = format!(r#"{{"OrderId":"3f2504e0-4f89-11d3-9a0c-0305e82c3301","Status":{status}}}"#);
            assert!(PaymentStatusUpdated::decode(value.as_bytes()).is_err(), "{status}");
        }
    }

    #[derive(serde::Serialize)]
    #[serde(rename_all = "PascalCase")]
    struct Wire<'a> {
        order_id: Uuid,
        status: &'static str,
        failure_reason: Option<&'a str>,
    }

    proptest! {
        #[test]
        fn what_is_written_is_what_serde_writes_and_is_read_back(
            id in any::<u128>(), outcome in 0usize..3, reason in proptest::option::of("\\PC{0,9}[\"\\\\\n]?"),
        ) {
            let (outcome, status) =
                [(Outcome::Pending, "Processing"), (Outcome::Finished, "Finished"), (Outcome::Cancelled, "Cancelled")][outcome];
            let event = PaymentStatusUpdated { order_id: Uuid::from_u128(id), outcome, failure_reason: reason };
            let wire = Wire { order_id: event.order_id, status, failure_reason: event.failure_reason.as_deref() };
            prop_assert_eq!(event.encode(), serde_json::to_vec(&wire).unwrap());
            prop_assert_eq!(PaymentStatusUpdated::decode(&event.encode()), Ok(event));
        }
    }
}
