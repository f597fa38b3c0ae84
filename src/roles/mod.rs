//! (module roles)
