//! One worker thread of the gateway: its connections, and the ways of asking a service with them.

use std::cell::RefCell;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use actix_web::http::header::{self, HeaderMap};
use actix_web::http::uri::PathAndQuery;
use actix_web::http::{Method, Version};
use actix_web::web::Payload;
use actix_web::{HttpRequest, HttpResponse};
use bytes::{Bytes, BytesMut};
use uuid::Uuid;

use super::body;
use super::forward::{self, Hop, Way};
use super::routes::ServiceName;
use super::upstream::{Answer, Client, Kind, Outgoing, UpstreamError};
use super::{Gateway, respond};
use crate::http::{Code, PreferWait, Problem, RequestContext, names};
use crate::telemetry::{Span, Tracer, Work};
use crate::trace::TraceContext;

const SCHEME: &str = "http";
/// Of a request that is passed on: a service takes 96, up to 12 of the gateway's own among them.
const HEADERS_MAX: usize = 84;
/// What goes on for ever is asked so.
const EVENTS: &str = "/events";

pub struct Worker {
    pub gateway: Gateway,
    client: Client,
    /// Of the latest request: most come by the same way as the one before.
    way: RefCell<Option<Rc<Way>>>,
}

impl Worker {
    pub fn new(gateway: Gateway) -> Self {
        Self { gateway, client: Client::start(), way: RefCell::new(None) }
    }

    /// Asks a service on the gateway's own account, under the client's ids.
    pub async fn get(
        &self,
        service: ServiceName,
        target: &str,
        context: &RequestContext,
        deadline: Instant,
    ) -> Result<Answer, UpstreamError> {
        // As a request that is passed on: what the gateway asks for itself overloads a service as well.
        let _place = self.gateway.enter(service).await.map_err(|shed| UpstreamError::Unavailable(shed.to_string()))?;
        self.get_with(service, target, &HeaderMap::new(), Kind::Plain, context, deadline).await
    }

    /// As [`Worker::get`], with headers and of a kind.
    pub async fn get_with(
        &self,
        service: ServiceName,
        target: &str,
        headers: &HeaderMap,
        kind: Kind,
        context: &RequestContext,
        deadline: Instant,
    ) -> Result<Answer, UpstreamError> {
        let way = self.way(None, "gateway");
        let asked = Asked::now(service, Method::GET, context);
        let traceparent = asked.trace.traceparent();
        let hop =
            Hop { way: &way, service, request_id: &context.request_id, traceparent: &traceparent, stamp: None, prefers: true };
        let target = target.parse().map_err(|error| UpstreamError::Unavailable(format!("{target}: {error}")))?;
        let headers = |out: &mut BytesMut, travels| forward::request(headers, &hop, travels, out);
        let outgoing = Outgoing {
            method: Method::GET,
            target,
            headers: &headers,
            body: Bytes::new(),
            kind,
            wait: Duration::ZERO,
            again: false,
        };
        let answer = self.client.send(self.gateway.replicas(service), &outgoing, deadline).await;
        asked.answered(&answer);
        answer
    }

