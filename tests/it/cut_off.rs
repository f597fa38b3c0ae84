//! A replica that alone loses its way to the brokers while it reaches its database: another one that has not goes on with its partitions, or
//! with the outbox. Where nobody reaches them everything stays where it is. Real processes, Kafka and Postgres; the way is a proxy's.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use diesel::sql_types::{BigInt, Text};
use diesel_async::RunQueryDsl;
use shopd::db::{Db, sql};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::support::books::{assert_balanced, connect, count};
use crate::support::inside::until;
use crate::support::kafka::{Broker, UNHURRIED};
use crate::support::load::Load;
use crate::support::postgres;
use crate::support::shop::{Client, Four, Process};

const USERS: [&str; 8] = ["ann", "bob", "cid", "dan", "eve", "fay", "gus", "hal"];
/// Twice what passes before anything changes hands, and what it takes to notice.
const FINAL_WITHIN: Duration = Duration::from_secs(30);

/// With the brokers away for all; longer than it takes to change hands where one alone has lost its way.
const UNCHANGED_FOR: Duration = Duration::from_secs(20);

/// A way that can be cut: what was open breaks, and nobody gets through any more.
struct Way {
    address: String,
    open: watch::Sender<bool>,
}

impl Way {
    async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (open, is_open) = watch::channel(true);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let mut is_open = is_open.clone();
                tokio::spawn(async move {
                    let carried = async {
                        let mut broker = TcpStream::connect(("127.0.0.1", port)).await?;
                        copy_bidirectional(&mut client, &mut broker).await
                    };
                    tokio::select! {
                        biased;
                        _ = is_open.wait_for(|open| !open) => {}
                        _ = carried => {}
                    }
                });
            }
        });
        Self { address, open }
    }
}

#[derive(diesel::QueryableByName)]
struct Held {
    #[diesel(sql_type = Text)]
    place: String,
    #[diesel(sql_type = Text)]
    owner: String,
    #[diesel(sql_type = BigInt)]
    epoch: i64,
}

