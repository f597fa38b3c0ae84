//! Who asks, and under which ids: taken from a request's head, before anything else is done with it.
//!
//! Takes or makes `X-Request-Id` and continues `traceparent`. Behind the gateway it also takes the gateway's inner headers, which no client can
//! set there: the gateway drops theirs.

use std::future::{Ready, ready};
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::dev::Payload;
use actix_web::http::header::{HeaderMap, HeaderName};
use actix_web::{Error, FromRequest, HttpMessage, HttpRequest};
use uuid::Uuid;

use super::names;
use super::problem::Problem;
use crate::telemetry;
use crate::trace::TraceContext;

/// The inner header by which the gateway names the public prefix that a request came under.
pub const PREFIX_HEADER: &str = "x-shopd-prefix";
/// The inner header that names one request of a client over all the times that the gateway tries it: a UUIDv7.
pub const STAMP_HEADER: &str = "x-shopd-stamp";
/// The inner header that says how long the gateway waits for the answer of this try, in milliseconds.
pub const DEADLINE_HEADER: &str = "x-shopd-deadline-ms";
pub const REQUEST_ID_HEADER: &str = "x-request-id";

const REQUEST_ID_BYTES_MAX: usize = 128;
const PREFIX_BYTES_MAX: usize = 64;
const DEADLINE_MS_MAX: u64 = 3_600_000;

/// What is known of a request before its handler runs. An extractor; also among the request's extensions.
#[derive(Clone, Debug)]
pub struct RequestContext {
    /// The request's own position in its trace.
    pub trace: TraceContext,
    /// The span under which it lies, where the client named one.
    pub parent: Option<u64>,
    /// 1..=128 visible ASCII characters.
    pub request_id: Arc<str>,
    /// By [`STAMP_HEADER`].
    pub stamp: Option<Uuid>,
    /// When nobody waits for the answer's head any more, by [`DEADLINE_HEADER`].
    pub deadline: Option<Instant>,
    /// `/api/OrdersProxy`, standing for as many leading segments of our own path.
    public_prefix: Option<Arc<str>>,
}

impl RequestContext {
    /// `inner`: the port is behind the gateway, whose inner headers count; one that cannot be read is none.
    pub(super) fn of(headers: &HeaderMap, inner: bool) -> Self {
        let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        let only = |name: &HeaderName| {
            let mut values = headers.get_all(name);
            let value = values.next().filter(|_| inner)?;
            value.to_str().ok().filter(|_| values.next().is_none())
        };
        let taken = text(&names::REQUEST_ID).filter(|id| is_request_id(id)).map(Arc::from);
        // One that cannot be read, or two, are none, as the standard asks.
        let parent =
            text(&names::TRACEPARENT).filter(|_| headers.get_all(&names::TRACEPARENT).count() == 1).and_then(TraceContext::parse);
        Self {
            trace: parent.map_or_else(telemetry::new_trace, TraceContext::child),
            parent: parent.map(|parent| parent.span_bits()),
            request_id: taken.unwrap_or_else(made),
            stamp: only(&names::STAMP).and_then(stamp),
            deadline: only(&names::DEADLINE).and_then(milliseconds).map(|left| Instant::now() + left),
            public_prefix: text(&names::PREFIX).filter(|prefix| inner && is_prefix(prefix)).map(Arc::from),
        }
    }

    /// Of what was refused before it was a request.
    pub(super) fn unasked() -> Self {
        Self {
            trace: TraceContext::new_root().unsampled(),
            parent: None,
            request_id: made(),
            stamp: None,
            deadline: None,
            public_prefix: None,
        }
    }

    /// The path under which the client reaches our `own` path (`/api/Orders/1`) at the port it asked (`/api/OrdersProxy/1`).
    /// What follows the replaced segments, a query included, is kept as it is.
    pub fn public_path(&self, own: &str) -> String {
        let Some(prefix) = &self.public_prefix else { return own.to_owned() };
        let replaced = prefix.matches('/').count();
        let rest = own.match_indices(['/', '?']).nth(replaced).map_or("", |(at, _)| &own[at..]);
        format!("{prefix}{rest}")
    }
}

impl FromRequest for RequestContext {
    type Error = Error;
    type Future = Ready<Result<Self, Error>>;

    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        let context = req.extensions().get::<RequestContext>().cloned();
        ready(context.ok_or_else(|| Problem::internal("the request has no context: its layer is not installed").into()))
    }
}

/// A request id of our own.
fn made() -> Arc<str> {
    (&*Uuid::now_v7().hyphenated().encode_lower(&mut Uuid::encode_buffer())).into()
}

fn is_request_id(text: &str) -> bool {
    (1..=REQUEST_ID_BYTES_MAX).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}

/// An absolute path of plain segments; never `//host`, which a client would read as another server.
fn is_prefix(text: &str) -> bool {
    text.len() <= PREFIX_BYTES_MAX
        && text.strip_prefix('/').is_some_and(|rest| {
            rest.split('/').all(|s| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)))
        })
}

