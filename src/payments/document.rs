//! The service's OpenAPI document: what the handlers' types cannot say, and an example of everything.

use serde_json::{Value, json};

use super::routes::{self, ACCOUNT, BALANCE, DEPOSIT, TRANSACTIONS};
use crate::http::Code;
use crate::http::openapi::{self, Operation, Success};

/// OpenAPI 3.0 of the routes as this service has them (`/api/Account`).
pub fn document() -> Value {
    let description = "Keeps accounts, takes deposits and decides on every order's payment.";
    openapi::document("payments", description, schemas(), &operations(), routes::operations)
}

const OPEN_REFUSED: &[Code] = &[Code::InvalidRequest, Code::AccountExists, Code::PayloadTooLarge, Code::UnsupportedMediaType];

const DEPOSIT_REFUSED: &[Code] = &[
    Code::InvalidJson,
    Code::InvalidRequest,
    Code::AmountNotPositive,
    Code::AmountPrecision,
    Code::AmountTooLarge,
    Code::AccountNotFound,
    Code::PayloadTooLarge,
    Code::UnsupportedMediaType,
];

fn operations() -> Vec<Operation> {
    let ok = |description, headers, example| {
        vec![Success { status: 200, description, headers, media: openapi::JSON, example: Some(example) }]
    };
    let operation = |method, path, successes, codes| {
        let parameters = vec![("userId", openapi::user_id()), ("limit", openapi::limit()), ("cursor", openapi::cursor())];
        Operation { method, path, successes, codes, bodies: vec![], parameters, headers: &[] }
    };
    let account = |balance: Value| json!({"id": 1, "userId": "alice", "balance": balance});
    let entry = json!({
        "id": 1, "kind": "deposit", "amount": 100.5, "balanceAfter": 100.5, "orderId": null,
        "createdAt": "2025-06-12T10:11:12.123456Z",
    });
    vec![
        operation("post", ACCOUNT, ok("The new account.", &[], account(json!(0))), OPEN_REFUSED),
        Operation {
            bodies: vec![("bare", json!(100.5)), ("object", json!({"amount": 100.5}))],
            ..operation("post", DEPOSIT, ok("The account after the deposit.", &[], account(json!(100.5))), DEPOSIT_REFUSED)
        },
        operation(
            "get",
            BALANCE,
            ok("The balance.", &[], json!({"userId": "alice", "balance": 100.5})),
            &[Code::InvalidRequest, Code::AccountNotFound],
        ),
        operation(
            "get",
            TRANSACTIONS,
            ok("One page, newest first.", &["Link", "X-Next-Cursor"], json!([entry])),
            &[Code::InvalidRequest, Code::AccountNotFound],
        ),
    ]
}

fn schemas() -> Value {
    let (balance, user_id) = (openapi::money("Exact decimal, at most two decimals."), openapi::user_id());
    let id = json!({"type": "integer", "format": "int64"});
    json!({
        "Deposit": {
            "description": "A bare number, or an object; either amount may be a string that holds a number.",
            "oneOf": [
                openapi::amount(),
                openapi::amount_text(),
                {"type": "object", "required": ["amount"], "properties": {"amount": openapi::amount_in()}},
            ],
        },
        "Account": {
            "type": "object",
            "required": ["id", "userId", "balance"],
            "properties": {"id": id, "userId": user_id, "balance": balance},
        },
        "Balance": {
            "type": "object",
            "required": ["userId", "balance"],
            "properties": {"userId": user_id, "balance": balance},
        },
        "Transaction": {
            "type": "object",
            "required": ["id", "kind", "amount", "balanceAfter", "orderId", "createdAt"],
            "properties": {
                "id": id,
                "kind": {"type": "string", "enum": ["deposit", "payment"]},
                "amount": openapi::money("Signed: a payment is negative. Exact decimal, at most two decimals."),
                "balanceAfter": balance,
                "orderId": {"type": "string", "format": "uuid", "nullable": true, "description": "The order of a payment."},
                "createdAt": {"type": "string", "format": "date-time", "description": "UTC, six fraction digits."},
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
        assert_eq!(statuses("post", ACCOUNT), ["200", "400", "409", "413", "415", "422", "500", "503"]);
        assert_eq!(statuses("post", DEPOSIT), ["200", "400", "404", "409", "413", "415", "422", "500", "503"]);
        assert_eq!(statuses("get", BALANCE), ["200", "400", "404", "500", "503"]);
        assert_eq!(statuses("get", TRANSACTIONS), ["200", "400", "404", "500", "503"]);
        openapi::assert_sound(&document, 4);
    }
}
