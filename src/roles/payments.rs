//! The payments role: its port, and the consumer of orders' requests.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use crate::config::Config;
use crate::contracts::ORDER_PAYMENT_REQUESTS;
use crate::db::{Db, Notifier};
use crate::http::idempotency::keep_pruned;
use crate::http::{self, Bound, Port, Readiness, ServeError};
use crate::messaging::log::SharedLog;
use crate::messaging::{Consumer, PgInbox, outbox};
use crate::payments::{self, OnOrder, Payments};
use crate::shutdown::Shutdown;

use super::{DRAIN_ALONE, RoleError};

pub async fn run(config: Config, stop: Shutdown) -> Result<(), RoleError> {
    let port = open(&config)?;
    let db = super::database(config.payments.database_url.as_ref(), "payments.database_url", "payments", &config)?;
    let batches = super::batches(config.payments.database_url.as_ref(), "payments.database_url", "payments", &config)?;
    let log = super::kafka(&config)?;
    let notifier = Notifier::start(db.clone(), &[(outbox::CHANNEL, Arc::new(Notify::new()))], stop.clone());
    let keys = keep_pruned(db.clone(), config.http.idempotency_retention, stop.clone());
    let depth = outbox::watch_depth(db.clone(), "payments", stop.clone());
    let payments = Payments::new(db);
    let known = payments.known();
    let (bound, readiness) = bind(port, &config, payments, log.clone(), super::share(&config, DRAIN_ALONE))?;
    tokio::spawn(super::announce("payments", readiness, stop.clone()));
    let consumer = consumer(&config, batches, log, super::owner("payments"), OnOrder::new(notifier, known));
    let consumed = consumer.run(stop.clone());
    let worker = async move {
        tokio::join!(consumed, keys, depth);
    };
    super::together(bound.run(stop.clone()), worker, &stop).await
}

pub(super) fn open(config: &Config) -> Result<Port, ServeError> {
    Port::open("payments", config.payments.listen)
}

/// Ready with its database; a broker that does not answer is named.
pub(super) fn bind(
    port: Port,
    config: &Config,
    payments: Payments,
    log: SharedLog,
    drain: Duration,
) -> Result<(Bound, Readiness), ServeError> {
    let asked = payments.clone();
    let readiness = Readiness::new(move || {
        let (payments, log) = (asked.clone(), log.clone());
        async move { super::ready_without_a_broker(payments.missing(), &log).await }
    });
    let routes = payments::routes(payments);
    let bound = http::bind(port, &config.http, drain, routes, readiness.clone())?;
    Ok((bound, readiness))
}

pub(super) fn consumer(
    config: &Config,
    batches: Db,
    log: SharedLog,
    owner: String,
    handler: OnOrder,
) -> Consumer<PgInbox<OnOrder>> {
    Consumer::new(batches, log, ORDER_PAYMENT_REQUESTS, owner, config.consumer.clone(), handler)
}
