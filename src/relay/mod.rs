//! (module relay)
