//! Composition only: what each role is made of. May import every façade and no module's children.

pub mod all;
pub mod audit;
pub mod dlq;
pub mod gateway;
pub mod migrate;
pub mod openapi;
pub mod orders;
pub mod payments;
pub mod relay;

use std::time::Duration;

use crate::audit::AuditError;
use crate::config::{Config, Role, Secret};
use crate::db::{Db, DbError};
use crate::embedded::EmbeddedError;
use crate::gateway::{Gateway, GatewayError};
use crate::http::{Health, Readiness, ServeError};
use crate::messaging::log::{KafkaLog, LogError, PostgresLog, SharedLog};
use crate::shutdown::Shutdown;

/// Why a role ended otherwise than by a clean stop.
#[derive(Debug, thiserror::Error)]
pub enum RoleError {
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error(transparent)]
    Db(#[from] DbError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
    #[error(transparent)]
    Gateway(#[from] GatewayError),
    #[error("could not check: {0}")]
    Audit(AuditError),
    #[error("there is no shop in {}", .0.display())]
    NothingThere(std::path::PathBuf),
    #[error("{0} is not configured")]
    NotConfigured(&'static str),
    #[error("stopped before it was done; run it again")]
    Interrupted,
    #[error("standard output: {0}")]
    Output(std::io::Error),
    #[error("a task of ours ended badly: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// What of its settings only a role can judge, before anything is opened.
///
/// # Errors
/// The mistake, which begins with the setting's key.
pub fn check(role: Role, config: &Config) -> Result<(), GatewayError> {
    match role {
        Role::Gateway | Role::All => Gateway::check(&config.gateway),
        Role::Orders | Role::Payments | Role::Relay | Role::Migrate | Role::Audit | Role::Dlq => Ok(()),
    }
}

/// Percent of the time to end that a role alone gives its requests: nothing comes after them.
const DRAIN_ALONE: u32 = 90;

/// What of `shutdown.timeout_ms` a stage of the end may take: requests in flight, then what is behind them, then the rest. The
/// process is ended by force when all of it is over.
fn share(config: &Config, percent: u32) -> Duration {
    config.shutdown.timeout * percent / 100
}

/// Names this process among its role's replicas, for leases.
fn owner(role: &str) -> String {
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    format!("{role}@{host}:{}:{:08x}", std::process::id(), rand::random::<u32>())
}

fn database(url: Option<&Secret>, key: &'static str, role: &str, config: &Config) -> Result<Db, RoleError> {
    Ok(Db::new(url.ok_or(RoleError::NotConfigured(key))?, role, &config.database)?)
}

/// The same database, for a consumer's batches.
fn batches(url: Option<&Secret>, key: &'static str, role: &str, config: &Config) -> Result<Db, RoleError> {
    Ok(Db::for_batches(url.ok_or(RoleError::NotConfigured(key))?, role, &config.database)?)
}

fn kafka(config: &Config) -> Result<SharedLog, RoleError> {
    if config.kafka.bootstrap_servers.is_empty() {
        return Err(RoleError::NotConfigured("kafka.bootstrap_servers"));
    }
    Ok(std::sync::Arc::new(KafkaLog::new(&config.kafka)))
}

/// Kafka; or, where none is configured, the log that `all` keeps in the database at `url`.
fn log(config: &Config, url: &Secret, role: &str) -> Result<SharedLog, RoleError> {
    if !config.kafka.bootstrap_servers.is_empty() {
        return kafka(config);
    }
    let db = Db::new(url, role, &config.database)?;
    Ok(std::sync::Arc::new(PostgresLog::new(db, &config.log, config.kafka.fetch_wait)))
}

/// A broker that is away hinders no service: what it accepts waits in its outbox. But it is named. Asked for shortly, because a probe's patience
/// is mostly a second.
async fn ready_without_a_broker(missing: impl Future<Output = Vec<String>>, log: &SharedLog) -> Health {
    const BROKER_WAIT: Duration = Duration::from_millis(500);
    let (mut missing, broker) = tokio::join!(missing, tokio::time::timeout(BROKER_WAIT, log.ping()));
    let ready = missing.is_empty();
    if !matches!(broker, Ok(Ok(()))) {
        missing.push("broker".into());
    }
    Health { ready, missing }
}

/// Says what a role waits for, once each time that changes, and when it is ready.
async fn announce(role: &'static str, readiness: Readiness, stop: Shutdown) {
    const PROBE: Duration = Duration::from_millis(250);
    let mut said: Option<Vec<String>> = None;
    while !stop.is_stopping() {
        let health = readiness.health().await;
        if health.ready {
            tracing::info!(role, "ready");
            return;
        }
        if said.as_ref() != Some(&health.missing) {
            tracing::info!(role, missing = health.missing.join(", "), "waiting");
            said = Some(health.missing);
        }
        tokio::select! {
            () = tokio::time::sleep(PROBE) => {}
            () = stop.stopped() => {}
        }
    }
}

/// Runs a role's tasks until `stop`; one that fails stops the others.
async fn together<A, B>(server: A, worker: B, stop: &Shutdown) -> Result<(), RoleError>
where
    A: Future<Output = Result<(), ServeError>> + Send + 'static,
    B: Future<Output = ()> + Send + 'static,
{
    let mut worker = tokio::spawn(worker);
    let mut server = std::pin::pin!(server);
    tokio::select! {
        served = &mut server => {
            stop.stop();
            worker.await?;
            Ok(served?)
        }
        // It ends only when asked to, or badly. A role that serves on without it would look healthy and do half its work.
        ended = &mut worker => {
            stop.stop();
            let served = server.await;
            ended?;
            Ok(served?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_worker_that_ends_badly_ends_its_role() {
        let stop = Shutdown::new();
        let server = {
            let stop = stop.clone();
            async move {
                stop.stopped().await;
                Ok(())
            }
        };
        let ended = together(server, async { panic!("on purpose") }, &stop).await;
        assert!(matches!(ended, Err(RoleError::Task(_))), "{ended:?}");
    }
}
