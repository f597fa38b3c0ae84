//! The integration tests: one binary, so that they share one database server and one broker.

mod architecture;
mod audit;
mod command_line;
mod consumer;
mod contract;
mod crash;
mod dead_letter;
mod embedded;
mod failover;
mod faults;
mod gateway;
mod growth;
mod healing;
mod hostile;
mod idempotency;
mod log;
mod openapi;
mod outage;
mod outbox;
mod promises;
mod replay;
mod scenario;
mod support;
mod sweep;
mod torture_model;
