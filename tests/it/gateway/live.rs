//! Streams through the gateway: they flow as they come, have no bound in time, and a socket outlives the replica that feeds it.

use std::time::Duration;

use awc::ws::Frame;
use futures::StreamExt;
use reqwest::StatusCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::support::shop::poll;

use super::service::{Reply, Service, Shop, TIMEOUT, answer, code, header, nobody, problem};

const HEAD: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";

fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

fn event(id: u32) -> String {
    chunk(&format!("id: {id}\ndata: {{\"n\":{id}}}\n\n"))
}

/// A stream of the service's: its head at once, then what is sent to it.
fn stream() -> (mpsc::Sender<String>, Reply) {
    let (pieces, reply) = mpsc::channel(16);
    pieces.try_send(HEAD.to_owned()).unwrap();
    (pieces, Reply::Pieces(reply))
}

#[tokio::test]
async fn a_stream_of_events_flows_as_it_comes_and_has_no_bound() {
    let (feed, reply) = stream();
    let reply = std::sync::Mutex::new(Some(reply));
    let orders = Service::start(move |_, _| reply.lock().unwrap().take().unwrap()).await;
    let bound = Duration::from_secs(2);
    let shop = Shop::start_waiting(&[&orders.url], &[&nobody()], bound).await;
    let asked =
        shop.client.get(shop.url("/api/OrdersProxy/1/events")).header("Last-Event-ID", "7").header("Accept-Encoding", "gzip");
    // Its head comes though nothing is fed.
    let answered = tokio::time::timeout(TIMEOUT, asked.send()).await.expect("its head").unwrap();
    assert_eq!((answered.status(), answered.headers()["content-type"].to_str().unwrap()), (StatusCode::OK, "text/event-stream"));
    assert!(!answered.headers().contains_key("content-encoding"));
    assert_eq!(header(&orders.requests()[0], "last-event-id").as_deref(), Some("7"));
    let mut body = answered.bytes_stream();
    let mut until = bound * 5 / 4;
    for id in [8, 9] {
        tokio::time::sleep(until).await; // longer than any request may take
        feed.send(event(id)).await.unwrap();
        let piece = tokio::time::timeout(TIMEOUT, body.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(piece, format!("id: {id}\ndata: {{\"n\":{id}}}\n\n"));
        until = Duration::ZERO;
    }
    feed.send("0\r\n\r\n".into()).await.unwrap();
    assert!(body.next().await.is_none());
}

#[tokio::test]
async fn a_gateway_that_stops_ends_its_streams_at_once() {
    let (_feed, reply) = stream();
    let reply = std::sync::Mutex::new(Some(reply));
    let orders = Service::start(move |_, _| reply.lock().unwrap().take().unwrap()).await;
    // What ends within the first is not ended by the second.
    let (at_once, drain) = (Duration::from_secs(20), Duration::from_secs(60));
    let shop = Shop::start_draining(&[&orders.url], &[&nobody()], drain, |_| {}).await;
    let mut body = shop.get("/api/OrdersProxy/events?userId=u1").await.bytes_stream();
    shop.stop();
    let ended = tokio::time::timeout(at_once, body.next()).await.expect("it ends");
    assert!(ended.is_none_or(|piece| piece.is_err()), "nothing more comes");
}

#[actix_web::test]
async fn a_socket_is_fed_from_the_stream_and_outlives_its_replica() {
    // The first stream breaks in the middle, the second one says that it is closing, the third has nothing more to say.
    let said = std::sync::Mutex::new(0);
    let orders = Service::start(move |_, _| {
        let mut said = said.lock().unwrap();
        *said += 1;
        match *said {
            1 => Reply::Cut(format!("{HEAD}{}{}", event(1), "30\r\nid: 9\nda")),
            2 => Reply::Cut(format!(
                "{HEAD}{}{}{}0\r\n\r\n",
                chunk(": keep-alive\n\n"),
                event(2),
                chunk("event: closing\ndata: {}\n\n")
            )),
            3 => Reply::Close,
            4 => Reply::Cut(format!("{HEAD}{}0\r\n\r\n", event(3))),
            _ => answer("204 No Content", "", ""),
        }
    })
    .await;
    let shop = Shop::start(&[&orders.url], &[&nobody()]).await;
    let url = shop.url("/api/OrdersProxy/1/ws").replace("http://", "ws://");
    let (response, mut socket) = awc::Client::new().ws(url).connect().await.unwrap();
    assert_eq!(response.status().as_u16(), 101);
    let mut texts = Vec::new();
    let close = loop {
        match tokio::time::timeout(Duration::from_secs(10), socket.next()).await.expect("in time") {
            Some(Ok(Frame::Text(text))) => texts.push(String::from_utf8(text.to_vec()).unwrap()),
            Some(Ok(Frame::Close(reason))) => break reason,
            Some(Ok(_)) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(texts, ["{\"n\":1}", "{\"n\":2}", "{\"n\":3}"]);
    assert_eq!(close.map(|reason| reason.code), Some(awc::ws::CloseCode::Normal));
    let requests = orders.requests();
    assert!(requests.iter().all(|request| request.starts_with("GET /api/Orders/1/events HTTP/1.1\r\n")));
    let last = |request: &String| header(request, "last-event-id").unwrap_or_default();
    assert_eq!(requests.iter().map(last).collect::<Vec<_>>(), ["", "1", "2", "2", "3"]);
}

/// Red where the end of the stream alone says that it is over: whoever would say so again is gone.
#[actix_web::test]
async fn a_socket_closes_behind_the_last_state_whatever_becomes_of_its_service() {
    let streams = std::sync::atomic::AtomicUsize::new(0);
    let orders = Service::start(move |_, _| match streams.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
        0 => Reply::Cut(format!("{HEAD}{}{}", event(1), chunk("id: 2\ndata: {\"status\":\"Finished\"}\n\n"))),
        _ => Reply::Close,
    })
    .await;
    let shop = Shop::start(&[&orders.url], &[&nobody()]).await;
    let url = shop.url("/api/OrdersProxy/1/ws").replace("http://", "ws://");
    let (_, mut socket) = awc::Client::new().ws(url).connect().await.unwrap();
    let close = loop {
        match tokio::time::timeout(Duration::from_secs(10), socket.next()).await.expect("it closes") {
            Some(Ok(Frame::Close(reason))) => break reason,
            Some(Ok(_)) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(close.map(|reason| reason.code), Some(awc::ws::CloseCode::Normal));
    assert!(orders.is_asked(1), "{:?}", orders.requests());
}

/// Red where the stop is heard only between two pieces of a stream: this one's next comes from nobody, for half a minute.
#[actix_web::test]
async fn a_gateway_that_stops_ends_a_socket_at_once_that_looks_for_its_stream() {
    let streams = std::sync::atomic::AtomicUsize::new(0);
    let orders = Service::start(move |_, _| match streams.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
        0 => Reply::Cut(format!("{HEAD}{}", event(1))),
        _ => Reply::Close,
    })
    .await;
    let (at_once, drain) = (Duration::from_secs(20), Duration::from_secs(60));
    let shop = Shop::start_draining(&[&orders.url], &[&nobody()], drain, |_| {}).await;
    let url = shop.url("/api/OrdersProxy/1/ws").replace("http://", "ws://");
    let (_, mut socket) = awc::Client::new().ws(url).connect().await.unwrap();
    let since = std::time::Instant::now();
    while orders.requests().len() < 3 {
        assert!(since.elapsed() < TIMEOUT, "it looks for its stream again");
        poll().await;
    }
    shop.stop();
    let close = loop {
        match tokio::time::timeout(at_once, socket.next()).await.expect("at once") {
            Some(Ok(Frame::Close(reason))) => break reason,
            Some(Ok(_)) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(close.map(|reason| reason.code), Some(awc::ws::CloseCode::Away));
}

/// Red where the socket's stream always begins anew, as the client's own id is in the document.
#[actix_web::test]
async fn a_socket_goes_on_behind_the_event_that_its_client_names() {
    let orders = Service::start(|request, _| match header(request, "last-event-id").as_deref() {
        Some("1") => Reply::Cut(format!("{HEAD}{}0\r\n\r\n", event(2))),
        Some("2") => answer("204 No Content", "", ""),
        last => {
            let problem = format!(r#"{{"code":"invalid_request","detail":"{last:?}"}}"#);
            answer("400 Bad Request", "Content-Type: application/problem+json\r\n", &problem)
        }
    })
    .await;
    let shop = Shop::start(&[&orders.url], &[&nobody()]).await;
    let url = shop.url("/api/OrdersProxy/1/ws").replace("http://", "ws://");
    for (last, expected) in [("1", &["{\"n\":2}"][..]), ("2", &[])] {
        let asked = awc::Client::new().ws(&url).set_header("Last-Event-ID", last);
        let (_, mut socket) = asked.connect().await.expect("a socket");
        let mut texts = Vec::new();
        let close = loop {
            match tokio::time::timeout(Duration::from_secs(10), socket.next()).await.expect("in time") {
                Some(Ok(Frame::Text(text))) => texts.push(String::from_utf8(text.to_vec()).unwrap()),
                Some(Ok(Frame::Close(reason))) => break reason,
                Some(Ok(_)) => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(
            (texts, close.map(|reason| reason.code)),
            (expected.iter().map(ToString::to_string).collect(), Some(awc::ws::CloseCode::Normal))
        );
    }
    let refused = awc::Client::new().ws(&url).set_header("Last-Event-ID", "x").connect().await.map(drop).unwrap_err();
    assert!(format!("{refused:?}").contains("400"), "{refused:?}");
}

#[tokio::test]
async fn what_is_no_upgrade_or_no_order_is_refused_before_the_socket_opens() {
    let orders = Service::start(|request, _| match request.starts_with("GET /api/Orders/1/") {
        true => stream().1,
        false => answer("404 Not Found", "Content-Type: application/problem+json\r\n", "{\"code\":\"order_not_found\"}"),
    })
    .await;
    let shop = Shop::start(&[&orders.url], &[&nobody()]).await;
    assert_eq!(problem(shop.get("/api/OrdersProxy/1/ws").await).await, code(400, "invalid_request"));
    assert!(orders.requests().is_empty(), "nothing is opened for it");
    let upgrade = "GET /api/OrdersProxy/2/ws HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\
                   Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    let asked = std::time::Instant::now();
    let refused = shop.raw(upgrade).await;
    assert!(refused.starts_with("HTTP/1.1 404 ") && refused.contains("order_not_found"), "{refused}");
    // Of a version that is not spoken here it says which one is.
    let newer = upgrade.replace("/2/ws", "/1/ws").replace("Version: 13", "Version: 14");
    let refused = shop.raw(&newer).await.to_ascii_lowercase();
    assert!(refused.starts_with("http/1.1 400 ") && refused.contains("\r\nsec-websocket-version: 13\r\n"), "{refused}");
    // Such a request's body has no end; nobody waits for it, also where it names one.
    let named = "POST /api/OrdersProxy HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\
                 Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
    let refused = shop.raw(named).await;
    assert!(refused.starts_with("HTTP/1.1 400 ") && refused.contains("invalid_request"), "{refused}");
    assert!(asked.elapsed() < Duration::from_millis(1_800), "{:?}", asked.elapsed());
    assert!(orders.requests().iter().all(|request| request.starts_with("GET ")), "nothing of it went on");
}

/// Red where a stream is sent in chunks whoever asks: RFC 9112, 6.1.
#[tokio::test]
async fn a_client_that_knows_no_chunks_gets_a_stream_that_ends_with_its_connection() {
    let orders = Service::start(|_, _| Reply::Cut(format!("{HEAD}{}0\r\n\r\n", event(1)))).await;
    let shop = Shop::start(&[&orders.url], &[&nobody()]).await;
    let mut client = tokio::net::TcpStream::connect(shop.address()).await.unwrap();
    client.write_all(b"GET /api/OrdersProxy/1/events HTTP/1.0\r\nHost: a\r\n\r\n").await.unwrap();
    let mut answered = String::new();
    tokio::time::timeout(TIMEOUT, client.read_to_string(&mut answered)).await.expect("its end").unwrap();
    let (head, body) = answered.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(" 200 ") && !head.to_ascii_lowercase().contains("transfer-encoding"), "{head}");
    assert_eq!(body, "id: 1\ndata: {\"n\":1}\n\n");
}
