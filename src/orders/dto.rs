//! Orders on the wire: how a request's JSON becomes a [`NewOrder`], and an [`Order`] the JSON that clients see.

use chrono::{DateTime, Datelike};
use serde::Serialize;
use uuid::Uuid;

use super::{FailureReason, ListOrders, NewOrder, Order, OrderPosition, OrderStatus};
use crate::http::openapi::named_schema;
use crate::http::{self, Code, Params, Problem, ReadBody};
use crate::json::{Members, MembersError};
use crate::money::Amount;
use crate::user_id::UserId;

const DESCRIPTION_CHARS_MAX: usize = 1000;

/// A request to place an order, checked.
#[derive(Debug)]
pub struct PlaceOrder {
    order: NewOrder,
    /// The client named none.
    id_made: bool,
}

impl PlaceOrder {
    /// Under the client's id, else under `stamp`, else under the one that was made.
    pub fn order(self, stamp: Option<Uuid>) -> NewOrder {
        match stamp.filter(|_| self.id_made) {
            Some(id) => NewOrder { id, ..self.order },
            None => self.order,
        }
    }
}

named_schema!(PlaceOrder, "PlaceOrder");

impl ReadBody for PlaceOrder {
    fn read(body: &[u8]) -> Result<Self, Problem> {
        let members = Members::parse(body).map_err(|error| match error {
            MembersError::Syntax(error) => Problem::new(Code::InvalidJson, format!("The body is no JSON: {error}.")),
            MembersError::NotAnObject => Problem::invalid("body", "The body must be a JSON object."),
        })?;
        let id = read_id(&members);
        let user_id = read_user_id(&members);
        let amount = read_amount(&members);
        let description = read_description(&members);
        let (id, user_id, amount, description) = match (id, user_id, amount, description) {
            (Ok(id), Ok(user_id), Ok(amount), Ok(description)) => (id, user_id, amount, description),
            (id, user_id, amount, description) => {
                let wrong = [id.err(), user_id.err(), amount.err(), description.err()];
                return Err(together(wrong.into_iter().flatten().collect()));
            }
        };
        let order = NewOrder { id: id.unwrap_or_else(Uuid::now_v7), user_id, amount, description };
        Ok(Self { order, id_made: id.is_none() })
    }
}

/// One answer for all that is wrong: the code of the first where none is a plain `invalid_request`.
fn together(mut wrong: Vec<Problem>) -> Problem {
    let first = wrong.iter().position(|p| p.code == Code::InvalidRequest).unwrap_or(0);
    let mut answer = wrong.swap_remove(first);
    for other in wrong {
        answer.errors.extend(other.errors);
    }
    answer
}

/// `None` where the server is to make one.
fn read_id(members: &Members<'_>) -> Result<Option<Uuid>, Problem> {
    let Some(text) = members.string("orderId") else { return Ok(None) };
    let id = text.ok().and_then(|text| parse_id(&text)).ok_or_else(|| invalid_id("orderId"))?;
    Ok(Some(id).filter(|id| !id.is_nil()))
}

/// A UUID in any of its usual spellings.
pub fn parse_id(text: &str) -> Option<Uuid> {
    Uuid::try_parse(text).ok()
}

/// `field` is where it stood.
pub fn invalid_id(field: &str) -> Problem {
    Problem::new(Code::InvalidOrderId, "The order id must be a UUID.").with_error(field, "must be a UUID")
}

fn read_user_id(members: &Members<'_>) -> Result<UserId, Problem> {
    let text = members.string("userId").ok_or_else(|| Problem::invalid("userId", "userId is required"))?;
    let text = text.map_err(|()| Problem::invalid("userId", "userId must be a string"))?;
    UserId::new(text).map_err(|error| Problem::invalid("userId", error.to_string()))
}

fn read_amount(members: &Members<'_>) -> Result<Amount, Problem> {
    let raw = members.get("amount").ok_or_else(|| Problem::invalid("amount", "amount is required"))?;
    Ok(Amount::from_json(raw.get())?)
}

