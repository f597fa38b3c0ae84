//! Clients that are slow on purpose.

use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::wire::{Edge, SHORT_HEAD, read_until, rest, statuses};
use super::{POST, SMUGGLED};
use crate::gateway::service::{Service, json_answer};

/// Red on the second connection where only a connection's first head has a bound, as in the framework.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_does_not_come_is_told_so_on_a_new_connection_and_on_a_kept_one() {
    let edge = Edge::with_head_time(SHORT_HEAD).await;
    for kept in [false, true] {
        let mut stream = edge.open().await;
        if kept {
            stream.write_all(b"GET /api/OrdersProxy/1 HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
            read_until(&mut stream, r#"{"id":1}"#).await;
        }
        let began = Instant::now();
        let (mut reader, mut writer) = stream.into_split();
        let dribble = async {
            for byte in b"GET /api/OrdersProxy/1 HTTP/1.1\r\nHost: x\r\nX-A: aaaaaaaaaaaaaaaaaaaaaaaaaaa".iter().cycle() {
                if writer.write_all(&[*byte]).await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let mut answered = String::new();
        let read = tokio::time::timeout(Duration::from_secs(40), reader.read_to_string(&mut answered));
        tokio::select! {
            read = read => drop(read.expect("it is told in time")),
            () = dribble => {}
        }
        assert_eq!(statuses(&answered), ["408"], "kept {kept}: {answered}");
        assert!(answered.contains(r#""code":"request_timeout""#) && answered.contains("\r\nconnection: close"), "{answered}");
        assert!(began.elapsed() < SHORT_HEAD * 10, "{:?}", began.elapsed());
    }
    edge.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_heads_that_never_end_cost_little_and_hold_nobody_up() {
    const HALF_OPEN: usize = 10_000;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    // Long enough that they are open together on a busy machine, too.
    let edge = Edge::with_head_time(SHORT_HEAD * 10).await;
    edge.serves().await;
    let (before, descriptors) = (edge.resident_mib(), edge.descriptors());
    let mut half = Vec::new();
    for _ in 0..HALF_OPEN {
        let mut stream = edge.open().await;
        stream.write_all(b"GET /api/OrdersProxy/1 HTTP/1.1\r\nHost: x\r\nX-A: ").await.unwrap();
        half.push(stream);
    }
    // Else it would be measured what a few cost.
    edge.until("they are open together", |edge| edge.descriptors() >= descriptors + HALF_OPEN * 9 / 10).await;
    let began = Instant::now();
    edge.serves().await;
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    let during = edge.resident_mib();
    assert!(during < before + 400, "{before} MiB before, {during} MiB during");
    edge.until("all are closed", |edge| edge.descriptors() <= descriptors + 4).await;
    println!("{HALF_OPEN} half-open heads: {before} MiB before, {during} MiB during, {} MiB after", edge.resident_mib());
    edge.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_never_ends_ends_in_bounded_time() {
    let edge = Edge::with_upstream_time(Duration::from_secs(4)).await;
    // Not before it has opened what it needs itself.
    edge.serves().await;
    let descriptors = edge.descriptors();
    for head in [
        format!("{POST}Transfer-Encoding: chunked\r\n\r\n"),
        // Refused unread; the rest is drained within its own bound.
        "POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(),
        format!("{POST}Content-Length: 10\r\n\r\n"),
    ] {
        let mut stream = edge.open().await;
        stream.write_all(head.as_bytes()).await.unwrap();
        let (mut reader, mut writer) = stream.into_split();
        let chunks = head.contains("chunked");
        let dribble = async {
            loop {
                let chunk: &[u8] = if chunks { b"1\r\na\r\n" } else { b"" };
                if writer.write_all(chunk).await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let mut answered = String::new();
        let read = tokio::time::timeout(Duration::from_secs(40), reader.read_to_string(&mut answered));
        tokio::select! {
            read = read => drop(read.expect("it ends")),
            () = dribble => {}
        }
        assert!(statuses(&answered).iter().all(|status| status.starts_with('4')), "{head}: {answered}");
        assert_eq!(statuses(&answered).len(), 1, "{head}: {answered}");
    }
    edge.until("all are closed", |edge| edge.descriptors() <= descriptors + 4).await;
    assert!(edge.service.is_asked(1), "by nobody of those");
    edge.serves().await;
}

/// Red without the time that the kernel is given on the listening socket.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_reads_its_answer_loses_its_connection() {
    let large = format!("[\"{}\"]", "x".repeat(32 << 20));
    let service = Service::start(move |_, _| json_answer(&large)).await;
    let edge = Edge::before(service).await;
    let small = "GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    edge.told(small.as_bytes()).await;
    let descriptors = edge.descriptors();
    let mut stream = edge.open().await;
    stream.write_all(b"GET /api/OrdersProxy/1 HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    edge.until("it is asked", |edge| edge.service.is_asked(1)).await;
    edge.until("it is closed", |edge| edge.descriptors() <= descriptors).await;
    drop(stream);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_come_all_at_once_are_answered_one_by_one_and_in_order() {
    let edge = Edge::start().await;
    let many: String = (0..100).map(|n| format!("GET /api/OrdersProxy/{n} HTTP/1.1\r\nHost: x\r\n\r\n")).collect();
    let mut stream = edge.open().await;
    stream.write_all(format!("{many}BAD\r\n\r\n{SMUGGLED}").as_bytes()).await.unwrap();
    let answered = rest(&mut stream).await;
    let statuses = statuses(&answered);
    assert_eq!((statuses.len(), statuses[..100].iter().all(|status| *status == "200"), statuses[100]), (101, true, "400"));
    let asked: Vec<String> = edge.service.requests().iter().map(|asked| asked.lines().next().unwrap().to_owned()).collect();
    assert_eq!(asked, (0..100).map(|n| format!("GET /api/Orders/{n} HTTP/1.1")).collect::<Vec<_>>());
}
