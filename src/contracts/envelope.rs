//! The envelope: CloudEvents 1.0 attributes in the Kafka protocol binding's binary mode (`ce_` headers), W3C trace context,
//! and the `X-Request-Id` of the request that began it.

use bytes::Bytes;
use chrono::{DateTime, SecondsFormat, Utc};
use uuid::Uuid;

use crate::trace::TraceContext;

use super::Headers;

/// What another producer's record may leave out is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Envelope {
    /// `ce_id`: the event id, by which a repeat of this event is known.
    pub event_id: Option<String>,
    /// `ce_source`: who wrote it.
    pub source: Option<String>,
    /// `ce_time`.
    pub time: Option<DateTime<Utc>>,
    pub trace: Option<TraceContext>,
    pub request_id: Option<String>,
}

/// Header texts that are kept at most; a longer one is another producer's mistake and not worth a row's size.
const TEXT_CHARS_MAX: usize = 255;

impl Envelope {
    /// The names of a record's headers, in the order of [`Envelope::headers`].
    pub const NAMES: [&'static str; 8] =
        ["ce_specversion", "ce_id", "ce_type", "ce_source", "ce_time", "content-type", "traceparent", "x-request-id"];
    pub const SPECVERSION: &'static [u8] = b"1.0";
    pub const CONTENT_TYPE: &'static [u8] = b"application/json";

    /// The headers of a record of ours.
    pub fn headers(
        event_id: Uuid,
        kind: &str,
        source: &str,
        time: DateTime<Utc>,
        traceparent: &str,
        request_id: &str,
    ) -> Vec<(&'static str, Bytes)> {
        let text = |text: &str| Bytes::copy_from_slice(text.as_bytes());
        let values = [
            Bytes::from_static(Self::SPECVERSION),
            text(event_id.hyphenated().encode_lower(&mut Uuid::encode_buffer())),
            text(kind),
            text(source),
            Bytes::from(time.to_rfc3339_opts(SecondsFormat::Micros, true)),
            Bytes::from_static(Self::CONTENT_TYPE),
            text(traceparent),
            text(request_id),
        ];
        Self::NAMES.into_iter().zip(values).collect()
    }

    /// Reads what is there; nothing in a header makes a record unreadable.
    pub fn read(headers: &Headers) -> Self {
        let text = |name: &str| {
            let value = std::str::from_utf8(headers.get(name)?).ok()?;
            let fit = !value.is_empty() && short(value) && !value.contains('\0');
            fit.then_some(value)
        };
        Self {
            event_id: text("ce_id").map(str::to_owned),
            source: text("ce_source").map(str::to_owned),
            time: text("ce_time").and_then(|t| DateTime::parse_from_rfc3339(t).ok()).map(|t| t.with_timezone(&Utc)),
            trace: text("traceparent").and_then(TraceContext::parse),
            request_id: text("x-request-id").map(str::to_owned),
        }
    }
}

/// No text has more characters than bytes, so most need not be counted.
fn short(text: &str) -> bool {
    text.len() <= TEXT_CHARS_MAX || text.chars().nth(TEXT_CHARS_MAX).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_envelope_survives_the_broker() {
        let (id, trace) = (Uuid::now_v7(), TraceContext::new_root());
        let time = DateTime::from_timestamp_micros(1_749_723_072_123_456).unwrap();
        let headers = Envelope::headers(id, "shopd.thing.v1", "/shopd/orders", time, &trace.traceparent(), "r-1");
        let headers: Headers = headers.into_iter().collect();
        let read = Envelope::read(&headers);
        assert_eq!(read.event_id, Some(id.to_string()));
        assert_eq!(read.source.as_deref(), Some("/shopd/orders"));
        assert_eq!(read.time, Some(time));
        assert_eq!(read.trace, Some(trace));
        assert_eq!(read.request_id.as_deref(), Some("r-1"));
        assert_eq!(headers.get("ce_specversion"), Some(b"1.0".as_slice()));
    }

    #[test]
    fn headers_of_another_producer_are_absent_not_fatal() {
        assert_eq!(Envelope::read(&Headers::new()), Envelope::default());
        let long = [b'x'; 5000];
        let values: [&[u8]; 4] = [b"\xff\xfe", b"yesterday", &long, b"00-zz"];
        let headers = ["ce_id", "ce_time", "ce_source", "traceparent"].into_iter().zip(values).collect();
        assert_eq!(Envelope::read(&headers), Envelope::default());
    }
}
