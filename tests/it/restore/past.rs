//! A shop that was dumped while it worked, and is gone.

use std::collections::BTreeSet;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use shopd::db::Db;

use super::set;
use crate::support::books::{connect, count};
use crate::support::cluster::Cluster;
use crate::support::inside::until;
use crate::support::kafka;
use crate::support::load::{Accepted, Load};
use crate::support::shop::{Client, ENDS_WHO_IS_FROZEN, Four};

/// Who has money for all that they order.
pub const USERS: [&str; 2] = ["ann", "bob"];
/// Who runs out of it.
pub const POOR: &str = "cid";
const ORDERING: [&str; 3] = ["ann", "bob", POOR];
/// Whose account is opened between the dumps.
pub const LATE: &str = "late";

/// An order, its user and its end.
pub const ENDS: &str =
    "select id || ' ' || user_id || ' ' || status || coalesce(' ' || failure_reason, '') as fact from orders where status <> 'New'";
pub const BALANCES: &str = "select user_id || ' ' || balance as fact from account";

/// Which database is dumped first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum First {
    Orders,
    Payments,
}

/// How long the relay stands still. It stops before the first dump, so that orders wait in it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// It goes on between the dumps: what the first one has as waiting is decided in the second.
    BetweenTheDumps,
    UntilBothAreDumped,
}

pub struct Past {
    pub bootstrap: String,
    pub prefix: String,
    pub system_identifier: String,
    /// All that clients were told is accepted, before the dumps, between and after them; each had ended before the shop was gone.
    pub accepted: Vec<Accepted>,
    /// [`ENDS`] and [`BALANCES`], at its end.
    pub ends: BTreeSet<String>,
    pub balances: BTreeSet<String>,
    pub orders_dump: PathBuf,
    pub payments_dump: PathBuf,
}

impl Past {
    pub async fn new(first: First, held: Held) -> Self {
        let (source, bootstrap, prefix) = (Cluster::new(&[]).await, kafka::shared().await, kafka::prefix());
        // Its transactions' ids lie far beyond those of the cluster that the dumps come to.
        source.burn_transactions(20_000).await;
        let (orders_url, payments_url) = (source.database("orders").await, source.database("payments").await);
        let shop = Four::start_with(&bootstrap, &orders_url, &payments_url, &prefix, &ENDS_WHO_IS_FROZEN).await;
        let (orders, payments) = (connect(&orders_url), connect(&payments_url));
        for user in USERS {
            shop.client.account(user, "100000").await;
        }
        shop.client.account(POOR, "15").await;
        let load = Load::start(&shop.client, 4, &ORDERING, "1");
        load.place(90).await;
        until("they end", async || waiting(&orders).await == 0).await;
        shop.relay.freeze().await;
        load.place(24).await;

        let dumps = source.dir.clone();
        let (orders_dump, payments_dump) = (dumps.join("orders.dump"), dumps.join("payments.dump"));
        let dump = async |what: First| match what {
            First::Orders => source.dump("orders", &orders_dump).await,
            First::Payments => source.dump("payments", &payments_dump).await,
        };
        // Beside the load, each: a dump is one moment, wherever in these orders it lies.
        tokio::join!(dump(first), load.place(12));
        let mut late = Vec::new();
        if held == Held::BetweenTheDumps {
            shop.relay.signal(Signal::SIGCONT);
            load.place(12).await;
            if first == First::Payments {
                late = late_orders(&shop.client).await;
            }
            until("they end", async || waiting(&orders).await == 0).await;
            // What the second dump has of this is in no outbox any more.
            until("the outboxes are dropped", async || outboxes(&orders, &payments).await == 0).await;
        }
        tokio::join!(dump(if first == First::Orders { First::Payments } else { First::Orders }), load.place(8));
        shop.relay.signal(Signal::SIGCONT);
        load.place(8).await;
        let mut accepted = load.stop().await.accepted;
        accepted.extend(late);
        until("all end", async || waiting(&orders).await == 0).await;
        until("all are decided", async || count(&payments, "select count(*) as n from payment").await == accepted.len() as i64)
            .await;
        let (ends, balances) = (set(&orders, ENDS).await, set(&payments, BALANCES).await);
        let system_identifier = source.system_identifier().await;
        drop(shop);
        source.crash().await;
        Self { bootstrap, prefix, system_identifier, accepted, ends, balances, orders_dump, payments_dump }
    }

    pub fn ids(&self) -> BTreeSet<String> {
        self.accepted.iter().map(|order| order.id.to_string()).collect()
    }

    pub fn of_user(&self, user: &str) -> BTreeSet<String> {
        self.accepted.iter().filter(|order| order.user == user).map(|order| order.id.to_string()).collect()
    }
}

async fn waiting(orders: &Db) -> i64 {
    count(orders, "select count(*) as n from orders where status = 'New'").await
}

async fn outboxes(orders: &Db, payments: &Db) -> i64 {
    let rows = "select count(*) as n from outbox";
    count(orders, rows).await + count(payments, rows).await
}

/// Orders of an account that is opened for them.
async fn late_orders(client: &Client) -> Vec<Accepted> {
    client.account(LATE, "100").await;
    let load = Load::start(client, 1, &[LATE], "1");
    load.place(5).await;
    load.stop().await.accepted
}
