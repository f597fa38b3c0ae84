//! Who asks, under which ids, and how an answer leaves: the outermost layer of every role's port.
//!
//! Takes or makes `X-Request-Id`, continues `traceparent`, opens the request's span, answers `HEAD` as `GET` without its body,
//! renders errors ([`super::render`]), drains what the handler left of the body ([`super::drain`]), logs and counts the request.
//! Behind the gateway it also takes the gateway's inner headers, which no client can set there: the gateway drops theirs.

use std::borrow::Cow;
use std::future::{Ready, ready};
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{Payload, Service, ServiceRequest, ServiceResponse, Transform, forward_ready};
use actix_web::error::InternalError;
use actix_web::http::header::{HeaderMap, HeaderName, HeaderValue};
use actix_web::http::{Method, StatusCode};
use actix_web::{Error, FromRequest, HttpMessage, HttpRequest, HttpResponse};
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use tracing::Instrument;
use uuid::Uuid;

use super::problem::Problem;
use super::server::{Exchange, InProgress};
use super::{drain, head, metrics, names, render};
use crate::telemetry::{self, Span, Tracer, Work};
use crate::trace::TraceContext;

/// The inner header by which the gateway names the public prefix that a request came under.
pub const PREFIX_HEADER: &str = "x-shopd-prefix";
/// The inner header that names one request of a client over all the times that the gateway tries it: a UUIDv7.
pub const STAMP_HEADER: &str = "x-shopd-stamp";
/// The inner header that says how long the gateway waits for the answer of this try, in milliseconds.
pub const DEADLINE_HEADER: &str = "x-shopd-deadline-ms";
pub const REQUEST_ID_HEADER: &str = "x-request-id";

const REQUEST_ID_BYTES_MAX: usize = 128;
const PREFIX_BYTES_MAX: usize = 64;
const DEADLINE_MS_MAX: u64 = 3_600_000;

/// What is known of a request before its handler runs. An extractor; also among the request's extensions.
#[derive(Clone, Debug)]
pub struct RequestContext {
    /// The request's own position in its trace.
    pub trace: TraceContext,
    /// The span under which it lies, where the client named one.
    pub parent: Option<u64>,
    /// 1..=128 visible ASCII characters.
    pub request_id: Arc<str>,
    /// By [`STAMP_HEADER`].
    pub stamp: Option<Uuid>,
    /// When nobody waits for the answer's head any more, by [`DEADLINE_HEADER`].
    pub deadline: Option<Instant>,
    /// `/api/OrdersProxy`, standing for as many leading segments of our own path.
    public_prefix: Option<Arc<str>>,
}

impl RequestContext {
    /// `inner`: the port is behind the gateway, whose inner headers count; one that cannot be read is none.
    pub(super) fn of(headers: &HeaderMap, inner: bool) -> Self {
        let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        let only = |name: &HeaderName| {
            let mut values = headers.get_all(name);
            let value = values.next().filter(|_| inner)?;
            value.to_str().ok().filter(|_| values.next().is_none())
        };
        let taken = text(&names::REQUEST_ID).filter(|id| is_request_id(id)).map(Arc::from);
        // One that cannot be read, or two, are none, as the standard asks.
        let parent =
            text(&names::TRACEPARENT).filter(|_| headers.get_all(&names::TRACEPARENT).count() == 1).and_then(TraceContext::parse);
        Self {
            trace: parent.map_or_else(telemetry::new_trace, TraceContext::child),
            parent: parent.map(|parent| parent.span_bits()),
            request_id: taken.unwrap_or_else(made),
            stamp: only(&names::STAMP).and_then(stamp),
            deadline: only(&names::DEADLINE).and_then(milliseconds).map(|left| Instant::now() + left),
            public_prefix: text(&names::PREFIX).filter(|prefix| inner && is_prefix(prefix)).map(Arc::from),
        }
    }

    /// Of what was refused before it was a request.
    pub(super) fn unasked() -> Self {
        Self {
            trace: TraceContext::new_root().unsampled(),
            parent: None,
            request_id: made(),
            stamp: None,
            deadline: None,
            public_prefix: None,
        }
    }

