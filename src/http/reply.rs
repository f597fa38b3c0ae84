//! A successful answer: status, headers and one JSON body, whose type names its schema in the document.

use std::borrow::Cow;
use std::marker::PhantomData;

use actix_web::body::BoxBody;
use actix_web::http::StatusCode;
use actix_web::http::header::{HeaderName, HeaderValue};
use actix_web::{HttpMessage, HttpRequest, HttpResponse, Responder};
use bytes::Bytes;
use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;

use super::context::RequestContext;
use super::problem::Problem;

/// RFC 3339, UTC, six fraction digits: what Postgres keeps.
pub fn timestamp(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Micros, true)
}

const LOCATION: &str = "location";
/// Room for the body of one thing, and for its headers: neither has to grow.
const BODY_BYTES: usize = 384;
const HEADERS: usize = 4;

/// An answer of any kind, whole: what leaves, and what is stored under an idempotency key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: StatusCode,
    /// Names in lower case. `location` is our own path here; it leaves as the path at the port that was asked.
    pub headers: Vec<(Cow<'static, str>, Cow<'static, str>)>,
    pub body: Option<Bytes>,
}

impl Answer {
    /// Sets a header, whether it was there or not; `name` in lower case.
    pub fn set(&mut self, name: &'static str, value: impl Into<Cow<'static, str>>) {
        self.headers.retain(|(other, _)| other != name);
        self.headers.push((name.into(), value.into()));
    }

    pub(super) fn respond(self, context: Option<&RequestContext>) -> HttpResponse {
        let mut response = HttpResponse::build(self.status);
        for (name, value) in self.headers {
            let value = match (context.filter(|_| name == LOCATION), value) {
                (Some(context), value) => HeaderValue::try_from(context.public_path(&value)),
                (None, Cow::Borrowed(value)) => Ok(HeaderValue::from_static(value)),
                (None, Cow::Owned(value)) => HeaderValue::try_from(value),
            };
            // Ours are lower case and valid; one that is not would make the whole answer a 500.
            if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name.as_bytes()), value) {
                response.insert_header((name, value));
            }
        }
        match self.body {
            Some(body) => response.body(body),
            None => response.finish(),
        }
    }
}

/// JSON of type `T`, or nothing.
pub struct Reply<T> {
    pub(super) answer: Answer,
    of: PhantomData<T>,
}

impl<T: Serialize> Reply<T> {
    /// 200.
    pub fn ok(body: &T) -> Result<Self, Problem> {
        Self::with(StatusCode::OK, body)
    }

    /// 201; `location` is our own path.
    pub fn created(body: &T, location: String) -> Result<Self, Problem> {
        Ok(Self::with(StatusCode::CREATED, body)?.header(LOCATION, location))
    }

    fn with(status: StatusCode, body: &T) -> Result<Self, Problem> {
        let mut json = Vec::with_capacity(BODY_BYTES);
        serde_json::to_writer(&mut json, body).map_err(Problem::internal)?;
        let mut headers = Vec::with_capacity(HEADERS);
        headers.push(("content-type".into(), "application/json".into()));
        Ok(Self::from(Answer { status, headers, body: Some(json.into()) }))
    }
}

impl<T> Reply<T> {
    /// 304.
    pub fn not_modified() -> Self {
        Self::from(Answer { status: StatusCode::NOT_MODIFIED, headers: Vec::new(), body: None })
    }

    /// The body as it leaves; `None` where the answer is none of success.
    pub fn success(&self) -> Option<&Bytes> {
        self.answer.body.as_ref().filter(|_| self.answer.status.is_success())
    }

    /// The same answer with another body.
    pub fn with_body(mut self, body: &T) -> Result<Self, Problem>
    where
        T: Serialize,
    {
        self.answer.body = Some(serde_json::to_vec(body).map_err(Problem::internal)?.into());
        Ok(self)
    }

    /// `name` in lower case.
    #[must_use]
    pub fn header(mut self, name: &'static str, value: impl Into<Cow<'static, str>>) -> Self {
        self.answer.set(name, value);
        self
    }
}

/// As it was stored; it may be a problem, too.
impl<T> From<Answer> for Reply<T> {
    fn from(answer: Answer) -> Self {
        Self { answer, of: PhantomData }
    }
}

impl<T> Responder for Reply<T> {
    type Body = BoxBody;

    fn respond_to(self, req: &HttpRequest) -> HttpResponse {
        self.answer.respond(req.extensions().get::<RequestContext>())
    }
}
