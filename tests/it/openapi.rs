//! The document against the running system: its own examples are sent, and every answer must be one that it describes.

use std::process::Command;

use serde_json::{Map, Value};

use crate::support::postgres;
use crate::support::shop::{All, Answer, Client};

const DOCUMENT: &str = "/swagger/v1/swagger.json";
const ORDERS: &str = "/api/OrdersProxy";
const ORDER: &str = "/api/OrdersProxy/{orderId}";
const EVENTS: &str = "/api/OrdersProxy/events";
const ORDER_EVENTS: &str = "/api/OrdersProxy/{orderId}/events";
const ORDER_WS: &str = "/api/OrdersProxy/{orderId}/ws";
const TIMELINE: &str = "/api/OrdersProxy/{orderId}/timeline";
const EXAMPLE_ORDER: &str = "3f2504e0-4f89-11d3-9a0c-0305e82c3301";
const ACCOUNT: &str = "/api/PaymentsProxy/{userId}";
const DEPOSIT: &str = "/api/PaymentsProxy/{userId}/deposit";
const BALANCE: &str = "/api/PaymentsProxy/{userId}/balance";
const TRANSACTIONS: &str = "/api/PaymentsProxy/{userId}/transactions";
const SUMMARY: &str = "/api/users/{userId}/summary";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_running_system_answers_as_its_document_says() {
    let shop = All::start(postgres::own_dir()).await;
    let document = shop.client.get(DOCUMENT).await.expect(200).json();
    assert!(document.get("x-shopd-partial").is_none());
    assert_eq!(printed(), document, "`shopd openapi` prints what is served");
    let mut replay = Replay { document: &document, client: &shop.client, replayed: Vec::new() };

    // Everything that fails without an account first, then the example user's life, then what is refused.
    replay.get(BALANCE, 404).await;
    replay.get(TRANSACTIONS, 404).await;
    replay.get(SUMMARY, 404).await;
    replay.get(ORDER, 404).await;
    replay.get(ORDER_EVENTS, 404).await;
    replay.get(TIMELINE, 404).await;
    replay.post(ACCOUNT, &[200]).await;
    replay.post(ACCOUNT, &[409]).await;
    replay.post(DEPOSIT, &[200, 200]).await;
    // One example has an order id, so its repetition is a replay; the other makes a new order each time.
    replay.post(ORDERS, &[201, 201]).await;
    replay.post(ORDERS, &[200, 201]).await;
    for (path, status) in [(ORDER, 200), (ORDERS, 200), (BALANCE, 200), (TRANSACTIONS, 200), (SUMMARY, 200)] {
        replay.get(path, status).await;
    }
    for path in ["/health/live", "/health/ready", "/metrics", "/swagger", DOCUMENT] {
        replay.get(path, 200).await;
    }
    replay.get("/", 302).await;
    replay.streams().await;

    let json = &[("content-type", "application/json")][..];
    for (method, path, asked, headers, body, status) in [
        ("get", ORDERS, "/api/OrdersProxy?limit=0", &[][..], None, 400),
        ("get", ORDER, "/api/OrdersProxy/x", &[], None, 400),
        ("get", EVENTS, EVENTS, &[], None, 400),
        ("get", ORDER_EVENTS, "/api/OrdersProxy/x/events", &[], None, 400),
        ("get", ORDER_WS, "/api/OrdersProxy/x/ws", &[], None, 400),
        ("get", TIMELINE, "/api/OrdersProxy/x/timeline", &[], None, 400),
        ("get", BALANCE, "/api/PaymentsProxy/%00/balance", &[], None, 400),
        ("get", SUMMARY, "/api/users/%zz/summary", &[], None, 400),
        ("get", TRANSACTIONS, "/api/PaymentsProxy/alice/transactions?cursor=x", &[], None, 400),
        ("post", ACCOUNT, "/api/PaymentsProxy/a%0Ab", &[], None, 400),
        ("post", ACCOUNT, "/api/PaymentsProxy/bob", &[("content-encoding", "gzip")], Some("x"), 415),
        ("post", DEPOSIT, "/api/PaymentsProxy/alice/deposit", json, Some("0.001"), 400),
        ("post", DEPOSIT, "/api/PaymentsProxy/nobody/deposit", json, Some("1"), 404),
        ("post", DEPOSIT, "/api/PaymentsProxy/alice/deposit", &[("content-type", "text/plain")], Some("1"), 415),
        ("post", ORDERS, ORDERS, json, Some("{"), 400),
        (
            "post",
            ORDERS,
            ORDERS,
            json,
            Some(r#"{"orderId":"3f2504e0-4f89-11d3-9a0c-0305e82c3301","userId":"alice","amount":1}"#),
            409,
        ),
        ("post", ORDERS, ORDERS, &[("content-type", "text/plain")], Some("{}"), 415),
    ] {
        let answer = shop.client.send(&method.to_uppercase(), asked, headers, body).await.unwrap();
        replay.hold(method, path, answer, status);
    }
    for (path, asked, body, other) in [
        (ORDERS, ORDERS, Some(r#"{"userId":"alice","amount":1}"#), "{\"userId\":\"alice\",\"amount\":2}"),
        (DEPOSIT, "/api/PaymentsProxy/alice/deposit", Some("1"), "2"),
        (ACCOUNT, "/api/PaymentsProxy/carol", None, "2"),
    ] {
        let key = &[("idempotency-key", "k"), ("content-type", "application/json")];
        for (body, status) in [(body, if path == ORDERS { 201 } else { 200 }), (Some(other), 422)] {
            let answer = shop.client.send("POST", asked, key, body).await.unwrap();
            replay.hold("post", path, answer, status);
        }
        let answer = shop.client.send("POST", asked, &[("idempotency-key", ""), key[1]], body).await.unwrap();
        replay.hold("post", path, answer, 400);
        let parameters = document["paths"][path]["post"]["parameters"].as_array().unwrap();
        assert!(
            parameters.iter().any(|p| p["name"] == "Idempotency-Key" && p["in"] == "header" && p["required"] == false),
            "{path}"
        );
    }
    let many: Vec<String> = (0..120).map(|n| format!("x-{n}")).collect();
    let many: Vec<_> = many.iter().map(|name| (name.as_str(), "1")).collect();
    for path in ["/", "/swagger", DOCUMENT, "/health/live", "/health/ready", "/metrics"] {
        let answer = shop.client.send("GET", path, &many, None).await.unwrap();
        replay.hold("get", path, answer, 431);
    }
    let large = "1".repeat(70_000);
    for (path, asked) in [(ORDERS, ORDERS), (DEPOSIT, "/api/PaymentsProxy/alice/deposit"), (ACCOUNT, "/api/PaymentsProxy/alice")] {
        let answer = shop.client.send("POST", asked, json, Some(&large)).await.unwrap();
        replay.hold("post", path, answer, 413);
    }
    replay.all_were_asked();
}

#[test]
fn the_documented_routes_are_those_there_are() {
    let documented = include_str!("../../docs/API.md").lines();
    let rows = documented.filter_map(|line| {
        line.strip_prefix("| GET `").map(|rest| ("get", rest)).or_else(|| Some(("post", line.strip_prefix("| POST `")?)))
    });
    let mut rows: Vec<String> = rows.filter_map(|(method, rest)| Some(format!("{method} {}", rest.split_once('`')?.0))).collect();
    let document = printed();
    let operations =
        |(path, item): (&String, &Value)| members(item).keys().map(|method| format!("{method} {path}")).collect::<Vec<_>>();
    let mut there_are: Vec<String> = members(&document["paths"]).iter().flat_map(operations).collect();
    rows.sort();
    there_are.sort();
    assert_eq!(rows, there_are, "docs/API.md and the document differ");
}

/// What `shopd openapi` prints.
fn printed() -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_shopd")).arg("openapi").output().expect("the program");
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    serde_json::from_slice(&output.stdout).expect("JSON and nothing else")
}

struct Replay<'a> {
    document: &'a Value,
    client: &'a Client,
    /// `get /path`
    replayed: Vec<String>,
}

impl Replay<'_> {
    async fn get(&mut self, path: &str, status: u16) {
        let answer = self.client.send("GET", &self.filled("get", path), &[], None).await.unwrap();
        self.hold("get", path, answer, status);
    }

    /// The example's order ends, so its stream ends by itself; a user's stays open, so its first event must do.
    async fn streams(&mut self) {
        self.client.ended(EXAMPLE_ORDER).await;
        self.get(TIMELINE, 200).await;
        let stream = self.client.send("GET", &self.filled("get", ORDER_EVENTS), &[], None).await.unwrap();
        let id = self.an_order_comes(&stream);
        self.hold("get", ORDER_EVENTS, stream, 200);
        let path = self.filled("get", ORDER_EVENTS);
        let over = self.client.send("GET", &path, &[("last-event-id", &id)], None).await.unwrap();
        self.hold("get", ORDER_EVENTS, over, 204);
        let stream = self.client.beginning(&format!("{EVENTS}?userId=alice"), "\n\nid: ").await;
        self.hold("get", EVENTS, stream, 200);
        let waited = &[("prefer", "wait=10")];
        let answer = self.client.send("POST", ORDERS, waited, Some(r#"{"userId":"alice","amount":1}"#)).await.unwrap();
        assert!(answer.headers.contains_key("preference-applied"), "{answer:?}");
        self.hold("post", ORDERS, answer, 201);
    }

    /// The id of the one event in `stream`, which is the order.
    fn an_order_comes(&self, stream: &Answer) -> String {
        let line =
            |name: &str| stream.text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{stream:?}"));
        self.fits(&serde_json::from_str(line("data: ")).unwrap(), &self.document["components"]["schemas"]["Order"], "data");
        assert!(stream.text.starts_with("retry: 1000\n\n"), "{stream:?}");
        line("id: ").to_owned()
    }

    /// Sends every example body that the document has, as each of the media types it names; `statuses` in the examples' order.
    async fn post(&mut self, path: &str, statuses: &[u16]) {
        let asked = self.filled("post", path);
        let media = self.operation("post", path)["requestBody"]["content"].clone();
        if media.is_null() {
            let answer = self.client.send("POST", &asked, &[], None).await.unwrap();
            return self.hold("post", path, answer, statuses[0]);
        }
        let examples = media["application/json"]["examples"].as_object().expect("examples").clone();
        assert_eq!(examples.len(), statuses.len(), "{path}");
        for (example, status) in examples.values().zip(statuses) {
            self.fits(&example["value"], &media["application/json"]["schema"], path);
            let body = example["value"].to_string();
            let answer = self.client.send("POST", &asked, &[("content-type", "application/json")], Some(&body)).await.unwrap();
            self.hold("post", path, answer, *status);
        }
    }

    fn operation(&self, method: &str, path: &str) -> &Value {
        let operation = &self.document["paths"][path][method];
        assert!(operation.is_object(), "{method} {path} is not in the document");
        operation
    }

    /// The path with the examples of its parameters.
    fn filled(&self, method: &str, path: &str) -> String {
        let mut filled = path.to_owned();
        for parameter in self.operation(method, path)["parameters"].as_array().into_iter().flatten().filter(|p| p["in"] == "path") {
            let name = parameter["name"].as_str().unwrap();
            let example =
                parameter["schema"]["example"].as_str().unwrap_or_else(|| panic!("{method} {path}: no example of {name}"));
            filled = filled.replace(&format!("{{{name}}}"), example);
        }
        assert!(!filled.contains('{'), "{filled}");
        filled
    }

    /// `answer` must have this status, and be described: its status, content type, headers, members and schema.
    fn hold(&mut self, method: &str, path: &str, answer: Answer, status: u16) {
        let at = format!("{method} {path} {status}");
        assert_eq!(answer.status, status, "{at}: {answer:?}");
        self.replayed.push(format!("{method} {path}"));
        let described = &self.operation(method, path)["responses"][status.to_string()];
        assert!(described.is_object(), "{at} is not described: {answer:?}");
        for name in described["headers"].as_object().expect("headers").keys() {
            let optional =
                ["Link", "X-Next-Cursor", "Retry-After", "Idempotent-Replayed", "Preference-Applied"].contains(&name.as_str());
            assert!(optional || answer.headers.contains_key(&name.to_lowercase()), "{at}: no {name} in {:?}", answer.headers);
        }
        let Some(content) = described["content"].as_object() else {
            return assert!(answer.text.is_empty(), "{at}: a body that is not described: {}", answer.text);
        };
        let content_type = answer.headers["content-type"].split(';').next().unwrap_or_default().trim().to_owned();
        let media = content.get(&content_type).unwrap_or_else(|| panic!("{at}: {content_type} is not described"));
        if !content_type.ends_with("json") {
            return;
        }
        let body = answer.json();
        self.fits(&body, &media["schema"], &at);
        let example = match (&media["example"], media["examples"].as_object()) {
            (Value::Null, Some(examples)) => {
                let code = body["code"].as_str().unwrap_or_default();
                assert!(examples.contains_key(code), "{at}: {code} is not described");
                &examples[code]["value"]
            }
            (example, _) => example,
        };
        if path == DOCUMENT {
            return;
        }
        let (example, body) = (first(example), first(&body));
        let missing: Vec<_> = members(example).keys().filter(|name| !members(body).contains_key(*name)).collect();
        assert!(missing.is_empty(), "{at}: {missing:?} of the example are not in {body}");
        let strange: Vec<_> =
            members(body).keys().filter(|name| *name != "errors" && !members(example).contains_key(*name)).collect();
        assert!(strange.is_empty(), "{at}: {strange:?} are not in the example {example}");
    }

    /// As much of JSON Schema as the document uses and a few lines can hold.
    fn fits(&self, value: &Value, schema: &Value, at: &str) {
        if let Some(reference) = schema["$ref"].as_str() {
            let target = self.document.pointer(reference.trim_start_matches('#'));
            return self.fits(value, target.unwrap_or_else(|| panic!("{at}: {reference} leads nowhere")), at);
        }
        for part in schema["allOf"].as_array().into_iter().flatten() {
            self.fits(value, part, at);
        }
        if let Some(kinds) = schema["oneOf"].as_array() {
            let kind = kinds.iter().find(|kind| is_a(value, kind["type"].as_str().unwrap_or_default()));
            return self.fits(value, kind.unwrap_or_else(|| panic!("{at}: {value} is none of {kinds:?}")), at);
        }
        if value.is_null() && schema["nullable"] == true {
            return;
        }
        if let Some(name) = schema["type"].as_str() {
            assert!(is_a(value, name), "{at}: {value} is no {name}");
        }
        if let Some(known) = schema["enum"].as_array() {
            assert!(known.contains(value), "{at}: {value} is none of {known:?}");
        }
        if let Some(bound) = schema["maximum"].as_f64().zip(value.as_f64()) {
            assert!(bound.1 <= bound.0, "{at}: {value}");
        }
        for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            assert!(value.get(name).is_some(), "{at}: no {name} in {value}");
        }
        for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
            if let Some(member) = value.get(name) {
                self.fits(member, schema, &format!("{at}.{name}"));
            }
        }
        for item in value.as_array().into_iter().flatten().filter(|_| schema["items"].is_object()) {
            self.fits(item, &schema["items"], at);
        }
    }

    fn all_were_asked(&self) {
        for (path, item) in self.document["paths"].as_object().expect("paths") {
            for method in item.as_object().expect("an item").keys() {
                assert!(self.replayed.contains(&format!("{method} {path}")), "{method} {path} is described and was never asked");
            }
        }
    }
}

fn is_a(value: &Value, kind: &str) -> bool {
    match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64(),
        "boolean" => value.is_boolean(),
        _ => false,
    }
}

/// A page's first entry stands for all.
fn first(value: &Value) -> &Value {
    value.get(0).unwrap_or(value)
}

fn members(value: &Value) -> &Map<String, Value> {
    value.as_object().expect("an object")
}
