//! Every role in one process. What is not configured it brings along: a Postgres server of its own, and the log in it.
//!
//! Where things are kept is `stores.rs`. Stopping goes from the outside in, so that what is in flight finds everything behind it still there: gateway, services and
//! relay, database server.

mod stores;

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::config::{Config, GatewayConfig};
use crate::contracts::TOPICS;
use crate::db::{self, Db, Notifier, Schema};
use crate::gateway::Gateway;
use crate::http::idempotency::keep_pruned;
use crate::http::{Bound, Port, Readiness, ServeError};
use crate::messaging::Reach;
use crate::messaging::log::SharedLog;
use crate::messaging::outbox;
use crate::orders::{CHANNEL, ENDED_CHANNEL, Ends, Live, Orders};
use crate::payments::{OnOrder, Payments};
use crate::shutdown::Shutdown;
use crate::telemetry::{Incident, SharedIncident};

use stores::Stores;
pub(super) use stores::{DATABASES, LOG, ORDERS, PAYMENTS, options};

use super::{RoleError, gateway, orders, payments, relay};

/// How often what is away is tried again while starting.
const RETRY: Duration = Duration::from_millis(500);
/// How long the start waits for schemas and topics on a server of our own.
const PREPARED_WITHIN: Duration = Duration::from_secs(10);
/// How often the embedded log drops what is older than its retention.
const PRUNE_INTERVAL_MAX: Duration = Duration::from_secs(60);
/// Between two steps while there is more to remove.
const PRUNE_PAUSE: Duration = Duration::from_millis(50);

pub async fn run(config: Config, stop: Shutdown) -> Result<(), RoleError> {
    let started = std::time::Instant::now();
    // First of all: a port that is taken is said before anything is fetched or started, and who connects meanwhile waits.
    // By a shopd on the same data directory, mostly: that says more.
    let ports = Ports::open(&config).map_err(|taken| stores::in_use(&config).unwrap_or(taken.into()))?;
    let services = Shutdown::new();
    // Fetching a server and making its database take their time; nobody who says stop should wait for that.
    let mut stores = tokio::select! {
        opened = Stores::open(&config) => opened?,
        () = stop.stopped() => return Ok(()),
    };
    let server = stores.server.take();
    let roles = run_roles(&config, ports, &stores, server.is_some(), &stop, &services, started);
    let Some(mut server) = server else {
        return roles.await;
    };
    stop.before_force(server.stop_soon());
    let (done, mut finished) = tokio::sync::oneshot::channel();
    let roles = async {
        let result = roles.await;
        stop.stop();
        let _ = done.send(());
        result
    };
    let supervised = server.supervise(async {
        let _ = (&mut finished).await;
    });
    let asked = async {
        stop.stopped().await;
        std::time::Instant::now()
    };
    let (result, (), asked) = tokio::join!(roles, supervised, asked);
    // What draining did not need is the server's: a young database has much to write, and cut short it would have to recover.
    let left = super::share(&config, 90).saturating_sub(asked.elapsed());
    server.stop(left.max(super::share(&config, 20))).await?;
    result
}

struct Ports {
    gateway: Port,
    orders: Port,
    payments: Port,
    relay: Port,
}

impl Ports {
    fn open(config: &Config) -> Result<Self, ServeError> {
        Ok(Self {
            orders: orders::open(config)?,
            payments: payments::open(config)?,
            relay: relay::open(config)?,
            gateway: gateway::open(config)?,
        })
    }
}