    /// Passes a client's request on, and the answer back. `rest` is what follows the service's prefix, raw.
    ///
    /// # Errors
    /// 431 of too many headers, 413 and 400 of a body that is too large or does not come, `unavailable` where too much is asked, and what stands for an
    /// answer that did not come.
    pub async fn proxy(
        &self,
        service: ServiceName,
        rest: &str,
        req: &HttpRequest,
        context: &RequestContext,
        body: Payload,
    ) -> Result<HttpResponse, Problem> {
        if req.headers().len() > HEADERS_MAX {
            return Err(Problem::new(Code::HeadTooLarge, "The request has more headers than the 84 that are passed on."));
        }
        let bound = self.gateway.upstream_timeout();
        // By route, never by what a path happens to end with: a user may be called `events`, and only who places an order is waited for.
        let is_orders = service == ServiceName::Orders;
        let is_stream = is_orders && rest.ends_with(EVENTS);
        let may_wait = is_orders && rest.is_empty() && req.method() == Method::POST;
        let wait = PreferWait::of(req.headers()).0.filter(|_| may_wait).unwrap_or(Duration::ZERO);
        // What follows the head of an `Upgrade` is no body, and has no end.
        let has_body = req.version() >= Version::HTTP_2
            || [header::CONTENT_LENGTH, header::TRANSFER_ENCODING].iter().any(|name| req.headers().contains_key(name));
        let body = if has_body { body::read(body, req.headers(), bound).await? } else { Bytes::new() };
        let deadline = Instant::now() + bound + wait;
        // Only now: a client that sends slowly must not hold a place.
        // What waits on purpose holds none either: it would keep those out who do not.
        let _place = match is_stream || !wait.is_zero() {
            true => None,
            false => Some(self.gateway.enter(service).await?),
        };
        let host = req.headers().get(header::HOST).and_then(|host| host.to_str().ok());
        let host = host.or(req.uri().authority().map(|authority| authority.as_str())).unwrap_or_default();
        let peer = req.peer_addr().map(|peer| peer.ip().to_canonical());
        // Beside GET everything has an effect.
        let stamp = (req.method() != Method::GET).then(|| Uuid::now_v7().hyphenated().to_string());
        let own_key = stamp.is_some() && !forward::carries(req.headers(), &names::IDEMPOTENCY_KEY);
        let way = self.way(peer, host);
        let asked = Asked::now(service, req.method().clone(), context);
        let traceparent = asked.trace.traceparent();
        let (request_id, stamp) = (&*context.request_id, stamp.as_deref());
        let hop = Hop { way: &way, service, request_id, traceparent: &traceparent, stamp, prefers: true };
        let headers = |out: &mut BytesMut, travels| forward::request(req.headers(), &hop, travels, out);
        let outgoing = Outgoing {
            method: req.method().clone(),
            target: inner_target(service, rest, req.uri().query()).map_err(Problem::internal)?,
            headers: &headers,
            body,
            kind: match (is_stream, own_key) {
                (true, _) => Kind::Stream,
                (_, true) => Kind::OwnKey,
                _ => Kind::Plain,
            },
            wait,
            again: false,
        };
        let answer = match wait.is_zero() {
            true => self.client.send(self.gateway.replicas(service), &outgoing, deadline).await,
            // Elsewhere: most do not wait, and each request's future is moved with room for this.
            false => Box::pin(self.send_until_stop(outgoing, &hop, req.headers(), deadline)).await,
        };
        asked.answered(&answer);
        answer.map(|answer| respond::respond(answer, &self.gateway.0.stop)).map_err(|error| problem(service, error))
    }

    /// Sends what waits on purpose. A gateway that stops has not that time: it asks again under the same stamp, without the wait, and the
    /// answer is the order as it is.
    async fn send_until_stop(
        &self,
        outgoing: Outgoing<'_>,
        hop: &Hop<'_>,
        headers: &HeaderMap,
        deadline: Instant,
    ) -> Result<Answer, UpstreamError> {
        let replicas = self.gateway.replicas(hop.service);
        let stop = &self.gateway.0.stop;
        tokio::select! {
            biased;
            answer = self.client.send(replicas, &outgoing, deadline) => return answer,
            () = stop.stopped() => {}
        }
        let hop = Hop { prefers: false, ..*hop };
        let headers = |out: &mut BytesMut, travels| forward::request(headers, &hop, travels, out);
        let outgoing = Outgoing { headers: &headers, wait: Duration::ZERO, again: true, ..outgoing };
        let deadline = deadline.min(Instant::now() + self.gateway.upstream_timeout());
        self.client.send(replicas, &outgoing, deadline).await
    }

    /// Written anew only where it is another than the latest.
    fn way(&self, peer: Option<IpAddr>, host: &str) -> Rc<Way> {
        let mut latest = self.way.borrow_mut();
        match &*latest {
            Some(way) if way.peer == peer && way.host == host => way.clone(),
            _ => latest.insert(Rc::new(Way::new(peer, host, SCHEME))).clone(),
        }
    }
}

/// A request to a service, over all the times that it is tried, as a span.
struct Asked {
    service: ServiceName,
    method: Method,
    trace: TraceContext,
    parent: u64,
    began: SystemTime,
}

impl Asked {
    fn now(service: ServiceName, method: Method, context: &RequestContext) -> Self {
        Self { service, method, trace: context.trace.child(), parent: context.trace.span_bits(), began: SystemTime::now() }
    }

    fn answered(self, answer: &Result<Answer, UpstreamError>) {
        let tracer = Tracer::of("gateway");
        if !tracer.wants(&self.trace) {
            return;
        }
        let span = Span::begun(self.method.to_string(), Work::Client, self.trace, Some(self.parent), self.began)
            .with("http.request.method", self.method.to_string())
            .with("peer.service", format!("shopd-{}", self.service.as_str()));
        tracer.record(match answer {
            Ok(answer) => span.with("http.response.status_code", i64::from(answer.status.as_u16())),
            Err(error) => span.failed(error.to_string()),
        });
    }
}

fn inner_target(service: ServiceName, rest: &str, query: Option<&str>) -> Result<PathAndQuery, actix_web::http::uri::InvalidUri> {
    let prefix = service.inner_prefix();
    let mut target = String::with_capacity(prefix.len() + rest.len() + query.map_or(0, |query| query.len() + 1));
    target.push_str(prefix);
    target.push_str(rest);
    if let Some(query) = query {
        target.push('?');
        target.push_str(query);
    }
    PathAndQuery::from_maybe_shared(Bytes::from(target))
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
