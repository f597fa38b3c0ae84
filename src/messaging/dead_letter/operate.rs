//! What operators do with letters.
