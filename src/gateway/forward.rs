//! Which headers cross the gateway, in either direction (RFC 9110 7.6, RFC 7239): pure.
//!
//! May import the values of http.

use std::net::IpAddr;
use std::time::Duration;

use actix_web::http::header::{self, HeaderMap, HeaderName, HeaderValue};

use crate::http::{PREFIX_HEADER, REQUEST_ID_HEADER};

/// Every header that only the gateway may set begins so; those of clients are dropped, those of services stay inside.
const INNER: &str = "x-shopd-";
const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";
/// The services wait no longer, whatever is asked.
const WAIT_MAX: Duration = Duration::from_secs(30);
const VIA: &str = "1.1 shopd";

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// What is about one connection and never passes, beside what `Connection` names.
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// What the gateway itself says about a request.
pub struct Hop<'a> {
    pub peer: Option<IpAddr>,
    /// As the client gave it.
    pub host: &'a str,
    pub scheme: &'a str,
    pub prefix: &'a str,
    pub request_id: &'a str,
    pub traceparent: &'a str,
}

/// The headers under which a request goes on. The body's framing and `Host` are the client library's to write; `Expect` was met
/// by the server already.
pub fn request(incoming: &HeaderMap, hop: &Hop<'_>) -> HeaderMap {
    let dropped = named_by_connection(incoming);
    let mut headers = HeaderMap::with_capacity(incoming.len() + 8);
    for (name, value) in incoming {
        let text = name.as_str();
        let own = [header::HOST, header::CONTENT_LENGTH, header::EXPECT].contains(name)
            || text == REQUEST_ID_HEADER
            || text == TRACEPARENT
            || text.starts_with(INNER);
        if !own && !is_hop_by_hop(text, &dropped) {
            headers.append(name.clone(), value.clone());
        }
    }
    // A state belongs to the trace it came with: without a parent of that trace it means nothing.
    if !incoming.contains_key(TRACEPARENT) {
        headers.remove(TRACESTATE);
    }
    set(&mut headers, HeaderName::from_static(PREFIX_HEADER), hop.prefix);
    set(&mut headers, HeaderName::from_static(REQUEST_ID_HEADER), hop.request_id);
    set(&mut headers, HeaderName::from_static(TRACEPARENT), hop.traceparent);
    join(&mut headers, header::VIA, VIA);
    join(&mut headers, header::FORWARDED, &forwarded(hop));
    if let Some(peer) = hop.peer {
        join(&mut headers, FORWARDED_FOR, &peer.to_string());
    }
    // A proxy in front of us saw the client; what it says is kept.
    for (name, value) in [(FORWARDED_HOST, hop.host), (FORWARDED_PROTO, hop.scheme)] {
        if !headers.contains_key(&name) {
            set(&mut headers, name, value);
        }
    }
    headers
}

/// The headers under which an answer goes back. The ids are the gateway's own layer's to write, the framing the server's.
pub fn answer(given: &HeaderMap) -> HeaderMap {
    let dropped = named_by_connection(given);
    let mut headers = HeaderMap::with_capacity(given.len() + 1);
    for (name, value) in given {
        let text = name.as_str();
        let own = name == header::CONTENT_LENGTH || text == REQUEST_ID_HEADER || text.starts_with(INNER);
        if !own && !is_hop_by_hop(text, &dropped) {
            headers.append(name.clone(), value.clone());
        }
    }
    join(&mut headers, header::VIA, VIA);
    headers
}

/// How long the client would have the service wait on purpose (`Prefer: wait=N`, RFC 7240), as far as the services do.
pub fn wait(headers: &HeaderMap) -> Option<Duration> {
    let values = headers.get_all("prefer").filter_map(|value| value.to_str().ok());
    let mut preferences = values.flat_map(|value| value.split([',', ';'])).filter_map(|preference| preference.split_once('='));
    let (_, seconds) = preferences.find(|(name, _)| name.trim().eq_ignore_ascii_case("wait"))?;
    seconds.trim().trim_matches('"').parse().ok().map(Duration::from_secs).map(|wait| wait.min(WAIT_MAX))
}

fn is_hop_by_hop(name: &str, named: &[String]) -> bool {
    HOP_BY_HOP.contains(&name) || named.iter().any(|other| other == name)
}

fn named_by_connection(headers: &HeaderMap) -> Vec<String> {
    let values = headers.get_all(header::CONNECTION).filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(|name| name.trim().to_ascii_lowercase()).collect()
}

fn forwarded(hop: &Hop<'_>) -> String {
    let node = match hop.peer {
        Some(IpAddr::V4(peer)) => peer.to_string(),
        Some(IpAddr::V6(peer)) => format!("\"[{peer}]\""),
        None => "unknown".to_owned(),
    };
    let host = hop.host.replace('\\', "\\\\").replace('"', "\\\"");
    format!("for={node};host=\"{host}\";proto={}", hop.scheme)
}

