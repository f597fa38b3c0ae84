//! Where `all` keeps everything: servers that are configured, or one of its own.

use std::sync::Arc;

use crate::config::{Config, Secret};
use crate::db::{Db, Schema};
use crate::embedded::{self, Options, Server};
use crate::messaging::log::{PostgresLog, SharedLog};

use super::super::{RoleError, kafka, owner};

/// The databases of a server of our own.
pub const DATABASES: [(&str, Schema); 3] = [(ORDERS, Schema::Orders), (PAYMENTS, Schema::Payments), (LOG, Schema::Log)];
pub const ORDERS: &str = "shopd_orders";
pub const PAYMENTS: &str = "shopd_payments";
pub const LOG: &str = "shopd_log";

pub struct Stores {
    pub orders: Store,
    pub payments: Store,
    pub log: SharedLog,
    /// What must be migrated, and where.
    pub schemas: Vec<(Db, Schema)>,
    /// The server that this process brought along.
    pub server: Option<Server>,
    /// Names this process for leases.
    pub owner: String,
}

/// One service's database.
pub struct Store {
    pub db: Db,
    pub batches: Db,
}

impl Store {
    fn open(url: &Secret, role: &str, config: &Config) -> Result<Self, RoleError> {
        Ok(Self { db: Db::new(url, role, &config.database)?, batches: Db::for_batches(url, role, &config.database)? })
    }
}

/// What the embedded server is started with.
pub fn options(config: &Config) -> Options {
    Options::new(&config.data_dir)
}

/// Another process keeps the data directory that a server of our own would have.
pub fn in_use(config: &Config) -> Option<RoleError> {
    let brings_its_own = config.orders.database_url.is_none() || config.payments.database_url.is_none();
    brings_its_own.then(|| embedded::in_use(&options(config))).flatten().map(RoleError::from)
}

impl Stores {
    /// # Errors
    /// Where the server of our own does not start; a configured one may be away.
    pub async fn open(config: &Config) -> Result<Self, RoleError> {
        match (&config.orders.database_url, &config.payments.database_url) {
            // The log then lies in a schema of its own in the orders database.
            (Some(orders), Some(payments)) => Self::on(config, orders, payments, orders, owner("all")),
            _ => {
                let server = embedded::start(&options(config)).await?;
                server.ensure_databases(&DATABASES.map(|(name, _)| name)).await?;
                let url = |name| server.url(name);
                // The data directory's lock makes this process the only one: what its predecessor left leased is its own at once.
                let stores = Self::on(config, &url(ORDERS), &url(PAYMENTS), &url(LOG), "all".into())?;
                Ok(Self { server: Some(server), ..stores })
            }
        }
    }

    fn on(config: &Config, orders: &Secret, payments: &Secret, log: &Secret, owner: String) -> Result<Self, RoleError> {
        let (orders, payments) = (Store::open(orders, "orders", config)?, Store::open(payments, "payments", config)?);
        let mut schemas = vec![(orders.db.clone(), Schema::Orders), (payments.db.clone(), Schema::Payments)];
        let log: SharedLog = if config.kafka.bootstrap_servers.is_empty() {
            let db = Db::new(log, "log", &config.database)?;
            schemas.push((db.clone(), Schema::Log));
            Arc::new(PostgresLog::new(db, &config.log, config.kafka.fetch_wait))
        } else {
            kafka(config)?
        };
        Ok(Self { orders, payments, log, schemas, server: None, owner })
    }
}
