//! What is measured: one file a part, with how it is measured and what the page says about it.

pub mod bloat;
pub mod flow;
pub mod gateway;
pub mod intake;
pub mod latency;
pub mod payments;
pub mod relay;
pub mod rest;
pub mod size;
pub mod steady;

mod bare;
mod depth;
mod disk;
mod fill;
mod floor;
mod host;
mod queues;
mod tables;

/// Accounts that orders are spread over.
pub const SPREAD: usize = 1_000;

/// A thousand or one.
pub fn named(accounts: usize) -> &'static str {
    if accounts == 1 { "one account" } else { "1 000 accounts" }
}
