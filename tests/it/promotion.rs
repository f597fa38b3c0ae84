//! A database server that dies for good, and its standby in its place. Both are in the url; nothing is configured anew.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use shopd::db::Db;

use crate::audit::{audit, brief, said};
use crate::support::books::{assert_balanced, connect, count, facts};
use crate::support::cluster::{Cluster, admit};
use crate::support::inside::until;
use crate::support::load::Load;
use crate::support::shop::{Client, Four};
use crate::support::{kafka, postgres};

const USERS: [&str; 4] = ["ann", "bob", "cid", "dan"];
/// Orders are accepted again so soon after a primary's death; the contract's bound for a database's return.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// A primary and its standby, which has every commit before the client's answer where `synchronous`.
struct Pair {
    primary: Cluster,
    standby: Cluster,
}

impl Pair {
    async fn new(synchronous: bool) -> Self {
        let primary = Cluster::new(&[]).await;
        let dir = postgres::own_dir();
        admit(&dir);
        primary.base_backup(&dir, &["--write-recovery-conf", "--wal-method=stream"]).await;
        let standby = Cluster::at(dir, &[]).await;
        assert_eq!(standby.ask("postgres", "select pg_is_in_recovery()").await, "t");
        if synchronous {
            primary.ask("postgres", "alter system set synchronous_standby_names = '*'").await;
            primary.ask("postgres", "select pg_reload_conf()").await;
            let state = "select sync_state from pg_stat_replication";
            until("the standby is synchronous", async || primary.ask("postgres", state).await == "sync").await;
        }
        Self { primary, standby }
    }

    /// Both hosts; whoever can write is taken.
    fn url(&self, database: &str) -> String {
        let parts = |url: String| url.trim_start_matches("postgres://").split_once('@').map(|(_, rest)| rest.to_owned());
        let host = |cluster: &Cluster| {
            let rest = parts(cluster.url(database)).expect("user@host:port/name");
            rest.rsplit_once('/').expect("a name").0.to_owned()
        };
        format!("postgres://shopd@{},{}/{database}?target_session_attrs=read-write", host(&self.primary), host(&self.standby))
    }

    async fn promote(&self) {
        let promoted = "select pg_promote(true, 30)";
        assert_eq!(self.standby.ask("postgres", promoted).await, "t");
    }
}

async fn waiting(orders: &Db) -> i64 {
    count(orders, "select count(*) as n from orders where status = 'New'").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_killed_under_load_loses_nothing_that_was_acknowledged_where_its_standby_is_synchronous() {
    lost_under_load("killed", Cluster::crash).await;
}

/// Red where nobody watches what a server owes: its kernel acknowledges every byte, so no connection to it ever ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_hangs_under_load_is_left_for_its_standby_and_nothing_acknowledged_is_lost() {
    lost_under_load("hung", Cluster::hang).await;
}

