//! What the gateway does to clients who ask too much, and for those who come from other pages or over thin lines.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use futures::future::join_all;
use reqwest::StatusCode;
use shopd::config::RateLimit;
use tokio::io::AsyncWriteExt;

use crate::support::shop::{PATIENCE, poll};

use super::service::{Reply, Service, Shop, code, json_answer, nobody, problem};

#[tokio::test]
async fn a_client_over_its_limit_is_told_when_to_come_back() {
    let orders = Service::start(|_, _| json_answer("[]")).await;
    let shop = Shop::start_with(&[&orders.url], &[&orders.url], |config| {
        let limit = |route: &str, count, window_s| RateLimit {
            route: route.into(),
            count: NonZeroU32::new(count).unwrap(),
            window: Duration::from_secs(window_s),
        };
        config.rate_limits = vec![limit("GET /api/OrdersProxy", 2, 3_600), limit("POST /api/OrdersProxy", 1, 1)];
        config.trusted_proxies = vec!["127.0.0.1/32".parse().unwrap()];
    })
    .await;
    for remaining in ["1", "0"] {
        let answered = shop.get("/api/OrdersProxy").await;
        let header = |name: &str| answered.headers()[name].to_str().unwrap().to_owned();
        assert_eq!(answered.status(), StatusCode::OK);
        assert_eq!((header("ratelimit-limit"), header("ratelimit-remaining")), ("2".into(), remaining.to_owned()));
        assert_eq!(header("ratelimit-policy"), "2;w=3600");
    }
    let refused = shop.get("/api/OrdersProxy").await;
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    let header = |name: &str| refused.headers()[name].to_str().unwrap().parse::<u32>().unwrap();
    assert_eq!((header("ratelimit-remaining"), header("retry-after")), (0, header("ratelimit-reset")));
    assert!((1_700..=1_800).contains(&header("retry-after")));
    assert_eq!(refused.json::<serde_json::Value>().await.unwrap()["code"], "rate_limited");
    assert!(orders.is_asked(2));
    // Another client, and a route without a limit.
    let other = shop.client.get(shop.url("/api/OrdersProxy")).header("X-Forwarded-For", "6.6.6.6, 192.0.2.1");
    assert_eq!(other.send().await.unwrap().status(), StatusCode::OK);
    let answered = shop.get("/api/OrdersProxy/1").await;
    assert!(answered.status() == StatusCode::OK && !answered.headers().contains_key("ratelimit-limit"));
    // Health is nobody's to use up.
    for _ in 0..5 {
        assert_eq!(shop.get("/health/live").await.status(), StatusCode::OK);
    }
    // The bucket fills again.
    let began = Instant::now();
    assert_eq!(shop.post("/api/OrdersProxy", "{}").await.status(), StatusCode::OK);
    while shop.post("/api/OrdersProxy", "{}").await.status() == StatusCode::TOO_MANY_REQUESTS {
        assert!(began.elapsed() < Duration::from_secs(20));
    }
    assert!(began.elapsed() >= Duration::from_millis(900), "{:?}", began.elapsed());
}

/// Red where only a service's answers say it: who paces itself by it is blind when a service is away.
#[tokio::test]
async fn what_the_gateway_answers_itself_says_what_is_left_as_well() {
    let shop = Shop::start_with(&[&nobody()], &[&nobody()], |config| {
        let (count, window) = (NonZeroU32::new(9).unwrap(), Duration::from_secs(3_600));
        config.rate_limits = vec![RateLimit { route: "*".into(), count, window }];
    })
    .await;
    for (remaining, path) in [("8", "/api/OrdersProxy/1"), ("7", "/api/OrdersProxy/2")] {
        let answered = shop.get(path).await;
        assert_eq!(answered.headers()["ratelimit-remaining"], remaining);
        assert_eq!(problem(answered).await, code(503, "upstream_unavailable"));
    }
}

