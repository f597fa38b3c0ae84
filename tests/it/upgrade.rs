//! One version after the other without downtime: the binary of the version before on this version's schema, then role by role this
//! version's, under load, and back. `make upgrade-test` (scripts/upgrade-test.sh) builds the version before and runs this.

use std::collections::BTreeSet;
use std::net::TcpListener;

use nix::sys::signal::Signal;
use shopd::db::Db;

use crate::audit::{audit, brief, said};
use crate::support::books::{assert_balanced, connect, count, facts};
use crate::support::inside::until;
use crate::support::load::Load;
use crate::support::shop::{Client, Process};
use crate::support::{kafka, postgres};

const USERS: [&str; 6] = ["ann", "bob", "cid", "dan", "eve", "fay"];
/// The program of the version before.
const BEFORE: &str = "SHOPD_TEST_VERSION_BEFORE";
/// Of a service, the old one's and the new one's; below the range that the system hands out to outgoing connections.
const PORTS: std::ops::Range<u16> = 21_000..22_900;

struct Shop {
    env: Vec<(String, String)>,
    before: String,
    orders: Db,
}

impl Shop {
    fn start(&self, program: &str, role: &str, port: u16) -> Process {
        let mut env = self.env.clone();
        env.push((format!("SHOPD__{}__LISTEN", role.to_uppercase()), format!("127.0.0.1:{port}")));
        Process::start_program(program, &[role], &env)
    }

    /// Another program's beside the one that runs, which then stops.
    async fn replace(&self, old: &mut Process, program: &str, role: &str, port: u16, load: &Load) -> Process {
        let new = self.start(program, role, port);
        let client = Client::new(new.address(role).await);
        client.ready().await;
        if role == "gateway" {
            // What stands before the gateways goes to the other one from now on; what the first one has in hand it finishes.
            load.go_to(&client);
        }
        load.place(50).await;
        load.allow(60);
        old.signal(Signal::SIGTERM);
        assert!(old.ended().await.success(), "{}", old.log());
        load.place(60).await;
        self.until_all_end().await;
        let by = if program == self.before { "the version before" } else { "this version" };
        println!("  {role} replaced by {by}: {} orders accepted so far, {} tries refused", load.accepted(), load.refused());
        new
    }

    async fn until_all_end(&self) {
        let waiting = "select count(*) as n from orders where status = 'New'";
        until("every order ends", async || count(&self.orders, waiting).await == 0).await;
    }

    async fn audited(&self) {
        let output = audit(&["--json"], &self.env).await;
        let (offenders, summary) = said(&output);
        assert_eq!(offenders, BTreeSet::new(), "{summary}");
        println!("  audit: {}", brief(&summary));
    }
}

async fn migrations(db: &Db) -> BTreeSet<String> {
    facts(db, "select version as fact from __diesel_schema_migrations").await.into_iter().collect()
}

