//! Messaging: the outbox, the log, consumers with their offsets and leases, dead letters.
//!
//! Moves records and never names an order. Owns the tables `outbox`, `outbox_cursor`, `consumer_offset`, `consumer_member` and `dead_letter` in
//! every service's database. May import contracts' envelope, db and config.

pub mod consumer;
pub mod dead_letter;
pub mod log;
pub mod outbox;
mod reach;

pub use consumer::{Consumer, Delivery, Fence, Handler, PgInbox, Position, Received, next_offsets};
pub use dead_letter::{Keys, Poison, headers_from_json, is_copy, letters, shorten};
pub use outbox::Message;
pub use reach::Reach;
