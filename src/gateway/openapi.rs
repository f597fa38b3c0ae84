//! One OpenAPI document for all services, merged from theirs under the gateway's paths: pure.
//!
//! A service's document counts only where the gateway has the route; what the gateway itself can answer is added to every
//! operation. May import the gateway's routes and the codes of http.

use std::collections::BTreeMap;

use actix_web::http::Method;
use serde_json::{Map, Value, json};

use super::routes::{ServiceName, Target, resolve};
use crate::http::openapi::{common_paths, components, header_refs, problem_answers, user_id};
use crate::http::{Code, GATEWAY, PROBLEM_JSON};

/// The member that names the services whose part is missing or may be out of date.
pub const PARTIAL: &str = "x-shopd-partial";

const TAG: &str = "Gateway";
const METHODS: [&str; 8] = ["get", "put", "post", "delete", "options", "head", "patch", "trace"];
const ORDER: &str = "#/components/schemas/Order";

/// The document of a shop whose services both answer.
pub fn document(orders: Value, payments: Value) -> Value {
    merge(&[(ServiceName::Orders, Some(orders)), (ServiceName::Payments, Some(payments))])
}

/// Merges the services' documents; one that is absent is named in [`PARTIAL`]. Of two different components of one name the first
/// stays; [`conflicts`] names them, and a test sees to it that there are none.
pub fn merge(documents: &[(ServiceName, Option<Value>)]) -> Value {
    let mut paths = Map::new();
    let mut components = Map::new();
    let mut tags = vec![json!({ "name": TAG, "description": "The gateway's own answers." })];
    for (service, document) in documents {
        let Some(document) = document else { continue };
        for (path, item) in object(document, "/paths") {
            if let Some((path, item)) = renamed(*service, path, item) {
                paths.insert(path, item);
            }
        }
        add_components(&mut components, document.get("components"));
        for tag in document.get("tags").and_then(Value::as_array).into_iter().flatten() {
            if !tags.iter().any(|other| other["name"] == tag["name"]) {
                tags.push(tag.clone());
            }
        }
    }
    add_components(&mut components, Some(&own_components()));
    let knows_orders = components.get("schemas").is_some_and(|schemas| schemas.get("Order").is_some());
    paths.extend(own_paths(knows_orders));
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

/// Of two components of one name the first stays.
fn add_components(all: &mut Map<String, Value>, more: Option<&Value>) {
    for (kind, named) in more.and_then(Value::as_object).into_iter().flatten() {
        let section = all.entry(kind.clone()).or_insert_with(|| json!({}));
        if let (Value::Object(section), Value::Object(named)) = (section, named) {
            for (name, component) in named {
                section.entry(name.clone()).or_insert_with(|| component.clone());
            }
        }
    }
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
        let is_ours =
            || matches!(resolve(&name, &path), Ok(Target::Proxy { .. } | Target::Socket { .. } | Target::Timeline { .. }));
        !METHODS.contains(&method.as_str()) || is_ours()
    });
    if !item.keys().any(|key| METHODS.contains(&key.as_str())) {
        return None;
    }
    for (method, operation) in &mut item {
        if METHODS.contains(&method.as_str()) {
            rename_instances(operation, service);
            add_own_answers(method, &path, operation);
        }
    }
    Some((path, Value::Object(item)))
}

/// The examples of problems name the path that clients asked.
fn rename_instances(operation: &mut Value, service: ServiceName) {
    let answers = operation.get_mut("responses").and_then(Value::as_object_mut).into_iter().flat_map(Map::values_mut);
    let examples = answers.filter_map(|answer| answer.pointer_mut("/content/application~1problem+json/examples")?.as_object_mut());
    for instance in examples.flat_map(Map::values_mut).filter_map(|example| example.pointer_mut("/value/instance")) {
        let rest = instance.as_str().and_then(|text| text.strip_prefix(service.inner_prefix()));
        if let Some(public) = rest.map(|rest| format!("{}{rest}", service.public_prefix())) {
            *instance = public.into();
        }
    }
}

