//! Every role in one process. What is not configured it brings along: a Postgres server of its own, and the log in it.
//!
//! Stopping goes from the outside in, so that what is in flight finds everything behind it still there: gateway, services and
//! relay, database server.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::config::{Config, GatewayConfig};
use crate::contracts::TOPICS;
use crate::db::{self, Db, Notifier, Schema};
use crate::embedded::{self, Options, Server};
use crate::http::{Bound, Readiness, ServeError};
use crate::messaging::log::{PostgresLog, SharedLog};
use crate::messaging::outbox;
use crate::orders::Orders;
use crate::payments::Payments;
use crate::shutdown::Shutdown;
use crate::telemetry::Incident;

use super::{RoleError, gateway, orders, payments, relay};

/// The databases of the embedded server.
pub(super) const DATABASES: [(&str, Schema); 3] =
    [("shopd_orders", Schema::Orders), ("shopd_payments", Schema::Payments), ("shopd_log", Schema::Log)];

/// How often what is away is tried again while starting.
const RETRY: Duration = Duration::from_millis(500);
/// How often the embedded log drops what is older than its retention.
const PRUNE_INTERVAL: Duration = Duration::from_secs(60);

/// Where everything is kept.
struct Stores {
    orders: Db,
    payments: Db,
    log: SharedLog,
    /// What must be migrated, and where.
    schemas: Vec<(Db, Schema)>,
    /// The server that this process brought along.
    server: Option<Server>,
    /// Names this process for leases.
    owner: String,
}

pub(super) fn options(config: &Config) -> Options {
    Options::new(&config.data_dir)
}

pub async fn run(config: Config, stop: Shutdown) -> Result<(), RoleError> {
    let started = std::time::Instant::now();
    let services = Shutdown::new();
    let mut stores = stores(&config).await?;
    let server = stores.server.take();
    let roles = run_roles(&config, &stores, server.is_some(), &stop, &services, started);
    let Some(mut server) = server else {
        return roles.await;
    };
    let (done, mut finished) = tokio::sync::oneshot::channel();
    let roles = async {
        let result = roles.await;
        let _ = done.send(());
        result
    };
    let supervised = server.supervise(async {
        let _ = (&mut finished).await;
    });
    let (result, ()) = tokio::join!(roles, supervised);
    server.stop(super::share(&config, 20)).await?;
    result
}

async fn stores(config: &Config) -> Result<Stores, RoleError> {
    let wait = config.kafka.fetch_wait;
    let log_of = |db: Db| -> SharedLog { Arc::new(PostgresLog::new(db, &config.log, wait)) };
    let own_log = config.kafka.bootstrap_servers.is_empty();
    if config.orders.database_url.is_some() {
        let orders = super::database(config.orders.database_url.as_ref(), "orders.database_url", "orders", config)?;
        let payments = super::database(config.payments.database_url.as_ref(), "payments.database_url", "payments", config)?;
        let mut schemas = vec![(orders.clone(), Schema::Orders), (payments.clone(), Schema::Payments)];
        let log = if own_log {
            schemas.push((orders.clone(), Schema::Log));
            log_of(super::database(config.orders.database_url.as_ref(), "orders.database_url", "log", config)?)
        } else {
            super::kafka(config)?
        };
        return Ok(Stores { orders, payments, log, schemas, server: None, owner: super::owner("all") });
    }
    let server = embedded::start(&options(config)).await?;
    let mut databases = Vec::with_capacity(DATABASES.len());
    for (name, schema) in DATABASES {
        server.ensure_database(name).await?;
        databases.push((Db::new(&server.url(name), name, &config.database)?, schema));
    }
    let of = |wanted: Schema| databases.iter().find(|(_, schema)| *schema == wanted).map(|(db, _)| db.clone());
    let (Some(orders), Some(payments), Some(log)) = (of(Schema::Orders), of(Schema::Payments), of(Schema::Log)) else {
        return Err(RoleError::NotConfigured("a database of the embedded server"));
    };
    let log = if own_log { log_of(log) } else { super::kafka(config)? };
    // The data directory's lock makes this process the only one: what its predecessor left leased is its own at once.
    Ok(Stores { orders, payments, log, schemas: databases, server: Some(server), owner: "all".into() })
}