    /// The path under which the client reaches our `own` path (`/api/Orders/1`) at the port it asked (`/api/OrdersProxy/1`).
    /// What follows the replaced segments, a query included, is kept as it is.
    pub fn public_path(&self, own: &str) -> String {
        let Some(prefix) = &self.public_prefix else { return own.to_owned() };
        let replaced = prefix.matches('/').count();
        let rest = own.match_indices(['/', '?']).nth(replaced).map_or("", |(at, _)| &own[at..]);
        format!("{prefix}{rest}")
    }
}

impl FromRequest for RequestContext {
    type Error = Error;
    type Future = Ready<Result<Self, Error>>;

    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        let context = req.extensions().get::<RequestContext>().cloned();
        ready(context.ok_or_else(|| Problem::internal("the request has no context: its layer is not installed").into()))
    }
}

/// A request id of our own.
fn made() -> Arc<str> {
    (&*Uuid::now_v7().hyphenated().encode_lower(&mut Uuid::encode_buffer())).into()
}

fn is_request_id(text: &str) -> bool {
    (1..=REQUEST_ID_BYTES_MAX).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}

/// An absolute path of plain segments; never `//host`, which a client would read as another server.
fn is_prefix(text: &str) -> bool {
    text.len() <= PREFIX_BYTES_MAX
        && text.strip_prefix('/').is_some_and(|rest| {
            rest.split('/').all(|s| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)))
        })
}

/// As the gateway spells it, and as an `Idempotency-Key` that it adds is spelled: lower case, with hyphens.
fn stamp(text: &str) -> Option<Uuid> {
    let stamp = Uuid::try_parse(text).ok().filter(|stamp| stamp.get_version_num() == 7)?;
    (*stamp.hyphenated().encode_lower(&mut Uuid::encode_buffer()) == *text).then_some(stamp)
}

fn milliseconds(text: &str) -> Option<Duration> {
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    let ms = text.parse().ok().filter(|ms| digits && (1..=DEADLINE_MS_MAX).contains(ms))?;
    Some(Duration::from_millis(ms))
}

/// What of a request its answer needs, kept because the request itself goes to the handler.
struct Asked {
    role: &'static str,
    context: RequestContext,
    method: Method,
    path: String,
    /// The pattern of its route, where it is known before the framework has looked for it.
    route: Option<Cow<'static, str>>,
    began: Instant,
}

