//! What the gateway answers itself: the merged document, Swagger UI, the summary.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use reqwest::StatusCode;
use serde_json::{Value, json};

use super::service::{Reply, Service, Shop, answer, code, json_answer, nobody, problem};
use crate::support::shop::{PATIENCE, poll};

fn document_of(path: &str, schema: &str) -> String {
    json!({
        "openapi": "3.0.0",
        "paths": { path: { "get": { "responses": { "200": { "description": "ok" } } } } },
        "components": { "schemas": { schema: { "type": "object" } } },
    })
    .to_string()
}

/// The merged document, once these services and no others are missing from it: each has one second, which a busy machine may take away.
async fn document(shop: &Shop, missing: Option<Value>) -> Value {
    let began = Instant::now();
    loop {
        let document: Value = shop.get("/swagger/v1/swagger.json").await.json().await.unwrap();
        if document.get("x-shopd-partial") == missing.as_ref() {
            return document;
        }
        assert!(began.elapsed() < PATIENCE, "{:?} instead of {missing:?}", document.get("x-shopd-partial"));
        poll().await;
    }
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
    let shop = Shop::start(&[&orders.url], &[&nobody()]).await;
    let partial = document(&shop, Some(json!(["payments"]))).await;
    assert!(partial["paths"].get("/api/OrdersProxy/{id}").is_some());

    let shop = Shop::start(&[&orders.url], &[&payments.url]).await;
    let whole = document(&shop, None).await;
    assert_eq!(whole["openapi"], "3.0.3");
    assert!(whole["paths"].get("/api/PaymentsProxy/{userId}/balance").is_some());
    *up.lock().unwrap() = false;
    let last_good = document(&shop, Some(json!(["payments"]))).await;
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

/// Red where two answers that are not of one moment are put together: payments had not decided when it was asked, and orders answers later.
#[tokio::test]
async fn a_timeline_with_a_result_asks_payments_once_more_where_it_knew_nothing() {
    const ID: &str = "0192a3b4-0000-7000-8000-000000000001";
    let part = |hops: &[&str]| {
        let hops: Vec<Value> = hops.iter().map(|name| json!({"name": name, "at": "2026-11-30T10:00:00.000000Z"})).collect();
        json_answer(&json!({"orderId": ID, "traceId": null, "hops": hops}).to_string())
    };
    let unknown = || answer("404 Not Found", "Content-Type: application/problem+json\r\n", "{}");
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let payments = Service::start(move |_, _| match asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
        0 => unknown(),
        _ => part(&["inbox", "ledger", "outbox"]),
    });
    let payments = payments.await;
    let finished = Service::start(move |_, _| part(&["accepted", "outbox", "topic", "inbox", "finished"])).await;
    let names = |timeline: &Value| -> Vec<String> {
        let hops = timeline["hops"].as_array().unwrap();
        hops.iter().map(|hop| hop["name"].as_str().unwrap().to_owned()).collect()
    };
    let shop = Shop::start(&[&finished.url], &[&payments.url]).await;
    let timeline: Value = shop.get(&format!("/api/OrdersProxy/{ID}/timeline")).await.json().await.unwrap();
    assert_eq!(names(&timeline), ["accepted", "outbox", "inbox", "ledger", "outbox", "topic", "inbox", "finished"]);

    // Nothing is decided as far as orders knows: then that is how it is.
    let accepted = Service::start(move |_, _| part(&["accepted", "outbox"])).await;
    let silent = Service::start(move |_, _| answer("404 Not Found", "Content-Type: application/problem+json\r\n", "{}")).await;
    let shop = Shop::start(&[&accepted.url], &[&silent.url]).await;
    let timeline: Value = shop.get(&format!("/api/OrdersProxy/{ID}/timeline")).await.json().await.unwrap();
    assert_eq!(names(&timeline), ["accepted", "outbox"]);
    assert!(silent.is_asked(1));
}
