//! The gateway between a client and services that are well, away, hung or broken.

mod answers;
mod batches;
mod hostile;
mod limits;
mod live;
mod pages;
mod retries;
pub mod service;
mod waits;

use reqwest::StatusCode;

use service::{Reply, Service, Shop, answer, code, json_answer, nobody, problem};

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
    let paths = ["/../balance", "/%2e%2e/balance?x=%2f&y", "/a%2Fb/balance", "/./balance", "/%2F..%2F..%2Fhealth/balance"];
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

/// Clients of the original may have written its routes so: its router found them.
#[tokio::test]
async fn a_route_is_found_in_any_letter_case_and_with_a_slash_behind_it_and_its_service_sees_one_spelling() {
    let payments = Service::start(|_, _| json_answer("{}")).await;
    let shop = Shop::start(&[&nobody()], &[&payments.url]).await;
    for (path, sent) in [
        ("/api/paymentsproxy/U1/BALANCE?a=B/", "/api/Account/U1/balance?a=B/"),
        ("/API/PaymentsProxy/U1/Transactions/", "/api/Account/U1/transactions"),
        ("/api/PaymentsProxy/%55%31/%62alance", "/api/Account/U1/balance"),
    ] {
        let answered = shop.raw(&format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")).await;
        assert!(answered.starts_with("HTTP/1.1 200 "), "{path}: {answered}");
        assert!(payments.requests().last().unwrap().starts_with(&format!("GET {sent} HTTP/1.1\r\n")), "{path}");
    }
    assert_eq!(shop.post("/api/paymentsproxy/u1/Deposit/", "1").await.status(), StatusCode::OK);
    assert_eq!(shop.get("/Swagger").await.status(), StatusCode::OK);
    assert_eq!(problem(shop.get("/api/PaymentsProxy/u1/balance//").await).await, code(404, "route_not_found"));
}

#[tokio::test]
async fn what_is_no_route_is_refused_at_the_gateway() {
    let orders = Service::start(|_, _| json_answer("{}")).await;
    let shop = Shop::start(&[&orders.url], &[&orders.url]).await;
    assert_eq!(problem(shop.get("/api/Orders").await).await, code(404, "route_not_found"));
    assert_eq!(problem(shop.get("/nothing").await).await, code(404, "route_not_found"));
    assert_eq!(problem(shop.get("/swagger/nothing.js").await).await, code(404, "route_not_found"));
    let refused = shop.client.delete(shop.url("/api/OrdersProxy")).send().await.unwrap();
    assert_eq!(refused.headers()["allow"], "GET, HEAD, POST, OPTIONS");
    assert_eq!(problem(refused).await, code(405, "method_not_allowed"));
    let refused = shop.get("/api/PaymentsProxy/u1").await;
    assert_eq!(refused.headers()["allow"], "POST, OPTIONS");
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