async fn run_roles(
    config: &Config,
    ports: Ports,
    stores: &Stores,
    embedded: bool,
    stop: &Shutdown,
    services: &Shutdown,
    started: std::time::Instant,
) -> Result<(), RoleError> {
    let (log, owner) = (&stores.log, &stores.owner);
    let (orders_db, payments_db) = (&stores.orders.db, &stores.payments.db);
    let prepared = tokio::spawn(prepare(config.clone(), stores.schemas.clone(), log.clone(), services.clone()));
    if embedded {
        // The server is there, so this takes milliseconds; a broker beside it may come later.
        let _ = tokio::time::timeout(PREPARED_WITHIN, prepared).await;
    }

    // One wake-up a database: its writers signal the relay without the database between.
    let (orders_wake, payments_wake) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let notifier = |db: &Db, channels: &[(&'static str, Arc<Notify>)]| {
        if embedded {
            Notifier::local(channels.iter().map(|(_, wake)| wake.clone()))
        } else {
            Notifier::start(db.clone(), channels, services.clone())
        }
    };
    let events = (CHANNEL, Arc::new(Notify::new()));
    // Streams end first: the gateway's drain waits for them.
    let live = Live::new(orders_db.clone(), events.1.clone(), !embedded, stop.clone());
    let ends = Ends::new(orders_db.clone(), !embedded, stop.clone());
    let requests = notifier(orders_db, &[(outbox::CHANNEL, orders_wake.clone()), events.clone()]);
    let sweeper = orders::sweeper(config, orders_db.clone(), requests.clone());
    let orders = Orders::with_live(orders_db.clone(), requests, live, ends.clone());
    let ended = notifier(orders_db, &[events, (ENDED_CHANNEL, Arc::default())]);
    let behind = super::share(config, 30);
    let gateway_config = GatewayConfig {
        orders_urls: vec![reachable(ports.orders.local_addr)],
        payments_urls: vec![reachable(ports.payments.local_addr)],
        ..config.gateway.clone()
    };
    let public = reachable(ports.gateway.local_addr);
    let (orders_bound, _) = orders::bind(ports.orders, config, orders, log.clone(), behind)?;
    let payments_door = Payments::new(payments_db.clone());
    let known = payments_door.known();
    let (payments_bound, _) = payments::bind(ports.payments, config, payments_door, log.clone(), behind)?;
    let (relay_bound, relay_ready) = relay::bind(ports.relay, config, orders_db.clone(), payments_db.clone(), log.clone(), behind)?;
    let public_port = Gateway::new(&gateway_config, stop.clone())?;
    let (gateway_bound, gateway_ready) = gateway::bind(ports.gateway, config, &public_port, super::share(config, 40))?;

    let mut workers = JoinSet::new();
    workers.spawn(public_port.run_checks());
    workers.spawn(
        orders::consumer(config, stores.orders.batches.clone(), log.clone(), owner.clone(), ended, ends).run(services.clone()),
    );
    workers.spawn(crate::orders::run_sweeper(sweeper, services.clone()));
    let decides = OnOrder::new(notifier(payments_db, &[(outbox::CHANNEL, payments_wake.clone())]), known);
    workers.spawn(
        payments::consumer(config, stores.payments.batches.clone(), log.clone(), owner.clone(), decides).run(services.clone()),
    );
    let reach = Arc::new(Reach::default());
    let relay = |db: &Db, name, wake| relay::relay(config, db.clone(), log.clone(), reach.clone(), name, owner.clone(), wake);
    workers.spawn(relay(orders_db, "orders", orders_wake).run(services.clone()));
    workers.spawn(relay(payments_db, "payments", payments_wake).run(services.clone()));
    workers.spawn(prune(log.clone(), config.log.retention, services.clone()));
    for (db, name) in [(orders_db, "orders"), (payments_db, "payments")] {
        workers.spawn(outbox::watch_depth(db.clone(), name, services.clone()));
        workers.spawn(keep_pruned(db.clone(), config.http.idempotency_retention, services.clone()));
    }
    let announce = [("relay", relay_ready), ("gateway", gateway_ready)];
    tokio::spawn(banner(announce, public, started, stop.clone()));

    let mut serving = std::pin::pin!(serve(gateway_bound, [orders_bound, payments_bound, relay_bound], stop, services));
    let mut ended = Ok(());
    let served = loop {
        tokio::select! {
            served = &mut serving => break served,
            // They end only when asked to, or badly; without one of them the rest would look healthy and do half the work.
            Some(worker) = workers.join_next() => {
                stop.stop();
                ended = ended.and(worker);
            }
        }
    };
    while let Some(worker) = workers.join_next().await {
        ended = ended.and(worker);
    }
    ended?;
    Ok(served?)
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

/// Brings schemas and topics to this version; goes on until what they lie on is there.
async fn prepare(config: Config, schemas: Vec<(Db, Schema)>, log: SharedLog, stop: Shutdown) {
    let incident = SharedIncident::new("migrating");
    let migrating = schemas.iter().enumerate().map(|(at, (db, schema))| migrate(db, *schema, at as i32, &incident, &stop));
    if !join_all(migrating).await.into_iter().all(|done| done) {
        return;
    }
    let mut incident = Incident::new("creating the topics");
    while let Err(error) = log.create_topics(&TOPICS, config.kafka.partitions).await {
        incident.failed(&error);
        if !wait(&stop).await {
            return;
        }
    }
    incident.recovered();
}

/// Side by side with the others; false where it was stopped before.
async fn migrate(db: &Db, schema: Schema, at: i32, incident: &SharedIncident, stop: &Shutdown) -> bool {
    while let Err(error) = db::migrate(db, &[schema]).await {
        incident.failed(at, &error);
        if !wait(stop).await {
            return false;
        }
    }
    incident.recovered(at);
    true
}

/// Until the next try; false when there will be none.
async fn wait(stop: &Shutdown) -> bool {
    tokio::select! {
        () = tokio::time::sleep(RETRY) => true,
        () = stop.stopped() => false,
    }
}

/// Removes what is older than the retention, and a tenth of that later, at most a minute, looks again.
async fn prune(log: SharedLog, retention: Duration, stop: Shutdown) {
    let interval = (retention / 10).min(PRUNE_INTERVAL_MAX);
    let mut incident = Incident::new("pruning the log");
    let mut wait = interval;
    loop {
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = stop.stopped() => return,
        }
        wait = match log.prune().await {
            Ok(removed) => {
                incident.recovered();
                // One step is bounded; while there is more the next one follows, so that no load outgrows it.
                if removed > 0 { PRUNE_PAUSE } else { interval }
            }
            Err(error) => {
                incident.failed(&error);
                interval
            }
        };
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
