//! What crosses the broker: the events, by producer, and the envelope around them. Serde only; may import the values.

mod envelope;
mod headers;
mod payment_requested;
mod payment_status;

pub use envelope::Envelope;
pub use headers::{Headers, Span};
pub use payment_requested::PaymentRequested;
pub use payment_status::{Outcome, PaymentStatusUpdated};

/// Orders asks payments; keyed by user id.
pub const ORDER_PAYMENT_REQUESTS: &str = "order-payment-requests";
/// Payments answers orders; keyed by order id.
pub const PAYMENT_STATUS_UPDATES: &str = "payment-status-updates";
/// Every topic of ours, without prefix; each that is read has one for its dead letters.
pub const TOPICS: [&str; 4] =
    [ORDER_PAYMENT_REQUESTS, PAYMENT_STATUS_UPDATES, "order-payment-requests.dlq", "payment-status-updates.dlq"];

/// Why a record is none of ours: it cannot be decoded, or it breaks a rule of its payload.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub String);

impl Malformed {
    fn field(name: &str, what: impl std::fmt::Display) -> Self {
        Self(format!("{name}: {what}"))
    }
}

/// The original sometimes encoded a value twice: a JSON string whose text is the JSON. Returns the inner text then.
fn unwrap_twice_encoded(value: &[u8]) -> Result<std::borrow::Cow<'_, [u8]>, Malformed> {
    let first = value.iter().find(|b| !b.is_ascii_whitespace());
    if first != Some(&b'"') {
        return Ok(value.into());
    }
    let text: String = serde_json::from_slice(value).map_err(|error| Malformed(error.to_string()))?;
    Ok(text.into_bytes().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_topic_has_one_for_its_dead_letters() {
        for topic in [ORDER_PAYMENT_REQUESTS, PAYMENT_STATUS_UPDATES] {
            assert!(TOPICS.contains(&topic) && TOPICS.contains(&format!("{topic}.dlq").as_str()));
        }
    }
}
