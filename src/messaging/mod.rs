//! (module messaging)

pub mod log;
