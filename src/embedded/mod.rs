//! (module embedded)
