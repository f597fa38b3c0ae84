//! The service's OpenAPI document: what the handlers' types cannot say, and an example of everything.

use serde_json::{Value, json};

use super::routes::{self, COLLECTION, ITEM};
use crate::http::Code;
use crate::http::openapi::{self, Operation, Success};

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
    let success = |status, description, headers, example| Success { status, description, headers, example: Some(example) };
    vec![
        Operation {
            method: "post",
            path: COLLECTION,
            successes: vec![
                success(201, "The order was accepted and is `New`.", &["Location"], order()),
                success(200, "The same order came before; this is its state now.", &["Idempotent-Replayed"], order()),
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
                Success { status: 304, description: "The client's copy is this state.", headers: &["ETag"], example: None },
            ],
            codes: &[Code::InvalidOrderId, Code::InvalidRequest, Code::OrderNotFound],
            bodies: vec![],
            parameters: vec![("orderId", json!({"type": "string", "format": "uuid", "example": order()["id"]}))],
            headers: &[("If-None-Match", "ETags of the states the client has, or `*`.")],
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
        openapi::assert_sound(&document, 3);
    }
}
