//! Headers that the framework has no name for. Each name is made once: looking one up by its text parses, copies and frees it every time,
//! and a request is asked for a dozen.

use actix_web::http::header::HeaderName;

use super::batch::BATCH_HEADER;
use super::context::{DEADLINE_HEADER, PREFIX_HEADER, REQUEST_ID_HEADER, STAMP_HEADER};
use super::idempotency::IDEMPOTENCY_KEY_HEADER;

pub static BATCH: HeaderName = HeaderName::from_static(BATCH_HEADER);
pub static DEADLINE: HeaderName = HeaderName::from_static(DEADLINE_HEADER);
pub static IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static(IDEMPOTENCY_KEY_HEADER);
pub static PREFER: HeaderName = HeaderName::from_static("prefer");
pub static PREFIX: HeaderName = HeaderName::from_static(PREFIX_HEADER);
pub static REQUEST_ID: HeaderName = HeaderName::from_static(REQUEST_ID_HEADER);
pub static STAMP: HeaderName = HeaderName::from_static(STAMP_HEADER);
pub static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
