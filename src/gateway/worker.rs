//! One worker thread of the gateway: its connections, and the two ways of asking a service with them.

use std::time::Duration;

use actix_web::body::{BodyStream, None as NoBody, SizedStream};
use actix_web::http::header::{self, HeaderMap};
use actix_web::http::{Method, StatusCode, Uri, Version};
use actix_web::web::Payload;
use actix_web::{HttpRequest, HttpResponse};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use tokio::time::{Instant, timeout_at};

use super::forward::{self, Hop};
use super::routes::ServiceName;
use super::upstream::{Answer, AnswerBody, Client, Outgoing, UpstreamError};
use super::{Gateway, Replicas};
use crate::http::{Code, Problem, RequestContext};

/// As the services have it.
const BODY_BYTES_MAX: usize = 64 * 1024;
const SCHEME: &str = "http";

pub struct Worker {
    pub gateway: Gateway,
    client: Client,
}

impl Worker {
    pub fn new(gateway: Gateway) -> Self {
        Self { gateway, client: Client::new() }
    }

    fn replicas(&self, service: ServiceName) -> &Replicas {
        self.gateway.replicas(service)
    }

    /// Asks a service on the gateway's own account.
    pub async fn get(
        &self,
        service: ServiceName,
        target: String,
        context: &RequestContext,
        deadline: Instant,
    ) -> Result<Answer, UpstreamError> {
        let hop = Hop {
            peer: None,
            host: "gateway",
            scheme: SCHEME,
            prefix: service.public_prefix(),
            request_id: &context.request_id,
            traceparent: &context.trace.child().traceparent(),
        };
        let headers = forward::request(&HeaderMap::new(), &hop);
        let outgoing = Outgoing { method: Method::GET, target, headers, body: Bytes::new() };
        self.client.send(self.replicas(service), &outgoing, deadline).await
    }

    /// Passes a client's request on, and the answer back. `rest` is what follows the service's prefix, raw.
    pub async fn proxy(
        &self,
        service: ServiceName,
        rest: &str,
        req: &HttpRequest,
        context: &RequestContext,
        body: Payload,
    ) -> Result<HttpResponse, Problem> {
        let bound = self.gateway.upstream_timeout();
        // What follows the head of an `Upgrade` is no body, and has no end.
        let has_body = req.version() >= Version::HTTP_2
            || [header::CONTENT_LENGTH, header::TRANSFER_ENCODING].iter().any(|name| req.headers().contains_key(name));
        if announced(req.headers()).is_some_and(|length| length > BODY_BYTES_MAX as u64) {
            return Err(too_large());
        }
        let body = if has_body { read_body(body, Instant::now() + bound).await? } else { Bytes::new() };
        let host = req.headers().get(header::HOST).and_then(|host| host.to_str().ok());
        let hop = Hop {
            peer: req.peer_addr().map(|peer| peer.ip().to_canonical()),
            host: host.or(req.uri().authority().map(|authority| authority.as_str())).unwrap_or_default(),
            scheme: SCHEME,
            prefix: service.public_prefix(),
            request_id: &context.request_id,
            traceparent: &context.trace.child().traceparent(),
        };
        let outgoing = Outgoing {
            method: req.method().clone(),
            target: inner_target(service, rest, req.uri()),
            headers: forward::request(req.headers(), &hop),
            body,
        };
        let deadline = Instant::now() + bound + forward::wait(req.headers()).unwrap_or(Duration::ZERO);
        let answer = self.client.send(self.replicas(service), &outgoing, deadline).await;
        answer.map(respond).map_err(|error| problem(service, error))
    }
}

fn inner_target(service: ServiceName, rest: &str, uri: &Uri) -> String {
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    format!("{}{rest}{query}", service.inner_prefix())
}

/// The length that the client names beforehand.
fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()).and_then(|value| value.parse().ok())
}

fn too_large() -> Problem {
    Problem::new(Code::PayloadTooLarge, "The body is larger than 64 KiB.")
}

/// The whole body, bounded; what is left of a larger one is drained by the layer around us.
async fn read_body(mut body: Payload, until: Instant) -> Result<Bytes, Problem> {
    let mut whole = BytesMut::new();
    loop {
        let late = |_| Problem::invalid("body", "The body did not arrive in time.");
        match timeout_at(until, body.next()).await.map_err(late)? {
            Some(Ok(chunk)) if whole.len() + chunk.len() > BODY_BYTES_MAX => {
                return Err(too_large());
            }
            Some(Ok(chunk)) => whole.extend_from_slice(&chunk),
            Some(Err(error)) => return Err(Problem::invalid("body", "The body did not arrive whole.").caused_by(error)),
            None => return Ok(whole.freeze()),
        }
    }
}

fn respond(answer: Answer) -> HttpResponse {
    let mut response = HttpResponse::build(answer.status);
    for header in forward::answer(&answer.headers) {
        response.append_header(header);
    }
    let bodyless = [StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&answer.status);
    match answer.body {
        AnswerBody::Whole(_) if bodyless => response.body(NoBody::new()),
        AnswerBody::Whole(bytes) => response.body(bytes),
        AnswerBody::Stream { length: Some(length), chunks } => response.body(SizedStream::new(length, chunks)),
        AnswerBody::Stream { length: None, chunks } => response.body(BodyStream::new(chunks)),
    }
}

/// A service that gave no answer, as the client sees it.
pub fn problem(service: ServiceName, error: UpstreamError) -> Problem {
    let code = match error {
        UpstreamError::Unavailable(_) => Code::UpstreamUnavailable,
        UpstreamError::Timeout(_) => Code::UpstreamTimeout,
    };
    let detail = match code {
        Code::UpstreamTimeout => "The service did not answer in time; whether it did what was asked is not known.",
        _ => "The service cannot be reached now; try again.",
    };
    let mut problem = Problem::new(code, detail).caused_by(format_args!("{}: {error}", service.as_str()));
    problem.retry_after_s = Some(1);
    problem
}
