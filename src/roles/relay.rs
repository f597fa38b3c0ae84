//! The relay role: both outboxes onto the log, and a port for health and metrics.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use crate::config::{Config, HttpConfig};
use crate::db::{self, Db, Schema};
use crate::http::{self, Bound, Port, Readiness, Routes, ServeError};
use crate::messaging::Reach;
use crate::messaging::log::SharedLog;
use crate::relay::Relay;
use crate::shutdown::Shutdown;

use super::{DRAIN_ALONE, RoleError};

pub async fn run(config: Config, stop: Shutdown) -> Result<(), RoleError> {
    let port = open(&config)?;
    let orders = super::database(config.orders.database_url.as_ref(), "orders.database_url", "relay", &config)?;
    let payments = super::database(config.payments.database_url.as_ref(), "payments.database_url", "relay", &config)?;
    let log = super::kafka(&config)?;
    let (bound, readiness) =
        bind(port, &config, orders.clone(), payments.clone(), log.clone(), super::share(&config, DRAIN_ALONE))?;
    tokio::spawn(super::announce("relay", readiness, stop.clone()));
    let owner = super::owner("relay");
    let reach = Arc::new(Reach::default());
    let relay = |db: Db, name| relay(&config, db, log.clone(), reach.clone(), name, owner.clone(), Arc::new(Notify::new()));
    let (orders, payments) = (relay(orders, "orders"), relay(payments, "payments"));
    let both = {
        let stop = stop.clone();
        async move {
            tokio::join!(orders.run(stop.clone()), payments.run(stop));
        }
    };
    super::together(bound.run(stop.clone()), both, &stop).await
}

pub(super) fn relay(
    config: &Config,
    db: Db,
    log: SharedLog,
    reach: Arc<Reach>,
    name: &'static str,
    owner: String,
    wake: Arc<Notify>,
) -> Relay {
    Relay { db, log, reach, name, owner, config: config.relay.clone(), partitions: config.kafka.partitions, wake }
}

pub(super) fn open(config: &Config) -> Result<Port, ServeError> {
    Port::open("relay", config.relay.listen)
}

/// Ready with both databases and the broker.
pub(super) fn bind(
    port: Port,
    config: &Config,
    orders: Db,
    payments: Db,
    log: SharedLog,
    drain: Duration,
) -> Result<(Bound, Readiness), ServeError> {
    let readiness = Readiness::new(move || {
        let (orders, payments, log) = (orders.clone(), payments.clone(), log.clone());
        async move {
            let bound = Duration::from_secs(2);
            let (orders, payments, log) = tokio::join!(
                db::missing(&orders, Schema::Orders, bound),
                db::missing(&payments, Schema::Payments, bound),
                tokio::time::timeout(bound, log.ping()),
            );
            let mut missing: Vec<String> = orders.into_iter().map(|what| format!("orders {what}")).collect();
            missing.extend(payments.into_iter().map(|what| format!("payments {what}")));
            if !matches!(log, Ok(Ok(()))) {
                missing.push("broker".into());
            }
            missing
        }
    });
    // Nobody but a probe and Prometheus asks; a worker more would wake up for nothing.
    let http = HttpConfig { workers: 1, ..config.http.clone() };
    let bound = http::bind(port, &http, drain, Routes::new(), readiness.clone())?;
    Ok((bound, readiness))
}
