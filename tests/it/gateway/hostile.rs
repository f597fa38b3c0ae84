//! Bodies, heads and headers that are meant to harm, from clients: what crosses the gateway, what it costs, and that nothing of it becomes
//! another request. Answers that are meant to harm are tested in `answers`, the framing of requests in the other `hostile`.

use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use reqwest::StatusCode;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use super::answers::HELD_MIB_MAX;
use super::service::{Reply, Service, Shop, answer, code, header, json_answer, nobody, problem};
use crate::hostile::wire::{Edge, read_until, rest, statuses};
use crate::support::postgres;
use crate::support::shop::All;

/// So much as a zstd frame of a few kilobytes: blocks of one byte that is repeated 128 KiB times.
fn bomb(unpacked_mib: usize) -> Vec<u8> {
    const BLOCK_BYTES: u32 = 128 * 1024;
    let blocks = unpacked_mib * 8;
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x58];
    for block in 1..=blocks {
        let repeated = u32::from(block == blocks) | (1 << 1) | (BLOCK_BYTES << 3);
        frame.extend(&repeated.to_le_bytes()[..3]);
        frame.push(b' ');
    }
    frame
}

#[tokio::test(flavor = "multi_thread")]
async fn a_packed_body_crosses_the_gateway_packed_whatever_it_holds() {
    let packed = bomb(1_900);
    assert!(packed.len() < 64 * 1024);
    let reply = [b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: zstd\r\n".to_vec(), {
        [format!("Content-Length: {}\r\n\r\n", packed.len()).into_bytes(), packed.clone()].concat()
    }]
    .concat();
    let edge = Edge::before(Service::start(move |_, _| Reply::Bytes(reply.clone())).await).await;
    edge.serves().await;
    let before = edge.peak_mib();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::new();
    for accepted in ["gzip", "br, zstd;q=0.1", "identity", "*;q=0"] {
        let request = client.post(format!("http://{}/api/OrdersProxy", edge.address));
        let request = request.header("content-type", "application/json").header("content-encoding", "zstd");
        let answered = request.header("accept-encoding", accepted).body(packed.clone()).send().await.unwrap();
        assert_eq!((answered.status(), answered.headers()["content-encoding"].to_str().unwrap()), (StatusCode::OK, "zstd"));
        assert_eq!(answered.bytes().await.unwrap(), packed, "{accepted}");
    }
    let asked = edge.service.requests();
    assert_eq!(header(asked.last().unwrap(), "content-encoding").as_deref(), Some("zstd"), "for the service to refuse");
    assert_eq!(header(asked.last().unwrap(), "content-length"), Some(packed.len().to_string()));
    let after = edge.peak_mib();
    assert!(after <= before + HELD_MIB_MAX, "{before} MiB before, {after} MiB after");
    edge.serves().await;
}

