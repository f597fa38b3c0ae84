//! Bringing a database to this version's schema. Each database takes the shared tables of messaging and its service's own.

use std::time::{Duration, Instant};

use diesel::migration::{Migration, MigrationSource};
use diesel::pg::Pg;
use diesel_async::{AsyncMigrationHarness, SimpleAsyncConnection};
use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};

use super::error::DbError;
use super::pool::{Conn, Db};

const SHARED: EmbeddedMigrations = embed_migrations!("migrations/shared");
const ORDERS: EmbeddedMigrations = embed_migrations!("migrations/orders");
const PAYMENTS: EmbeddedMigrations = embed_migrations!("migrations/payments");
const LOG: EmbeddedMigrations = embed_migrations!("migrations/log");

/// Any number; two migrating processes wait for each other on it.
const LOCK: i64 = 0x73686f7064;
/// How long one migration may take, and how long its locks are waited for, all tries together.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(3600);
/// How long a migration waits for a lock at a time. Whoever comes later waits behind it, so roles that are running stand still as long: behind
/// an audit, say, which reads for minutes.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
/// Between two tries, for those who waited.
const LOCK_PAUSE: Duration = Duration::from_secs(3);

/// Whose tables a database holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schema {
    Orders,
    Payments,
    /// The log in Postgres, in a schema of its own.
    Log,
}

impl Schema {
    fn sources(self) -> Vec<EmbeddedMigrations> {
        match self {
            Self::Orders => vec![SHARED, ORDERS],
            Self::Payments => vec![SHARED, PAYMENTS],
            Self::Log => vec![LOG],
        }
    }

    fn versions(self) -> Result<Vec<String>, DbError> {
        let mut versions = Vec::new();
        for source in self.sources() {
            let migrations: Vec<Box<dyn Migration<Pg>>> = source.migrations().map_err(defect)?;
            versions.extend(migrations.iter().map(|m| m.name().version().to_string()));
        }
        Ok(versions)
    }
}

/// Applies what is pending; idempotent, and safe to run from several processes at once.
///
/// # Errors
/// [`DbError::Unavailable`] where the server is away, [`DbError::Defect`] where a migration fails.
pub async fn migrate(db: &Db, schemas: &[Schema]) -> Result<usize, DbError> {
    let mut conn = db.dedicated().await?;
    let timeouts = format!(
        "set statement_timeout = {ms}; set lock_timeout = {ms}; select pg_advisory_lock({LOCK})",
        ms = STATEMENT_TIMEOUT.as_millis()
    );
    conn.batch_execute(&timeouts).await?;
    conn.batch_execute(&format!("set lock_timeout = {}", LOCK_TIMEOUT.as_millis())).await?;
    let mut harness = AsyncMigrationHarness::new(conn);
    let (mut applied, began, mut told) = (0, Instant::now(), false);
    for source in schemas.iter().flat_map(|schema| schema.sources()) {
        loop {
            match step(&mut harness, &source)? {
                Step::Done => break,
                Step::Applied => applied += 1,
                Step::Waits(error) if began.elapsed() > STATEMENT_TIMEOUT => return Err(defect(error)),
                Step::Waits(error) => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!(
                            error,
                            "somebody reads or writes a table for long that is to be altered; trying again and again"
                        );
                    }
                    tokio::time::sleep(LOCK_PAUSE).await;
                }
            }
        }
    }
    // The connection ends here, and the lock with it.
    Ok(applied)
}

/// One that is asked again and again.
struct Borrowed<'s>(&'s EmbeddedMigrations);

impl MigrationSource<Pg> for Borrowed<'_> {
    fn migrations(&self) -> diesel::migration::Result<Vec<Box<dyn Migration<Pg>>>> {
        self.0.migrations()
    }
}

enum Step {
    Applied,
    /// Nothing is pending.
    Done,
    /// Somebody has a lock that the next one needs. Nothing of it is there: a migration is one transaction.
    Waits(String),
}

/// The next pending migration, if there is one.
fn step(harness: &mut AsyncMigrationHarness<Conn>, source: &EmbeddedMigrations) -> Result<Step, DbError> {
    let pending = harness.pending_migrations(Borrowed(source)).map_err(defect)?;
    let Some(next) = pending.first() else { return Ok(Step::Done) };
    match harness.run_migration(&**next) {
        Ok(_) => Ok(Step::Applied),
        // A writer whose transaction goes on from one table that is locked here to another may close a circle.
        Err(error) if ["due to lock timeout", "deadlock detected"].iter().any(|passes| error.to_string().contains(passes)) => {
            Ok(Step::Waits(error.to_string()))
        }
        Err(error) => Err(defect(error)),
    }
}

/// How many migrations are missing.
pub async fn pending(db: &Db, schema: Schema) -> Result<usize, DbError> {
    use diesel::prelude::*;
    use diesel_async::RunQueryDsl;

    diesel::table! {
        __diesel_schema_migrations (version) {
            version -> Text,
        }
    }
    let wanted = schema.versions()?;
    let mut conn = db.get().await?;
    let found: i64 = __diesel_schema_migrations::table
        .filter(__diesel_schema_migrations::version.eq_any(&wanted))
        .count()
        .get_result(&mut conn)
        .await?;
    Ok(wanted.len() - found as usize)
}

fn defect(error: impl std::fmt::Display) -> DbError {
    DbError::Defect(format!("migration: {error}"))
}

/// For readiness: `database` where it does not answer within `timeout`, `schema` where it waits for `shopd migrate`.
pub async fn missing(db: &Db, schema: Schema, timeout: Duration) -> Vec<String> {
    if db.ping(timeout / 2).await.is_err() {
        return vec!["database".into()];
    }
    match tokio::time::timeout(timeout / 2, pending(db, schema)).await {
        Ok(Ok(0)) => Vec::new(),
        _ => vec!["schema".into()],
    }
}
