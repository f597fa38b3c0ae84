//! One database brought back to a point in time: the same system identifier, another timeline, and transaction ids that are given a second
//! time to other transactions.

use std::collections::BTreeSet;

use super::{NO_SWEEP, set};
use crate::audit::{audit, brief, said};
use crate::support::books::{connect, count};
use crate::support::cluster::{Cluster, admit, text};
use crate::support::inside::until;
use crate::support::load::Load;
use crate::support::shop::{Client, Four};
use crate::support::{kafka, postgres};

const USERS: [&str; 2] = ["ann", "bob"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_brought_back_to_a_point_in_time_sends_what_waited_then_and_reads_ids_that_are_given_again() {
    let archive = postgres::own_dir();
    let archiving = format!("test ! -f {0}/%f && cp %p {0}/%f", text(&archive.join("wal")));
    let settings = [("archive_mode", "on"), ("archive_command", archiving.as_str()), ("wal_level", "replica")];
    let source = Cluster::new(&settings).await;
    std::fs::create_dir(archive.join("wal")).expect("the archive");
    admit(&archive);
    source.give(&archive.join("wal"));
    let payments_cluster = Cluster::new(&[]).await;
    let (orders_url, payments_url) = (source.database("orders").await, payments_cluster.database("payments").await);
    let (bootstrap, prefix) = (kafka::shared().await, kafka::prefix());
    let mut shop = Four::start_with(&bootstrap, &orders_url, &payments_url, &prefix, &[NO_SWEEP]).await;
    let (orders, payments) = (connect(&orders_url), connect(&payments_url));
    for user in USERS {
        shop.client.account(user, "100000").await;
    }
    // The base backup is taken while orders come.
    let load = Load::start(&shop.client, 4, &USERS, "1");
    load.place(40).await;
    let recovered = postgres::own_dir();
    admit(&recovered);
    tokio::join!(source.base_backup(&recovered, &["--wal-method=none"]), load.place(40));
    until("they end", async || count(&orders, "select count(*) as n from orders where status = 'New'").await == 0).await;

    // What nobody ever published when the point comes: no relay will before the end of this cluster.
    shop.relay.kill().await;
    load.place(30).await;
    source.ask("postgres", "select pg_create_restore_point('before_the_mistake')").await;
    let known = set(&orders, "select id::text as fact from orders").await;
    source.burn_transactions(2_000).await;
    load.place(30).await;
    let all = load.stop().await.ids();
    let lost: BTreeSet<String> = all.difference(&known).cloned().collect();
    assert_eq!(lost.len(), 30);
    let highest = "select max(xid)::text as fact from order_change";
    let highest_lost: u64 = set(&orders, highest).await.first().and_then(|xid| xid.parse().ok()).expect("a transaction id");
    let segment = source.ask("postgres", "select pg_walfile_name(pg_current_wal_lsn())").await;
    source.ask("postgres", "select pg_switch_wal()").await;
    let archived = "select last_archived_wal from pg_stat_archiver";
    until("the archive has it", async || source.ask("postgres", archived).await >= segment).await;
    let system_identifier = source.system_identifier().await;
    drop(shop);
    source.crash().await;

    std::fs::write(recovered.join("postgres/recovery.signal"), "").expect("a signal");
    source.give(&recovered.join("postgres"));
    let restoring = format!("cp {}/%f %p", text(&archive.join("wal")));
    let target = [
        ("restore_command", restoring.as_str()),
        ("recovery_target_name", "before_the_mistake"),
        ("recovery_target_action", "promote"),
    ];
    let recovered = Cluster::at(recovered, &target).await;
    until("it is promoted", async || recovered.ask("postgres", "select pg_is_in_recovery()").await == "f").await;
    assert_eq!(recovered.system_identifier().await, system_identifier, "the same system, so the outbox is not stamped anew");
    let timeline = recovered.ask("postgres", "select timeline_id from pg_control_checkpoint()").await;

    let orders_url = recovered.url("orders");
    let orders = connect(&orders_url);
    assert_eq!(set(&orders, "select id::text as fact from orders").await, known, "as of the point, and nothing else");
    let shop = Four::start_with(&bootstrap, &orders_url, &payments_url, &prefix, &[NO_SWEEP]).await;
    // Ids that were lost transactions' are these orders'.
    let load = Load::start(&shop.client, 4, &USERS, "1");
    load.place(40).await;
    let after = load.stop().await.ids();
    let statement =
        "select min(accepted_xid)::text as fact from (select accepted_xid from orders order by created_at desc limit 40) latest";
    let lowest_new: u64 = set(&orders, statement).await.first().and_then(|xid| xid.parse().ok()).expect("a transaction id");
    assert!(lowest_new <= highest_lost, "{lowest_new} was given before the point only, up to {highest_lost}");
    until("every order ends", async || count(&orders, "select count(*) as n from orders where status = 'New'").await == 0).await;
    let there = set(&orders, "select id::text as fact from orders").await;
    assert_eq!(there, known.union(&after).cloned().collect(), "nothing is invented");
    assert!(!shop.relay.log().contains("came from another cluster"));
    println!(
        "point in time: {} orders known then (30 unsent), {} later ones lost with their transactions, {} new ones from xid {lowest_new} (lost: up to {highest_lost}), timeline {timeline}: all final",
        known.len(),
        lost.len(),
        after.len()
    );
    let output = audit(&["--json"], &shop.env).await;
    let (offenders, summary) = said(&output);
    assert_eq!(offenders, BTreeSet::new(), "{summary}");
    println!("  audit: {}", brief(&summary));
    let client: &Client = &shop.client;
    for id in &lost {
        client.get(&format!("/api/OrdersProxy/{id}")).await.expect(404);
    }
    assert_eq!(count(&payments, "select count(*) as n from payment").await, there.len() as i64, "nobody paid for a lost order");
}
