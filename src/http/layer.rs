//! How a request comes in and an answer leaves: the outermost layer of every role's port.
//!
//! Opens the request's span, answers `HEAD` as `GET` without its body, renders errors ([`super::render`]), drains what the handler left of the
//! body ([`super::drain`]), logs and counts the request. Who asks, and under which ids, is the [`RequestContext`].

use std::borrow::Cow;
use std::future::{Ready, ready};
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::dev::{Service, ServiceRequest, ServiceResponse, Transform, forward_ready};
use actix_web::error::InternalError;
use actix_web::http::header::{self, HeaderValue};
use actix_web::http::uri::PathAndQuery;
use actix_web::http::{ConnectionType, Method, StatusCode, Uri, Version};
use actix_web::{Error, HttpMessage, HttpResponse};
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use tracing::Instrument;

use super::context::RequestContext;
use super::paths::Paths;
use super::problem::Problem;
use super::server::{Exchange, InProgress};
use super::{drain, extract, head, metrics, names, render, sse};
use crate::telemetry::{Span, Tracer, Work};

/// What of a request its answer needs, kept because the request itself goes to the handler.
struct Asked {
    role: &'static str,
    context: RequestContext,
    method: Method,
    path: String,
    /// The pattern of its route, where it is known before the framework has looked for it.
    route: Option<Cow<'static, str>>,
    began: Instant,
    /// It asks for a WebSocket: its body ends with the connection, whatever length it names.
    upgrades: bool,
    /// Its client knows of no chunks.
    is_http_1_0: bool,
}

/// The layer itself. `role` names the port in logs and metrics; `inner` says that it is behind the gateway; `pattern` knows the routes
/// that the framework's router does not.
#[derive(Clone, Copy)]
pub(super) struct Layer {
    pub role: &'static str,
    pub inner: bool,
    pub pattern: fn(&str) -> Option<&'static str>,
    /// Routes of the framework's router, which knows one spelling of each.
    pub paths: Option<Paths>,
}

pub(super) struct Layered<S> {
    layer: Layer,
    next: Rc<S>,
}

impl<S, B> Transform<S, ServiceRequest> for Layer
where
    S: Service<ServiceRequest, Response = ServiceResponse<B>, Error = Error> + 'static,
    B: MessageBody + 'static,
{
    type Response = ServiceResponse<BoxBody>;
    type Error = Error;
    type Transform = Layered<S>;
    type InitError = ();
    type Future = Ready<Result<Layered<S>, ()>>;

    fn new_transform(&self, next: S) -> Self::Future {
        ready(Ok(Layered { layer: *self, next: Rc::new(next) }))
    }
}

impl<S, B> Service<ServiceRequest> for Layered<S>
where
    S: Service<ServiceRequest, Response = ServiceResponse<B>, Error = Error> + 'static,
    B: MessageBody + 'static,
{
    type Response = ServiceResponse<BoxBody>;
    type Error = Error;
    type Future = LocalBoxFuture<'static, Result<Self::Response, Error>>;

    forward_ready!(next);

    fn call(&self, req: ServiceRequest) -> Self::Future {
        Box::pin(layer(self.layer, req, self.next.clone()))
    }
}

