//! The integration tests: one binary, so that they share one database server.

mod embedded;
mod gateway;
mod outbox;
mod support;