/// Every partition and the outbox of one database: whose it is, and under which epoch.
async fn held(db: &Db) -> BTreeMap<String, (String, i64)> {
    let held: Vec<Held> = sql("select topic || ' ' || partition as place, coalesce(owner, '') as owner, epoch from consumer_offset
                               union all select name, coalesce(owner, ''), epoch from outbox_cursor")
    .load(&mut *db.get().await.unwrap())
    .await
    .unwrap();
    held.into_iter().map(|one| (one.place, (one.owner, one.epoch))).collect()
}

/// How many of them are this process's.
async fn of(process: &Process, db: &Db) -> usize {
    let mark = format!(":{}:", process.pid());
    held(db).await.values().filter(|(owner, _)| owner.contains(&mark)).count()
}

/// Two of each role but the gateway; the second ones go another way to the same broker.
struct Stand {
    broker: Broker,
    way: Way,
    shop: Four,
    orders: Db,
    payments: Db,
    far: [Process; 3],
}

impl Stand {
    /// With more lines for the broker, and settings for the shop.
    async fn new(lines: &str, settings: &[(&str, &str)]) -> Self {
        let held_back = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = held_back.local_addr().unwrap().port();
        let way = Way::to(port).await;
        let advertised = way.address.clone();
        let broker = Broker::prepared(|dir| {
            let extra = format!(
                "listeners=PLAINTEXT://127.0.0.1:@PORT@,CONTROLLER://127.0.0.1:@CONTROLLER@,FAR://127.0.0.1:{port}\n\
                 advertised.listeners=PLAINTEXT://127.0.0.1:@PORT@,FAR://{advertised}\n\
                 listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,FAR:PLAINTEXT\n{lines}"
            );
            std::fs::write(dir.join("extra.properties"), extra).unwrap();
            drop(held_back);
        })
        .await;
        let (orders_url, payments_url) = (postgres::database("orders").await, postgres::database("payments").await);
        let shop = Four::start_with(&broker.bootstrap, &orders_url, &payments_url, "", settings).await;
        let env: Vec<(String, String)> = shop
            .env
            .iter()
            .map(|(name, value)| match name.as_str() {
                "SHOPD__KAFKA__BOOTSTRAP_SERVERS" => (name.clone(), way.address.clone()),
                _ => (name.clone(), value.clone()),
            })
            .collect();
        assert_ne!(env, shop.env, "the far ones go another way");
        let far = ["orders", "payments", "relay"].map(|role| Process::start(&[role], &env));
        let stand = Self { broker, way, orders: connect(&orders_url), payments: connect(&payments_url), shop, far };
        for user in USERS {
            stand.shop.client.account(user, "1000").await;
        }
        stand
    }

    /// Each of the far consumers has a share, and the far relay has both outboxes.
    async fn far_ones_hold_something(&mut self) {
        let [orders, payments, relay] = &self.far;
        until("the far consumers have a share", async || {
            of(orders, &self.orders).await > 0 && of(payments, &self.payments).await > 0
        })
        .await;
        self.shop.relay.kill().await;
        until("the far relay has the outboxes", async || of(relay, &self.orders).await > 0 && of(relay, &self.payments).await > 0)
            .await;
        self.shop.relay = Process::start(&["relay"], &self.shop.env);
        Client::new(self.shop.relay.address("relay").await).ready().await;
    }

    async fn waiting(&self) -> i64 {
        count(&self.orders, "select count(*) as n from orders where status = 'New'").await
    }

    async fn held(&self) -> [BTreeMap<String, (String, i64)>; 2] {
        [held(&self.orders).await, held(&self.payments).await]
    }
}

/// Each of the three is red where the others do not take over: leases alone say who reaches the database.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_alone_has_lost_its_way_to_the_brokers_leaves_its_partitions_and_the_outbox_to_others_and_gets_a_share_again() {
    let mut stand = Stand::new(UNHURRIED, &[]).await;
    stand.far_ones_hold_something().await;
    let load = Load::start(&stand.shop.client, 4, &USERS, "0.5");
    load.place(50).await;
    // A standby that has just begun is not sure yet that it reaches them.
    until("all end", async || stand.waiting().await == 0).await;

    stand.way.open.send_replace(false);
    let cut = Instant::now();
    load.place(100).await;
    let accepted = load.accepted();
    until("nothing waits for who is cut off", async || stand.waiting().await == 0).await;
    let final_after = cut.elapsed();
    assert!(final_after < FINAL_WITHIN, "{final_after:?}");
    let [orders, payments, relay] = &stand.far;
    for (role, process, db) in [("orders", orders, &stand.orders), ("payments", payments, &stand.payments)] {
        assert_eq!(of(process, db).await, 0, "{role} holds nothing");
        assert!(process.log().contains("alone has lost its way to the log"), "{}", process.log());
    }
    assert_eq!([of(relay, &stand.orders).await, of(relay, &stand.payments).await], [0, 0], "relay holds nothing");
    println!("{accepted} orders accepted; the last was final {final_after:.1?} after the cut");

    stand.way.open.send_replace(true);
    until("they get a share again", async || of(orders, &stand.orders).await > 0 && of(payments, &stand.payments).await > 0).await;
    load.place(50).await;
    let done = load.stop().await;
    until("all end", async || stand.waiting().await == 0).await;
    assert_balanced(&stand.orders, &stand.payments).await;
    assert_eq!(
        count(&stand.orders, "select count(*) as n from orders where status = 'Finished'").await,
        done.accepted.len() as i64
    );
}

/// Red where who does not reach them gives up what it has whatever the others reach.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_brokers_away_for_all_nothing_changes_hands() {
    // A lease that ends in a stall of the machine changes hands by itself.
    let mut stand = Stand::new("", &[("SHOPD__RELAY__LEASE_MS", "10000"), ("SHOPD__CONSUMER__LEASE_MS", "10000")]).await;
    stand.far_ones_hold_something().await;
    stand.broker.kill().await;
    let since = Instant::now();
    let held = stand.held().await;
    let load = Load::start(&stand.shop.client, 4, &USERS, "0.5");
    load.place(50).await;
    // Longer than it takes where one alone has lost its way.
    while since.elapsed() < UNCHANGED_FOR {
        assert_eq!(stand.held().await, held, "after {:?}", since.elapsed());
        tokio::time::sleep(Duration::from_secs(1)).await; // a step of a time in which nothing may happen
    }
    stand.broker.start().await;
    until("all end", async || stand.waiting().await == 0).await;
    assert_eq!(stand.held().await, held, "whoever is back first is not favoured");
    load.stop().await;
    until("all end", async || stand.waiting().await == 0).await;
}
