//! The orders role: its port, the consumer of payments' results, and the sweeper.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use crate::config::Config;
use crate::contracts::PAYMENT_STATUS_UPDATES;
use crate::db::{Db, Notifier};
use crate::http::idempotency::keep_pruned;
use crate::http::{self, Bound, Port, Readiness, ServeError};
use crate::messaging::log::SharedLog;
use crate::messaging::{Consumer, PgInbox, outbox};
use crate::orders::{self, Ends, Live, OnPayment, Orders, SweepRules, Sweeper};
use crate::shutdown::Shutdown;

use super::{DRAIN_ALONE, RoleError};

pub async fn run(config: Config, stop: Shutdown) -> Result<(), RoleError> {
    let port = open(&config)?;
    let db = super::database(config.orders.database_url.as_ref(), "orders.database_url", "orders", &config)?;
    let batches = super::batches(config.orders.database_url.as_ref(), "orders.database_url", "orders", &config)?;
    let log = super::kafka(&config)?;
    let (relay_wake, live_wake) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let channels = [(outbox::CHANNEL, relay_wake), (orders::CHANNEL, live_wake.clone())];
    let notifier = Notifier::start(db.clone(), &channels, stop.clone());
    let ended = Notifier::start(db.clone(), &[channels[1].clone(), (orders::ENDED_CHANNEL, Arc::default())], stop.clone());
    let live = Live::new(db.clone(), live_wake, true, stop.clone());
    let ends = Ends::new(db.clone(), true, stop.clone());
    let sweeper = sweeper(&config, db.clone(), notifier.clone());
    let keys = keep_pruned(db.clone(), config.http.idempotency_retention, stop.clone());
    let depth = outbox::watch_depth(db.clone(), "orders", stop.clone());
    let orders = Orders::with_live(db, notifier, live, ends.clone());
    let (bound, readiness) = bind(port, &config, orders, log.clone(), super::share(&config, DRAIN_ALONE))?;
    tokio::spawn(super::announce("orders", readiness, stop.clone()));
    let consumer = consumer(&config, batches, log, super::owner("orders"), ended, ends);
    let (consumed, swept) = (consumer.run(stop.clone()), orders::run_sweeper(sweeper, stop.clone()));
    let worker = async move {
        tokio::join!(consumed, swept, keys, depth);
    };
    super::together(bound.run(stop.clone()), worker, &stop).await
}

pub(super) fn open(config: &Config) -> Result<Port, ServeError> {
    Port::open("orders", config.orders.listen)
}

/// Ready with its database; a broker that does not answer is named.
pub(super) fn bind(
    port: Port,
    config: &Config,
    orders: Orders,
    log: SharedLog,
    drain: Duration,
) -> Result<(Bound, Readiness), ServeError> {
    let asked = orders.clone();
    let readiness = Readiness::new(move || {
        let (orders, log) = (asked.clone(), log.clone());
        async move { super::ready_without_a_broker(orders.missing(), &log).await }
    });
    let routes = orders::routes(orders);
    let bound = http::bind(port, &config.http, drain, routes, readiness.clone())?;
    Ok((bound, readiness))
}

/// `ended` and `ends` are told when orders have ended.
pub(super) fn consumer(
    config: &Config,
    batches: Db,
    log: SharedLog,
    owner: String,
    ended: Notifier,
    ends: Ends,
) -> Consumer<PgInbox<OnPayment>> {
    Consumer::new(batches, log, PAYMENT_STATUS_UPDATES, owner, config.consumer.clone(), OnPayment::new(ended, ends))
}

pub(super) fn sweeper(config: &Config, db: Db, notifier: Notifier) -> Sweeper {
    let rules = SweepRules { after: config.sweep.after, asks_per_second_max: config.sweep.asks_per_second_max };
    Sweeper::new(db, notifier, rules)
}