#[tokio::test]
async fn more_than_can_be_answered_is_shed_by_the_time_it_waits_and_health_stays_green() {
    let slow =
        Service::start(|_, _| Reply::Slow(Duration::from_secs(1), "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1".into())).await;
    let well = Service::start(|_, _| json_answer("2")).await;
    let shop = Shop::start_with(&[&slow.url], &[&well.url], |config| {
        config.in_flight_max = 4;
        config.queue_time_max = Duration::from_millis(100);
    })
    .await;
    let began = Instant::now();
    let (mut served, mut shed) = (0, 0);
    let flood = join_all((0..60).map(|_| shop.get("/api/OrdersProxy")));
    // Meanwhile the other service is asked as ever, and health answers.
    let others = async {
        for _ in 0..5 {
            assert_eq!(shop.get("/api/PaymentsProxy/u1/balance").await.text().await.unwrap(), "2");
            // A probe of the gateway's has one second, which a busy machine may take away.
            let mut ready = StatusCode::SERVICE_UNAVAILABLE;
            for _ in 0..5 {
                ready = shop.get("/health/ready").await.status();
                if ready == StatusCode::OK {
                    break;
                }
            }
            assert_eq!(ready, StatusCode::OK);
        }
        began.elapsed()
    };
    let (answers, others_took) = futures::future::join(flood, others).await;
    for answered in answers {
        match answered.status() {
            StatusCode::OK => served += 1,
            _ => {
                shed += 1;
                assert_eq!(answered.headers()["retry-after"], "1");
                assert_eq!(problem(answered).await, code(503, "unavailable"));
            }
        }
    }
    assert!(served >= 4 && shed >= 50, "{served} served, {shed} shed");
    // Four at a time and nobody shed, it would be fifteen seconds.
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert!(others_took < Duration::from_secs(10), "{others_took:?}");
    // What waits on purpose and what streams hold no places.
    let waiting = shop.client.post(shop.url("/api/OrdersProxy")).header("Prefer", "wait=1").body("{}");
    let flood = join_all((0..4).map(|_| shop.get("/api/OrdersProxy")));
    let (_, waited) = futures::future::join(flood, waiting.send()).await;
    assert_eq!(waited.unwrap().status(), StatusCode::OK);
    // What the gateway asks for itself takes one.
    let (flood, before) = (join_all((0..8).map(|_| shop.get("/api/OrdersProxy"))), slow.requests().len());
    let summary = async {
        let since = Instant::now();
        while slow.requests().len() < before + 4 {
            assert!(since.elapsed() < PATIENCE, "all places are taken");
            poll().await;
        }
        shop.get("/api/users/u1/summary").await
    };
    let (_, summary) = futures::future::join(flood, summary).await;
    assert!(summary.status().is_server_error(), "{}", summary.status());
    assert!(!slow.requests().iter().any(|request| request.contains("limit=20")), "not where there is no place");
}

#[tokio::test]
async fn a_large_answer_is_compressed_for_who_accepts_it() {
    let list = format!("[{}1]", "1, ".repeat(2_000));
    let sent = list.clone();
    let orders = Service::start(move |_, _| json_answer(&sent)).await;
    let shop = Shop::start(&[&orders.url], &[&nobody()]).await;
    for encoding in ["gzip", "br", "zstd"] {
        let answered = shop.client.get(shop.url("/api/OrdersProxy")).header("Accept-Encoding", encoding).send().await.unwrap();
        assert_eq!(answered.headers()["content-encoding"], encoding);
        assert_eq!(answered.headers()["vary"], "accept-encoding");
        let bytes = answered.bytes().await.unwrap();
        assert!(bytes.len() < list.len() / 10, "{encoding}: {} bytes", bytes.len());
        // The client sends no body of its own encoding, and the service is not asked for one.
    }
    let plain = shop.get("/api/OrdersProxy").await;
    assert!(!plain.headers().contains_key("content-encoding"));
    assert_eq!(plain.text().await.unwrap(), list);
    let page = shop.client.get(shop.url("/swagger/swagger-ui-bundle.js")).header("Accept-Encoding", "gzip").send().await.unwrap();
    assert_eq!(page.headers()["content-encoding"], "gzip");
}

#[tokio::test]
async fn options_names_the_methods_of_a_route() {
    let shop = Shop::start(&[&nobody()], &[&nobody()]).await;
    let options = async |path: &str| {
        let answered = shop.client.request(reqwest::Method::OPTIONS, shop.url(path)).send().await.unwrap();
        let allow = answered.headers().get("allow").map(|allow| allow.to_str().unwrap().to_owned());
        (answered.status().as_u16(), allow.unwrap_or_default())
    };
    assert_eq!(options("/api/OrdersProxy").await, (204, "GET, HEAD, POST, OPTIONS".into()));
    assert_eq!(options("/api/PaymentsProxy/u1/deposit").await, (204, "POST, OPTIONS".into()));
    assert_eq!(options("/nothing").await.0, 404);
}

