//! (module messaging)
