//! Messaging: the outbox, the log, consumers with their offsets and leases, dead letters.
//!
//! Moves records and never names an order. Owns the tables `outbox`, `outbox_cursor`, `consumer_offset` and `dead_letter` in
//! every service's database. May import contracts' envelope, db and config.

pub mod consumer;
mod dead_letter;
mod delivery;
mod fetcher;
pub mod log;
mod offsets;
pub mod outbox;

pub use consumer::{Consumer, Handler};
pub use dead_letter::{Poison, letters};
pub use delivery::{Delivery, Position, Received};
pub use offsets::next_offsets;
pub use outbox::Message;
