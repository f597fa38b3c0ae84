//! HTTP/2 with prior knowledge: that it is served, and what its own floods cost.

use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request, StatusCode};
use tokio::io::AsyncWriteExt;

use super::wire::{Edge, SHORT_HEAD, rest, statuses};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub async fn connect(edge: &Edge) -> (SendRequest<Bytes>, impl Future<Output = Result<(), h2::Error>> + use<>) {
    let (send, connection) = h2::client::handshake(edge.open().await).await.unwrap();
    (send.ready().await.unwrap(), connection)
}

async fn ask(send: &SendRequest<Bytes>, method: Method, path: &str, body: &'static str) -> (StatusCode, String) {
    let mut send = send.clone().ready().await.unwrap();
    let request = Request::builder().method(method).uri(format!("http://x{path}")).header("content-type", "application/json");
    let (answer, mut stream) = send.send_request(request.body(()).unwrap(), body.is_empty()).unwrap();
    if !body.is_empty() {
        stream.send_data(body.into(), true).unwrap();
    }
    let answer = answer.await.unwrap();
    let (head, mut body) = answer.into_parts();
    assert!(head.headers.contains_key("x-request-id") && head.headers.contains_key("date"), "{head:?}");
    let mut text = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.unwrap();
        body.flow_control().release_capacity(chunk.len()).unwrap();
        text.extend_from_slice(&chunk);
    }
    (head.status, String::from_utf8(text).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_port_speaks_http_2_to_who_knows_that_it_does() {
    let edge = Edge::start().await;
    let (send, connection) = connect(&edge).await;
    tokio::spawn(connection);
    let got = ask(&send, Method::GET, "/api/OrdersProxy/1", "").await;
    assert_eq!(got, (StatusCode::OK, r#"{"id":1}"#.to_owned()));
    assert_eq!(ask(&send, Method::POST, "/api/OrdersProxy", "{}").await.0, StatusCode::OK);
    assert!(edge.service.requests()[1].ends_with("\r\n\r\n{}"));
    assert_eq!(ask(&send, Method::HEAD, "/api/OrdersProxy/1", "").await, (StatusCode::OK, String::new()));
    let (status, body) = ask(&send, Method::GET, "/nowhere", "").await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert!(body.contains("route_not_found"), "{body}");
    let both = tokio::join!(ask(&send, Method::GET, "/api/OrdersProxy/2", ""), ask(&send, Method::GET, "/health/live", ""));
    assert_eq!((both.0.0, both.1.0), (StatusCode::OK, StatusCode::OK));
    edge.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_preface_that_comes_in_parts_is_waited_for_and_one_that_does_not_come_is_not() {
    let edge = Edge::start().await;
    let mut stream = edge.open().await;
    for byte in PREFACE {
        stream.write_all(&[*byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    // An empty SETTINGS; the server's own comes back.
    stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
    let mut frame = [0; 9];
    tokio::time::timeout(Duration::from_secs(20), tokio::io::AsyncReadExt::read_exact(&mut stream, &mut frame))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(frame[3], 4, "{frame:?}");

    let edge = Edge::with_head_time(SHORT_HEAD).await;
    let began = std::time::Instant::now();
    let mut half = edge.open().await;
    half.write_all(&PREFACE[..11]).await.unwrap();
    assert_eq!(rest(&mut half).await, "");
    assert!(began.elapsed() < SHORT_HEAD * 10, "{:?}", began.elapsed());
    let answered = edge.told(b"PRI * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
    assert!(statuses(&answered)[0].starts_with('4'), "{answered}");
    edge.serves().await;
}

/// By the library's bound on streams that were taken back before we saw them, or by ours on those that we began to answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_back_everything_it_asks_loses_its_connection() {
    let edge = Edge::start().await;
    let (send, connection) = connect(&edge).await;
    let connection = tokio::spawn(connection);
    let mut sent = 0;
    for _ in 0..20_000 {
        let Ok(mut ready) = send.clone().ready().await else { break };
        let request = Request::builder().uri("http://x/api/OrdersProxy/1").body(()).unwrap();
        let Ok((_, mut stream)) = ready.send_request(request, true) else { break };
        stream.send_reset(h2::Reason::CANCEL);
        sent += 1;
    }
    let ended = tokio::time::timeout(Duration::from_secs(40), connection).await.expect("it ends").unwrap();
    assert!(sent < 20_000 && ended.is_err(), "{sent} {ended:?}");
    edge.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_list_that_is_too_large_is_refused_as_over_http_1_and_the_connection_lives_on() {
    let edge = Edge::start().await;
    let (send, connection) = connect(&edge).await;
    tokio::spawn(connection);
    let with = |lines: usize, bytes: usize| {
        let request = Request::builder().uri("http://x/api/OrdersProxy/1").header("x-request-id", "mine");
        (0..lines).fold(request, |request, n| request.header(format!("x-{n}"), "a".repeat(bytes))).body(()).unwrap()
    };
    let answered = async |request: Request<()>| {
        let mut ready = send.clone().ready().await.unwrap();
        let (answer, _) = ready.send_request(request, true).unwrap();
        tokio::time::timeout(Duration::from_secs(20), answer).await.unwrap()
    };
    for request in [with(20, 8_000), with(9, 8_000), with(96, 1)] {
        let answer = answered(request).await.unwrap();
        assert_eq!(answer.status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
        for (name, value) in [("content-type", "application/problem+json"), ("x-request-id", "mine")] {
            assert_eq!(answer.headers()[name], value);
        }
        let body = answer.into_body().data().await.unwrap().unwrap();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((&body["code"], &body["instance"]), (&"head_too_large".into(), &"/api/OrdersProxy/1".into()));
    }
    // More than is read at all.
    match answered(with(40, 8_000)).await {
        Ok(answer) => assert_eq!(answer.status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
        Err(error) => assert!(error.is_reset() || error.is_go_away(), "{error}"),
    }
    assert!(edge.service.is_asked(0));
    assert_eq!(answered(with(7, 8_000)).await.unwrap().status(), StatusCode::OK);
    assert!(edge.service.is_asked(1));
    edge.serves().await;
}
