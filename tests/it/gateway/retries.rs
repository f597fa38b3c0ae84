//! Replicas that are away, hung or broken: what is asked again, where, and what the client gets.

use std::time::{Duration, Instant};

use futures::future::join_all;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use super::service::{
    Reply, Service, Shop, TIMEOUT, answer, code, header, json_answer, nobody, problem, read_message, reserved, silent,
};
use crate::support::shop::{PATIENCE, poll};

/// Half of [`TIMEOUT`]: who takes longer has waited for something in vain.
const AT_ONCE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_service_that_refuses_is_unavailable_at_once() {
    let shop = Shop::start(&[&nobody(), &nobody()], &[&nobody()]).await;
    let began = Instant::now();
    assert_eq!(problem(shop.get("/api/OrdersProxy").await).await, code(503, "upstream_unavailable"));
    assert_eq!(problem(shop.post("/api/OrdersProxy", "{}").await).await, code(503, "upstream_unavailable"));
    assert_eq!(problem(shop.get("/api/PaymentsProxy/u1/balance").await).await, code(503, "upstream_unavailable"));
    assert!(began.elapsed() < AT_ONCE, "{:?}", began.elapsed());
}

/// One whose address is nobody's any more, or whose queue is full, swallows what begins a connection: it does not answer, and that is no refusal.
#[tokio::test]
async fn a_service_that_takes_no_connection_and_refuses_none_is_late() {
    let (url, _waiting, _listener) = silent().await;
    let shop = Shop::start(&[&url], &[&url]).await;
    let began = Instant::now();
    assert_eq!(problem(shop.get("/api/OrdersProxy").await).await, code(504, "upstream_timeout"));
    assert!(began.elapsed() < AT_ONCE, "{:?}", began.elapsed());
    // Nothing was sent to it, so another one is asked.
    let well = Service::start(|_, _| json_answer("1")).await;
    let shop = Shop::start(&[&url, &well.url], &[&url]).await;
    assert_eq!(shop.post("/api/OrdersProxy", "{}").await.text().await.unwrap(), "1");
}

#[tokio::test]
async fn a_service_that_hangs_times_out_within_the_bound() {
    const WAITS: Duration = Duration::from_secs(3);
    let hung = Service::start(|_, _| Reply::Hang).await;
    let shop = Shop::start_waiting(&[&hung.url], &[&hung.url, &hung.url], WAITS).await;
    // All at once, so that the bound may be a long one.
    let asked = ["GET /api/OrdersProxy", "POST /api/OrdersProxy", "GET /api/PaymentsProxy/u1/balance"].map(async |asked| {
        let began = Instant::now();
        let answered = match asked.split_once(' ').unwrap() {
            ("GET", path) => shop.get(path).await,
            (_, path) => shop.post(path, "{}").await,
        };
        assert_eq!(problem(answered).await, code(504, "upstream_timeout"), "{asked}");
        let elapsed = began.elapsed();
        assert!(elapsed >= WAITS && elapsed < WAITS * 2, "{asked}: {elapsed:?}");
    });
    join_all(asked).await;
}

