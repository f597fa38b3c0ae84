//! The gateway between a client and services that are well, away, hung or broken.

pub mod service;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use service::{Reply, Service, Shop, TIMEOUT, answer, code, json_answer, nobody, problem, read_message, reserved};

#[tokio::test]
async fn a_request_arrives_as_it_was_sent_but_for_what_belongs_to_the_hop() {
    let orders = Service::start(|_, _| {
        let headers = "Location: /api/OrdersProxy/1\r\nX-Secret: 1\r\nX-Shopd-Inner: 1\r\nKeep-Alive: timeout=5\r\n\
                       Connection: x-secret\r\nContent-Encoding: br\r\nX-Request-Id: other\r\nETag: \"7\"\r\n";
        answer("201 Created", headers, "not br at all")
    })
    .await;
    let shop = Shop::start(&[&orders.url], &[&nobody()]).await;
    let body = "{\"userId\":\"u1\", \"amount\":1.50}";
    let request = format!(
        "POST /api/OrdersProxy?a=%2F&b=+ HTTP/1.1\r\nHost: shop.example\r\nContent-Length: {}\r\nConnection: close, X-Mine\r\n\
         X-Mine: 1\r\nTE: trailers\r\nX-Shopd-Prefix: /evil\r\nX-Shopd-Key: 1\r\nIdempotency-Key: k\r\nX-Request-Id: r-1\r\n\
         traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\nAccept-Encoding: br\r\n\r\n{body}",
        body.len()
    );
    let answered = shop.raw(&request).await.to_ascii_lowercase();
    let sent = orders.requests().remove(0);
    assert!(sent.starts_with("POST /api/Orders?a=%2F&b=+ HTTP/1.1\r\n"), "{sent}");
    assert!(sent.ends_with(&format!("\r\n\r\n{body}")), "{sent}");
    let sent = sent.to_ascii_lowercase();
    for expected in [
        "x-shopd-prefix: /api/ordersproxy\r\n",
        "idempotency-key: k\r\n",
        "x-request-id: r-1\r\n",
        "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-",
        "accept-encoding: br\r\n",
        "x-forwarded-for: 127.0.0.1\r\n",
        "x-forwarded-host: shop.example\r\n",
        "via: 1.1 shopd\r\n",
    ] {
        assert!(sent.contains(expected), "{expected} in {sent}");
    }
    for gone in ["x-mine", "te: trailers", "/evil", "x-shopd-key", "00f067aa0ba902b7", "connection: close"] {
        assert!(!sent.contains(gone), "{gone} in {sent}");
    }
    assert!(answered.starts_with("http/1.1 201 created\r\n") && answered.ends_with("\r\n\r\nnot br at all"), "{answered}");
    for expected in ["location: /api/ordersproxy/1\r\n", "content-encoding: br\r\n", "etag: \"7\"\r\n", "x-request-id: r-1\r\n"] {
        assert!(answered.contains(expected), "{expected} in {answered}");
    }
    for gone in ["x-secret", "x-shopd-inner", "keep-alive: timeout", "x-request-id: other"] {
        assert!(!answered.contains(gone), "{gone} in {answered}");
    }
}

