//! Bringing both databases to this version's schema, and creating the topics. Idempotent; safe beside running roles.

use std::time::{Duration, Instant};

use crate::config::Config;
use crate::contracts::TOPICS;
use crate::db::{self, Db, DbError, Schema};
use crate::embedded::{self, Attached};
use crate::messaging::log::{LogError, SharedLog};
use crate::shutdown::Shutdown;
use crate::tls;

use super::RoleError;
use super::all;

/// How long a server that is not up yet is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_millis(500);

pub async fn run(config: Config, stop: Shutdown) -> Result<(), RoleError> {
    tokio::select! {
        migrated = migrate(config) => migrated,
        () = stop.stopped() => Err(RoleError::Interrupted),
    }
}

async fn migrate(config: Config) -> Result<(), RoleError> {
    if !config.data_dir_given {
        let orders = super::database(config.orders.database_url.as_ref(), "orders.database_url", "migrate", &config)?;
        let payments = super::database(config.payments.database_url.as_ref(), "payments.database_url", "migrate", &config)?;
        schemas(&payments, &[Schema::Payments], "payments").await?;
        if config.kafka.bootstrap_servers.is_empty() {
            // `all` keeps its log beside the orders then.
            return schemas(&orders, &[Schema::Orders, Schema::Log], "orders").await;
        }
        schemas(&orders, &[Schema::Orders], "orders").await?;
        return topics(&super::kafka(&config)?, config.kafka.partitions).await;
    }
    // What `all` keeps in its data directory, whether `all` runs or not.
    let attached = embedded::attach(&all::options(&config)).await?;
    let migrated = embedded_schemas(&config, &attached).await;
    attached.detach(config.shutdown.timeout).await?;
    migrated
}

async fn embedded_schemas(config: &Config, attached: &Attached) -> Result<(), RoleError> {
    for (name, schema) in all::DATABASES {
        attached.ensure_database(name).await?;
        let db = Db::new(&attached.url(name), "migrate", &config.database)?;
        schemas(&db, &[schema], name).await?;
    }
    Ok(())
}

/// Waits for a server that refuses or is starting; fails at once on what waiting does not mend.
async fn schemas(db: &Db, schemas: &[Schema], name: &str) -> Result<(), RoleError> {
    let since = Instant::now();
    let mut said = false;
    loop {
        match db::migrate(db, schemas).await {
            Ok(applied) => {
                tracing::info!(database = name, applied, "the schema is up to date");
                return Ok(());
            }
            Err(DbError::Unavailable(cause)) if since.elapsed() < PATIENCE && !hopeless(&cause) => {
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!(database = name, cause, "waiting for the database");
                }
                tokio::time::sleep(RETRY).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Credentials, names and certificates that are wrong stay wrong.
fn hopeless(cause: &str) -> bool {
    [
        "authentication failed",
        "does not exist",
        "no pg_hba.conf entry",
        "pg_hba.conf rejects",
        "is not permitted to log in",
        "permission denied",
        "password missing",
        "invalid configuration",
        "server does not support TLS",
        tls::REFUSED,
    ]
    .iter()
    .any(|known| cause.contains(known))
}

async fn topics(log: &SharedLog, partitions: i32) -> Result<(), RoleError> {
    let since = Instant::now();
    let mut said = false;
    loop {
        match log.create_topics(&TOPICS, partitions).await {
            Ok(()) => {
                tracing::info!(topics = TOPICS.join(", "), "the topics are there");
                return Ok(());
            }
            Err(LogError::Unavailable(cause)) if since.elapsed() < PATIENCE => {
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!(cause, "waiting for the broker");
                }
                tokio::time::sleep(RETRY).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}