#[tokio::test]
async fn a_page_of_a_configured_origin_may_use_the_api_and_no_other() {
    let orders = Service::start(|_, _| json_answer("[]")).await;
    let shop = Shop::start_with(&[&orders.url], &[&nobody()], |config| {
        config.cors_origins = vec!["https://shop.example".into()];
    })
    .await;
    let allowed = async |shop: &Shop, method: reqwest::Method, path: &str, origin: &str| {
        let asked = shop.client.request(method, shop.url(path)).header("Origin", origin);
        let asked =
            asked.header("Access-Control-Request-Method", "POST").header("Access-Control-Request-Headers", "idempotency-key");
        let answered = asked.send().await.unwrap();
        let header = |name: &str| answered.headers().get(name).map_or("", |value| value.to_str().unwrap()).to_owned();
        (answered.status().as_u16(), header("access-control-allow-origin"), header("access-control-allow-headers"))
    };
    let (mine, other) = ("https://shop.example", "https://evil.example");
    let preflight = allowed(&shop, reqwest::Method::OPTIONS, "/api/OrdersProxy", mine).await;
    assert_eq!((preflight.0, preflight.1.as_str(), preflight.2.as_str()), (200, mine, "idempotency-key"));
    assert_eq!(allowed(&shop, reqwest::Method::GET, "/api/OrdersProxy", mine).await.1, mine);
    // A refusal can be read, too.
    let (status, origin, _) = allowed(&shop, reqwest::Method::GET, "/api/PaymentsProxy/u1/balance", mine).await;
    assert_eq!((status, origin.as_str()), (503, mine));
    assert_eq!(allowed(&shop, reqwest::Method::GET, "/api/OrdersProxy", other).await.1, "");
    assert_eq!(allowed(&shop, reqwest::Method::OPTIONS, "/api/OrdersProxy", other).await.1, "");
    // A preflight that is refused is told so as everything else is.
    for (origin, method, header) in [(other, "POST", "Origin"), (mine, "DELETE", "Access-Control-Request-Method")] {
        let asked = shop.client.request(reqwest::Method::OPTIONS, shop.url("/api/OrdersProxy")).header("Origin", origin);
        let asked = asked.header("Access-Control-Request-Method", method).header("X-Request-Id", "asked-by-a-page");
        let refused = asked.send().await.unwrap();
        assert_eq!((refused.status().as_u16(), refused.headers()["x-request-id"].to_str().unwrap()), (400, "asked-by-a-page"));
        assert_eq!(refused.headers()["content-type"], "application/problem+json");
        let problem: serde_json::Value = refused.json().await.unwrap();
        assert_eq!((&problem["code"], &problem["instance"]), (&"invalid_request".into(), &"/api/OrdersProxy".into()), "{problem}");
        assert!(problem["errors"][header].is_array(), "{problem}");
    }
    let shop = Shop::start(&[&orders.url], &[&nobody()]).await;
    assert_eq!(allowed(&shop, reqwest::Method::GET, "/api/OrdersProxy", mine).await.1, "");
}

/// Red where a place is taken before the body is there.
#[tokio::test]
async fn a_client_that_sends_slowly_holds_no_place() {
    let orders = Service::start(|_, _| json_answer("[]")).await;
    let shop = Shop::start_with(&[&orders.url], &[&nobody()], |config| {
        config.in_flight_max = 1;
        config.queue_time_max = Duration::from_millis(50);
    })
    .await;
    let mut slow = Vec::new();
    for _ in 0..3 {
        let mut stream = tokio::net::TcpStream::connect(shop.address()).await.unwrap();
        let begun = "POST /api/OrdersProxy HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{";
        stream.write_all(begun.as_bytes()).await.unwrap();
        slow.push(stream);
    }
    for _ in 0..20 {
        assert_eq!(shop.get("/api/OrdersProxy").await.status(), StatusCode::OK);
    }
}
