//! The shop with the rights of docs/OPERATIONS.md, "Rights", and no others: its statements are the manual's own.

use std::collections::BTreeSet;

use shopd::db::Db;

use crate::audit::{audit, said};
use crate::scenario::place;
use crate::support::books::{assert_balanced, connect};
use crate::support::cluster::Cluster;
use crate::support::inside::until;
use crate::support::kafka;
use crate::support::shop::{Four, environment, migrate};

/// The SQL of the manual's section, in its order.
fn manual() -> Vec<String> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/OPERATIONS.md")).unwrap();
    let (_, section) = text.split_once("\n## Rights\n").expect("the section");
    let (section, _) = section.split_once("\n## ").expect("its end");
    section.split("```sql\n").skip(1).map(|block| block.split_once("```").expect("its end").0.to_owned()).collect()
}

async fn filled(db: &Db) -> i64 {
    crate::support::books::count(db, "select count(*) as n from filled_outbox_segments()").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_roles_work_with_the_manuals_rights_and_can_neither_change_the_ledger_nor_the_tables() {
    let cluster = Cluster::new(&[]).await;
    let [once, each] = manual().try_into().expect("once a server, and in each database");
    let (orders_url, payments_url) = (cluster.database("orders").await, cluster.database("payments").await);
    cluster.ask("postgres", &once).await;
    let kafka = kafka::shared().await;
    let prefix = kafka::prefix();
    // One before `migrate`, the other after it.
    cluster.ask("orders", &each).await;
    migrate(&environment(&kafka, &orders_url, &payments_url, &prefix)).await;
    for database in ["orders", "payments"] {
        cluster.ask(database, &each).await;
    }
    let of = |user: &str| {
        let url = |url: &str| url.replacen("postgres://shopd@", &format!("postgres://{user}@"), 1);
        environment(&kafka, &url(&orders_url), &url(&payments_url), &prefix)
    };
    let shop = Four::on_migrated(of("shopd_app")).await;
    shop.client.account("ann", "100").await;
    shop.client.post("/api/PaymentsProxy/ann/deposit", "1").await.expect(200);
    let (paid, refused) = (place(&shop.client, "ann", "0.5").await, place(&shop.client, "ann", "1000").await);
    assert_eq!(shop.client.ended(&paid).await["status"], "Finished");
    assert_eq!(shop.client.ended(&refused).await["status"], "Cancelled");
    // Also what is published is dropped.
    let (orders, payments) = (connect(&orders_url), connect(&payments_url));
    until("the outboxes are empty", async || filled(&orders).await + filled(&payments).await == 0).await;
    assert_balanced(&orders, &payments).await;
    for process in [&shop.orders, &shop.payments, &shop.relay] {
        assert!(!process.log().contains("permission denied"), "{}", process.log());
    }
    let output = audit(&["--json"], &of("shopd_audit")).await;
    let (offenders, summary) = said(&output);
    assert_eq!((output.status.code(), offenders), (Some(0), BTreeSet::new()), "{summary}");
    let may_not = [
        ("payments", "update transfer set amount = 0"),
        ("payments", "delete from payment"),
        ("payments", "truncate account"),
        ("payments", "drop table account"),
        ("orders", "delete from order_event"),
        ("orders", "delete from __diesel_schema_migrations"),
        ("orders", "alter table orders add x int"),
        ("orders", "create table x ()"),
    ];
    for (database, statement) in may_not {
        let as_app = format!(
            "do $$ begin execute 'set role shopd_app'; {statement}; raise 'it was done'; exception when insufficient_privilege then null; end $$; select 'refused'"
        );
        assert_eq!(cluster.ask(database, &as_app).await, "refused", "{statement}");
    }
}
