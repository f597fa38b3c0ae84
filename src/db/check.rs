//! Checks: statements that find the rows that break an invariant, and the snapshots in which an audit reads.
//!
//! The modules that own the tables write the statements; this only runs them.

use diesel::QueryableByName;
use diesel::sql_types::{BigInt, Nullable, Text};
use diesel_async::{RunQueryDsl, SimpleAsyncConnection};

use super::error::DbError;
use super::pool::Conn;
use super::sql::sql;

/// Offenders of one check that are listed; all are counted.
pub const OFFENDERS_LISTED_MAX: usize = 10_000;

/// What the offenders of a check are named by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    Order,
    User,
}

/// An invariant by name, with what finds the rows that break it.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// Stable, snake_case; what it says is wrong.
    pub name: &'static str,
    /// Which promise it belongs to: S1..S14, L1.
    pub promise: &'static str,
    pub subject: Subject,
    /// Written with `offenders!`.
    pub statement: &'static str,
}

/// The statement of a [`Check`] around a query with the columns `offender` and `detail`, both text.
macro_rules! offenders {
    ($query:expr) => {
        // The limit is `OFFENDERS_LISTED_MAX`; the total counts all.
        concat!("select offender, detail, count(*) over () as total from (", $query, ") found order by offender limit 10000")
    };
}
pub(crate) use offenders;

#[derive(Clone, Debug, PartialEq, Eq, QueryableByName)]
pub struct Offender {
    /// An order's or a user's id.
    #[diesel(sql_type = Text)]
    pub offender: String,
    /// What is wrong with it.
    #[diesel(sql_type = Nullable<Text>)]
    pub detail: Option<String>,
    #[diesel(sql_type = BigInt)]
    total: i64,
}

/// What a check found: the first offenders, and how many there are.
#[derive(Clone, Debug)]
pub struct Found {
    pub offenders: Vec<Offender>,
    pub total: u64,
}

impl Check {
    pub async fn run(&self, conn: &mut Conn) -> Result<Found, DbError> {
        let offenders: Vec<Offender> = sql(self.statement).load(conn).await?;
        let total = offenders.iter().map(|one| one.total).max().unwrap_or(0).unsigned_abs();
        Ok(Found { offenders, total })
    }
}

/// From here on this connection finds rows by an index wherever there is one, also in a table that was empty when it was last analysed.
pub async fn prefer_indexes(conn: &mut Conn) -> Result<(), DbError> {
    Ok(conn.batch_execute("set enable_seqscan = off").await?)
}

/// Begins a transaction that sees one state of the database, this one, until [`end_snapshot`]. Only on a connection outside the
/// pool: dropping it ends the transaction too.
pub async fn begin_snapshot(conn: &mut Conn) -> Result<(), DbError> {
    // The snapshot is taken by the first statement, not by BEGIN.
    Ok(conn.batch_execute("begin isolation level repeatable read read only; select pg_current_snapshot()").await?)
}

pub async fn end_snapshot(conn: &mut Conn) -> Result<(), DbError> {
    Ok(conn.batch_execute("commit").await?)
}
