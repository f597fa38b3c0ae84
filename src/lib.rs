//! shopd: an online shop's backend whose money is never wrong.
//!
//! The map, from what knows nothing to what knows everything:
//!
//! - [`money`], [`user_id`], [`trace`], [`json`]: values and their rules; no module of ours below them.
//! - [`contracts`]: the events that cross the broker, by producer, and their envelope.
//! - [`tls`]: whom the connections that shopd makes trust, and with what certificate.
//! - [`config`]: every setting, layered and validated at start.
//! - [`db`]: the pool, the one transaction function, the migrations.
//! - [`http`]: server, problem+json, request context, health, OpenAPI; what every role's port has in common.
//! - [`messaging`]: outbox, log, offsets, leases, consumer; moves records and never names an order.
//! - [`orders`], [`payments`]: the two services. They never import each other.
//! - [`relay`]: from an outbox to the log.
//! - [`audit`]: whether anything was lost or charged twice, over both databases and the log.
//! - [`gateway`]: the public port: routes, merges documents, names what is down.
//! - [`embedded`]: the Postgres server that `shopd all` brings along.
//! - [`roles`]: composition only; one file a role.
//! - [`faults`]: places where a test may make a process wait, fail or die; compiled in with the feature `faults` only.
//! - [`cli`], [`telemetry`], [`shutdown`], [`healthcheck`]: the process around a role: flags, logs, signals, the question whether it is ready.

pub mod audit;
pub mod cli;
pub mod config;
pub mod contracts;
pub mod db;
pub mod embedded;
pub mod faults;
pub mod gateway;
pub mod healthcheck;
pub mod http;
pub mod json;
pub mod messaging;
pub mod money;
pub mod orders;
pub mod payments;
pub mod relay;
pub mod roles;
pub mod shutdown;
pub mod telemetry;
pub mod tls;
pub mod trace;
pub mod turns;
pub mod user_id;