/// As the gateway spells it, and as an `Idempotency-Key` that it adds is spelled: lower case, with hyphens.
fn stamp(text: &str) -> Option<Uuid> {
    let stamp = Uuid::try_parse(text).ok().filter(|stamp| stamp.get_version_num() == 7)?;
    (*stamp.hyphenated().encode_lower(&mut Uuid::encode_buffer()) == *text).then_some(stamp)
}

fn milliseconds(text: &str) -> Option<Duration> {
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    let ms = text.parse().ok().filter(|ms| digits && (1..=DEADLINE_MS_MAX).contains(ms))?;
    Some(Duration::from_millis(ms))
}

#[cfg(test)]
mod tests {
    use actix_web::http::header::HeaderValue;

    use super::*;

    fn context(headers: &[(&'static str, &str)], inner: bool) -> RequestContext {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(HeaderName::from_static(name), HeaderValue::from_str(value).unwrap());
        }
        RequestContext::of(&map, inner)
    }

    #[test]
    fn a_usable_request_id_is_taken_and_any_other_replaced() {
        assert_eq!(&*context(&[(REQUEST_ID_HEADER, "abc-1")], true).request_id, "abc-1");
        for bad in ["", "a b", "\t", &"x".repeat(129)] {
            let made = context(&[(REQUEST_ID_HEADER, bad)], true).request_id;
            assert_eq!(Uuid::parse_str(&made).unwrap().get_version_num(), 7, "{bad:?}");
        }
    }

    #[test]
    fn a_trace_with_two_parents_is_begun_anew() {
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let mut map = HeaderMap::new();
        map.append(HeaderName::from_static("traceparent"), HeaderValue::from_static(parent));
        assert_eq!(RequestContext::of(&map, true).trace.trace_id(), parent[3..35]);
        map.append(HeaderName::from_static("traceparent"), HeaderValue::from_static(parent));
        assert_ne!(RequestContext::of(&map, true).trace.trace_id(), parent[3..35]);
    }

    #[test]
    fn the_public_prefix_stands_for_as_many_segments() {
        let proxied = context(&[(PREFIX_HEADER, "/api/OrdersProxy")], true);
        assert_eq!(proxied.public_path("/api/Orders/1?x=/a/b"), "/api/OrdersProxy/1?x=/a/b");
        assert_eq!(proxied.public_path("/api/Orders?cursor=a/b"), "/api/OrdersProxy?cursor=a/b");
        assert_eq!(proxied.public_path("/api/Orders"), "/api/OrdersProxy");
        assert_eq!(context(&[], true).public_path("/api/Orders"), "/api/Orders");
    }

    #[test]
    fn a_prefix_that_leads_elsewhere_or_comes_from_a_client_is_ignored() {
        for bad in ["//evil.example", "http://evil.example", "api", "/api/../x?y", "/", ""] {
            assert_eq!(context(&[(PREFIX_HEADER, bad)], true).public_path("/api/Orders"), "/api/Orders", "{bad}");
        }
        assert_eq!(context(&[(PREFIX_HEADER, "/api/OrdersProxy")], false).public_path("/api/Orders"), "/api/Orders");
    }

    #[test]
    fn a_stamp_is_a_uuid_of_version_7_as_the_gateway_spells_it() {
        let stamp = Uuid::now_v7();
        assert_eq!(context(&[(STAMP_HEADER, &stamp.to_string())], true).stamp, Some(stamp));
        assert_eq!(context(&[(STAMP_HEADER, &stamp.to_string())], false).stamp, None, "a client's");
        let (upper, simple) = (stamp.to_string().to_uppercase(), stamp.simple().to_string());
        for bad in ["", "x", &upper, &simple, &Uuid::new_v4().to_string(), &format!("{stamp} "), &Uuid::nil().to_string()] {
            assert_eq!(context(&[(STAMP_HEADER, bad)], true).stamp, None, "{bad:?}");
        }
    }

    #[test]
    fn a_deadline_is_a_whole_number_of_milliseconds_up_to_an_hour() {
        let left = |text: &str, inner| context(&[(DEADLINE_HEADER, text)], inner).deadline;
        for ms in [1u64, 10_000, 3_600_000] {
            let before = Instant::now();
            let deadline = left(&ms.to_string(), true).unwrap();
            assert!((before..=Instant::now()).contains(&(deadline - Duration::from_millis(ms))), "{ms}");
        }
        assert_eq!(left("1000", false), None, "a client's");
        for bad in ["", "0", "-1", "+1", "1.5", "3600001", "18446744073709551617", "soon", " 5 s"] {
            assert_eq!(left(bad, true), None, "{bad:?}");
        }
        assert_eq!(context(&[], true).deadline, None);
    }
}