/// What the gateway can answer in a service's stead.
fn add_own_answers(method: &str, path: &str, operation: &mut Value) {
    let Value::Object(operation) = operation else { return };
    let responses = operation.entry("responses").or_insert_with(|| json!({}));
    let Value::Object(responses) = responses else { return };
    let body: &[Code] = if method == "post" { &[Code::InvalidRequest] } else { &[] };
    // A body that is too large is refused whatever it is for.
    let own = [
        Code::PayloadTooLarge,
        Code::HeadTooLarge,
        Code::RateLimited,
        Code::UpstreamUnavailable,
        Code::UpstreamTimeout,
        Code::Unavailable,
        Code::Internal,
    ];
    let codes = [&own, body].concat();
    for (status, own) in problem_answers(&codes, path) {
        match responses.get_mut(&status) {
            Some(theirs) => join(theirs, &own),
            None => drop(responses.insert(status, own)),
        }
    }
}

/// Adds `own` codes to an answer that the service gives too, for reasons of its own.
fn join(theirs: &mut Value, own: &Value) {
    const MEDIA: &str = "/content/application~1problem+json";
    const CODES: &str = "/schema/allOf/1/properties/code/enum";
    let Some(known) = theirs.pointer(MEDIA).and_then(|media| media.pointer(CODES)).and_then(Value::as_array).cloned() else {
        // Without a body, or with another: ours is a second form of this answer.
        if let Some(theirs) = theirs.as_object_mut()
            && let Value::Object(content) = theirs.entry("content").or_insert_with(|| json!({}))
        {
            content.entry(PROBLEM_JSON).or_insert_with(|| own["content"][PROBLEM_JSON].clone());
        }
        return;
    };
    let new = |code: &&Value| !known.contains(code);
    let codes: Vec<Value> = own
        .pointer(MEDIA)
        .and_then(|media| media.pointer(CODES))
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter(new)
        .cloned()
        .collect();
    if codes.is_empty() {
        return;
    }
    let both = [&theirs["description"], &own["description"]].map(|text| text.as_str().unwrap_or_default());
    theirs["description"] = both.join("\n\n").into();
    if let Some(headers) = own["headers"].as_object() {
        let all = theirs["headers"].as_object_mut();
        all.into_iter().for_each(|all| all.extend(headers.clone()));
    }
    if let Some(Value::Array(all)) = theirs.pointer_mut(MEDIA).and_then(|media| media.pointer_mut(CODES)) {
        all.extend(codes);
    }
    let examples = |media: &Value| media.get("examples").and_then(Value::as_object).cloned().unwrap_or_default();
    if let (Some(media), Some(own)) = (theirs.pointer_mut(MEDIA), own.pointer(MEDIA)) {
        let mut all = examples(media);
        for (name, example) in examples(own) {
            all.entry(name).or_insert(example);
        }
        media["examples"] = all.into();
    }
}

/// What the gateway's own operations refer to, where no service brought it.
fn own_components() -> Value {
    let mut own = components(json!({}));
    own["schemas"]["Summary"] = json!({
        "type": "object",
        "required": ["userId", "balance", "orders", "partial", "missing"],
        "properties": {
            "userId": user_id(),
            "balance": {"type": "number", "nullable": true, "description": "null without an account, or without an answer."},
            "orders": {"type": "array", "items": {"type": "object"}, "description": "The latest orders, newest first, as in the list."},
            "partial": {"type": "boolean", "description": "A service did not answer."},
            "missing": {"type": "array", "items": {"type": "string", "enum": ["orders", "payments"]}},
        },
    });
    own
}

fn own_paths(knows_orders: bool) -> Map<String, Value> {
    let get = |id: &str, summary: &str, path: &str, mut responses: Value| {
        let refusals = problem_answers(&[Code::PayloadTooLarge, Code::HeadTooLarge], path);
        responses.as_object_mut().into_iter().for_each(|all| all.extend(refusals.clone()));
        (path.to_owned(), json!({"get": {"tags": [TAG], "operationId": id, "summary": summary, "responses": responses}}))
    };
    let page = json!({"200": {
        "description": "The page.", "headers": header_refs(&[]),
        "content": {"text/html": {"schema": {"type": "string"}, "example": "<!DOCTYPE html>"}},
    }});
    let document = json!({"200": {
        "description": "OpenAPI 3.0.", "headers": header_refs(&[]),
        "content": {"application/json": {"schema": {"type": "object"}, "example": {"openapi": "3.0.3"}}},
    }});
    let root = json!({"302": {"description": "To the page.", "headers": header_refs(&["Location"])}});
    let mut paths = common_paths(GATEWAY);
    paths.extend([
        get("root", "Where to begin", "/", root),
        get("swagger", "This document as a page", "/swagger", page),
        get("document", "This document", "/swagger/v1/swagger.json", document),
        ("/api/users/{userId}/summary".to_owned(), summary(knows_orders)),
    ]);
    paths
}

