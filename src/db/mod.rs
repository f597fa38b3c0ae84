//! The pool, the one transaction function, the migrations. May import config.

/// Why the database did not do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DbError {
    /// It is away, overloaded or restarting, or the transaction lost a race: the same call may succeed later.
    #[error("database unavailable: {0}")]
    Unavailable(String),
    /// A defect of ours.
    #[error("database error: {0}")]
    Defect(String),
}