#[tokio::test]
async fn no_path_leads_to_another_route() {
    let payments = Service::start(|_, _| json_answer("{}")).await;
    let shop = Shop::start(&[&nobody()], &[&payments.url]).await;
    let paths = ["/../balance", "/%2e%2e/balance?x=%zz&y", "/a%2Fb/balance", "/./balance", "/%2F..%2F..%2Fhealth/balance"];
    for path in paths {
        let answered = shop.raw(&format!("GET /api/PaymentsProxy{path} HTTP/1.1\r\nHost: a\r\n\r\n")).await;
        assert!(answered.starts_with("HTTP/1.1 200 "), "{path}: {answered}");
    }
    let sent: Vec<String> = payments.requests().iter().map(|request| request.lines().next().unwrap().to_owned()).collect();
    assert_eq!(sent, paths.map(|path| format!("GET /api/Account{path} HTTP/1.1")));
    for path in ["/api/PaymentsProxy/u1/../../OrdersProxy", "/api/OrdersProxy/../../health/live", "/%2e/swagger", "/swagger/../"] {
        let answered = shop.raw(&format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")).await;
        assert!(answered.starts_with("HTTP/1.1 404 ") && answered.contains("route_not_found"), "{path}: {answered}");
    }
}

#[tokio::test]
async fn what_is_no_route_is_refused_at_the_gateway() {
    let orders = Service::start(|_, _| json_answer("{}")).await;
    let shop = Shop::start(&[&orders.url], &[&orders.url]).await;
    assert_eq!(problem(shop.get("/api/Orders").await).await, code(404, "route_not_found"));
    assert_eq!(problem(shop.get("/nothing").await).await, code(404, "route_not_found"));
    assert_eq!(problem(shop.get("/swagger/nothing.js").await).await, code(404, "route_not_found"));
    let refused = shop.client.delete(shop.url("/api/OrdersProxy")).send().await.unwrap();
    assert_eq!(refused.headers()["allow"], "GET, HEAD, POST");
    assert_eq!(problem(refused).await, code(405, "method_not_allowed"));
    let refused = shop.get("/api/PaymentsProxy/u1").await;
    assert_eq!(refused.headers()["allow"], "POST");
    let both = "POST /api/OrdersProxy HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    assert!(shop.raw(both).await.starts_with("HTTP/1.1 400 "));
    assert!(orders.is_asked(0));
}

#[tokio::test]
async fn a_body_that_is_too_large_is_answered_though_it_is_still_being_sent() {
    let orders = Service::start(|_, _| json_answer("{}")).await;
    let shop = Shop::start(&[&orders.url], &[&orders.url]).await;
    for bytes in [64 * 1024 + 1, 900_000] {
        assert_eq!(problem(shop.post("/api/OrdersProxy", "x".repeat(bytes)).await).await, code(413, "payload_too_large"));
    }
    assert!(orders.is_asked(0));
    assert_eq!(shop.post("/api/OrdersProxy", "x".repeat(64 * 1024)).await.status(), StatusCode::OK);
    assert!(orders.is_asked(1));
}

#[tokio::test]
async fn head_is_the_answer_to_get_without_its_body() {
    let orders = Service::start(|_, _| json_answer("[1,2]")).await;
    let shop = Shop::start(&[&orders.url], &[&orders.url]).await;
    let answered = shop.client.head(shop.url("/api/OrdersProxy")).send().await.unwrap();
    assert_eq!((answered.status(), answered.headers()["content-length"].to_str().unwrap()), (StatusCode::OK, "5"));
    assert!(orders.requests()[0].starts_with("GET /api/Orders "));
}

#[tokio::test]
async fn a_service_that_refuses_is_unavailable_at_once() {
    let shop = Shop::start(&[&nobody(), &nobody()], &[&nobody()]).await;
    let began = Instant::now();
    assert_eq!(problem(shop.get("/api/OrdersProxy").await).await, code(503, "upstream_unavailable"));
    assert_eq!(problem(shop.post("/api/OrdersProxy", "{}").await).await, code(503, "upstream_unavailable"));
    assert_eq!(problem(shop.get("/api/PaymentsProxy/u1/balance").await).await, code(503, "upstream_unavailable"));
    assert!(began.elapsed() < TIMEOUT);
}

#[tokio::test]
async fn a_service_that_hangs_times_out_within_the_bound() {
    let hung = Service::start(|_, _| Reply::Hang).await;
    let shop = Shop::start(&[&hung.url], &[&hung.url, &hung.url]).await;
    let began = Instant::now();
    assert_eq!(problem(shop.get("/api/OrdersProxy").await).await, code(504, "upstream_timeout"));
    assert_eq!(problem(shop.post("/api/OrdersProxy", "{}").await).await, code(504, "upstream_timeout"));
    assert_eq!(problem(shop.get("/api/PaymentsProxy/u1/balance").await).await, code(504, "upstream_timeout"));
    let elapsed = began.elapsed();
    assert!(elapsed >= TIMEOUT * 3 && elapsed < TIMEOUT * 4, "{elapsed:?}");
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
async fn a_large_answer_streams_and_breaks_the_connection_where_it_is_cut() {
    let body = format!("[\"{}\"]", "x".repeat(1_000_000));
    let (whole, cut) = (body.clone(), body.clone());
    let orders = Service::start(move |_, _| json_answer(&whole)).await;
    let payments = Service::start(move |_, _| {
        let length = cut.len() + 1;
        Reply::Cut(format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{cut}"))
    })
    .await;
    let shop = Shop::start(&[&orders.url], &[&payments.url]).await;
    let answered = shop.get("/api/OrdersProxy").await;
    assert_eq!(answered.headers()["content-length"].to_str().unwrap(), body.len().to_string());
    assert_eq!(answered.text().await.unwrap(), body);
    shop.get("/api/PaymentsProxy/u1/balance").await.text().await.unwrap_err();
}

#[tokio::test]
async fn a_get_is_tried_on_another_replica() {
    let well = Service::start(|_, _| json_answer("1")).await;
    let closing = Service::start(|_, _| Reply::Close).await;
    let hung = Service::start(|_, _| Reply::Hang).await;
    for bad in [nobody(), closing.url, hung.url] {
        let shop = Shop::start(&[&bad, &well.url], &[&well.url, &bad]).await;
        for _ in 0..4 {
            assert_eq!(shop.get("/api/OrdersProxy").await.text().await.unwrap(), "1", "{bad}");
            assert_eq!(shop.get("/api/PaymentsProxy/u1/balance").await.text().await.unwrap(), "1", "{bad}");
        }
    }
}

#[tokio::test]
async fn a_post_is_repeated_only_where_nothing_was_sent() {
    let well = Service::start(|_, _| json_answer("1")).await;
    let closing = Service::start(|_, _| Reply::Close).await;
    let shop = Shop::start(&[&nobody(), &well.url], &[&closing.url, &well.url]).await;
    for _ in 0..4 {
        assert_eq!(shop.post("/api/OrdersProxy", "{}").await.status(), StatusCode::OK);
    }
    assert!(well.is_asked(4));
    assert_eq!(problem(shop.post("/api/PaymentsProxy/u1", "").await).await, code(503, "upstream_unavailable"));
    assert!(closing.is_asked(1) && well.is_asked(4));
}

#[tokio::test]
async fn a_replica_that_comes_back_is_asked_again_within_a_second() {
    let (away, socket) = reserved();
    let well = Service::start(|_, _| json_answer("1")).await;
    let shop = Shop::start(&[&away, &well.url], &[&well.url]).await;
    for _ in 0..4 {
        assert_eq!(shop.get("/api/OrdersProxy").await.status(), StatusCode::OK);
    }
    let back = socket.listen(8).unwrap();
    let asked = async {
        let (mut stream, _) = back.accept().await.unwrap();
        read_message(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nback").await.unwrap();
    };
    let asking = async { while shop.get("/api/OrdersProxy").await.text().await.unwrap() != "back" {} };
    let both = futures::future::join(asked, asking);
    tokio::time::timeout(Duration::from_millis(1_200), both).await.expect("it is asked again");
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
async fn a_post_over_a_kept_connection_that_was_just_closed_is_never_sent_twice() {
    let closing = Service::start(|_, number| if number == 0 { json_answer("1") } else { Reply::Close }).await;
    let shop = Shop::start(&[&closing.url], &[&closing.url]).await;
    assert_eq!(shop.post("/api/OrdersProxy", "{}").await.status(), StatusCode::OK);
    assert_eq!(problem(shop.post("/api/OrdersProxy", "{}").await).await, code(503, "upstream_unavailable"));
    assert!(closing.is_asked(2));
}

#[tokio::test]
async fn an_unchanged_thing_has_no_body_whatever_length_it_names() {
    let orders = Service::start(|_, number| match number % 2 {
        0 => Reply::Answer("HTTP/1.1 304 Not Modified\r\nETag: \"7\"\r\nContent-Length: 5\r\n\r\n".to_owned()),
        _ => Reply::Answer("HTTP/1.1 304 Not Modified\r\nETag: \"7\"\r\n\r\n".to_owned()),
    })
    .await;
    let shop = Shop::start(&[&orders.url], &[&orders.url]).await;
    for _ in 0..4 {
        let answered = shop.get("/api/OrdersProxy/1").await;
        assert_eq!((answered.status(), answered.headers()["etag"].to_str().unwrap()), (StatusCode::NOT_MODIFIED, "\"7\""));
    }
}

#[tokio::test]
async fn an_upgrade_that_nobody_offered_is_ignored() {
    let orders = Service::start(|_, _| json_answer("[]")).await;
    let shop = Shop::start(&[&orders.url], &[&orders.url]).await;
    let upgrade = "GET /api/OrdersProxy HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
    assert!(shop.raw(upgrade).await.starts_with("HTTP/1.1 200 "));
    assert!(!orders.requests()[0].to_ascii_lowercase().contains("upgrade"));
}

fn document_of(path: &str, schema: &str) -> String {
    json!({
        "openapi": "3.0.0",
        "paths": { path: { "get": { "responses": { "200": { "description": "ok" } } } } },
        "components": { "schemas": { schema: { "type": "object" } } },
    })
    .to_string()
}

#[tokio::test]
async fn one_document_is_merged_and_served_though_a_service_is_down() {
    let orders = Service::start(|_, _| json_answer(&document_of("/api/Orders/{id}", "Order"))).await;
    let up = Arc::new(Mutex::new(true));
    let is_up = up.clone();
    let payments = Service::start(move |_, _| match *is_up.lock().unwrap() {
        true => json_answer(&document_of("/api/Account/{userId}/balance", "Account")),
        false => Reply::Close,
    })
    .await;
    let document = async |shop: &Shop| -> Value { shop.get("/swagger/v1/swagger.json").await.json().await.unwrap() };

    let shop = Shop::start(&[&orders.url], &[&nobody()]).await;
    let partial = document(&shop).await;
    assert_eq!(partial["x-shopd-partial"], json!(["payments"]));
    assert!(partial["paths"].get("/api/OrdersProxy/{id}").is_some());

    let shop = Shop::start(&[&orders.url], &[&payments.url]).await;
    let whole = document(&shop).await;
    assert!(whole.get("x-shopd-partial").is_none() && whole["openapi"] == "3.0.3");
    assert!(whole["paths"].get("/api/PaymentsProxy/{userId}/balance").is_some());
    *up.lock().unwrap() = false;
    let last_good = document(&shop).await;
    assert_eq!(last_good["x-shopd-partial"], json!(["payments"]));
    assert!(last_good["paths"].get("/api/PaymentsProxy/{userId}/balance").is_some());
}

#[tokio::test]
async fn swagger_ui_comes_from_the_gateway_alone() {
    let shop = Shop::start(&[&nobody()], &[&nobody()]).await;
    let root = shop.get("/").await;
    assert_eq!((root.status(), root.headers()["location"].to_str().unwrap()), (StatusCode::FOUND, "/swagger"));
    for path in ["/swagger", "/swagger/", "/swagger/index.html"] {
        let page = shop.get(path).await;
        assert_eq!(page.status(), StatusCode::OK);
        let page = page.text().await.unwrap();
        for part in page.split('"').filter(|text| text.starts_with("/swagger/")) {
            assert_eq!(shop.get(part).await.status(), StatusCode::OK, "{part}");
        }
    }
    assert!(shop.get("/swagger/initializer.js").await.text().await.unwrap().contains("/swagger/v1/swagger.json"));
    assert!(shop.get("/swagger/swagger-ui-bundle.js").await.bytes().await.unwrap().len() > 1_000_000);
}

#[tokio::test]
async fn a_summary_asks_both_services_and_names_the_one_that_is_down() {
    let payments = Service::start(|request, _| match request.starts_with("GET /api/Account/a%26b/balance ") {
        true => json_answer(r#"{"userId":"a&b","balance":9999999999.99}"#),
        false => answer("404 Not Found", "Content-Type: application/problem+json\r\n", "{}"),
    })
    .await;
    let orders = Service::start(|request, _| match request.starts_with("GET /api/Orders?userId=a%26b&limit=20 ") {
        true => json_answer(r#"[{"id":"1","amount":0.1}]"#),
        false => json_answer("[]"),
    })
    .await;
    let shop = Shop::start(&[&orders.url], &[&payments.url]).await;
    let summary = shop.get("/api/users/a%26b/summary").await.text().await.unwrap();
    assert_eq!(
        summary,
        r#"{"userId":"a&b","balance":9999999999.99,"orders":[{"id":"1","amount":0.1}],"partial":false,"missing":[]}"#
    );
    assert_eq!(problem(shop.get("/api/users/nobody/summary").await).await, code(404, "account_not_found"));

    let shop = Shop::start(&[&orders.url], &[&nobody()]).await;
    let summary: Value = shop.get("/api/users/a%26b/summary").await.json().await.unwrap();
    assert_eq!((&summary["partial"], &summary["missing"]), (&json!(true), &json!(["payments"])));
    assert_eq!((&summary["balance"], summary["orders"].as_array().unwrap().len()), (&Value::Null, 1));
}

#[tokio::test]
async fn the_gateway_is_ready_when_any_replica_of_each_service_is_live() {
    let well = Service::start(|_, _| Reply::Close).await;
    let shop = Shop::start(&[&nobody(), &well.url], &[&well.url]).await;
    assert_eq!(shop.get("/health/ready").await.status(), StatusCode::OK);
    let shop = Shop::start(&[&well.url], &[&nobody()]).await;
    let unready = shop.get("/health/ready").await;
    assert_eq!(unready.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(unready.json::<Value>().await.unwrap()["missing"], json!(["payments"]));
    assert_eq!(shop.get("/health/live").await.status(), StatusCode::OK);
}