#[ignore = "needs a build of the version before: make upgrade-test"]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_version_before_works_on_this_schema_is_replaced_under_load_and_comes_back_without_a_lost_request() {
    let before = std::env::var(BEFORE).unwrap_or_else(|_| panic!("{BEFORE} names no program: use make upgrade-test"));
    let (orders_url, payments_url) = (postgres::database("orders").await, postgres::database("payments").await);
    let ports: Vec<u16> = PORTS.filter(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).take(8).collect();
    let both = |at: usize| format!("http://127.0.0.1:{},http://127.0.0.1:{}", ports[at], ports[at + 1]);
    let env: Vec<(String, String)> = [
        ("SHOPD__KAFKA__BOOTSTRAP_SERVERS", kafka::shared().await),
        ("SHOPD__KAFKA__TOPIC_PREFIX", kafka::prefix()),
        ("SHOPD__KAFKA__PARTITIONS", "4".into()),
        ("SHOPD__ORDERS__DATABASE_URL", orders_url.clone()),
        ("SHOPD__PAYMENTS__DATABASE_URL", payments_url.clone()),
        ("SHOPD__GATEWAY__ORDERS_URLS", both(0)),
        ("SHOPD__GATEWAY__PAYMENTS_URLS", both(2)),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec();
    let (orders, payments) = (connect(&orders_url), connect(&payments_url));
    let shop = Shop { env, before, orders };

    let mut migrate = Process::start_program(&shop.before, &["migrate"], &shop.env);
    assert!(migrate.ended().await.success(), "{}", migrate.log());
    let (orders_before, payments_before) = (migrations(&shop.orders).await, migrations(&payments).await);
    let mut old_orders = shop.start(&shop.before, "orders", ports[0]);
    let mut old_payments = shop.start(&shop.before, "payments", ports[2]);
    let mut old_relay = shop.start(&shop.before, "relay", ports[4]);
    let mut old_gateway = shop.start(&shop.before, "gateway", ports[6]);
    for (process, role) in [(&old_orders, "orders"), (&old_payments, "payments"), (&old_relay, "relay"), (&old_gateway, "gateway")]
    {
        Client::new(process.address(role).await).ready().await;
    }
    let client = Client::new(old_gateway.address("gateway").await);
    for user in USERS {
        client.account(user, "100000").await;
    }
    let load = Load::start(&client, 6, &USERS, "1");
    load.place(100).await;
    println!("  the version before has {} orders on its own schema", load.accepted());

    // Its roles go on while the schema becomes this version's, and after.
    load.allow(100);
    let mut migrate = Process::start_program(env!("CARGO_BIN_EXE_shopd"), &["migrate"], &shop.env);
    assert!(migrate.ended().await.success(), "{}", migrate.log());
    let added = |now: BTreeSet<String>, then: &BTreeSet<String>| now.difference(then).cloned().collect::<Vec<_>>();
    let in_orders = added(migrations(&shop.orders).await, &orders_before);
    let in_payments = added(migrations(&payments).await, &payments_before);
    assert!(!in_orders.is_empty() || !in_payments.is_empty(), "nothing was migrated: the version before is no other schema's");
    load.place(150).await;
    shop.until_all_end().await;
    println!(
        "  migrated under load (orders: {}; payments: {}); {} orders accepted so far, {} tries refused",
        in_orders.join(" "),
        in_payments.join(" "),
        load.accepted(),
        load.refused()
    );
    shop.audited().await;

    let (this, before) = (env!("CARGO_BIN_EXE_shopd"), &*shop.before);
    // The relay first: it reads what either version writes, and the one before does not.
    let mut relay = shop.replace(&mut old_relay, this, "relay", ports[5], &load).await;
    let mut orders = shop.replace(&mut old_orders, this, "orders", ports[1], &load).await;
    let mut payments_role = shop.replace(&mut old_payments, this, "payments", ports[3], &load).await;
    let mut gateway = shop.replace(&mut old_gateway, this, "gateway", ports[7], &load).await;
    shop.audited().await;

    // And back, in the other order, on what this version has written.
    let _gateway = shop.replace(&mut gateway, before, "gateway", ports[6], &load).await;
    let _payments = shop.replace(&mut payments_role, before, "payments", ports[2], &load).await;
    let _orders = shop.replace(&mut orders, before, "orders", ports[0], &load).await;
    let _relay = shop.replace(&mut relay, before, "relay", ports[4], &load).await;

    let done = load.stop().await;
    shop.until_all_end().await;
    let there = facts(&shop.orders, "select id::text as fact from orders").await.into_iter().collect();
    assert_eq!(done.ids(), there, "what was acknowledged is there, and nothing else");
    assert_eq!(done.refused, 0, "no request was lost");
    assert_balanced(&shop.orders, &payments).await;
    println!("  {} orders, none lost, no try refused, slowest {:.1?}", done.accepted.len(), done.slowest);
    shop.audited().await;
}
