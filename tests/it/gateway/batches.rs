//! Requests that travel together: each gets its own answer, and none is lost with the others.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use futures::future::join_all;
use reqwest::StatusCode;

use super::retries::in_progress;
use super::service::{Reply, Service, Shop, answer, header, nobody};
use crate::support::postgres;
use crate::support::shop::{All, Client, PATIENCE, raw_member};

const BATCH: &str = "POST /internal/batch ";
const TAKES: &str = "X-Shopd-Batch: 1\r\nContent-Type: application/json\r\n";
/// So many clients at once; some of them leave the gateway in the same moment.
const CLIENTS: usize = 24;

/// The requests that stand in a batch, or the one that came alone.
fn enclosed(request: &str) -> Vec<String> {
    if !request.starts_with(BATCH) {
        return vec![request.to_owned()];
    }
    let mut rest = request.split_once("\r\n\r\n").unwrap().1;
    let mut all = Vec::new();
    while !rest.is_empty() {
        let head = rest.find("\r\n\r\n").unwrap() + 4;
        let length: usize = header(rest, "content-length").unwrap().parse().unwrap();
        let (one, others) = rest.split_at(head + length);
        all.push(one.to_owned());
        rest = others;
    }
    all
}

fn body(request: &str) -> &str {
    request.split_once("\r\n\r\n").unwrap().1
}

/// What each request asked for, as a service of ours would answer.
fn echo(request: &str) -> String {
    let one = |body: &str| format!("HTTP/1.1 201 Created\r\n{TAKES}Content-Length: {}\r\n\r\n{body}", body.len());
    if !request.starts_with(BATCH) {
        return one(body(request));
    }
    let all: String = enclosed(request).iter().map(|each| one(body(each))).collect();
    format!("HTTP/1.1 200 OK\r\nContent-Type: application/http; msgtype=response\r\nContent-Length: {}\r\n\r\n{all}", all.len())
}

fn is_batch(request: &str) -> bool {
    request.starts_with(BATCH)
}

/// Asks for the numbers from `from`, all at once, and looks that each is answered with its own.
async fn ask_together(shop: &Shop, from: usize) {
    let asked = (from..from + CLIENTS).map(async |n| {
        let answered = shop.post("/api/OrdersProxy", n.to_string()).await;
        assert_eq!(answered.status(), StatusCode::CREATED, "{n}");
        assert!(!answered.headers().contains_key("x-shopd-batch"));
        assert_eq!(answered.text().await.unwrap(), n.to_string());
    });
    join_all(asked).await;
}

/// Asks until `service` has got a batch, and answers how many were asked.
async fn ask_until_batched(shop: &Shop, service: &Service) -> usize {
    let (began, mut asked) = (Instant::now(), 0);
    while !service.requests().iter().any(|request| is_batch(request)) {
        assert!(began.elapsed() < PATIENCE, "nothing travels together");
        ask_together(shop, asked).await;
        asked += CLIENTS;
    }
    asked
}

#[tokio::test]
async fn requests_that_leave_together_travel_together_and_each_gets_its_own_answer() {
    let orders = Service::start(|request, _| Reply::Answer(echo(request))).await;
    let shop = Shop::start(&[&orders.url], &[&nobody()]).await;
    let asked = ask_until_batched(&shop, &orders).await;
    let batch = orders.requests().into_iter().find(|request| is_batch(request)).unwrap();
    assert_eq!(header(&batch, "content-type").as_deref(), Some("application/http; msgtype=request"));
    assert!(enclosed(&batch).len() > 1);
    // As they would have come alone, each with its own names and time.
    let all: Vec<String> = orders.requests().iter().flat_map(|request| enclosed(request)).collect();
    for each in &all {
        assert!(each.starts_with("POST /api/Orders HTTP/1.1\r\n"), "{each}");
        assert!(header(each, "x-shopd-deadline-ms").is_some() && header(each, "traceparent").is_some(), "{each}");
        assert_eq!(header(each, "idempotency-key"), header(each, "x-shopd-stamp"));
    }
    let distinct = |name: &str| all.iter().map(|each| header(each, name).unwrap()).collect::<HashSet<_>>().len();
    assert_eq!((all.len(), distinct("x-shopd-stamp"), distinct("x-request-id")), (asked, asked, asked));
}