fn read_description(members: &Members<'_>) -> Result<Option<String>, Problem> {
    let Some(text) = members.string("description") else { return Ok(None) };
    let wrong = |message: &str| Problem::invalid("description", message);
    let text = text.map_err(|()| wrong("description must be a string"))?;
    if text.chars().nth(DESCRIPTION_CHARS_MAX).is_some() {
        return Err(wrong("description must have at most 1000 characters"));
    }
    if text.contains('\0') {
        return Err(wrong("description must not contain NUL"));
    }
    Ok(Some(text.into_owned()))
}

/// An order as clients see it; the members' order is part of the contract.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OrderBody {
    id: Uuid,
    user_id: String,
    amount: Amount,
    description: Option<String>,
    status: &'static str,
    failure_reason: Option<&'static str>,
    created_at: String,
    updated_at: String,
}

named_schema!(OrderBody, "Order");

impl From<Order> for OrderBody {
    fn from(order: Order) -> Self {
        let created_at = http::timestamp(order.created_at);
        // A new one has not changed.
        let updated_at = if order.updated_at == order.created_at { created_at.clone() } else { http::timestamp(order.updated_at) };
        Self {
            id: order.id,
            user_id: order.user_id.into_string(),
            amount: order.amount,
            description: order.description,
            status: order.status.as_str(),
            failure_reason: order.failure_reason.map(FailureReason::as_str),
            created_at,
            updated_at,
        }
    }
}

/// Names one state of one order.
pub fn etag(order: &Order) -> String {
    format!("\"{}-{}-{}\"", order.id.simple(), order.status.as_str(), order.updated_at.timestamp_micros())
}

/// The id that an order's JSON names.
pub fn id_of(order: &[u8]) -> Option<Uuid> {
    #[derive(serde::Deserialize)]
    struct Named {
        id: Uuid,
    }
    serde_json::from_slice(order).ok().map(|Named { id }| id)
}

/// The user that a query must name.
pub fn user(params: &Params) -> Result<UserId, Problem> {
    let text = params.get("userId").ok_or_else(|| Problem::invalid("userId", "userId is required"))?;
    UserId::new(text).map_err(|error| Problem::invalid("userId", error.to_string()))
}

/// Reads the list's query.
pub fn list(params: &Params) -> Result<ListOrders, Problem> {
    let user_id = params.get("userId").map(|text| UserId::new(text).map_err(|e| Problem::invalid("userId", e.to_string())));
    let status = params.get("status").map(|text| {
        let unknown = || Problem::invalid("status", "status must be New, Processing, Finished or Cancelled.");
        OrderStatus::parse(text).ok_or_else(unknown)
    });
    Ok(ListOrders {
        user_id: user_id.transpose()?,
        status: status.transpose()?,
        limit: http::limit(params)?,
        before: http::cursor(params, read_position)?,
    })
}

/// The cursor of a page's end.
pub fn cursor(position: OrderPosition) -> String {
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&position.created_at.timestamp_micros().to_be_bytes());
    bytes[8..].copy_from_slice(position.id.as_bytes());
    http::cursor_of(bytes)
}