async fn layer<S, B>(layer: Layer, mut req: ServiceRequest, next: Rc<S>) -> Result<ServiceResponse<BoxBody>, Error>
where
    S: Service<ServiceRequest, Response = ServiceResponse<B>, Error = Error>,
    B: MessageBody + 'static,
{
    let Layer { role, inner, pattern, paths } = layer;
    // What the gateway asks is spelled already.
    if let Some(paths) = paths.filter(|_| !req.headers().contains_key(&names::DEADLINE)) {
        spell(&mut req, paths);
    }
    let progress = Exchange::of(req.request()).map(Exchange::begin);
    let context = RequestContext::of(req.headers(), inner);
    let asked = Asked {
        role,
        method: req.method().clone(),
        path: req.uri().path().to_owned(),
        // One whose handler may be dropped takes what the router finds with it.
        route: match pattern(req.uri().path()) {
            Some(pattern) => Some(pattern.into()),
            None => context.deadline.and_then(|_| req.match_pattern()).map(Cow::from),
        },
        context: context.clone(),
        began: Instant::now(),
        upgrades: upgrades(&req),
        is_http_1_0: req.version() == Version::HTTP_10,
    };
    // Only where every request is logged: what is logged at `info` names its ids itself, and a span's fields are formatted though
    // nothing is ever logged in it.
    let span = tracing::debug_span!("request", role, request_id = %context.request_id, trace_id = %context.trace.trace_id());
    req.extensions_mut().insert(context);
    if asked.method == Method::HEAD {
        req.head_mut().method = Method::GET;
    }
    let body = drain::share(&mut req);
    let refused = check(&asked, req.uri().query()).err();
    let answered = async move {
        // A panic costs its own request an answer, not its connection; the panic hook has logged it.
        let handler = AssertUnwindSafe(next.call(req)).catch_unwind();
        let outcome = match (refused, asked.context.deadline) {
            (Some(problem), _) => Ok(Err(problem.into())),
            (None, None) => handler.await,
            // A handler that is dropped leaves nothing half done: what writes runs in tasks of its own, to its end or not at all
            // (`db::group`, `db::pool`), and a stamp lets the gateway ask again for what may have been done.
            (None, Some(deadline)) => match tokio::time::timeout_at(deadline.into(), handler).await {
                Ok(outcome) => outcome,
                Err(_) => Ok(Err(Problem::unavailable("no answer within the gateway's deadline").into())),
            },
        };
        let outcome = outcome.unwrap_or_else(|_| Err(Problem::internal("a handler panicked").into()));
        answer(&asked, outcome, body, progress).await
    };
    match span.is_disabled() {
        true => answered.await,
        false => answered.instrument(span).await,
    }
}

/// Writes the path as its route is documented, before the framework looks for it.
fn spell(req: &mut ServiceRequest, paths: Paths) {
    let Cow::Owned(path) = paths.canonical(req.uri().path()) else { return };
    let mut parts = req.uri().clone().into_parts();
    let path = match req.uri().query() {
        Some(query) => format!("{path}?{query}"),
        None => path,
    };
    let Ok(spelled) = PathAndQuery::try_from(path) else { return };
    parts.path_and_query = Some(spelled);
    let Ok(uri) = Uri::from_parts(parts) else { return };
    req.match_info_mut().get_mut().update(&uri);
    req.head_mut().uri = uri;
}

/// What no route would tell its client, or not at once.
fn check(asked: &Asked, query: Option<&str>) -> Result<(), Problem> {
    // Who waits for the end of such a body waits for the client to leave.
    if asked.upgrades && ![Method::GET, Method::HEAD].contains(&asked.method) {
        return Err(Problem::invalid("Upgrade", "A WebSocket begins with a GET."));
    }
    // Here, and not where one is read: a route that reads none would place an order.
    query.filter(|_| is_api(&asked.path)).map_or(Ok(()), extract::check_query)
}

/// In any case, as routes are matched.
fn is_api(path: &str) -> bool {
    path.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("/api/"))
}

/// As the framework sees it, which then reads no length.
fn upgrades(req: &ServiceRequest) -> bool {
    let mut protocols = req.headers().get_all(header::UPGRADE);
    protocols.any(|value| value.to_str().is_ok_and(|text| text.trim().eq_ignore_ascii_case("websocket")))
}

