//! The services' OpenAPI documents: asked for whenever the merged one is, the last good one of each kept.
//!
//! Asked for each time, so that a service that is down is named at once.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::join;
use serde_json::Value;

use super::openapi::{mark_partial, merge};
use super::routes::ServiceName;
use super::upstream::AnswerBody;
use super::worker::Worker;
use crate::http::RequestContext;

const FETCH_TIME_MAX: Duration = Duration::from_secs(1);

/// The last good document of each service, in the order of [`ServiceName::ALL`].
#[derive(Default)]
pub struct Documents(Mutex<[Option<Value>; 2]>);

impl Documents {
    /// The merged document; the services that do not answer now are named in it.
    pub async fn current(&self, worker: &Worker, context: &RequestContext) -> Value {
        let [orders, payments] = ServiceName::ALL.map(|service| fetch(worker, context, service));
        let (orders, payments) = join(orders, payments).await;
        let mut stale = Vec::new();
        let known = {
            let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            for ((service, fetched), last) in ServiceName::ALL.into_iter().zip([orders, payments]).zip(last.iter_mut()) {
                match fetched {
                    Some(document) => *last = Some(document),
                    None => stale.push(service),
                }
            }
            last.clone()
        };
        let [orders, payments] = known;
        let mut merged = merge(&[(ServiceName::Orders, orders), (ServiceName::Payments, payments)]);
        mark_partial(&mut merged, stale);
        merged
    }
}

async fn fetch(worker: &Worker, context: &RequestContext, service: ServiceName) -> Option<Value> {
    let deadline = Instant::now() + FETCH_TIME_MAX;
    match worker.get(service, "/openapi.json", context, deadline).await {
        Ok(answer) if answer.status.is_success() => match answer.body {
            AnswerBody::Whole(bytes) => serde_json::from_slice::<Value>(&bytes).ok().filter(Value::is_object),
            AnswerBody::Stream { .. } => None,
        },
        Ok(answer) => {
            tracing::info!(service = service.as_str(), status = answer.status.as_u16(), "no OpenAPI document");
            None
        }
        Err(error) => {
            tracing::info!(service = service.as_str(), %error, "no OpenAPI document");
            None
        }
    }
}
