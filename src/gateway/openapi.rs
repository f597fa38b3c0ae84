//! One OpenAPI document for all services, merged from theirs under the gateway's paths: pure.
//!
//! A service's document counts only where the gateway has the route; what the gateway itself can answer is added to every
//! operation. May import the gateway's routes and the codes of http.

use std::collections::BTreeMap;

use actix_web::http::Method;
use serde_json::{Map, Value, json};

use super::routes::{ServiceName, Target, resolve};
use crate::http::Code;

/// The member that names the services whose part is missing or may be out of date.
pub const PARTIAL: &str = "x-shopd-partial";

const TAG: &str = "Gateway";
const METHODS: [&str; 8] = ["get", "put", "post", "delete", "options", "head", "patch", "trace"];
const SCHEMA_REF: &str = "#/components/schemas/Problem";

/// The document of a shop whose services both answer.
pub fn document(orders: Value, payments: Value) -> Value {
    merge(&[(ServiceName::Orders, Some(orders)), (ServiceName::Payments, Some(payments))])
}

/// Merges the services' documents; one that is absent is named in [`PARTIAL`]. Of two different components of one name the first
/// stays; [`conflicts`] names them, and a test sees to it that there are none.
pub fn merge(documents: &[(ServiceName, Option<Value>)]) -> Value {
    let mut paths = own_paths();
    let mut components = Map::new();
    let mut tags = vec![json!({ "name": TAG, "description": "The gateway's own answers." })];
    for (service, document) in documents {
        let Some(document) = document else { continue };
        for (path, item) in object(document, "/paths") {
            if let Some((path, item)) = renamed(*service, path, item) {
                paths.insert(path, item);
            }
        }
        for (kind, named) in object(document, "/components") {
            let section = components.entry(kind.clone()).or_insert_with(|| json!({}));
            if let (Value::Object(section), Value::Object(named)) = (section, named) {
                for (name, component) in named {
                    section.entry(name.clone()).or_insert_with(|| component.clone());
                }
            }
        }
        for tag in document.get("tags").and_then(Value::as_array).into_iter().flatten() {
            if !tags.iter().any(|other| other["name"] == tag["name"]) {
                tags.push(tag.clone());
            }
        }
    }
    if let Some(Value::Object(schemas)) = Some(components.entry("schemas").or_insert_with(|| json!({}))) {
        schemas.entry("Problem").or_insert_with(problem_schema);
    }
    let mut merged = json!({
        "openapi": "3.0.3",
        "info": {
            "title": "shopd",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "An online shop's orders and payments: the services' operations under the gateway's paths.",
        },
        "servers": [{ "url": "/" }],
        "tags": tags,
        "paths": paths,
        "components": components,
    });
    let absent = documents.iter().filter(|(_, document)| document.is_none()).map(|(service, _)| *service);
    mark_partial(&mut merged, absent);
    merged
}

/// Names services in [`PARTIAL`], beside those named there already.
pub fn mark_partial(document: &mut Value, services: impl IntoIterator<Item = ServiceName>) {
    for service in services {
        let Value::Object(members) = &mut *document else { return };
        let named = members.entry(PARTIAL).or_insert_with(|| json!([]));
        if let Value::Array(named) = named
            && !named.iter().any(|name| name == service.as_str())
        {
            named.push(service.as_str().into());
        }
    }
}

/// Components that have one name and two meanings, as `schemas/Problem`.
pub fn conflicts(documents: &[(ServiceName, Option<Value>)]) -> Vec<String> {
    let mut seen: BTreeMap<String, &Value> = BTreeMap::new();
    let mut conflicts = Vec::new();
    for document in documents.iter().filter_map(|(_, document)| document.as_ref()) {
        for (kind, named) in object(document, "/components") {
            for (name, component) in named.as_object().into_iter().flatten() {
                let name = format!("{kind}/{name}");
                if seen.get(&name).is_some_and(|other| *other != component) {
                    conflicts.push(name.clone());
                }
                seen.insert(name, component);
            }
        }
    }
    conflicts
}

fn object<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = (&'a String, &'a Value)> {
    value.pointer(pointer).and_then(Value::as_object).into_iter().flatten()
}

/// A service's path as the gateway has it, with the operations that the gateway lets through.
fn renamed(service: ServiceName, path: &str, item: &Value) -> Option<(String, Value)> {
    let rest = path.strip_prefix(service.inner_prefix())?;
    let path = format!("{}{rest}", service.public_prefix());
    let mut item = item.as_object()?.clone();
    item.retain(|method, _| {
        let Ok(name) = Method::from_bytes(method.to_ascii_uppercase().as_bytes()) else { return true };
        !METHODS.contains(&method.as_str()) || matches!(resolve(&name, &path), Ok(Target::Proxy { .. }))
    });
    if !item.keys().any(|key| METHODS.contains(&key.as_str())) {
        return None;
    }
    for (method, operation) in &mut item {
        if METHODS.contains(&method.as_str()) {
            add_own_answers(method, operation);
        }
    }
    Some((path, Value::Object(item)))
}