async fn answer<B: MessageBody + 'static>(
    asked: &Asked,
    outcome: Result<ServiceResponse<B>, Error>,
    body: Option<Rc<drain::Shared>>,
    progress: Option<InProgress>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let instance = || asked.context.public_path(&asked.path);
    match outcome {
        Ok(done) => {
            let found = if asked.route.is_none() { done.request().match_pattern() } else { None };
            let (req, response) = done.into_parts();
            let response = render::problem_of(response.map_into_boxed_body(), &asked.context, instance);
            let response = finish(asked, asked.route.as_deref().or(found.as_deref()), response, body, progress).await;
            Ok(ServiceResponse::new(req, response))
        }
        // Only layers below us fail so, a panic or the deadline; the request is gone with them.
        Err(error) => {
            let response = render::problem_of(HttpResponse::from_error(error), &asked.context, instance);
            let response = finish(asked, asked.route.as_deref(), response, body, progress).await;
            Err(InternalError::from_response("rendered", response).into())
        }
    }
}

async fn finish(
    asked: &Asked,
    route: Option<&str>,
    mut response: HttpResponse,
    body: Option<Rc<drain::Shared>>,
    progress: Option<InProgress>,
) -> HttpResponse {
    if let Ok(id) = HeaderValue::from_str(&asked.context.request_id) {
        response.headers_mut().insert(names::REQUEST_ID.clone(), id);
    }
    let status = response.status();
    // After 101 the body is the other protocol's.
    let closes = match body.filter(|_| status != StatusCode::SWITCHING_PROTOCOLS) {
        Some(body) => asked.upgrades || !drain::rest(&body).await,
        None => false,
    };
    // RFC 9112, 6.1: the end of the connection ends it then.
    let without_chunks = asked.is_http_1_0 && matches!(response.body().size(), BodySize::Stream);
    if without_chunks {
        response.head_mut().no_chunking(true);
    }
    if closes || without_chunks {
        response.head_mut().set_connection_type(ConnectionType::Close);
        progress.as_ref().inspect(|progress| progress.closes());
    }
    if asked.method == Method::HEAD {
        response = response.map_body(|_, body| BoxBody::new(head::HeadOf::of(&body)));
    } else if let Some(progress) = progress {
        response = response.map_body(|head, body| progress.answered(body, sse::is_stream(&head.headers)));
    }
    let elapsed = asked.began.elapsed();
    metrics::request(asked.role, &asked.method, route, status, elapsed);
    record_span(asked, route, status, elapsed);
    let (method, path, status, ms) = (&asked.method, &asked.path, status.as_u16(), elapsed.as_millis() as u64);
    if status >= 400 {
        let (role, request_id, trace_id) = (asked.role, &*asked.context.request_id, asked.context.trace.trace_id());
        tracing::info!(%method, path, status, ms, role, request_id, trace_id, "request");
    } else {
        tracing::debug!(%method, path, status, ms, "request");
    }
    response
}

/// A probe's or a scraper's question is no part of anything.
const UNTRACED: [&str; 3] = ["/health/live", "/health/ready", "/metrics"];

fn record_span(asked: &Asked, route: Option<&str>, status: StatusCode, elapsed: Duration) {
    let (tracer, context) = (Tracer::of(asked.role), &asked.context);
    if !tracer.wants(&context.trace) || UNTRACED.contains(&asked.path.as_str()) {
        return;
    }
    let name = route.map_or_else(|| asked.method.to_string(), |route| format!("{} {route}", asked.method));
    let began = SystemTime::now().checked_sub(elapsed).unwrap_or(SystemTime::UNIX_EPOCH);
    let mut span = Span::begun(name, Work::Server, context.trace, context.parent, began)
        .with("http.request.method", asked.method.to_string())
        .with("url.path", asked.path.clone())
        .with("http.response.status_code", i64::from(status.as_u16()))
        .with("shopd.request_id", context.request_id.to_string());
    if let Some(route) = route {
        span = span.with("http.route", route.to_owned());
    }
    // What the client did wrong is no failure of the server's.
    tracer.record(if status.is_server_error() { span.failed("") } else { span });
}
