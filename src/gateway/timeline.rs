//! One order's way through both services, asked at once and merged.

use std::time::Instant;

use actix_web::HttpResponse;
use actix_web::http::StatusCode;
use futures::future::join;
use serde::Serialize;

use super::routes::ServiceName;
use super::upstream::{Answer, AnswerBody, UpstreamError};
use super::worker::{self, Worker};
use crate::http::timeline::{INNER, Part, Timeline, merge};
use crate::http::{Code, Problem, RequestContext};

#[derive(Serialize)]
struct Body {
    #[serde(flatten)]
    timeline: Timeline,
    /// Only where a service did not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    partial: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    missing: Option<[&'static str; 1]>,
}

/// Answers for `order`, a raw segment of the path. Without payments, what orders alone knows, and says so.
///
/// # Errors
/// 400 and 404 as orders has them, and the gateway's own answers where orders does not answer.
pub async fn timeline(worker: &Worker, order: &str, context: &RequestContext) -> Result<HttpResponse, Problem> {
    let deadline = Instant::now() + worker.gateway.upstream_timeout();
    let target = INNER.replace("{orderId}", order);
    let [orders, payments] = ServiceName::ALL.map(|service| worker.get(service, &target, context, deadline));
    let (orders, payments) = join(orders, payments).await;
    let orders = match orders.map_err(|error| worker::problem(ServiceName::Orders, error))? {
        Answer { status: StatusCode::OK, body: AnswerBody::Whole(bytes), .. } => read(&bytes)?,
        Answer { status: StatusCode::NOT_FOUND, .. } => return Err(Problem::new(Code::OrderNotFound, "No order has this id.")),
        Answer { status: StatusCode::BAD_REQUEST, body, .. } => return Err(refused(&body)),
        Answer { status, .. } => {
            return Err(worker::problem(ServiceName::Orders, UpstreamError::Unavailable(format!("it answered {status}"))));
        }
    };
    // The two answers are not of one moment: what orders has read by now payments may have decided after it was asked.
    let knew_nothing = matches!(&payments, Ok(Answer { status: StatusCode::NOT_FOUND, .. }));
    let payments = match knew_nothing && orders.has_a_result() {
        true => worker.get(ServiceName::Payments, &target, context, deadline).await,
        false => payments,
    };
    // Payments knows nothing (yet), or does not answer.
    let (payments, missing) = match payments {
        Ok(Answer { status: StatusCode::OK, body: AnswerBody::Whole(bytes), .. }) => (Some(read(&bytes)?), None),
        Ok(Answer { status: StatusCode::NOT_FOUND, .. }) => (None, None),
        Ok(_) | Err(_) => (None, Some([ServiceName::Payments.as_str()])),
    };
    let body = Body { timeline: merge(orders, payments), partial: missing.map(|_| true), missing };
    Ok(HttpResponse::Ok().json(body))
}

/// As orders refused it: no text, or none that is an order's id.
fn refused(body: &AnswerBody) -> Problem {
    #[derive(serde::Deserialize)]
    struct Coded {
        code: String,
    }
    let coded = match body {
        AnswerBody::Whole(bytes) => serde_json::from_slice::<Coded>(bytes).ok(),
        AnswerBody::Stream { .. } => None,
    };
    match coded.is_some_and(|coded| coded.code == Code::InvalidRequest.as_str()) {
        true => Problem::invalid("orderId", "The path's percent-encoding is malformed."),
        false => Problem::new(Code::InvalidOrderId, "The order id must be a UUID.").with_error("orderId", "must be a UUID"),
    }
}

fn read(bytes: &[u8]) -> Result<Part, Problem> {
    serde_json::from_slice(bytes).map_err(|error| Problem::internal(format_args!("a timeline cannot be read: {error}")))
}