fn summary(knows_orders: bool) -> Value {
    let schema = match knows_orders {
        true => json!({"allOf": [
            {"$ref": "#/components/schemas/Summary"},
            {"type": "object", "properties": {"orders": {"type": "array", "items": {"$ref": ORDER}}}},
        ]}),
        false => json!({"$ref": "#/components/schemas/Summary"}),
    };
    let codes = [
        Code::InvalidRequest,
        Code::AccountNotFound,
        Code::PayloadTooLarge,
        Code::HeadTooLarge,
        Code::RateLimited,
        Code::Internal,
        Code::UpstreamUnavailable,
        Code::UpstreamTimeout,
    ];
    let mut responses = problem_answers(&codes, "/api/users/{userId}/summary");
    let example = json!({"userId": "alice", "balance": 100.5, "orders": [], "partial": false, "missing": []});
    let answer = json!({
        "description": "What the services know; `missing` names those that did not answer.",
        "headers": header_refs(&[]),
        "content": {"application/json": {"schema": schema, "example": example}},
    });
    responses.insert("200".to_owned(), answer);
    json!({"get": {
        "tags": [TAG],
        "operationId": "userSummary",
        "summary": "A user's balance and recent orders, from both services at once",
        "parameters": [
            {"name": "userId", "in": "path", "required": true, "schema": user_id()},
            {"$ref": "#/components/parameters/X-Request-Id"},
            {"$ref": "#/components/parameters/traceparent"},
        ],
        "responses": responses,
    }})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn orders() -> Value {
        let away = problem_answers(&[Code::Unavailable], "/api/Orders")["503"].clone();
        json!({
            "openapi": "3.0.0",
            "tags": [{ "name": "Orders" }],
            "paths": {
                "/api/Orders": {
                    "get": { "operationId": "listOrders", "responses": { "200": { "description": "The orders." } } },
                    "post": { "operationId": "placeOrder", "responses": { "503": away } },
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
            "/",
            "/api/OrdersProxy",
            "/api/PaymentsProxy/{userId}/balance",
            "/api/users/{userId}/summary",
            "/health/live",
            "/health/ready",
            "/metrics",
            "/swagger",
            "/swagger/v1/swagger.json",
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
        let codes = |answer: &Value| answer["content"][PROBLEM_JSON]["schema"]["allOf"][1]["properties"]["code"]["enum"].clone();
        let balance = &merged["paths"]["/api/PaymentsProxy/{userId}/balance"]["get"]["responses"];
        assert_eq!(codes(&balance["429"]), json!(["rate_limited"]));
        assert_eq!(codes(&balance["503"]), json!(["upstream_unavailable", "unavailable"]));
        assert_eq!(codes(&balance["504"]), json!(["upstream_timeout"]));
        let place = &merged["paths"]["/api/OrdersProxy"]["post"]["responses"];
        let both = &place["503"];
        assert_eq!(codes(both), json!(["unavailable", "upstream_unavailable"]));
        for code in ["unavailable", "upstream_unavailable"] {
            assert!(both["description"].as_str().unwrap().contains(&format!("`{code}`")), "{both}");
            let example = &both["content"][PROBLEM_JSON]["examples"][code]["value"];
            assert_eq!((&example["code"], &example["instance"]), (&json!(code), &json!("/api/OrdersProxy")));
        }
        assert!(place.get("413").is_some());
        assert_eq!(merged["paths"]["/api/OrdersProxy"]["get"]["responses"]["200"]["description"], "The orders.");
    }

    #[test]
    fn equal_components_are_taken_once_and_different_ones_are_named() {
        let documents = [(ServiceName::Orders, Some(orders())), (ServiceName::Payments, Some(payments()))];
        assert!(conflicts(&documents).is_empty());
        let schemas = merge(&documents)["components"]["schemas"].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(schemas, ["Account", "Health", "Order", "Problem", "Summary"]);
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