/// Sets a header; text that no header can hold is left out.
fn set(headers: &mut HeaderMap, name: HeaderName, text: &str) {
    match HeaderValue::from_str(text) {
        Ok(value) => drop(headers.insert(name, value)),
        Err(_) => drop(headers.remove(name)),
    }
}

/// Appends to a header that is a list, as one line.
fn join(headers: &mut HeaderMap, name: HeaderName, text: &str) {
    let before: Vec<&str> = headers.get_all(&name).filter_map(|value| value.to_str().ok()).collect();
    let all = before.into_iter().chain([text]).collect::<Vec<_>>().join(", ");
    set(headers, name, &all);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(headers: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        map
    }

    fn hop() -> Hop<'static> {
        Hop {
            peer: Some(IpAddr::from([10, 0, 0, 7])),
            host: "shop.example:8000",
            scheme: "http",
            prefix: "/api/OrdersProxy",
            request_id: "r-1",
            traceparent: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        }
    }

    fn text<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a str> {
        headers.get_all(name).map(|value| value.to_str().unwrap()).collect()
    }

    #[test]
    fn hop_by_hop_headers_stay_on_their_hop() {
        let incoming = map(&[
            ("connection", "close, X-Private"),
            ("connection", "x-other"),
            ("x-private", "1"),
            ("x-other", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("expect", "100-continue"),
            ("content-length", "5"),
            ("host", "shop.example:8000"),
            ("accept", "application/json"),
            ("accept", "text/plain"),
            ("idempotency-key", "k"),
        ]);
        let sent = request(&incoming, &hop());
        for gone in ["connection", "x-private", "x-other", "keep-alive", "te", "transfer-encoding", "upgrade", "expect", "host"] {
            assert!(!sent.contains_key(gone), "{gone}");
        }
        assert!(!sent.contains_key("content-length"));
        assert_eq!(text(&sent, "accept"), ["application/json", "text/plain"]);
        assert_eq!(text(&sent, "idempotency-key"), ["k"]);
        let back = answer(&map(&[("connection", "x-private"), ("x-private", "1"), ("etag", "\"1\""), ("trailer", "x")]));
        assert!(["connection", "x-private", "trailer"].iter().all(|gone| !back.contains_key(*gone)));
        assert_eq!(text(&back, "etag"), ["\"1\""]);
        assert_eq!(text(&back, "via"), ["1.1 shopd"]);
    }

    #[test]
    fn a_wait_that_is_preferred_is_bounded() {
        assert_eq!(wait(&map(&[("prefer", "respond-async, wait=5")])), Some(Duration::from_secs(5)));
        assert_eq!(wait(&map(&[("prefer", "return=minimal"), ("prefer", "Wait = 99")])), Some(WAIT_MAX));
        assert_eq!(wait(&map(&[("prefer", "wait=soon")])), None);
        assert_eq!(wait(&HeaderMap::new()), None);
    }

    #[test]
    fn inner_headers_are_the_gateways_alone() {
        let incoming = map(&[("x-shopd-prefix", "/evil"), ("x-shopd-key", "1"), ("x-request-id", "theirs"), ("tracestate", "a=1")]);
        let sent = request(&incoming, &hop());
        assert_eq!(text(&sent, "x-shopd-prefix"), ["/api/OrdersProxy"]);
        assert!(!sent.contains_key("x-shopd-key"));
        assert!(!sent.contains_key("tracestate"));
        assert_eq!(text(&sent, "x-request-id"), ["r-1"]);
        assert!(!answer(&map(&[("x-shopd-anything", "1")])).contains_key("x-shopd-anything"));
    }

    #[test]
    fn the_way_is_told_to_the_service() {
        let incoming = map(&[
            ("x-forwarded-for", "1.2.3.4"),
            ("x-forwarded-proto", "https"),
            ("forwarded", "for=1.2.3.4;proto=https"),
            ("via", "1.0 front"),
        ]);
        let sent = request(&incoming, &hop());
        assert_eq!(text(&sent, "x-forwarded-for"), ["1.2.3.4, 10.0.0.7"]);
        assert_eq!(text(&sent, "x-forwarded-proto"), ["https"]);
        assert_eq!(text(&sent, "x-forwarded-host"), ["shop.example:8000"]);
        assert_eq!(text(&sent, "forwarded"), ["for=1.2.3.4;proto=https, for=10.0.0.7;host=\"shop.example:8000\";proto=http"]);
        assert_eq!(text(&sent, "via"), ["1.0 front, 1.1 shopd"]);
        let v6 = Hop { peer: Some("::1".parse().unwrap()), ..hop() };
        assert!(text(&request(&HeaderMap::new(), &v6), "forwarded")[0].starts_with("for=\"[::1]\";"));
    }
}
