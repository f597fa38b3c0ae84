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
        let url = config.orders.database_url.as_ref().ok_or(RoleError::NotConfigured("orders.database_url"))?;
        let orders = Db::new(url, "migrate", &config.database)?;
        let payments = super::database(config.payments.database_url.as_ref(), "payments.database_url", "migrate", &config)?;
        schemas(&payments, &[Schema::Payments], "payments").await?;
        let beside: &[Schema] = match config.kafka.bootstrap_servers.is_empty() {
            // `all` keeps its log beside the orders then.
            true => &[Schema::Orders, Schema::Log],
            false => &[Schema::Orders],
        };
        schemas(&orders, beside, "orders").await?;
        return topics(&super::log(&config, url, "migrate")?, config.kafka.partitions).await;
    }
    // What `all` keeps in its data directory, whether `all` runs or not.
    let attached = embedded::attach(&all::options(&config)).await?;
    let migrated = embedded_parts(&config, &attached).await;
    attached.detach(config.shutdown.timeout).await?;
    migrated
}

async fn embedded_parts(config: &Config, attached: &Attached) -> Result<(), RoleError> {
    for (name, schema) in all::DATABASES {
        attached.ensure_database(name).await?;
        let db = Db::new(&attached.url(name), "migrate", &config.database)?;
        schemas(&db, &[schema], name).await?;
    }
    topics(&super::log(config, &attached.url(all::LOG), "migrate")?, config.kafka.partitions).await
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

/// Credentials, names and certificates that are wrong stay wrong. By the server's code where it lets nobody in, because the text beside it may
/// be in its own language; by the text in a session, which speaks English, and where it is our side that refuses.
fn hopeless(cause: &str) -> bool {
    [
        // `invalid_authorization_specification` and `invalid_password`, `invalid_catalog_name`, `insufficient_privilege`.
        "(SQLSTATE 28",
        "(SQLSTATE 3D000)",
        "(SQLSTATE 42501)",
        // Poolers have the text, and a code of their own.
        "authentication failed",
        "does not exist",
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_credentials_are_hopeless_in_any_language_and_a_server_that_starts_is_not() {
        for cause in [
            "db error: FATAL: Passwort-Authentifizierung für Benutzer »shop« fehlgeschlagen (SQLSTATE 28P01)",
            "db error: FATAL: kein pg_hba.conf-Eintrag für Host »::1« (SQLSTATE 28000)",
            "db error: FATAL: Datenbank »orders« existiert nicht (SQLSTATE 3D000)",
            "db error: FATAL: keine Berechtigung für Datenbank »orders« (SQLSTATE 42501)",
            "error connecting to server: refused; db error: FATAL: x (SQLSTATE 28P01)",
            "invalid configuration: password missing",
        ] {
            assert!(hopeless(cause), "{cause}");
        }
        for cause in [
            "db error: FATAL: das Datenbanksystem startet (SQLSTATE 57P03)",
            "db error: FATAL: sorry, too many clients already (SQLSTATE 53300)",
            "error connecting to server: Connection refused (os error 111)",
        ] {
            assert!(!hopeless(cause), "{cause}");
        }
    }
}