#[tokio::test]
async fn what_is_encoded_stays_encoded_and_is_no_header() {
    let services = Service::start(|_, _| json_answer("{}")).await;
    let shop = Shop::start(&[&services.url], &[&services.url]).await;
    for path in [
        "/api/PaymentsProxy/a%0d%0aX-Evil:%201/balance",
        "/api/PaymentsProxy/a%0d%0a%0d%0aGET%20%2Fevil%20HTTP%2F1.1%0d%0a%0d%0a/balance",
        "/api/OrdersProxy/%0d%0aX-Evil:1",
        "/api/OrdersProxy?userId=%0d%0aX-Evil:%201&cursor=%E5%98%8D%E5%98%8AX-Evil:1",
        "/api/OrdersProxy?%0aX-Evil:1",
    ] {
        let answered = shop.raw(&format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")).await;
        let asked = services.requests().pop().unwrap();
        assert!(statuses(&answered).len() == 1 && !answered.to_ascii_lowercase().contains("\nx-evil"), "{path}: {answered}");
        let inner = path.replace("PaymentsProxy", "Account").replace("OrdersProxy", "Orders");
        assert!(asked.starts_with(&format!("GET {inner} HTTP/1.1\r\n")), "{path}: {asked}");
        assert!(!asked.to_ascii_lowercase().contains("\nx-evil"), "{path}: {asked}");
    }
    assert!(services.is_asked(5));
}

#[tokio::test]
async fn odd_headers_are_passed_on_as_they_are_or_replaced() {
    let services = Service::start(|_, _| json_answer("{}")).await;
    let shop = Shop::start(&[&services.url], &[&services.url]).await;
    let long = "k".repeat(60_000);
    for (name, value, passes) in [
        ("Idempotency-Key", "\u{e9}\u{fffd}", true),
        ("Idempotency-Key", "a\tb", true),
        ("Idempotency-Key", &long, true),
        ("X-Request-Id", "\u{e9}", false),
        ("X-Request-Id", "a b", false),
        ("X-Request-Id", &long, false),
        ("X-Shopd-Stamp", "01890a5d-ac96-774b-bcce-b302099a8057", false),
        ("x-sHoPd-deadline-MS", "1", false),
        ("X-Shopd-", "1", false),
        ("Connection", "X-Shopd-Stamp, Idempotency-Key, Content-Type, X-Forwarded-For", false),
    ] {
        let request = format!(
            "POST /api/OrdersProxy HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{name}: {value}\r\nContent-Length: 2\r\n\r\n{{}}"
        );
        let answered = shop.raw(&request).await;
        assert_eq!(statuses(&answered), ["200"], "{name}: {answered}");
        let asked = services.requests().pop().unwrap();
        assert_eq!(header(&asked, name).as_deref() == Some(value), passes, "{name}: {asked}");
        for own in ["x-shopd-stamp", "idempotency-key", "x-request-id", "x-forwarded-for", "x-shopd-deadline-ms"] {
            assert_eq!(asked.to_ascii_lowercase().matches(&format!("\r\n{own}: ")).count(), 1, "{own} once: {asked}");
        }
        let id = header(&answered, "x-request-id").unwrap();
        assert!(id.len() <= 128 && id.bytes().all(|byte| byte.is_ascii_graphic()), "{id}");
        assert_eq!(header(&asked, "x-request-id"), Some(id));
    }
}

#[tokio::test]
async fn no_accept_encoding_takes_the_answer_away() {
    let body = format!("[\"{}\"]", "x".repeat(5_000));
    let text = body.clone();
    let orders = Service::start(move |_, _| json_answer(&text)).await;
    let shop = Shop::start(&[&orders.url], &[&nobody()]).await;
    let many = "gzip;q=0.001, ".repeat(4_000);
    for (accepted, expected) in [
        ("", ""),
        (",,,", ""),
        ("gzip;q=abc", ""),
        ("gzip;q=2", ""),
        ("gzip;q=-1", ""),
        ("*;q=0", ""),
        ("identity;q=0", ""),
        ("compress", ""),
        ("\u{e9}", ""),
        ("x y z", ""),
        (&many, "gzip"),
    ] {
        let request = shop.client.get(shop.url("/api/OrdersProxy")).header("accept-encoding", accepted.as_bytes());
        let answered = request.send().await.unwrap();
        assert_eq!(answered.status(), StatusCode::OK, "{accepted:.60}");
        let encoded = answered.headers().get("content-encoding").map_or("", |value| value.to_str().unwrap());
        assert_eq!(encoded, expected, "{accepted:.60}");
        // The client unpacks nothing.
        let mut got = answered.bytes().await.unwrap().to_vec();
        if expected == "gzip" {
            let packed = std::mem::take(&mut got);
            flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut got).unwrap();
        }
        assert!(got == body.as_bytes(), "{accepted:.60}: {} bytes of {}", got.len(), body.len());
    }
}

/// Red where the gateway reads the preference by another rule than the service: it then gives up before the service does, or lets
/// anybody have the time that only who waits for an order needs.
#[tokio::test]
async fn a_preference_is_worth_the_same_at_the_gateway_as_at_the_service() {
    let bound = Duration::from_secs(2);
    let slow = move |text: &str| Reply::Slow(bound * 2, text.to_owned());
    let services = Service::start(move |_, _| match json_answer("{}") {
        Reply::Answer(text) => slow(&text),
        _ => unreachable!("it is an answer"),
    })
    .await;
    let shop = Shop::start_waiting(&[&services.url], &[&services.url], bound).await;
    let orders = "/api/OrdersProxy";
    // All at once: each waits for an answer that takes twice the bound, or until the bound.
    let asked = [
        (orders, "wait=5", true),
        (orders, "wait=99999999999", true),
        (orders, "wait=99999999999999999999999", true),
        (orders, "respond-async, wait=5; x=\"a,b\"", true),
        (orders, "wait=abc", false),
        (orders, "wait=-1", false),
        (orders, "wait=", false),
        (orders, "wait=0", false),
        (orders, "x=\"a, wait=5\"", false),
        (orders, "x; wait=5", false),
        ("/api/PaymentsProxy/u/deposit", "wait=5", false),
    ]
    .map(async |(path, preferred, waits)| {
        let request = shop.client.post(shop.url(path)).header("prefer", preferred).header("content-type", "application/json");
        let answered = request.body("{}").send().await.unwrap();
        if waits {
            assert_eq!(answered.status(), StatusCode::OK, "{path} {preferred}");
        } else {
            assert_eq!(problem(answered).await, code(504, "upstream_timeout"), "{path} {preferred}");
        }
    });
    let got = shop.client.get(shop.url(orders)).header("prefer", "wait=5").send();
    let (_, got) = futures::future::join(join_all(asked), got).await;
    assert_eq!(problem(got.unwrap()).await, code(504, "upstream_timeout"));
}

