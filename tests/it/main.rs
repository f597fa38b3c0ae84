//! The integration tests: one binary, so that they share one database server.

mod command_line;
mod embedded;
mod outbox;
mod support;