/// In the middle of a load the primary is lost in this way, and its standby promoted.
async fn lost_under_load(how: &str, lose: impl AsyncFn(&Cluster)) {
    let pair = Pair::new(true).await;
    pair.primary.database("orders").await;
    pair.primary.database("payments").await;
    let (orders_url, payments_url) = (pair.url("orders"), pair.url("payments"));
    let shop = Four::start(&kafka::shared().await, &orders_url, &payments_url, &kafka::prefix()).await;
    for user in USERS {
        shop.client.account(user, "1000").await;
    }
    let load = Load::start(&shop.client, 8, &USERS, "0.5");
    load.place(200).await;
    // In the middle of whatever is going on.
    load.allow(400);
    until("more are accepted", async || load.accepted() > 260).await;
    let before = load.accepted();
    lose(&pair.primary).await;
    let died = Instant::now();
    pair.promote().await;
    let promoted = died.elapsed();
    until("the next is accepted", async || load.accepted() > before + 8).await;
    let accepting = died.elapsed();
    assert!(accepting < READY_WITHIN, "{accepting:?}");
    for (process, role) in [(&shop.orders, "orders"), (&shop.payments, "payments"), (&shop.relay, "relay")] {
        Client::new(process.address(role).await).ready().await;
    }
    until("the others too", async || load.accepted() >= 600).await;
    let done = load.stop().await;
    // Straight to the new primary: these may take their time to find it.
    let (orders, payments) = (connect(&pair.standby.url("orders")), connect(&pair.standby.url("payments")));
    until("every order ends", async || waiting(&orders).await == 0).await;
    let ended = died.elapsed();
    let there = facts(&orders, "select id::text as fact from orders").await.into_iter().collect();
    assert_eq!(done.ids(), there, "what was acknowledged is there, and nothing else");
    assert_balanced(&orders, &payments).await;
    assert!(!shop.relay.log().contains("came from another cluster"), "a standby is the same system");
    // The relay hears of new rows again without waiting for its poll: the listening sessions are on the new primary.
    let listening = "select count(*) as n from pg_stat_activity where query ilike 'listen %'";
    until("they listen again", async || count(&orders, listening).await >= 1).await;
    let output = audit(&["--json"], &shop.env).await;
    let (offenders, summary) = said(&output);
    assert_eq!(offenders, BTreeSet::new(), "{summary}");
    println!(
        "primary {how} after {before} orders, standby promoted {promoted:.1?} after its death, orders accepted again after {accepting:.1?}, all final {ended:.1?}; {} accepted, none lost, {} tries refused, slowest {:.1?}; audit: {}",
        done.accepted.len(),
        done.refused,
        done.slowest,
        brief(&summary)
    );
}

/// The control, and what an asynchronous standby costs: commits that had not come to it when the primary died are gone, and the audit names
/// those that payments knows of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_that_lags_loses_what_it_did_not_have_and_the_audit_names_it() {
    let pair = Pair::new(false).await;
    pair.primary.database("orders").await;
    let orders_url = pair.url("orders");
    let payments_url = postgres::database("payments").await;
    let shop = Four::start(&kafka::shared().await, &orders_url, &payments_url, &kafka::prefix()).await;
    for user in USERS {
        shop.client.account(user, "1000").await;
    }
    let load = Load::start(&shop.client, 4, &USERS, "0.5");
    load.place(60).await;
    let (orders, payments) = (connect(&orders_url), connect(&payments_url));
    until("they end", async || waiting(&orders).await == 0).await;
    let at = pair.primary.ask("postgres", "select pg_current_wal_lsn()").await;
    let replayed = format!("select pg_last_wal_replay_lsn() >= '{at}'");
    until("the standby has them", async || pair.standby.ask("postgres", &replayed).await == "t").await;
    // It hears no more; the primary does not mind.
    pair.standby.ask("postgres", "alter system set primary_conninfo = ''").await;
    pair.standby.ask("postgres", "select pg_reload_conf()").await;
    until("it is cut off", async || pair.primary.ask("postgres", "select count(*) from pg_stat_replication").await == "0").await;
    let kept: BTreeSet<String> =
        facts(&connect(&pair.standby.url("orders")), "select id::text as fact from orders").await.into_iter().collect();
    load.place(20).await;
    until("they end, too", async || waiting(&orders).await == 0).await;
    let accepted = load.stop().await.ids();
    pair.primary.crash().await;
    pair.promote().await;
    let lost: BTreeSet<String> = accepted.difference(&kept).cloned().collect();
    assert_eq!(lost.len(), 20);
    shop.client.ready().await;
    Client::new(shop.orders.address("orders").await).ready().await;
    let again = crate::scenario::place(&shop.client, "ann", "0.5").await;
    shop.client.ended(&again).await;
    let output = audit(&["--json"], &shop.env).await;
    let (offenders, summary) = said(&output);
    let named = |check: &str| lost.iter().map(|order| (check.to_owned(), order.clone())).collect::<BTreeSet<_>>();
    assert_eq!(offenders, named("payment_without_order").union(&named("log_request_differs")).cloned().collect(), "{summary}");
    assert_eq!(count(&payments, "select count(*) as n from payment").await, 81);
    println!(
        "standby cut off before the last {} orders and promoted: the audit names each of them; {}",
        lost.len(),
        brief(&summary)
    );
}
