//! `Prefer: wait=N` (RFC 7240): how long a client would have us wait for what it asked.

use std::future::{Ready, ready};
use std::time::Duration;

use actix_web::dev::Payload;
use actix_web::http::header::HeaderMap;
use actix_web::{FromRequest, HttpRequest};

use super::names;
use super::openapi::{self, DataType, Documented, In, RawOperation};
use super::problem::Problem;

/// We wait no longer, whatever is asked.
const WAIT_MAX: Duration = Duration::from_secs(30);
const PREFER: &str = "Prefer";
/// The response header that says which preference counted.
pub const PREFERENCE_APPLIED: &str = "preference-applied";

/// An extractor, which refuses nothing: a preference that cannot be read is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PreferWait(pub Option<Duration>);

impl PreferWait {
    /// The one rule, also for the gateway, which has to wait as long as the service does.
    pub fn of(headers: &HeaderMap) -> Self {
        let values = headers.get_all(&names::PREFER).filter_map(|value| value.to_str().ok());
        let waits = values.flat_map(|value| outside_quotes(value, ',')).filter_map(|preference| {
            let (name, value) = outside_quotes(preference, ';').next()?.split_once('=')?;
            name.trim().eq_ignore_ascii_case("wait").then_some(value.trim())
        });
        // The first counts, also where it cannot be read.
        let seconds = waits.map(|value| value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value)).next();
        let plain = seconds.filter(|text| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()));
        let seconds = plain.map(|text| text.parse().unwrap_or(u64::MAX));
        Self(seconds.map(|seconds| Duration::from_secs(seconds).min(WAIT_MAX)))
    }
}

/// The parts of `text` between separators that stand in no quoted string.
fn outside_quotes(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let (mut quoted, mut escaped) = (false, false);
    text.split(move |c| {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            _ => return c == separator && !quoted,
        }
        false
    })
}

impl FromRequest for PreferWait {
    type Error = Problem;
    type Future = Ready<Result<Self, Problem>>;

    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(Ok(Self::of(req.headers())))
    }
}

impl openapi::Schema for PreferWait {}

impl Documented for PreferWait {
    fn update_parameter(op: &mut RawOperation) {
        let description = "`wait=N`: the answer comes once the outcome is known, after N seconds at most; 30 at most.";
        openapi::parameter(op, In::Header, PREFER, DataType::String, description);
    }
}

#[cfg(test)]
mod tests {
    use actix_web::http::header::{HeaderName, HeaderValue};

    use super::*;

    #[test]
    fn the_first_wait_among_the_preferences_counts_up_to_half_a_minute() {
        for (values, seconds) in [
            (&["wait=10"][..], Some(10)),
            (&["Wait = \"7\""], Some(7)),
            (&["respond-async, wait=5; x=\"a,b\", wait=9"], Some(5)),
            (&["handling=lenient", "wait=3"], Some(3)),
            (&["wait=0"], Some(0)),
            (&["wait=31"], Some(30)),
            (&["wait=99999999999999999999999"], Some(30)),
            (&["foo=\"x, wait=4\""], None),
            (&["foo; wait=4"], None),
            (&["wait"], None),
            (&["wait=-1"], None),
            (&["wait=1.5, wait=2"], None),
            (&["waiting=4"], None),
            (&[], None),
        ] {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(HeaderName::from_static("prefer"), HeaderValue::from_static(value));
            }
            assert_eq!(PreferWait::of(&headers).0.map(|wait| wait.as_secs()), seconds, "{values:?}");
        }
    }
}