async fn run_roles(
    config: &Config,
    stores: &Stores,
    embedded: bool,
    stop: &Shutdown,
    services: &Shutdown,
    started: std::time::Instant,
) -> Result<(), RoleError> {
    let Stores { orders: orders_db, payments: payments_db, log, owner, .. } = stores;
    if embedded {
        prepare(config, stores).await?;
    }

    // One wake-up a database: its writers signal the relay without the database between.
    let (orders_wake, payments_wake) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let notifier = |db: &Db, wake: &Arc<Notify>| {
        if embedded {
            Notifier::local(wake.clone())
        } else {
            Notifier::start(db.clone(), outbox::CHANNEL, wake.clone(), services.clone())
        }
    };
    let orders = Orders::new(orders_db.clone(), notifier(orders_db, &orders_wake));
    let behind = super::share(config, 30);
    let (orders_bound, _) = orders::bind(config, orders, behind)?;
    let (payments_bound, _) = payments::bind(config, Payments::new(payments_db.clone()), behind)?;
    let (relay_bound, relay_ready) = relay::bind(config, orders_db.clone(), payments_db.clone(), log.clone(), behind)?;
    let gateway_config = GatewayConfig {
        orders_urls: vec![reachable(orders_bound.local_addr)],
        payments_urls: vec![reachable(payments_bound.local_addr)],
        ..config.gateway.clone()
    };
    let (gateway_bound, gateway_ready) = gateway::bind(config, &gateway_config, super::share(config, 40))?;
    let public = reachable(gateway_bound.local_addr);

    let mut workers = JoinSet::new();
    workers.spawn(orders::consumer(config, orders_db.clone(), log.clone(), owner.clone()).run(services.clone()));
    let results = notifier(payments_db, &payments_wake);
    workers.spawn(payments::consumer(config, payments_db.clone(), log.clone(), owner.clone(), results).run(services.clone()));
    let relay = |db: &Db, name, wake| relay::relay(config, db.clone(), log.clone(), name, owner.clone(), wake);
    workers.spawn(relay(orders_db, "orders", orders_wake).run(services.clone()));
    workers.spawn(relay(payments_db, "payments", payments_wake).run(services.clone()));
    workers.spawn(prune(log.clone(), services.clone()));
    let announce = [("relay", relay_ready), ("gateway", gateway_ready)];
    tokio::spawn(banner(announce, public, started, stop.clone()));
    if !embedded {
        tokio::spawn(prepare_when_there(config.clone(), stores.schemas.clone(), log.clone(), services.clone()));
    }

    let result = serve(gateway_bound, [orders_bound, payments_bound, relay_bound], stop, services).await;
    while let Some(worker) = workers.join_next().await {
        worker?;
    }
    Ok(result?)
}

/// Serves until `stop`; the gateway drains first, then the services behind it. A server that ends stops the others.
async fn serve(gateway: Bound, behind: [Bound; 3], stop: &Shutdown, services: &Shutdown) -> Result<(), ServeError> {
    let mut servers = JoinSet::new();
    for bound in behind {
        let (stop, services) = (stop.clone(), services.clone());
        servers.spawn(async move {
            let ended = bound.run(services).await;
            stop.stop();
            ended
        });
    }
    let mut result = gateway.run(stop.clone()).await;
    stop.stop();
    services.stop();
    while let Some(ended) = servers.join_next().await {
        let ended = ended.unwrap_or_else(|error| Err(ServeError::Ended { role: "all", cause: error.to_string() }));
        result = result.and(ended);
    }
    result
}

/// Schema and topics of the server that we brought along; it is there.
async fn prepare(config: &Config, stores: &Stores) -> Result<(), RoleError> {
    for (db, schema) in &stores.schemas {
        db::migrate(db, &[*schema]).await?;
    }
    match stores.log.create_topics(&TOPICS, config.kafka.partitions).await {
        // A broker that is configured beside our own server may come later.
        Err(error) if !config.kafka.bootstrap_servers.is_empty() => {
            tracing::warn!(%error, "waiting for the broker");
            tokio::spawn(topics_when_there(config.clone(), stores.log.clone(), Shutdown::new()));
        }
        created => created?,
    }
    Ok(())
}

/// Schema and topics of servers that are somebody else's and may not be there yet; goes on until they are.
async fn prepare_when_there(config: Config, schemas: Vec<(Db, Schema)>, log: SharedLog, stop: Shutdown) {
    let mut incident = Incident::new("migrating");
    for (db, schema) in &schemas {
        while let Err(error) = db::migrate(db, &[*schema]).await {
            incident.failed(&error);
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                () = stop.stopped() => return,
            }
        }
    }
    incident.recovered();
    topics_when_there(config, log, stop).await;
}

async fn topics_when_there(config: Config, log: SharedLog, stop: Shutdown) {
    let mut incident = Incident::new("creating the topics");
    while let Err(error) = log.create_topics(&TOPICS, config.kafka.partitions).await {
        incident.failed(&error);
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            () = stop.stopped() => return,
        }
    }
    incident.recovered();
}

async fn prune(log: SharedLog, stop: Shutdown) {
    let mut incident = Incident::new("pruning the log");
    loop {
        tokio::select! {
            () = tokio::time::sleep(PRUNE_INTERVAL) => {}
            () = stop.stopped() => return,
        }
        match log.prune().await {
            Ok(_) => incident.recovered(),
            Err(error) => incident.failed(&error),
        }
    }
}

/// Where a client on this machine reaches a server that may listen on every address.
fn reachable(mut address: SocketAddr) -> String {
    if address.ip().is_unspecified() {
        let local: std::net::IpAddr = match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        };
        address.set_ip(local);
    }
    format!("http://{address}")
}

/// When everything is ready, says on standard output where to look and what to try.
async fn banner(roles: [(&'static str, Readiness); 2], public: String, started: std::time::Instant, stop: Shutdown) {
    for (role, readiness) in roles {
        super::announce(role, readiness, stop.clone()).await;
    }
    if stop.is_stopping() {
        return;
    }
    let text = format!(
        "
shopd is ready after {} ms.

  Swagger UI   {public}/swagger
  Health       {public}/health/ready

Try it:

  curl -X POST {public}/api/PaymentsProxy/alice
  curl -X POST {public}/api/PaymentsProxy/alice/deposit -H 'Content-Type: application/json' -d 100.5
  curl -X POST {public}/api/OrdersProxy -H 'Content-Type: application/json' -d '{{\"userId\":\"alice\",\"amount\":42.5,\"description\":\"a book\"}}'

and see it paid: curl '{public}/api/OrdersProxy?userId=alice'
",
        started.elapsed().as_millis()
    );
    // Nobody may be reading; the log says that we are ready, too.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}