/// Red where a stream is known by how its path ends: such a user's request is then no request under the gateway's own key.
#[tokio::test]
async fn a_user_may_be_called_events() {
    let asked = AtomicU64::new(0);
    let payments = Service::start(move |_, _| match asked.fetch_add(1, Ordering::Relaxed) {
        0 => answer("409 Conflict", "Content-Type: application/problem+json\r\n", r#"{"code":"idempotency_in_progress"}"#),
        _ => json_answer("{}"),
    })
    .await;
    let shop = Shop::start(&[&nobody()], &[&payments.url]).await;
    assert_eq!(shop.post("/api/PaymentsProxy/events", "").await.status(), StatusCode::OK);
    assert!(payments.is_asked(2));
}

/// Its service says nothing all the time, and hears of it all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_left_its_stream_is_noticed_at_once() {
    const HEAD: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    const QUIET: &str = "e\r\n: keep-alive\n\n\r\n";
    let feeds = Arc::new(Mutex::new(Vec::new()));
    let kept = feeds.clone();
    let service = Service::start(move |request, _| {
        if !request.contains("/events") {
            return json_answer(r#"{"id":1}"#);
        }
        let (feed, pieces) = mpsc::channel(16);
        feed.try_send(format!("{HEAD}{QUIET}")).unwrap();
        kept.lock().unwrap().push(feed);
        Reply::Pieces(pieces)
    })
    .await;
    let edge = Edge::before(service).await;
    edge.serves().await;
    let descriptors = edge.descriptors();
    let mut streams = Vec::new();
    for _ in 0..50 {
        let mut stream = edge.open().await;
        stream.write_all(b"GET /api/OrdersProxy/events?userId=u HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        read_until(&mut stream, ": keep-alive\n\n").await;
        streams.push(stream);
    }
    // But for a connection or two that was still closing before.
    assert!(edge.descriptors() >= descriptors + 95, "both sides of each");
    drop(streams);
    edge.until("both sides are closed", |edge| edge.descriptors() <= descriptors + 4).await;
    assert_eq!(feeds.lock().unwrap().len(), 50, "the service has ended none");
    edge.serves().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_shop_says_clearly_what_is_wrong_and_does_nothing_of_it() {
    let shop = All::start(postgres::own_dir()).await;
    let address = shop.client.base.trim_start_matches("http://").to_owned();
    let told = async |head: &str, odd: &[u8], body: &[u8]| {
        let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        let framing = if head.starts_with("POST") {
            format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len())
        } else {
            String::new()
        };
        let head = format!("{head} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{framing}");
        let request = [head.as_bytes(), odd, b"\r\n\r\n", body].concat();
        // What is refused unread may break off the rest.
        let _ = stream.write_all(&request).await;
        rest(&mut stream).await
    };
    const PLACE: &str = "POST /api/OrdersProxy";
    const ORDER: &[u8] = br#"{"userId":"u","amount":1}"#;
    let unpacked = bomb(1_900);
    let long = |name: &str, bytes: usize| format!("{name}: {}", "7".repeat(bytes)).into_bytes();
    let first = told(PLACE, b"Prefer: wait=20", ORDER).await;
    let (id, of_user) = (first.split_once("/api/OrdersProxy/").unwrap().1[..36].to_owned(), "GET /api/OrdersProxy/events?userId=u");
    let one = format!("GET /api/OrdersProxy/{id}");
    let (of_one, ws) = (format!("{one}/events"), format!("{one}/ws"));
    for (head, odd, body, status, code) in [
        (PLACE, b"Content-Encoding: zstd".to_vec(), &unpacked[..], 415, "unsupported_media_type"),
        (PLACE, b"Content-Encoding: gzip".to_vec(), &unpacked, 415, "unsupported_media_type"),
        (PLACE, b"Idempotency-Key: \xff\xfe".to_vec(), ORDER, 400, "invalid_request"),
        (PLACE, b"Idempotency-Key: ".to_vec(), ORDER, 400, "invalid_request"),
        (PLACE, b"Idempotency-Key: a\r\nIdempotency-Key: b".to_vec(), ORDER, 400, "invalid_request"),
        (PLACE, long("Idempotency-Key", 256), ORDER, 400, "invalid_request"),
        (of_user, b"Last-Event-ID: x".to_vec(), b"", 400, "invalid_request"),
        (of_user, b"Last-Event-ID: \xff".to_vec(), b"", 400, "invalid_request"),
        (of_user, b"Last-Event-ID: 1-1~2,3".to_vec(), b"", 400, "invalid_request"),
        (of_user, b"Last-Event-ID: 1-1\r\nLast-Event-ID: 1-2".to_vec(), b"", 400, "invalid_request"),
        (&of_one, b"Last-Event-ID: 18446744073709551616-1".to_vec(), b"", 400, "invalid_request"),
        (&of_one, long("Last-Event-ID", 100_000), b"", 400, "invalid_request"),
        (&ws, b"Last-Event-ID: x".to_vec(), b"", 400, "invalid_request"),
        ("GET /api/OrdersProxy/events?userId=%0d%0aX-Evil:1", vec![], b"", 400, "invalid_request"),
        ("POST /api/PaymentsProxy/%0d%0aX-Evil:1", b"X-A: 1".to_vec(), b"", 400, "invalid_request"),
        ("GET /api/OrdersProxy?userId=u&cursor=%0d%0aX-Evil:1", b"X-A: 1".to_vec(), b"", 400, "invalid_request"),
        (PLACE, long("X-A", 1 << 20), ORDER, 431, "head_too_large"),
    ] {
        let odd = if odd.is_empty() { b"X-A: 1".to_vec() } else { odd };
        let answered = told(head, &odd, body).await;
        let name = String::from_utf8_lossy(&odd[..odd.len().min(60)]).into_owned();
        assert_eq!(statuses(&answered), [status.to_string()], "{head} {name}: {answered}");
        assert!(answered.contains(&format!(r#""code":"{code}""#)) && !answered.contains("\nX-Evil"), "{head} {name}: {answered}");
    }
    let mut placed = 1;
    let headers = |n: usize| (0..n).map(|n| format!("X-{n}: {n}")).collect::<Vec<_>>().join("\r\n").into_bytes();
    let many = told(PLACE, &headers(80), ORDER).await;
    assert_eq!(statuses(&many), ["201"], "with the four of every request as many as are passed on: {many}");
    placed += 1;
    let more = told(PLACE, &headers(81), ORDER).await;
    assert!(statuses(&more) == ["431"] && more.contains(r#""instance":"/api/OrdersProxy""#), "as the gateway's own: {more}");
    for odd in ["Prefer: wait=abc", "Prefer: wait=-1", "Prefer: wait=", "X-Shopd-Deadline-Ms: 1", "X-Shopd-Prefix: /evil"] {
        let answered = told(PLACE, odd.as_bytes(), ORDER).await;
        assert_eq!(statuses(&answered), ["201"], "{odd}: {answered}");
        assert!(!answered.to_ascii_lowercase().contains("preference-applied") && !answered.contains("/evil"), "{odd}: {answered}");
        placed += 1;
    }
    let stamp = "01890a5d-ac96-774b-bcce-b302099a8057";
    let answered = told(PLACE, format!("X-Shopd-Stamp: {stamp}").as_bytes(), ORDER).await;
    assert!(statuses(&answered) == ["201"] && !answered.contains(stamp), "a client names no request: {answered}");
    let got = told(&one, b"X-A: 1", b"").await;
    let tag = header(&got, "etag").unwrap();
    let many: String = (0..8_000).map(|n| format!("\"{n}\", ")).collect();
    for (last, status) in [("\"x\"", "200"), (tag.as_str(), "304")] {
        let answered = told(&one, format!("If-None-Match: {many}{last}").as_bytes(), b"").await;
        assert_eq!(statuses(&answered), [status], "{last}: {answered}");
    }
    let orders = shop.client.get("/api/OrdersProxy?userId=u").await.expect(200).json();
    assert_eq!(orders.as_array().map(Vec::len), Some(placed + 1), "nothing of what was refused was done");
}
