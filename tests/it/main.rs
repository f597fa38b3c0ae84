//! The integration tests: one binary, so that they share one database server.

mod embedded;
mod outbox;
mod support;
