//! The orders role: its port, and the consumer of payments' results.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use crate::config::Config;
use crate::contracts::PAYMENT_STATUS_UPDATES;
use crate::db::{Db, Notifier};
use crate::http::{self, Bound, Readiness, ServeError};
use crate::messaging::log::SharedLog;
use crate::messaging::{Consumer, PgInbox, outbox};
use crate::orders::{self, OnPayment, Orders};
use crate::shutdown::Shutdown;

use super::{DRAIN_ALONE, RoleError};

pub async fn run(config: Config, stop: Shutdown) -> Result<(), RoleError> {
    let db = super::database(config.orders.database_url.as_ref(), "orders.database_url", "orders", &config)?;
    let batches = super::batches(config.orders.database_url.as_ref(), "orders.database_url", "orders", &config)?;
    let log = super::kafka(&config)?;
    let notifier = Notifier::start(db.clone(), outbox::CHANNEL, Arc::new(Notify::new()), stop.clone());
    let orders = Orders::new(db, notifier);
    let (bound, readiness) = bind(&config, orders, super::share(&config, DRAIN_ALONE))?;
    tokio::spawn(super::announce("orders", readiness, stop.clone()));
    let consumer = consumer(&config, batches, log, super::owner("orders"));
    super::together(bound.run(stop.clone()), consumer.run(stop.clone()), &stop).await
}

pub(super) fn bind(config: &Config, orders: Orders, drain: Duration) -> Result<(Bound, Readiness), ServeError> {
    let asked = orders.clone();
    let readiness = Readiness::new(move || {
        let orders = asked.clone();
        async move { orders.missing().await }
    });
    let routes = orders::routes(orders);
    let bound = http::bind("orders", config.orders.listen, &config.http, drain, routes, readiness.clone())?;
    Ok((bound, readiness))
}

pub(super) fn consumer(config: &Config, batches: Db, log: SharedLog, owner: String) -> Consumer<PgInbox<OnPayment>> {
    Consumer::new(batches, log, PAYMENT_STATUS_UPDATES, owner, config.consumer.clone(), OnPayment)
}