#[tokio::test]
async fn an_answer_that_is_cut_off_is_never_passed_on_as_whole() {
    let cuts = [
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n[1,2",
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n[1,2\r\n",
        "HTTP/1.1 200 OK\r\nContent-Ty",
    ];
    for cut in cuts {
        let broken = Service::start(move |_, _| Reply::Cut(cut.to_owned())).await;
        let well = Service::start(|_, _| json_answer("[1,2,3]")).await;
        let shop = Shop::start(&[&broken.url], &[&broken.url, &well.url]).await;
        assert_eq!(problem(shop.get("/api/OrdersProxy").await).await, code(503, "upstream_unavailable"), "{cut}");
        for _ in 0..2 {
            assert_eq!(shop.get("/api/PaymentsProxy/u1/balance").await.text().await.unwrap(), "[1,2,3]", "{cut}");
        }
    }
}

#[tokio::test]
async fn a_get_is_tried_on_another_replica() {
    let well = Service::start(|_, _| json_answer("1")).await;
    let closing = Service::start(|_, _| Reply::Close).await;
    let hung = Service::start(|_, _| Reply::Hang).await;
    // A try at the hung one takes half of its time.
    let in_vain = Duration::from_secs(4);
    for (bad, timeout) in [(nobody(), TIMEOUT), (closing.url, TIMEOUT), (hung.url, in_vain)] {
        let shop = Shop::start_waiting(&[&bad, &well.url], &[&well.url, &bad], timeout).await;
        for _ in 0..4 {
            let both = ["/api/OrdersProxy", "/api/PaymentsProxy/u1/balance"].map(async |path| shop.get(path).await.text().await);
            for answered in join_all(both).await {
                assert_eq!(answered.unwrap(), "1", "{bad}");
            }
        }
    }
}

#[tokio::test]
async fn a_replica_that_comes_back_is_asked_again_soon() {
    let (away, socket) = reserved();
    let well = Service::start(|_, _| json_answer("1")).await;
    let shop = Shop::start(&[&away, &well.url], &[&well.url]).await;
    for _ in 0..4 {
        assert_eq!(shop.get("/api/OrdersProxy").await.status(), StatusCode::OK);
    }
    let back = socket.listen(8).unwrap();
    let answers = async {
        loop {
            let (mut stream, _) = back.accept().await.unwrap();
            // A check that was given up has said nothing, or hears nothing any more.
            let Some(request) = read_message(&mut stream).await else { continue };
            let body = if request.starts_with("GET /health/live ") { "" } else { "back" };
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    };
    let asking = async { while shop.get("/api/OrdersProxy").await.text().await.unwrap() != "back" {} };
    let asked_again = async {
        tokio::select! {
            () = answers => {}
            () = asking => {}
        }
    };
    // That an ejection ends within a second is asserted in the gateway's `health.rs`. Where a check comes first, the replica gets so
    // little at first that one request at a time reaches it after five seconds only.
    tokio::time::timeout(Duration::from_secs(15), asked_again).await.expect("it is asked again");
}

#[tokio::test]
async fn a_kept_connection_that_the_service_just_closed_costs_a_get_nothing() {
    // The first request of each connection is answered, the next one is met by its end: as when an idle connection is closed.
    let closing = Service::start(|_, number| if number == 0 { json_answer("1") } else { Reply::Close }).await;
    let shop = Shop::start(&[&closing.url], &[&closing.url]).await;
    for _ in 0..6 {
        assert_eq!(shop.get("/api/OrdersProxy").await.text().await.unwrap(), "1");
    }
}

#[tokio::test]
async fn the_gateway_is_ready_when_any_replica_of_each_service_is_live() {
    let well = Service::start(|_, _| Reply::Close).await;
    let shop = Shop::start(&[&nobody(), &well.url], &[&well.url]).await;
    let began = Instant::now();
    // A probe of the gateway's has one second, which a busy machine may take away.
    while shop.get("/health/ready").await.status() != StatusCode::OK {
        assert!(began.elapsed() < PATIENCE, "it is not ready");
        poll().await;
    }
    let shop = Shop::start(&[&well.url], &[&nobody()]).await;
    let unready = shop.get("/health/ready").await;
    assert_eq!(unready.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(unready.json::<Value>().await.unwrap()["missing"], json!(["payments"]));
    assert_eq!(shop.get("/health/live").await.status(), StatusCode::OK);
}

pub fn in_progress() -> Reply {
    answer("409 Conflict", "Content-Type: application/problem+json\r\n", r#"{"code":"idempotency_in_progress","status":409}"#)
}

/// One way of failing.
struct Outage {
    name: &'static str,
    url: String,
    /// What a client gets where there is no other replica.
    alone: (u16, &'static str),
    /// What the gateway waits; short where it is waited for in vain.
    timeout: Duration,
    /// How long that takes at most, with what a busy machine adds.
    within: Duration,
}

/// Each way of failing that a client can meet; `waits` is for those that say nothing.
async fn outages(waits: Duration) -> Vec<Outage> {
    let told = |name, url| Outage { name, url, alone: (503, "upstream_unavailable"), timeout: TIMEOUT, within: AT_ONCE };
    let silent = |name, url| Outage { name, url, alone: (504, "upstream_timeout"), timeout: waits, within: waits * 2 };
    let mut all = vec![told("killed", nobody())];
    type Case = (&'static str, fn() -> Reply);
    let broken: [Case; 5] = [
        ("closing before it answers", || Reply::Close),
        ("closing in its head", || Reply::Cut("HTTP/1.1 200 OK\r\nContent-Ty".into())),
        ("closing in its body", || {
            Reply::Cut("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n[1,2".into())
        }),
        ("answering garbage", || Reply::Answer("\u{16}\u{3}\u{1} what is this\r\n\r\n".into())),
        ("switching protocols unasked", || {
            Reply::Answer("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n".into())
        }),
    ];
    for (name, reply) in broken {
        all.push(told(name, Service::start(move |_, _| reply()).await.url));
    }
    all.push(silent("hung", Service::start_hung().await.url));
    let slow = move |_: &str, _| Reply::Slow(waits * 2, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1".into());
    all.push(silent("too slow", Service::start(slow).await.url));
    all
}

#[tokio::test]
async fn with_one_replica_every_outage_has_its_answer_in_its_time() {
    for outage in outages(Duration::from_secs(2)).await {
        let shop = Shop::start_waiting(&[&outage.url], &[&outage.url], outage.timeout).await;
        // Both at once, of two services, so that those which say nothing may be waited for longer.
        let answers = ["GET", "POST"].map(async |method| {
            let began = Instant::now();
            let answered = match method {
                "GET" => shop.get("/api/OrdersProxy").await,
                _ => shop.post("/api/PaymentsProxy/u1/deposit", "1").await,
            };
            let (status, name) = outage.alone;
            assert_eq!(problem(answered).await, code(status, name), "{method}, {}", outage.name);
            let elapsed = began.elapsed();
            println!("| {} | {method} | one replica | {status} `{name}` | {} ms |", outage.name, elapsed.as_millis());
            assert!(elapsed <= outage.within, "{method}, {}: {elapsed:?}", outage.name);
        });
        join_all(answers).await;
        assert_eq!(shop.get("/health/live").await.status(), StatusCode::OK, "{}", outage.name);
    }
}

#[tokio::test]
async fn with_another_replica_no_outage_costs_a_request() {
    let well = Service::start(|_, _| json_answer("1")).await;
    // A try at one that says nothing takes half of this, so all ways are tried at once.
    let ways = outages(Duration::from_secs(4)).await.into_iter().map(async |outage| {
        let shop = Shop::start_waiting(&[&outage.url, &well.url], &[&well.url, &outage.url], outage.timeout).await;
        let mut slowest = Duration::ZERO;
        for _ in 0..6 {
            let began = Instant::now();
            assert_eq!(shop.get("/api/OrdersProxy").await.text().await.unwrap(), "1", "{}", outage.name);
            assert_eq!(shop.post("/api/OrdersProxy", "{}").await.text().await.unwrap(), "1", "{}", outage.name);
            assert_eq!(shop.post("/api/PaymentsProxy/u1/deposit", "1").await.text().await.unwrap(), "1", "{}", outage.name);
            slowest = slowest.max(began.elapsed());
        }
        println!("| {} | GET, POST | two replicas | 200 | three requests in {} ms at most |", outage.name, slowest.as_millis());
    });
    join_all(ways).await;
}

#[tokio::test]
async fn a_post_is_repeated_under_one_key_and_one_stamp_with_the_same_body() {
    let closing = Service::start(|_, _| Reply::Close).await;
    let well = Service::start(|_, _| json_answer("1")).await;
    let shop = Shop::start(&[&closing.url, &well.url], &[&nobody()]).await;
    let body = "{\"userId\":\"u1\",  \"amount\":1.50}";
    while closing.requests().is_empty() {
        assert_eq!(shop.post("/api/OrdersProxy", body).await.status(), StatusCode::OK);
    }
    let (first, second) = (closing.requests().pop().unwrap(), well.requests().pop().unwrap());
    for request in [&first, &second] {
        assert!(request.ends_with(&format!("\r\n\r\n{body}")), "{request}");
    }
    let key = header(&first, "idempotency-key").unwrap();
    assert_eq!(uuid::Uuid::parse_str(&key).unwrap().get_version_num(), 7);
    for name in ["idempotency-key", "x-shopd-stamp"] {
        assert_eq!(header(&first, name).as_deref(), Some(&*key), "{name}");
        assert_eq!(header(&second, name).as_deref(), Some(&*key), "{name}");
    }
    // The next request is another one.
    shop.post("/api/OrdersProxy", body).await;
    let all = [closing.requests(), well.requests()].concat();
    assert!(all.iter().any(|request| header(request, "idempotency-key").as_deref() != Some(&*key)));
    // A key of the client's stays; the stamp is the gateway's all the same.
    let own = shop.client.post(shop.url("/api/OrdersProxy")).header("Idempotency-Key", "mine").header("X-Shopd-Stamp", "theirs");
    assert_eq!(own.body("{}").send().await.unwrap().status(), StatusCode::OK);
    let request = well.requests().pop().unwrap();
    assert_eq!(header(&request, "idempotency-key").as_deref(), Some("mine"));
    assert!(uuid::Uuid::parse_str(&header(&request, "x-shopd-stamp").unwrap()).is_ok());
}

#[tokio::test]
async fn a_post_over_a_kept_connection_that_was_just_closed_is_sent_again_under_its_key() {
    let closing = Service::start(|_, number| if number == 0 { json_answer("1") } else { Reply::Close }).await;
    let shop = Shop::start(&[&closing.url], &[&closing.url]).await;
    for _ in 0..4 {
        assert_eq!(shop.post("/api/OrdersProxy", "{}").await.status(), StatusCode::OK);
    }
    let keys: Vec<_> = closing.requests().iter().map(|request| header(request, "idempotency-key").unwrap()).collect();
    let mut distinct = keys.clone();
    distinct.dedup();
    assert!(keys.len() > 4 && distinct.len() == 4, "{keys:?}");
}

#[tokio::test]
async fn an_earlier_try_that_is_still_running_is_waited_out() {
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let busy = Service::start(move |_, _| match asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
        0..3 => in_progress(),
        _ => json_answer("1"),
    })
    .await;
    let shop = Shop::start(&[&busy.url], &[&busy.url]).await;
    assert_eq!(shop.post("/api/PaymentsProxy/u1/deposit", "1").await.text().await.unwrap(), "1");
    assert!(busy.is_asked(4));
    let forever = Service::start(|_, _| in_progress()).await;
    let waits = Duration::from_secs(2);
    let shop = Shop::start_waiting(&[&forever.url], &[&forever.url], waits).await;
    let began = Instant::now();
    assert_eq!(problem(shop.post("/api/PaymentsProxy/u1/deposit", "1").await).await, code(504, "upstream_timeout"));
    assert!(began.elapsed() <= waits + Duration::from_secs(6), "{:?}", began.elapsed());
    // Nor does the client hear of a key that is none of its own where what follows says nothing.
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let dies = Service::start(move |_, _| match asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
        0 => in_progress(),
        _ => Reply::Close,
    })
    .await;
    let shop = Shop::start(&[&nobody()], &[&dies.url]).await;
    let (status, _) = problem(shop.post("/api/PaymentsProxy/u1/deposit", "1").await).await;
    assert!([503, 504].contains(&status), "{status}");
    // Under the client's own key it is another request of theirs that runs, and they are told so.
    let shop = Shop::start_waiting(&[&forever.url], &[&forever.url], waits).await;
    let own = shop.client.post(shop.url("/api/PaymentsProxy/u1/deposit")).header("Idempotency-Key", "mine").body("1");
    let asked = forever.requests().len();
    assert_eq!(own.send().await.unwrap().status(), StatusCode::CONFLICT);
    assert!(forever.is_asked(asked + 1));
}

#[tokio::test]
async fn a_replica_that_cannot_work_is_passed_over_and_its_answer_stands_where_no_other_can() {
    let unable = || Service::start(|_, _| answer("503 Service Unavailable", "Retry-After: 7\r\n", "no"));
    let (first, second) = (unable().await, unable().await);
    let well = Service::start(|_, _| json_answer("1")).await;
    let shop = Shop::start(&[&first.url, &well.url], &[&first.url, &second.url]).await;
    for _ in 0..8 {
        assert_eq!(shop.get("/api/OrdersProxy").await.text().await.unwrap(), "1");
    }
    let answered = shop.get("/api/PaymentsProxy/u1/balance").await;
    assert_eq!((answered.status().as_u16(), answered.headers()["retry-after"].to_str().unwrap()), (503, "7"));
    assert_eq!(answered.text().await.unwrap(), "no");
}

#[tokio::test]
async fn a_hung_replica_is_found_by_its_checks_and_what_waits_there_is_asked_elsewhere() {
    // A stall of the machine makes the checks of the one that is well late, too. Three times of five is no luck.
    let (mut times, mut failed) = (0, Vec::new());
    while times < 3 {
        match found_by_its_checks().await {
            Ok(()) => times += 1,
            Err(this_time) => failed.push(this_time),
        }
        assert!(failed.len() < 3, "{failed:?}");
    }
}

async fn found_by_its_checks() -> Result<(), String> {
    let hung = Service::start_hung().await;
    let well = Service::start(|_, _| json_answer("1")).await;
    let shop =
        Shop::start_with(&[&hung.url, &well.url], &[&nobody()], |config| config.upstream_timeout = Duration::from_secs(20)).await;
    let began = Instant::now();
    // Some of these land on the hung one; half of the bound would be ten seconds.
    let all = (0..8).map(|_| shop.get("/api/OrdersProxy"));
    for answered in join_all(all).await {
        assert_eq!(answered.text().await.unwrap(), "1");
    }
    let (took, asked) = (began.elapsed(), hung.requests().len());
    if asked == 0 || took >= Duration::from_secs(5) {
        return Err(format!("{asked} asked it, all were answered after {took:?}"));
    }
    // Now it is known.
    let began = Instant::now();
    for _ in 0..20 {
        assert_eq!(shop.get("/api/OrdersProxy").await.status(), StatusCode::OK);
    }
    let took = began.elapsed();
    if !hung.is_asked(asked) || took >= Duration::from_secs(1) {
        return Err(format!("{asked} asked it, then {}; twenty more took {took:?}", hung.requests().len()));
    }
    Ok(())
}
