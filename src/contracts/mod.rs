//! (module contracts)
