//! How long the gateway waits for a service: the service is told, a client may prefer more, and a gateway that stops has less.

use std::time::Duration;

use reqwest::StatusCode;

use super::service::{Reply, Service, Shop, TIMEOUT, answer, header, json_answer, nobody};
use crate::support::shop::poll;

#[tokio::test]
async fn the_service_is_told_how_long_it_is_waited_for() {
    let service = Service::start(|_, _| json_answer("1")).await;
    let shop = Shop::start(&[&service.url], &[&service.url]).await;
    shop.get("/api/OrdersProxy").await;
    let waiting = shop.client.post(shop.url("/api/OrdersProxy")).header("Prefer", "wait=30").header("X-Shopd-Deadline-Ms", "1");
    waiting.body("{}").send().await.unwrap();
    let told: Vec<u64> =
        service.requests().iter().map(|request| header(request, "x-shopd-deadline-ms").unwrap().parse().unwrap()).collect();
    // Less than the gateway waits, or their answers would race. What a busy machine may take of it leaves the two apart.
    let (bound, lost) = (TIMEOUT.as_millis() as u64 - 250, 8_000);
    assert!((bound - lost..=bound).contains(&told[0]), "{told:?}");
    assert!((bound + 30_000 - lost..=bound + 30_000).contains(&told[1]), "{told:?}");
}

#[tokio::test]
async fn a_wait_on_purpose_is_no_reason_to_ask_elsewhere() {
    // Longer than the bound without the wait; far shorter than with it.
    let bound = Duration::from_secs(1);
    let slow = move |_: &str, _| Reply::Slow(bound * 3 / 2, "HTTP/1.1 201 Created\r\nContent-Length: 1\r\n\r\n1".into());
    let first = Service::start(slow).await;
    let shop = Shop::start_waiting(&[&first.url, &first.url], &[&nobody()], bound).await;
    let waiting = shop.client.post(shop.url("/api/OrdersProxy")).header("Prefer", "wait=20").body("{}");
    assert_eq!(waiting.send().await.unwrap().status(), StatusCode::CREATED);
    assert!(first.is_asked(1));
}

/// Red where it is waited for: the drain is over before the client's thirty seconds are.
#[tokio::test]
async fn a_gateway_that_stops_asks_again_without_the_wait_under_the_same_stamp() {
    let service = Service::start(|request, _| match header(request, "prefer") {
        Some(_) => Reply::Slow(Duration::from_secs(30), String::new()),
        None => answer("201 Created", "", "2"),
    });
    let service = service.await;
    let shop = Shop::start(&[&service.url], &[&nobody()]).await;
    let waiting = shop.client.post(shop.url("/api/OrdersProxy")).header("Prefer", "wait=30").body("{}").send();
    let (answered, ()) = tokio::join!(waiting, async {
        while !service.is_asked(1) {
            poll().await;
        }
        shop.stop.stop();
    });
    let answered = answered.unwrap();
    assert_eq!((answered.status(), answered.text().await.unwrap().as_str()), (StatusCode::CREATED, "2"));
    let stamps: Vec<_> = service.requests().iter().map(|request| header(request, "x-shopd-stamp")).collect();
    assert!(matches!(&stamps[..], [Some(first), Some(second)] if first == second), "{stamps:?}");
}

/// Red where the second request is taken for the first: the client would be told of a conflict with itself.
#[tokio::test]
async fn a_gateway_that_stops_waits_for_its_own_first_try_under_a_clients_key() {
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let service = Service::start(move |request, _| match header(request, "prefer") {
        Some(_) => Reply::Slow(Duration::from_secs(30), String::new()),
        // It is still running at first.
        None if asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 0 => {
            let body = r#"{"code":"idempotency_in_progress"}"#;
            answer("409 Conflict", "Content-Type: application/problem+json\r\n", body)
        }
        None => answer("201 Created", "", "2"),
    });
    let service = service.await;
    let shop = Shop::start(&[&service.url], &[&nobody()]).await;
    let waiting = shop.client.post(shop.url("/api/OrdersProxy")).header("Prefer", "wait=30").header("Idempotency-Key", "k");
    let (answered, ()) = tokio::join!(waiting.body("{}").send(), async {
        while !service.is_asked(1) {
            poll().await;
        }
        shop.stop.stop();
    });
    let answered = answered.unwrap();
    assert_eq!((answered.status(), answered.text().await.unwrap().as_str()), (StatusCode::CREATED, "2"));
}
