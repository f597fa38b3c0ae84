//! The service's OpenAPI document: what the handlers' types cannot say, and an example of everything.

use serde_json::{Value, json};

use super::routes::{self, COLLECTION, EVENTS, ITEM, ITEM_EVENTS, ITEM_WS, TIMELINE};
use crate::http::Code;
use crate::http::openapi::{self, Operation, Success};
use crate::http::sse;

/// OpenAPI 3.0 of the routes as this service has them (`/api/Orders`).
pub fn document() -> Value {
    openapi::document(
        "orders",
        "Accepts orders and ends them when payments has decided.",
        schemas(),
        &operations(),
        routes::operations,
    )
}

const REFUSED: &[Code] = &[
    Code::InvalidJson,
    Code::InvalidRequest,
    Code::InvalidOrderId,
    Code::AmountNotPositive,
    Code::AmountPrecision,
    Code::AmountTooLarge,
    Code::OrderConflict,
    Code::PayloadTooLarge,
    Code::UnsupportedMediaType,
];

fn operations() -> Vec<Operation> {
    let answer = |status, description, headers, media, example| Success { status, description, headers, media, example };
    let success = |status, description, headers, example| answer(status, description, headers, openapi::JSON, Some(example));
    let order_id = || ("orderId", json!({"type": "string", "format": "uuid", "example": order()["id"]}));
    let event_id = || ("Last-Event-ID", json!({"type": "string", "pattern": "^[0-9]+-[0-9]+([+][0-9]+)?(~[0-9]+(,[0-9]+)*)?$"}));
    let stream = |description| answer(200, description, &[], sse::EVENT_STREAM, Some(json!(events())));
    vec![
        Operation {
            method: "post",
            path: COLLECTION,
            successes: vec![
                success(
                    201,
                    "The order was accepted and is `New`, unless it was waited for.",
                    &["Location", "Preference-Applied"],
                    order(),
                ),
                success(
                    200,
                    "The same order came before; this is its state now.",
                    &["Idempotent-Replayed", "Preference-Applied"],
                    order(),
                ),
            ],
            codes: REFUSED,
            bodies: vec![
                ("withId", json!({"orderId": order()["id"], "userId": "alice", "amount": 100.5, "description": "A book"})),
                ("withoutId", json!({"userId": "alice", "amount": 20})),
            ],
            parameters: vec![],
            headers: &[],
        },
        Operation {
            method: "get",
            path: COLLECTION,
            successes: vec![success(200, "One page, newest first.", &["Link", "X-Next-Cursor"], json!([order()]))],
            codes: &[Code::InvalidRequest],
            bodies: vec![],
            parameters: vec![
                ("userId", openapi::user_id()),
                ("status", json!({"type": "string", "enum": ["New", "Processing", "Finished", "Cancelled"]})),
                ("limit", openapi::limit()),
                ("cursor", openapi::cursor()),
            ],
            headers: &[],
        },
        Operation {
            method: "get",
            path: ITEM,
            successes: vec![
                success(200, "The order as it is now.", &["ETag"], order()),
                answer(304, "The client's copy is this state.", &["ETag"], openapi::JSON, None),
            ],
            codes: &[Code::InvalidOrderId, Code::InvalidRequest, Code::OrderNotFound],
            bodies: vec![],
            parameters: vec![order_id()],
            headers: &[("If-None-Match", "ETags of the states the client has, or `*`.")],
        },
        Operation {
            method: "get",
            path: ITEM_EVENTS,
            successes: vec![
                stream("The order's state at once, then each change; it ends with the order. `id` is durable, `data` the order."),
                answer(204, "The client has seen the order's end; nothing more will come.", &[], sse::EVENT_STREAM, None),
            ],
            codes: &[Code::InvalidOrderId, Code::InvalidRequest, Code::OrderNotFound],
            bodies: vec![],
            parameters: vec![order_id(), event_id()],
            headers: &[],
        },
        Operation {
            method: "get",
            path: EVENTS,
            successes: vec![stream("The states of the user's latest 1000 orders, then each change of any; it does not end.")],
            codes: &[Code::InvalidRequest],
            bodies: vec![],
            parameters: vec![("userId", openapi::user_id()), event_id()],
            headers: &[],
        },
        Operation {
            method: "get",
            path: ITEM_WS,
            successes: vec![answer(
                101,
                "A WebSocket: text messages with the order as JSON, its state at once, then each change; it closes with 1000 after the last.",
                &[],
                openapi::JSON,
                None,
            )],
            codes: &[Code::InvalidOrderId, Code::InvalidRequest, Code::OrderNotFound],
            bodies: vec![],
            parameters: vec![order_id(), event_id()],
            headers: &[],
        },
        Operation {
            method: "get",
            path: TIMELINE,
            successes: vec![success(200, "The hops so far; `ms` is the time since the one before.", &[], timeline())],
            codes: &[Code::InvalidOrderId, Code::InvalidRequest, Code::OrderNotFound],
            bodies: vec![],
            parameters: vec![order_id()],
            headers: &[],
        },
    ]
}

