//! What the log loses heals without hands.
