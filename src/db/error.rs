//! What a caller must know of a database error: may the same call succeed later, or is it a defect?

use std::sync::atomic::{AtomicBool, Ordering};

use diesel::result::{DatabaseErrorKind, Error};

use crate::faults::Injected;
use crate::tls;

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
                DatabaseErrorKind::RestrictViolation => Self::Defect(text),
                // The driver's own kinds for races and connections, and a statement that does not fit the schema: it is not migrated
                // yet.
                DatabaseErrorKind::Unknown if info.statement_position().is_none() && !passes_with_time(info.message()) => {
                    Self::Defect(text)
                }
                _ => Self::Unavailable(text),
            },
            Error::BrokenTransactionManager | Error::RollbackErrorOnCommit { .. } => Self::Unavailable(text),
            _ => Self::Defect(text),
        }
    }
}

/// Of a session that is spoken to directly: it has the code, but who uses one begins anew after any error.
impl From<tokio_postgres::Error> for DbError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Unavailable(text(&error))
    }
}

/// Of an error that makes or ends a connection; with the server's code, because its text may be in any language.
pub(super) fn text(error: &tokio_postgres::Error) -> String {
    use std::error::Error as _;
    let said = match (tls::refusal(error), error.source()) {
        (Some(refusal), _) => refusal,
        (None, Some(cause)) => format!("{error}: {cause}"),
        (None, None) => error.to_string(),
    };
    match error.code() {
        Some(code) => format!("{said} (SQLSTATE {})", code.code()),
        None => said,
    }
}

/// A server's messages are in a language that cannot be read here, and nothing may be held against a record for them.
static FOREIGN: AtomicBool = AtomicBool::new(false);

/// From here on no error that only its text explains is a defect; true the first time.
pub(super) fn messages_are_foreign() -> bool {
    !FOREIGN.swap(true, Ordering::Relaxed)
}

/// Whether a server with this `lc_messages` writes the texts that are told apart here.
pub(super) fn is_readable(lc_messages: &str) -> bool {
    let language = lc_messages.split(['_', '.', '@']).next().unwrap_or_default();
    ["C", "POSIX", "en", "English"].iter().any(|known| language.eq_ignore_ascii_case(known))
}

/// What the server says of itself and not of our data (shutting down, deadlock, timeout, too many connections, a full disk), and
/// what an operator mends. The driver hides the error's code, so it is told by the text. What is not in this list, a value out of range
/// or whatever a trigger raises, would be refused again.
fn passes_with_time(message: &str) -> bool {
    const BEGINNINGS: [&str; 17] = [
        "canceling ",
        "terminating ",
        "could not ",
        "cannot ",
        "the database system is ",
        "sorry, too many clients",
        "remaining connection slots",
        "too many connections",
        "out of ",
        "permission denied",
        "current transaction is aborted",
        "cached plan must not change",
        // Transaction ids are used up, a page is damaged, a migration changed what a plan was made for.
        "database is not accepting commands",
        "invalid page in block",
        "snapshot too old",
        "cache lookup failed",
        "tuple concurrently ",
    ];
    const PARTS: [&str; 5] = ["deadlock detected", "does not exist", "does not match", "No space left", "temporary file"];
    // `bigint out of range` is not one of them.
    FOREIGN.load(Ordering::Relaxed)
        || BEGINNINGS.iter().any(|known| message.starts_with(known))
        || PARTS.iter().any(|known| message.contains(known))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn raised(kind: DatabaseErrorKind, message: &str) -> DbError {
        Error::DatabaseError(kind, Box::new(message.to_owned())).into()
    }

    #[test]
    fn what_passes_with_time_is_never_a_defect() {
        for message in [
            "deadlock detected",
            "canceling statement due to statement timeout",
            "canceling statement due to lock timeout",
            "terminating connection due to administrator command",
            "could not extend file \"base/1/2\": No space left on device",
            "the database system is shutting down",
            "out of memory",
            "out of shared memory",
            "relation \"payment\" does not exist",
            "current transaction is aborted, commands ignored until end of transaction block",
            "database is not accepting commands to avoid wraparound data loss in database \"payments\"",
            "database is not accepting commands that assign new transaction IDs to avoid wraparound data loss in database \"payments\"",
            "invalid page in block 7 of relation base/1/2",
            "cache lookup failed for relation 4711",
            "tuple concurrently updated",
            "type of parameter 14 (text) does not match that when preparing the plan (integer)",
        ] {
            assert!(matches!(raised(DatabaseErrorKind::Unknown, message), DbError::Unavailable(_)), "{message}");
        }
        for kind in
            [DatabaseErrorKind::SerializationFailure, DatabaseErrorKind::ClosedConnection, DatabaseErrorKind::UnableToSendCommand]
        {
            assert!(matches!(raised(kind, "x"), DbError::Unavailable(_)));
        }
    }

    #[test]
    fn a_servers_language_is_known_by_its_setting() {
        for readable in ["C", "C.UTF-8", "POSIX", "en_US.UTF-8", "en", "en_GB@euro", "English_United States.1252"] {
            assert!(is_readable(readable), "{readable}");
        }
        for foreign in ["de_DE.UTF-8", "ru_RU", "", "es_ES.UTF-8@x", "eng"] {
            assert!(!is_readable(foreign), "{foreign}");
        }
    }

    #[test]
    fn what_the_database_refuses_again_and_again_is_a_defect() {
        for message in ["bigint out of range", "payment is immutable", "invalid byte sequence for encoding \"UTF8\": 0x00"] {
            assert!(matches!(raised(DatabaseErrorKind::Unknown, message), DbError::Defect(_)), "{message}");
        }
        assert!(matches!(raised(DatabaseErrorKind::CheckViolation, "x"), DbError::Defect(_)));
        assert!(matches!(raised(DatabaseErrorKind::Unknown, "shopd_fenced: 0 of 1"), DbError::Fenced(_)));
    }
}
