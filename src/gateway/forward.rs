//! Which headers cross the gateway, in either direction (RFC 9110 7.6, RFC 7239): pure.
//!
//! May import the values of http.

use std::net::IpAddr;

use actix_web::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use bytes::{BufMut, BytesMut};

use super::routes::ServiceName;
use crate::http::{IDEMPOTENCY_KEY_HEADER, PREFIX_HEADER, REQUEST_ID_HEADER, STAMP_HEADER, names};

/// Every header that only the gateway may set begins so; those of clients are dropped, those of services stay inside.
const INNER: &str = "x-shopd-";
const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";
const PREFER: &str = "prefer";
/// Where it stands in a `traceparent`.
const TRACE_ID: std::ops::Range<usize> = 3..35;
/// How `Via` names us.
const OURS: &str = "1.1 shopd";

const VIA: &str = "via";
const FORWARDED: &str = "forwarded";
const FORWARDED_FOR: &str = "x-forwarded-for";

/// By which way a request came: the same for all requests of a connection, so it is written once.
#[derive(Debug)]
pub struct Way {
    pub peer: Option<IpAddr>,
    /// As the client gave it.
    pub host: String,
    forwarded: Option<HeaderValue>,
    forwarded_for: Option<HeaderValue>,
    forwarded_host: Option<HeaderValue>,
    scheme: &'static str,
}

impl Way {
    pub fn new(peer: Option<IpAddr>, host: &str, scheme: &'static str) -> Self {
        // Text that no header can hold is left out.
        let value = |text: &str| HeaderValue::from_str(text).ok();
        Self {
            peer,
            forwarded: value(&forwarded(peer, host, scheme)),
            forwarded_for: peer.and_then(|peer| value(&peer.to_string())),
            forwarded_host: value(host),
            host: host.to_owned(),
            scheme,
        }
    }
}

/// What the gateway itself says about a request.
pub struct Hop<'a> {
    pub way: &'a Way,
    pub service: ServiceName,
    pub request_id: &'a str,
    pub traceparent: &'a str,
    /// Of a request that has an effect: names it over all its tries, and is its key where the client sent none.
    pub stamp: Option<&'a str>,
    /// What the client would have us wait for (`Prefer`) goes on with it.
    pub prefers: bool,
}

/// How a request goes to a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Travels {
    Alone,
    /// With others, to a service of our own: it does not hear by which way each of them came, which it asks nobody and is a third of a head.
    Together,
}

/// Whether a header goes on with a request: its client may have named it as one of its connection.
pub fn carries(incoming: &HeaderMap, name: &HeaderName) -> bool {
    incoming.contains_key(name) && !is_hop_by_hop(name.as_str(), &named_by_connection(incoming))
}

/// Writes the header lines under which a request goes on. `Host` and the body's length are the connection's to write; `Expect` was met
/// by the server already.
pub fn request(incoming: &HeaderMap, hop: &Hop<'_>, travels: Travels, out: &mut BytesMut) {
    let dropped = named_by_connection(incoming);
    let has = |name: &HeaderName| incoming.contains_key(name) && !is_hop_by_hop(name.as_str(), &dropped);
    // A state belongs to the trace it came with: where that is not gone on with, as it could not be read or was there twice, it means nothing.
    let came_with = incoming.get(&names::TRACEPARENT).filter(|_| has(&names::TRACEPARENT));
    let came_with = came_with.and_then(|parent| parent.as_bytes().get(TRACE_ID));
    let keeps_state = came_with.is_some() && came_with == hop.traceparent.as_bytes().get(TRACE_ID);
    for (name, value) in incoming {
        let text = name.as_str();
        let own = match text {
            "host" | "content-length" | "expect" | REQUEST_ID_HEADER | TRACEPARENT | VIA | FORWARDED | FORWARDED_FOR => true,
            TRACESTATE => !keeps_state,
            PREFER => !hop.prefers,
            _ => text.starts_with(INNER),
        };
        if !own && !is_hop_by_hop(text, &dropped) {
            line(out, text, value.as_bytes());
        }
    }
    line(out, PREFIX_HEADER, hop.service.public_prefix().as_bytes());
    line(out, REQUEST_ID_HEADER, hop.request_id.as_bytes());
    line(out, TRACEPARENT, hop.traceparent.as_bytes());
    if let Some(stamp) = hop.stamp {
        line(out, STAMP_HEADER, stamp.as_bytes());
        if !has(&names::IDEMPOTENCY_KEY) {
            line(out, IDEMPOTENCY_KEY_HEADER, stamp.as_bytes());
        }
    }
    if travels == Travels::Together {
        return;
    }
    // Lists go on as one line each.
    let list = |out: &mut BytesMut, name: &HeaderName, own: &[u8]| {
        out.put_slice(name.as_str().as_bytes());
        out.put_slice(b": ");
        for value in incoming.get_all(name).filter(|_| has(name)) {
            out.put_slice(value.as_bytes());
            out.put_slice(b", ");
        }
        out.put_slice(own);
        out.put_slice(b"\r\n");
    };
    list(out, &header::VIA, OURS.as_bytes());
    for (name, own) in [(&header::FORWARDED, &hop.way.forwarded), (&header::X_FORWARDED_FOR, &hop.way.forwarded_for)] {
        if let Some(own) = own {
            list(out, name, own.as_bytes());
        }
    }
    // A proxy in front of us saw the client; what it says is kept.
    if let Some(host) = hop.way.forwarded_host.as_ref().filter(|_| !has(&header::X_FORWARDED_HOST)) {
        line(out, header::X_FORWARDED_HOST.as_str(), host.as_bytes());
    }
    if !has(&header::X_FORWARDED_PROTO) {
        line(out, header::X_FORWARDED_PROTO.as_str(), hop.way.scheme.as_bytes());
    }
}

