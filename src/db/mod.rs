//! The pool, the one transaction function, statements with cached plans, group commit, migrations.
//!
//! Owns no table; every service gives it its own database's address. May import config and tls.

mod check;
mod crowd;
mod dial;
mod door;
mod error;
mod group;
mod line;
mod listen;
mod local;
mod migrations;
mod pace;
mod pipeline;
mod pool;
mod sessions;
mod snapshot;
mod sql;
pub mod types;
mod watch;

pub(crate) use check::offenders;
pub use check::{Check, Found, OFFENDERS_LISTED_MAX, Offender, Subject, begin_snapshot, end_snapshot, prefer_indexes};
pub use error::{DbError, is_unique_violation};
pub use group::{GroupCommit, Overloaded, each_for_itself};
pub use listen::{Listener, Notifier};
pub use migrations::{Schema, migrate, missing, pending};
pub use pace::Pace;
pub use pipeline::Pipeline;
pub use pool::{Conn, Db, Pooled, Retry, in_time};
pub use sessions::Listening;
pub use snapshot::Snapshot;
pub use sql::{Bind, Binds, Sql, sql};
