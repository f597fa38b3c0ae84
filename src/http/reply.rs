//! A successful answer: status, headers and one JSON body, whose type names its schema in the document.

use std::marker::PhantomData;

use actix_web::body::BoxBody;
use actix_web::http::StatusCode;
use actix_web::{HttpRequest, HttpResponse, Responder};
use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;

use super::problem::Problem;

/// RFC 3339, UTC, six fraction digits: what Postgres keeps.
pub fn timestamp(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Micros, true)
}

/// JSON of type `T`, or nothing.
pub struct Reply<T> {
    status: StatusCode,
    headers: Vec<(&'static str, String)>,
    json: Option<Vec<u8>>,
    of: PhantomData<T>,
}

impl<T: Serialize> Reply<T> {
    /// 200.
    pub fn ok(body: &T) -> Result<Self, Problem> {
        Self::with(StatusCode::OK, body)
    }

    /// 201; `location` through the port that was asked.
    pub fn created(body: &T, location: &str) -> Result<Self, Problem> {
        Ok(Self::with(StatusCode::CREATED, body)?.header("location", location))
    }

    fn with(status: StatusCode, body: &T) -> Result<Self, Problem> {
        let json = serde_json::to_vec(body).map_err(Problem::internal)?;
        Ok(Self { status, headers: Vec::new(), json: Some(json), of: PhantomData })
    }
}

impl<T> Reply<T> {
    /// 304.
    pub fn not_modified() -> Self {
        Self { status: StatusCode::NOT_MODIFIED, headers: Vec::new(), json: None, of: PhantomData }
    }

    /// `name` in lower case.
    #[must_use]
    pub fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }
}

impl<T> Responder for Reply<T> {
    type Body = BoxBody;

    fn respond_to(self, _: &HttpRequest) -> HttpResponse {
        let mut response = HttpResponse::build(self.status);
        for header in self.headers {
            response.insert_header(header);
        }
        match self.json {
            Some(json) => response.content_type("application/json").body(json),
            None => response.finish(),
        }
    }
}
