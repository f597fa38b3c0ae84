//! The shop with the rights of docs/OPERATIONS.md, "Rights", and no others: its statements are the manual's own.

use std::collections::BTreeSet;

use bytes::Bytes;
use chrono::Utc;
use shopd::db::Db;
use shopd::messaging::log::{KafkaLog, Log, Record};

use crate::audit::{audit, said};
use crate::scenario::place;
use crate::support::acl::{Acl, GuardedBroker};
use crate::support::books::{assert_balanced, connect, count};
use crate::support::cluster::Cluster;
use crate::support::inside::until;
use crate::support::shop::{Four, Process, environment, migrate};
use crate::support::{kafka, postgres};

/// The blocks of the manual's section in this language, in their order.
fn manual(language: &str) -> Vec<String> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/OPERATIONS.md")).unwrap();
    let (_, section) = text.split_once("\n## Rights\n").expect("the section");
    let (section, _) = section.split_once("\n## ").expect("its end");
    section.split(&format!("```{language}\n")).skip(1).map(|block| block.split_once("```").expect("its end").0.to_owned()).collect()
}

async fn filled(db: &Db) -> i64 {
    count(db, "select count(*) as n from filled_outbox_segments()").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_roles_work_with_the_manuals_rights_and_can_neither_change_the_ledger_nor_the_tables() {
    let cluster = Cluster::new(&[]).await;
    let [once, each] = manual("sql").try_into().expect("once a server, and in each database");
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

/// What the manual's commands allow, with the prefix of these topics.
fn acls(prefix: &str) -> Vec<Acl> {
    let [commands] = manual("sh").try_into().expect("one block");
    let of = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let values = |option: &str| {
            let pairs = words.windows(2).filter(|pair| pair[0] == option);
            pairs.map(|pair| pair[1].to_owned()).collect::<Vec<_>>()
        };
        let [principal] = values("--allow-principal").try_into().expect("one principal");
        let user = principal.strip_prefix("User:").expect("a user").to_owned();
        let topics = values("--topic");
        let each = values("--operation").into_iter().flat_map(move |operation| {
            let (user, prefix) = (user.clone(), prefix.to_owned());
            topics.clone().into_iter().map(move |topic| Acl {
                user: user.clone(),
                operation: operation.clone(),
                topic: format!("{prefix}{topic}"),
            })
        });
        each.collect::<Vec<_>>()
    };
    commands.lines().filter(|line| line.starts_with("$acls ")).flat_map(of).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_roles_work_with_the_manuals_rights_at_the_broker_and_one_that_is_missing_costs_no_order() {
    let prefix = kafka::prefix();
    let allowed = acls(&prefix);
    let users: BTreeSet<&str> = allowed.iter().map(|acl| acl.user.as_str()).collect();
    let broker = GuardedBroker::start(&users.iter().copied().collect::<Vec<_>>()).await;
    let (orders_url, payments_url) = (postgres::database("orders").await, postgres::database("payments").await);
    let env = environment("127.0.0.1:1", &orders_url, &payments_url, &prefix);
    let of = |role: &str| broker.variables(&format!("shopd-{role}"));
    let with = |role: &str| [env.clone(), of(role)].concat();

    let mut refused = Process::start(&["migrate"], &with("migrate"));
    assert!(!refused.ended().await.success() && refused.log().contains("AuthorizationFailed"), "{}", refused.log());
    // All but one: the relay may not send what payments decided.
    let late = |acl: &Acl| acl.user == "shopd-relay" && acl.operation == "Write" && acl.topic.ends_with("status-updates");
    let (late, now): (Vec<Acl>, Vec<Acl>) = allowed.into_iter().partition(late);
    assert_eq!(late.len(), 1);
    broker.allow(&now).await;
    migrate(&with("migrate")).await;
    // The gateway has no business there: its address leads nowhere.
    let shop = Four::on_migrated_each(env.clone(), |role| if role == "gateway" { Vec::new() } else { of(role) }).await;
    shop.client.account("ann", "100").await;
    let order = place(&shop.client, "ann", "0.5").await;
    let (orders, payments) = (connect(&orders_url), connect(&payments_url));
    until("it is decided", async || count(&payments, "select count(*) as n from payment").await == 1).await;
    until("the relay says why it does not go on", async || shop.relay.log().contains("may describe them")).await;
    broker.allow(&late).await;
    assert_eq!(shop.client.ended(&order).await["status"], "Finished");
    assert_balanced(&orders, &payments).await;
    assert_eq!(count(&payments, "select count(*) as n from dead_letter").await, 0);

    let output = audit(&["--json"], &with("audit")).await;
    let (offenders, summary) = said(&output);
    assert_eq!((output.status.code(), offenders), (Some(0), BTreeSet::new()), "{summary}");

    // Who may not see the one topic does not say of it that all is true.
    let output = audit(&["--json"], &with("orders")).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(said.contains("order-payment-requests is not there, or this user may not see it"), "{said}");

    // And a dead letter's copy, on a topic that is made for it.
    let admin = KafkaLog::new(&broker.as_admin(&prefix));
    let record = Record {
        topic: "order-payment-requests".into(),
        key: Some(Bytes::from_static(b"ann")),
        value: Some(Bytes::from_static(b"no request")),
        headers: Vec::new(),
        timestamp: Utc::now(),
    };
    admin.append(vec![record]).await.unwrap();
    until("its copy is there", async || {
        let topic = "order-payment-requests.dlq";
        let partitions = admin.partitions(topic).await.unwrap_or_default();
        let mut copies = 0;
        for partition in 0..partitions {
            copies += admin.bounds(topic, partition).await.map_or(0, |(start, end)| end - start);
        }
        copies == 1
    })
    .await;
}