/// The layer itself. `role` names the port in logs and metrics; `inner` says that it is behind the gateway; `pattern` knows the routes
/// that the framework's router does not.
#[derive(Clone, Copy)]
pub(super) struct Layer {
    pub role: &'static str,
    pub inner: bool,
    pub pattern: fn(&str) -> Option<&'static str>,
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
    let Layer { role, inner, pattern } = layer;
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
    };
    // Only where every request is logged: what is logged at `info` names its ids itself, and a span's fields are formatted though
    // nothing is ever logged in it.
    let span = tracing::debug_span!("request", role, request_id = %context.request_id, trace_id = %context.trace.trace_id());
    req.extensions_mut().insert(context);
    if asked.method == Method::HEAD {
        req.head_mut().method = Method::GET;
    }
    let body = drain::share(&mut req);
    let answered = async move {
        // A panic costs its own request an answer, not its connection; the panic hook has logged it.
        let handler = AssertUnwindSafe(next.call(req)).catch_unwind();
        let outcome = match asked.context.deadline {
            None => handler.await,
            // A handler that is dropped leaves nothing half done: what writes runs in tasks of its own, to its end or not at all
            // (`db::group`, `db::pool`), and a stamp lets the gateway ask again for what may have been done.
            Some(deadline) => match tokio::time::timeout_at(deadline.into(), handler).await {
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
    if let Some(body) = body.filter(|_| status != StatusCode::SWITCHING_PROTOCOLS)
        && !drain::rest(&body).await
    {
        response.head_mut().set_connection_type(actix_web::http::ConnectionType::Close);
        progress.as_ref().inspect(|progress| progress.closes());
    }
    if asked.method == Method::HEAD {
        response = response.map_body(|_, body| BoxBody::new(head::HeadOf::of(&body)));
    } else if let Some(progress) = progress {
        response = response.map_body(|_, body| progress.answered(body));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn context(headers: &[(&'static str, &str)], inner: bool) -> RequestContext {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(HeaderName::from_static(name), HeaderValue::from_str(value).unwrap());
        }
        RequestContext::of(&map, inner)
    }

    #[test]
    fn a_usable_request_id_is_taken_and_any_other_replaced() {
        assert_eq!(&*context(&[(REQUEST_ID_HEADER, "abc-1")], true).request_id, "abc-1");
        for bad in ["", "a b", "\t", &"x".repeat(129)] {
            let made = context(&[(REQUEST_ID_HEADER, bad)], true).request_id;
            assert_eq!(Uuid::parse_str(&made).unwrap().get_version_num(), 7, "{bad:?}");
        }
    }

    #[test]
    fn a_trace_with_two_parents_is_begun_anew() {
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let mut map = HeaderMap::new();
        map.append(HeaderName::from_static("traceparent"), HeaderValue::from_static(parent));
        assert_eq!(RequestContext::of(&map, true).trace.trace_id(), parent[3..35]);
        map.append(HeaderName::from_static("traceparent"), HeaderValue::from_static(parent));
        assert_ne!(RequestContext::of(&map, true).trace.trace_id(), parent[3..35]);
    }

    #[test]
    fn the_public_prefix_stands_for_as_many_segments() {
        let proxied = context(&[(PREFIX_HEADER, "/api/OrdersProxy")], true);
        assert_eq!(proxied.public_path("/api/Orders/1?x=/a/b"), "/api/OrdersProxy/1?x=/a/b");
        assert_eq!(proxied.public_path("/api/Orders?cursor=a/b"), "/api/OrdersProxy?cursor=a/b");
        assert_eq!(proxied.public_path("/api/Orders"), "/api/OrdersProxy");
        assert_eq!(context(&[], true).public_path("/api/Orders"), "/api/Orders");
    }

    #[test]
    fn a_prefix_that_leads_elsewhere_or_comes_from_a_client_is_ignored() {
        for bad in ["//evil.example", "http://evil.example", "api", "/api/../x?y", "/", ""] {
            assert_eq!(context(&[(PREFIX_HEADER, bad)], true).public_path("/api/Orders"), "/api/Orders", "{bad}");
        }
        assert_eq!(context(&[(PREFIX_HEADER, "/api/OrdersProxy")], false).public_path("/api/Orders"), "/api/Orders");
    }

    #[test]
    fn a_stamp_is_a_uuid_of_version_7_as_the_gateway_spells_it() {
        let stamp = Uuid::now_v7();
        assert_eq!(context(&[(STAMP_HEADER, &stamp.to_string())], true).stamp, Some(stamp));
        assert_eq!(context(&[(STAMP_HEADER, &stamp.to_string())], false).stamp, None, "a client's");
        let (upper, simple) = (stamp.to_string().to_uppercase(), stamp.simple().to_string());
        for bad in ["", "x", &upper, &simple, &Uuid::new_v4().to_string(), &format!("{stamp} "), &Uuid::nil().to_string()] {
            assert_eq!(context(&[(STAMP_HEADER, bad)], true).stamp, None, "{bad:?}");
        }
    }

    #[test]
    fn a_deadline_is_a_whole_number_of_milliseconds_up_to_an_hour() {
        let left = |text: &str, inner| context(&[(DEADLINE_HEADER, text)], inner).deadline;
        for ms in [1u64, 10_000, 3_600_000] {
            let before = Instant::now();
            let deadline = left(&ms.to_string(), true).unwrap();
            assert!((before..=Instant::now()).contains(&(deadline - Duration::from_millis(ms))), "{ms}");
        }
        assert_eq!(left("1000", false), None, "a client's");
        for bad in ["", "0", "-1", "+1", "1.5", "3600001", "18446744073709551617", "soon", " 5 s"] {
            assert_eq!(left(bad, true), None, "{bad:?}");
        }
        assert_eq!(context(&[], true).deadline, None);
    }
}
