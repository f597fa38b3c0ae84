//! Payments on the wire: how a deposit's JSON becomes an [`Amount`], and accounts and ledger entries the JSON that clients see.

use serde::Serialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::{Account, Transaction};
use crate::http::openapi::named_schema;
use crate::http::{self, Code, Params, Problem, ReadBody};
use crate::json::Members;
use crate::money::{Amount, Minor};

/// A deposit: a bare number, or an object with `amount`; either may be a string that holds a number.
#[derive(Debug)]
pub struct DepositBody(pub Amount);

named_schema!(DepositBody, "Deposit");

impl ReadBody for DepositBody {
    fn read(body: &[u8]) -> Result<Self, Problem> {
        let invalid = |error| Problem::new(Code::InvalidJson, format!("The body is no JSON: {error}."));
        let raw: &RawValue = serde_json::from_slice(body).map_err(invalid)?;
        let amount = if raw.get().starts_with('{') {
            let members = Members::of(raw).map_err(|error| Problem::new(Code::InvalidJson, error.to_string()))?;
            members.get("amount").ok_or_else(|| Problem::invalid("amount", "amount is required"))?
        } else {
            raw
        };
        Amount::from_json(amount.get()).map(Self).map_err(Problem::from)
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AccountBody {
    id: i64,
    user_id: String,
    balance: Minor,
}

named_schema!(AccountBody, "Account");

impl From<Account> for AccountBody {
    fn from(account: Account) -> Self {
        Self { id: account.id, user_id: account.user_id.into_string(), balance: account.balance }
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BalanceBody {
    user_id: String,
    balance: Minor,
}

named_schema!(BalanceBody, "Balance");

impl From<Account> for BalanceBody {
    fn from(account: Account) -> Self {
        Self { user_id: account.user_id.into_string(), balance: account.balance }
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TransactionBody {
    id: i64,
    kind: &'static str,
    amount: Minor,
    balance_after: Minor,
    order_id: Option<Uuid>,
    created_at: String,
}

named_schema!(TransactionBody, "Transaction");

impl From<Transaction> for TransactionBody {
    fn from(entry: Transaction) -> Self {
        Self {
            id: entry.id,
            kind: entry.kind.as_str(),
            amount: entry.amount,
            balance_after: entry.balance_after,
            order_id: entry.order_id,
            created_at: http::timestamp(entry.created_at),
        }
    }
}

/// Which part of a ledger: the most entries, and the id to go on below.
pub fn page(params: &Params) -> Result<(i64, Option<i64>), Problem> {
    let position = |bytes| Some(i64::from_be_bytes(bytes)).filter(|id| *id > 0);
    Ok((http::limit(params)?, http::cursor(params, position)?))
}

/// The cursor of a page's end.
pub fn cursor(id: i64) -> String {
    http::cursor_of(id.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use proptest::prelude::*;

    use super::super::TransactionKind;
    use super::*;
    use crate::user_id::UserId;

    fn read(json: &str) -> Result<String, (Code, String)> {
        let read = DepositBody::read(json.as_bytes());
        read.map(|deposit| deposit.0.to_string()).map_err(|problem| (problem.code, problem.detail.into_owned()))
    }

    #[test]
    fn a_deposit_is_a_bare_number_or_an_object() {
        for body in ["100.5", " \"100.50\" ", r#"{"amount":100.5}"#, r#"{"Amount":"100.5","x":1}"#, "1005e-1\n"] {
            assert_eq!(read(body).as_deref(), Ok("100.5"), "{body}");
        }
    }

    #[test]
    fn what_is_no_deposit_says_why() {
        for (body, code) in [
            ("", Code::InvalidJson),
            ("1 2", Code::InvalidJson),
            ("01", Code::InvalidJson),
            ("{\"amount\":}", Code::InvalidJson),
            ("null", Code::InvalidRequest),
            ("[1]", Code::InvalidRequest),
            ("true", Code::InvalidRequest),
            ("\"x\"", Code::InvalidRequest),
            ("{}", Code::InvalidRequest),
            ("{\"amount\":null}", Code::InvalidRequest),
            ("{\"amount\":{}}", Code::InvalidRequest),
            ("-0", Code::AmountNotPositive),
            ("-5", Code::AmountNotPositive),
            ("1e-999999999", Code::AmountPrecision),
            ("1e999999999", Code::AmountTooLarge),
        ] {
            assert_eq!(read(body).unwrap_err().0, code, "{body}");
        }
        assert_eq!(read("0").unwrap_err().1, "Amount must be positive");
    }

    #[test]
    fn what_clients_see_is_in_the_contracts_order() {
        let account = Account { id: 1, user_id: UserId::new("u1").unwrap(), balance: Minor(10050) };
        let json = |body: &dyn erased::Body| body.json();
        assert_eq!(json(&AccountBody::from(account.clone())), r#"{"id":1,"userId":"u1","balance":100.5}"#);
        assert_eq!(json(&BalanceBody::from(account)), r#"{"userId":"u1","balance":100.5}"#);
        let entry = Transaction {
            id: 7,
            kind: TransactionKind::Payment,
            amount: Minor(-2000),
            balance_after: Minor(0),
            order_id: None,
            created_at: DateTime::from_timestamp_micros(1_749_723_072_000_001).unwrap(),
        };
        let expected =
            r#"{"id":7,"kind":"payment","amount":-20,"balanceAfter":0,"orderId":null,"createdAt":"2025-06-12T10:11:12.000001Z"}"#;
        assert_eq!(json(&TransactionBody::from(entry)), expected);
    }

    mod erased {
        pub trait Body {
            fn json(&self) -> String;
        }

        impl<T: serde::Serialize> Body for T {
            fn json(&self) -> String {
                serde_json::to_string(self).unwrap()
            }
        }
    }

    proptest! {
        #[test]
        fn no_body_makes_the_reader_panic(body in proptest::collection::vec(any::<u8>(), 0..100), text in "[{}\",:a-z0-9.eE+-]{0,40}") {
            let _ = DepositBody::read(&body);
            let _ = DepositBody::read(text.as_bytes());
        }

        #[test]
        fn a_cursor_leads_back_to_its_id(id in 1i64..) {
            let params = Params::from_pairs(&[("cursor", &cursor(id))]);
            prop_assert_eq!(page(&params).unwrap(), (100, Some(id)));
        }
    }
}
