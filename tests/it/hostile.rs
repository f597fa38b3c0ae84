//! Clients that do not keep to the protocol, or keep to it in order to harm: what they are told, what it costs, and that everyone else
//! is served all the while. Against the gateway's real port.

mod frozen;
mod h2c;
mod slow;
pub mod wire;

use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::io::AsyncWriteExt;

use crate::gateway::service::{Reply, Service, json_answer};
use wire::{Edge, read_until, rest, statuses};

const POST: &str = "POST /api/OrdersProxy HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";
/// Follows a request whose end is in doubt; it must never be taken for one.
const SMUGGLED: &str = "GET /api/OrdersProxy/smuggled HTTP/1.1\r\nHost: x\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_request_whose_framing_is_in_doubt_is_refused_and_nothing_after_it_is_read() {
    let edge = Edge::start().await;
    let post = |headers: &str, body: &str| format!("{POST}{headers}\r\n\r\n{body}");
    let get = |headers: &str| format!("GET /api/OrdersProxy/1 HTTP/1.1\r\n{headers}\r\n\r\n");
    let cases = [
        ("length and chunks", post("Content-Length: 5\r\nTransfer-Encoding: chunked", "0\r\n\r\n")),
        ("chunks and length", post("Transfer-Encoding: chunked\r\nContent-Length: 5", "0\r\n\r\n")),
        ("two lengths", post("Content-Length: 5\r\nContent-Length: 2", "{}")),
        ("two equal lengths", post("Content-Length: 2\r\nContent-Length: 2", "{}")),
        ("a list of lengths", post("Content-Length: 2, 2", "{}")),
        ("an unknown coding", post("Transfer-Encoding: xchunked", "0\r\n\r\n")),
        ("chunks that are not last", post("Transfer-Encoding: chunked, identity", "0\r\n\r\n")),
        ("two codings", post("Transfer-Encoding: gzip, chunked", "0\r\n\r\n")),
        ("identity", post("Transfer-Encoding: identity", "")),
        ("chunks twice", post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", "0\r\n\r\n")),
        ("a vertical tab", post("Transfer-Encoding: \x0bchunked", "0\r\n\r\n")),
        ("space before the colon", post("Transfer-Encoding : chunked", "0\r\n\r\n")),
        ("a folded header", post("X-A: 1\r\n 2\r\nContent-Length: 2", "{}")),
        ("a folded coding", post("Transfer-Encoding:\r\n chunked", "0\r\n\r\n")),
        ("a length with a sign", post("Content-Length: +5", "{}")),
        ("a negative length", post("Content-Length: -1", "{}")),
        ("an endless length", post("Content-Length: 18446744073709551616", "{}")),
        ("a hexadecimal length", post("Content-Length: 0x5", "{}")),
        ("an empty length", post("Content-Length: ", "{}")),
        ("a length in parts", post("Content-Length: 1 1", "{}")),
        ("NUL in a header", post("X-A: a\0b\r\nContent-Length: 2", "{}")),
        ("control character in a header", post("X-A: a\x01b\r\nContent-Length: 2", "{}")),
        ("a lone CR in a header", post("X-A: a\rX-B: b\r\nContent-Length: 2", "{}")),
        ("a header without a colon", post("X-A\r\nContent-Length: 2", "{}")),
        ("a header without a name", post(": a\r\nContent-Length: 2", "{}")),
        ("a space in a name", post("X A: a\r\nContent-Length: 2", "{}")),
        ("NUL in the target", "GET /api/OrdersProxy/\0 HTTP/1.1\r\nHost: x\r\n\r\n".to_owned()),
        ("control character in the target", "GET /api/OrdersProxy/\x01 HTTP/1.1\r\nHost: x\r\n\r\n".to_owned()),
        ("a space in the target", "GET /api/OrdersProxy/ 1 HTTP/1.1\r\nHost: x\r\n\r\n".to_owned()),
        ("no host", get("X-A: 1")),
        ("two hosts", get("Host: a\r\nHost: b")),
        ("HTTP/0.9", "GET /api/OrdersProxy/1\r\n".to_owned()),
        ("HTTP/2.0", "GET /api/OrdersProxy/1 HTTP/2.0\r\nHost: x\r\n\r\n".to_owned()),
        ("HTTP/1.2", "GET /api/OrdersProxy/1 HTTP/1.2\r\nHost: x\r\n\r\n".to_owned()),
        ("chunks in HTTP/1.0", "POST /api/OrdersProxy HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_owned()),
        ("no protocol", "\x16\x03\x01\x02\0\x01\0\x01\x7c".to_owned()),
    ];
    for (name, request) in cases {
        let answered = edge.told(format!("{request}{SMUGGLED}").as_bytes()).await;
        assert_eq!(statuses(&answered), ["400"], "{name}: {answered}");
        let (head, body) = answered.split_once("\r\n\r\n").unwrap();
        assert!(head.contains("\r\nconnection: close"), "{name}: {head}");
        assert!(head.contains("\r\ncontent-type: application/problem+json"), "{name}: {head}");
        assert!(body.contains(r#""code":"invalid_request""#) && head.contains("\r\nx-request-id: "), "{name}: {answered}");
    }
    assert!(edge.service.is_asked(0), "{:?}", edge.service.requests());
    edge.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_whose_chunks_are_malformed_is_refused_and_nothing_after_it_is_read() {
    let edge = Edge::start().await;
    for chunks in [
        "+2\r\n{}\r\n0\r\n\r\n",
        "-2\r\n{}\r\n0\r\n\r\n",
        "0x2\r\n{}\r\n0\r\n\r\n",
        " 2\r\n{}\r\n0\r\n\r\n",
        "g\r\n{}\r\n0\r\n\r\n",
        "\r\n0\r\n\r\n",
        "10000000000000002\r\n{}\r\n0\r\n\r\n",
        "2\r\n{}0\r\n\r\n",
        "2\n{}\r\n0\r\n\r\n",
        "2 2\r\n{}\r\n0\r\n\r\n",
        "2;\0\r\n{}\r\n0\r\n\r\n",
    ] {
        let answered = edge.told(format!("{POST}Transfer-Encoding: chunked\r\n\r\n{chunks}{SMUGGLED}").as_bytes()).await;
        assert_eq!(statuses(&answered).first(), Some(&"400"), "{chunks:?}: {answered}");
        assert!(statuses(&answered).iter().all(|status| *status == "400"), "{chunks:?}: {answered}");
    }
    assert!(edge.service.is_asked(0), "{:?}", edge.service.requests());
    edge.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_odd_but_clear_is_answered_and_ends_where_it_says() {
    let edge = Edge::start().await;
    let last = "GET /api/OrdersProxy/last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let flood = format!("{POST}Transfer-Encoding: chunked\r\n\r\n2;{}\r\n{{}}\r\n0\r\n\r\n", "a".repeat(300_000));
    for (name, request, expected) in [
        ("trailers", format!("{POST}Transfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\nX-T: 1\r\n\r\n"), "200"),
        ("a long chunk extension", flood, "200"),
        // Nothing behind us sees it: what is passed on is written anew.
        ("bare line feeds", "GET /api/OrdersProxy/1 HTTP/1.1\nHost: x\n\n".to_owned(), "200"),
        ("empty lines before", "\r\n\r\nGET /api/OrdersProxy/1 HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "200"),
        ("the absolute form", "GET http://y/api/OrdersProxy/1 HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "200"),
        ("the authority form", "GET y:80 HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "404"),
        ("an asterisk", "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "404"),
        ("an unknown method", "BREW /api/OrdersProxy HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "405"),
        ("a method in lower case", "get /api/OrdersProxy/1 HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "405"),
        ("a body of a GET", format!("GET /api/OrdersProxy/1 HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{SMUGGLED}", SMUGGLED.len()), "200"),
        ("an upgrade that nobody offers", "GET /api/OrdersProxy/1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n\r\n".to_owned(), "200"),
    ] {
        let answered = edge.told(format!("{request}{last}").as_bytes()).await;
        assert_eq!(statuses(&answered), [expected, "200"], "{name}: {answered}");
        let asked = edge.service.requests();
        assert!(asked.last().unwrap().starts_with("GET /api/Orders/last "), "{name}: {asked:?}");
        assert!(!asked.iter().any(|asked| asked.starts_with("GET /api/Orders/smuggled ")), "{name}: {asked:?}");
    }
    let answered = edge.told(b"CONNECT y:80 HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(statuses(&answered)[0].starts_with('4'), "{answered}");
    let answered = edge.told(b"GET /api/OrdersProxy/1 HTTP/1.0\r\n\r\n").await;
    assert_eq!(statuses(&answered), ["200"], "{answered}");
    edge.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_is_bounded_in_headers_and_bytes_and_its_refusal_says_so() {
    let edge = Edge::start().await;
    let with = |headers: String| format!("GET /api/OrdersProxy/1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n");
    let many = |count: usize| with((0..count).map(|n| format!("X-{n}: 1\r\n")).collect());
    assert_eq!(statuses(&edge.told(many(80).as_bytes()).await), ["200"]);
    for head in [many(200), with(format!("X-A: {}\r\n", "a".repeat(200_000))), format!("GET /{}", "a".repeat(200_000))] {
        let answered = edge.told(head.as_bytes()).await;
        assert_eq!(statuses(&answered), ["431"], "{answered}");
        assert!(answered.contains(r#""code":"head_too_large""#) && answered.contains("\r\nconnection: close"), "{answered}");
    }
    edge.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_headers_costs_no_memory() {
    const FLOOD_BYTES: usize = 100 << 20;
    let edge = Edge::start().await;
    edge.serves().await;
    let before = edge.peak_mib();
    let mut stream = edge.open().await;
    let block = "X-A: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n".repeat(1_000);
    let flood = async {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n").await?;
        for _ in 0..FLOOD_BYTES / block.len() {
            stream.write_all(block.as_bytes()).await?;
        }
        std::io::Result::Ok(())
    };
    let sent = tokio::time::timeout(Duration::from_secs(40), flood).await.expect("it is not held up");
    assert!(sent.is_err(), "the server ends it");
    let after = edge.peak_mib();
    assert!(after < before + 16, "{before} MiB at most before, {after} MiB after");
    edge.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_announced_too_large_is_refused_before_it_is_sent() {
    let edge = Edge::start().await;
    let mut stream = edge.open().await;
    let head = format!("{POST}Expect: 100-continue\r\nContent-Length: 65537\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let answered = rest(&mut stream).await;
    assert_eq!(statuses(&answered), ["413"], "{answered}");
    assert!(answered.contains("\r\nconnection: close") && answered.contains(r#""code":"payload_too_large""#), "{answered}");
    assert!(answered.contains(r#""instance":"/api/OrdersProxy""#), "{answered}");
    // What a client sends all the same is no request.
    let answered = edge.told(format!("{head}{SMUGGLED}").as_bytes()).await;
    assert_eq!(statuses(&answered), ["413"], "{answered}");
    assert!(edge.service.is_asked(0));

    let mut stream = edge.open().await;
    stream.write_all(format!("{POST}Expect: 100-continue\r\nContent-Length: 2\r\n\r\n").as_bytes()).await.unwrap();
    assert_eq!(read_until(&mut stream, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"{}").await.unwrap();
    let answered = read_until(&mut stream, r#"{"id":1}"#).await;
    assert_eq!(statuses(&answered), ["200"], "{answered}");
    edge.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_waits_for_answers_and_for_nobody_who_asks_nothing() {
    let held = std::sync::Arc::new((std::sync::Mutex::new(false), std::sync::Condvar::new()));
    let release = held.clone();
    let service = Service::start(move |request, _| {
        if request.starts_with("GET /api/Orders/slow ") {
            let (go, changed) = &*held;
            // This thread's other tasks go on elsewhere meanwhile.
            tokio::task::block_in_place(|| drop(changed.wait_while(go.lock().unwrap(), |go| !*go).unwrap()));
        }
        Reply::Answer(match json_answer(r#"{"id":1}"#) {
            Reply::Answer(text) => text,
            _ => unreachable!("it is an answer"),
        })
    })
    .await;
    let mut edge = Edge::before(service).await;
    let mut idle = edge.open().await;
    idle.write_all(b"GET /api/OrdersProxy/1 HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    read_until(&mut idle, r#"{"id":1}"#).await;
    let (mut silent, mut half) = (edge.open().await, edge.open().await);
    half.write_all(b"GET /api/OrdersProxy/1 HTTP/1.1\r\nHo").await.unwrap();
    let (h2, http2) = h2c::connect(&edge).await;
    let http2 = tokio::spawn(http2);
    let mut asking = edge.open().await;
    asking.write_all(b"GET /api/OrdersProxy/slow HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    edge.until("it is asked", |edge| edge.service.requests().iter().any(|asked| asked.contains("/slow "))).await;

    let began = std::time::Instant::now();
    edge.process.signal(Signal::SIGTERM);
    assert_eq!(rest(&mut idle).await, "");
    assert_eq!(rest(&mut silent).await, "");
    rest(&mut half).await;
    drop(h2);
    let ended = tokio::time::timeout(Duration::from_secs(15), http2).await.expect("the HTTP/2 connection ends");
    drop(ended);
    *release.0.lock().unwrap() = true;
    release.1.notify_all();
    let answered = rest(&mut asking).await;
    assert_eq!(statuses(&answered), ["200"], "{answered}");
    assert!(answered.contains("\r\nconnection: close"), "{answered}");
    assert!(edge.process.ended().await.success());
    // Below every bound that would have ended one of them.
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
}
