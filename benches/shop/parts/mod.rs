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
mod shares;
mod tables;

/// Accounts that orders are spread over.
pub const SPREAD: usize = 1_000;

pub fn named(accounts: usize) -> String {
    if accounts == 1 { "one account".into() } else { format!("{} accounts", grouped(accounts)) }
}

/// With thousands set apart, also those of four digits, as the page always had them here.
fn grouped(count: usize) -> String {
    if count >= 1_000 { format!("{} {:03}", count / 1_000, count % 1_000) } else { count.to_string() }
}
