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
