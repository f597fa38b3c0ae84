//! The original system's scenarios through real HTTP, on both logs.

use serde_json::Value;
use uuid::Uuid;

use crate::support::shop::{All, Client, Four, raw_member};
use crate::support::{kafka, postgres};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_shop_works_on_nothing_at_all() {
    let shop = All::start(postgres::own_dir()).await;
    scenarios(&shop.client).await;
    amounts(&shop.client).await;
    services_answer_on_their_own_ports(&Client::new(shop.orders.clone()), &Client::new(shop.payments.clone())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_shop_works_as_four_processes_on_kafka_and_two_databases() {
    let (orders, payments) = (postgres::database("orders").await, postgres::database("payments").await);
    let shop = Four::start(&kafka::shared().await, &orders, &payments, "four.").await;
    scenarios(&shop.client).await;
}

async fn scenarios(shop: &Client) {
    // Account, duplicate account, deposit, balance.
    let created = shop.send("POST", "/api/PaymentsProxy/ann", &[], None).await.unwrap().expect(200);
    assert!(created.text.starts_with(r#"{"id":1,"userId":"ann","balance":0"#), "{}", created.text);
    let again = shop.send("POST", "/api/PaymentsProxy/ann", &[], None).await.unwrap().expect(409);
    assert_eq!(again.code(), "account_exists");
    assert_eq!(again.json()["detail"], "Account already exists for this user");
    assert_eq!(again.headers["content-type"], "application/problem+json");
    assert_eq!(again.json()["instance"], "/api/PaymentsProxy/ann");
    assert_eq!(again.json()["traceId"].as_str().map(str::len), Some(32));
    let deposited = shop.post("/api/PaymentsProxy/ann/deposit", "100.50").await.expect(200);
    assert_eq!(deposited.text, r#"{"id":1,"userId":"ann","balance":100.5}"#);
    shop.post("/api/PaymentsProxy/ann/deposit", r#"{"Amount": "99.5", "unknown": [1]}"#).await.expect(200);
    assert_eq!(shop.get("/api/PaymentsProxy/ann/balance").await.expect(200).text, r#"{"userId":"ann","balance":200}"#);
    assert_eq!(shop.get("/api/PaymentsProxy/nobody/balance").await.expect(404).code(), "account_not_found");
    assert_eq!(shop.post("/api/PaymentsProxy/nobody/deposit", "1").await.expect(404).code(), "account_not_found");

    // An order that is paid.
    let body = r#"{"USERID":"ann","Amount":150.00,"description":"a b\u006fok","extra":1}"#;
    let placed = shop.post("/api/OrdersProxy", body).await.expect(201);
    let order = placed.json();
    let names: Vec<_> = member_names(&placed.text);
    assert_eq!(names, ["id", "userId", "amount", "description", "status", "failureReason", "createdAt", "updatedAt"]);
    assert_eq!((&order["status"], &order["description"]), (&"New".into(), &"a book".into()));
    assert_eq!(raw_member(&placed.text, "amount"), "150");
    let id = order["id"].as_str().unwrap();
    assert_eq!(placed.headers["location"], format!("/api/OrdersProxy/{id}"));
    assert_eq!(shop.ended(id).await["status"], "Finished");
    assert_eq!(shop.balance("ann").await, "50");

    // One without funds, one of an unknown account.
    let poor = place(shop, "ann", "50.01").await;
    let ended = shop.ended(&poor).await;
    assert_eq!((&ended["status"], &ended["failureReason"]), (&"Cancelled".into(), &"insufficient_funds".into()));
    let unknown = place(shop, "nobody", "1").await;
    let ended = shop.ended(&unknown).await;
    assert_eq!((&ended["status"], &ended["failureReason"]), (&"Cancelled".into(), &"account_not_found".into()));
    assert_eq!(shop.balance("ann").await, "50");

    // Replay and conflict.
    let own = Uuid::new_v4();
    let body = format!(r#"{{"orderId":"{own}","userId":"ann","amount":10,"description":"x"}}"#);
    shop.post("/api/OrdersProxy", &body).await.expect(201);
    shop.ended(&own.to_string()).await;
    // Named whole: a random id may hold any digits, too.
    let (id_here, amount) = (own.to_string(), r#""amount":10,"#);
    let shouted = body.replace(&id_here, &id_here.to_uppercase()).replace(amount, r#""amount":10.00,"#);
    let replayed = shop.post("/api/OrdersProxy", &shouted).await.expect(200);
    assert_eq!(replayed.headers["idempotent-replayed"], "true");
    assert_eq!(replayed.json()["status"], "Finished");
    for other in [body.replace(amount, r#""amount":11,"#), body.replace("ann", "bob"), body.replace(r#""x""#, r#""y""#)] {
        assert_eq!(shop.post("/api/OrdersProxy", &other).await.expect(409).code(), "order_conflict");
    }
    assert_eq!(shop.balance("ann").await, "40");

    // Lists, newest first, by pages; status; single order with its ETag.
    let all = shop.get("/api/OrdersProxy?userId=ann").await.expect(200).json();
    let ids: Vec<_> = all.as_array().unwrap().iter().map(|o| o["id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(ids, [own.to_string(), poor.clone(), id.to_owned()]);
    let mut paged = Vec::new();
    let mut next = Some("/api/OrdersProxy?userId=ann&limit=2".to_owned());
    while let Some(path) = next {
        let page = shop.get(&path).await.expect(200);
        paged.extend(page.json().as_array().unwrap().iter().map(|o| o["id"].as_str().unwrap().to_owned()));
        next = page.headers.get("link").map(|link| link.split(['<', '>']).nth(1).unwrap().to_owned());
        assert_eq!(next.is_some(), page.headers.contains_key("x-next-cursor"));
    }
    assert_eq!(paged, ids);
    let cancelled = shop.get("/api/OrdersProxy?status=Cancelled&userId=ann").await.expect(200).json();
    assert_eq!(cancelled.as_array().unwrap().len(), 1);
    for bad in ["status=Paid", "status=", "limit=0", "limit=501", "limit=x", "cursor=!", "userId=%zz", "userId=%ff"] {
        assert_eq!(shop.get(&format!("/api/OrdersProxy?{bad}")).await.expect(400).code(), "invalid_request", "{bad}");
    }
    // Where no parameter is read as well: nothing is placed by a request that cannot be read.
    for (method, path, body) in [
        ("POST", "/api/OrdersProxy?x=%zz".to_owned(), Some(r#"{"userId":"ann","amount":1}"#)),
        ("POST", "/api/PaymentsProxy/ann/deposit?%".to_owned(), Some("1")),
        ("GET", format!("/api/OrdersProxy/{id}?x=%ff"), None),
        ("GET", "/api/PaymentsProxy/ann/balance?x=%4".to_owned(), None),
        ("GET", "/api/users/ann/summary?x=%zz".to_owned(), None),
        ("GET", "/api/OrdersProxy/%zz/timeline".to_owned(), None),
    ] {
        let answer = shop.send(method, &path, &[], body).await.unwrap().expect(400);
        assert_eq!(answer.code(), "invalid_request", "{method} {path}");
    }
    assert_eq!(shop.balance("ann").await, "40");
    let one = shop.get(&format!("/api/OrdersProxy/{id}")).await.expect(200);
    let etag = one.headers["etag"].clone();
    shop.send("GET", &format!("/api/OrdersProxy/{id}"), &[("If-None-Match", &etag)], None).await.unwrap().expect(304);
    assert_eq!(shop.get("/api/OrdersProxy/xyz").await.expect(400).code(), "invalid_order_id");
    assert_eq!(shop.get(&format!("/api/OrdersProxy/{}", Uuid::new_v4())).await.expect(404).code(), "order_not_found");

    // The ledger.
    let ledger = shop.get("/api/PaymentsProxy/ann/transactions").await.expect(200);
    let lines: Vec<_> = ledger
        .json()
        .as_array()
        .unwrap()
        .iter()
        .map(|t| (t["kind"].clone(), t["amount"].to_string(), t["balanceAfter"].to_string()))
        .collect();
    let line = |kind: &str, amount: &str, after: &str| (Value::from(kind), amount.to_owned(), after.to_owned());
    assert_eq!(
        lines,
        [
            line("payment", "-10", "40"),
            line("payment", "-150", "50"),
            line("deposit", "99.5", "200"),
            line("deposit", "100.5", "100.5"),
        ]
    );
    assert_eq!(shop.get("/api/PaymentsProxy/nobody/transactions").await.expect(404).code(), "account_not_found");

    // Other paths and methods.
    assert_eq!(shop.get("/api/Nothing").await.expect(404).code(), "route_not_found");
    let wrong = shop.send("DELETE", "/api/OrdersProxy", &[], None).await.unwrap().expect(405);
    assert_eq!(wrong.code(), "method_not_allowed");
    assert!(wrong.headers["allow"].contains("POST"));
    let echoed = shop.send("GET", "/api/OrdersProxy", &[("X-Request-Id", "mine-1")], None).await.unwrap();
    assert_eq!(echoed.headers["x-request-id"], "mine-1");
    assert_eq!(shop.post("/api/OrdersProxy", "{").await.expect(400).code(), "invalid_json");
    let form = [("Content-Type", "application/x-www-form-urlencoded")];
    let refused = shop.send("POST", "/api/OrdersProxy", &form, Some("a=b")).await.unwrap().expect(415);
    assert_eq!(refused.code(), "unsupported_media_type");
    let huge = format!(r#"{{"userId":"ann","amount":1,"description":"{}"}}"#, "x".repeat(70_000));
    assert_eq!(shop.post("/api/OrdersProxy", &huge).await.expect(413).code(), "payload_too_large");
}

/// Exact text in, exact text out.
async fn amounts(shop: &Client) {
    shop.account("exact", "0").await;
    for (wire, balance) in [
        ("0.1", "0.1"),
        ("0.2", "0.3"),
        ("1e2", "100.3"),
        ("1.000", "101.3"),
        ("\"0.7\"", "102"),
        ("9999999999.99", "10000000101.99"),
    ] {
        let answer = shop.post("/api/PaymentsProxy/exact/deposit", wire).await.expect(200);
        assert_eq!(raw_member(&answer.text, "balance"), balance, "{wire}");
    }
    for (wire, code) in [
        ("0.001", "amount_precision"),
        ("1e-999999999", "amount_precision"),
        ("-0", "amount_not_positive"),
        ("0e5", "amount_not_positive"),
        ("-5", "amount_not_positive"),
        ("10000000000", "amount_too_large"),
        ("1e999999999999999999", "amount_too_large"),
        ("01", "invalid_json"),
        ("", "invalid_json"),
    ] {
        let answer = shop.post("/api/PaymentsProxy/exact/deposit", wire).await.expect(400);
        assert_eq!(answer.code(), code, "{wire}");
        if code != "invalid_json" {
            let order = format!(r#"{{"userId":"exact","amount":{wire}}}"#);
            assert_eq!(shop.post("/api/OrdersProxy", &order).await.expect(400).code(), code, "{wire}");
        }
    }
    let detail = shop.post("/api/PaymentsProxy/exact/deposit", "0").await.expect(400).json()["detail"].clone();
    assert_eq!(detail, "Amount must be positive");
    for wire in ["9999999999.99", "0.3", "12.50"] {
        let placed = shop.post("/api/OrdersProxy", &format!(r#"{{"userId":"exact","amount":{wire}}}"#)).await.expect(201);
        assert_eq!(raw_member(&placed.text, "amount"), wire.trim_end_matches('0'), "{wire}");
        assert_eq!(shop.ended(placed.json()["id"].as_str().unwrap()).await["status"], "Finished");
    }
    assert_eq!(shop.balance("exact").await, "89.2");
}

async fn services_answer_on_their_own_ports(orders: &Client, payments: &Client) {
    let placed = orders.post("/api/Orders", r#"{"userId":"exact","amount":1}"#).await.expect(201);
    assert!(placed.headers["location"].starts_with("/api/Orders/"));
    payments.get("/api/Account/exact/balance").await.expect(200);
    assert_eq!(payments.get("/api/Orders").await.expect(404).code(), "route_not_found");
    // As the original's router finds them.
    let id = placed.json()["id"].as_str().unwrap().to_owned();
    for path in ["/api/orders?userId=exact", "/API/Orders/?userId=exact", &format!("/api/ORDERS/{id}/"), "/api/orders/%65vents"] {
        let answer = orders.get(path).await;
        let expected = if path.contains("vents") { 400 } else { 200 };
        assert_eq!(answer.status, expected, "{path}: {answer:?}");
    }
    payments.post("/api/account/exact/Deposit/", "1").await.expect(200);
    assert_eq!(payments.get("/api/account/exact/balances").await.expect(404).code(), "route_not_found");
}

pub async fn place(shop: &Client, user: &str, amount: &str) -> String {
    let placed = shop.post("/api/OrdersProxy", &format!(r#"{{"userId":"{user}","amount":{amount}}}"#)).await.expect(201);
    placed.json()["id"].as_str().expect("an id").to_owned()
}

/// In the order of the wire.
fn member_names(json: &str) -> Vec<String> {
    struct Names(Vec<String>);
    impl<'de> serde::Deserialize<'de> for Names {
        fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
            struct Visit;
            impl<'de> serde::de::Visitor<'de> for Visit {
                type Value = Names;
                fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                    f.write_str("an object")
                }
                fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Names, A::Error> {
                    let mut names = Vec::new();
                    while let Some((name, _)) = map.next_entry::<String, serde::de::IgnoredAny>()? {
                        names.push(name);
                    }
                    Ok(Names(names))
                }
            }
            d.deserialize_map(Visit)
        }
    }
    serde_json::from_str::<Names>(json).expect("an object").0
}
