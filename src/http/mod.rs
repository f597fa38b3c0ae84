//! What every role's port has in common: the server, problem+json, the request's context, bodies and parameters, pages, health,
//! metrics, OpenAPI, idempotency keys, server-sent events, WebSockets. May import config, db and the values; never messaging or a service.

mod batch;
mod body;
mod context;
mod cors;
mod drain;
mod etag;
mod extract;
mod head;
mod health;
pub mod idempotency;
mod layer;
pub mod metrics;
pub mod names;
pub mod openapi;
mod pages;
mod paths;
mod prefer;
mod problem;
mod render;
mod reply;
mod server;
pub mod sse;
pub mod timeline;
pub mod websocket;

pub use batch::{
    BATCH_ANSWERS, BATCH_COUNT_MAX, BATCH_HEADER, BATCH_LINES_MAX, BATCH_PATH, BATCH_REQUEST_BYTES_MAX, BATCH_REQUESTS,
};
pub use body::{BODY_BYTES_MAX, Ignored, Json, ReadBody};
pub use context::{DEADLINE_HEADER, PREFIX_HEADER, REQUEST_ID_HEADER, RequestContext, STAMP_HEADER};
pub use etag::matches as if_none_match;
pub use extract::{Params, escape, path_segment};
pub use health::{Health, Readiness};
pub use idempotency::{IDEMPOTENCY_KEY_HEADER, IdempotencyKey, OwnIdempotencyKey};
pub use pages::{LIMIT_DEFAULT, LIMIT_MAX, cursor, cursor_of, limit, with_next};
pub use paths::Paths;
pub use prefer::{PREFERENCE_APPLIED, PreferWait};
pub use problem::{Code, Problem};
pub use render::{MethodNotAllowed, PROBLEM_JSON, only};
pub use reply::{Answer, Reply, timestamp};
pub use server::{Bound, GATEWAY, Port, Routes, ServeError, bind};

#[cfg(test)]
mod tests;
