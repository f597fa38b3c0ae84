//! What is measured: one Postgres server and one Kafka broker for the whole run, and for each measurement a shop of its own, with
//! fresh databases, topics and role processes.

mod broker;
mod cpu;
mod limits;
mod process;
mod progress;
mod servers;
mod shop;

pub use broker::Broker;
pub use cpu::Cpu;
pub use limits::Limits;
pub use process::all_in_one;
pub use progress::{Counter, Progress};
pub use servers::Servers;
pub use shop::{ROLES, Shop};
