//! The request's header, and how a handler's result becomes the answer that is stored.

use std::future::{Ready, ready};

use actix_web::dev::Payload;
use actix_web::{FromRequest, HttpMessage, HttpRequest};
use uuid::Uuid;

use super::{Key, Keyed};
use crate::http::context::RequestContext;
use crate::http::extract::{escape, path_segment};
use crate::http::names;
use crate::http::openapi::{self, DataType, Documented, In, RawOperation};
use crate::http::problem::Problem;
use crate::http::render;
use crate::http::reply::Reply;

/// As documents name it.
pub const IDEMPOTENCY_KEY: &str = "Idempotency-Key";
/// As headers are compared.
pub const IDEMPOTENCY_KEY_HEADER: &str = "idempotency-key";
/// The response header of every replay, `true`.
pub const REPLAYED: &str = "idempotent-replayed";

/// Characters at most.
pub(in crate::http) const KEY_CHARS_MAX: usize = 255;

/// The request's `Idempotency-Key`, if it has one. An extractor; it refuses a key that breaks a rule.
pub struct IdempotencyKey(Option<Given>);

struct Given {
    scope: String,
    text: String,
    context: RequestContext,
    /// The path that the client asked.
    instance: String,
}

impl IdempotencyKey {
    fn of(req: &HttpRequest) -> Result<Self, Problem> {
        let mut values = req.headers().get_all(&names::IDEMPOTENCY_KEY);
        let Some(value) = values.next() else { return Ok(Self(None)) };
        let invalid = |message: &str| Problem::invalid(IDEMPOTENCY_KEY, message);
        if values.next().is_some() {
            return Err(invalid("There must be one Idempotency-Key at most."));
        }
        let text = std::str::from_utf8(value.as_bytes()).ok().filter(|text| {
            let chars = text.chars().count();
            (1..=KEY_CHARS_MAX).contains(&chars) && !text.chars().any(char::is_control)
        });
        let text = text.ok_or_else(|| invalid("Idempotency-Key must be 1 to 255 characters, none of them a control character."))?;
        let context = req.extensions().get::<RequestContext>().cloned();
        let context = context.ok_or_else(|| Problem::internal("the request has no context: its layer is not installed"))?;
        let instance = context.public_path(req.uri().path());
        Ok(Self(Some(Given { scope: scope(req)?, text: text.to_owned(), context, instance })))
    }

    /// With the body it came with, and how the result is answered.
    pub fn over<R, T>(self, body: &[u8], reply: fn(R) -> Result<Reply<T>, Problem>) -> Option<Keyed<R>>
    where
        R: Clone + 'static,
        T: 'static,
    {
        let Given { scope, text, context, instance } = self.0?;
        let key = Key::new(scope, text, body).stamped(context.stamp);
        let answer = move |result: &R| match reply(result.clone()) {
            Ok(reply) => reply.answer,
            Err(problem) => render::answer(&problem, &context, &instance),
        };
        Some(Keyed::new(key, answer))
    }
}

/// The request's key for an effect that keeps the stamp itself, which is the key where the gateway added it. An extractor, as
/// [`IdempotencyKey`].
pub struct OwnIdempotencyKey {
    /// The client's.
    pub own: IdempotencyKey,
    /// The stamp that stands for one, made for this request alone.
    pub added: Option<Uuid>,
}

impl OwnIdempotencyKey {
    fn of(req: &HttpRequest) -> Result<Self, Problem> {
        let stamp = req.extensions().get::<RequestContext>().and_then(|context| context.stamp);
        let mut values = req.headers().get_all(&names::IDEMPOTENCY_KEY);
        let is_stamp = |stamp: &Uuid| {
            let key = values.next().filter(|_| values.next().is_none());
            key.is_some_and(|key| key.as_bytes() == stamp.hyphenated().encode_lower(&mut Uuid::encode_buffer()).as_bytes())
        };
        match stamp.filter(is_stamp) {
            Some(stamp) => Ok(Self { own: IdempotencyKey(None), added: Some(stamp) }),
            None => Ok(Self { own: IdempotencyKey::of(req)?, added: None }),
        }
    }
}

impl FromRequest for OwnIdempotencyKey {
    type Error = Problem;
    type Future = Ready<Result<Self, Problem>>;

    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(Self::of(req))
    }
}

impl FromRequest for IdempotencyKey {
    type Error = Problem;
    type Future = Ready<Result<Self, Problem>>;

    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(Self::of(req))
    }
}

/// Method and path, each segment spelled in one way however the client escaped it.
fn scope(req: &HttpRequest) -> Result<String, Problem> {
    let pattern = req.match_pattern().unwrap_or_default();
    let mut scope = format!("{} ", req.method());
    for segment in pattern.split('/').skip(1) {
        scope.push('/');
        match segment.strip_prefix('{').and_then(|segment| segment.strip_suffix('}')) {
            Some(name) => scope.push_str(&escape(&path_segment(req, name)?)),
            None => scope.push_str(segment),
        }
    }
    Ok(scope)
}

impl openapi::Schema for IdempotencyKey {}

impl openapi::Schema for OwnIdempotencyKey {}

impl Documented for OwnIdempotencyKey {
    fn update_parameter(op: &mut RawOperation) {
        IdempotencyKey::update_parameter(op);
    }
}

impl Documented for IdempotencyKey {
    fn update_parameter(op: &mut RawOperation) {
        let description = "Names this request: sent again with the same body it is answered as the first time, with \
                           `Idempotent-Replayed: true`, and nothing happens again. Kept 7 days, unless configured otherwise.";
        openapi::parameter(op, In::Header, IDEMPOTENCY_KEY, DataType::String, description);
    }
}