fn order() -> Value {
    json!({
        "id": "3f2504e0-4f89-11d3-9a0c-0305e82c3301",
        "userId": "alice",
        "amount": 100.5,
        "description": "A book",
        "status": "New",
        "failureReason": null,
        "createdAt": "2025-06-12T10:11:12.123456Z",
        "updatedAt": "2025-06-12T10:11:12.123456Z",
    })
}

fn events() -> String {
    format!("retry: 1000\n\nid: 4711-42\ndata: {}\n\n", order())
}

fn timeline() -> Value {
    json!({
        "orderId": order()["id"],
        "traceId": "4bf92f3577b34da6a3ce929d0e0e4736",
        "hops": [
            {"name": "accepted", "at": "2025-06-12T10:11:12.123456Z", "ms": 0},
            {"name": "outbox", "at": "2025-06-12T10:11:12.123456Z", "ms": 0},
            {"name": "topic", "at": "2025-06-12T10:11:12.125Z", "ms": 1.544, "topic": "order-payment-requests", "partition": 3, "offset": 17},
            {"name": "inbox", "at": "2025-06-12T10:11:12.126300Z", "ms": 1.3},
            {"name": "ledger", "at": "2025-06-12T10:11:12.128100Z", "ms": 1.8, "balanceBefore": 200, "balanceAfter": 99.5},
            {"name": "outbox", "at": "2025-06-12T10:11:12.128100Z", "ms": 0},
            {"name": "topic", "at": "2025-06-12T10:11:12.131Z", "ms": 2.9, "topic": "payment-status-updates", "partition": 5, "offset": 17},
            {"name": "inbox", "at": "2025-06-12T10:11:12.132Z", "ms": 1},
            {"name": "finished", "at": "2025-06-12T10:11:12.134Z", "ms": 2},
        ],
    })
}

fn schemas() -> Value {
    let amount = openapi::amount();
    let user_id = openapi::user_id();
    let time = json!({"type": "string", "format": "date-time", "description": "UTC, six fraction digits."});
    let description = json!({"type": "string", "nullable": true, "maxLength": 1000, "pattern": r"^[^\u0000]*$"});
    json!({
        "PlaceOrder": {
            "type": "object",
            "description": "Names match in any case; unknown members are ignored.",
            "required": ["userId", "amount"],
            "properties": {
                "orderId": {
                    "type": "string", "format": "uuid", "nullable": true,
                    "description": "The order's id and its idempotency key for ever; absent, null or all zeros: one is made.",
                },
                "userId": user_id,
                "amount": openapi::amount_in(),
                "description": description,
            },
        },
        "Order": {
            "type": "object",
            "required": ["id", "userId", "amount", "description", "status", "failureReason", "createdAt", "updatedAt"],
            "properties": {
                "id": {"type": "string", "format": "uuid"},
                "userId": user_id,
                "amount": amount,
                "description": description,
                "status": {"type": "string", "enum": ["New", "Processing", "Finished", "Cancelled"]},
                "failureReason": {
                    "type": "string", "nullable": true,
                    "enum": ["insufficient_funds", "account_not_found", null],
                    "description": "Why the order was cancelled.",
                },
                "createdAt": time,
                "updatedAt": time,
            },
        },
        "Timeline": {
            "type": "object",
            "required": ["orderId", "traceId", "hops"],
            "properties": {
                "orderId": {"type": "string", "format": "uuid"},
                "traceId": {"type": "string", "nullable": true, "pattern": "^[0-9a-f]{32}$"},
                "hops": {"type": "array", "items": {
                    "type": "object",
                    "required": ["name", "at", "ms"],
                    "properties": {
                        "name": {
                            "type": "string",
                            "enum": ["accepted", "outbox", "topic", "inbox", "ledger", "finished", "cancelled"],
                        },
                        "at": time,
                        "ms": {"type": "number", "description": "Milliseconds since the hop before; never negative."},
                        "topic": {"type": "string"},
                        "partition": {"type": "integer"},
                        "offset": {"type": "integer"},
                        "balanceBefore": openapi::money("Of the account, before the payment."),
                        "balanceAfter": openapi::money("Of the account, after the payment."),
                    },
                }},
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_lists_every_status_it_can_answer() {
        let document = document();
        let statuses = |method: &str, path: &str| openapi::statuses(&document, method, path);
        assert_eq!(statuses("post", COLLECTION), ["200", "201", "400", "409", "413", "415", "422", "500", "503"]);
        assert_eq!(statuses("get", COLLECTION), ["200", "400", "500", "503"]);
        assert_eq!(statuses("get", ITEM), ["200", "304", "400", "404", "500", "503"]);
        assert_eq!(statuses("get", ITEM_EVENTS), ["200", "204", "400", "404", "500", "503"]);
        assert_eq!(statuses("get", EVENTS), ["200", "400", "500", "503"]);
        assert_eq!(statuses("get", ITEM_WS), ["101", "400", "404", "500", "503"]);
        assert_eq!(statuses("get", TIMELINE), ["200", "400", "404", "500", "503"]);
        openapi::assert_sound(&document, 7);
    }
}
