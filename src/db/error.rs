//! What a caller must know of a database error: may the same call succeed later, or is it a defect?

use diesel::result::{DatabaseErrorKind, Error};

use crate::faults::Injected;

/// Why the database did not do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DbError {
    /// It is away, overloaded or restarting, or the transaction lost a race: the same call may succeed later.
    #[error("database unavailable: {0}")]
    Unavailable(String),
    /// The caller lost its lease or its offset moved: somebody else owns the work now (S12).
    #[error("fenced: {0}")]
    Fenced(String),
    /// A unique index refused a row: somebody else was first.
    #[error("duplicate: {0}")]
    Duplicate(String),
    /// A defect of ours.
    #[error("database error: {0}")]
    Defect(String),
}

/// What the statements of a migration raise where a compare-and-set fails; see `migrations/shared`.
const FENCED: &str = "shopd_fenced";

impl DbError {
    /// The same call may succeed later without anybody's help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Fenced(_) | Self::Duplicate(_))
    }
}

impl From<Injected> for DbError {
    fn from(injected: Injected) -> Self {
        Self::Unavailable(injected.to_string())
    }
}

impl From<Error> for DbError {
    fn from(error: Error) -> Self {
        let text = describe(&error);
        match error {
            Error::DatabaseError(kind, info) => match kind {
                // Integrity errors say that we wrote what our own rules forbid.
                DatabaseErrorKind::ForeignKeyViolation
                | DatabaseErrorKind::NotNullViolation
                | DatabaseErrorKind::CheckViolation
                | DatabaseErrorKind::ExclusionViolation => Self::Defect(text),
                DatabaseErrorKind::UniqueViolation => Self::Duplicate(text),
                _ if info.message().starts_with(FENCED) => Self::Fenced(text),
                // Everything else the server says (shutting down, deadlock, timeout, too many connections, a schema that is
                // not migrated yet) passes with time or with an operator's help; none of it is the client's fault.
                _ => Self::Unavailable(text),
            },
            Error::BrokenTransactionManager | Error::RollbackErrorOnCommit { .. } => Self::Unavailable(text),
            _ => Self::Defect(text),
        }
    }
}

/// The error's text with its detail and constraint; diesel's own leaves them out.
fn describe(error: &Error) -> String {
    match error {
        Error::DatabaseError(_, info) => {
            let mut text = info.message().to_owned();
            for (name, part) in [("constraint", info.constraint_name()), ("detail", info.details())] {
                if let Some(part) = part {
                    text.push_str(&format!(" ({name}: {part})"));
                }
            }
            text
        }
        other => other.to_string(),
    }
}

/// A unique index refused a row.
pub fn is_unique_violation(error: &Error) -> bool {
    matches!(error, Error::DatabaseError(DatabaseErrorKind::UniqueViolation, _))
}