fn read_position(bytes: [u8; 24]) -> Option<OrderPosition> {
    let (at, id) = bytes.split_at(8);
    let micros = i64::from_be_bytes(at.try_into().ok()?);
    // What lies outside these years is no time of an order, and Postgres may not hold it.
    let at = DateTime::from_timestamp_micros(micros).filter(|at| (1970..=9999).contains(&at.year()))?;
    Some(OrderPosition { created_at: at, id: Uuid::from_slice(id).ok()? })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(json: &str) -> Result<NewOrder, Problem> {
        PlaceOrder::read(json.as_bytes()).map(|order| order.order(None))
    }

    const ID: &str = "3f2504e0-4f89-11d3-9a0c-0305e82c3301";

    #[test]
    fn an_order_is_read_whatever_the_case_of_its_names() {
        let order =
            read(&format!(r#"{{"ORDERID":"{ID}","UserId":"u1","Amount":"100.50","DESCRIPTION":"кни\u0433а","more":[{{}}]}}"#));
        let order = order.unwrap();
        assert_eq!(order.id.to_string(), ID);
        assert_eq!((order.user_id.as_str(), order.amount.to_string().as_str()), ("u1", "100.5"));
        assert_eq!(order.description.as_deref(), Some("книга"));
    }

    #[test]
    fn an_order_id_that_is_absent_null_or_zero_is_made() {
        for id in ["", r#""orderId":null,"#, r#""orderId":"00000000-0000-0000-0000-000000000000","#] {
            let order = read(&format!(r#"{{{id}"userId":"u1","amount":1}}"#)).unwrap();
            assert_eq!(order.id.get_version_num(), 7, "{id}");
            assert_eq!(order.description, None);
        }
        for id in [ID.to_uppercase(), ID.replace('-', ""), format!("{{{ID}}}")] {
            assert_eq!(read(&format!(r#"{{"orderId":"{id}","userId":"u1","amount":1}}"#)).unwrap().id.to_string(), ID);
        }
    }

    #[test]
    fn an_order_without_an_id_takes_the_stamp_and_one_with_an_id_keeps_it() {
        let stamp = Uuid::now_v7();
        let id = |json: &str| PlaceOrder::read(json.as_bytes()).unwrap().order(Some(stamp)).id;
        assert_eq!(id(r#"{"userId":"u1","amount":1}"#), stamp);
        assert_eq!(id(&format!(r#"{{"orderId":"{}","userId":"u1","amount":1}}"#, Uuid::nil())), stamp);
        assert_eq!(id(&format!(r#"{{"orderId":"{ID}","userId":"u1","amount":1}}"#)).to_string(), ID);
    }

    #[test]
    fn what_is_wrong_is_named_by_its_code_and_field() {
        let long = format!(r#"{{"userId":"u","amount":1,"description":"{}"}}"#, "ж".repeat(1001));
        for (body, code, fields) in [
            ("", Code::InvalidJson, ""),
            ("{", Code::InvalidJson, ""),
            ("[]", Code::InvalidRequest, "body"),
            ("null", Code::InvalidRequest, "body"),
            ("{}", Code::InvalidRequest, "amount userId"),
            (r#"{"userId":"u","amount":0}"#, Code::AmountNotPositive, "amount"),
            (r#"{"userId":"u","amount":0.001}"#, Code::AmountPrecision, "amount"),
            (r#"{"userId":"u","amount":1e10}"#, Code::AmountTooLarge, "amount"),
            (r#"{"userId":"u","amount":true}"#, Code::InvalidRequest, "amount"),
            (r#"{"userId":"u","amount":"x"}"#, Code::InvalidRequest, "amount"),
            (r#"{"userId":"","amount":0}"#, Code::InvalidRequest, "amount userId"),
            (r#"{"userId":7,"amount":1}"#, Code::InvalidRequest, "userId"),
            (r#"{"userId":"a\nb","amount":1}"#, Code::InvalidRequest, "userId"),
            (r#"{"userId":"u","amount":0,"orderId":"x"}"#, Code::InvalidOrderId, "amount orderId"),
            (r#"{"userId":"u","amount":1,"orderId":5}"#, Code::InvalidOrderId, "orderId"),
            (r#"{"userId":"u","amount":1,"orderId":""}"#, Code::InvalidOrderId, "orderId"),
            (r#"{"userId":"u","amount":1,"description":5}"#, Code::InvalidRequest, "description"),
            (r#"{"userId":"u","amount":1,"description":"a\u0000"}"#, Code::InvalidRequest, "description"),
            (long.as_str(), Code::InvalidRequest, "description"),
        ] {
            let problem = read(body).unwrap_err();
            let named: Vec<_> = problem.errors.keys().map(String::as_str).collect();
            assert_eq!((problem.code, named.join(" ").as_str()), (code, fields), "{body}");
        }
        assert_eq!(read(r#"{"userId":"u","amount":-1}"#).unwrap_err().detail, "Amount must be positive");
    }

    #[test]
    fn nesting_costs_no_stack() {
        let (open, close) = ("[".repeat(30_000), "]".repeat(30_000));
        assert!(read(&format!(r#"{{"userId":"u","amount":1,"more":{open}{close}}}"#)).is_ok());
        for field in ["userId", "amount", "description"] {
            let body = format!(r#"{{"userId":"u","amount":1,"{field}":{open}{close}}}"#);
            assert_eq!(read(&body).unwrap_err().code, Code::InvalidRequest, "{field}");
        }
        assert_eq!(read(&open).unwrap_err().code, Code::InvalidJson);
    }

    fn order() -> Order {
        Order {
            id: ID.parse().unwrap(),
            user_id: UserId::new("alice").unwrap(),
            amount: Amount::from_minor(10050).unwrap(),
            description: None,
            status: OrderStatus::Cancelled,
            failure_reason: Some(FailureReason::InsufficientFunds),
            created_at: DateTime::from_timestamp_micros(1_749_723_072_100_000).unwrap(),
            updated_at: DateTime::from_timestamp_micros(1_749_723_073_000_000).unwrap(),
        }
    }

    #[test]
    fn an_order_shows_its_members_in_the_contracts_order() {
        let json = serde_json::to_string(&OrderBody::from(order())).unwrap();
        let expected = concat!(
            r#"{"id":"3f2504e0-4f89-11d3-9a0c-0305e82c3301","userId":"alice","amount":100.5,"description":null,"#,
            r#""status":"Cancelled","failureReason":"insufficient_funds","#,
            r#""createdAt":"2025-06-12T10:11:12.100000Z","updatedAt":"2025-06-12T10:11:13.000000Z"}"#
        );
        assert_eq!(json, expected);
    }

    #[test]
    fn a_filter_that_names_nothing_is_refused() {
        for query in [
            "status=",
            "status=new",
            "status=Done",
            "userId=",
            "limit=0",
            "limit=501",
            "limit=1.0",
            "limit=",
            "cursor=",
            "cursor=AAAA",
        ] {
            let (name, value) = query.split_once('=').unwrap();
            let problem = list(&Params::from_pairs(&[(name, value)])).unwrap_err();
            assert_eq!(problem.code, Code::InvalidRequest, "{query}");
            assert!(problem.errors.contains_key(name), "{query}");
        }
        let all = list(&Params::default()).unwrap();
        assert_eq!((all.limit, all.user_id, all.status, all.before), (100, None, None, None));
        let some = list(&Params::from_pairs(&[("USERID", "a b"), ("Status", "New"), ("limit", "500")])).unwrap();
        assert_eq!((some.limit, some.status), (500, Some(OrderStatus::New)));
        assert_eq!(some.user_id.unwrap().as_str(), "a b");
    }

    proptest! {
        #[test]
        fn no_body_makes_the_reader_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = PlaceOrder::read(&body);
        }

        #[test]
        fn no_members_make_the_reader_panic(id in "\\PC{0,40}", user in "\\PC*", amount in "-?[0-9.eE+-]{0,12}", text in "\\PC*") {
            let body = serde_json::json!({"orderId": id, "userId": user, "description": text}).to_string();
            let _ = PlaceOrder::read(body.replacen('{', &format!("{{\"amount\":{amount},"), 1).as_bytes());
        }

        #[test]
        fn a_cursor_leads_back_to_its_position(micros in 0i64..4_000_000_000_000_000, id in any::<u128>()) {
            let position = OrderPosition { created_at: DateTime::from_timestamp_micros(micros).unwrap(), id: Uuid::from_u128(id) };
            let params = Params::from_pairs(&[("cursor", &cursor(position))]);
            prop_assert_eq!(list(&params).unwrap().before, Some(position));
        }

        #[test]
        fn no_cursor_makes_the_reader_panic(text in "[A-Za-z0-9_=-]{0,60}") {
            let _ = list(&Params::from_pairs(&[("cursor", &text)]));
        }
    }
}