/// What the gateway can answer in a service's stead.
fn add_own_answers(method: &str, operation: &mut Value) {
    let Value::Object(operation) = operation else { return };
    let responses = operation.entry("responses").or_insert_with(|| json!({}));
    let Value::Object(responses) = responses else { return };
    let body = (method == "post").then_some(Code::PayloadTooLarge);
    for code in [Code::UpstreamUnavailable, Code::UpstreamTimeout, Code::Internal].into_iter().chain(body) {
        let own = problem_response(&[code]);
        match responses.get_mut(code.status().as_str()) {
            // The service answers this status too, for a reason of its own.
            Some(Value::Object(theirs)) if code == Code::UpstreamUnavailable => {
                let before = theirs.get("description").and_then(Value::as_str).unwrap_or_default();
                let described = format!("{before} {}", meaning(&[code])).trim().to_owned();
                theirs.insert("description".into(), described.into());
                theirs.entry("content").or_insert_with(|| own["content"].clone());
            }
            Some(_) => {}
            None => drop(responses.insert(code.status().as_str().to_owned(), own)),
        }
    }
}

fn meaning(codes: &[Code]) -> String {
    codes.iter().map(|code| format!("`{code}`:{}", code.meaning())).collect::<Vec<_>>().join(" ")
}

fn problem_response(codes: &[Code]) -> Value {
    json!({
        "description": meaning(codes),
        "content": { "application/problem+json": { "schema": { "$ref": SCHEMA_REF } } },
    })
}

/// RFC 9457, where no service brought its own.
fn problem_schema() -> Value {
    json!({
        "type": "object",
        "required": ["type", "title", "status", "detail", "instance", "code", "traceId"],
        "properties": {
            "type": { "type": "string" },
            "title": { "type": "string" },
            "status": { "type": "integer" },
            "detail": { "type": "string" },
            "instance": { "type": "string" },
            "code": { "type": "string", "enum": Code::ALL.iter().map(|code| code.as_str()).collect::<Vec<_>>() },
            "errors": { "type": "object", "additionalProperties": { "type": "array", "items": { "type": "string" } } },
            "traceId": { "type": "string" },
        },
    })
}

