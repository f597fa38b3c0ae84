//! What both services know of one user, asked at once.
//!
//! Amounts pass as the text they came as.

use std::borrow::Cow;
use std::time::Instant;

use actix_web::HttpResponse;
use actix_web::http::StatusCode;
use futures::future::join;
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::routes::ServiceName;
use super::upstream::{Answer, AnswerBody, UpstreamError};
use super::worker::{self, Worker};
use crate::http::{Code, Problem, RequestContext};
use crate::user_id::UserId;

/// How many of the user's orders are shown, newest first.
const ORDERS_SHOWN: u32 = 20;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Summary<'a> {
    user_id: &'a UserId,
    balance: Option<&'a RawValue>,
    orders: Vec<&'a RawValue>,
    partial: bool,
    missing: Vec<&'static str>,
}

/// What one service said.
#[derive(Debug)]
enum Said<T> {
    Known(T),
    /// It answered that it knows no such thing.
    Nothing,
    Missing(UpstreamError),
}

/// Answers for `user`, a raw segment of the path.
///
/// # Errors
/// 400 where the segment is no user id, 404 where both services answer and neither knows the user, and the gateway's own answers
/// where neither service answers.
pub async fn summary(worker: &Worker, user: &str, context: &RequestContext) -> Result<HttpResponse, Problem> {
    let user_id = decode(user)?;
    let deadline = Instant::now() + worker.gateway.upstream_timeout();
    let encoded = utf8_percent_encode(user_id.as_str(), NON_ALPHANUMERIC);
    let balance = format!("/api/Account/{user}/balance");
    let balance = worker.get(ServiceName::Payments, &balance, context, deadline);
    let orders = format!("/api/Orders?userId={encoded}&limit={ORDERS_SHOWN}");
    let orders = worker.get(ServiceName::Orders, &orders, context, deadline);
    let (balance, orders) = join(balance, orders).await;
    let body = combine(&user_id, said(balance), said(orders))?;
    Ok(HttpResponse::Ok().content_type("application/json").body(body))
}

/// A percent-encoding that cannot be decoded is an error, never taken literally.
fn decode(segment: &str) -> Result<UserId, Problem> {
    let invalid = |message: String| Problem::invalid("userId", message);
    let mut parts = segment.split('%');
    parts.next();
    if !parts.all(|part| part.len() >= 2 && part.bytes().take(2).all(|digit| digit.is_ascii_hexdigit())) {
        return Err(invalid("the percent-encoding cannot be decoded".to_owned()));
    }
    let text: Cow<'_, str> = percent_decode_str(segment).decode_utf8().map_err(|_| invalid("userId is no UTF-8".to_owned()))?;
    UserId::new(text).map_err(|error| invalid(error.to_string()))
}

fn said(answer: Result<Answer, UpstreamError>) -> Said<bytes::Bytes> {
    match answer {
        Ok(Answer { status: StatusCode::NOT_FOUND, .. }) => Said::Nothing,
        Ok(Answer { status: StatusCode::OK, body: AnswerBody::Whole(bytes), .. }) => Said::Known(bytes),
        Ok(Answer { status, .. }) => Said::Missing(UpstreamError::Unavailable(format!("it answered {status}"))),
        Err(error) => Said::Missing(error),
    }
}

fn combine(user_id: &UserId, balance: Said<bytes::Bytes>, orders: Said<bytes::Bytes>) -> Result<Vec<u8>, Problem> {
    #[derive(Deserialize)]
    struct Balance<'a> {
        #[serde(borrow)]
        balance: &'a RawValue,
    }
    let defect = |name: &str, error: serde_json::Error| Problem::internal(format_args!("{name} answered something else: {error}"));
    let mut missing = Vec::new();
    let (balance, balance_error) = match &balance {
        Said::Known(bytes) => {
            let known: Balance<'_> = serde_json::from_slice(bytes).map_err(|error| defect("payments", error))?;
            (Some(known.balance), None)
        }
        Said::Nothing => (None, None),
        Said::Missing(error) => (None, Some(error)),
    };
    let (orders, orders_error) = match &orders {
        Said::Known(bytes) => (serde_json::from_slice(bytes).map_err(|error| defect("orders", error))?, None),
        Said::Nothing => (Vec::new(), None),
        Said::Missing(error) => (Vec::new(), Some(error)),
    };
    missing.extend(orders_error.map(|_| ServiceName::Orders.as_str()));
    missing.extend(balance_error.map(|_| ServiceName::Payments.as_str()));
    match (balance_error, orders_error) {
        (Some(error), Some(_)) => return Err(worker::problem(ServiceName::Payments, error.clone())),
        (None, None) if balance.is_none() && orders.is_empty() => {
            return Err(Problem::new(Code::AccountNotFound, "Neither service knows this user."));
        }
        _ => {}
    }
    let summary = Summary { user_id, balance, orders, partial: !missing.is_empty(), missing };
    serde_json::to_vec(&summary).map_err(Problem::internal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(text: &'static str) -> Said<bytes::Bytes> {
        Said::Known(bytes::Bytes::from_static(text.as_bytes()))
    }

    fn down<T>() -> Said<T> {
        Said::Missing(UpstreamError::Unavailable("refused".into()))
    }

    fn of(balance: Said<bytes::Bytes>, orders: Said<bytes::Bytes>) -> Result<String, Problem> {
        combine(&UserId::new("u1").unwrap(), balance, orders).map(|body| String::from_utf8(body).unwrap())
    }

    #[test]
    fn both_services_answers_are_put_together_as_they_came() {
        let balance = known(r#"{"userId":"u1","balance":9999999999.99}"#);
        assert_eq!(
            of(balance, known(r#"[{"id":1,"amount":0.10}]"#)).unwrap(),
            r#"{"userId":"u1","balance":9999999999.99,"orders":[{"id":1,"amount":0.10}],"partial":false,"missing":[]}"#
        );
    }

    #[test]
    fn a_service_that_is_down_makes_it_partial() {
        assert_eq!(
            of(down(), known("[]")).unwrap(),
            r#"{"userId":"u1","balance":null,"orders":[],"partial":true,"missing":["payments"]}"#
        );
        assert_eq!(
            of(known(r#"{"balance":1}"#), down()).unwrap(),
            r#"{"userId":"u1","balance":1,"orders":[],"partial":true,"missing":["orders"]}"#
        );
        assert_eq!(of(down(), down()).unwrap_err().code, Code::UpstreamUnavailable);
    }

    #[test]
    fn a_user_that_neither_knows_is_not_found() {
        assert_eq!(of(Said::Nothing, known("[]")).unwrap_err().code, Code::AccountNotFound);
        assert!(of(Said::Nothing, known("[{}]")).unwrap().contains(r#""balance":null"#));
        assert!(of(Said::Nothing, down()).unwrap().contains(r#""missing":["orders"]"#));
    }

    #[test]
    fn an_undecodable_user_is_invalid() {
        assert_eq!(decode("a%2Fb").unwrap().as_str(), "a/b");
        assert_eq!(decode("%D0%B6").unwrap().as_str(), "ж");
        for bad in ["%zz", "%", "%4", "%ff", "%00", "a%0Ab"] {
            assert_eq!(decode(bad).unwrap_err().code, Code::InvalidRequest, "{bad}");
        }
    }
}