/// `value` holds no control character: it was read from a head, or is made of our own text.
pub fn line(out: &mut BytesMut, name: &str, value: &[u8]) {
    out.put_slice(name.as_bytes());
    out.put_slice(b": ");
    out.put_slice(value);
    out.put_slice(b"\r\n");
}

/// The headers under which an answer goes back, in the map they came in. The ids are the gateway's own layer's to write, the framing
/// the server's.
pub fn answer(mut headers: HeaderMap) -> HeaderMap {
    for name in named_by_connection(&headers) {
        headers.remove(name);
    }
    let is_own = |name: &str| matches!(name, "content-length" | REQUEST_ID_HEADER) || name.starts_with(INNER);
    headers.retain(|name, _| !is_own(name.as_str()) && !is_hop_by_hop(name.as_str(), &[]));
    join(&mut headers, header::VIA, &HeaderValue::from_static(OURS));
    headers
}

/// What is about one connection and never passes, beside what `Connection` names.
fn is_hop_by_hop(name: &str, named: &[String]) -> bool {
    let fixed = matches!(
        name,
        "connection"
            | "keep-alive"
            | "proxy-connection"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
    );
    fixed || named.iter().any(|other| other == name)
}

/// In lower case; nearly always none.
fn named_by_connection(headers: &HeaderMap) -> Vec<String> {
    let values = headers.get_all(header::CONNECTION).filter_map(|value| value.to_str().ok());
    let names = values.flat_map(|value| value.split(',')).map(str::trim);
    let beside = |name: &&str| !["keep-alive", "close"].iter().any(|usual| name.eq_ignore_ascii_case(usual));
    names.filter(beside).map(str::to_ascii_lowercase).collect()
}

fn forwarded(peer: Option<IpAddr>, host: &str, scheme: &str) -> String {
    let node = match peer {
        Some(IpAddr::V4(peer)) => peer.to_string(),
        Some(IpAddr::V6(peer)) => format!("\"[{peer}]\""),
        None => "unknown".to_owned(),
    };
    let host = host.replace('\\', "\\\\").replace('"', "\\\"");
    format!("for={node};host=\"{host}\";proto={scheme}")
}