#[tokio::test]
async fn a_service_that_says_nothing_of_batches_gets_none() {
    let orders = Service::start(|request, _| Reply::Answer(echo(request).replace("X-Shopd-Batch: 1\r\n", ""))).await;
    let shop = Shop::start(&[&orders.url], &[&nobody()]).await;
    for round in 0..8 {
        ask_together(&shop, round * CLIENTS).await;
    }
    assert!(orders.is_asked(8 * CLIENTS) && !orders.requests().iter().any(|request| is_batch(request)));
}

#[tokio::test]
async fn what_reads_or_waits_or_is_large_goes_alone() {
    let orders = Service::start(|request, _| match request.starts_with("GET ") {
        true => answer("200 OK", TAKES, "1"),
        false => Reply::Answer(echo(request)),
    })
    .await;
    let shop = Shop::start(&[&orders.url], &[&nobody()]).await;
    ask_until_batched(&shop, &orders).await;
    let large = "1".repeat(5_000);
    for round in 0..4 {
        let own = async {
            join_all((0..CLIENTS).map(async |n| match n % 3 {
                0 => assert_eq!(shop.get("/api/OrdersProxy").await.text().await.unwrap(), "1"),
                1 => {
                    let waiting = shop.client.post(shop.url("/api/OrdersProxy")).header("Prefer", "wait=3").body("2");
                    assert_eq!(waiting.send().await.unwrap().text().await.unwrap(), "2");
                }
                _ => assert_eq!(shop.post("/api/OrdersProxy", large.clone()).await.text().await.unwrap(), large),
            }))
            .await
        };
        futures::future::join(own, ask_together(&shop, round * CLIENTS)).await;
    }
    for batch in orders.requests().iter().filter(|request| is_batch(request)) {
        for each in enclosed(batch) {
            assert!(each.starts_with("POST ") && header(&each, "prefer").is_none() && each.len() <= 4_096, "{each}");
        }
    }
}

