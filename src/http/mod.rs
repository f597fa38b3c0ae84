//! What every role's port has in common: the server, problem+json, the request's context, bodies and parameters, pages, health,
//! metrics, OpenAPI. May import config and the values; never messaging or a service.

mod context;
mod drain;
mod head;
mod health;
pub mod metrics;
mod problem;
mod render;
mod server;

pub use context::{PREFIX_HEADER, REQUEST_ID_HEADER, RequestContext};
pub use health::{Health, Readiness};
pub use problem::{Code, Problem};
pub use render::{MethodNotAllowed, PROBLEM_JSON, only};
pub use server::{Bound, GATEWAY, Routes, ServeError, bind, serve};