/// Appends to a header that is a list, as one line.
fn join(headers: &mut HeaderMap, name: HeaderName, value: &HeaderValue) {
    if !headers.contains_key(&name) {
        headers.insert(name, value.clone());
        return;
    }
    let before = headers.get_all(&name).chain([value]).filter_map(|value| value.to_str().ok());
    let all = before.collect::<Vec<_>>().join(", ");
    if let Ok(all) = HeaderValue::from_str(&all) {
        headers.insert(name, all);
    }
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

    const STAMP: &str = "01890a5d-ac96-774b-bcce-b302099a8057";
    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_key_that_its_client_named_as_one_of_the_connection_does_not_go_on() {
        let key = ("idempotency-key", "k");
        for (headers, goes_on) in [
            (&[key][..], true),
            (&[key, ("connection", "close, X-Mine")], true),
            (&[key, ("connection", "x-mine, Idempotency-Key")], false),
            (&[("connection", "close")], false),
        ] {
            assert_eq!(carries(&map(headers), &names::IDEMPOTENCY_KEY), goes_on, "{headers:?}");
        }
    }

    fn sent_from(incoming: &HeaderMap, peer: IpAddr, stamp: Option<&'static str>) -> HeaderMap {
        sent(incoming, peer, stamp, Travels::Alone)
    }

    fn sent(incoming: &HeaderMap, peer: IpAddr, stamp: Option<&'static str>, travels: Travels) -> HeaderMap {
        let hop = Hop {
            way: &Way::new(Some(peer), "shop.example:8000", "http"),
            service: ServiceName::Orders,
            request_id: "r-1",
            traceparent: TRACE,
            stamp,
            prefers: true,
        };
        let mut out = BytesMut::new();
        request(incoming, &hop, travels, &mut out);
        let mut headers = HeaderMap::new();
        for line in std::str::from_utf8(&out).unwrap().split_terminator("\r\n") {
            let (name, value) = line.split_once(": ").unwrap();
            headers.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn passed(incoming: &HeaderMap) -> HeaderMap {
        sent_from(incoming, IpAddr::from([10, 0, 0, 7]), None)
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
        let sent = passed(&incoming);
        for gone in ["connection", "x-private", "x-other", "keep-alive", "te", "transfer-encoding", "upgrade", "expect", "host"] {
            assert!(!sent.contains_key(gone), "{gone}");
        }
        assert!(!sent.contains_key("content-length"));
        assert_eq!(text(&sent, "accept"), ["application/json", "text/plain"]);
        assert_eq!(text(&sent, "idempotency-key"), ["k"]);
        let back = answer(map(&[("connection", "x-private"), ("x-private", "1"), ("etag", "\"1\""), ("trailer", "x")]));
        assert!(["connection", "x-private", "trailer"].iter().all(|gone| !back.contains_key(*gone)));
        assert_eq!(text(&back, "etag"), ["\"1\""]);
        assert_eq!(text(&back, "via"), ["1.1 shopd"]);
    }

    #[test]
    fn inner_headers_are_the_gateways_alone() {
        let incoming = map(&[("x-shopd-prefix", "/evil"), ("x-shopd-key", "1"), ("x-request-id", "theirs"), ("tracestate", "a=1")]);
        let sent = passed(&incoming);
        assert_eq!(text(&sent, "x-shopd-prefix"), ["/api/OrdersProxy"]);
        assert!(!sent.contains_key("x-shopd-key"));
        assert!(!sent.contains_key("tracestate"));
        assert_eq!(text(&sent, "x-request-id"), ["r-1"]);
        assert!(!answer(map(&[("x-shopd-anything", "1")])).contains_key("x-shopd-anything"));
    }

    /// Red where a parent that is there is taken for one that is gone on with.
    #[test]
    fn a_state_goes_on_with_its_own_trace_only() {
        const OTHER: &str = "00-5bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        for (parent, goes_on) in [(TRACE, true), (OTHER, false), ("theirs", false), ("", false)] {
            let sent = passed(&map(&[("traceparent", parent), ("tracestate", "a=1")]));
            assert_eq!(sent.contains_key("tracestate"), goes_on, "{parent}");
        }
    }

    #[test]
    fn a_request_with_an_effect_gets_a_stamp_and_a_key_where_it_has_none() {
        let peer = IpAddr::from([10, 0, 0, 7]);
        let headers = sent_from(&map(&[("x-shopd-stamp", "theirs")]), peer, Some(STAMP));
        assert_eq!((text(&headers, "x-shopd-stamp"), text(&headers, "idempotency-key")), (vec![STAMP], vec![STAMP]));
        let headers = sent_from(&map(&[("idempotency-key", "mine")]), peer, Some(STAMP));
        assert_eq!((text(&headers, "x-shopd-stamp"), text(&headers, "idempotency-key")), (vec![STAMP], vec!["mine"]));
        let headers = passed(&map(&[("x-shopd-stamp", "theirs"), ("x-shopd-deadline-ms", "1")]));
        assert!(["x-shopd-stamp", "x-shopd-deadline-ms", "idempotency-key"].iter().all(|name| !headers.contains_key(*name)));
    }

    #[test]
    fn one_of_several_is_told_everything_but_its_way() {
        let incoming =
            map(&[("x-forwarded-for", "1.2.3.4"), ("via", "1.0 front"), ("accept", "text/plain"), ("traceparent", "theirs")]);
        let peer = IpAddr::from([10, 0, 0, 7]);
        let mut alone = sent(&incoming, peer, Some(STAMP), Travels::Alone);
        let together = sent(&incoming, peer, Some(STAMP), Travels::Together);
        for way in ["via", "forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"] {
            assert!(!together.contains_key(way) && alone.remove(way).count() == 1, "{way}");
        }
        let sorted = |headers: &HeaderMap| {
            let mut all: Vec<_> =
                headers.iter().map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned())).collect();
            all.sort();
            all
        };
        assert_eq!(sorted(&together), sorted(&alone));
        assert_eq!(text(&together, "idempotency-key"), [STAMP]);
    }

    #[test]
    fn the_way_is_told_to_the_service() {
        let incoming = map(&[
            ("x-forwarded-for", "1.2.3.4"),
            ("x-forwarded-proto", "https"),
            ("forwarded", "for=1.2.3.4;proto=https"),
            ("via", "1.0 front"),
        ]);
        let sent = passed(&incoming);
        assert_eq!(text(&sent, "x-forwarded-for"), ["1.2.3.4, 10.0.0.7"]);
        assert_eq!(text(&sent, "x-forwarded-proto"), ["https"]);
        assert_eq!(text(&sent, "x-forwarded-host"), ["shop.example:8000"]);
        assert_eq!(text(&sent, "forwarded"), ["for=1.2.3.4;proto=https, for=10.0.0.7;host=\"shop.example:8000\";proto=http"]);
        assert_eq!(text(&sent, "via"), ["1.0 front, 1.1 shopd"]);
        let v6 = sent_from(&HeaderMap::new(), "::1".parse().unwrap(), None);
        assert!(text(&v6, "forwarded")[0].starts_with("for=\"[::1]\";"));
    }
}