fn own_paths() -> Map<String, Value> {
    let json_answer = |description: &str, schema: Value| json!({ "description": description, "content": { "application/json": { "schema": schema } } });
    let health =
        |id: &str, summary: &str| json!({ "get": { "tags": [TAG], "operationId": id, "summary": summary, "responses": {} } });
    let status = json!({
        "type": "object",
        "required": ["status", "role"],
        "properties": {
            "status": { "type": "string" },
            "role": { "type": "string" },
            "missing": { "type": "array", "items": { "type": "string" } },
        },
    });
    let mut live = health("gatewayLive", "Whether the process runs");
    live["get"]["responses"]["200"] = json_answer("It runs.", status.clone());
    let mut ready = health("gatewayReady", "Whether a replica of each service is live");
    ready["get"]["responses"]["200"] = json_answer("Every service has a live replica.", status.clone());
    ready["get"]["responses"]["503"] = json_answer("A service has none; `missing` names it.", status);
    let mut metrics = health("gatewayMetrics", "The gateway's metrics");
    metrics["get"]["responses"]["200"] =
        json!({ "description": "Prometheus text.", "content": { "text/plain": { "schema": { "type": "string" } } } });
    let summary = json!({ "get": {
        "tags": [TAG],
        "operationId": "userSummary",
        "summary": "A user's balance and recent orders, from both services at once",
        "parameters": [{
            "name": "userId", "in": "path", "required": true,
            "schema": { "type": "string", "minLength": 1, "maxLength": 128 },
        }],
        "responses": {
            "200": json_answer("What the services know; `missing` names those that did not answer.", json!({
                "type": "object",
                "required": ["userId", "balance", "orders", "partial", "missing"],
                "properties": {
                    "userId": { "type": "string" },
                    "balance": { "type": "number", "nullable": true },
                    "orders": { "type": "array", "items": { "type": "object" } },
                    "partial": { "type": "boolean" },
                    "missing": { "type": "array", "items": { "type": "string", "enum": ["orders", "payments"] } },
                },
            })),
            "400": problem_response(&[Code::InvalidRequest]),
            "404": problem_response(&[Code::AccountNotFound]),
            "500": problem_response(&[Code::Internal]),
            "503": problem_response(&[Code::UpstreamUnavailable]),
            "504": problem_response(&[Code::UpstreamTimeout]),
        },
    } });
    [("/api/users/{userId}/summary", summary), ("/health/live", live), ("/health/ready", ready), ("/metrics", metrics)]
        .map(|(path, item)| (path.to_owned(), item))
        .into_iter()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn orders() -> Value {
        json!({
            "openapi": "3.0.0",
            "tags": [{ "name": "Orders" }],
            "paths": {
                "/api/Orders": {
                    "get": { "operationId": "listOrders", "responses": { "200": { "description": "The orders." } } },
                    "post": { "operationId": "placeOrder", "responses": { "503": { "description": "Away." } } },
                    "delete": { "operationId": "dropOrders", "responses": {} },
                },
                "/api/Orders/{id}/secret": { "get": { "responses": {} } },
                "/health/live": { "get": { "responses": {} } },
            },
            "components": { "schemas": { "Order": { "type": "object" }, "Problem": { "type": "object" } } },
        })
    }

    fn payments() -> Value {
        json!({
            "tags": [{ "name": "Payments" }],
            "paths": { "/api/Account/{userId}/balance": { "get": { "responses": {} } } },
            "components": { "schemas": { "Account": { "type": "object" }, "Problem": { "type": "object" } } },
        })
    }

    #[test]
    fn paths_are_the_gateways_and_only_those_it_has() {
        let merged = document(orders(), payments());
        let paths: Vec<&str> = merged["paths"].as_object().unwrap().keys().map(String::as_str).collect();
        let expected = [
            "/api/OrdersProxy",
            "/api/PaymentsProxy/{userId}/balance",
            "/api/users/{userId}/summary",
            "/health/live",
            "/health/ready",
            "/metrics",
        ];
        assert_eq!(paths, expected);
        let place = &merged["paths"]["/api/OrdersProxy"];
        assert!(place.get("delete").is_none());
        assert_eq!(place["post"]["operationId"], "placeOrder");
        let tags: Vec<&str> = merged["tags"].as_array().unwrap().iter().map(|tag| tag["name"].as_str().unwrap()).collect();
        assert_eq!(tags, ["Gateway", "Orders", "Payments"]);
        assert_eq!(merged["servers"][0]["url"], "/");
        assert!(merged.get(PARTIAL).is_none());
    }

    #[test]
    fn every_proxied_operation_lists_the_gateways_own_answers() {
        let merged = document(orders(), payments());
        let balance = &merged["paths"]["/api/PaymentsProxy/{userId}/balance"]["get"]["responses"];
        for status in ["503", "504"] {
            assert_eq!(balance[status]["content"]["application/problem+json"]["schema"]["$ref"], SCHEMA_REF, "{status}");
        }
        let place = &merged["paths"]["/api/OrdersProxy"]["post"]["responses"];
        let both = place["503"]["description"].as_str().unwrap();
        assert!(both.starts_with("Away.") && both.contains("upstream_unavailable"), "{both}");
        assert!(place.get("413").is_some());
        assert_eq!(merged["paths"]["/api/OrdersProxy"]["get"]["responses"]["200"]["description"], "The orders.");
    }

    #[test]
    fn equal_components_are_taken_once_and_different_ones_are_named() {
        let documents = [(ServiceName::Orders, Some(orders())), (ServiceName::Payments, Some(payments()))];
        assert!(conflicts(&documents).is_empty());
        let schemas = merge(&documents)["components"]["schemas"].as_object().unwrap().len();
        assert_eq!(schemas, 3);
        let mut other = payments();
        other["components"]["schemas"]["Problem"]["type"] = json!("string");
        let documents = [(ServiceName::Orders, Some(orders())), (ServiceName::Payments, Some(other))];
        assert_eq!(conflicts(&documents), ["schemas/Problem"]);
        assert_eq!(merge(&documents)["components"]["schemas"]["Problem"]["type"], "object");
    }

    #[test]
    fn a_service_that_is_down_is_named_once() {
        let mut merged = merge(&[(ServiceName::Orders, Some(orders())), (ServiceName::Payments, None)]);
        assert_eq!(merged[PARTIAL], json!(["payments"]));
        assert!(merged["paths"].get("/api/OrdersProxy").is_some());
        mark_partial(&mut merged, [ServiceName::Payments, ServiceName::Orders]);
        assert_eq!(merged[PARTIAL], json!(["payments", "orders"]));
        let nothing = merge(&[(ServiceName::Orders, None), (ServiceName::Payments, None)]);
        assert!(nothing["components"]["schemas"].get("Problem").is_some());
    }
}