#[tokio::test]
async fn where_a_batch_is_not_taken_or_breaks_each_of_its_requests_is_asked_alone_under_its_stamp() {
    type Case = (&'static str, fn(&str) -> Reply);
    let cases: [Case; 6] = [
        ("it is not known there", |_| answer("404 Not Found", "Content-Type: application/problem+json\r\n", "{}")),
        ("it is closed", |_| Reply::Close),
        ("it is cut between its answers", |request| {
            let whole = echo(request);
            let second = whole.match_indices("HTTP/1.1 201").nth(1).unwrap().0;
            Reply::Cut(whole[..second].to_owned())
        }),
        ("an answer is missing", |request| {
            let whole = echo(request);
            let inner = body(&whole).rfind("HTTP/1.1 201").unwrap();
            let fewer = &body(&whole)[..inner];
            answer("200 OK", "Content-Type: application/http; msgtype=response\r\n", fewer)
        }),
        ("its answers are garbage", |_| {
            answer("200 OK", "Content-Type: application/http; msgtype=response\r\n", "what is this\r\n\r\n")
        }),
        ("it is answered as one", |_| answer("200 OK", "Content-Type: application/json\r\n", "1")),
    ];
    for (name, reply) in cases {
        println!("{name}");
        let broke = Arc::new(AtomicBool::new(false));
        let breaks = broke.clone();
        let orders = Service::start(move |request, _| match request.starts_with(BATCH) && !breaks.swap(true, Ordering::SeqCst) {
            true => reply(request),
            false => Reply::Answer(echo(request)),
        })
        .await;
        // A second one is there for the one try that the budget counts.
        let shop = Shop::start(&[&orders.url, &orders.url], &[&nobody()]).await;
        let asked = ask_until_batched(&shop, &orders).await;
        let requests = orders.requests();
        let batch = enclosed(requests.iter().find(|request| is_batch(request)).unwrap());
        let stamps = |all: &[String]| all.iter().map(|each| header(each, "x-shopd-stamp").unwrap()).collect::<Vec<_>>();
        let all = stamps(&requests.iter().flat_map(|request| enclosed(request)).collect::<Vec<_>>());
        let alone = stamps(&requests.into_iter().filter(|request| !is_batch(request)).collect::<Vec<_>>());
        for stamp in stamps(&batch) {
            assert_eq!(all.iter().filter(|each| **each == stamp).count(), 2, "{name}");
        }
        // A kept connection that is closed says nothing: the batch goes over another one. Else one request at most goes elsewhere, with others.
        let went_alone = stamps(&batch).iter().filter(|stamp| alone.contains(stamp)).count();
        assert!(name == "it is closed" || went_alone >= batch.len() - 1, "{name}: {went_alone} of {}", batch.len());
        assert_eq!(all.into_iter().collect::<HashSet<_>>().len(), asked, "{name}");
    }
}

#[tokio::test]
async fn where_nobody_else_could_be_asked_a_broken_batch_costs_one_request_as_a_broken_connection_does() {
    let broke = Arc::new(AtomicBool::new(false));
    let breaks = broke.clone();
    let orders = Service::start(move |request, _| match request.starts_with(BATCH) && !breaks.swap(true, Ordering::SeqCst) {
        true => Reply::Cut("HTTP/1.1 200 OK\r\nContent-Le".to_owned()),
        false => Reply::Answer(echo(request)),
    })
    .await;
    let shop = Shop::start(&[&orders.url], &[&nobody()]).await;
    let (began, mut refused) = (Instant::now(), 0);
    while !broke.load(Ordering::SeqCst) {
        assert!(began.elapsed() < PATIENCE, "nothing travels together");
        let asked = (0..CLIENTS).map(async |n| shop.post("/api/OrdersProxy", n.to_string()).await.status());
        let statuses = join_all(asked).await;
        refused += statuses.iter().filter(|status| **status == StatusCode::SERVICE_UNAVAILABLE).count();
        assert!(statuses.iter().all(|status| [StatusCode::CREATED, StatusCode::SERVICE_UNAVAILABLE].contains(status)));
    }
    assert_eq!(refused, 1);
}

#[tokio::test]
async fn after_a_batch_that_broke_a_request_under_its_clients_own_key_waits_for_what_may_still_run_of_it() {
    let running = Arc::new(Mutex::new(HashSet::new()));
    let runs = running.clone();
    let orders = Service::start(move |request, _| {
        let mut running = runs.lock().unwrap();
        if is_batch(request) && running.is_empty() {
            running.extend(enclosed(request).iter().map(|each| header(each, "idempotency-key").unwrap()));
            return Reply::Cut("HTTP/1.1 200 OK\r\nContent-Le".to_owned());
        }
        // The service is still at it when it is asked the second time.
        match !is_batch(request) && running.remove(&header(request, "idempotency-key").unwrap()) {
            true => in_progress(),
            false => Reply::Answer(echo(request)),
        }
    })
    .await;
    let shop = Shop::start(&[&orders.url, &orders.url], &[&nobody()]).await;
    let (began, mut round) = (Instant::now(), 0);
    while !orders.requests().iter().any(|request| is_batch(request)) {
        assert!(began.elapsed() < PATIENCE, "nothing travels together");
        let asked = (0..CLIENTS).map(async |n| {
            let order = shop.client.post(shop.url("/api/OrdersProxy")).header("Idempotency-Key", format!("{round}-{n}"));
            order.body(n.to_string()).send().await.unwrap().status()
        });
        let statuses = join_all(asked).await;
        assert!(statuses.iter().all(|status| *status == StatusCode::CREATED), "{statuses:?}");
        round += 1;
    }
    // One of them at most went elsewhere, with others.
    assert!(running.lock().unwrap().len() <= 1);
}

/// What the gateway counted of the requests that it sent as one: so many batches, so many requests in them.
async fn batched(client: &Client) -> (f64, f64) {
    let metrics = client.get("/metrics").await.text;
    let value = |name: &str| metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or(0.0);
    (value("shopd_gateway_batch_requests_count "), value("shopd_gateway_batch_requests_sum "))
}

#[tokio::test(flavor = "multi_thread")]
async fn of_orders_that_travel_together_each_is_answered_as_if_it_had_come_alone() {
    let shop = All::start(postgres::own_dir()).await;
    shop.client.account("ann", "1000000").await;
    let (began, mut round) = (Instant::now(), 0_u128);
    // Some of every kind have travelled with others then.
    while batched(&shop.client).await.1 < 200.0 {
        assert!(began.elapsed() < PATIENCE, "nothing travels together");
        let asked = (0..CLIENTS).map(async |n| {
            let id = uuid::Uuid::from_u128(round * 1_000 + n as u128 / 6 + 1);
            let amount = format!("{}.25", n + 1);
            let body = match n % 6 {
                0 | 1 => format!(r#"{{"userId":"ann","amount":{amount}}}"#),
                // One of the two comes first, and the other differs.
                2 | 3 => format!(r#"{{"orderId":"{id}","userId":"ann","amount":{amount}}}"#),
                4 => r#"{"userId":"ann","amount":-1}"#.to_owned(),
                _ => "{".to_owned(),
            };
            let answered = shop.client.post("/api/OrdersProxy", &body).await;
            match (n % 6, answered.status) {
                (0..=3, 201) => {
                    assert_eq!(raw_member(&answered.text, "amount"), amount, "{n}");
                    let location = &answered.headers["location"];
                    assert!(location.starts_with("/api/OrdersProxy/"), "{location}");
                    assert_eq!(raw_member(&shop.client.get(location).await.text, "amount"), amount, "{n}");
                }
                (2 | 3, 409) => assert_eq!(answered.code(), "order_conflict"),
                (4, 400) => assert_eq!(answered.code(), "amount_not_positive"),
                (5, 400) => assert_eq!(answered.code(), "invalid_json"),
                (_, status) => panic!("{n}: {status} {}", answered.text),
            }
            (n, answered.status)
        });
        let answered = join_all(asked).await;
        let of = |status| answered.iter().filter(|(n, got)| (2..=3).contains(&(n % 6)) && *got == status).count();
        assert_eq!((of(201), of(409)), (CLIENTS / 6, CLIENTS / 6));
        round += 1;
    }
    let (batches, requests) = batched(&shop.client).await;
    assert!(requests >= 2.0 * batches);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_taken_behind_the_gateway_alone_and_refused_whole_where_it_is_none() {
    let shop = All::start(postgres::own_dir()).await;
    let order = r#"{"userId":"ann","amount":1}"#;
    let one = format!(
        "POST /api/Orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{order}",
        order.len()
    );
    let headers = [("Content-Type", "application/http; msgtype=request")];
    assert_eq!(shop.client.send("POST", "/internal/batch", &headers, Some(&one)).await.unwrap().status, 404);
    let orders = Client::new(shop.orders.clone());
    let placed = async || orders.get("/api/Orders?userId=ann").await.json().as_array().unwrap().len();
    for none in [String::new(), format!("{one}garbage"), one[..one.len() - 1].to_owned(), one.repeat(65), "x".repeat(300_000)] {
        let refused = orders.send("POST", "/internal/batch", &headers, Some(&none)).await.unwrap().expect(400);
        assert_eq!(refused.code(), "invalid_request");
    }
    assert_eq!(placed().await, 0, "nothing of a batch that is refused is done");
    let taken = orders.send("POST", "/internal/batch", &headers, Some(&one.repeat(3))).await.unwrap().expect(200);
    assert_eq!(taken.text.matches("HTTP/1.1 201 Created\r\n").count(), 3, "{}", taken.text);
    assert_eq!(placed().await, 3);
}
