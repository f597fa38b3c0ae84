//! Replicas of the orders service inside the test process, on one database, and a hand that writes in it.

use std::sync::Arc;
use std::time::Duration;

use diesel_async::SimpleAsyncConnection;
use shopd::config::{Config, Secret};
use shopd::db::{self, Conn, Db, Notifier, Schema};
use shopd::http::{self, Readiness};
use shopd::orders::{self, Ends, Live, Orders};
use shopd::shutdown::Shutdown;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::support::postgres;
use crate::support::shop::Client;

pub struct Shop {
    pub url: String,
    pub db: Db,
}

/// One port; stopped with the test.
pub struct Replica {
    pub base: String,
    pub client: Client,
    pub stop: Shutdown,
    pub wake: Arc<Notify>,
    pub ends: Ends,
    pub served: JoinHandle<Result<(), http::ServeError>>,
}

impl Shop {
    pub async fn new() -> Self {
        let url = postgres::database("live").await;
        let db = connect(&url, "test");
        db::migrate(&db, &[Schema::Orders]).await.expect("a schema");
        Self { url, db }
    }

    /// `role` names its sessions.
    pub async fn replica(&self, role: &str) -> Replica {
        let (db, stop, wake) = (connect(&self.url, role), Shutdown::new(), Arc::new(Notify::new()));
        let live = Live::new(db.clone(), wake.clone(), true, stop.clone());
        let ends = Ends::new(db.clone(), true, stop.clone());
        let orders = Orders::with_live(db, Notifier::local([wake.clone()]), live, ends.clone());
        let config = Config::default().http;
        let (listen, drain) = ("127.0.0.1:0".parse().expect("an address"), Duration::from_secs(30));
        let readiness = Readiness::new(|| async { Vec::new() });
        let routes = orders::routes(orders);
        let port = http::Port::open("orders", listen).expect("a port");
        let base = format!("http://{}", port.local_addr);
        let bound = http::bind(port, &config, drain, routes, readiness).expect("what serves there");
        let served = tokio::spawn(bound.run(stop.clone()));
        Replica { client: Client::new(base.clone()), base, stop, wake, ends, served }
    }

    pub async fn conn(&self) -> Conn {
        self.db.dedicated().await.expect("a connection")
    }

    /// Writes as orders does, in a transaction of its own, and tells the replicas.
    pub async fn run(&self, statements: &str) {
        let mut conn = self.conn().await;
        run(&mut conn, statements).await;
        run(&mut conn, &format!("notify {}; notify {}", orders::CHANNEL, orders::ENDED_CHANNEL)).await;
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.stop.stop();
    }
}

pub fn connect(url: &str, role: &str) -> Db {
    Db::new(&Secret::new(url), role, &postgres::config()).expect("a database")
}

pub async fn run(conn: &mut Conn, statements: &str) {
    conn.batch_execute(statements).await.unwrap_or_else(|error| panic!("{error}: {statements}"));
}

/// Order `n`'s id.
pub fn order(n: usize) -> String {
    format!("00000000-0000-7000-8000-{n:012x}")
}

/// Accepts the orders `from..=to` of `user`: the even ones as this version does, the odd ones as the version before did.
pub fn accept(user: &str, from: usize, to: usize) -> String {
    accept_described(user, from, to, "'a book'")
}

pub fn accept_described(user: &str, from: usize, to: usize, description: &str) -> String {
    format!(
        "with given as materialized (
              select n % 2 = 0 as here, ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid as id, nextval('order_event_id_seq') as event, t
                from generate_series({from}, {to}) n, clock_timestamp() t),
              o as (insert into orders (id, user_id, amount, description, created_at, updated_at, traceparent, accepted_xid, accepted_id)
                    select id, '{user}', 100, {description}, t, t, '', case when here then pg_current_xact_id() end, case when here then event end
                      from given)
         insert into order_event (id, order_id, status, at, traceparent) overriding system value
         select event, id, 'New', t, '' from given where not here;"
    )
}

/// Ends the orders `from..=to`.
pub fn finish(from: usize, to: usize) -> String {
    let id = |n| format!("'{}'", order(n));
    format!(
        "with o as (update orders set status = 'Finished', updated_at = clock_timestamp() where id between {} and {} returning id, updated_at)
         insert into order_event (order_id, status, at) select id, 'Finished', updated_at from o order by id;",
        id(from),
        id(to)
    )
}
