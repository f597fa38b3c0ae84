//! Answers of services that are meant to harm: without an end, without a head's end, two in one, cut off.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use futures::StreamExt;
use tokio::io::AsyncWriteExt;

use super::service::{Reply, Service, Shop, code, json_answer, nobody, problem};
use crate::hostile::wire::{Edge, rest, statuses};
use crate::support::shop::{PATIENCE, poll};

const MIB: usize = 1 << 20;
/// What a gateway may hold of one exchange, buffers of its sockets aside.
pub const HELD_MIB_MAX: u64 = 16;

/// A service that sends `piece` for as long as anybody takes it; how many bytes it got rid of, and whether it was left.
async fn endless(head: &'static str, piece: Vec<u8>) -> (Service, Arc<AtomicU64>) {
    let sent = Arc::new(AtomicU64::new(0));
    let counted = sent.clone();
    let reply = move |request: &str, _| match request.starts_with("GET /api/Orders/1 ") {
        true => json_answer(r#"{"id":1}"#),
        false => Reply::Endless { head: head.to_owned(), piece: piece.clone(), sent: counted.clone() },
    };
    (Service::start(reply).await, sent)
}

/// So many bytes as a chunk of an answer.
fn chunk(byte: u8, bytes: usize) -> Vec<u8> {
    [format!("{bytes:x}\r\n").into_bytes(), vec![byte; bytes], b"\r\n".to_vec()].concat()
}

/// Until nobody takes any more.
async fn at_rest(sent: &AtomicU64) -> u64 {
    let since = Instant::now();
    let (mut last, mut same) = (sent.load(Ordering::Relaxed), 0);
    while same < 25 {
        assert!(since.elapsed() < PATIENCE, "it still flows: {last} bytes");
        poll().await;
        let now = sent.load(Ordering::Relaxed);
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    last
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_an_end_streams_is_held_back_and_can_be_left() {
    const PLAIN: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    let (service, sent) = endless(PLAIN, chunk(b'x', 64 * 1024)).await;
    let edge = Edge::before(service).await;
    edge.serves().await;
    let before = edge.peak_mib();
    // One who reads gets what there is.
    let answered = reqwest::get(format!("http://{}/api/OrdersProxy?a=1", edge.address)).await.unwrap();
    let (mut body, mut got) = (answered.bytes_stream(), 0);
    while got < 64 * MIB {
        got += body.next().await.expect("it has no end").unwrap().len();
    }
    drop(body);
    at_rest(&sent).await;
    // One who does not read holds the service back.
    let already = sent.load(Ordering::Relaxed);
    let mut silent = edge.open().await;
    silent.write_all(b"GET /api/OrdersProxy?a=2 HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    edge.until("it flows", |_| sent.load(Ordering::Relaxed) > already).await;
    let taken = at_rest(&sent).await - already;
    assert!(taken < 32 * MIB as u64, "{taken} bytes are held for a client that reads nothing");
    let after = edge.peak_mib();
    println!("an endless answer: {before} MiB before, {after} MiB during, {} KiB on the way to who does not read", taken >> 10);
    assert!(after <= before + HELD_MIB_MAX, "{before} MiB before, {after} MiB during");
    edge.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_an_end_is_none_where_the_gateway_itself_would_read_it() {
    const JSON: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
    let (service, sent) = endless(JSON, chunk(b' ', 64 * 1024)).await;
    let edge = Edge::before(service).await;
    edge.serves().await;
    let before = edge.peak_mib();
    for (path, status) in
        [("/api/OrdersProxy/2/timeline", "503"), ("/api/users/u/summary", "503"), ("/swagger/v1/swagger.json", "200")]
    {
        let answered = edge.told(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes()).await;
        assert_eq!(statuses(&answered), [status], "{path}: {answered}");
    }
    at_rest(&sent).await;
    let after = edge.peak_mib();
    assert!(after <= before + HELD_MIB_MAX, "{before} MiB before, {after} MiB after");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_whose_head_has_no_end_is_no_service() {
    for (name, head, piece) in [
        ("many headers", "HTTP/1.1 200 OK\r\n", b"X-A: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n"[..].to_vec()),
        ("one header", "HTTP/1.1 200 OK\r\nX-A: ", vec![b'a'; 1_024]),
        ("a reason", "HTTP/1.1 200 ", vec![b'a'; 1_024]),
        ("interim answers", "", b"HTTP/1.1 100 Continue\r\n\r\n".to_vec()),
    ] {
        let (service, sent) = endless(head, piece).await;
        let edge = Edge::before(service).await;
        edge.serves().await;
        let before = edge.peak_mib();
        let answered = edge.told(b"GET /api/OrdersProxy/2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        assert_eq!(statuses(&answered), ["503"], "{name}: {answered}");
        assert!(answered.contains(r#""code":"upstream_unavailable""#), "{name}: {answered}");
        at_rest(&sent).await;
        let after = edge.peak_mib();
        assert!(after <= before + HELD_MIB_MAX, "{name}: {before} MiB before, {after} MiB after");
        edge.serves().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_whose_answer_could_be_read_as_two_gives_one_or_none() {
    const EVIL: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 6\r\n\r\n\"evil\"";
    let json = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n";
    for (name, reply) in [
        ("two lengths", format!("{json}Content-Length: 2\r\nContent-Length: {}\r\n\r\n{{}}{EVIL}", EVIL.len() + 2)),
        (
            "two lengths, the longer first",
            format!("{json}Content-Length: {}\r\nContent-Length: 2\r\n\r\n{{}}{EVIL}", EVIL.len() + 2),
        ),
        ("a list of lengths", format!("{json}Content-Length: 2, {}\r\n\r\n{{}}{EVIL}", EVIL.len() + 2)),
        (
            "a length and chunks",
            format!("{json}Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n{EVIL}"),
        ),
        (
            "chunks and a length",
            format!("{json}Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n{EVIL}"),
        ),
        ("a length with a sign", format!("{json}Content-Length: +2\r\n\r\n{{}}{EVIL}")),
        ("a negative length", format!("{json}Content-Length: -2\r\n\r\n{{}}{EVIL}")),
        ("an unknown coding", format!("{json}Transfer-Encoding: xchunked\r\nContent-Length: 2\r\n\r\n{{}}{EVIL}")),
        ("more than was asked", format!("{json}Content-Length: 2\r\n\r\n{{}}{EVIL}")),
        ("more than was asked, in chunks", format!("{json}Transfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n{EVIL}")),
        ("a body of a 204", format!("HTTP/1.1 204 No Content\r\nContent-Length: {}\r\n\r\n{EVIL}", EVIL.len())),
        ("a body of a 304", format!("HTTP/1.1 304 Not Modified\r\n\r\n{EVIL}")),
        (
            "an upgrade that nobody asked for",
            format!("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n{EVIL}"),
        ),
        ("a header that is two", format!("{json}X-A: a\rContent-Length: 0\r\nContent-Length: 2\r\n\r\n{{}}{EVIL}")),
        ("no HTTP", format!("HELO\r\n\r\n{EVIL}")),
    ] {
        let orders = Service::start(move |request, _| match request.starts_with("GET /api/Orders/last ") {
            true => json_answer("\"mine\""),
            false => Reply::Answer(reply.clone()),
        })
        .await;
        let shop = Shop::start(&[&orders.url], &[&nobody()]).await;
        // Others ask over the same connections meanwhile.
        for n in 0..8 {
            let both = "GET /api/OrdersProxy/1 HTTP/1.1\r\nHost: a\r\n\r\n\
                        GET /api/OrdersProxy/last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
            let mut stream = tokio::net::TcpStream::connect(shop.address()).await.unwrap();
            stream.write_all(both.as_bytes()).await.unwrap();
            let answered = rest(&mut stream).await;
            assert!(statuses(&answered).len() <= 2 && !answered.is_empty(), "{name}, {n}: {answered}");
            assert!(answered.ends_with("\r\n\r\n\"mine\""), "{name}, {n}: {answered}");
            assert!(!answered.split("\r\n\r\n").any(|part| part.starts_with("\"evil\"")), "{name}, {n}: {answered}");
        }
    }
}

/// Red where what the framework's decoder makes of such an answer, an empty one, is passed on.
#[tokio::test]
async fn an_answer_that_only_the_end_of_its_connection_ends_is_passed_on_where_it_looks_whole() {
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n";
    let whole = Service::start(move |_, _| Reply::Cut(format!("{head}[1,2]"))).await;
    let old = Service::start(move |_, _| Reply::Cut(format!("{}[1,2]", head.replace("HTTP/1.1", "HTTP/1.0")))).await;
    let cut = Service::start(move |_, _| Reply::Cut(format!("{head}[1,2"))).await;
    let shop = Shop::start(&[&whole.url], &[&old.url]).await;
    assert_eq!(shop.get("/api/OrdersProxy").await.text().await.unwrap(), "[1,2]");
    assert_eq!(shop.get("/api/PaymentsProxy/u/balance").await.text().await.unwrap(), "[1,2]");
    let shop = Shop::start(&[&cut.url], &[&nobody()]).await;
    assert_eq!(problem(shop.get("/api/OrdersProxy").await).await, code(503, "upstream_unavailable"));
}
