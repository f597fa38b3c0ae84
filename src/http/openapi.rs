//! A service's OpenAPI 3.0 document: paperclip derives paths, parameters and names from the handlers; an overlay adds what it
//! cannot say: problems by code, headers, examples, `oneOf`.

use std::collections::BTreeMap;

use actix_web::App;
use paperclip::actix::{OpenApiExt, OperationModifier, web::ServiceConfig as ApiConfig};
use paperclip::v2::models::{DefaultApiRaw, DefaultOperationRaw, Info, Parameter, ParameterIn, Response};
use paperclip::v2::schema::{Apiv2Errors, Apiv2Schema};
use serde_json::{Map, Value, json};

use super::body::{Ignored, Json};
use super::context::RequestContext;
use super::extract::Params;
use super::idempotency::{IDEMPOTENCY_KEY, KEY_CHARS_MAX};
use super::problem::{Code, Problem};
use super::render::PROBLEM_JSON;
use super::reply::Reply;

pub use paperclip::actix::api_v2_operation;
pub use paperclip::v2::models::DataType;

/// What one operation answers and takes beyond what its handler's types say.
pub struct Operation {
    /// Lower case.
    pub method: &'static str,
    pub path: &'static str,
    pub successes: Vec<Success>,
    /// The problems it can answer; `internal` and `unavailable` are every operation's.
    pub codes: &'static [Code],
    /// Examples of a JSON body, by name; empty where it takes none.
    pub bodies: Vec<(&'static str, Value)>,
    /// By path or query parameter's name: its schema, which may hold an example.
    pub parameters: Vec<(&'static str, Value)>,
    /// Request headers beside `X-Request-Id` and `traceparent`: name and description.
    pub headers: &'static [(&'static str, &'static str)],
}

/// One answer that is no problem.
pub struct Success {
    pub status: u16,
    pub description: &'static str,
    /// Names out of [`HEADERS`].
    pub headers: &'static [&'static str],
    /// The content type of `example`.
    pub media: &'static str,
    pub example: Option<Value>,
}

/// The content type of nearly everything.
pub const JSON: &str = "application/json";

/// Every response header of ours, with what it says.
const HEADERS: &[(&str, &str)] = &[
    ("X-Request-Id", "The request's id: the client's own where it was 1 to 128 visible ASCII characters, else a new one."),
    ("Location", "Where to go on: to the order, through the port that was asked."),
    ("Idempotent-Replayed", "`true`: this request was answered before, and nothing happened again."),
    ("ETag", "This state of the order, for `If-None-Match`."),
    ("Link", "`<...>; rel=\"next\"`: the next page; absent on the last one."),
    ("X-Next-Cursor", "The `cursor` of the next page; absent on the last one."),
    ("Preference-Applied", "`wait=N`: this is the order after at most N seconds."),
    ("Retry-After", "Seconds."),
];

/// The document of one service, made without running it.
pub fn document(role: &str, description: &str, schemas: Value, operations: &[Operation], routes: fn(&mut ApiConfig)) -> Value {
    let info = Info { title: format!("shopd {role}"), version: env!("CARGO_PKG_VERSION").into(), ..Info::default() };
    let spec = DefaultApiRaw { info, ..DefaultApiRaw::default() };
    let mut document = Value::Null;
    App::new().wrap_api_with_spec(spec).configure(routes).with_raw_json_spec_v3(|app, derived| {
        document = derived;
        app
    });
    document["info"]["description"] = description.into();
    document["components"] = components(schemas);
    for operation in operations {
        let derived = document["paths"][operation.path].get_mut(operation.method);
        if let Some(derived) = derived.and_then(Value::as_object_mut) {
            overlay(derived, operation);
        }
    }
    if let Some(paths) = document["paths"].as_object_mut() {
        paths.extend(common_paths(role));
    }
    document
}

/// What every document's operations refer to, beside `schemas`.
pub fn components(mut schemas: Value) -> Value {
    schemas["Problem"] = problem_schema();
    schemas["Health"] = json!({
        "type": "object",
        "required": ["status", "role"],
        "properties": {
            "status": {"type": "string", "enum": ["live", "ready", "unavailable"]},
            "role": {"type": "string"},
            "missing": {"type": "array", "items": {"type": "string"}, "description": "Everything that does not answer."},
        },
    });
    let header = |(name, text): &(&str, &str)| (name.to_string(), json!({"description": text, "schema": {"type": "string"}}));
    json!({
        "schemas": schemas,
        "headers": HEADERS.iter().map(header).collect::<Map<_, _>>(),
        "parameters": {
            "X-Request-Id": {
                "name": "X-Request-Id", "in": "header", "required": false,
                "description": "The request's id in the logs; made where it is absent or not 1 to 128 visible ASCII characters.",
                "schema": {"type": "string"},
            },
            "traceparent": {
                "name": "traceparent", "in": "header", "required": false,
                "description": "W3C trace context; the trace goes on through the order's whole life.",
                "schema": {"type": "string"},
            },
        },
    })
}

fn problem_schema() -> Value {
    json!({
        "type": "object",
        "description": "RFC 9457. A 5xx never shows its cause; the log has it under the same traceId.",
        "required": ["type", "title", "status", "detail", "instance", "code", "traceId"],
        "properties": {
            "type": {"type": "string", "format": "uri"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "instance": {"type": "string"},
            "code": {
                "type": "string",
                "description": Code::ALL.iter().map(|c| format!("`{c}` ({}): {}", c.status().as_u16(), c.meaning().trim()))
                    .collect::<Vec<_>>().join("\n\n"),
                "enum": Code::ALL.iter().map(|c| c.as_str()).collect::<Vec<_>>(),
            },
            "errors": {
                "type": "object",
                "description": "By field or parameter, what is wrong with it.",
                "additionalProperties": {"type": "array", "items": {"type": "string"}},
            },
            "traceId": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
        },
    })
}

fn overlay(derived: &mut Map<String, Value>, operation: &Operation) {
    let schema = derived["responses"]["200"]["content"]["application/json"]["schema"].take();
    let mut responses = Map::new();
    for success in &operation.successes {
        let mut answer = json!({"description": success.description, "headers": header_refs(success.headers)});
        if let Some(example) = &success.example {
            answer["content"] = json!({success.media: {"schema": schema, "example": example}});
        }
        responses.insert(success.status.to_string(), answer);
    }
    let mut parameters = derived.remove("parameters").and_then(|p| p.as_array().cloned()).unwrap_or_default();
    let mut codes = operation.codes.to_vec();
    // Where the handler takes a key, what that means is the same everywhere.
    if let Some(key) = parameters.iter_mut().find(|parameter| parameter["name"] == IDEMPOTENCY_KEY) {
        key["required"] = false.into();
        key["schema"] = json!({"type": "string", "minLength": 1, "maxLength": KEY_CHARS_MAX});
        codes.extend([Code::IdempotencyMismatch, Code::IdempotencyInProgress]);
    }
    responses.extend(problems(&codes, operation.path));
    if codes.contains(&Code::IdempotencyMismatch) {
        // What may have come of the effect, and so be stored.
        for (_, answer) in responses.iter_mut().filter(|(status, _)| ["200", "201", "400", "404", "409"].contains(&status.as_str()))
        {
            answer["headers"]["Idempotent-Replayed"] = json!({"$ref": "#/components/headers/Idempotent-Replayed"});
        }
    }
    derived.insert("responses".into(), responses.into());

    if !operation.bodies.is_empty() {
        let schema = derived["requestBody"]["content"]["application/json"]["schema"].take();
        let examples: Map<_, _> = operation.bodies.iter().map(|(name, body)| (name.to_string(), json!({"value": body}))).collect();
        let media = json!({"schema": schema, "examples": examples});
        let content = json!({"application/json": media, "text/json": media, "application/*+json": media});
        derived.insert("requestBody".into(), json!({"required": true, "content": content}));
    }
    for (name, schema) in &operation.parameters {
        for parameter in parameters.iter_mut().filter(|p| p["name"] == *name) {
            parameter["schema"] = schema.clone();
        }
    }
    parameters.extend(operation.headers.iter().map(
        |(name, text)| json!({"name": name, "in": "header", "required": false, "description": text, "schema": {"type": "string"}}),
    ));
    parameters.extend(["X-Request-Id", "traceparent"].map(|name| json!({"$ref": format!("#/components/parameters/{name}")})));
    derived.insert("parameters".into(), parameters.into());
}

/// The headers of one answer: these out of [`HEADERS`], and the request's id.
pub fn header_refs(names: &[&str]) -> Map<String, Value> {
    let all = names.iter().chain(&["X-Request-Id"]);
    all.map(|name| (name.to_string(), json!({"$ref": format!("#/components/headers/{name}")}))).collect()
}

/// Problem answers by status, those that every operation of a service can give among them.
fn problems(codes: &[Code], path: &str) -> Map<String, Value> {
    let codes: Vec<_> = codes.iter().copied().chain([Code::Unavailable, Code::Internal]).collect();
    problem_answers(&codes, path)
}

/// Problem answers by status; each lists its codes and has one example a code.
pub fn problem_answers(codes: &[Code], path: &str) -> Map<String, Value> {
    let mut by_status = BTreeMap::<u16, Vec<Code>>::new();
    for code in codes.iter().copied() {
        by_status.entry(code.status().as_u16()).or_default().push(code);
    }
    let answer = |(status, codes): (u16, Vec<Code>)| {
        let names: Vec<_> = codes.iter().map(|c| c.as_str()).collect();
        let lines: Vec<_> = codes.iter().map(|c| format!("`{c}`: {}", c.meaning().trim())).collect();
        let examples: Map<_, _> = codes.iter().map(|c| (c.to_string(), json!({"value": example(*c, path)}))).collect();
        let narrowed = json!({"type": "object", "properties": {"code": {"type": "string", "enum": names}}});
        let schema = json!({"allOf": [{"$ref": "#/components/schemas/Problem"}, narrowed]});
        let headers = header_refs(if [429, 503, 504].contains(&status) { &["Retry-After"] } else { &[] });
        let content = json!({PROBLEM_JSON: {"schema": schema, "examples": examples}});
        (status.to_string(), json!({"description": lines.join("\n\n"), "headers": headers, "content": content}))
    };
    by_status.into_iter().map(answer).collect()
}

fn example(code: Code, path: &str) -> Value {
    json!({
        "type": format!("urn:shopd:problem:{code}"),
        "title": code.title(),
        "status": code.status().as_u16(),
        "detail": code.meaning().trim(),
        "instance": path.replace("{userId}", "alice").replace("{orderId}", "3f2504e0-4f89-11d3-9a0c-0305e82c3301"),
        "code": code.as_str(),
        "traceId": "4bf92f3577b34da6a3ce929d0e0e4736",
    })
}

/// Health and metrics, as every role has them.
pub fn common_paths(role: &str) -> Map<String, Value> {
    let health = |status: &str| {
        let schema = json!({"$ref": "#/components/schemas/Health"});
        let mut example = json!({"status": status, "role": role});
        match status {
            "ready" => example["missing"] = json!([]),
            "unavailable" => example["missing"] = json!(["database"]),
            _ => {}
        }
        json!({"description": status, "headers": header_refs(&[]), "content": {"application/json": {"schema": schema, "example": example}}})
    };
    let get = |id: &str, summary: &str, mut responses: Value| {
        let refusals = problem_answers(&[Code::PayloadTooLarge, Code::HeadTooLarge], "/health/live");
        responses.as_object_mut().into_iter().for_each(|all| all.extend(refusals.clone()));
        json!({"get": {"operationId": id, "summary": summary, "tags": ["Operation"], "responses": responses}})
    };
    let text = json!({"200": {"description": "Prometheus text", "headers": header_refs(&[]),
        "content": {"text/plain": {"schema": {"type": "string"}}}}});
    Map::from_iter([
        ("/health/live".to_owned(), get("live", "Whether the process runs", json!({"200": health("live")}))),
        (
            "/health/ready".to_owned(),
            get("ready", "Whether it can do its work", json!({"200": health("ready"), "503": health("unavailable")})),
        ),
        ("/metrics".to_owned(), get("metrics", "Counters and durations", text)),
    ])
}

/// An exact decimal number.
pub fn money(description: &str) -> Value {
    // No `multipleOf`: validators compute it in binary floats, where 0.07 is no multiple of 0.01.
    json!({"type": "number", "description": description})
}

/// What an order or a deposit may be.
pub fn amount() -> Value {
    let mut schema = money("More than 0, at most 9999999999.99, at most two decimals; exact, never rounded.");
    schema["minimum"] = json!(0.01);
    schema["maximum"] = json!(9_999_999_999.99);
    schema
}

/// [`amount`] as it may be sent: a number, or a string that holds one.
pub fn amount_in() -> Value {
    json!({"oneOf": [amount(), amount_text()]})
}

/// [`amount`] in a string. Exponents and further zeros are taken, too; what is documented is what is always taken, and without
/// look-ahead, which not every reader of patterns has.
pub fn amount_text() -> Value {
    let pattern = r"^(0\.0[1-9]|0\.[1-9][0-9]?|[1-9][0-9]{0,9}(\.[0-9]{1,2})?)$";
    json!({"type": "string", "pattern": pattern, "description": "The number as text."})
}

pub fn user_id() -> Value {
    let pattern = r"^[^\u0000-\u001f\u007f-\u009f]+$";
    json!({
        "type": "string", "minLength": 1, "maxLength": 128, "pattern": pattern,
        "description": "No control characters.", "example": "alice",
    })
}

/// The schema of `cursor`.
pub fn cursor() -> Value {
    json!({"type": "string", "minLength": 1, "pattern": "^[A-Za-z0-9_-]+$"})
}

/// A parameter that an extractor reads.
pub fn parameter(op: &mut DefaultOperationRaw, in_: ParameterIn, name: &str, data_type: DataType, description: &str) {
    op.parameters.push(Either::Right(Parameter {
        required: in_ == ParameterIn::Path,
        in_,
        name: name.into(),
        data_type: Some(data_type),
        description: Some(description.into()),
        ..Parameter::default()
    }));
}

/// The schema of `limit`.
pub fn limit() -> Value {
    let (max, default) = (super::pages::LIMIT_MAX, super::pages::LIMIT_DEFAULT);
    json!({"type": "integer", "minimum": 1, "maximum": max, "default": default, "example": default})
}

pub use paperclip::actix::OperationModifier as Documented;
pub use paperclip::v2::models::{DefaultOperationRaw as RawOperation, DefaultSchemaRaw as RawSchema, Either, ParameterIn as In};
pub use paperclip::v2::schema::Apiv2Schema as Schema;

impl Apiv2Schema for RequestContext {}
impl OperationModifier for RequestContext {}
impl Apiv2Schema for Params {}
impl OperationModifier for Params {}
impl Apiv2Errors for Problem {}

impl Apiv2Schema for Ignored {}
impl OperationModifier for Ignored {}
impl<T: Apiv2Schema> Apiv2Schema for Json<T> {}

impl<T: Apiv2Schema> OperationModifier for Json<T> {
    fn update_parameter(op: &mut DefaultOperationRaw) {
        paperclip::actix::web::Json::<T>::update_parameter(op);
    }

    fn update_definitions(map: &mut BTreeMap<String, RawSchema>) {
        paperclip::actix::web::Json::<T>::update_definitions(map);
    }
}

impl<T: Apiv2Schema> Apiv2Schema for Reply<T> {}

impl<T: Apiv2Schema> OperationModifier for Reply<T> {
    fn update_response(op: &mut DefaultOperationRaw) {
        let mut schema = T::schema_with_ref();
        schema.retain_ref();
        let answer = Response { description: Some("OK".into()), schema: Some(schema), ..Response::default() };
        op.responses.insert("200".into(), Either::Right(answer));
    }

    fn update_definitions(map: &mut BTreeMap<String, RawSchema>) {
        paperclip::actix::web::Json::<T>::update_definitions(map);
    }
}

/// Names a type's schema; what it says is in the service's own schemas.
macro_rules! named_schema {
    ($type:ty, $name:literal) => {
        impl $crate::http::openapi::Schema for $type {
            fn name() -> Option<String> {
                Some($name.to_owned())
            }

            fn raw_schema() -> $crate::http::openapi::RawSchema {
                let data_type = Some($crate::http::openapi::DataType::Object);
                $crate::http::openapi::RawSchema { data_type, name: Some($name.to_owned()), ..Default::default() }
            }
        }
    };
}

pub(crate) use named_schema;

/// The statuses that an operation lists, sorted.
#[cfg(test)]
pub fn statuses(document: &Value, method: &str, path: &str) -> Vec<String> {
    document["paths"][path][method]["responses"].as_object().unwrap().keys().cloned().collect()
}

/// What holds for every document: `operations` under `/api`, every reference leads somewhere, every path parameter is declared, every
/// answer has its request id, every body its schema and example.
#[cfg(test)]
pub fn assert_sound(document: &Value, operations: usize) {
    assert!(document["openapi"].as_str().unwrap().starts_with("3.0"));
    let mut found = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap().iter().filter(|(_, o)| o.get("responses").is_some()) {
            found += usize::from(path.starts_with("/api/"));
            assert!(operation["operationId"].is_string() && operation["summary"].is_string(), "{method} {path}");
            let declared = operation["parameters"].as_array().cloned().unwrap_or_default();
            for name in path.split('/').filter_map(|s| s.strip_prefix('{')?.strip_suffix('}')) {
                let count = declared.iter().filter(|p| p["in"] == "path" && p["name"] == name).count();
                assert_eq!(count, 1, "{method} {path}: {name} in {declared:?}");
            }
            for (status, answer) in operation["responses"].as_object().unwrap() {
                assert!(answer["headers"]["X-Request-Id"].is_object(), "{method} {path} {status}");
                let media = answer["content"].as_object().map(|content| content.values().next().unwrap());
                let whole = |media: &Value| {
                    media["schema"].is_object() && (path == "/metrics" || media.get("example").or(media.get("examples")).is_some())
                };
                assert!(media.is_none_or(whole), "{method} {path} {status}: {media:?}");
            }
        }
    }
    assert_eq!(found, operations);
    let text = document.to_string();
    for reference in text.split("\"$ref\":\"").skip(1).map(|rest| rest.split('"').next().unwrap()) {
        let pointer = reference.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{reference}");
    }
}
