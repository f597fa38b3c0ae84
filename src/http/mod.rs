//! What every role's port has in common. May import config and the values; never messaging or a service.

mod problem;

pub use problem::{Code, Problem};
